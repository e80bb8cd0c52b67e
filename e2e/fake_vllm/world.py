"""Which part of a vLLM service a process is, and which sockets the catalogue gives it: functions of the arguments.

Words as in vLLM: a *rank* is one GPU of the whole model replica; a *data rank* is one data-parallel engine of
tensor x pipeline GPUs; a *member* is one process of ``vllm serve``, with some of the ranks. The *head* is the member
with rank 0: it holds the sockets at which the others meet.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from e2e.fake_vllm.arguments import ArgumentError
from securevllm import catalogue

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterator, Mapping

    from securevllm.catalogue import Socket, Version

_LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class World:
    """The place of one process.

    Attributes:
        whens: which rows of the socket catalogue apply (column ``when``).
        roles: which rows of the socket catalogue apply (column ``role``).
        total: ranks of the model replica.
        ranks: those of this process.
        data_ranks: data-parallel engines whose scheduler runs in this process.
        head: whether this process is the head.
        head_host: address of the head, as the arguments give it.
        http: whether it has an HTTP server.
        local_engines: hybrid or external load balancing: each process serves its own engines.
        connector: what moves the KV cache, as the catalogue's column ``when`` calls it; empty: nothing does.
        version: the release that it stands for.
    """

    whens: frozenset[str]
    roles: frozenset[str]
    total: int
    ranks: range
    data_ranks: range
    head: bool
    head_host: str
    http: bool
    local_engines: bool
    connector: str
    version: Version

    @property
    def alone(self) -> bool:
        """Whether there is nobody to wait for."""
        return "group" not in self.whens

    def rows(self) -> Iterator[Socket]:
        """The sockets of this process, the API's included."""
        for row in catalogue.sockets().values():
            applies = row.when in self.whens and row.role in self.roles and self.version in row.versions
            if applies and not row.ours and (row.on == "every" or self.head):
                yield row

    def meeting_rows(self) -> tuple[Socket, ...]:
        """The head's sockets at which members of a group meet, fixed ones first."""
        found = [
            row
            for row in catalogue.sockets().values()
            if row.when in self.whens & {"nodes", "data"} and row.on == "first" and self.version in row.versions
        ]
        return tuple(sorted(found, key=lambda row: row.random))


def world(args: argparse.Namespace, version: Version) -> World:
    """The place that a command line describes.

    Raises:
        ArgumentError: numbers or modes that vLLM refuses together.
    """
    size = (args.tensor_parallel_size or 1) * (args.pipeline_parallel_size or 1)
    data = args.data_parallel_size or 1
    nodes = args.nnodes or 1
    headless = bool(args.headless)
    if headless and args.api_server_count:
        raise ArgumentError(f"--api-server-count={args.api_server_count} cannot be used with --headless")
    if headless and args.data_parallel_hybrid_lb:
        raise ArgumentError("data_parallel_hybrid_lb is not applicable in headless mode")
    total = data * size
    if nodes > 1:
        ranks = _of_node(args, nodes, total)
        data_ranks = range(-(-ranks.start // size), -(-ranks.stop // size))
    else:
        data_ranks = _of_data(args, data)
        ranks = range(data_ranks.start * size, data_ranks.stop * size)
    # A headless process has its engines' head elsewhere, even when it has all of the engines.
    remote = data > 1 and (headless or len(data_ranks) < data)
    spread = {"nodes": nodes > 1, "data": remote, "group": nodes > 1 or remote, "always": True, "ranks": total > 1}
    head = ranks.start == 0 and not headless
    if nodes > 1 and headless and ranks.start == 0:
        raise ArgumentError("--node-rank 0 holds the API server and cannot be --headless")
    if nodes > 1 and not headless and not data_ranks:
        raise ArgumentError(f"--node-rank {args.node_rank} has no engine of its own and must be --headless")
    local_engines = not headless and bool(
        args.data_parallel_external_lb
        or args.data_parallel_hybrid_lb
        or args.data_parallel_rank is not None
        or args.data_parallel_start_rank is not None
    )
    transfer: dict[str, Any] = args.kv_transfer_config or {}
    connector, roles = _connector(transfer)
    return World(
        whens=frozenset(
            {name for name, holds in spread.items() if holds}
            | ({"api"} if not headless else set())
            | ({connector} if connector else set())
            | ({"kv-events"} if (args.kv_events_config or {}).get("enable_kv_cache_events") else set())
        ),
        roles=roles,
        total=total,
        ranks=ranks,
        data_ranks=data_ranks,
        head=head,
        head_host=(args.data_parallel_address if nodes == 1 else None) or args.master_addr or _LOOPBACK,
        http=not headless,
        local_engines=local_engines,
        connector=connector,
        version=version,
    )


def _of_node(args: argparse.Namespace, nodes: int, total: int) -> range:
    node = args.node_rank or 0
    if total % nodes:
        raise ArgumentError(f"--nnodes {nodes} must evenly divide the total world size ({total})")
    if not 0 <= node < nodes:
        raise ArgumentError(f"--node-rank must be between 0 and {nodes - 1}; got {node}")
    here = total // nodes
    return range(node * here, (node + 1) * here)


def _of_data(args: argparse.Namespace, data: int) -> range:
    if args.data_parallel_external_lb and args.data_parallel_rank is None:
        raise ArgumentError("--data-parallel-external-lb requires a data-parallel rank. Set --data-parallel-rank")
    if args.data_parallel_rank is not None:
        if args.data_parallel_size_local not in {None, 1}:
            raise ArgumentError("an external data-parallel rank requires --data-parallel-size-local 1")
        start, local = args.data_parallel_rank, 1
    else:
        start = args.data_parallel_start_rank or 0
        local = data if args.data_parallel_size_local is None else args.data_parallel_size_local
        if args.data_parallel_hybrid_lb and args.data_parallel_size_local is None:
            raise ArgumentError("--data-parallel-hybrid-lb requires --data-parallel-size-local")
    if args.headless and local < 1:
        raise ArgumentError("data_parallel_size_local must be > 0 in headless mode")
    if not 0 <= start <= start + local <= data:
        raise ArgumentError(
            f"data-parallel ranks {start} to {start + local - 1} are not within --data-parallel-size {data}"
        )
    return range(start, start + local)


def _connector(transfer: Mapping[str, Any]) -> tuple[str, frozenset[str]]:
    """The catalogue's name of the connector, and its roles in the catalogue of sockets."""
    if not transfer.get("kv_connector"):
        return "", frozenset({"engine"})
    for name, connector in catalogue.connectors().items():
        if connector.name == transfer["kv_connector"]:
            sides = {side for side, role in connector.roles.items() if transfer.get("kv_role") in {role, "kv_both"}}
            if not sides:
                raise ArgumentError(f"Unsupported kv_role: {transfer.get('kv_role')}")
            return name, frozenset({"engine", *sides})
    raise ArgumentError(f"Unsupported connector type: {transfer['kv_connector']}")


def port_of(row: Socket, args: argparse.Namespace, env: Mapping[str, str]) -> tuple[int, int]:
    """First and last port of a row, moved by its knob; (0, 0): the kernel chooses.

    A flag with a JSON value has an endpoint in it; a variable has a number.
    """
    found: list[int] = []
    for knob in row.knob.split(", "):
        value = getattr(args, knob[2:].replace("-", "_"), None) if knob.startswith("--") else env.get(knob)
        if isinstance(value, dict):
            value = urlsplit(value.get("endpoint", "")).port
        if value is not None and not row.random:
            found.append(int(value))
    first = found[0] if found else row.port
    return first, found[1] if len(found) > 1 else max(row.last or 0, first)
