"""Who reaches what: every source against every target, beside what the topology says about it.

The judge is that of the property tests (`tests.property.world.expected`): it reads `Topology.flows`, nothing of what is
rendered. There an evaluator of our own answers for the policies, here the cluster does.
"""

from __future__ import annotations

import csv
import re
import time
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Protocol

from e2e.reach import OPEN
from e2e.workload import addresses, at
from securevllm.topology import Role, Topology
from tests.netpol import Node
from tests.netpol import Pod as PodEndpoint
from tests.property.world import Endpoint, Member, World, expected

# Fewer than there are sources: a handshake that starves on a busy machine looks like one that is blocked.
_AT_ONCE = 8
_SECONDS = 2.0
_PATIENCE = 180.0
"""Seconds in which what has to be open is tried again: every endpoint gets its policies in its own time."""

_LOGGED = re.compile(r"\[fake_vllm\] ([\w-]+) \(.*?\) of rank \d+ listens on \[?[^\]\s]+\]?:(\d+)$", re.MULTILINE)


class Dialler(Protocol):
    """Something that can connect."""

    def reach(self, targets: Iterable[str], seconds: float = 2.0) -> dict[str, str]:
        """Connect to each `ADDRESS:PORT` once; see `reach` for the answers."""


@dataclass(frozen=True, eq=False)
class Source:
    """Somebody who connects.

    Attributes:
        name: For the table.
        kind: What it is to all targets; empty: that depends on the target (a pod of a resource).
        endpoint: As the judge knows it.
        dialler: How it connects.
        member: The pod of a resource that it is, or that its labels pretend.
    """

    name: str
    kind: str
    endpoint: Endpoint
    dialler: Dialler
    member: Member | None = None


@dataclass(frozen=True)
class Target:
    """A socket that listens.

    Attributes:
        address: One of its pod's.
        port: Number.
        name: What it is: the catalogue's name, or `unexplained`.
        member: The pod.
        resource: Name of the resource.
    """

    address: str
    port: int
    name: str
    member: Member
    resource: str

    def __str__(self) -> str:
        return at(self.address, self.port)


@dataclass(frozen=True)
class Place:
    """An address outside of every resource.

    Attributes:
        target: `ADDRESS:PORT`.
        name: For the table.
        allowed: Whether pods of ours may reach it.
    """

    target: str
    name: str
    allowed: bool = False

    def __str__(self) -> str:
        return self.target


@dataclass
class Cell:
    """One connection that was tried.

    Attributes:
        source: From.
        target: To.
        kind: What the source is to the target.
        wanted: Whether it had to succeed.
        found: What `reach` said.
        control: What it said when nothing was enforced; empty: not tried.
    """

    source: Source
    target: Target | Place
    kind: str
    wanted: bool
    found: str = ""
    control: str = ""

    @property
    def right(self) -> bool:
        """Whether it is as it had to be. Against what listens, everything but a handshake is blocked."""
        return (self.found == OPEN) is self.wanted

    def row(self) -> tuple[str, ...]:
        """For the table."""
        to = self.target
        where = (to.member.pod.name, to.name) if isinstance(to, Target) else ("outside", to.name)
        wanted = OPEN if self.wanted else "blocked"
        return (
            self.kind,
            self.source.name,
            *where,
            self.way,
            str(to),
            wanted,
            self.found,
            self.control,
            _verdict(self),
        )

    @property
    def way(self) -> str:
        """Whether it crosses nodes; empty where one end is not on a node."""
        here = self.source.endpoint
        start = here.name if isinstance(here, Node) else here.node if isinstance(here, PodEndpoint) else ""
        end = self.target.member.pod.node if isinstance(self.target, Target) else ""
        return ("on one node" if start == end else "across nodes") if start and end else ""


HEADER = (
    "kind of source",
    "source",
    "pod",
    "socket",
    "way",
    "address",
    "expected",
    "found",
    "without enforcement",
    "verdict",
)


def _verdict(cell: Cell) -> str:
    return "as expected" if cell.right and cell.control in {"", OPEN} else "WRONG"


def member_of(pod: Mapping[str, Any], owner: Any, topology: Topology) -> Member:
    """A pod of a resource, for the judge."""
    labels = pod["metadata"]["labels"]
    endpoint = PodEndpoint(
        pod["metadata"]["name"],
        pod["metadata"]["namespace"],
        labels,
        addresses(pod),
        node=pod["spec"]["nodeName"],
    )
    return Member(endpoint, owner, Role(labels["securevllm.io/role"]), labels.get("securevllm.io/group", ""), topology)


def stranger(name: str, namespace: str, ips: tuple[str, ...], node: str, labels: Mapping[str, str]) -> PodEndpoint:
    """A pod of nobody's resource, for the judge."""
    return PodEndpoint(name, namespace, labels, ips, node=node)


def open_at(listening: Iterable[tuple[str, int]], ips: Collection[str]) -> list[tuple[str, int]]:
    """Return where a pod with these addresses can be tried, each address with each port that it may be open on.

    ``::`` is every address: no socket of ours is for IPv6 alone, and one that was would only be tried once more. So is
    an address that the pod is not known to have: nothing that listens is left out but on loopback.
    """
    pairs: set[tuple[str, int]] = set()
    for text, port in listening:
        address = ip_address(text)
        address = getattr(address, "ipv4_mapped", None) or address
        if address.is_loopback:
            continue
        if address.version == 4 and address.is_unspecified:
            answers = {ip for ip in ips if ":" not in ip}
        else:
            answers = {ip for ip in ips if ip_address(ip) == address} or {*ips}
        pairs |= {(ip, port) for ip in answers}
    return sorted(pairs, key=lambda pair: (pair[1], ":" in pair[0]))


