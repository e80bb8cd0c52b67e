"""The life of groups: what a group of pods is now, and what has to be done about it. Pure: the time is an argument.

A group is one world of torch.distributed: its processes meet once, at their start, and none of them can join later or
come back alone. So a group starts and ends as one. Each start is an *epoch*, a number that all pods of it carry beside
the hash of their templates; a group is whole when every member has a pod of its epoch, the very pods that formed it,
no engine container restarted since, and all are ready. What broke starts anew as the next epoch, for all members.

``judge`` looks at one group, ``plan`` at all of a resource: it gives the memory to keep (before anything is done, so
that a crash half-way repeats the same step) and which groups are brought to what is rendered. Nothing is forced: pods
of an older epoch are deleted as anybody would, and a member waits for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum

from securevllm.render.accepted import GroupMemory

FIRST_BACKOFF, LONGEST_BACKOFF = 10.0, 300.0
"""Seconds between two starts of a group that breaks again and again: doubled each time, as kubelet does."""

FORGIVEN = 600.0
"""Seconds that a group has to be whole until its breaks are forgotten."""

_LATE = 600.0
"""Seconds beyond the start-up time after which a member that never started is not waited for any more."""


class State(StrEnum):
    """What a group is, whatever is wanted of it."""

    SUSPENDED = "Suspended"
    ABSENT = "Absent"
    STARTING = "Starting"
    SCHEDULED = "Scheduled"
    WHOLE = "Whole"
    BROKEN = "Broken"


class Step(StrEnum):
    """What to do about a group."""

    WAIT = "Wait"
    """Leave it as it is, be it old or not there: its turn comes."""

    KEEP = "Keep"
    """Bring it to what is rendered for its epoch: nothing to do, or the rest of a step that was begun."""

    START = "Start"
    ROLL = "Roll"
    RESTART = "Restart"


NEW_EPOCH = frozenset({Step.START, Step.ROLL, Step.RESTART})


@dataclass(frozen=True, order=True)
class Pair:
    """What all pods of one start of a group carry: the hash of its templates, and its epoch."""

    template: str
    epoch: int


@dataclass(frozen=True)
class Member:
    """A pod of a group.

    Attributes:
        name: of the pod.
        uid: of the pod.
        pair: what it carries.
        scheduled: a node was found for it.
        started: its engine container has run; before, it is pending, pulls images, or waits in the gate.
        started_at: when its engine started, unix seconds by the node's clock; only for long times.
        ready: it is ready, the readiness gate of its group aside.
        ready_since: since when it is ready, its gate included, unix seconds; None: it is not.
        gone: why it will not be back (it is being deleted, or has failed), in words; empty: it lives.
        restarted: what ended its engine container, in words; empty: it still is in its first run.
        trouble: what keeps it from running, in the words of kubelet or scheduler.
        gate: the readiness gate of its group, as it is now.
    """

    name: str
    uid: str
    pair: Pair
    scheduled: bool = False
    started: bool = False
    started_at: float | None = None
    ready: bool = False
    ready_since: float | None = None
    gone: str = ""
    restarted: str = ""
    trouble: str = ""
    gate: bool = False


@dataclass(frozen=True)
class Workload:
    """The StatefulSet of one member.

    Attributes:
        pair: what its template carries.
        replicas: 1, or 0 while suspended.
        observed: its controller has seen this template: a pod that is deleted now comes back with it.
    """

    pair: Pair
    replicas: int = 1
    observed: bool = True


@dataclass(frozen=True)
class Group:
    """A group that the spec asks for, and what is there of it.

    Attributes:
        name: ``e0``.
        template: the hash that is wanted.
        size: members that are wanted.
        workloads: by rank, those beyond the wanted size included; None: it does not exist.
        pods: by rank, as many; None: it does not exist.
        memory: None for a group that never was.
        suspended: no pods are wanted.
        ending: names of its StatefulSets that are being deleted; they are no ``workloads`` any more.
    """

    name: str
    template: str
    size: int
    workloads: tuple[Workload | None, ...]
    pods: tuple[Member | None, ...]
    memory: GroupMemory | None = None
    suspended: bool = False
    ending: tuple[str, ...] = ()


@dataclass(frozen=True)
class Judgement:
    """What a group is.

    Attributes:
        name: ``e0``.
        state: of the pods that are there, of whatever template.
        current: its StatefulSets are, or are about to become, what is wanted.
        message: what is the matter, naming the member; empty for a whole group.
        memory: to keep from now on, whatever is done.
        gates: by rank: whether the *rest* of the group is as it should be; empty: there are none, or nothing is said. A
            pod's own readiness is kubelet's to tell: a head that recovers while the operator is down serves again.
        look: unix seconds at which the time alone changes something: a broken group may start anew, ...
        left: pods and StatefulSets of before that have to end until an absent group can start.
        why: of a broken group, what broke it.
        serving: its pods are ready, their gates included.
    """

    name: str
    state: State
    current: bool
    message: str = ""
    memory: GroupMemory | None = None
    gates: tuple[bool, ...] = ()
    look: float | None = None
    left: tuple[str, ...] = ()
    why: str = ""
    serving: bool = False


@dataclass(frozen=True)
class Plan:
    """What to do about all groups of a resource.

    Attributes:
        steps: by group.
        memory: by group; to be kept before a step is done.
        look: unix seconds of the next look that no event asks for.
    """

    steps: Mapping[str, Step]
    memory: Mapping[str, GroupMemory]
    look: float | None


def backoff(restarts: int) -> float:
    """Seconds between two starts of a group that broke so often in a row; the first restart waits for nothing."""
    return min(LONGEST_BACKOFF, FIRST_BACKOFF * 2.0 ** min(restarts - 1, 9)) if restarts else 0.0


# --------------------------------------------------------------------------------------------------------- one group


def judge(group: Group, now: float, startup: float) -> Judgement:
    """Look at one group.

    Args:
        group: wanted and there.
        now: unix seconds.
        startup: seconds that an engine may take to become ready.
    """
    name, memory = group.name, group.memory or _adopted(group)
    # A StatefulSet of that name cannot be made while the last one ends: an apply would only touch that.
    left = (*(pod.name for pod in group.pods if pod is not None), *(f"StatefulSet {name}" for name in group.ending))
    if group.suspended:
        told = f"{name}: {', '.join(left)} still has to end." if left else ""
        return Judgement(name, State.SUSPENDED, current=True, message=told, memory=_unformed(memory))
    if memory is None or not any(item is not None and item.replicas for item in group.workloads):
        told = f"it starts when {', '.join(left)} has ended" if left else "its turn has not come yet"
        told = f"{name} is not there: {told}."
        return Judgement(name, State.ABSENT, current=False, message=told, memory=memory, left=left)
    return _judge_members(group, memory, now, startup)


def _adopted(group: Group) -> GroupMemory | None:
    """The memory was lost: what is there goes on under its epoch, because a wrong number would restart everything."""
    epochs = [item.pair.epoch for item in group.workloads if item is not None]
    return GroupMemory(max(epochs)) if epochs else None


def _unformed(memory: GroupMemory | None) -> GroupMemory | None:
    return replace(memory, members=()) if memory is not None else None


def _current(group: Group, memory: GroupMemory) -> bool:
    """Whether the StatefulSets are what is wanted, or a step towards it was decided on and not ended."""
    pairs = {item.pair for item in group.workloads if item is not None}
    return Pair(group.template, memory.epoch) in pairs or memory.epoch not in {pair.epoch for pair in pairs}


def _world(group: Group, memory: GroupMemory, *, current: bool) -> tuple[Member | None, ...]:
    """The pods of the present epoch, by rank. An old group is judged by the size that it was formed with."""
    old = sum(item is not None for item in group.workloads)
    size = len(memory.members) or (group.size if current else old)
    return tuple(pod if pod is not None and pod.pair.epoch == memory.epoch else None for pod in group.pods[:size])


def _judge_members(group: Group, memory: GroupMemory, now: float, startup: float) -> Judgement:
    current = _current(group, memory)
    world = _world(group, memory, current=current)
    living = [pod for pod in world if pod is not None and not pod.gone]
    complete = len(living) == len(world)
    lost = _lost(world, memory)
    survivors = [pod for rank, pod in enumerate(world) if pod is not None and rank not in lost]
    why, look = "", None
    # A pod alone waits for nobody: kubelet restarts its container in place, and its StatefulSet makes it again.
    alone = len(world) == 1
    if not alone:
        if any(pod.started for pod in survivors):
            # A replacement cannot join: the world was formed without it, and its gate waits for gates that are gone.
            why = next(iter(lost.values()), "") or _restarted(living, complete=complete)
        if not why and not lost and complete:
            why, look = _stuck(living, now, startup)
        if lost and not why:
            memory = replace(memory, members=())
        if complete and not why and not memory.members:
            memory = replace(memory, members=tuple(pod.uid for pod in living))
    fit = alone or (bool(memory.members) and not why and not any(pod.restarted for pod in living))
    ready = [pod is not None and pod.ready and not pod.gone for pod in world]
    gates = () if alone else tuple(fit and all(ready[:rank] + ready[rank + 1 :]) for rank in range(len(world)))
    judged = Judgement(group.name, State.BROKEN, current, memory=memory, gates=gates, why=why)
    if why:
        # A start in the future is the work of a wrong clock: to wait for it could take months.
        due = memory.since + backoff(memory.restarts) if memory.since <= now else now
        return replace(judged, message=f"{group.name} is broken: {why}.", look=due)
    if fit and all(ready):
        return _whole(judged, memory, living, now)
    state = State.SCHEDULED if complete and all(pod.scheduled for pod in living) else State.STARTING
    return replace(judged, state=state, message=f"{group.name}: {_progress(group, world, memory)}.", look=look)


def _lost(world: Sequence[Member | None], memory: GroupMemory) -> dict[int, str]:
    """Members whose pod is not the one that formed the group, or is not going to stay: rank to reason."""
    if len(memory.members) != len(world):
        return {}
    found = {}
    for rank, (pod, uid) in enumerate(zip(world, memory.members, strict=True)):
        if pod is None:
            found[rank] = f"the pod of member {rank} is gone"
        elif pod.uid != uid:
            found[rank] = f"the pod of member {rank} ({pod.name}) was replaced"
        elif pod.gone:
            found[rank] = f"member {rank} ({pod.name}) {pod.gone}"
    return found


def _restarted(living: Sequence[Member], *, complete: bool) -> str:
    """Which engine container did not stay in its first run, once all of them were started.

    A member that is pending or pulls images makes others give up at their start; they try again in place until it is
    there, because a new epoch would put it at the end of the queue.
    """
    if not complete or not all(pod.started for pod in living):
        return ""
    return next((f"{_told(rank, pod)}: {pod.restarted}" for rank, pod in enumerate(living) if pod.restarted), "")


def _stuck(living: Sequence[Member], now: float, startup: float) -> tuple[str, float | None]:
    """All have a node, some ran for longer than a start may take, and one never started: it waits for them in vain.

    It happens when a pod was replaced while nobody looked, before the group was known to be complete.
    """
    waiting = [(rank, pod) for rank, pod in enumerate(living) if not pod.started]
    started = [pod.started_at for pod in living if pod.started_at is not None]
    if not waiting or not started or not all(pod.scheduled for pod in living):
        return "", None
    limit = min(started) + startup + _LATE
    if now < limit:
        return "", limit
    return f"{_told(*waiting[0])} has not started, long after the others", None


def _whole(judged: Judgement, memory: GroupMemory, pods: Sequence[Member], now: float) -> Judgement:
    """A whole group; after a while its breaks are forgotten."""
    judged = replace(judged, state=State.WHOLE, serving=all(pod.ready_since is not None for pod in pods))
    if not memory.restarts:
        return judged
    since = max(now if pod.ready_since is None else pod.ready_since for pod in pods)
    if now < since + FORGIVEN:
        return replace(judged, look=since + FORGIVEN)
    return replace(judged, memory=replace(memory, restarts=0, why=""))


def _progress(group: Group, world: Sequence[Member | None], memory: GroupMemory) -> str:
    size = len(world)
    again = f" It started anew: {memory.why}" if memory.why else ""
    ready = f"{sum(pod is not None and pod.ready for pod in world)} of {size} members are ready"
    before = [pod.name for pod in group.pods if pod is not None and pod.pair.epoch != memory.epoch]
    if before:
        return f"{ready}; {', '.join(before)} of its last start still has to end.{again}".removesuffix(".")
    for rank, pod in enumerate(world):
        if pod is None:
            told = f"member {rank} has no pod yet (events of its StatefulSet say why when it takes long)"
            return f"{ready}; {told}.{again}".removesuffix(".")
    named = [(rank, pod) for rank, pod in enumerate(world) if pod is not None]
    troubles = (f"{_told(rank, pod)}: {pod.gone or pod.trouble}" for rank, pod in named if pod.gone or pod.trouble)
    late = (
        f"{_told(rank, pod)}: {pod.restarted}, and goes on trying until every member has started"
        for rank, pod in named
        if pod.restarted
    )
    told = next(troubles, "") or next(late, "")
    return f"{ready}{'; ' if told else ''}{told}.{again}".removesuffix(".")


def _told(rank: int, pod: Member) -> str:
    return f"member {rank} ({pod.name})"


# -------------------------------------------------------------------------------------------------------- all groups


def plan(groups: Iterable[Judgement], now: float) -> Plan:
    """What to do, in the order of the groups.

    * A broken group starts anew when its back-off is over, whatever the others do.
    * Without gang scheduling two groups can each take half of what both need, so one group at a time looks for nodes.
    * A group that serves is rolled when all others serve, one at a time; one that does not serve comes first.
    """
    judged = list(groups)
    steps = {item.name: _alone(item, now) for item in judged}
    placing = any(item.current and item.state is State.STARTING for item in judged) or bool(
        NEW_EPOCH & {*steps.values()}
    )
    idle = (
        item for item in judged if not item.current and item.state in {State.ABSENT, State.STARTING, State.SCHEDULED}
    )
    # What exists and does not serve first: it holds nodes for nothing.
    for item in sorted(idle, key=lambda item: item.state is State.ABSENT):
        if placing:
            break
        placing = True
        if item.state is not State.ABSENT:
            steps[item.name] = Step.ROLL
        elif not item.left:
            steps[item.name] = Step.START
    if all(item.serving for item in judged):
        old = next((item for item in judged if not item.current), None)
        if old is not None:
            steps[old.name] = Step.ROLL
    memory = {item.name: _next(item, steps[item.name], now) for item in judged}
    looks = [item.look for item in judged if item.look is not None and steps[item.name] not in NEW_EPOCH]
    kept = {name: value for name, value in memory.items() if value is not None}
    return Plan(steps, kept, min(looks, default=None))


def _alone(item: Judgement, now: float) -> Step:
    """What a group needs whatever the others do."""
    if not item.current:
        # Another template may be the cure: it is tried at once.
        return Step.ROLL if item.state is State.BROKEN else Step.WAIT
    broken = item.state is State.BROKEN and item.look is not None and item.look <= now
    return Step.RESTART if broken else Step.KEEP


def _next(item: Judgement, step: Step, now: float) -> GroupMemory | None:
    """The memory with which a step is done."""
    old = item.memory
    if step not in NEW_EPOCH:
        return old
    if old is None:
        return GroupMemory(since=int(now))
    if step is Step.START and not old.members:
        return old  # no pod of this epoch is left, and it may have been decided on already
    if step is Step.RESTART:
        return GroupMemory(old.epoch + 1, int(now), old.restarts + 1, why=item.why)
    return GroupMemory(old.epoch + 1, int(now))
