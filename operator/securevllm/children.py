"""Bringing children to what was rendered: create, repair, replace, prune; never touch what is somebody else's.

A failing child never hides the others: every method returns what failed instead of stopping at it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from securevllm import drift
from securevllm.api import types as api
from securevllm.api.kinds import DEPLOYMENT, JOB, POD, STATEFUL_SET, Kind, KubeObject, Ref
from securevllm.context import FIELD_MANAGER
from securevllm.drift import Action
from securevllm.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Contested,
    Forbidden,
    ForeignObject,
    NotFound,
    Unavailable,
)
from securevllm.render.meta import COMPONENT, HASH_ANNOTATION, MANAGED_BY, Object, Owner, is_resource
from securevllm.status import Failure

if TYPE_CHECKING:
    from securevllm.cluster import Kubernetes

log = structlog.stdlib.get_logger(__name__)

_CONTEST_WINDOW = 600.0
_CONTEST_REPEATS = 5
_CONTEST_PAUSE, _CONTEST_PAUSE_SHORT = 60.0, 3.0
_MAKES_PODS = frozenset({DEPLOYMENT, JOB, STATEFUL_SET})
_RETRY, _RETRY_REFUSED = 2.0, 30.0

WAITING = "WaitingForGarbageCollection"
"""Reason of an error that goes by itself: an older object of this name is on its way out."""

_CONFLICTS = 4


class Cache(Protocol):
    """Objects as the watches last told (``store.Store``). A hint: a deletion in a watch gap is told late."""

    def get(self, ref: Ref) -> KubeObject | None:
        """The object, or None when it was never seen or is gone."""

    def indexed(self, word: str) -> Sequence[KubeObject]:
        """Objects whose controller has this uid, or is this resource (``str(Ref)``), be it of another life.

        Of pods also those with the label of a resource, see ``pods_of``; of NetworkPolicies those that ask for it.
        """

    def all(self, kind: Kind, namespace: str | None = None) -> Sequence[KubeObject]:
        """Objects of a kind, of one namespace when it is given."""

    def put(self, obj: KubeObject) -> None:
        """Take what a look found, unless a newer state is known."""

    def wrote(self, obj: KubeObject) -> None:
        """Take the answer to an own write: its event wakes nobody, unless it may hold what somebody else changed."""

    def forget(self, obj: KubeObject) -> None:
        """This state is old: unless a newer one is known, the next look goes to the API server."""


def labelled(kind: Kind, namespace: str, label: str) -> str:
    """The word of a cache's index for what carries, or asks for, the label of a resource; empty: for no such label."""
    return f"{kind.kind} {namespace}/{label}"


def pods_of(cache: Cache, owner: Owner) -> list[KubeObject]:
    """Pods that carry the label of a resource, by name. Anybody can make one that does.

    A look at all pods of the namespace, several times in each reconcile, would grow with the square of its resources.
    """
    found = cache.indexed(labelled(POD, owner.namespace, owner.label))
    return sorted(found, key=lambda pod: str(pod["metadata"]["name"]))


