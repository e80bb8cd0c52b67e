"""What listens: TCP and UDP sockets of a network namespace, and of which process each is, from /proc.

Also a program, for pods: standard library only, sent to an interpreter there with `python -c`.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import struct
import sys
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

_TCP_LISTEN, _UDP_OPEN = "0A", "07"


@dataclass(frozen=True, order=True)
class Listener:
    """A socket that waits for others.

    Attributes:
        protocol: TCP or UDP.
        address: that it is bound to; ``0.0.0.0`` and ``::`` are all.
        port: number.
        process: name of a process that holds it, as that calls itself; empty: none that can be looked into.
    """

    protocol: str
    address: str
    port: int
    process: str = ""

    def __str__(self) -> str:
        return f"{self.protocol} {self.address}:{self.port} ({self.process or 'of a process out of sight'})"


@dataclass(frozen=True)
class Seen:
    """What a look into a pod, or at a few processes, found.

    Attributes:
        listeners: sorted.
        drawn: first and last port of those that the kernel draws.
        arguments: command line of the first process.
        environment: of the first process, when it started.
    """

    listeners: tuple[Listener, ...]
    drawn: tuple[int, int]
    arguments: tuple[str, ...]
    environment: dict[str, str]

    @classmethod
    def read(cls, text: str) -> Seen:
        """Read what the program has printed."""
        found = json.loads(text)
        listeners = tuple(Listener(**one) for one in found["listeners"])
        return cls(listeners, tuple(found["drawn"]), tuple(found["arguments"]), found["environment"])


def look(first: int = 1, tree: Iterable[int] | None = None, proc: Path = Path("/proc")) -> Seen:
    """Look at the sockets of a network namespace.

    Args:
        first: process whose namespace, command line and environment are wanted.
        tree: only sockets of these processes; None: all, whoever holds them.
        proc: where /proc is.
    """
    names = dict(_owners(proc, tree))
    listeners = sorted(
        Listener(protocol, address, port, names.get(inode, ""))
        for protocol, address, port, inode in sockets(proc / str(first) / "net")
        if tree is None or inode in names
    )
    low, high = map(int, (proc / "sys/net/ipv4/ip_local_port_range").read_text(encoding="ascii").split())
    arguments, environment = (_words(proc / str(first) / name) for name in ("cmdline", "environ"))
    pairs = (word.partition("=") for word in environment)
    return Seen(tuple(listeners), (low, high), arguments, {name: value for name, _, value in pairs})


def sockets(net: Path) -> Iterator[tuple[str, str, int, str]]:
    """Protocol, address, port and inode of each socket that waits for others; `net`: such as /proc/self/net."""
    for name, protocol, state in (
        ("tcp", "TCP", _TCP_LISTEN),
        ("tcp6", "TCP", _TCP_LISTEN),
        ("udp", "UDP", _UDP_OPEN),
        ("udp6", "UDP", _UDP_OPEN),
    ):
        file = net / name
        if not file.exists():  # a kernel without IPv6
            continue
        for line in file.read_text(encoding="ascii").splitlines()[1:]:
            columns = line.split()
            address, _, port = columns[1].partition(":")
            if columns[3] == state:
                yield protocol, _address(address), int(port, 16), columns[9]


def family(root: int, proc: Path = Path("/proc")) -> set[int]:
    """A process and all below it."""
    parents = {}
    for folder in proc.glob("[0-9]*"):
        with contextlib.suppress(OSError):  # it has ended
            # The name before it is in parentheses and may hold anything.
            columns = (folder / "stat").read_text("utf-8", "replace").rpartition(")")[2].split()
            parents[int(folder.name)] = int(columns[1])
    found, more = {root}, {root}
    while more:
        more = {pid for pid, parent in parents.items() if parent in more} - found
        found |= more
    return found


def _address(text: str) -> str:
    """An address as the kernel prints it: 32-bit words, each in the order of this machine's bytes."""
    words = struct.pack(f"={len(text) // 8}I", *(int(text[at : at + 8], 16) for at in range(0, len(text), 8)))
    address = ipaddress.ip_address(words)
    return str(getattr(address, "ipv4_mapped", None) or address)


def _owners(proc: Path, tree: Iterable[int] | None) -> Iterator[tuple[str, str]]:
    """Inode of each socket and the name of a process that holds it; the youngest where several do."""
    found = sorted(int(folder.name) for folder in proc.glob("[0-9]*"))
    for pid in found if tree is None else sorted(tree):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            name = (proc / str(pid) / "comm").read_text("utf-8", "replace").strip()
            for link in (proc / str(pid) / "fd").iterdir():
                with contextlib.suppress(OSError):  # closed meanwhile
                    target = os.readlink(link)  # noqa: PTH115 - not a path
                    if target.startswith("socket:["):
                        yield target[len("socket:[") : -1], name


def _words(file: Path) -> tuple[str, ...]:
    try:
        text = file.read_text("utf-8", "replace")
    except OSError:
        return ()
    return tuple(text.rstrip("\0").split("\0")) if text else ()


if __name__ == "__main__":
    print(json.dumps(asdict(look(int(sys.argv[1]) if sys.argv[1:] else 1))))
