"""Measures isolation, round after round, for as long as this process leads. Edge.

Two tiers. Every 20 s one port of each group is tried from the operator, which shows a lapse. Every interval all named
ports are tried and the gateways are asked for forbidden routes. What shows that silence means isolation needs canary
pods; those are made when something has changed, when the last verdict is not True (with growing pauses), and every few
hours.

What the dearer round of a resource is due and has no place, the cheaper one is made: a queue for canary pods hides no
lapse. Rounds without canary pods look whether a gateway takes a connection: where not even that is reached, silence
shows nothing, and a complete round is due.

Bounded: so many resources of each tier and so many connections at once. A complete round of a large resource is made of
parts, each of so many nodes and targets; it says nothing new before the last of them, but a breach. Fair: whoever has
been due longest is next. It never sends a byte to an engine (``dial``).
"""

from __future__ import annotations

import asyncio
import base64
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from typing import TYPE_CHECKING, NamedTuple, Protocol, TypeVar

import structlog

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from securevllm.children import pods_of
from securevllm.errors import ApiError, LeadershipLost
from securevllm.gateways import Pod
from securevllm.proof.asking import Asking, Asks, unanswered
from securevllm.proof.canaries import Canaries
from securevllm.proof.dial import dial as connect_and_reset
from securevllm.proof.foreign import holding
from securevllm.proof.measure import Answers, Point, beside_listeners, canary_place, canary_point, sampled
from securevllm.proof.targets import (
    LIMITS,
    Endpoint,
    Place,
    Request,
    endpoints,
    is_ready,
    left_out,
    one_per_group,
    shut,
)
from securevllm.proof.verdict import REACHABLE, Control, Proof, Question, Round, Sample, Vantage, judge, merged
from securevllm.proof.wire import Reach, Target
from securevllm.render import canary
from securevllm.render.meta import ROLE_LABEL
from securevllm.topology import Role

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.kinds import KubeObject
    from securevllm.children import Cache
    from securevllm.cluster import Kubernetes
    from securevllm.context import Context
    from securevllm.render.meta import Owner
    from securevllm.topology import Topology

log = structlog.stdlib.get_logger(__name__)

_T = TypeVar("_T")
Dial = Callable[[str, int, float], Awaitable[Reach]]

HELD_BACK = (
    "Canary pods are selected by the NetworkPolicies {} of this namespace, which may hold them back; the policy that"
    " lets them through is in docs/status.md#nocontrol."
)

CHEAP_SECONDS = 20.0
CANARY_SECONDS = 6 * 3600.0
"""Between two measurements with canary pods while nothing changes."""
_CHANGE_SECONDS = 5.0
"""Pods come and go in numbers: a change is measured when it has settled."""
_RETRY_SECONDS = 60.0
_DIAL_SECONDS = 1.0
_AT_ONCE = {"complete": 16, "full": 16, "cheap": 64}
"""Resources in a round of each tier, the dearest first."""
_CONNECTIONS = 256
_TARGETS = 128
_NODES = 8
_SIGNS = 2
"""Gateways that are tried for a sign of life."""
_TICK = 0.5


class Who(NamedTuple):
    """Which resource; the same two words as the reconciler's key."""

    namespace: str
    name: str


@dataclass(frozen=True)
class Gateways:
    """How the gateways are asked.

    Attributes:
        port: of the clients' listener.
        secret: with their certificate; empty: plain HTTP.
        key: the prober's; empty: nobody needs one.
        requests: what they must refuse.
    """

    port: int
    secret: str
    key: str = field(repr=False)
    requests: tuple[Request, ...]


@dataclass(frozen=True)
class Subject:
    """What is measured; the reconciler gives it.

    Attributes:
        owner: the resource.
        spec: for the pods that are made.
        topology: what is allowed.
        gateways: how they are asked.
        interval: seconds between two full rounds.
        canaries: whether canary pods may be made; otherwise why not.
        revision: changes when everything has to be measured anew.
        limits: what is never measured for this resource, beside ``LIMITS``.
    """

    owner: Owner
    spec: api.Spec
    topology: Topology
    gateways: Gateways
    interval: float
    canaries: str = ""
    revision: str = ""
    limits: tuple[str, ...] = ()

    @property
    def who(self) -> Who:
        """Its key."""
        return Who(self.owner.namespace, self.owner.name)


