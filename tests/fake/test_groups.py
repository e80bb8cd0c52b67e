"""Each topology as real processes: every socket of the catalogue and no other; healthy when the group is whole."""

from __future__ import annotations

import json
from collections import Counter

import pytest

from e2e.explained import expected, explain, table
from e2e.listening import family, look
from securevllm import catalogue
from tests.fake.service import Service, Vllm, free_port, own_address

MESH = {"gloo": 1, "nccl": 1, "message-queue": 1}
DATA_HEAD = {
    "data-parallel-rpc": 1,
    "data-parallel-store": 1,
    "data-parallel-io": 1,
    "data-parallel-coordinator": 1,
}


def nodes(service: Service, count: int, *flags: str) -> list[Vllm]:
    """Members of one model replica that is spread over pods, the last one first: the order must not matter."""
    head, port = own_address(), free_port()
    shared = (*flags, f"--nnodes={count}", f"--master-addr={head}", f"--master-port={port}")
    members = [service.vllm(*shared, f"--node-rank={node}", "--headless") for node in reversed(range(1, count))]
    return [service.vllm(*shared, "--node-rank=0", address=head), *reversed(members)]


def data(service: Service, size: int, local: int, *flags: str, mode: str = "internal") -> list[Vllm]:
    """Members of a data-parallel replica: upstream's commands (docs/serving/data_parallel_deployment.md)."""
    head = own_address()
    port = free_port(head)
    shared = (
        *flags,
        f"--data-parallel-size={size}",
        f"--data-parallel-address={head}",
        f"--data-parallel-rpc-port={port}",
    )
    started = []
    for start in reversed(range(0, size, local)):
        own = {
            "internal": (
                f"--data-parallel-size-local={local}",
                *((f"--data-parallel-start-rank={start}", "--headless") if start else ()),
            ),
            "hybrid": (
                f"--data-parallel-size-local={local}",
                f"--data-parallel-start-rank={start}",
                "--data-parallel-hybrid-lb",
            ),
            "external": (f"--data-parallel-rank={start}",),
        }[mode]
        started.append(service.vllm(*shared, *own, address="" if start else head))
    return started[::-1]


@pytest.mark.parametrize(("ranks", "mesh"), [(1, {"gloo": 1}), (4, {"gloo": 4, "nccl": 4})])
def test_one_pod_has_the_api_and_what_its_ranks_open(service: Service, ranks: int, mesh: dict[str, int]) -> None:
    alone = service.vllm(f"--tensor-parallel-size={ranks}")
    alone.healthy()
    assert alone.opened() == {"api": 1, **mesh}


@pytest.mark.parametrize(
    ("count", "flags", "ranks"),
    [
        pytest.param(2, ("--tensor-parallel-size=2",), 1, id="tp2-over-2"),
        pytest.param(2, ("--tensor-parallel-size=4", "--pipeline-parallel-size=2"), 4, id="tp4-pp2-over-2"),
        pytest.param(3, ("--pipeline-parallel-size=3",), 1, id="pp3-over-3"),
    ],
)
def test_a_replica_over_several_pods(service: Service, count: int, flags: tuple[str, ...], ranks: int) -> None:
    head, *workers = nodes(service, count, *flags)
    head.healthy()
    mesh = Counter({name: number * ranks for name, number in MESH.items()})
    assert head.opened() == mesh + Counter({"api": 1, "torch-distributed": 1})
    for worker in workers:
        worker.says("headless")
        assert worker.opened() == mesh
    for one in (head, *workers):  # as of the real vLLM (`make e2e-vllm`): from /proc, without a word of the log
        seen = look(one.process.pid, family(one.process.pid))
        argv = seen.arguments[seen.arguments.index("serve") + 1 :]
        explained = explain(seen, expected(argv, seen.environment, catalogue.newest()))
        assert explained
        assert all(explained.values()), table(explained)


