"""Measures isolation, round after round, for as long as this process leads. Edge.

Two tiers. Every 20 s one port of each group is tried from the operator, which shows a lapse. Every interval all named
ports are tried and the gateways are asked for forbidden routes. What shows that silence means isolation needs canary
pods; those are made when something has changed, when the last verdict is not True (with growing pauses), and every few
hours.

Bounded: so many resources and so many connections at once, so many targets in a round; the rest comes in the next one.
Fair: whoever has been due longest is next. It never sends a byte to an engine (``dial``).
"""

from __future__ import annotations

import asyncio
import base64
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
from securevllm.proof.verdict import Control, Proof, Question, Round, Sample, Vantage, judge
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
_RESOURCES, _CANARIES, _CONNECTIONS = 32, 8, 128
_TARGETS = 128
_NODES = 8
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
    round: int = 0
    running: bool = False
    pods: frozenset[tuple[str, str]] = frozenset()

    def due(self) -> tuple[float, str]:
        """When the next round is due, and which tier: the dearest that is due covers the others."""
        complete = self.canary_at if self.changed_at is None else min(self.canary_at, self.changed_at)
        return min((complete, "complete"), (self.full_at, "full"), (self.cheap_at, "cheap"))

    def tier(self, now: float) -> str | None:
        """What is due now."""
        complete = self.canary_at if self.changed_at is None else min(self.canary_at, self.changed_at)
        for moment, tier in ((complete, "complete"), (self.full_at, "full"), (self.cheap_at, "cheap")):
            if now >= moment:
                return tier
        return None


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
        self._canary_slots = asyncio.Semaphore(_CANARIES)

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
        running: set[asyncio.Task[None]] = set()
        try:
            while True:
                now = self._monotonic()
                waiting = [track for track in self._tracks.values() if not track.running and track.tier(now)]
                waiting.sort(key=lambda track: track.due()[0])
                for track in waiting[: _RESOURCES - len(running)]:
                    track.running = True
                    running.add(asyncio.create_task(self._turn(track), name=f"probe {track.subject.who}"))
                done, running = await _wait(running, _TICK)
                for task in done:
                    task.result()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    async def _turn(self, track: _Track) -> None:
        tier = track.tier(self._monotonic()) or "cheap"
        subject, began = track.subject, self._monotonic()
        if tier == "complete":
            track.changed_at = None
        try:
            seen = await self.round(subject, tier, track.round)
            self._decide(track, tier, seen)
        except LeadershipLost:
            raise
        except Exception:
            # One resource's trouble must not end the measuring of the others.
            log.exception("a round failed", namespace=subject.owner.namespace, resource=subject.owner.name, tier=tier)
        finally:
            self._schedule(track, tier)
            track.running = False
        self._observer.probed(tier, self._monotonic() - began)

    def _decide(self, track: _Track, tier: str, seen: Round) -> None:
        if self._tracks.get(track.subject.who) is not track:
            return  # forgotten or replaced meanwhile
        before = track.proof
        after = judge(seen, before)
        if tier == "complete":
            track.round += 1
        elif after.reason == "EngineReachable" and not any(item.reach is Reach.OPEN for item in seen.samples):
            track.changed_at = self._monotonic()  # it seems to be over: only a complete round may say so
        if after.status != "Unknown":
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
        if tier != "complete":
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

    async def round(self, subject: Subject, tier: str, number: int = 0) -> Round:
        """Look once.

        Args:
            subject: the resource.
            tier: ``cheap``, ``full`` or ``complete``.
            number: of the round; each begins with other targets when there are too many for one.
        """
        found = endpoints(subject.topology, self._pods(subject.owner))
        targets = len({endpoint.pod for endpoint in found})
        if tier == "cheap":
            # The first of each group that is shut from here, not the first of all.
            mine = one_per_group(shut(subject.topology, found, self._here(subject)))
            return Round(samples=await self._samples(subject, mine), targets=targets)
        places: dict[str, Place] = {
            Vantage.OPERATOR: self._here(subject),
            Vantage.CANARY: canary_place(self._maker(subject)),
        }
        open_ones = left_out(subject.topology, found, places)
        limits = (*LIMITS, *subject.limits, *open_ones, *await self._others(subject.owner.namespace))
        chosen = _rotated(found, number * _TARGETS, _TARGETS)
        if tier == "full":
            samples, questions = await asyncio.gather(self._samples(subject, chosen), self._ask(subject))
            return Round(samples=samples, questions=questions, targets=targets, limits=limits)
        return replace(await self._complete(subject, chosen, number), targets=targets, limits=limits)

    async def _complete(self, subject: Subject, found: Sequence[Endpoint], number: int) -> Round:
        if not found:
            return Round()
        # A breach that the operator sees needs no pods to show it.
        samples, questions = await asyncio.gather(self._samples(subject, found), self._ask(subject))
        seen = Round(samples=samples, questions=questions, complete=True)
        if any(item.steady and item.reach is Reach.OPEN for item in samples):
            return seen
        if subject.canaries:
            return replace(seen, lacking=(subject.canaries,))
        nodes = _rotated(sorted({endpoint.node for endpoint in found}), number * _NODES, _NODES)
        here = [endpoint for endpoint in found if endpoint.node in nodes]
        owner = subject.owner
        maker = self._maker(subject)

        async def dialled(targets: Sequence[Target], beside: Sequence[Target]) -> Answers:
            # In this order and close together: the controls stand for the moment of the samples.
            answers = await self._twice(targets)
            reached = await asyncio.gather(*(self._dial(target.address, target.port) for target in beside))
            return answers | {target.key: reach for target, reach in zip(beside, reached, strict=True)}

        async def steady(tried: Iterable[tuple[Endpoint, Reach]], vantage: str) -> tuple[Sample, ...]:
            return self._steady(subject, vantage, tried)

        async with (
            self._canary_slots,
            Canaries(self._kubernetes, self._cache, maker, lambda pod: _owned(pod, owner)) as canaries,
        ):
            points = [Point(Vantage.OPERATOR, dialled, self._here(subject)), canary_point(Vantage.CANARY, canaries)]
            measured = await beside_listeners(canaries, here, subject.topology, points, steady)
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


async def _wait(
    tasks: set[asyncio.Task[None]], seconds: float
) -> tuple[set[asyncio.Task[None]], set[asyncio.Task[None]]]:
    if not tasks:
        await asyncio.sleep(seconds)
        return set(), set()
    return await asyncio.wait(tasks, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)


def _owned(pod: KubeObject, owner: Owner) -> bool:
    return any(ref["uid"] == owner.uid for ref in pod["metadata"].get("ownerReferences", ()))


def _rotated(items: Sequence[_T], offset: int, count: int) -> Sequence[_T]:
    """At most so many, beginning with another one each time."""
    if len(items) <= count:
        return items
    start = offset % len(items)
    return [*items[start:], *items[:start]][:count]
