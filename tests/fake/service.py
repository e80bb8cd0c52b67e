"""Processes of fake-vllm as pods would hold them: an address each, upstream's arguments, a log that is read.

On one machine the addresses are 127.x.y.z, drawn so that two runs of the tests do not meet.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from e2e.listening import look

ROOT = Path(__file__).resolve().parents[2]
KEY = "the-engine-key"
MODEL = "llama"
PATIENCE = 30.0
"""Seconds for what takes less than one on an idle machine."""

_LISTENS = re.compile(r"\[fake_vllm\] ([\w-]+) \(.*?\) of rank (\d+) listens on \[?([^\]\s]+)\]?:(\d+)$", re.MULTILINE)
_API = re.compile(r"Starting vLLM server on http://\[?([^\]\s]+)\]?:(\d+)$", re.MULTILINE)
_numbers = itertools.count(1)


def free_port(address: str = "") -> int:
    """A port that was free a moment ago, on all interfaces or on one address."""
    with socket.socket() as one:
        one.bind((address, 0))
        return int(one.getsockname()[1])


def own_address() -> str:
    """A loopback address that nobody else uses."""
    number = next(_numbers)
    return f"127.{1 + os.getpid() % 250}.{os.getpid() // 250 % 250}.{number}"


def until(check: Callable[[], bool], what: Callable[[], str], seconds: float = PATIENCE) -> None:
    """Wait for something.

    Raises:
        AssertionError: it did not come true in time.
    """
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            raise AssertionError(what())
        time.sleep(0.05)


@dataclass
class Vllm:
    """One process of ``vllm serve``."""

    address: str
    port: int
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it said so far."""
        return self.log_file.read_text(encoding="utf-8")

    def says(self, text: str, seconds: float = PATIENCE) -> None:
        """Wait for words in the log."""
        until(lambda: re.search(text, self.log) is not None, lambda: f"not said: {text}\n{self.log}", seconds)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any]:
        """One request with the key; status and decoded JSON, or text."""
        given = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"} | headers
        return request(method, f"http://{self.address}:{self.port}{path}", body, given)

    def healthy(self, seconds: float = PATIENCE) -> None:
        """Wait until it serves."""

        def serves() -> bool:
            assert self.process.poll() is None, self.log
            with contextlib.suppress(OSError):
                return self.ask("GET", "/health")[0] == 200
            return False

        until(serves, lambda: f"not healthy\n{self.log}", seconds)

    def opened(self) -> Counter[str]:
        """Names of the rows whose sockets it listens on, as its log explains them; a port is one that it does not."""
        told = {(host, int(port)): name for name, _, host, port in _LISTENS.findall(self.log)}
        told |= {(host, int(port)): "api" for host, port in _API.findall(self.log)}
        there = listening(self.process.pid)
        services = {place for place in there if place not in told}
        assert set(told) - there == set(), self.log
        return Counter(told.values()) + Counter(f"port {port}" for _, port in services)

    def end(self, number: signal.Signals = signal.SIGTERM) -> int:
        """End it and wait."""
        self.process.send_signal(number)
        return self.process.wait(timeout=PATIENCE)


def request(method: str, url: str, body: Any = None, headers: Mapping[str, str] | None = None) -> tuple[int, Any]:
    """One request; status and decoded JSON, or text."""
    content = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = urllib.request.Request(url, content, dict(headers or {}), method=method)  # noqa: S310 - always http
    try:
        with urllib.request.urlopen(sent, timeout=PATIENCE) as answer:  # noqa: S310
            status, text = answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            status, text = error.code, error.read()
    try:
        return status, json.loads(text)
    except ValueError:
        return status, text.decode()


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every socket on which a process listens, from /proc."""
    return {(found.address, found.port) for found in look(pid, {pid}).listeners}


@dataclass
class Service:
    """Starts processes, and ends all of them."""

    folder: Path
    running: list[Vllm] = field(default_factory=list)

    def vllm(
        self,
        *flags: str,
        address: str = "",
        port: int = 0,
        env: Mapping[str, str] | None = None,
        prefix: Sequence[str] = (),
    ) -> Vllm:
        """Start one as a pod would.

        Args:
            flags: after the model.
            address: of the pod; absent: a loopback address of its own.
            port: of the API; absent: a free one.
            env: besides what every pod has.
            prefix: command in front, such as ``ip netns exec NAME``.
        """
        address = address or own_address()
        port = port or free_port(address)
        log = self.folder / f"vllm-{len(self.running)}.log"
        command = [*prefix, sys.executable, str(ROOT / "e2e/fake_vllm/vllm"), "serve", MODEL, *flags]
        command += ["--headless"] if "--headless" in flags else [f"--host={address}", f"--port={port}"]
        environment = {"VLLM_HOST_IP": address, "VLLM_API_KEY": KEY, "PATH": os.environ["PATH"], **(env or {})}
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=environment)  # noqa: S603
        started = Vllm(address, port, process, log)
        self.running.append(started)
        return started

    def close(self) -> None:
        """End all that run."""
        for one in self.running:
            if one.process.poll() is None:
                one.process.kill()
            one.process.wait(timeout=PATIENCE)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Service]:
    """A service that leaves nothing behind."""
    service = Service(folder)
    try:
        yield service
    finally:
        service.close()
