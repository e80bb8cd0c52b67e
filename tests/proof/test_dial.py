"""How a connection is tried, and what the kernel says of it: real sockets on loopback."""

from __future__ import annotations

import asyncio
import errno
import socket
import struct
import threading
import time
from pathlib import Path

import pytest

from securevllm.proof import gate
from securevllm.proof.dial import _afterwards, _named, dial, has_ipv6, knock
from securevllm.proof.wire import Forbidden, GateConfig, Reach

HOST = "127.0.0.1"


def free_port() -> int:
    with socket.create_server((HOST, 0)) as server:
        return int(server.getsockname()[1])


def begun(port: int) -> socket.socket:
    """A connection whose handshake is over, or refused, before anybody has looked."""
    one = socket.socket()
    one.setblocking(False)
    assert one.connect_ex((HOST, port)) in {errno.EINPROGRESS, errno.ECONNREFUSED}
    time.sleep(0.05)
    return one


def test_a_handshake_that_nobody_had_time_to_look_at_counts() -> None:
    with socket.create_server((HOST, 0)) as server, begun(server.getsockname()[1]) as one:
        assert _afterwards(one) is Reach.OPEN
    with begun(free_port()) as one:
        assert _afterwards(one) is Reach.REFUSED
    with socket.socket() as one:  # has no answer
        assert _afterwards(one) is Reach.SILENT


def test_a_connection_that_was_taken_and_ended_at_once_was_made() -> None:
    """A proxy in front of what is not there takes every connection: the network let it through."""
    with socket.create_server((HOST, 0)) as server:
        one = begun(server.getsockname()[1])
        taken = server.accept()[0]
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        taken.close()
        time.sleep(0.05)
        with one:
            assert _afterwards(one) is Reach.OPEN


@pytest.mark.parametrize(
    ("error", "reach"),
    [
        (errno.ECONNRESET, Reach.OPEN),
        (errno.EPIPE, Reach.OPEN),
        (errno.ECONNREFUSED, Reach.REFUSED),
        (errno.EACCES, Reach.REFUSED),
        (errno.ETIMEDOUT, Reach.SILENT),
        (errno.ENETUNREACH, Reach.NO_ROUTE),
        (errno.EAFNOSUPPORT, Reach.NO_ROUTE),
        (errno.EADDRNOTAVAIL, Reach.NO_ATTEMPT),
        (errno.EMFILE, Reach.NO_ATTEMPT),
    ],
)
def test_what_errors_mean(error: int, reach: Reach) -> None:
    assert _named(error) is reach


def test_an_address_that_cannot_be_used_yet_is_one(tmp_path: Path) -> None:
    table = tmp_path / "if_inet6"
    assert not has_ipv6(table)
    table.write_text("00000000000000000000000000000001 01 80 10 80       lo\n", encoding="ascii")
    assert not has_ipv6(table)
    with table.open("a", encoding="ascii") as more:
        more.write("fe800000000000000000000000000001 02 40 20 c0     eth0\n")
        assert not has_ipv6(table)
        more.write("fd000000000000000000000000000007 02 40 00 c0     eth0\n")  # tentative
    assert has_ipv6(table)


def test_a_family_that_could_not_be_tried_holds_the_engine_back(monkeypatch: pytest.MonkeyPatch) -> None:
    told, ready = list[str](), iter([False, False, True])

    async def two(*_: object) -> tuple[str, ...]:
        return "192.0.2.1", "2001:db8::1"

    async def knocked(address: str, *_: object, **__: object) -> Reach:
        return Reach.SILENT if ":" not in address or next(ready) else Reach.NO_ATTEMPT

    monkeypatch.setattr(gate, "addresses", two)
    monkeypatch.setattr(gate, "knock", knocked)
    monkeypatch.setattr(gate, "has_ipv6", lambda: True)
    config = GateConfig("life.", (Forbidden("it", "it.example", "1"),))
    asyncio.run(asyncio.wait_for(gate.Gate(config, {}, told.append).wait(), 10))
    assert len(told) == 2
    assert "whether it (2001:db8::1) can be reached" in told[0]
    # A pod without IPv6 addresses has nothing there that could be open.
    monkeypatch.setattr(gate, "has_ipv6", lambda: False)
    ready = iter([False])
    asyncio.run(asyncio.wait_for(gate.Gate(config, {}, told.append).wait(), 10))
    assert len(told) == 2


