"""Processes of the real vLLM on this machine: each as a pod would hold it, at a loopback address of its own."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from e2e.cluster.paths import cache_folder
from e2e.explained import NOT_ON_A_CPU, Expected, expected, explain
from e2e.listening import Listener, Seen, family, look
from e2e.real_vllm import launcher, model, packages

API = 8000
KEY = "the-engine-key"
NAME = "llama"

FLAGS = (
    f"--served-model-name={NAME}",
    "--enforce-eager",
    "--dtype=float32",
    "--max-model-len=256",
    "--load-format=dummy",
    "--kv-cache-memory-bytes=67108864",
    "--max-num-seqs=4",
)
"""What lets the tiny model run on a CPU; the command line of the operator has the rest."""

_LOOPBACK = "127.0.0.1"
"""Gloo takes the first address of an interface, and all of these processes share theirs."""
_START_SECONDS = 1200.0
"""For a minute's work on an idle machine of two cores."""
_END_SECONDS = 60.0


@dataclass
class RealVllm:
    """One start of ``vllm serve``.

    Attributes:
        address: its own.
        process: the first of its processes.
        log_file: what all of them say.
    """

    address: str
    process: subprocess.Popen[bytes]
    log_file: Path

    @property
    def log(self) -> str:
        """What it said so far."""
        return self.log_file.read_text("utf-8", "replace")

    def ask(self, method: str, path: str, body: Any = None, key: str | None = KEY) -> tuple[int, str]:
        """Send one request; status and text of the answer.

        Raises:
            OSError: it does not answer.
        """
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        connection = http.client.HTTPConnection(self.address, API, timeout=120)
        with contextlib.closing(connection):
            connection.request(method, path, None if body is None else json.dumps(body), headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode()

    def serves(self) -> bool:
        """Whether it is healthy.

        Raises:
            AssertionError: it has ended; with its log.
        """
        if self.process.poll() is not None:
            raise AssertionError(f"vLLM ended with {self.process.returncode}:\n{self.log[-8000:]}")
        with contextlib.suppress(OSError):
            return self.ask("GET", "/health")[0] == http.HTTPStatus.OK
        return False

    def healthy(self) -> None:
        """Wait until it serves.

        Raises:
            AssertionError: it ended, or not in time; with its log.
        """
        end = time.monotonic() + _START_SECONDS
        while not self.serves():
            if time.monotonic() > end:
                raise AssertionError(f"not healthy:\n{self.log[-8000:]}")
            time.sleep(0.5)

    def seen(self) -> Seen:
        """Look at the sockets of all its processes."""
        return look(self.process.pid, family(self.process.pid))

    def explained(self) -> dict[Listener, tuple[str, ...]]:
        """Its sockets, and the rows of the catalogue that its command line gives each."""
        return explain(self.seen(), self.expected())

    def expected(self) -> tuple[Expected, ...]:
        """What the catalogue says of it."""
        seen = self.seen()
        return expected(serve_arguments(seen), seen.environment, packages.version(), _LOOPBACK, NOT_ON_A_CPU)

    def end(self) -> None:
        """End it, and whatever of it is left."""
        started = family(self.process.pid)
        self.process.terminate()
        try:
            self.process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in started:  # a headless rank can outlive its first process
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def serve_arguments(seen: Seen) -> tuple[str, ...]:
    """What follows ``vllm serve`` on the command line of the first process."""
    return seen.arguments[seen.arguments.index("serve") + 1 :]


@contextmanager
def running(folder: Path, address: str, *flags: str) -> Iterator[RealVllm]:
    """Run ``vllm serve`` for the length of a `with` block; it is not healthy yet.

    Args:
        folder: where its model and its log are.
        address: its own, a loopback address.
        flags: beside `FLAGS` and the address.
    """
    model.write(folder / "model")
    log = folder / f"vllm-{address}.log"
    listens = () if "--headless" in flags else (f"--host={address}", f"--port={API}")
    command = [sys.executable, launcher.__file__, "serve", str(folder / "model"), *FLAGS, *listens, *flags]
    own = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": str(packages.folder()),
        # What vLLM found out about its classes: half of a start.
        "VLLM_CACHE_ROOT": str(cache_folder() / "vllm-cache"),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_API_KEY": KEY,
        "VLLM_HOST_IP": address,
        "GLOO_SOCKET_IFNAME": "lo",
    }
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=own)
    started = RealVllm(address, process, log)
    try:
        yield started
    finally:
        started.end()
