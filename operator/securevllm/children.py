"""Bringing children to what was rendered: create, repair, replace, prune; never touch what is somebody else's.

A failing child never hides the others: every method returns what failed instead of stopping at it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import structlog

from securevllm import drift
from securevllm.api import types as api
from securevllm.api.kinds import Kind, KubeObject, Ref
from securevllm.context import FIELD_MANAGER
from securevllm.drift import Action
from securevllm.errors import AlreadyExists, ApiError, Conflict, ForeignObject, LeadershipLost, NotFound, Unavailable
from securevllm.render.meta import HASH_ANNOTATION, MANAGED_BY, Object

if TYPE_CHECKING:
    from securevllm.cluster import Kubernetes

log = structlog.stdlib.get_logger(__name__)

_CONTEST_WINDOW = 600.0
_CONTEST_REPEATS = 5
_CONTEST_PAUSE = 60.0
_CONFLICTS = 4


class Cache(Protocol):
    """Objects as the watches last told (``store.Store``). A hint: a deletion in a watch gap is told late."""

    def get(self, ref: Ref) -> KubeObject | None:
        """The object, or None when it was never seen or is gone."""

    def indexed(self, word: str) -> Sequence[KubeObject]:
        """Objects whose controller is the owner with this uid."""

    def all(self, kind: Kind, namespace: str | None = None) -> Sequence[KubeObject]:
        """Objects of a kind, of one namespace when it is given."""

    def put(self, obj: KubeObject) -> object:
        """Take the answer to an own write, unless a newer state is known."""

    def forget(self, ref: Ref) -> None:
        """What is known of the object is old: the next look goes to the API server."""


@dataclass
class _Memory:
    """What this process knows of one child since it started.

    Attributes:
        settled: ``drift.footprint`` after the last own write.
        applied: ``HASH_ANNOTATION`` of what was written last.
        repairs: when drift was repaired, monotonic seconds.
        pause_until: contested; no repair before.
    """

    settled: str | None = None
    applied: str | None = None
    repairs: deque[float] = field(default_factory=lambda: deque(maxlen=_CONTEST_REPEATS + 1))
    pause_until: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What could not be done, and who interferes.

    Attributes:
        failures: object name to the reason.
        contested: objects that somebody else keeps changing.
        retry: a failure that goes by itself (no answer, conflict, waiting for the garbage collector).
    """

    failures: Mapping[str, str] = field(default_factory=dict)
    contested: tuple[str, ...] = ()
    retry: bool = False


