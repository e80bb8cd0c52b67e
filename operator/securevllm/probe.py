"""``securevllm probe``: measures from where a person stands, with the operator's own means. Edge.

The canary pods, the way to connect and the verdict are those of the operator's prober. What differs: nobody watches,
so pods are looked at again and again; the vantage points are the resource's namespace, namespaces that the person
names, and this machine, where it is on the pod network. Gateways are not asked for forbidden routes: that takes a key
that only the operator has.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.api.parse import Accepted, parse_accepted
from securevllm.cluster import Kubernetes, connect
from securevllm.context import Context
from securevllm.errors import ApiError, Forbidden, NotFound, OperatorError
from securevllm.proof import report
from securevllm.proof.canaries import Canaries
from securevllm.proof.dial import dial
from securevllm.proof.foreign import holding
from securevllm.proof.measure import Answers, Point, attempts, beside_listeners, canary_place, canary_point, sampled
from securevllm.proof.prober import HELD_BACK
from securevllm.proof.report import Report
from securevllm.proof.targets import LIMITS, Endpoint, Place, endpoints, left_out
from securevllm.proof.verdict import Round, Sample, judge
from securevllm.proof.wire import Reach, Target
from securevllm.render import accepted as kept
from securevllm.render import canary
from securevllm.render.gate import GATE
from securevllm.render.meta import MANAGED_BY, RESOURCE_LABEL, Owner
from securevllm.topology import Topology, plan

if TYPE_CHECKING:
    from securevllm.cluster import Login

_TARGETS, _NODES = 96, 8
"""In one round: what a canary pod saw has to fit into its termination message."""
_AT_ONCE = 4
_CONNECTIONS = 32
_DIAL_SECONDS = 1.5
_LOOK = 0.4
_WAIT_LOOK = 2.0
_LEFT_OVER = timedelta(seconds=2 * canary.LIFETIME_SECONDS)

_NOT_ASKED = (
    "The gateways' routes were not tried: that takes the operator's own key. What the operator found is in the status:"
    " securevllm probe --status."
)


@dataclass(frozen=True)
class Wanted:
    """What a person asks for.

    Attributes:
        namespace: None: all namespaces.
        names: of resources; empty: all of the namespace.
        vantages: further namespaces to try from.
        image: of the canary pods; None: the one that the gates of the engines run.
        wait: seconds to wait for a Ready engine, or with ``status`` for a verdict of the operator.
        status: tell what the operator measured; measure nothing.
    """

    namespace: str | None
    names: tuple[str, ...] = ()
    vantages: tuple[str, ...] = ()
    image: str | None = None
    wait: float = 0.0
    status: bool = False


async def probe(kubernetes: Kubernetes, wanted: Wanted, tell: Callable[[str], None]) -> list[Report]:
    """Measure, or tell what was measured.

    Args:
        kubernetes: the API, with the rights of whoever asks.
        wanted: what is asked for.
        tell: takes progress, one line at a time.

    Returns:
        One report for each resource.

    Raises:
        OperatorError: a resource or a right is missing, or the cluster does not answer.
    """
    resources = await _resources(kubernetes, wanted)
    slots = asyncio.Semaphore(_AT_ONCE)

    async def one(resource: KubeObject) -> Report:
        if wanted.status:
            return await _status(kubernetes, resource, wanted.wait, tell)
        async with slots:
            return await _Measurement(kubernetes, resource, wanted, tell).run()

    async def told(resource: KubeObject) -> Report:
        # One resource's trouble must not end the measuring of the others.
        try:
            return await one(resource)
        except OperatorError as error:
            metadata = resource["metadata"]
            return Report(metadata["namespace"], metadata["name"], report.failed(str(error)))

    if resources and not wanted.status:
        places = {item["metadata"]["namespace"] for item in resources} | {*wanted.vantages}
        await _rights(kubernetes, sorted(places))
    async with asyncio.TaskGroup() as group:
        tasks = [group.create_task(told(item)) for item in resources]
    return [task.result() for task in tasks]


def run(login: Login, wanted: Wanted, tell: Callable[[str], None]) -> list[Report]:
    """`probe` for a command: SIGTERM, like Ctrl-C, ends it after the canary pods are removed.

    Raises:
        KeyboardInterrupt: it was interrupted.
        OperatorError: see `probe`.
    """

    async def main() -> list[Report]:
        task = asyncio.current_task()
        if task is not None:
            asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
        async with connect(login, fence=lambda: True) as kubernetes:
            return await probe(kubernetes, wanted, tell)

    try:
        return asyncio.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None


def exit_code(reports: Iterable[Report]) -> int:
    """0 all isolated (or none there), 1 one is known not to be, 2 something could not be measured."""
    codes = {item.exit_code for item in reports}
    return 1 if 1 in codes else max(codes, default=0)


async def _resources(kubernetes: Kubernetes, wanted: Wanted) -> list[KubeObject]:
    kind = kinds.SECURE_VLLM_DEPLOYMENT
    try:
        if wanted.names:
            return [await kubernetes.get(Ref(kind, wanted.namespace, name)) for name in dict.fromkeys(wanted.names)]
        found = (await kubernetes.list(kind, wanted.namespace)).items
    except NotFound as error:
        raise OperatorError(
            f"{error}. Look for it: kubectl get svllm --all-namespaces (no such resource type: the operator is not"
            " installed in this cluster)"
        ) from error
    return sorted(found, key=lambda item: (item["metadata"]["namespace"], item["metadata"]["name"]))


async def _rights(kubernetes: Kubernetes, namespaces: Sequence[str]) -> None:
    """Ask for all rights before the first pod is made.

    Raises:
        OperatorError: names those that are missing.
    """
    asked = [(namespace, verb) for namespace in namespaces for verb in ("create", "delete", "list")]
    answers = await asyncio.gather(*(kubernetes.allowed(verb, kinds.POD, namespace) for namespace, verb in asked))
    missing: dict[str, list[str]] = {}
    for (namespace, verb), allowed in zip(asked, answers, strict=True):
        if not allowed:
            missing.setdefault(namespace, []).append(verb)
    if missing:
        told = "; ".join(f"{', '.join(verbs)} pods in namespace {name}" for name, verbs in missing.items())
        raise OperatorError(
            f"a measurement makes canary pods, and you may not: {told}. Ask for a role with these rights, or see what"
            " the operator measured: securevllm probe --status"
        )


async def _status(kubernetes: Kubernetes, resource: KubeObject, wait: float, tell: Callable[[str], None]) -> Report:
    until, told = time.monotonic() + wait, False
    while True:
        found = report.measured_by_operator(resource, datetime.now(UTC))
        if found.proof.status != "Unknown" or found.exit_code == 0 or time.monotonic() >= until:
            return found
        if not told:
            tell(f"{found.namespace}/{found.name}: waiting up to {wait:.0f} s for the operator ({found.proof.reason})")
            told = True
        await asyncio.sleep(_WAIT_LOOK)
        resource = await kubernetes.get(Ref.of(resource))


class _Seen:
    """Pods as the last look saw them: what the operator's cache is to its canary pods."""

    def __init__(self) -> None:
        self._pods: dict[Ref, KubeObject] = {}

    def get(self, ref: Ref) -> KubeObject | None:
        return self._pods.get(ref)

    def indexed(self, _word: str) -> Sequence[KubeObject]:
        return ()

    def all(self, kind: kinds.Kind, namespace: str | None = None) -> Sequence[KubeObject]:
        return [obj for ref, obj in self._pods.items() if ref.kind == kind and namespace in {None, ref.namespace}]

    def put(self, obj: KubeObject) -> None:
        # A look that began before the pod was made must not hide it: see ``look``.
        self._pods[Ref.of(obj)] = obj

    wrote = put

    def forget(self, obj: KubeObject) -> None:
        self._pods.pop(Ref.of(obj), None)

    async def look(self, kubernetes: Kubernetes, namespaces: Iterable[str]) -> None:
        for namespace in namespaces:
            before = {ref for ref in self._pods if ref.namespace == namespace}
            listing = await kubernetes.list(kinds.POD, namespace, f"{MANAGED_BY}={canary.PROBE_MANAGER}")
            live = {Ref.of(obj): obj for obj in listing.items}
            self._pods.update(live)
            for gone in before - {*live}:
                self._pods.pop(gone, None)


