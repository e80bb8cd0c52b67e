"""What listens, from /proc, and which row of the catalogue gives it."""

from __future__ import annotations

import os
import random
import socket
from pathlib import Path

import pytest

from e2e.explained import BOUNDS, NOT_ON_A_CPU, Expected, expected, explain, table
from e2e.listening import Listener, Seen, family, look, sockets
from securevllm.catalogue import Version

DRAWN = (32768, 60999)
IP = "10.1.0.7"
ENV = {"VLLM_HOST_IP": IP}
V032 = Version(0, 32)
NODES = ("/model", "--tensor-parallel-size=2", "--nnodes=2", f"--master-addr={IP}")

# Header, one socket that listens, one that is connected; as the kernel of an x86 prints them.
TCP = """\
  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode
   0: 0700010A:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000  2000        0 111 1 0 100 0 0 10 0
   1: 0700010A:1F40 0900010A:9C40 01 00000000:00000000 00:00000000 00000000  2000        0 112 1 0 100 0 0 10 0
"""
TCP6 = """\
  sl  local_address                         remote_address                        st tx_queue rx_queue
   0: 00000000000000000000000000000000:733D 00000000000000000000000000000000:0000 0A 0:0 00:0 0  2000 0 113 1
   1: 0000000000000000FFFF00000700010A:8000 00000000000000000000000000000000:0000 0A 0:0 00:0 0  2000 0 114 1
"""


def seen(*listeners: Listener) -> Seen:
    return Seen(listeners, DRAWN, (), {})


def named(argv: tuple[str, ...], *listeners: Listener) -> list[tuple[str, ...]]:
    return list(explain(seen(*listeners), expected(argv, ENV, V032)).values())


def test_sockets_that_wait_are_read_and_others_are_not(tmp_path: Path) -> None:
    (tmp_path / "tcp").write_text(TCP)
    (tmp_path / "tcp6").write_text(TCP6)
    assert set(sockets(tmp_path)) == {
        ("TCP", IP, 8000, "111"),
        ("TCP", "::", 29501, "113"),
        ("TCP", IP, 32768, "114"),
    }


def test_own_sockets_are_found_with_the_process_that_holds_them() -> None:
    with socket.socket() as tcp, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp, socket.socket() as idle:
        for one in (tcp, udp, idle):
            one.bind(("127.0.0.1", 0))
        tcp.listen()
        here = look(os.getpid(), family(os.getpid()))
        places = {(found.protocol, found.address, found.port) for found in here.listeners}
        assert {("TCP", *tcp.getsockname()), ("UDP", *udp.getsockname())} <= places
        assert ("TCP", *idle.getsockname()) not in places
    assert {found.process for found in here.listeners} == {Path("/proc/self/comm").read_text().strip()}
    assert here.drawn[0] < here.drawn[1]
    assert here.arguments


def test_a_fixed_port_is_explained_where_its_row_binds_it_and_nowhere_else() -> None:
    argv = (*NODES, "--node-rank=0", f"--host={IP}")
    assert named(
        argv,
        Listener("TCP", IP, 8000),
        Listener("TCP", "0.0.0.0", 8000),  # noqa: S104 - compared, not bound
        Listener("TCP", "::", 29501),
        Listener("TCP", "::", 29502),
        Listener("UDP", IP, 8000),
    ) == [("api",), (), ("torch-distributed",), (), ()]


def test_a_moved_port_is_explained_and_the_default_is_not() -> None:
    argv = (*NODES, "--node-rank=0", f"--host={IP}", "--port=8100")
    assert named(argv, Listener("TCP", IP, 8100), Listener("TCP", IP, 8000)) == [("api",), ()]


def test_a_worker_has_neither_api_nor_store() -> None:
    argv = (*NODES, "--node-rank=1", "--headless")
    found = named(argv, Listener("TCP", IP, 8000), Listener("TCP", "::", 29501), Listener("TCP", IP, 40000))
    assert found[:2] == [(), ()]
    assert {"gloo", "message-queue"} <= set(found[2])


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "127.0.0.1", "10.1.0.8"])  # noqa: S104 - compared, not bound
def test_a_port_that_the_kernel_draws_is_explained_on_the_own_address_only(address: str) -> None:
    argv = ("/model", f"--host={IP}")
    assert named(argv, Listener("TCP", IP, 40000), Listener("TCP", address, 40000)) == [("gloo",), ()]


