"""Each socket that listens, and the row of the catalogue that gives it: functions of their arguments.

The rows come from the command line and the environment of a vLLM process, as fake-vllm reads them. A row with a number
explains that port alone. A row without one explains ports that the kernel draws, on the address that it binds, and no
more of them than the process may have: one for each of its ranks, or as many as `BOUNDS` says and why. One socket more
than all rows together allow is explained by none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING

from e2e.fake_vllm.arguments import parse
from e2e.fake_vllm.wire import place
from e2e.fake_vllm.world import port_of, world

if TYPE_CHECKING:
    from e2e.fake_vllm.world import World
    from e2e.listening import Listener, Seen
    from securevllm.catalogue import Version

_EVERYWHERE = "*"
_BOTH_FAMILIES = 2


@dataclass(frozen=True)
class Bound:
    """How many sockets a row gives one process at most.

    Attributes:
        per_rank: for each of its ranks.
        head: more, for the process with rank 0 of a group.
    """

    per_rank: int = 1
    head: int = 0


BOUNDS: Mapping[str, Bound] = MappingProxyType(
    {
        # Each process group of v1 has one on each rank: 13 with one rank, 26 with two in a process, 13 in each of two
        # pods (vLLM 0.32.0 on the CPU). A release that makes more of them has to be looked at.
        "gloo": Bound(13),
        # The head's queue to the workers and that of its tensor-parallel group; a worker's with its answers.
        "message-queue": Bound(1, head=1),
    }
)
"""Counted in the real vLLM, `e2e/real_vllm`; of what is not named here, one socket for each rank."""

NOT_ON_A_CPU = frozenset({"nccl"})
"""Rows that need a GPU: they explain nothing where there is none."""


@dataclass(frozen=True)
class Expected:
    """What a row of the catalogue says of one process.

    Attributes:
        name: of the row.
        protocol: TCP or UDP.
        address: that it binds; ``*``: all.
        first: first port; 0: the kernel draws it.
        last: last port.
        most: so many sockets.
    """

    name: str
    protocol: str
    address: str
    first: int
    last: int
    most: int = 1

    def explains(self, listener: Listener, drawn: tuple[int, int]) -> bool:
        """Whether a socket can be the one of this row; `drawn`: first and last port that the kernel draws."""
        first, last = (self.first, self.last) if self.first else drawn
        same = (self.protocol, self.address) == (listener.protocol, _all_as_one(listener.address))
        return same and first <= listener.port <= last


def expected(
    argv: Sequence[str],
    env: Mapping[str, str],
    version: Version,
    interface: str = "",
    without: frozenset[str] = frozenset(),
) -> tuple[Expected, ...]:
    """What the catalogue says that a process of vLLM listens on.

    Args:
        argv: what follows ``vllm serve``.
        env: its environment.
        version: its release.
        interface: address of the interface that its variables name; empty: as this machine has it, and of several that
            of VLLM_HOST_IP.
        without: rows that explain nothing here.

    Raises:
        ArgumentError: vLLM would refuse the command line.
    """
    args = parse(argv, version)
    here = world(args, version)
    found = []
    for row in here.rows():
        if row.name in without:
            continue
        by_interface = interface and row.bind == "address of the interface"
        address = interface if by_interface else place(row, args, env)
        for rank in here.data_ranks if row.per == "rank" else (0,):
            first, last = (port + rank for port in port_of(row, args, env))
            # The same number on all addresses of both families may be two sockets; what has one port needs no bound.
            most = _most(row.name, here) if first != last or not first else _BOTH_FAMILIES
            found.append(Expected(row.name, row.protocol, _all_as_one(address), first, last, most))
    return tuple(found)


def explain(seen: Seen, rows: Iterable[Expected]) -> dict[Listener, tuple[str, ...]]:
    """Give each socket the names of the rows that it can be of; none: nothing explains it, or there is one too many.

    Of too many that look alike, those of the process with the fewest sockets are left over.
    """
    rows = tuple(rows)
    fitting = {
        listener: [number for number, row in enumerate(rows) if row.explains(listener, seen.drawn)]
        for listener in seen.listeners
    }
    sockets = Counter(listener.process for listener in seen.listeners)
    given: dict[int, list[Listener]] = {number: [] for number in range(len(rows))}
    for listener in sorted(seen.listeners, key=lambda one: (-sockets[one.process], one)):
        _give(listener, fitting, rows, given, set())
    explained = {listener for listeners in given.values() for listener in listeners}
    return {
        listener: tuple(rows[number].name for number in fitting[listener]) if listener in explained else ()
        for listener in seen.listeners
    }


def _give(
    listener: Listener,
    fitting: Mapping[Listener, Sequence[int]],
    rows: Sequence[Expected],
    given: Mapping[int, list[Listener]],
    asked: set[int],
) -> bool:
    """Find a row with a place for a socket, moving others to further rows of theirs where that makes one."""
    for number in fitting[listener]:
        if number in asked:
            continue
        asked.add(number)
        if len(given[number]) < rows[number].most:
            given[number].append(listener)
            return True
        for other in given[number]:
            if _give(other, fitting, rows, given, asked):
                given[number].remove(other)
                given[number].append(listener)
                return True
    return False


def table(explained: Mapping[Listener, Sequence[str]], rows: Iterable[Expected] = ()) -> str:
    """The same for a person; with rows, how many sockets those that the kernel draws the ports of may have."""
    lines = [f"{listener}: {' or '.join(names) or 'NOT EXPLAINED'}" for listener, names in explained.items()]
    bounds = [f"at most {row.most} of {row.name}" for row in rows if not row.first]
    return "\n".join([*lines, *([f"({', '.join(bounds)})"] if bounds else [])])


def _most(name: str, here: World) -> int:
    bound = BOUNDS.get(name, Bound())
    return bound.per_rank * len(here.ranks) + (bound.head if here.head else 0)


def _all_as_one(address: str) -> str:
    return _EVERYWHERE if address in {"", "0.0.0.0", "::"} else address  # noqa: S104 - compares
