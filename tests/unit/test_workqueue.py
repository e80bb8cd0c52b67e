from __future__ import annotations

import asyncio
from collections import Counter
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from structlog.contextvars import get_contextvars

from securevllm.errors import Forbidden, LeadershipLost
from securevllm.workqueue import Backoff, KeySchedule, WorkQueue, reason_of
from tests.virtual_time import run

EXACT = Backoff(base=0.5, cap=300.0, jitter=lambda: 1.0)
KEYS = st.sampled_from("abcd")


class Schedule(RuleBasedStateMachine):
    """Any interleaving of additions, time, workers and results keeps the queue's promises."""

    def __init__(self) -> None:
        super().__init__()
        self.schedule: KeySchedule[str] = KeySchedule(EXACT)
        self.now = 0.0
        self.running: set[str] = set()
        self.owed: dict[str, float] = {}  # key -> by when a run must have been possible

    @rule(key=KEYS, after=st.sampled_from([0.0, 0.0, 0.2, 5.0]))
    def add(self, key: str, after: float) -> None:
        self.schedule.add(key, self.now, after)
        # A failing key is held back for at most `base` seconds.
        self.owed[key] = min(self.owed.get(key, float("inf")), self.now + max(after, EXACT.base))

    @rule(seconds=st.sampled_from([0.1, 1.0, 400.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @rule()
    def take(self) -> None:
        key = self.schedule.take(self.now)
        if key is not None:
            assert key not in self.running
            self.running.add(key)
            self.owed.pop(key, None)

    @precondition(lambda self: self.running)
    @rule(data=st.data(), after=st.sampled_from([None, 2.0]))
    def succeed(self, data: st.DataObject, after: float | None) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(key)
        self.schedule.succeed(key, self.now, after)
        if after is not None:
            self.owed[key] = min(self.owed.get(key, float("inf")), self.now + after)

    @precondition(lambda self: self.running)
    @rule(data=st.data())
    def fail(self, data: st.DataObject) -> None:
        key = data.draw(st.sampled_from(sorted(self.running)))
        self.running.discard(key)
        delay = self.schedule.fail(key, self.now)
        assert 0 < delay <= EXACT.cap
        # What was asked for while it ran may be held back, but never longer than `base`.
        wanted = self.now + delay if key not in self.owed else max(self.owed[key], self.now + EXACT.base)
        self.owed[key] = min(wanted, self.now + delay)

    @invariant()
    def nothing_is_lost(self) -> None:
        late = {key for key, when in self.owed.items() if when <= self.now and key not in self.running}
        waiting = set()
        probe: KeySchedule[str] = KeySchedule(EXACT)
        probe.__dict__.update(
            {name: value.copy() for name, value in vars(self.schedule).items() if hasattr(value, "copy")}
        )
        while (key := probe.take(self.now)) is not None:
            waiting.add(key)

        assert late <= waiting
        assert self.schedule.running == len(self.running)


TestSchedule = Schedule.TestCase
TestSchedule.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)


def test_duplicates_collapse_while_they_wait() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    for _ in range(5):
        schedule.add("a", 0.0)

    assert schedule.depth(0.0) == 1
    assert schedule.take(0.0) == "a"
    assert schedule.take(0.0) is None


def test_a_key_added_while_it_runs_runs_exactly_once_more() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    schedule.add("a", 0.0)
    schedule.take(0.0)
    schedule.add("a", 0.1)
    schedule.add("a", 0.2)

    assert schedule.take(0.3) is None
    schedule.succeed("a", 0.4, None)
    assert schedule.take(0.4) == "a"
    schedule.succeed("a", 0.5, None)
    assert schedule.take(1000.0) is None


def test_a_time_that_comes_while_the_key_runs_is_not_lost() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    schedule.add("a", 0.0)
    schedule.take(0.0)
    schedule.add("a", 0.0, after=1.0)
    assert schedule.take(2.0) is None
    schedule.succeed("a", 3.0, None)

    assert schedule.take(3.0) == "a"


def test_a_hot_key_goes_to_the_end() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    for key in "abc":
        schedule.add(key, 0.0)
    order = []
    for step in range(6):
        taken = schedule.take(float(step))
        assert taken is not None
        order.append(taken)
        schedule.add("a", float(step))  # "a" never stops asking
        schedule.succeed(taken, float(step), None)

    assert order[:3] == ["a", "b", "c"]


def test_of_two_times_the_earlier_one_counts() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    schedule.add("a", 0.0, after=10.0)
    schedule.add("a", 0.0, after=3.0)
    schedule.add("a", 0.0, after=20.0)

    assert schedule.next_due() == 3.0
    assert schedule.take(2.9) is None
    assert schedule.take(3.0) == "a"
    assert schedule.next_due() is None


def test_backoff_doubles_and_is_capped() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    delays = []
    now = 0.0
    for _ in range(12):
        schedule.add("a", now, after=301.0)
        now += 301.0
        assert schedule.take(now) == "a"
        delays.append(schedule.fail("a", now))

    assert delays[:4] == [0.5, 1.0, 2.0, 4.0]
    assert delays[-1] == 300.0
    assert schedule.failures("a") == 12


@given(failures=st.integers(1, 10_000))
def test_backoff_with_jitter_stays_in_its_bounds(failures: int) -> None:
    delay = Backoff().delay(failures)

    assert 0.4 <= delay <= 360.0


def test_success_forgets_the_failures_of_a_key_that_is_gone() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    schedule.add("a", 0.0)
    schedule.take(0.0)
    schedule.fail("a", 0.0)
    assert schedule.take(1.0) == "a"
    schedule.succeed("a", 1.0, None)

    assert schedule.failures("a") == 0
    leftovers = [name for name, value in vars(schedule).items() if isinstance(value, dict | set) and value]
    assert leftovers == []


def test_events_cannot_make_a_failing_key_spin() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    runs = 0
    now = 0.0
    schedule.add("a", now)
    while now < 60.0:
        if schedule.take(now) == "a":
            runs += 1
            schedule.add("a", now)  # its own write comes back as an event
            schedule.fail("a", now)
        schedule.add("a", now)
        now = round(now + 0.1, 1)

    assert runs <= 60.0 / EXACT.base + 1


def test_superseded_times_do_not_pile_up() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    for step in range(10_000):
        schedule.add("a", step * 0.01)
        assert schedule.take(step * 0.01) == "a"
        schedule.succeed("a", step * 0.01, 600.0)

    assert len(schedule._heap) < 200


def test_ages_count_from_the_time_a_key_was_due() -> None:
    schedule: KeySchedule[str] = KeySchedule(EXACT)
    schedule.add("a", 0.0, after=5.0)

    assert schedule.oldest_age(4.0) == 0.0
    assert schedule.oldest_age(8.0) == 3.0
    schedule.take(8.0)
    assert schedule.oldest_age(9.0) == 0.0
    assert schedule.longest_run(10.0) == 2.0


@dataclass
class Seen:
    """An observer that counts."""

    adds: int = 0
    retries: int = 0
    seconds: float = 0.0
    results: Counter[str] = field(default_factory=Counter)

    def added(self) -> None:
        self.adds += 1

    def retried(self) -> None:
        self.retries += 1

    def finished(self, result: str, seconds: float, reason: str) -> None:
        self.results[f"{result} {reason}".strip()] += 1
        self.seconds += seconds


def test_workers_never_run_one_key_twice_at_once_and_lose_nothing() -> None:
    seen = Seen()
    active: Counter[str] = Counter()
    done: Counter[str] = Counter()
    peak = 0

    async def reconcile(key: str) -> None:
        nonlocal peak
        active[key] += 1
        assert active[key] == 1
        peak = max(peak, sum(active.values()))
        await asyncio.sleep(0.5)
        active[key] -= 1
        done[key] += 1

    async def main() -> None:
        queue = WorkQueue(reconcile, observer=seen, backoff=EXACT)
        runner = asyncio.create_task(queue.run(4))
        for step in range(50):
            queue.add(f"key-{step % 7}")
            await asyncio.sleep(0.05)
        await asyncio.sleep(10.0)
        assert queue.depth() == 0
        assert queue.unhealthy() is None
        assert await queue.shutdown(5.0)
        await runner

    run(main())

    assert set(done) == {f"key-{n}" for n in range(7)}
    assert seen.adds == 50
    assert sum(done.values()) < 50
    assert peak == 4
    assert seen.results == {"success": sum(done.values())}
    assert seen.seconds == pytest.approx(0.5 * sum(done.values()))


def test_a_failing_key_is_retried_and_does_not_stop_the_others() -> None:
    seen = Seen()
    times: list[float] = []

    async def reconcile(key: str) -> None:
        if key == "bad":
            times.append(asyncio.get_running_loop().time())
            raise Forbidden("no", status=403, reason="Forbidden")

    async def main() -> None:
        queue = WorkQueue(reconcile, observer=seen, backoff=EXACT)
        runner = asyncio.create_task(queue.run(2))
        queue.add("bad")
        queue.add("good")
        await asyncio.sleep(4.0)
        await queue.shutdown(1.0)
        await runner

    run(main())

    assert [round(time - times[0], 3) for time in times] == [0.0, 0.5, 1.5, 3.5]
    assert seen.results == {"success": 1, "error Forbidden": 4}
    assert seen.retries == 4


def test_requeue_after_is_kept_and_an_event_runs_at_once() -> None:
    times: list[float] = []

    async def reconcile(key: str) -> float:
        times.append(asyncio.get_running_loop().time())
        return 600.0

    async def main() -> None:
        queue = WorkQueue(reconcile, observer=Seen(), backoff=EXACT)
        runner = asyncio.create_task(queue.run(1))
        queue.add("a")
        await asyncio.sleep(700.0)
        queue.add("a")
        await asyncio.sleep(599.0)
        await queue.shutdown(1.0)
        await runner

    run(main())

    assert [time - times[0] for time in times] == [0.0, 600.0, 700.0]


def test_lost_leadership_ends_the_workers() -> None:
    async def reconcile(key: str) -> None:
        raise LeadershipLost("the renew deadline has passed")

    async def main() -> None:
        queue = WorkQueue(reconcile, observer=Seen())
        queue.add("a")
        await queue.run(3)

    with pytest.raises(ExceptionGroup) as caught:
        run(main())
    assert caught.value.subgroup(LeadershipLost) is not None


@pytest.mark.parametrize(("deadline", "ended"), [(5.0, True), (0.5, False)])
def test_shutdown_waits_for_the_running_ones_and_takes_no_new_key(deadline: float, ended: bool) -> None:
    started: list[str] = []
    finished: list[str] = []

    async def reconcile(key: str) -> None:
        started.append(key)
        await asyncio.sleep(2.0)
        finished.append(key)

    async def main() -> bool:
        queue = WorkQueue(reconcile, observer=Seen())
        runner = asyncio.create_task(queue.run(1))
        queue.add("a")
        queue.add("b")
        await asyncio.sleep(1.0)
        result = await queue.shutdown(deadline)
        queue.add("c")
        await asyncio.wait([runner])
        return result

    assert run(main()) is ended
    assert started == ["a"]
    assert finished == (["a"] if ended else [])


def test_a_stuck_reconcile_and_missing_workers_are_unhealthy() -> None:
    async def reconcile(key: str) -> None:
        await asyncio.sleep(10_000.0)

    async def main() -> tuple[str | None, str | None, str | None]:
        queue = WorkQueue(reconcile, observer=Seen())
        before = queue.unhealthy()
        runner = asyncio.create_task(queue.run(1))
        queue.add("a")
        await asyncio.sleep(1.0)
        early = queue.unhealthy()
        await asyncio.sleep(700.0)
        late = queue.unhealthy()
        await queue.shutdown(0.0)
        await asyncio.wait([runner])
        return before, early, late

    before, early, late = run(main())

    assert before == "0 of 0 workers run"
    assert early is None
    assert late == "a reconcile has been running for 701 s, the limit is 600 s"


def test_the_log_context_names_key_and_run() -> None:
    contexts: list[dict[str, object]] = []

    async def reconcile(key: str) -> None:
        contexts.append(dict(get_contextvars()))

    async def main() -> None:
        queue = WorkQueue(reconcile, observer=Seen())
        runner = asyncio.create_task(queue.run(1))
        queue.add("default/llama")
        await asyncio.sleep(1.0)
        await queue.shutdown(1.0)
        await runner

    run(main())

    assert contexts == [{"key": "default/llama", "reconcile": 1}]


def test_reasons_are_short_words() -> None:
    assert reason_of(Forbidden("long text", reason="Forbidden")) == "Forbidden"
    assert reason_of(Forbidden("long text")) == "Forbidden"
    assert reason_of(KeyError("x")) == "KeyError"
