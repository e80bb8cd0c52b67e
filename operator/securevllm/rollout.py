"""The life of groups, done: what ``groups.plan`` decides about StatefulSets and pods, and what their pods tell.

Order is safety here too. A pod leaves the gateway's endpoints before anything else is done about its group. The epoch
of a new start is in the sealed ConfigMap before a StatefulSet carries it. Pods of an earlier epoch are deleted when
every StatefulSet of the group carries the new one *and* its controller has seen it: what comes back then belongs to it.
Deletions name the pod's uid; grace periods are the pod's own.

Whether a group is whole is written into its pods as a readiness gate (``pods/status``): a new pod serves nobody until
the operator has seen its group, and one that serves goes on while the operator is down.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import structlog

from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.children import Children, Outcome, failed, pods_of
from securevllm.cluster import STRATEGIC_MERGE_PATCH
from securevllm.errors import ApiError, Conflict, NotFound
from securevllm.groups import (
    NEW_EPOCH,
    Group,
    Judgement,
    Member,
    Pair,
    Plan,
    State,
    Step,
    Workload,
    judge,
    plan,
)
from securevllm.render.engine import CONTAINER
from securevllm.render.meta import EPOCH_LABEL, GROUP_LABEL, MEMBER_LABEL, TEMPLATE_LABEL, WHOLE_CONDITION, Owner
from securevllm.status import Workload as Facts
from securevllm.status import trouble
from securevllm.topology import Role

if TYPE_CHECKING:
    from securevllm.children import Cache
    from securevllm.cluster import Kubernetes
    from securevllm.render import Rendered
    from securevllm.render.accepted import GroupMemory
    from securevllm.render.engine import RenderedGroup

log = structlog.stdlib.get_logger(__name__)

ENGINE = Role.ENGINE.value
"""Component of failures: all groups are engines in the conditions."""

_EVENTS: Mapping[Step, tuple[str, str]] = {
    Step.START: ("GroupStarted", "starts"),
    Step.ROLL: ("GroupRolled", "is replaced: its template is an older one"),
    Step.RESTART: ("GroupRestarted", "starts anew"),
}


# ------------------------------------------------------------------------------------------------------------ reading


def read_member(pod: KubeObject) -> Member:
    """A pod of a group."""
    metadata, status = pod["metadata"], pod.get("status", {})
    conditions = {item["type"]: item for item in status.get("conditions", ())}
    containers: dict[str, Any] = {item["name"]: item for item in status.get("containerStatuses", ())}
    container = containers.get(CONTAINER, {})
    state = container.get("state", {})
    ended = state.get("terminated") or container.get("lastState", {}).get("terminated")
    run = state.get("running") or ended or {}
    ready = conditions.get("Ready", {})
    return Member(
        name=metadata["name"],
        uid=metadata["uid"],
        pair=_pair(metadata.get("labels", {})),
        scheduled=bool(pod["spec"].get("nodeName")),
        started=bool(run or container.get("restartCount")),
        started_at=_unix(run.get("startedAt")),
        # Of the engine alone: a group must not stop serving because nobody can count its requests (metrics sidecar).
        ready=bool(container.get("ready")) and _fit(ready),
        ready_since=_unix(ready.get("lastTransitionTime")) if ready.get("status") == "True" else None,
        gone=_gone(metadata, status, conditions),
        restarted=_restarted(container, ended),
        trouble=trouble([pod]).removeprefix(f"{metadata['name']}: "),
        gate=_holds(conditions, WHOLE_CONDITION),
    )


def read_workload(stateful_set: KubeObject) -> Workload:
    """The StatefulSet of a member."""
    spec, metadata = stateful_set["spec"], stateful_set["metadata"]
    return Workload(
        pair=_pair(spec["template"]["metadata"].get("labels", {})),
        replicas=spec.get("replicas", 1),
        observed=stateful_set.get("status", {}).get("observedGeneration", 0) >= metadata.get("generation", 0),
    )


def _pair(labels: Mapping[str, str]) -> Pair:
    epoch = labels.get(EPOCH_LABEL, "")
    return Pair(labels.get(TEMPLATE_LABEL, ""), int(epoch) if epoch.isascii() and epoch.isdigit() else -1)


def _fit(ready: Mapping[str, str]) -> bool:
    """Whether ``Ready`` says nothing against the pod but that its group is not whole, or another container not ready.

    The node controller sets it to False, and leaves the containers alone, when a node does not answer. Kubelet's
    reasons for a readiness gate and for a container: pkg/kubelet/status/generate.go.
    """
    return ready.get("status") == "True" or ready.get("reason") in {"ReadinessGatesNotReady", "ContainersNotReady"}


def _holds(conditions: Mapping[str, Mapping[str, str]], name: str) -> bool:
    return conditions.get(name, {}).get("status") == "True"


def _gone(metadata: KubeObject, status: KubeObject, conditions: Mapping[str, Mapping[str, str]]) -> str:
    target = conditions.get("DisruptionTarget", {})
    why = target if target.get("status") == "True" else status
    told = ": ".join(filter(None, (why.get("reason"), why.get("message"))))
    known = f" ({told})" if told else ""
    if metadata.get("deletionTimestamp"):
        return f"is being deleted{known}"
    if status.get("phase") in {"Failed", "Succeeded"}:
        return f"has ended{known}"
    return ""


def _restarted(container: Mapping[str, Any], ended: Mapping[str, Any] | None) -> str:
    if not ended:
        return f"its container {CONTAINER} was restarted" if container.get("restartCount") else ""
    reason = ended.get("reason", "Error")
    return f"its container {CONTAINER} ended with exit code {ended.get('exitCode')} ({reason})"


def _unix(time: str | None) -> float | None:
    return datetime.fromisoformat(time).timestamp() if time else None


def _place(labels: Mapping[str, str]) -> tuple[str, int] | None:
    """Group and rank, of a pod's labels or a selector's."""
    group, rank = labels.get(GROUP_LABEL, ""), labels.get(MEMBER_LABEL, "")
    return (group, int(rank)) if group and rank.isascii() and rank.isdigit() else None


def _number(group: str) -> int:
    """Position among the groups of its side; -1 for a name that no group of ours has."""
    return int(group[1:]) if group[1:].isascii() and group[1:].isdigit() else -1


# ------------------------------------------------------------------------------------------------------------- doing

Place = tuple[str, int]
"""Group and rank."""


@dataclass(frozen=True)
class Look:
    """What was found and decided.

    Attributes:
        groups: those that are rendered, in the order in which they start.
        plan: what to do about them.
        workloads: live StatefulSets of the resource.
        pods: live pods of the resource's groups.
        strays: StatefulSets that say they are the resource's and are no member of anything.
    """

    groups: tuple[Judgement, ...]
    plan: Plan
    workloads: Mapping[Place, KubeObject]
    pods: Mapping[Place, KubeObject]
    strays: tuple[KubeObject, ...] = ()

    @property
    def occupied(self) -> frozenset[str]:
        """Groups of which something is there, rendered or not."""
        return frozenset(name for name, _ in (*self.workloads, *self.pods))

    def pause(self, now: float) -> float | None:
        """Seconds until time alone changes something."""
        return None if self.plan.look is None else max(0.0, self.plan.look - now)


class Rollout:
    """Brings groups to what is rendered, one start at a time."""

    def __init__(self, kubernetes: Kubernetes, cache: Cache, children: Children, now: Callable[[], datetime]) -> None:
        self._kubernetes, self._cache, self._children, self._now = kubernetes, cache, children, now

    # ------------------------------------------------------------------------------------------------------- look

    def look(self, owner: Owner, rendered: Rendered, memory: Mapping[str, GroupMemory], startup: float) -> Look:
        """Judge every rendered group.

        Args:
            owner: the resource.
            rendered: with the epochs of ``memory``.
            memory: of the groups, as it was kept last.
            startup: seconds that an engine may take to become ready.
        """
        workloads, ending, strays = self._workloads(owner)
        pods = self._pods(owner)
        now = self._now().timestamp()
        # Of two sides the first of each, then the second: a pair that can serve comes first.
        ordered = sorted(rendered.groups, key=lambda item: _number(item.group.name))
        groups = tuple(judge(_group(item, workloads, ending, pods, memory), now, startup) for item in ordered)
        return Look(groups, plan(groups, now), workloads, pods, tuple(strays))

    def carried(self, owner: Owner) -> dict[str, tuple[str, ...]]:
        """By group: hashes of the templates that its StatefulSets and pods carry, those of StatefulSets first."""
        found: dict[str, list[str]] = {}
        for (name, _), obj in self._workloads(owner)[0].items():
            found.setdefault(name, []).append(read_workload(obj).pair.template)
        for (name, _), pod in self._pods(owner).items():
            found.setdefault(name, []).append(read_member(pod).pair.template)
        return {name: tuple(dict.fromkeys(hashes)) for name, hashes in found.items()}

    def _workloads(self, owner: Owner) -> tuple[dict[Place, KubeObject], dict[Place, KubeObject], list[KubeObject]]:
        """StatefulSets of members, those of them that are being deleted, and those that only say they are of it."""
        workloads: dict[Place, KubeObject] = {}
        ending: dict[Place, KubeObject] = {}
        strays = []
        for obj in self._cache.indexed(owner.uid):
            if obj["kind"] == kinds.STATEFUL_SET.kind:
                deleted = bool(obj["metadata"].get("deletionTimestamp"))
                # Of the selector: it cannot be changed.
                place = _place(obj["spec"]["selector"].get("matchLabels", {}))
                if place is not None and obj["metadata"]["name"] == _name(owner, place):
                    (ending if deleted else workloads)[place] = obj
                elif not deleted:
                    strays.append(obj)
        return workloads, ending, strays

    def _pods(self, owner: Owner) -> dict[Place, KubeObject]:
        """Pods that a StatefulSet made under the name of a member: not those that only carry its labels."""
        found = {}
        for pod in pods_of(self._cache, owner):
            metadata = pod["metadata"]
            labels = metadata.get("labels", {})
            place = _place(labels)
            if place is None or not owner.group_selector(place[0]).items() <= labels.items():
                continue
            makers = [
                reference["kind"] for reference in metadata.get("ownerReferences", ()) if reference.get("controller")
            ]
            if metadata["name"] == f"{_name(owner, place)}-0" and makers == [kinds.STATEFUL_SET.kind]:
                found[place] = pod
        return found

    # ------------------------------------------------------------------------------------------------------- gates

    async def shut(self, look: Look) -> Outcome:
        """Take pods out of the gateway's endpoints whose group is not whole any more."""
        return await self._gate(look, value=False)

    async def open(self, look: Look) -> Outcome:
        """Let pods serve whose group is whole."""
        return await self._gate(look, value=True)

    async def _gate(self, look: Look, *, value: bool) -> Outcome:
        pods = [
            (pod, item)
            for item in look.groups
            for rank, gate in enumerate(item.gates)
            if gate is value
            and (pod := look.pods.get((item.name, rank))) is not None
            and read_member(pod).gate is not value
            and not pod["metadata"].get("deletionTimestamp")
        ]
        outcomes = await asyncio.gather(*(self._set_gate(pod, item, value=value) for pod, item in pods))
        return sum(outcomes, Outcome())

    async def _set_gate(self, pod: KubeObject, group: Judgement, *, value: bool) -> Outcome:
        condition = {
            "type": WHOLE_CONDITION,
            "status": str(value),
            "reason": "GroupWhole" if value else f"Group{group.state}",
            "message": "" if value else group.message,
            "lastTransitionTime": self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        }
        body = {"metadata": {"uid": pod["metadata"]["uid"]}, "status": {"conditions": [condition]}}
        ref = Ref.of(pod)
        try:
            patched = await self._kubernetes.patch(ref, body, subresource="status", content_type=STRATEGIC_MERGE_PATCH)
        except (NotFound, Conflict):
            self._cache.forget(pod)  # gone, or another pod of its name; the watch tells
        except ApiError as error:
            return failed(pod, error, ENGINE)
        else:
            self._cache.wrote(patched)
        return Outcome()

    # ------------------------------------------------------------------------------------------------------- bring

    async def bring(self, rendered: Rendered, look: Look, uid: str) -> Outcome:
        """Bring the StatefulSets of every group whose turn it is, then end the pods of earlier epochs.

        Args:
            rendered: with the epochs of the plan, which have been persisted.
            look: what was decided.
            uid: of the resource.
        """
        groups = [item for item in rendered.groups if look.plan.steps[item.group.name] is not Step.WAIT]
        workloads = [obj for item in groups for obj in item.workloads]
        # One that waits for its turn stays what it is; a member that is gone is a matter of the plan.
        live = {Ref.of(obj) for obj in look.workloads.values()}
        waiting = [item for item in rendered.former if look.plan.steps[item.group.name] is Step.WAIT]
        workloads += [obj for item in waiting for obj in item.workloads if Ref.of(obj) in live]
        outcome = await self._children.bring(workloads, uid)
        for item in groups:
            outcome += await self._end_old_pods(item, look)
        return outcome

    async def _end_old_pods(self, group: RenderedGroup, look: Look) -> Outcome:
        wanted = Pair(group.template, group.epoch)
        for obj in group.workloads:
            live = self._cache.get(Ref.of(obj))
            if live is None or read_workload(live).pair != wanted or not read_workload(live).observed:
                return Outcome()  # what came back would be of the old kind; the controller's next word wakes us
        old = [
            pod
            for (name, _), pod in look.pods.items()
            if name == group.group.name
            and read_member(pod).pair != wanted
            and not pod["metadata"].get("deletionTimestamp")
        ]
        return sum(await asyncio.gather(*map(self._delete, old)), Outcome())

    async def _delete(self, obj: KubeObject) -> Outcome:
        ref = Ref.of(obj)
        # A StatefulSet stays until its pods are gone. Made anew before that, while the garbage collector's watch is
        # broken, it would keep pods that nobody can end: the collector never heard that it was deleted.
        propagation = "Foreground" if ref.kind == kinds.STATEFUL_SET else "Background"
        try:
            await self._kubernetes.delete(ref, uid=obj["metadata"]["uid"], propagation=propagation)
        except Conflict:
            self._cache.forget(obj)  # another one of its name
        except ApiError as error:
            return failed(obj, error, ENGINE)
        log.info("deleted", kind=obj["kind"], name=ref.name)
        return Outcome()

    async def tell(self, resource: KubeObject, look: Look) -> None:
        """Events about new epochs that have been persisted."""
        for item in look.groups:
            step = look.plan.steps[item.name]
            if step not in NEW_EPOCH or (step is Step.START and item.memory is None):
                continue
            reason, told = _EVENTS[step]
            epoch = look.plan.memory[item.name].epoch
            log.info("group", group=item.name, step=step.value, epoch=epoch, why=item.why)
            await self._kubernetes.post_event(
                resource,
                reason=reason,
                note=f"{item.name} {told} (epoch {epoch}){': ' if item.why else ''}{item.why}",
                action="Reconcile",
                warning=step is Step.RESTART,
            )

    async def prune(self, rendered: Rendered, look: Look) -> Outcome:
        """Delete the StatefulSets that no rendered group has, the highest groups first."""
        wanted = {Ref.of(obj) for obj in (*rendered.workloads, *rendered.withheld)}
        waiting = {name for name, step in look.plan.steps.items() if step is Step.WAIT}
        surplus = [
            (place, obj)
            for place, obj in look.workloads.items()
            # An old group keeps the members that only it has until its turn.
            if Ref.of(obj) not in wanted and place[0] not in waiting
        ]
        outcome = Outcome()
        for _, obj in sorted(surplus, key=lambda item: (-_number(item[0][0]), item[0][1])):
            outcome += await self._delete(obj)
        for obj in look.strays:
            outcome += await self._delete(obj)
        return outcome

    # ------------------------------------------------------------------------------------------------------- facts

    def facts(self, look: Look) -> Facts:
        """All groups, as a workload: one replica is one group."""
        desired = [item for item in look.groups if item.state is not State.SUSPENDED]
        amiss = [item for item in desired if not (item.state is State.WHOLE and item.serving)]
        first = min(amiss, key=lambda item: item.state is not State.BROKEN, default=None)
        told = first.message if first is not None else ""
        if first is not None and first.state is State.BROKEN and first.look is not None:
            told += f" It starts anew at {datetime.fromtimestamp(first.look, UTC).strftime('%Y-%m-%dT%H:%M:%SZ')}."
        return Facts(
            desired=len(desired),
            updated=sum(item.current and item.state is not State.SUSPENDED for item in look.groups),
            ready=len(desired) - len(amiss),
            replicas=len(look.occupied),
            trouble=told,
            broken=first is not None and first.state is State.BROKEN,
            restarting=first is not None and first.memory is not None and first.memory.restarts > 0,
        )


def _name(owner: Owner, place: Place) -> str:
    """Of a member's StatefulSet."""
    return owner.child(f"{place[0]}-{place[1]}")


def _group(
    item: RenderedGroup,
    workloads: Mapping[Place, KubeObject],
    ending: Mapping[Place, KubeObject],
    pods: Mapping[Place, KubeObject],
    memory: Mapping[str, GroupMemory],
) -> Group:
    name, size = item.group.name, len(item.workloads)
    live = max((rank + 1 for group, rank in (*workloads, *pods) if group == name), default=0)
    places = [(name, rank) for rank in range(max(size, live))]
    return Group(
        name=name,
        template=item.template,
        size=size,
        workloads=tuple(read_workload(workloads[place]) if place in workloads else None for place in places),
        pods=tuple(read_member(pods[place]) if place in pods else None for place in places),
        memory=memory.get(name),
        suspended=all(obj["spec"]["replicas"] == 0 for obj in item.workloads),
        ending=tuple(obj["metadata"]["name"] for (group, _), obj in sorted(ending.items()) if group == name),
    )
