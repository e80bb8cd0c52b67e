"""Each socket that listens, and the row of the catalogue that gives it: functions of their arguments.

The rows come from the command line and the environment of a vLLM process, as fake-vllm reads them. A row with a number
explains that port alone. A row without one explains the ports that the kernel draws, on the address that it binds.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from e2e.fake_vllm.arguments import parse
from e2e.fake_vllm.wire import place
from e2e.fake_vllm.world import port_of, world

if TYPE_CHECKING:
    from e2e.listening import Listener, Seen
    from securevllm.catalogue import Version

_EVERYWHERE = "*"


@dataclass(frozen=True)
class Expected:
    """What a row of the catalogue says of one process.

    Attributes:
        name: of the row.
        protocol: TCP or UDP.
        address: that it binds; ``*``: all.
        first: first port; 0: the kernel draws it.
        last: last port.
    """

    name: str
    protocol: str
    address: str
    first: int
    last: int

    def explains(self, listener: Listener, drawn: tuple[int, int]) -> bool:
        """Whether a socket can be the one of this row; `drawn`: first and last port that the kernel draws."""
        first, last = (self.first, self.last) if self.first else drawn
        same = (self.protocol, self.address) == (listener.protocol, _all_as_one(listener.address))
        return same and first <= listener.port <= last


def expected(
    argv: Sequence[str], env: Mapping[str, str], version: Version, interface: str = ""
) -> tuple[Expected, ...]:
    """What the catalogue says that a process of vLLM listens on.

    Args:
        argv: what follows ``vllm serve``.
        env: its environment.
        version: its release.
        interface: address of the interface that its variables name; empty: as this machine has it, and of several that
            of VLLM_HOST_IP.

    Raises:
        ArgumentError: vLLM would refuse the command line.
    """
    args = parse(argv, version)
    here = world(args, version)
    found = []
    for row in here.rows():
        by_interface = interface and row.bind == "address of the interface"
        address = interface if by_interface else place(row, args, env)
        for rank in here.data_ranks if row.per == "rank" else (0,):
            first, last = (port + rank for port in port_of(row, args, env))
            found.append(Expected(row.name, row.protocol, _all_as_one(address), first, last))
    return tuple(found)


def explain(seen: Seen, rows: Iterable[Expected]) -> dict[Listener, tuple[str, ...]]:
    """Give each socket the names of the rows that it can be of; none: nothing explains it."""
    rows = tuple(rows)
    return {
        listener: tuple(row.name for row in rows if row.explains(listener, seen.drawn)) for listener in seen.listeners
    }


def table(explained: Mapping[Listener, Sequence[str]]) -> str:
    """The same for a person."""
    return "\n".join(f"{listener}: {' or '.join(names) or 'NOT EXPLAINED'}" for listener, names in explained.items())


def _all_as_one(address: str) -> str:
    return _EVERYWHERE if address in {"", "0.0.0.0", "::"} else address  # noqa: S104 - compares