class Children:
    """Applies and prunes children; remembers how they looked after the last own write."""

    def __init__(self, kubernetes: Kubernetes, cache: Cache, monotonic: Callable[[], float]) -> None:
        self._kubernetes, self._cache, self._monotonic = kubernetes, cache, monotonic
        self._memory: dict[Ref, _Memory] = {}

    async def bring(self, objects: Iterable[Object], uid: str | None, *, prefix: str = "") -> Outcome:
        """Make every object what was rendered, side by side.

        Args:
            objects: rendered, with their hash.
            uid: of the owner; None for the shared default-deny.
            prefix: put before the names in ``failures``; empty: the object's component.
        """
        wanted = list(objects)
        results = await asyncio.gather(*(self._bring(obj, uid) for obj in wanted), return_exceptions=True)
        failures: dict[str, str] = {}
        retry = False
        for obj, result in zip(wanted, results, strict=True):
            if result is None:
                continue
            if not isinstance(result, ApiError | ForeignObject):
                raise result  # LeadershipLost, cancellation, or a mistake of ours: nothing may hide it
            component = prefix or f"{obj['metadata']['labels'].get('app.kubernetes.io/component', 'operator')}/"
            failures[f"{component}{obj['kind']} {obj['metadata']['name']}"] = str(result)
            retry = retry or isinstance(result, Unavailable | Conflict)
            log.warning("child not applied", kind=obj["kind"], name=obj["metadata"]["name"], error=str(result))
        now = self._monotonic()
        contested = tuple(
            f"{obj['kind']} {obj['metadata']['name']}"
            for obj in wanted
            if (memory := self._memory.get(Ref.of(obj))) and memory.pause_until > now
        )
        return Outcome(failures, contested, retry)

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
        if live is not None:
            self.check_owner(live, uid)
            action = drift.judge(obj, live, memory.settled)
            if action is not Action.KEEP and memory.pause_until > self._monotonic():
                return
        wanted = obj["metadata"]["annotations"][HASH_ANNOTATION]
        if live is None or action is Action.APPLY:
            drifted = live is not None and memory.applied == wanted
            live = await self._kubernetes.apply(obj)
            self._cache.put(live)
            memory.applied = wanted
            if drifted:
                # Said already: whoever changes the hash itself must not cause a storm either.
                self._note_repair(ref, memory)
            action = drift.judge(obj, live, None)
        if action is Action.KEEP:
            memory.settled = drift.footprint(live)
            memory.applied = wanted
            return
        memory.settled = None
        log.info("drift repaired", kind=ref.kind.kind, name=ref.name, added=[*drift.additions(obj, live)][:5])
        live = await self._kubernetes.replace(drift.replacement(obj, live))
        memory.settled, memory.applied = drift.footprint(live), wanted
        self._cache.put(live)
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
            memory.pause_until = now + _CONTEST_PAUSE
            log.warning("drift contested", kind=ref.kind.kind, name=ref.name, pause=_CONTEST_PAUSE)

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
            if controller is not None or metadata.get("labels", {}).get(MANAGED_BY) != FIELD_MANAGER:
                raise _foreign(live, controller)
            return
        if controller is not None and controller["uid"] == uid:
            return
        if controller is not None and controller["kind"] == api.KIND:
            raise Unavailable(
                f"{live['kind']} {metadata['name']} belongs to a deleted {api.KIND} and is being removed",
                reason="WaitingForGarbageCollection",
            )
        raise _foreign(live, controller)

    async def make(
        self, obj: Object, uid: str, content: Callable[[Mapping[str, str] | None], Awaitable[dict[str, str]]]
    ) -> KubeObject:
        """A Secret whose content is random: live GET, then POST; changed only when its content says so.

        Args:
            obj: without data.
            uid: of the owner.
            content: gives the wanted data (base64), from the current data or None.

        Raises:
            ApiError: it could not be made.
            ForeignObject: the name is taken.
        """
        ref = Ref.of(obj)
        live = self._cache.get(ref) or await self._look(ref)
        if live is None:
            try:
                live = await self._kubernetes.create(obj | {"data": await content(None)})
            except AlreadyExists:
                # Somebody was faster, perhaps ourselves before a crash: what is there counts.
                live = await self._kubernetes.get(ref)
            self._cache.put(live)
        self.check_owner(live, uid)
        wanted = await content(live.get("data", {}))
        if wanted != live.get("data", {}):
            live = await self._kubernetes.replace({**live, "data": wanted})
            self._cache.put(live)
        return live

    async def prune(self, uid: str, keep: set[Ref]) -> Outcome:
        """Delete children of this owner that are no longer rendered."""
        stale = [obj for obj in self._cache.indexed(uid) if Ref.of(obj) not in keep]
        failures = {}
        for obj in stale:
            ref = Ref.of(obj)
            if obj["metadata"].get("deletionTimestamp"):
                continue
            try:
                await self._kubernetes.delete(ref, uid=obj["metadata"]["uid"])
                log.info("pruned", kind=ref.kind.kind, name=ref.name)
            except LeadershipLost:
                raise
            except ApiError as error:
                failures[f"prune/{ref.kind.kind} {ref.name}"] = str(error)
            self._cache.forget(ref)
            self._memory.pop(ref, None)
        return Outcome(failures, retry=bool(failures))

    def forget(self, namespace: str, owner: str) -> None:
        """Drop what is remembered of the children of a resource that is gone."""
        for ref in [ref for ref in self._memory if ref.namespace == namespace and ref.name.startswith(f"{owner}-")]:
            del self._memory[ref]


def _foreign(live: KubeObject, controller: Mapping[str, str] | None) -> ForeignObject:
    metadata = live["metadata"]
    owner = f"{controller['kind']} {controller['name']}" if controller else "nobody known to this operator"
    return ForeignObject(live["kind"], metadata.get("namespace", ""), metadata["name"], owner)
