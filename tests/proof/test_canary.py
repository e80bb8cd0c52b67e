"""The canary's program: what it listens on, what it tries, how it ends."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from securevllm.proof import canary
from securevllm.proof.dial import Listener, accepting
from securevllm.proof.wire import CANARY_VARIABLE, CanaryConfig, Reach, Target, dump, dump_answers, load_answers

if TYPE_CHECKING:
    from collections.abc import Callable

OPERATOR = Path(__file__).parents[2] / "operator"
ADDRESS = "127.93.0.1"


def started(tmp_path: Path, config: str, *arguments: str) -> subprocess.Popen[str]:
    env = {
        "PATH": os.environ["PATH"], "PYTHONPATH": str(OPERATOR), CANARY_VARIABLE: config, "POD_IPS": f"{ADDRESS},::1",
        "TERMINATION_LOG": str(tmp_path / "termination"),
    }  # fmt: skip
    command = [sys.executable, "-m", "securevllm", "canary", *arguments]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # noqa: S603 - fixed


def free_port() -> int:
    with socket.create_server((ADDRESS, 0)) as server:
        return int(server.getsockname()[1])


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


async def test_what_accepts_is_open_and_what_refuses_is_blocked() -> None:
    port = free_port()
    async with Listener((accepting(ADDRESS, port),)):
        shut = Target("shut", "127.93.0.2", port)
        found = await canary.probe(CanaryConfig(targets=(Target("open", ADDRESS, port), shut)))
    assert found == {"open": Reach.OPEN, "shut": Reach.REFUSED}


async def test_what_does_not_answer_at_first_is_tried_again_and_what_answers_is_not(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(canary, "_PAUSE", 0.0)
    tried: list[str] = []

    async def dial(address: str, _port: int, _seconds: float) -> Reach:
        tried.append(address)
        await asyncio.sleep(0)
        lost = address == "lost" and tried.count("lost") == 1
        return Reach.SILENT if lost or address == "shut" else Reach.OPEN

    monkeypatch.setattr(canary, "dial", dial)
    names = ("open", "lost", "shut")
    found = await canary.probe(CanaryConfig(targets=tuple(Target(name, name, 1) for name in names)))
    assert found == {"open": Reach.OPEN, "lost": Reach.OPEN, "shut": Reach.SILENT}
    assert sorted(tried) == ["lost", "lost", "open", "shut", "shut"]


def test_it_leaves_what_it_saw_as_its_termination_message(tmp_path: Path) -> None:
    (tmp_path / "termination").touch()  # kubelet makes it
    with socket.create_server((ADDRESS, 0)) as server:
        port = server.getsockname()[1]
        config = dump(CanaryConfig(targets=(Target("a", ADDRESS, port), Target("b", "127.93.0.2", port))))
        code, out, err = ended(started(tmp_path, config, "probe"))
    assert (code, err) == (0, "")
    left = (tmp_path / "termination").read_text(encoding="utf-8")
    assert load_answers(left) == load_answers(out) == {"a": Reach.OPEN, "b": Reach.REFUSED}


def test_a_hundred_answers_fit_into_a_termination_message() -> None:
    """Kubelet keeps 4096 bytes."""
    keys = [*(f"e{n}" for n in range(128)), *(f"c{n}.{port}" for n in range(8) for port in range(29500, 29520))]
    reaches = [*Reach]
    answers = {key: reaches[n % len(reaches)] for n, key in enumerate(keys)}
    text = dump_answers(answers)
    assert len(text.encode()) < 4096
    assert load_answers(text) == answers


def test_a_listener_accepts_until_it_is_ended_and_reads_nothing(tmp_path: Path) -> None:
    port = free_port()
    process = started(tmp_path, dump(CanaryConfig(listen=(port,))), "listen")
    _await(lambda: _reached(port), process)
    for address in (ADDRESS, "::1"):  # one of each family
        reset = contextlib.suppress(ConnectionResetError)
        with reset, socket.create_connection((address, port), timeout=60) as connection:
            assert connection.recv(1) == b""
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 0


@pytest.mark.parametrize(
    ("config", "arguments", "code", "told"),
    [
        ("", ["probe"], 2, CANARY_VARIABLE),
        ("[]", ["probe"], 2, "not a JSON object"),
        (json.dumps({"targets": [{"key": 1}]}), ["probe"], 2, "targets[0].key is 1, not a text"),
        (json.dumps({"targets": [{"key": "a", "address": "::1"}]}), ["probe"], 2, "targets[0].port is missing"),
        (json.dumps({"listen": "80"}), ["listen"], 2, 'listen is "80", not a list of whole numbers'),
        (json.dumps({"seconds": math.nan}), ["probe"], 2, "seconds is NaN, not a number"),
        ("{}", [], 2, "usage: securevllm canary listen|probe"),
        ("{}", ["dance"], 2, "usage: securevllm canary listen|probe"),
        # What a newer operator says and an older image does not know is left out.
        ('{"later": true}', ["probe"], 0, ""),
        (dump(CanaryConfig(targets=(Target("a", "127.93.0.2", 1),), seconds=0.0)), ["probe"], 1, "within 0 s"),
    ],
)
def test_wrong_usage_is_told(tmp_path: Path, config: str, arguments: list[str], code: int, told: str) -> None:
    found, _, err = ended(started(tmp_path, config, *arguments))
    assert (found, told in err) == (code, True)


def test_a_port_in_use_is_told(tmp_path: Path) -> None:
    with socket.create_server((ADDRESS, 0)) as server:
        config = dump(CanaryConfig(listen=(server.getsockname()[1],)))
        code, _, err = ended(started(tmp_path, config, "listen"))
    assert (code, "cannot listen" in err) == (1, True)


def _reached(port: int) -> bool:
    try:
        socket.create_connection((ADDRESS, port), timeout=60).close()
    except ConnectionRefusedError:
        return False
    return True


def _await(there: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    while not there():
        assert process.poll() is None, ended(process)