@pytest.mark.parametrize("mode", ["internal", "hybrid", "external"])
def test_data_parallel(service: Service, mode: str) -> None:
    local = 1 if mode == "external" else 2
    head, *others = data(service, 2 * local, local, "--enable-expert-parallel", mode=mode)
    head.healthy()
    mesh = Counter({"gloo": local, "nccl": local})
    assert head.opened() == mesh + Counter({"api": 1, **DATA_HEAD})
    for other in others:
        if mode == "internal":
            other.says("headless")
            assert other.opened() == mesh
        else:
            other.healthy()
            assert other.opened() == mesh + Counter({"api": 1})


def test_a_head_of_data_parallelism_without_ranks_of_its_own(service: Service) -> None:
    head = own_address()
    shared = (
        "--data-parallel-size=2",
        f"--data-parallel-address={head}",
        f"--data-parallel-rpc-port={free_port(head)}",
    )
    worker = service.vllm(*shared, "--data-parallel-size-local=2", "--data-parallel-start-rank=0", "--headless")
    api = service.vllm(*shared, "--data-parallel-size-local=0", address=head)
    api.healthy()
    assert api.opened() == {"api": 1, **DATA_HEAD}
    assert worker.opened() == {"gloo": 2, "nccl": 2}


def test_kv_events_have_a_port_for_each_rank(service: Service) -> None:
    port = free_port()
    config = {"enable_kv_cache_events": True, "publisher": "zmq", "endpoint": f"tcp://*:{port}"}
    alone = service.vllm("--data-parallel-size=2", f"--kv-events-config={json.dumps(config)}")
    alone.healthy()
    assert alone.opened() == {"api": 1, "kv-events": 2, "gloo": 2, "nccl": 2}
    assert f":{port}\n" in alone.log
    assert f":{port + 1}\n" in alone.log


def test_default_ports_are_those_of_the_catalogue(service: Service) -> None:
    rows = catalogue.sockets()
    head = own_address()
    worker = service.vllm("--data-parallel-size=2", f"--data-parallel-address={head}", "--data-parallel-start-rank=1",
                          "--data-parallel-size-local=1", "--headless")  # fmt: skip
    service.vllm(
        "--data-parallel-size=2", "--data-parallel-size-local=1", f"--data-parallel-address={head}", address=head
    ).healthy()
    worker.says("headless")
    assert (
        f"data-parallel-rpc (ZMQ) of rank 0 listens on {head}:{rows['data-parallel-rpc'].port}\n"
        in service.running[1].log
    )


def test_without_one_member_the_head_is_never_healthy_and_says_whom_it_misses(service: Service) -> None:
    head, last, _ = nodes(service, 3, "--tensor-parallel-size=3")
    service.running[0].end()
    head.says("waiting for rank 2")
    with pytest.raises(OSError, match="refused"):
        head.ask("GET", "/health")
    assert last.process.poll() is None


def test_a_member_that_comes_back_is_not_answered(service: Service) -> None:
    """As in vLLM: only a restart of the whole group mends it."""
    head, worker = nodes(service, 2, "--tensor-parallel-size=2")
    head.healthy()
    flags = [part for part in worker.process.args if isinstance(part, str)][4:]  # type: ignore[union-attr]
    worker.end()
    head.says("a member of the group went")
    again = service.vllm(*flags, address=worker.address)
    again.says("waiting for the head's torch-distributed to answer")
    head.says("comes again")
    assert head.ask("GET", "/health")[0] == 200


def test_the_head_refuses_another_mode(service: Service) -> None:
    head = own_address()
    shared = (
        "--data-parallel-size=2",
        f"--data-parallel-address={head}",
        f"--data-parallel-rpc-port={free_port(head)}",
        "--data-parallel-size-local=1",
    )
    service.vllm(*shared, address=head)
    other = service.vllm(*shared, "--data-parallel-start-rank=1", "--data-parallel-hybrid-lb")
    assert other.process.wait(timeout=30) == 1
    assert "must use --headless in internal dp lb mode" in other.log


def test_start_up_ends_after_the_timeout(service: Service) -> None:
    where = ("--master-addr=127.0.0.1", f"--master-port={free_port()}", "--distributed-timeout-seconds=1")
    member = service.vllm("--tensor-parallel-size=2", "--nnodes=2", "--node-rank=1", "--headless", *where)
    assert member.process.wait(timeout=30) == 1
    assert "timed out waiting for the head's torch-distributed at 127.0.0.1" in member.log
