"""What a measurement with canary pods does, for the operator and for ``securevllm probe`` alike. Edge.

A listener of ours on each node accepts on the ports of the engines there. From every vantage point the engines are
tried, which must not be reached, and the listeners beside them, which may be: silence means isolation only where the
same vantage point reached the same port of the same node, by the same family of addresses.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securevllm.proof.canaries import Canaries, Refused
from securevllm.proof.targets import Endpoint, Place, shut
from securevllm.proof.verdict import Attempt, Control, Round, Sample
from securevllm.proof.wire import BLOCKED, Reach, Target
from securevllm.render import canary

if TYPE_CHECKING:
    from securevllm.render.canary import Maker
    from securevllm.topology import Topology

Answers = dict[str, Reach]
"""By the targets' keys; what was not tried is not there."""


@dataclass(frozen=True)
class Point:
    """A vantage point.

    Attributes:
        name: as the verdict shows it: "... cannot be reached from <name>".
        reach: tries the first, which must not be reached, and the second, which may be.
        place: where it is: what the spec may let it reach is not tried.
    """

    name: str
    reach: Callable[[Sequence[Target], Sequence[Target]], Awaitable[Answers | Refused]]
    place: Place


async def beside_listeners(
    canaries: Canaries,
    found: Iterable[Endpoint],
    topology: Topology,
    points: Sequence[Point],
    steady: Callable[[Iterable[tuple[Endpoint, Reach]], str], Awaitable[tuple[Sample, ...]]],
) -> Round:
    """Measure once.

    Args:
        canaries: makes the listeners.
        found: what must not be reached.
        topology: what is allowed.
        points: from where, one after the other.
        steady: makes samples of attempts from a vantage point; looks which targets are still the same.

    Returns:
        Samples, controls and what is lacking.
    """
    here = [*found]
    ports = {
        node: tuple(sorted({item.port for item in here if item.node == node})) for node in {item.node for item in here}
    }
    listeners, lacking = await canaries.listeners(ports)
    accepting = [(item.node, address) for item in listeners for address in item.addresses]
    places = {f"c{n}.{port}": (*there, port) for n, there in enumerate(accepting) for port in ports[there[0]]}
    beside = [Target(key, address, port) for key, (_, address, port) in places.items()]
    nodes = {item.node for item in listeners}
    keyed = {f"e{n}": endpoint for n, endpoint in enumerate(item for item in here if item.node in nodes)}
    samples: list[Sample] = []
    controls: list[Control] = []
    for point in points if keyed else ():
        mine = {*shut(topology, keyed.values(), point.place)}
        targets = [Target(key, item.address, item.port) for key, item in keyed.items() if item in mine]
        answers = await point.reach(targets, beside)
        if isinstance(answers, Refused):
            lacking = [*lacking, f"{answers.why[0].upper()}{answers.why[1:]}"]
            continue
        tried = [(item, answers[key]) for key, item in keyed.items() if key in answers]
        samples += await steady(tried, point.name)
        controls += [
            Control(point.name, node, port, answers[key], address)
            for key, (node, address, port) in places.items()
            if key in answers
        ]
    return Round(samples=tuple(samples), controls=tuple(controls), lacking=tuple(lacking), complete=True)


def sampled(tried: Iterable[tuple[Endpoint, Reach]], vantage: str, after: Iterable[Endpoint]) -> tuple[Sample, ...]:
    """Samples of attempts; an error of the own machine is none.

    Args:
        tried: what was tried, and how it ended.
        vantage: from where.
        after: what there is now; a target that is not the same any more says nothing.
    """
    still = {*after}
    return tuple(
        Sample(vantage, item.pod, item.node, item.port, item.socket, reach, item in still, item.address, item.gateway)
        for item, reach in tried
        if reach is Reach.OPEN or reach in BLOCKED
    )


def attempts(topology: Topology, found: Iterable[Endpoint], places: Mapping[str, Place]) -> tuple[Attempt, ...]:
    """What has to be tried before anybody may say that it is shut.

    Args:
        topology: what is allowed.
        found: what must not be reached.
        places: name of a vantage point to where it is.
    """
    here = [*found]
    return tuple(
        Attempt(vantage, item.pod, item.address, item.port)
        for vantage, place in places.items()
        for item in shut(topology, here, place)
    )


def canary_point(name: str, canaries: Canaries) -> Point:
    """A canary pod as vantage point."""

    async def reach(targets: Sequence[Target], beside: Sequence[Target]) -> Answers | Refused:
        return await canaries.probe([*targets, *beside])

    return Point(name, reach, canary_place(canaries.maker))


def canary_place(maker: Maker) -> Place:
    """Where the canary pods of a maker stand; their labels are known to the last."""
    beside = maker.namespace == maker.owner.namespace
    return Place(maker.namespace, beside, canary.labels(maker.owner, maker.manager), exact=True)
