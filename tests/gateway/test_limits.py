"""Sizes, rates and times: what is too much is refused by the gateway, and what is slow holds nothing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import socket
import time
from collections.abc import Iterator

import pytest

from securevllm.render.envoy import ClientKey, Timeouts
from tests.gateway import attacks, wire
from tests.gateway.gateway import MODEL, Gateway, started

pytestmark = pytest.mark.envoy

CLIENTS = [ClientKey(f"client-{number}", f"client-key-{number:030d}") for number in range(60)]
LIMITS = dataclasses.replace(
    MODEL,
    requests_per_second_per_client=2,
    stream_seconds=3,
    stream_idle_seconds=1,
    connections=60,
    timeouts=Timeouts(
        tls_handshake_seconds=1, request_headers_seconds=1, upload_seconds=1.5, answer_seconds=1, stream_idle_seconds=1
    ),
)
CHAT = ("POST", "/v1/chat/completions")


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]) -> Iterator[Gateway]:
    with started(LIMITS, tmp_path_factory.mktemp("gateway"), certificate, keys=CLIENTS) as gateway:
        yield gateway


@pytest.fixture
def key(request: pytest.FixtureRequest) -> str:
    """A client of the test's own, so that no test meets another one's rate limit."""
    number = sorted(name for name in globals() if name.startswith("test_")).index(request.function.__name__)
    return CLIENTS[number].key


def _timed(gateway: Gateway, data: bytes, *, patience: float = 5) -> tuple[bytes, float]:
    began = time.monotonic()
    return wire.exchange(gateway.port, data, patience=patience, more=patience), time.monotonic() - began


def test_headers_that_never_end(gateway: Gateway, key: str) -> None:
    answer, seconds = _timed(gateway, wire.request("GET", "/v1/models", key=key)[:-2])

    assert wire.status_of(answer) == 408
    assert 0.8 < seconds < 3


def test_body_that_never_ends(gateway: Gateway, key: str) -> None:
    data = wire.request(*CHAT, "content-length: 100", key=key)

    answer, seconds = _timed(gateway, data + b"{")

    assert wire.status_of(answer) == 408
    assert 0.8 < seconds < 4


def test_body_that_trickles(gateway: Gateway, key: str) -> None:
    with wire.connect(gateway.port) as sock:
        sock.sendall(wire.request(*CHAT, "content-length: 1000", key=key))
        began = time.monotonic()
        sock.settimeout(0.2)
        answer = b""
        while not answer and time.monotonic() - began < 5:
            sock.sendall(b"x")
            with contextlib.suppress(TimeoutError):
                answer = sock.recv(1000)

    assert wire.status_of(answer) == 408
    assert time.monotonic() - began < 4


def test_handshake_that_never_begins(gateway: Gateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=5) as sock:
        began = time.monotonic()
        closed = sock.recv(1)

    assert closed == b""
    assert 0.8 < time.monotonic() - began < 3


def test_largest_body_passes(gateway: Gateway, key: str) -> None:
    answer, _ = _timed(gateway, wire.request(*CHAT, "connection: close", key=key, body=b" " * attacks.BODY_LIMIT))

    assert wire.status_of(answer) == 200


def test_announced_body_over_the_limit(gateway: Gateway, key: str) -> None:
    gateway.engine.clear()

    answer, _ = _timed(gateway, wire.request(*CHAT, f"content-length: {attacks.BODY_LIMIT + 1}", key=key), patience=1)

    assert wire.status_of(answer) == 413
    assert b"x-securevllm-gateway: llama-gateway" in answer
    assert gateway.engine.seen == []


def test_streamed_body_over_the_limit(gateway: Gateway, key: str) -> None:
    gateway.engine.clear()
    chunk = b"10000\r\n" + b" " * 0x10000 + b"\r\n"

    answer, _ = _timed(gateway, wire.request(*CHAT, "transfer-encoding: chunked", key=key) + chunk * 20, patience=1)

    assert wire.status_of(answer) == 413
    assert [seen.complete for seen in gateway.engine.seen] in ([], [False])


def test_rate_of_one_client_is_not_the_others_problem(gateway: Gateway, key: str) -> None:
    with wire.Client(gateway.port) as client:
        mine = [wire.status_of(client.ask(wire.request("GET", "/v1/models", key=key))) for _ in range(6)]
        other = wire.status_of(client.ask(wire.request("GET", "/v1/models", key=CLIENTS[-1].key)))
        refused = client.ask(wire.request("GET", "/v1/models", key=key))

    assert mine.count(200) in {2, 3, 4}  # a second may begin in between
    assert mine[-1] == 429
    assert other == 200
    assert b"x-securevllm-gateway: llama-gateway" in refused


def test_more_clients_than_envoys_default_of_twenty_buckets(gateway: Gateway) -> None:
    clients = CLIENTS[20:50]
    served: dict[str, float] = {}
    compared = 0
    with wire.Client(gateway.port) as client:

        def ask(entry: ClientKey) -> int:
            return wire.status_of(client.ask(wire.request("GET", "/v1/models", key=entry.key)))

        for entry in clients:
            served[entry.client] = time.monotonic()
            assert [ask(entry), ask(entry)] == [200, 200]
        for entry in clients:
            status = ask(entry)
            if time.monotonic() - served[entry.client] < 0.9:  # its bucket cannot have been filled again
                assert status == 429, entry.client
                compared += 1

    assert compared > 5


def test_unauthenticated_requests_use_up_nobodys_rate(gateway: Gateway, key: str) -> None:
    with wire.Client(gateway.port) as client:
        forged = wire.request("GET", "/v1/models", "x-gateway-client: client-9", key="wrong-key-wrong-key-wrong")
        assert {wire.status_of(client.ask(forged)) for _ in range(10)} == {401}
        assert wire.status_of(client.ask(wire.request("GET", "/v1/models", key=key))) == 200


def _stream(key: str, events: int, interval: float) -> bytes:
    body = json.dumps({"stream": events, "interval": interval}).encode()
    return wire.request(*CHAT, "content-type: application/json", "connection: close", key=key, body=body)


def test_events_arrive_while_the_engine_still_works(gateway: Gateway, key: str) -> None:
    gateway.engine.events = 0
    lead = []
    with wire.connect(gateway.port) as sock:
        sock.sendall(_stream(key, 6, 0.15))
        received = b""
        while b"0\r\n\r\n" not in received:
            received += sock.recv(65536)
            lead.append(gateway.engine.events - received.count(b"data: "))

    assert received.count(b"data: ") == 6
    assert max(lead) <= 1  # nothing was kept back: the engine is never more than one event ahead


def test_silence_in_a_stream_is_bounded(gateway: Gateway, key: str) -> None:
    answer, seconds = _timed(gateway, _stream(key, 3, 2.5))

    assert answer.count(b"data: ") == 1
    assert 0.9 < seconds < 2.4


def test_length_of_a_stream_is_bounded(gateway: Gateway, key: str) -> None:
    answer, seconds = _timed(gateway, _stream(key, 50, 0.2))

    assert 5 < answer.count(b"data: ") < 20
    assert 2.5 < seconds < 5


def test_engine_learns_that_the_client_left(gateway: Gateway, key: str) -> None:
    aborted = gateway.engine.aborted
    with wire.connect(gateway.port) as sock:
        sock.sendall(_stream(key, 30, 0.05))
        sock.recv(1000)

    deadline = time.monotonic() + 3
    while gateway.engine.aborted == aborted and time.monotonic() < deadline:
        time.sleep(0.02)
    assert gateway.engine.aborted == aborted + 1


def test_too_many_connections_leave_the_ops_port_alone(gateway: Gateway) -> None:
    with contextlib.ExitStack() as stack:
        closed = 0
        for _ in range(LIMITS.connections + 20):
            sock = stack.enter_context(socket.create_connection(("127.0.0.1", gateway.port), timeout=1))
            sock.settimeout(0.01)
            with contextlib.suppress(TimeoutError):
                closed += sock.recv(1) == b""
        assert closed >= 15
        assert gateway.envoy.ready()
        assert "rds.yaml" in gateway.envoy.versions()