class Observer(Protocol):
    """Told what rounds do (metrics)."""

    def probed(self, tier: str, seconds: float) -> None:
        """A round ended."""

    def connected(self, reach: str) -> None:
        """A connection was tried."""

    def verified(self, namespace: str, name: str, unix_time: float) -> None:
        """A resource was measured."""


@dataclass
class _Track:
    """Where the measuring of one resource stands; times are monotonic seconds."""

    subject: Subject
    proof: Proof | None = None
    changed_at: float | None = 0.0
    cheap_at: float = 0.0
    full_at: float = 0.0
    canary_at: float = 0.0
    retry: float = _RETRY_SECONDS
    rounds: Counter[str] = field(default_factory=Counter)
    running: bool = False
    pods: frozenset[tuple[str, str]] = frozenset()
    tried: frozenset[Endpoint] = frozenset()
    parts: tuple[Round, ...] = ()

    def due(self, tier: str) -> float:
        """When the next round of a tier is due."""
        if tier == "complete":
            return self.canary_at if self.changed_at is None else min(self.canary_at, self.changed_at)
        return self.full_at if tier == "full" else self.cheap_at

    def again(self) -> None:
        """Drop the parts of a complete round that was begun."""
        self.tried, self.parts = frozenset(), ()


@dataclass(frozen=True)
class Seen:
    """What one turn of a resource saw.

    Attributes:
        round: that is judged.
        alive: what has to answer did: the silence of others is not for want of a way out.
        tried: what this part of a complete round tried.
        left: whether a complete round has further parts.
    """

    round: Round
    alive: bool = True
    tried: frozenset[Endpoint] = frozenset()
    left: bool = False


