"""What a group is and what is done about it: a table of situations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from securevllm.groups import (
    FORGIVEN,
    Group,
    Judgement,
    Member,
    Pair,
    State,
    Step,
    Workload,
    backoff,
    judge,
    plan,
)
from securevllm.render.accepted import GroupMemory as Memory

T, OLD = "t-new", "t-old"
NOW, STARTUP = 100_000, 3600.0


def member(rank: int, epoch: int = 3, *, template: str = T, uid: str = "", **changed: Any) -> Member:
    """A ready pod."""
    seen = Member(
        name=f"llama-e0-{rank}-0",
        uid=uid or f"uid-{epoch}-{rank}",
        pair=Pair(template, epoch),
        scheduled=True,
        started=True,
        started_at=NOW - 100,
        ready=True,
        ready_since=NOW - 50,
    )
    return replace(seen, **changed)


PENDING: dict[str, Any] = {
    "scheduled": False,
    "started": False,
    "started_at": None,
    "ready": False,
    "ready_since": None,
}
IN_GATE: dict[str, Any] = {"started": False, "started_at": None, "ready": False, "ready_since": None}
LOADING: dict[str, Any] = {"ready": False, "ready_since": None}
FORMED = ("uid-3-0", "uid-3-1")


def group(
    *pods: Member | None,
    members: tuple[str, ...] = FORMED,
    template: str = T,
    epochs: tuple[int, ...] = (3, 3),
    restarts: int = 0,
    since: int = NOW - 1000,
) -> Group:
    """A group of two, by default as its third epoch."""
    return Group(
        name="e0",
        template=T,
        size=2,
        workloads=tuple(Workload(Pair(template, epoch)) for epoch in epochs),
        pods=pods,
        memory=Memory(3, since, restarts, members),
    )


def judged(seen: Group, now: int = NOW) -> Judgement:
    return judge(seen, now, STARTUP)


def step(seen: Group, now: int = NOW) -> Step:
    return plan([judged(seen, now)], now).steps["e0"]


def ending(*pods: Member | None) -> Group:
    """A group whose StatefulSets are being deleted."""
    return replace(group(*pods, members=()), workloads=(None, None), ending=("llama-e0-0", "llama-e0-1"))


@pytest.mark.parametrize(
    ("seen", "state", "done", "words"),
    [
        pytest.param(
            ending(None, None),
            State.ABSENT,
            Step.WAIT,
            "e0 is not there: it starts when StatefulSet llama-e0-0, StatefulSet llama-e0-1 has ended.",
            id="its-statefulsets-end",
        ),
        pytest.param(group(member(0), member(1)), State.WHOLE, Step.KEEP, "", id="whole"),
        pytest.param(group(member(0), member(1), members=()), State.WHOLE, Step.KEEP, "", id="whole-at-the-first-look"),
        pytest.param(
            group(member(0, **LOADING), member(1)), State.SCHEDULED, Step.KEEP, "1 of 2 members are ready", id="loading"
        ),
        pytest.param(
            group(member(0, **IN_GATE), member(1, **PENDING, trouble="Unschedulable: 0/3 nodes"), members=()),
            State.STARTING,
            Step.KEEP,
            "member 1 (llama-e0-1-0): Unschedulable: 0/3 nodes",
            id="one-is-pending",
        ),
        pytest.param(
            group(member(0), None, members=()),
            State.STARTING,
            Step.KEEP,
            "member 1 has no pod yet",
            id="one-has-no-pod",
        ),
        pytest.param(
            group(member(0, restarted="vllm ended with 1", **LOADING), member(1, **PENDING)),
            State.STARTING,
            Step.KEEP,
            "goes on trying until every member has started",
            id="gave-up-while-another-is-pending",
        ),
        pytest.param(
            group(member(0, restarted="vllm ended with 1"), member(1, **IN_GATE)),
            State.SCHEDULED,
            Step.KEEP,
            "",
            id="gave-up-while-another-pulls",
        ),
        pytest.param(
            group(member(0), member(1, restarted="vllm ended with 137 (OOMKilled)")),
            State.BROKEN,
            Step.RESTART,
            "member 1 (llama-e0-1-0): vllm ended with 137 (OOMKilled)",
            id="a-container-restarted",
        ),
        pytest.param(
            group(member(0), member(1, gone="is being deleted (EvictionByEvictionAPI)")),
            State.BROKEN,
            Step.RESTART,
            "member 1 (llama-e0-1-0) is being deleted (EvictionByEvictionAPI)",
            id="evicted",
        ),
        pytest.param(
            group(member(0), member(1, gone="has failed (Evicted)", **LOADING)),
            State.BROKEN,
            Step.RESTART,
            "has failed (Evicted)",
            id="failed",
        ),
        pytest.param(group(member(0), None), State.BROKEN, Step.RESTART, "the pod of member 1 is gone", id="lost"),
        pytest.param(
            group(member(0), member(1, uid="another")),
            State.BROKEN,
            Step.RESTART,
            "the pod of member 1 (llama-e0-1-0) was replaced",
            id="replaced-while-nobody-looked",
        ),
        pytest.param(
            group(member(0, **LOADING), member(1, uid="another", **IN_GATE)),
            State.BROKEN,
            Step.RESTART,
            "was replaced",
            id="replaced-and-waits-in-its-gate-for-gates-that-are-gone",
        ),
        pytest.param(
            group(member(0, **IN_GATE), member(1, uid="another", **PENDING)),
            State.STARTING,
            Step.KEEP,
            "0 of 2",
            id="replaced-before-anybody-started",
        ),
        pytest.param(
            group(member(0), member(1, **IN_GATE), members=()),
            State.SCHEDULED,
            Step.KEEP,
            "1 of 2",
            id="not-started-yet",
        ),
        pytest.param(
            group(member(0, started_at=NOW - STARTUP - 601), member(1, **IN_GATE)),
            State.BROKEN,
            Step.RESTART,
            "member 1 (llama-e0-1-0) has not started, long after the others",
            id="never-starts",
        ),
        pytest.param(
            group(member(0, started_at=NOW - STARTUP - 601), member(1, **PENDING)),
            State.STARTING,
            Step.KEEP,
            "1 of 2",
            id="pending-for-ever-is-no-reason",
        ),
        pytest.param(
            group(member(0), member(1, restarted="ended"), restarts=2, since=NOW - 19),
            State.BROKEN,
            Step.KEEP,
            "ended",
            id="back-off-20-s-not-over",
        ),
        pytest.param(
            group(member(0), member(1, restarted="ended"), restarts=2, since=NOW - 20),
            State.BROKEN,
            Step.RESTART,
            "ended",
            id="back-off-20-s-over",
        ),
        pytest.param(
            group(member(0), member(1, restarted="ended"), restarts=2, since=NOW + 86400),
            State.BROKEN,
            Step.RESTART,
            "ended",
            id="started-tomorrow-by-a-clock-that-was-wrong",
        ),
        pytest.param(
            group(member(0, template=OLD), member(1, template=OLD), template=OLD),
            State.WHOLE,
            Step.ROLL,
            "",
            id="old-template",
        ),
        pytest.param(
            group(member(0, template=OLD, **LOADING), member(1, template=OLD), template=OLD),
            State.SCHEDULED,
            Step.ROLL,
            "1 of 2",
            id="old-and-not-whole",
        ),
        pytest.param(
            group(
                member(0, template=OLD, restarted="ended"), member(1, template=OLD), template=OLD, restarts=9, since=NOW
            ),
            State.BROKEN,
            Step.ROLL,
            "ended",
            id="old-and-broken-waits-for-no-back-off",
        ),
        pytest.param(
            group(member(0, 2), member(1, 2), members=(), epochs=(2, 2)),
            State.STARTING,
            Step.KEEP,
            "llama-e0-0-0, llama-e0-1-0 of its last start still has to end",
            id="decided-and-not-applied",
        ),
        pytest.param(
            group(member(0, 3), member(1, 2), members=(), epochs=(3, 2)),
            State.STARTING,
            Step.KEEP,
            "llama-e0-1-0 of its last start still has to end",
            id="applied-half-way",
        ),
        pytest.param(
            replace(group(None, None), workloads=(None, None)), State.ABSENT, Step.START, "its turn", id="deleted"
        ),
        pytest.param(
            replace(group(member(0, gone="is being deleted"), None), workloads=(None, None)),
            State.ABSENT,
            Step.WAIT,
            "it starts when llama-e0-0-0 has ended",
            id="deleted-and-still-ending",
        ),
        pytest.param(
            replace(group(None, None), workloads=(None, None), memory=None), State.ABSENT, Step.START, "", id="new"
        ),
        pytest.param(
            replace(group(member(0), member(1)), memory=None), State.WHOLE, Step.KEEP, "", id="memory-was-lost"
        ),
        pytest.param(
            replace(group(member(0), member(1)), suspended=True),
            State.SUSPENDED,
            Step.KEEP,
            "llama-e0-0-0, llama-e0-1-0 still has to end",
            id="suspended",
        ),
        pytest.param(
            replace(
                group(None, None),
                workloads=(Workload(Pair(T, 3), replicas=0), Workload(Pair(T, 3), replicas=0)),
                suspended=False,
            ),
            State.ABSENT,
            Step.START,
            "",
            id="resumed",
        ),
    ],
)
def test_a_group(seen: Group, state: State, done: Step, words: str) -> None:
    found = judged(seen)
    assert (found.state, step(seen)) == (state, done), found
    assert words in found.message
    assert (found.message == "") is (state is State.WHOLE)


def test_a_restart_is_a_new_epoch_with_a_reason_and_nobody_has_formed_it_yet() -> None:
    made = plan([judged(group(member(0), None, restarts=1, since=NOW - 60))], NOW)
    assert made.memory["e0"] == Memory(4, NOW, 2, (), "the pod of member 1 is gone")


def test_a_roll_is_a_new_epoch_and_forgets_the_breaks_of_the_old_template() -> None:
    old = group(member(0, template=OLD), member(1, template=OLD), template=OLD, restarts=4)
    assert plan([judged(old)], NOW).memory["e0"] == Memory(4, NOW)


def test_the_pods_that_form_a_group_are_remembered_once_all_of_them_are_there() -> None:
    half = judged(group(member(0, **IN_GATE), None, members=()))
    assert half.memory is not None
    assert half.memory.members == ()
    complete = judged(group(member(0, **IN_GATE), member(1, **PENDING), members=()))
    assert complete.memory is not None
    assert complete.memory.members == FORMED
    ending = judged(group(member(0, **IN_GATE), member(1, gone="is being deleted", **PENDING), members=()))
    assert ending.memory is not None
    assert ending.memory.members == ()


def test_breaks_are_forgotten_after_ten_minutes_as_a_whole() -> None:
    seen = group(member(0, ready_since=NOW), member(1, ready_since=NOW - 5), restarts=3)
    early = judged(seen, NOW + int(FORGIVEN) - 1)
    assert early.look == NOW + FORGIVEN
    assert early.memory is not None
    assert early.memory.restarts == 3
    late = judged(seen, NOW + int(FORGIVEN))
    assert late.memory is not None
    assert late.memory.restarts == 0


def test_the_back_off_doubles_from_ten_seconds_to_five_minutes_and_the_first_restart_waits_for_nothing() -> None:
    assert [backoff(restarts) for restarts in range(8)] == [0, 10, 20, 40, 80, 160, 300, 300]
    assert backoff(5000) == 300


@pytest.mark.parametrize(
    ("pods", "gates"),
    [
        pytest.param((member(0), member(1)), (True, True), id="whole"),
        # Its own readiness is kubelet's: when the operator is down, a head that recovers serves again.
        pytest.param((member(0, **LOADING), member(1)), (True, False), id="the-head-is-not-ready"),
        pytest.param((member(0), member(1, **LOADING)), (False, True), id="the-other-is-not-ready"),
        pytest.param((member(0), member(1, restarted="ended")), (False, False), id="restarted"),
        pytest.param((member(0), member(1, uid="another")), (False, False), id="replaced"),
        pytest.param((member(0), member(1, gone="is being deleted")), (False, False), id="going"),
        pytest.param((member(0), None), (False, False), id="lost"),
    ],
)
def test_a_pod_serves_when_the_rest_of_its_group_is_as_it_should_be(
    pods: tuple[Member | None, ...], gates: tuple[bool, ...]
) -> None:
    assert judged(group(*pods)).gates == gates


def test_a_group_of_one_pod_is_left_to_kubelet_and_its_statefulset() -> None:
    one = replace(group(member(0, restarted="ended")), size=1, workloads=(Workload(Pair(T, 3)),))
    for pod in (member(0, restarted="ended"), member(0, uid="another"), member(0, gone="is being deleted"), None):
        found = judged(replace(one, pods=(pod,)))
        assert found.state is not State.BROKEN
        assert found.gates == ()
        assert found.memory == one.memory


def test_an_old_group_of_another_size_is_judged_by_its_own_size_until_its_turn() -> None:
    old = group(member(0, template=OLD), member(1, template=OLD), template=OLD)
    grows = replace(old, size=3, workloads=(*old.workloads, None), pods=(*old.pods, None))
    assert judged(grows).state is State.WHOLE
    shrinks = replace(old, size=1)
    assert judged(shrinks).state is State.WHOLE
    rolled = replace(grows, memory=plan([judged(grows)], NOW).memory["e0"])
    assert judged(rolled).state is State.STARTING


# ------------------------------------------------------------------------------------------------------- all groups

WHOLE = Judgement("", State.WHOLE, current=True, memory=Memory(3, NOW - 1000, 0, FORMED), serving=True)
OLD_WHOLE = replace(WHOLE, current=False)
ABSENT = Judgement("", State.ABSENT, current=False)
STARTING = replace(WHOLE, state=State.STARTING, serving=False)
SCHEDULED = replace(STARTING, state=State.SCHEDULED)
BROKEN = replace(STARTING, state=State.BROKEN, look=NOW)
WAITS = replace(BROKEN, look=NOW + 7)

K, W, S, R, X = Step.KEEP, Step.WAIT, Step.START, Step.ROLL, Step.RESTART


@pytest.mark.parametrize(
    ("groups", "steps"),
    [
        pytest.param([ABSENT, ABSENT, ABSENT], [S, W, W], id="the-first-starts"),
        pytest.param([STARTING, ABSENT, ABSENT], [K, W, W], id="the-next-waits-for-nodes-of-the-first"),
        pytest.param(
            [SCHEDULED, ABSENT, ABSENT], [K, S, W], id="and-starts-when-the-first-has-them-not-when-it-serves"
        ),
        pytest.param([replace(ABSENT, left=("pod",)), ABSENT], [W, W], id="in-order"),
        pytest.param([OLD_WHOLE, OLD_WHOLE], [R, W], id="one-is-rolled"),
        pytest.param([STARTING, OLD_WHOLE], [K, W], id="the-next-waits"),
        pytest.param([SCHEDULED, OLD_WHOLE], [K, W], id="until-the-first-serves"),
        pytest.param([replace(WHOLE, serving=False), OLD_WHOLE], [K, W], id="and-not-a-moment-earlier"),
        pytest.param([WHOLE, OLD_WHOLE], [K, R], id="then-comes-its-turn"),
        pytest.param([OLD_WHOLE, replace(SCHEDULED, current=False)], [W, R], id="what-does-not-serve-first"),
        pytest.param([OLD_WHOLE, ABSENT], [W, S], id="what-is-not-there-first"),
        pytest.param([OLD_WHOLE, BROKEN], [W, X], id="nothing-is-rolled-while-another-is-broken"),
        pytest.param([BROKEN, BROKEN, STARTING], [X, X, K], id="what-broke-starts-anew-whatever-the-others-do"),
        pytest.param([WAITS, WHOLE], [K, K], id="back-off"),
        pytest.param([STARTING, replace(BROKEN, current=False)], [K, R], id="broken-and-old"),
        pytest.param([replace(STARTING, current=False)] * 2, [R, W], id="not-whole-and-old-one-by-one"),
    ],
)
def test_all_groups(groups: list[Judgement], steps: list[Step]) -> None:
    named = [replace(item, name=f"e{number}") for number, item in enumerate(groups)]
    assert [*plan(named, NOW).steps.values()] == steps


def test_the_next_look_is_at_the_earliest_time_that_matters() -> None:
    assert plan([replace(WAITS, name="e0"), replace(WAITS, name="e1", look=NOW + 3)], NOW).look == NOW + 3
    assert plan([replace(BROKEN, name="e0")], NOW).look is None