@dataclass
class _Memory:
    """What this process knows of one child since it started.

    Attributes:
        settled: ``drift.footprint`` after the last own write.
        applied: ``HASH_ANNOTATION`` of what was written last.
        found: resourceVersion of the child when it was last found to be just that.
        repairs: when drift was repaired, monotonic seconds.
        pause_until: contested; no repair before.
    """

    settled: str | None = None
    applied: str | None = None
    found: str | None = None
    repairs: deque[float] = field(default_factory=lambda: deque(maxlen=_CONTEST_REPEATS + 1))
    pause_until: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What could not be done.

    Attributes:
        failures: children that are not what they should be.
        again: seconds until another try makes sense; None: nothing to do.
    """

    failures: tuple[Failure, ...] = ()
    again: float | None = None

    def __add__(self, other: Outcome) -> Outcome:
        pauses = [pause for pause in (self.again, other.again) if pause is not None]
        return Outcome(self.failures + other.failures, min(pauses, default=None))

    def of(self, component: str, child: str | None = None) -> bool:
        """Whether something of a component, or one child of it, failed."""
        return any(item.component == component and child in (None, item.child) for item in self.failures)


def failed(obj: Object, error: ApiError | ForeignObject | Contested, component: str = "") -> Outcome:
    """An error as an outcome.

    Args:
        obj: the child.
        error: what happened.
        component: instead of the child's own.
    """
    again = _RETRY_REFUSED
    if isinstance(error, ForeignObject):
        reason = "ForeignObject"
    elif isinstance(error, Contested):
        reason = "DriftContested"
        again = error.pause
    elif error.reason == WAITING:
        reason = WAITING
        again = _RETRY
    else:
        reason = "ApplyFailed"
        if isinstance(error, Unavailable | Conflict):
            again = _RETRY
    child = f"{obj['kind']} {obj['metadata']['name']}"
    log.warning("child not as it should be", child=child, reason=reason, error=str(error))
    component = component or obj["metadata"]["labels"].get(COMPONENT, "operator")
    return Outcome((Failure(component, child, reason, str(error)),), again)


class Children:
    """Applies and prunes children; remembers how they looked after the last own write."""

    def __init__(self, kubernetes: Kubernetes, cache: Cache, monotonic: Callable[[], float]) -> None:
        self._kubernetes, self._cache, self._monotonic = kubernetes, cache, monotonic
        self._memory: dict[Ref, _Memory] = {}

    async def bring(self, objects: Iterable[Object], uid: str | None, *, component: str = "") -> Outcome:
        """Make every object what was rendered, side by side.

        Args:
            objects: rendered, with their hash.
            uid: of the owner; None for the shared default-deny.
            component: of failures, instead of the objects' own.
        """
        wanted = list(objects)
        results = await asyncio.gather(*(self._bring(obj, uid) for obj in wanted), return_exceptions=True)
        outcome = Outcome()
        for obj, result in zip(wanted, results, strict=True):
            if isinstance(result, ApiError | ForeignObject | Contested):
                outcome += failed(obj, result, component)
            elif result is not None:
                raise result  # LeadershipLost, cancellation, or a mistake of ours: nothing may hide it
        return outcome

    async def _bring(self, obj: Object, uid: str | None) -> None:
        ref = Ref.of(obj)
        memory = self._memory.setdefault(ref, _Memory())
        live = self._cache.get(ref)
        for _ in range(_CONFLICTS):
            if live is None:
                # The cache only holds what carries our label: a foreign object of this name has to be looked for.
                live = await self._look(ref)
            try:
                await self._settle(ref, obj, live, uid, memory)
            except (Conflict, NotFound):
                live = None  # it moved under us
            else:
                return
        raise Conflict(f"{ref} changes faster than it can be repaired")

    async def _settle(self, ref: Ref, obj: Object, live: KubeObject | None, uid: str | None, memory: _Memory) -> None:
        action = Action.APPLY
        wanted = obj["metadata"]["annotations"][HASH_ANNOTATION]
        if live is not None:
            self.check_owner(live, uid)
            if (memory.applied, memory.found) == (wanted, live["metadata"]["resourceVersion"]):
                return  # nothing to compare: of most children nothing has changed since the last reconcile
            action = drift.judge(obj, live, memory.settled)
        if action is not Action.KEEP:
            pause = memory.pause_until - self._monotonic()
            # A fight delays repairs, never what the spec newly says: a revoked key must not wait for it.
            if pause > 0 and memory.applied == wanted:
                raise Contested(pause)
        if live is not None and action is Action.RECREATE:
            if memory.applied == wanted:
                self._note_repair(ref, memory)
            await self._kubernetes.delete(ref, uid=live["metadata"]["uid"])
            self._cache.forget(live)
            raise Unavailable(f"{ref} is made anew", reason=WAITING)
        # The same again: somebody has changed or deleted it, be it the hash alone.
        drifted = memory.applied == wanted and action is not Action.KEEP
        if live is None or action is Action.APPLY:
            live = await self._kubernetes.apply(obj)
            self._cache.wrote(live)
            memory.applied = wanted
            action = drift.judge(obj, live, None)
        if action is not Action.KEEP:
            memory.settled = None
            added = [*drift.additions(obj, live)][:5]
            log.info("drift repaired", kind=ref.kind.kind, name=ref.name, added=added)
            live = await self._kubernetes.replace(drift.replacement(obj, live))
            self._cache.wrote(live)
        memory.settled, memory.applied = drift.footprint(obj, live), wanted
        memory.found = live["metadata"]["resourceVersion"]
        if drifted:
            self._note_repair(ref, memory)

    async def _look(self, ref: Ref) -> KubeObject | None:
        try:
            live = await self._kubernetes.get(ref)
        except NotFound:
            return None
        if live["metadata"].get("labels", {}).get(MANAGED_BY) == FIELD_MANAGER:
            self._cache.put(live)
        return live

    def _note_repair(self, ref: Ref, memory: _Memory) -> None:
        now = self._monotonic()
        memory.repairs.append(now)
        recent = [moment for moment in memory.repairs if now - moment < _CONTEST_WINDOW]
        if len(recent) > _CONTEST_REPEATS:
            # What isolates or authenticates is open for moments only; a workload that is changed rolls pods each time.
            pause = _CONTEST_PAUSE if ref.kind in _MAKES_PODS else _CONTEST_PAUSE_SHORT
            memory.pause_until = now + pause
            log.warning("drift contested", kind=ref.kind.kind, name=ref.name, pause=pause)

    @staticmethod
    def check_owner(live: KubeObject, uid: str | None) -> None:
        """Refuse what is not ours.

        Raises:
            ForeignObject: another controller, or none, owns it.
            Unavailable: it belongs to a deleted resource of the same name and waits for the garbage collector.
        """
        metadata = live["metadata"]
        controller = next((ref for ref in metadata.get("ownerReferences", ()) if ref.get("controller")), None)
        if uid is None:
            # The default-deny only closes, and its name is ours: whoever made it, it becomes what it should be.
            if controller is not None:
                raise _foreign(live, controller)
            return
        if controller is not None and controller["uid"] == uid:
            return
        if controller is not None and is_resource(controller):
            raise Unavailable(
                f"{live['kind']} {metadata['name']} belongs to a deleted {api.KIND} and is being removed; "
                "if it stays, delete it",
                reason=WAITING,
            )
        raise _foreign(live, controller)

    async def make(self, obj: Object, uid: str, content: Callable[[KubeObject | None], dict[str, str]]) -> KubeObject:
        """A Secret whose content is random: POST, which changes none that is there; then only when its content says so.

        Args:
            obj: without data.
            uid: of the owner.
            content: gives the wanted data (base64), from the current Secret or None.

        Raises:
            ApiError: it could not be made.
            ForeignObject: the name is taken.
        """
        ref = Ref.of(obj)
        live = self._cache.get(ref)
        if live is None:
            try:
                live = await self._kubernetes.create(obj | {"data": content(None)})
                self._cache.wrote(live)
            except (AlreadyExists, Forbidden):
                # Somebody was faster, perhaps ourselves before a crash, or took its label away: what is there counts.
                # A quota refuses before it is looked whether there is one.
                live = await self._look(ref)
                if live is None:
                    raise
        self.check_owner(live, uid)
        wanted = {**live, "data": content(live)}
        metadata = obj["metadata"]
        labels = {**live["metadata"].get("labels", {}), **metadata["labels"]}
        wanted["metadata"] = {**live["metadata"], "labels": labels, "ownerReferences": metadata["ownerReferences"]}
        if wanted != live:
            live = await self._kubernetes.replace(wanted)
            self._cache.wrote(live)
        return live

    async def prune(self, uid: str, keep: set[Ref], kinds: frozenset[Kind]) -> Outcome:
        """Delete children of this owner that are no longer rendered.

        Args:
            uid: of the owner.
            keep: what is rendered, or must stay for another reason.
            kinds: only these; anybody can make an object that names our resource as its owner.
        """
        unwanted = [obj for obj in self._cache.indexed(uid) if Ref.of(obj) not in keep]
        return await self._remove(unwanted, kinds, "pruned", foreground=False)

    async def clear(self, resource: KubeObject, kinds: frozenset[Kind]) -> Outcome:
        """Delete what a deleted resource of the same name left.

        That is the garbage collector's task; but where a resource was deleted and made anew while its watch was broken,
        its informer tells it of an update, and it keeps the children of the old one for good (seen with Kubernetes
        1.36, pkg/controller/garbagecollector). So that it does not lose their pods in the same way, what makes pods is
        deleted in the foreground: it stays visible until they are gone.

        Args:
            resource: that is there now.
            kinds: only these.

        Raises:
            Conflict: the resource is not the one that is there.
        """
        ref, uid = Ref.of(resource), resource["metadata"]["uid"]
        left = [obj for obj in self._cache.indexed(str(ref)) if not _owners(obj) & {uid}]
        if not left:
            return Outcome()
        # A cache may be behind: it must not take what belongs to the next life for what the last one left.
        if (await self._kubernetes.get(ref))["metadata"]["uid"] != uid:
            raise Conflict(f"{ref} was made anew")
        return await self._remove(left, kinds, "left by a deleted resource of this name", foreground=True)

    async def _remove(
        self, objects: Iterable[KubeObject], kinds: frozenset[Kind], why: str, *, foreground: bool
    ) -> Outcome:
        outcome = Outcome()
        for obj in objects:
            ref = Ref.of(obj)
            if ref.kind not in kinds or obj["metadata"].get("deletionTimestamp"):
                continue
            propagation = "Foreground" if foreground and ref.kind in _MAKES_PODS else "Background"
            try:
                await self._kubernetes.delete(ref, uid=obj["metadata"]["uid"], propagation=propagation)
                log.info(why, kind=ref.kind.kind, name=ref.name)
            except ApiError as error:
                outcome += failed(obj, error)
            self._cache.forget(obj)
            self._memory.pop(ref, None)
        return outcome

    def forget(self, namespace: str, owner: str) -> None:
        """Drop what is remembered of the children of a resource that is gone."""
        for ref in [ref for ref in self._memory if ref.namespace == namespace and ref.name.startswith(f"{owner}-")]:
            if self._cache.get(ref) is None:
                del self._memory[ref]


def _owners(obj: KubeObject) -> set[str]:
    return {reference["uid"] for reference in obj["metadata"].get("ownerReferences", ())}


def _foreign(live: KubeObject, controller: Mapping[str, str] | None) -> ForeignObject:
    metadata = live["metadata"]
    owner = f"{controller['kind']} {controller['name']}" if controller else "nobody known to this operator"
    return ForeignObject(live["kind"], metadata.get("namespace", ""), metadata["name"], owner)