class Prober:
    """Measures all resources that it follows.

    Args:
        kubernetes: makes and removes canary pods.
        cache: what the watches told.
        asks: asks gateways.
        context: the operator's image and namespace.
        now: wall clock, UTC.
        monotonic: clock for pauses, seconds.
        changed: told whose verdict is another one.
        observer: told what rounds do.
        others: names policies of other kinds.
        dial: connects; another one in benchmarks.
    """

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        asks: Asks,
        context: Context,
        *,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        changed: Callable[[Who], None],
        observer: Observer,
        others: Callable[[str], Awaitable[tuple[str, ...]]],
        dial: Dial = connect_and_reset,
    ) -> None:
        self._kubernetes, self._cache, self._asks, self._context = kubernetes, cache, asks, context
        self._now, self._monotonic, self._changed, self._observer = now, monotonic, changed, observer
        self._dial_once, self._others = dial, others
        self._tracks: dict[Who, _Track] = {}
        self._connections = asyncio.Semaphore(_CONNECTIONS)

    # ------------------------------------------------------------------------------------------- what it is asked for

    def follow(self, subject: Subject, before: Proof | None = None) -> None:
        """Measure a resource from now on; a change of it, or of its pods, is measured soon.

        Args:
            subject: what is measured.
            before: the verdict that an earlier leader left; it holds until this one has measured.
        """
        track = self._tracks.get(subject.who)
        if track is None or track.subject.owner.uid != subject.owner.uid:
            self._tracks[subject.who] = track = _Track(subject, before)
        pods = frozenset(
            (pod["metadata"]["uid"], pod["status"].get("podIP", ""))
            for pod in self._pods(subject.owner)
            if is_ready(pod)
        )
        if (pods, subject.revision) != (track.pods, track.subject.revision):
            track.pods = pods
            track.changed_at = self._monotonic() + _CHANGE_SECONDS
            track.retry = _RETRY_SECONDS  # it grew while something else was wrong
        track.subject = subject

    def forget(self, who: Who) -> None:
        """It is gone, or nobody wants it measured."""
        self._tracks.pop(who, None)

    def proof(self, who: Who, uid: str) -> Proof | None:
        """The verdict so far; None before the first round."""
        track = self._tracks.get(who)
        return track.proof if track is not None and track.subject.owner.uid == uid else None

    # -------------------------------------------------------------------------------------------------------- the loop

    async def run(self) -> None:
        """Measure until cancelled.

        Raises:
            LeadershipLost: somebody else leads.
        """
        running: dict[asyncio.Task[None], str] = {}
        try:
            while True:
                for tier, track in self._next(Counter(running.values())):
                    track.running = True
                    running[asyncio.create_task(self._turn(track, tier), name=f"probe {track.subject.who}")] = tier
                for task in await _ended({*running}, _TICK):
                    del running[task]
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _next(self, running: Counter[str]) -> list[tuple[str, _Track]]:
        """Whose turn it is: who has waited longest. Of its tiers the dearest that has a place covers the others."""
        now, found = self._monotonic(), list[tuple[str, _Track]]()
        idle = [track for track in self._tracks.values() if not track.running]
        for tier, places in _AT_ONCE.items():
            due = sorted((track for track in idle if now >= track.due(tier)), key=lambda track: track.due(tier))
            chosen = due[: max(0, places - running[tier])]
            found += [(tier, track) for track in chosen]
            taken = {id(track) for track in chosen}
            idle = [track for track in idle if id(track) not in taken]
        return found

    async def _turn(self, track: _Track, tier: str) -> None:
        subject, began = track.subject, self._monotonic()
        if tier == "complete":
            if track.changed_at is not None:
                track.again()
            track.changed_at = None
        try:
            seen = await self.look(subject, tier, track.rounds[tier], track.tried)
            self._decide(track, tier, seen)
        except LeadershipLost:
            raise
        except Exception:
            # One resource's trouble must not end the measuring of the others.
            log.exception("a round failed", namespace=subject.owner.namespace, resource=subject.owner.name, tier=tier)
            track.again()
        finally:
            self._schedule(track, tier)
            track.running = False
            track.rounds[tier] += 1
        self._observer.probed(tier, self._monotonic() - began)

    def _decide(self, track: _Track, tier: str, seen: Seen) -> None:
        if self._tracks.get(track.subject.who) is not track:
            return  # forgotten or replaced meanwhile
        before, found = track.proof, seen.round
        if tier == "complete":
            found = merged((*track.parts, found))
            after = judge(replace(found, complete=not seen.left), before)
            track.tried, track.parts = track.tried | seen.tried, (found,)
            if not seen.left or (after.status == "False" and after is not before):
                track.again()
        else:
            after = judge(found, before)
            if before is None and after.reason == "NotMeasured":
                return  # as before
            over = after.reason in REACHABLE and not any(item.reach is Reach.OPEN for item in found.samples)
            if over or (after.status == "True" and not seen.alive):
                track.changed_at = self._monotonic()  # only a complete round may say so
        if after.status != "Unknown" and (after is not before or (seen.alive and not seen.left)):
            moment = self._now()
            self._observer.verified(*track.subject.who, moment.timestamp())
            after = replace(after, verified_at=moment.strftime("%Y-%m-%dT%H:%M:%SZ"))
        track.proof = after
        if after != before:
            log.info("isolation", resource="/".join(track.subject.who), status=after.status, reason=after.reason)
            self._changed(track.subject.who)

    def _schedule(self, track: _Track, tier: str) -> None:
        now = self._monotonic()
        proof = track.proof
        track.cheap_at = now + CHEAP_SECONDS
        if tier != "cheap":
            track.full_at = now + track.subject.interval
        good = proof is not None and proof.status == "True"
        if tier == "complete" and track.parts:
            track.canary_at = now  # the next part, after whoever has waited longer
        elif tier != "complete":
            if not good:  # a breach: when it is over has to be seen soon
                track.canary_at = min(track.canary_at, now + track.retry)
        elif good:
            track.canary_at, track.retry = now + CANARY_SECONDS, _RETRY_SECONDS
        else:
            # What is known to be broken is looked at often, what cannot be measured ever more rarely.
            most = track.subject.interval if proof is not None and proof.status == "False" else CANARY_SECONDS
            track.canary_at = now + track.retry
            track.retry = max(_RETRY_SECONDS, min(track.retry * 2, most))

    # ------------------------------------------------------------------------------------------------------- one round

    async def look(
        self, subject: Subject, tier: str, number: int = 0, tried: frozenset[Endpoint] = frozenset()
    ) -> Seen:
        """Look once.

        Args:
            subject: the resource.
            tier: ``cheap``, ``full`` or ``complete``.
            number: of the rounds of this tier; each begins with other targets when there are too many for one.
            tried: by the parts of a complete round so far.
        """
        found = endpoints(subject.topology, self._pods(subject.owner))
        targets = len({endpoint.pod for endpoint in found})
        if tier == "cheap":
            # The first of each group that is shut from here, not the first of all.
            first = one_per_group(shut(subject.topology, found, self._here(subject)))
            mine = _rotated(first, number * _TARGETS, _TARGETS)
            samples, alive = await asyncio.gather(self._samples(subject, mine), self._alive(subject, number))
            return Seen(Round(samples=samples, targets=targets), alive=alive)
        places: dict[str, Place] = {
            Vantage.OPERATOR: self._here(subject),
            Vantage.CANARY: canary_place(self._maker(subject)),
        }
        open_ones = left_out(subject.topology, found, places)
        limits = (*LIMITS, *subject.limits, *open_ones, *await self._others(subject.owner.namespace))
        if tier == "full":
            chosen = _rotated(found, number * _TARGETS, _TARGETS)
            samples, questions, alive = await asyncio.gather(
                self._samples(subject, chosen), self._ask(subject), self._alive(subject, number)
            )
            return Seen(Round(samples=samples, questions=questions, targets=targets, limits=limits), alive=alive)
        chosen = _part([endpoint for endpoint in found if endpoint not in tried])
        seen = await self._complete(subject, chosen)
        left = len({*found} - tried) > len(chosen)
        return Seen(replace(seen, targets=targets, limits=limits), tried=frozenset(chosen), left=left)

    async def _alive(self, subject: Subject, number: int) -> bool:
        """Whether gateways take a connection, as they have to: otherwise the silence of engines shows nothing.

        By each family of addresses that they listen on: one way out may be lost, and the other not.
        """
        pods = [pod["status"] for pod in self._pods(subject.owner, Role.GATEWAY) if is_ready(pod)]
        some = _rotated(sorted(pods, key=lambda status: str(status["podIP"])), number, _SIGNS)
        found = {item["ip"] for status in some for item in status["podIPs"]}
        families = [{ip for ip in found if ":" not in ip}, {ip for ip in found if ":" in ip and self._context.ipv6}]
        ways = [
            asyncio.gather(*(self._dial(ip, subject.gateways.port) for ip in sorted(ips))) for ips in families if ips
        ]
        return bool(ways) and all(Reach.OPEN in reaches for reaches in await asyncio.gather(*ways))

    async def _complete(self, subject: Subject, found: Sequence[Endpoint]) -> Round:
        if not found:
            return Round(complete=True)
        # A breach that the operator sees needs no pods to show it.
        samples, questions = await asyncio.gather(self._samples(subject, found), self._ask(subject))
        seen = Round(samples=samples, questions=questions, complete=True)
        if any(item.steady and item.reach is Reach.OPEN for item in samples):
            return seen
        if subject.canaries:
            return replace(seen, lacking=(subject.canaries,))
        owner = subject.owner
        maker = self._maker(subject)

        async def dialled(targets: Sequence[Target], beside: Sequence[Target]) -> Answers:
            # In this order and close together: the controls stand for the moment of the samples.
            answers = await self._twice(targets)
            reached = await asyncio.gather(*(self._dial(target.address, target.port) for target in beside))
            return answers | {target.key: reach for target, reach in zip(beside, reached, strict=True)}

        async def steady(tried: Iterable[tuple[Endpoint, Reach]], vantage: str) -> tuple[Sample, ...]:
            return self._steady(subject, vantage, tried)

        async with Canaries(self._kubernetes, self._cache, maker, lambda pod: _owned(pod, owner)) as canaries:
            points = [Point(Vantage.OPERATOR, dialled, self._here(subject)), canary_point(Vantage.CANARY, canaries)]
            measured = await beside_listeners(canaries, found, subject.topology, points, steady)
        return replace(
            measured,
            questions=questions,
            lacking=(*measured.lacking, *self._holding(owner, measured.controls)),
        )

    def _holding(self, owner: Owner, controls: Iterable[Control]) -> list[str]:
        """Policies that may be why canary pods were not reached."""
        if all(item.reach is Reach.OPEN for item in controls):
            return []
        names = holding(owner.namespace, canary.labels(owner), self._cache.all(kinds.NETWORK_POLICY, owner.namespace))
        return [HELD_BACK.format(", ".join(names))] if names else []

    async def _samples(self, subject: Subject, found: Sequence[Endpoint]) -> tuple[Sample, ...]:
        """From the operator: what the spec does not open to it."""
        keyed = {f"e{n}": item for n, item in enumerate(shut(subject.topology, found, self._here(subject)))}
        answers = await self._twice([Target(key, item.address, item.port) for key, item in keyed.items()])
        return self._steady(subject, Vantage.OPERATOR, [(item, answers[key]) for key, item in keyed.items()])

    async def _twice(self, targets: Sequence[Target]) -> Answers:
        """What answers is tried a second time before it is believed."""
        reaches = await asyncio.gather(*(self._dial(target.address, target.port) for target in targets))
        answers = {target.key: reach for target, reach in zip(targets, reaches, strict=True)}
        opened = [target for target in targets if answers[target.key] is Reach.OPEN]
        return answers | {target.key: await self._dial(target.address, target.port) for target in opened}

    def _maker(self, subject: Subject) -> canary.Maker:
        return canary.Maker(subject.owner, subject.spec, self._context.operator_image, subject.owner.namespace)

    def _here(self, subject: Subject) -> Place:
        """Where the operator stands; which labels its pods have beside those of the context is not known."""
        namespace, pods = self._context.canary_service[0], self._context.operator.pods
        return Place(namespace, namespace == subject.owner.namespace, dict(pods.labels) if pods is not None else {})

    def _steady(self, subject: Subject, vantage: str, tried: Iterable[tuple[Endpoint, Reach]]) -> tuple[Sample, ...]:
        return sampled(tried, vantage, endpoints(subject.topology, self._pods(subject.owner)))

    async def _dial(self, address: str, port: int) -> Reach:
        async with self._connections:
            reach = await self._dial_once(address, port, _DIAL_SECONDS)
        self._observer.connected(reach.value)
        return reach

    async def _ask(self, subject: Subject) -> tuple[Question, ...] | None:
        """Ask every ready gateway; None: none is."""
        pods = [
            Pod(pod["metadata"]["name"], pod["status"]["podIP"])
            for pod in self._pods(subject.owner, Role.GATEWAY)
            if is_ready(pod)
        ]
        if not pods:
            return None
        told = subject.gateways
        certificate = await self._certificate(subject)
        if certificate is None:
            return tuple(unanswered(pods))
        return tuple(await self._asks(pods, Asking(told.port, certificate, told.key, told.requests)))

    async def _certificate(self, subject: Subject) -> str | None:
        """What the gateways serve; empty with plain HTTP; None: it cannot be read."""
        if not subject.gateways.secret:
            return ""
        ref = Ref(kinds.SECRET, subject.owner.namespace, subject.gateways.secret)
        try:
            secret = self._cache.get(ref) or await self._kubernetes.get(ref)
            return base64.b64decode(secret["data"]["tls.crt"]).decode()
        except (ApiError, KeyError, ValueError):
            return None

    def _pods(self, owner: Owner, role: Role | None = None) -> list[KubeObject]:
        pods = pods_of(self._cache, owner)
        return [pod for pod in pods if role is None or pod["metadata"]["labels"].get(ROLE_LABEL) == role]


async def _ended(tasks: set[asyncio.Task[None]], seconds: float) -> set[asyncio.Task[None]]:
    """Those that have ended, after this time at the latest."""
    if not tasks:
        await asyncio.sleep(seconds)
        return set()
    return (await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED))[0]


def _owned(pod: KubeObject, owner: Owner) -> bool:
    return any(ref["uid"] == owner.uid for ref in pod["metadata"].get("ownerReferences", ()))


def _part(found: Iterable[Endpoint]) -> list[Endpoint]:
    """What one part of a complete round takes: so many targets, on so many nodes."""
    chosen, nodes = list[Endpoint](), set[str]()
    for endpoint in sorted(found, key=lambda item: item.node):
        if len(chosen) == _TARGETS or len(nodes | {endpoint.node}) > _NODES:
            break
        chosen.append(endpoint)
        nodes.add(endpoint.node)
    return chosen


def _rotated(items: Sequence[_T], offset: int, count: int) -> Sequence[_T]:
    """At most so many, beginning with another one each time."""
    if len(items) <= count:
        return items
    start = offset % len(items)
    return [*items[start:], *items[:start]][:count]