def test_what_binds_an_interface_is_explained_on_the_address_that_the_interface_has() -> None:
    env = {**ENV, "GLOO_SOCKET_IFNAME": "no-interface-of-this-machine"}
    [row] = [row for row in expected(("/model",), env, V032, "10.9.9.9") if row.name == "gloo"]
    assert row.address == "10.9.9.9"


def test_a_row_without_a_number_explains_no_port_that_somebody_chose() -> None:
    assert named(("/model",), Listener("TCP", IP, 22)) == [()]


def test_each_data_parallel_rank_has_its_own_port() -> None:
    rows = [
        row
        for row in expected(
            ("/model", "--data-parallel-size=2", '--kv-events-config={"enable_kv_cache_events": true}'), ENV, V032
        )
        if row.name == "kv-events"
    ]
    assert [(row.address, row.first, row.last) for row in rows] == [("*", 5557, 5557), ("*", 5558, 5558)]


def test_the_table_says_what_is_not_explained() -> None:
    strange = Listener("TCP", IP, 22, "sshd")
    rows = [Expected("api", "TCP", IP, 8000, 8000)]
    assert table(explain(seen(strange, Listener("TCP", IP, 8000)), rows)).splitlines() == [
        f"TCP {IP}:22 (sshd): NOT EXPLAINED",
        f"TCP {IP}:8000 (of a process out of sight): api",
    ]


def drawn(count: int, process: str = "VLLM::Worker", *, first: int = 40000) -> list[Listener]:
    """Sockets on ports that the kernel drew."""
    return [Listener("TCP", IP, first + number, process) for number in range(count)]


def unexplained(argv: tuple[str, ...], *listeners: Listener) -> list[Listener]:
    rows = expected(argv, ENV, V032, IP, NOT_ON_A_CPU)
    return [listener for listener, names in explain(seen(*listeners), rows).items() if not names]


@pytest.mark.parametrize(
    ("argv", "most"),
    [
        # As many as the real vLLM 0.32 has on the CPU.
        (("/model",), 13),
        (("/model", "--tensor-parallel-size=2"), 26),
        ((*NODES, "--node-rank=0"), 13 + 2),
        ((*NODES, "--node-rank=1", "--headless"), 13 + 1),
    ],
    ids=["one rank", "two ranks", "head", "worker"],
)
def test_one_random_port_too_many_is_explained_by_nothing(argv: tuple[str, ...], most: int) -> None:
    assert unexplained(argv, *drawn(most)) == []
    planted = Listener("TCP", IP, 39999, "stranger")
    assert unexplained(argv, planted, *drawn(most)) == [planted]
    assert len(unexplained(argv, *drawn(most + 3))) == 3


def test_a_planted_socket_that_looks_like_the_others_is_one_too_many_all_the_same() -> None:
    """Which of them it is cannot be told: one has no explanation."""
    assert len(unexplained(("/model",), *drawn(14))) == 1


def test_of_each_row_that_nothing_was_counted_of_there_is_one_socket_for_each_rank() -> None:
    argv = ("/model", "--tensor-parallel-size=2", "--data-parallel-size=2", "--data-parallel-size-local=1")
    rows = {row.name: row.most for row in expected(argv, ENV, V032) if not row.first}
    assert rows == {
        "data-parallel-store": 2,
        "data-parallel-io": 2,
        "data-parallel-coordinator": 2,
        "gloo": 2 * BOUNDS["gloo"].per_rank,
        "nccl": 2,
    }


def test_rows_that_overlap_are_shared_out_so_that_all_are_explained_that_can_be() -> None:
    """A socket takes no place of a row from one that only that row explains."""
    wide, narrow = Expected("wide", "TCP", IP, 0, 0, 2), Expected("narrow", "TCP", IP, 40000, 40001, 2)
    listeners = [Listener("TCP", IP, port) for port in (40000, 40001, 50000, 50001)]
    for _ in range(20):
        random.shuffle(listeners)
        assert all(explain(seen(*listeners), [wide, narrow]).values())
        assert all(explain(seen(*listeners), [narrow, wide]).values())
    more = [*listeners, Listener("TCP", IP, 50002)]
    assert [found.port >= 50000 for found, names in explain(seen(*more), [wide, narrow]).items() if not names] == [True]


def test_the_table_says_how_many_there_may_be() -> None:
    rows = expected(("/model",), ENV, V032, IP, NOT_ON_A_CPU)
    assert table(explain(seen(*drawn(1)), rows), rows).splitlines()[-1] == "(at most 13 of gloo)"