def test_a_process_that_gets_its_turn_late_sees_an_open_port_as_open() -> None:
    async def late(port: int) -> Reach:
        attempt = asyncio.create_task(dial(HOST, port, 0.05))
        await asyncio.sleep(0)
        time.sleep(0.2)  # noqa: ASYNC251 - the machine is busy
        return await attempt

    with socket.create_server((HOST, 0)) as server:
        assert asyncio.run(late(server.getsockname()[1])) is Reach.OPEN


def test_one_open_try_of_many_is_enough_and_ends_them() -> None:
    port, servers = free_port(), list[socket.socket]()
    opening = threading.Timer(0.3, lambda: servers.append(socket.create_server((HOST, port))))
    opening.start()
    try:
        began = time.monotonic()
        assert asyncio.run(knock(HOST, port, tries=30, every=0.1, seconds=5)) is Reach.OPEN
        assert 0.2 < time.monotonic() - began < 3
    finally:
        opening.join()
        for server in servers:
            server.close()


def test_all_tries_have_to_be_blocked_for_the_whole_time() -> None:
    began = time.monotonic()
    assert asyncio.run(knock(HOST, free_port(), tries=4, every=0.1, seconds=0.5)) is Reach.REFUSED
    assert time.monotonic() - began >= 0.3


def test_one_try_that_says_nothing_makes_the_rest_say_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([Reach.SILENT, Reach.NO_ATTEMPT, Reach.SILENT])

    async def dialled(*_: object) -> Reach:
        return next(answers)

    monkeypatch.setattr("securevllm.proof.dial.dial", dialled)
    assert asyncio.run(knock(HOST, 1, tries=3, every=0.01, seconds=1)) is Reach.NO_ATTEMPT


def test_a_network_that_dies_while_the_gate_looks_is_no_isolation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Silence counts only between two signs of life."""
    told, lives = list[str](), iter([True, False, True, True])

    async def addresses(name: str, _: float) -> tuple[str, ...]:
        if name == "life." and not next(lives):
            raise OSError("no answer")
        return ("192.0.2.1",)

    async def silence(*_: object, **__: object) -> Reach:
        return Reach.SILENT

    monkeypatch.setattr(gate, "addresses", addresses)
    monkeypatch.setattr(gate, "knock", silence)
    config = GateConfig("life.", (Forbidden("it", "192.0.2.1", "1"),))
    asyncio.run(asyncio.wait_for(gate.Gate(config, {}, told.append).wait(), 10))
    assert [text.partition(" (")[0] for text in told] == ["DNS does not answer for life."]
    assert next(lives, None) is None


@pytest.mark.parametrize(("seconds", "tries"), [(0.6, 5), (0.1, 2), (1.5, 14)])
def test_a_target_is_tried_again_and_again(seconds: float, tries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = list[dict[str, float]]()

    async def counted(*_: object, **given: float) -> Reach:
        seen.append(given)
        return Reach.SILENT

    monkeypatch.setattr(gate, "knock", counted)
    config = GateConfig("127.0.0.1", (Forbidden("it", "192.0.2.1", "1"),), stable_seconds=seconds)
    asyncio.run(gate.Gate(config, {}, print).wait())
    [given] = seen
    assert given["tries"] == tries
    # The last one has its time for an answer as well.
    assert given["seconds"] - (given["tries"] - 1) * given["every"] >= 0.2 - 1e-9
    assert given["seconds"] >= seconds


def test_who_waits_long_looks_less_often_and_more_often_than_a_released_member_lingers() -> None:
    assert [gate.pause(waited) for waited in (0.0, 5.0, 10.0, 20.0, 3600.0)] == [0.25, 0.25, 0.5, 1.0, 1.0]
    assert gate.pause(3600) + GateConfig("").stable_seconds < gate._LINGER_SECONDS