def socket_names(member: Member, log: str) -> dict[int, str]:
    """What listens on which port: fixed ones as the topology has them, random ones as the engine's log says."""
    assert member.topology is not None  # noqa: S101 - only remainders of a deleted resource have none
    names = {socket.port: socket.name for socket in member.topology.sockets if socket.role is member.role}
    return names | {int(port): name for name, port in _LOGGED.findall(log)}


def relation(source: Member, target: Member) -> str:
    """What one pod of ours is to another."""
    if source.owner != target.owner:
        return "another resource"
    if source.group and source.group == target.group:
        return "same group"
    if source.group and target.group:
        return "another group of the same resource"
    if source.role is target.role:
        return "another replica of the same resource"
    return f"{source.role} of the same resource"


def cells(world: World, sources: Iterable[Source], targets: Iterable[Target]) -> list[Cell]:
    """Pair everybody with every socket that is not its own, by the families of addresses that the source has."""
    made = []
    listed = list(targets)
    for source in sources:
        for target in listed:
            if source.endpoint is target.member.pod or not any(
                (":" in ip) == (":" in target.address) for ip in source.endpoint.ips
            ):
                continue
            wanted = target.port in expected(world, source.endpoint, target.member.pod, "TCP")
            own_node = isinstance(source.endpoint, Node) and source.endpoint.name == target.member.pod.node
            kind = source.kind or (relation(source.member, target.member) if source.member else "")
            made.append(Cell(source, target, f"{kind}, the target's own node" if own_node else kind, wanted))
    return made


def dial(tried: Sequence[Cell], *, control: bool = False, patience: float = _PATIENCE) -> None:
    """Connect, each source to all of its targets in one go, and note what came of it.

    What has to be open is tried again where it is not: one lost packet is no policy. What has to be blocked is not:
    one handshake is one too many.

    Args:
        tried: The cells.
        control: Nothing is enforced now: everything has to be open, and goes into `Cell.control`.
        patience: Seconds in which what has to be open is tried again.
    """
    wanted = [replace(cell, wanted=True) for cell in tried] if control else list(tried)
    left = list(range(len(tried)))
    deadline = time.monotonic() + patience
    while left:
        by_source: dict[Source, list[int]] = {}
        for index in left:
            by_source.setdefault(tried[index].source, []).append(index)
        with ThreadPoolExecutor(max_workers=_AT_ONCE) as pool:
            targets = {source: [str(tried[index].target) for index in indices] for source, indices in by_source.items()}
            answers = pool.map(lambda item: item[0].dialler.reach(item[1], _SECONDS), targets.items())
            for found, indices in zip(answers, by_source.values(), strict=True):
                for index in indices:
                    wanted[index].found = found[str(tried[index].target)]
        left = [index for index in left if wanted[index].wanted and not wanted[index].right]
        if time.monotonic() > deadline:
            break
    for cell, looked in zip(tried, wanted, strict=True):
        if control:
            cell.control = looked.found
        else:
            cell.found = looked.found


@dataclass
class Report:
    """The artefact: a table of every cell for each topology, and a summary.

    Attributes:
        folder: Where it is kept.
    """

    folder: Path
    _tables: dict[str, list[Cell]] = field(default_factory=dict)

    def write(self, topology: str, tried: Sequence[Cell]) -> None:
        """Keep the table of one topology, again when there is more to tell."""
        self._tables[topology] = list(tried)
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{topology}.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(HEADER)
            writer.writerows(cell.row() for cell in tried)
        (self.folder / "summary.md").write_text("\n".join(self._summary()) + "\n", encoding="utf-8")

    def _summary(self) -> Iterable[str]:
        yield "# Who reaches the pods of each topology, and what they reach"
        yield ""
        yield "One line for each kind of source; every connection is in the CSV file of its topology. *open*: a"
        yield "completed handshake, which the topology allows. *blocked*: none. *control open*: the same connection"
        yield "with policies that open everything, where it has to succeed."
        for topology, tried in self._tables.items():
            yield from ("", f"## {topology}", "")
            sockets = {
                (cell.target.member.pod.name, cell.target.port) for cell in tried if isinstance(cell.target, Target)
            }
            pods = {pod for pod, _ in sockets}
            yield f"{len(pods)} pods, {len(sockets)} sockets, {len(tried)} connections."
            yield from (
                "",
                "| source | cells | open, as allowed | blocked | control open | wrong |",
                "| - | - | - | - | - | - |",
            )
            for kind in dict.fromkeys(cell.kind for cell in tried):
                ours = [cell for cell in tried if cell.kind == kind]
                count = Counter(
                    "wrong" if _verdict(cell) == "WRONG" else "open" if cell.wanted else "blocked" for cell in ours
                )
                control = sum(cell.control == OPEN for cell in ours)
                yield f"| {kind} | {len(ours)} | {count['open']} | {count['blocked']} | {control} | {count['wrong']} |"


def wrong(tried: Iterable[Cell]) -> list[str]:
    """What is not as it had to be, as sentences."""
    return [" | ".join(cell.row()) for cell in tried if _verdict(cell) == "WRONG"]