class _Measurement:
    """Of one resource."""

    def __init__(
        self, kubernetes: Kubernetes, resource: KubeObject, wanted: Wanted, tell: Callable[[str], None]
    ) -> None:
        metadata = resource["metadata"]
        self._kubernetes, self._resource, self._wanted = kubernetes, resource, wanted
        self._owner = Owner(metadata["name"], metadata["namespace"], metadata["uid"])
        self._progress = tell
        self._slots = asyncio.Semaphore(_CONNECTIONS)
        self._reached = self._beside = 0
        self._elsewhere = [item for item in dict.fromkeys(wanted.vantages) if item != self._owner.namespace]

    def _tell(self, line: str) -> None:
        self._progress(f"{self._owner.namespace}/{self._owner.name}: {line}")

    async def run(self) -> Report:
        """Measure.

        Raises:
            OperatorError: the spec cannot be read, or the cluster does not answer.
        """
        accepted, notes = await self._accepted()
        topology = plan(accepted.spec, Context())
        pods = await self._pods(topology, suspended=accepted.spec.suspend)
        found = endpoints(topology, pods)
        places = self._places(accepted)
        seen = Round(
            questions=(),
            targets=len({item.pod for item in found}),
            limits=(*LIMITS, *left_out(topology, found, places)),
            complete=True,
            vantages=tuple(places),
            wanted=attempts(topology, found, places),
        )
        if found:
            nodes = len({item.node for item in found})
            self._tell(f"{seen.targets} Ready pods on {nodes} node{'s'[: nodes != 1]}, {len(found)} sockets to try")
            async with self._watched() as cache:
                rounds = [
                    await self._round(accepted, topology, part, self._image(pods), cache)
                    for part in report.parts(found, _TARGETS, _NODES)
                ]
            held_back = Round(lacking=tuple(await self._holding(rounds)), complete=True)
            seen = report.merged([seen, *rounds, held_back])
        proof = judge(seen, None) if found or not accepted.spec.suspend else report.SUSPENDED
        if proof.status != "Unknown":
            proof = replace(proof, verified_at=datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"))
        notes = [*notes, *self._here(), *([_NOT_ASKED] if found else [])]
        return Report(self._owner.namespace, self._owner.name, proof, report.rows(seen, topology), tuple(notes))

    def _places(self, accepted: Accepted) -> dict[str, Place]:
        """Vantage points by name, but this machine: what nobody tries from anywhere else would be told twice."""
        names = {report.SAME_NAMESPACE: self._owner.namespace}
        names |= {report.other_namespace(namespace): namespace for namespace in self._elsewhere}
        return {name: canary_place(self._maker(accepted, "", namespace)) for name, namespace in names.items()}

    def _maker(self, accepted: Accepted, image: str, namespace: str) -> canary.Maker:
        return canary.Maker(self._owner, accepted.spec, image, namespace, canary.PROBE_MANAGER)

    async def _accepted(self) -> tuple[Accepted, list[str]]:
        """The spec that runs: this one, or what was accepted before."""
        raw, notes = self._resource.get("spec", {}), []
        if why := report.not_in_force(self._resource):
            kept_spec = await self._kept(why)
            if kept_spec is not None:
                raw, notes = kept_spec, [f"{why}; what it accepted before runs, and was measured."]
        accepted = parse_accepted(raw)
        if accepted is None:
            raise OperatorError(
                f"this release cannot read the spec of {self._owner.namespace}/{self._owner.name}: use the operator's"
                " own version of securevllm"
            )
        return accepted, notes

    async def _kept(self, why: str) -> Any:
        """What was accepted last; None: nothing yet, because no operator has looked at the resource.

        Raises:
            OperatorError: it cannot be read, so that nobody knows what runs.
        """
        ref = Ref(kinds.CONFIG_MAP, self._owner.namespace, kept.name(self._owner))
        try:
            return json.loads((await self._kubernetes.get(ref))["data"][kept.SPEC])
        except Forbidden as error:
            told = f"you may not read it: ask for the right to get ConfigMaps in namespace {ref.namespace} ({error})"
        except (NotFound, KeyError, ValueError) as error:
            if isinstance(error, NotFound) and not report.looked_at(self._resource):
                return None
            told = f"it cannot be read ({error})"
        raise OperatorError(
            f"{why}, and what it accepted before is in the ConfigMap {ref.name}, but {told}. See the condition Accepted"
        )

    async def _live(self) -> list[KubeObject]:
        label = f"{RESOURCE_LABEL}={self._owner.label}"
        return (await self._kubernetes.list(kinds.POD, self._owner.namespace, label)).items

    async def _pods(self, topology: Topology, *, suspended: bool) -> list[KubeObject]:
        """The resource's pods; with patience for a Ready one."""
        until, told = time.monotonic() + self._wanted.wait, False
        while True:
            pods = await self._live()
            if endpoints(topology, pods) or suspended or time.monotonic() >= until:
                return pods
            if not told:
                self._tell(f"waiting up to {self._wanted.wait:.0f} s for a Ready engine")
                told = True
            await asyncio.sleep(_WAIT_LOOK)

    def _image(self, pods: Iterable[KubeObject]) -> str:
        """The operator's image, as this cluster can pull it: a gate of the resource ran it."""
        if self._wanted.image:
            return self._wanted.image
        containers = (item for pod in pods for item in pod["spec"].get("initContainers", ()))
        gates = (str(item["image"]) for item in containers if item["name"] == GATE)
        return next(gates, Context().operator_image)

    @contextlib.asynccontextmanager
    async def _watched(self) -> AsyncIterator[_Seen]:
        """A view of the canary pods that is looked at again and again."""
        seen, places = _Seen(), (self._owner.namespace, *self._elsewhere)
        await seen.look(self._kubernetes, places)

        async def looking() -> None:
            while True:
                await asyncio.sleep(_LOOK)
                with contextlib.suppress(ApiError):  # the next look may get an answer
                    await seen.look(self._kubernetes, places)

        task = asyncio.create_task(looking())
        try:
            yield seen
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _round(
        self, accepted: Accepted, topology: Topology, part: Sequence[Endpoint], image: str, cache: _Seen
    ) -> Round:
        def canaries(namespace: str) -> Canaries:
            return Canaries(self._kubernetes, cache, self._maker(accepted, image, namespace), _left_over)

        async def steady(tried: Iterable[tuple[Endpoint, Reach]], vantage: str) -> tuple[Sample, ...]:
            return sampled(tried, vantage, endpoints(topology, await self._live()))

        async with AsyncExitStack() as stack:
            own = await stack.enter_async_context(canaries(self._owner.namespace))
            points = [self._told(Point(report.HERE, self._from_here, _ANYWHERE))]
            points.append(self._told(canary_point(report.SAME_NAMESPACE, own)))
            for namespace in self._elsewhere:
                there = await stack.enter_async_context(canaries(namespace))
                points.append(self._told(canary_point(report.other_namespace(namespace), there)))
            nodes = sorted({item.node for item in part})
            self._tell(f"starting a listener on {', '.join(nodes)}")
            measured = await beside_listeners(own, part, topology, points, steady)
            self._tell("removing the canary pods")
        return measured

    def _told(self, point: Point) -> Point:
        async def reach(targets: Sequence[Target], beside: Sequence[Target]) -> Any:
            self._tell(f"trying {len(targets)} sockets from {point.name}")
            return await point.reach(targets, beside)

        return replace(point, reach=reach)

    async def _from_here(self, targets: Sequence[Target], beside: Sequence[Target]) -> Answers:
        """From this machine, where it reaches the pod network.

        Elsewhere the same addresses may be somebody else's machines: what is not reached beside a target says that the
        target is not ours to try.
        """
        reached = await asyncio.gather(*(self._dial(item) for item in beside))
        there = [item for item, reach in zip(beside, reached, strict=True) if reach is Reach.OPEN]
        self._reached += len(there)
        self._beside += len(beside)
        if len(there) < len(beside):
            return {}
        answers = dict(
            zip((item.key for item in targets), await asyncio.gather(*map(self._dial, targets)), strict=True)
        )
        again = {item.key: await self._dial(item) for item in targets if answers[item.key] is Reach.OPEN}
        return answers | again | {item.key: Reach.OPEN for item in there}

    def _here(self) -> list[str]:
        """What a reader has to know of this machine as a vantage point."""
        if self._reached == self._beside:
            return []
        told = "This machine is not on the pod network: nothing was tried from it."
        if self._reached:
            told = (
                f"This machine reached {self._reached} of {self._beside} ports of the listeners beside the engines: in"
                " a round in which it did not reach all, nothing was tried from it."
            )
        return [told]

    async def _dial(self, target: Target) -> Reach:
        async with self._slots:
            return await dial(target.address, target.port, _DIAL_SECONDS)

    async def _holding(self, rounds: Iterable[Round]) -> list[str]:
        """Policies that may be why canary pods were not reached."""
        controls = [item for one in rounds for item in one.controls]
        if controls and all(item.reach is Reach.OPEN for item in controls):
            return []
        try:
            policies = (await self._kubernetes.list(kinds.NETWORK_POLICY, self._owner.namespace)).items
        except ApiError:
            return []
        names = holding(self._owner.namespace, canary.labels(self._owner, canary.PROBE_MANAGER), policies)
        return [HELD_BACK.format(", ".join(names))] if names else []


_ANYWHERE = Place(None, beside=True, labels={})
"""This machine may be a pod, and nobody says which."""


def _left_over(pod: KubeObject) -> bool:
    """Made by a probe that was killed; not by one that runs beside this one."""
    made = datetime.fromisoformat(pod["metadata"]["creationTimestamp"])
    return datetime.now(UTC) - made > _LEFT_OVER
