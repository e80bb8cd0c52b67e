"""The real vLLM as processes of this machine: what the catalogue says of its sockets and its key, and its nerves."""

from __future__ import annotations

import asyncio
import json
import os
import re
import secrets
import socket
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from e2e.explained import table
from e2e.listening import family
from e2e.real_vllm import packages
from e2e.real_vllm.process import API, NAME, RealVllm, running
from securevllm import catalogue
from securevllm.proof.dial import dial
from securevllm.proof.wire import Reach

ARTEFACTS = Path(__file__).resolve().parents[2] / "build" / "e2e"
ROUNDS = 1000
_ALL = 1_000_000
STORE = catalogue.sockets()["torch-distributed"].port

_CHAT = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
_TROUBLE = re.compile(r"^.*\b(?:ERROR|CRITICAL|Traceback|Exception|Error)\b.*$", re.MULTILINE)


@pytest.fixture(scope="module")
def folder() -> Path:
    """Give a folder for models and logs, which are kept; the packages are there."""
    if reason := packages.missing():
        pytest.skip(reason)
    packages.ensure(lambda line: print(line, file=sys.__stderr__, flush=True))
    return ARTEFACTS / "real vLLM"


@pytest.fixture(scope="module")
def alone(folder: Path) -> Iterator[RealVllm]:
    """Run a model replica of one process with one rank."""
    with running(folder, _address()) as started:
        started.healthy()
        yield started


@pytest.fixture(scope="module")
def pair(folder: Path) -> Iterator[tuple[RealVllm, RealVllm, Counter[Reach]]]:
    """Run a model replica that is spread over two processes, probed from the first moment."""
    head, worker = _address(), _address()
    shared = ("--tensor-parallel-size=2", "--nnodes=2", f"--master-addr={head}", f"--master-port={STORE}")
    with ExitStack() as stack:
        with _probed([(head, API), (head, STORE)]) as probed:
            first = stack.enter_context(running(folder, head, *shared, "--node-rank=0"))
            second = stack.enter_context(running(folder, worker, *shared, "--node-rank=1", "--headless"))
            first.healthy()
        yield first, second, probed


def test_one_process_serves_and_each_of_its_sockets_is_explained(alone: RealVllm) -> None:
    _assert_completes(alone)
    assert json.loads(alone.ask("GET", "/version")[1])["version"] == str(packages.version())
    _assert_explained(alone, "one process", {"api"})


@pytest.mark.parametrize("beside", [True, False], ids=["elsewhere", "where Gloo listens"])
def test_a_socket_that_no_row_gives_is_found(alone: RealVllm, beside: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without this the other tests would show little. Where ports are random only their number tells."""
    with socket.socket() as stranger:
        stranger.bind((alone.address if beside else "127.0.0.1", 0))
        stranger.listen()
        # As if one of vLLM's processes held it.
        monkeypatch.setattr("e2e.real_vllm.process.family", lambda pid: {*family(pid), os.getpid()})
        unexplained = [(found.address, found.port) for found, names in alone.explained().items() if not names]
        assert unexplained == [stranger.getsockname()]


def test_the_key_guards_some_routes_only(alone: RealVllm) -> None:
    """Why there is a gateway: with the key set, a request without one still gets its completion."""
    assert alone.ask("POST", "/v1/chat/completions", _CHAT, key=None)[0] == 401
    assert alone.ask("POST", "/invocations", _CHAT, key=None)[0] == 200


def test_each_route_of_its_own_description_is_in_the_catalogue(alone: RealVllm) -> None:
    known = {(route.method, route.path) for route in catalogue.routes_of(packages.version()).values()}
    described = {
        (method.upper(), path)
        for path, methods in json.loads(alone.ask("GET", "/openapi.json")[1])["paths"].items()
        for method in methods
    }
    assert ("POST", "/v1/chat/completions") in described
    assert described - known == set()


def test_several_ranks_in_one_process_have_sockets_of_their_own(folder: Path) -> None:
    with running(folder, _address(), "--tensor-parallel-size=2") as started:
        started.healthy()
        _assert_explained(started, "two ranks in one process", {"api", "gloo"})


def test_a_replica_over_two_processes_serves_and_each_of_its_sockets_is_explained(
    pair: tuple[RealVllm, RealVllm, Counter[Reach]],
) -> None:
    head, worker, _ = pair
    _assert_completes(head)
    _assert_explained(head, "head of two processes", {"api", "torch-distributed", "gloo", "message-queue"})
    _assert_explained(worker, "worker of two processes", {"gloo", "message-queue"})


def test_probes_from_start_up_to_load_leave_no_trace_in_its_log(
    pair: tuple[RealVllm, RealVllm, Counter[Reach]],
) -> None:
    head, worker, starting = pair
    assert starting[Reach.OPEN], "none of them met a socket while it started"
    loaded: Counter[int] = Counter()
    ending = threading.Event()

    def ask() -> None:
        while not ending.is_set():
            try:
                loaded[head.ask("POST", "/v1/chat/completions", _CHAT)[0]] += 1
            except OSError:
                loaded[0] += 1

    asking = [threading.Thread(target=ask) for _ in range(2)]
    for thread in asking:
        thread.start()
    try:
        serving = asyncio.run(_rounds([(head.address, API), (head.address, STORE)], ROUNDS, threading.Event(), 0.01))
    finally:
        ending.set()
        for thread in asking:
            thread.join()
    assert serving == {Reach.OPEN: 2 * ROUNDS}
    assert set(loaded) == {200}
    _assert_completes(head)
    trouble = [line for one in (head, worker) for line in _TROUBLE.findall(one.log)]
    assert trouble == []
    print(f"\nrounds in start-up: {starting.total() // 2}; under load: {ROUNDS}, with {loaded.total()} completions")


@contextmanager
def _probed(targets: list[tuple[str, int]]) -> Iterator[Counter[Reach]]:
    """Probe from another thread until the end of the block, and count what came of it."""
    found: Counter[Reach] = Counter()
    ending = threading.Event()
    thread = threading.Thread(target=lambda: found.update(asyncio.run(_rounds(targets, _ALL, ending, 0.05))))
    thread.start()
    try:
        yield found
    finally:
        ending.set()
        thread.join()


async def _rounds(
    targets: list[tuple[str, int]], rounds: int, ending: threading.Event, pause: float = 0.0
) -> Counter[Reach]:
    found: Counter[Reach] = Counter()
    for _ in range(rounds):
        if ending.is_set():
            break
        found.update(await asyncio.gather(*(dial(address, port, 5) for address, port in targets)))
        await asyncio.sleep(pause)
    return found


def _assert_completes(started: RealVllm) -> None:
    status, text = started.ask("POST", "/v1/chat/completions", _CHAT)
    assert status == 200, f"{text}\n{started.log[-6000:]}"
    assert json.loads(text)["usage"]["completion_tokens"] == 8


def _assert_explained(started: RealVllm, what: str, there: set[str]) -> None:
    """Every socket has a row, and these rows have sockets; the table is kept."""
    explained = started.explained()
    shown = table(explained, started.expected())
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / f"sockets of the real vLLM, {what}.txt").write_text(shown + "\n", encoding="utf-8")
    assert all(explained.values()), shown
    assert {name for names in explained.values() for name in names} >= there, shown


def _address() -> str:
    """A loopback address that nobody else uses."""
    return f"127.{100 + secrets.randbelow(100)}.{secrets.randbelow(250)}.{1 + secrets.randbelow(250)}"
