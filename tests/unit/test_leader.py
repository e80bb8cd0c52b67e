from __future__ import annotations

import asyncio
import contextlib
import copy
import re
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta, timezone
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm.cluster import micro_time
from securevllm.errors import AlreadyExists, Conflict, Forbidden, LeadershipLost, NotFound, OperatorError, Unavailable
from securevllm.leader import Elector, LeaseSettings, boot_clock
from tests.virtual_time import run

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject, Ref


@dataclass
class Store:
    """One Lease with the API server's rules on resourceVersion."""

    lease: KubeObject | None = None
    version: int = 0

    def write(self, obj: KubeObject) -> KubeObject:
        self.version += 1
        self.lease = copy.deepcopy(obj)
        self.lease["metadata"]["resourceVersion"] = str(self.version)
        return copy.deepcopy(self.lease)


@dataclass
class Link:
    """One candidate's connection to the store; it can be slow, or lose requests or answers."""

    store: Store
    delay: float = 0.01
    broken: bool = False
    answers_lost: bool = False
    forbidden: bool = False
    calls: list[str] = field(default_factory=list)

    async def _pass(self, call: str) -> None:
        self.calls.append(call)
        await asyncio.sleep(self.delay)
        if self.forbidden:
            raise Forbidden("leases is forbidden", status=403, reason="Forbidden")
        if self.broken:
            raise Unavailable("no route")

    async def _answer(self, obj: KubeObject) -> KubeObject:
        await asyncio.sleep(self.delay)
        if self.answers_lost:
            raise Unavailable("connection reset")
        return obj

    async def get(self, ref: Ref) -> KubeObject:
        assert (ref.namespace, ref.name) == ("system", "operator")
        await self._pass("get")
        if self.store.lease is None:
            raise NotFound("no lease", status=404)
        return await self._answer(copy.deepcopy(self.store.lease))

    async def create(self, obj: KubeObject) -> KubeObject:
        await self._pass("create")
        if self.store.lease is not None:
            raise AlreadyExists("there is one", status=409)
        return await self._answer(self.store.write(obj))

    async def replace(self, obj: KubeObject) -> KubeObject:
        await self._pass("replace")
        if self.store.lease is None:
            raise NotFound("no lease", status=404)
        if self.store.lease["metadata"]["resourceVersion"] != obj["metadata"]["resourceVersion"]:
            raise Conflict("changed", status=409)
        return await self._answer(self.store.write(obj))


def time() -> float:
    return asyncio.get_running_loop().time()


def elector(link: Link, identity: str, lost: list[str] | None = None) -> Elector:
    return Elector(
        link,
        LeaseSettings("system", "operator", identity),
        on_lost=lambda: lost.append(identity) if lost is not None else None,
        clock=time,
        now=lambda: datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=time() - 1000.0),
        jitter=lambda: 1.0,
    )


async def lead(candidate: Elector) -> None:
    await candidate.acquire()
    await candidate.renew()


def test_the_first_candidate_creates_the_lease() -> None:
    async def main() -> KubeObject | None:
        store = Store()
        first = elector(Link(store), "a")
        assert not first.may_write()
        await first.acquire()
        assert first.is_leader
        assert first.may_write()
        return store.lease

    lease = run(main())

    assert lease is not None
    assert lease["metadata"]["name"] == "operator"
    assert lease["spec"] == {
        "holderIdentity": "a",
        "leaseDurationSeconds": 15,
        "acquireTime": "2026-01-01T00:00:00.010000Z",
        "renewTime": "2026-01-01T00:00:00.010000Z",
        "leaseTransitions": 0,
    }


def test_renewing_sends_one_request_and_keeps_what_others_wrote_into_the_lease() -> None:
    async def main() -> tuple[list[str], KubeObject | None]:
        store, link = Store(), None
        link = Link(store)
        leader = elector(link, "a")
        await leader.acquire()
        assert store.lease is not None
        store.write(store.lease | {"metadata": store.lease["metadata"] | {"labels": {"team": "x"}}})
        renewing = asyncio.create_task(leader.renew())
        await asyncio.sleep(20.0)
        assert leader.may_write()
        renewing.cancel()
        return link.calls, store.lease

    calls, lease = run(main())

    # The label costs one conflict and one look; all other renewals are a single PUT.
    assert calls[:5] == ["get", "create", "replace", "get", "replace"]
    assert set(calls[5:]) == {"replace"}
    assert lease is not None
    assert lease["metadata"]["labels"] == {"team": "x"}
    assert lease["spec"]["leaseTransitions"] == 0


def test_a_standby_takes_over_when_the_leader_dies_and_not_before() -> None:
    async def main() -> tuple[float, Store]:
        store = Store()
        leader, standby = elector(Link(store), "a"), elector(Link(store), "b")
        await leader.acquire()
        leading = asyncio.create_task(leader.renew())
        waiting = asyncio.create_task(standby.acquire())
        await asyncio.sleep(60.0)
        assert not waiting.done()
        assert standby.unreadable() is None
        leading.cancel()
        died = time()
        await waiting
        assert not leader.may_write()
        return time() - died, store

    took, store = run(main())

    assert 13.0 <= took <= 15.0 + 2 * 2.0
    assert store.lease is not None
    assert store.lease["spec"]["holderIdentity"] == "b"
    assert store.lease["spec"]["leaseTransitions"] == 1


def test_a_released_lease_is_taken_at_the_next_look() -> None:
    async def main() -> float:
        store = Store()
        leader, standby = elector(Link(store), "a"), elector(Link(store), "b")
        await leader.acquire()
        waiting = asyncio.create_task(standby.acquire())
        await asyncio.sleep(5.0)
        await leader.release()
        assert not leader.may_write()
        released = time()
        await waiting
        return time() - released

    assert run(main()) <= 2.1


def test_clock_skew_of_the_holder_does_not_matter() -> None:
    async def main() -> float:
        store = Store()
        ancient = {"holderIdentity": "a", "leaseDurationSeconds": 15, "renewTime": "1999-01-01T00:00:00.000000Z"}
        store.write({"metadata": {"name": "operator"}, "spec": ancient})
        started = time()
        await elector(Link(store), "b").acquire()
        return time() - started

    assert run(main()) >= 15.0


def test_a_leader_that_cannot_renew_stops_writing_at_the_deadline_and_says_so() -> None:
    lost: list[str] = []

    async def main() -> tuple[float, str]:
        link = Link(Store())
        leader = elector(link, "a", lost)
        await leader.acquire()
        acquired = time()
        link.broken = True
        with pytest.raises(LeadershipLost) as caught:
            await leader.renew()
        assert not leader.may_write()
        return time() - acquired, str(caught.value)

    took, message = run(main())

    assert took == pytest.approx(10.0, abs=0.1)
    assert message == "Lease system/operator could not be renewed: no route"
    assert lost == ["a"]


def test_a_hanging_api_server_does_not_hold_the_leader_beyond_its_deadline() -> None:
    async def main() -> float:
        link = Link(Store())
        leader = elector(link, "a")
        await leader.acquire()
        acquired = time()
        link.delay = 1000.0
        with pytest.raises(LeadershipLost):
            await leader.renew()
        return time() - acquired

    assert run(main()) == pytest.approx(10.0, abs=0.1)


@pytest.mark.parametrize(
    ("holder", "message"),
    [("b", "Lease system/operator is held by b"), ("", "is held by nobody"), (None, "is held by nobody")],
    ids=["stolen", "emptied", "deleted"],
)
def test_a_lease_that_is_not_ours_any_more_ends_the_leadership(holder: str | None, message: str) -> None:
    lost: list[str] = []

    async def main() -> None:
        store = Store()
        leader = elector(Link(store), "a", lost)
        await leader.acquire()
        assert store.lease is not None
        if holder is None:
            store.lease = None
        else:
            store.write(store.lease | {"spec": {"holderIdentity": holder}})
        async with asyncio.timeout(3.0):
            await leader.renew()

    with pytest.raises(LeadershipLost, match=message):
        run(main())
    assert lost == ["a"]


def test_an_answer_that_gets_lost_is_no_second_leader() -> None:
    async def main() -> None:
        store = Store()
        link = Link(store)
        leader = elector(link, "a")
        await leader.acquire()
        renewing = asyncio.create_task(leader.renew())
        link.answers_lost = True
        await asyncio.sleep(5.0)
        link.answers_lost = False
        await asyncio.sleep(30.0)
        assert not renewing.done()
        assert leader.may_write()
        renewing.cancel()

    run(main())


def test_a_candidate_that_may_not_read_the_lease_says_so_and_asks_again() -> None:
    async def main() -> tuple[str | None, str | None]:
        link = Link(Store(), forbidden=True)
        candidate = elector(link, "a")
        acquiring = asyncio.create_task(candidate.acquire())
        await asyncio.sleep(5.0)
        before = candidate.unreadable()
        link.forbidden = False
        await acquiring
        return before, candidate.unreadable()

    before, after = run(main())

    assert before == "Lease system/operator was not read in the last 15 s: leases is forbidden"
    assert after is None


async def live(electors: list[Elector], links: list[Link], index: int) -> None:
    """Candidate after candidate, as a restarting process would be."""
    for serial in range(1000):
        electors[index] = elector(links[index], f"{'abc'[index]}-{serial}-{time()}")
        with contextlib.suppress(LeadershipLost):
            await lead(electors[index])
        await asyncio.sleep(1.0)


async def at_most_one(electors: list[Elector]) -> None:
    while True:
        assert sum(candidate.may_write() for candidate in electors) <= 1
        await asyncio.sleep(0.05)


FAULTS = st.tuples(
    st.integers(0, 2), st.sampled_from(["broken", "answers_lost", "slow", "fine", "restart"]), st.floats(0.5, 20.0)
)


@given(faults=st.lists(FAULTS, max_size=25))
@settings(max_examples=60, deadline=None)
def test_there_are_never_two_that_may_write(faults: list[tuple[int, str, float]]) -> None:
    async def main() -> None:
        links = [Link(store := Store()), Link(store), Link(store)]
        electors = [elector(link, "none") for link in links]
        lives = [asyncio.create_task(live(electors, links, index)) for index in range(3)]
        watching = asyncio.create_task(at_most_one(electors))
        for index, fault, pause in faults:
            links[index].broken = fault == "broken"
            links[index].answers_lost = fault == "answers_lost"
            links[index].delay = 3.0 if fault == "slow" else 0.01
            if fault == "restart":
                lives[index].cancel()
                lives[index] = asyncio.create_task(live(electors, links, index))
            await asyncio.sleep(pause)
        for link in links:
            link.broken, link.answers_lost, link.delay = False, False, 0.01
        await asyncio.sleep(60.0)

        assert sum(candidate.may_write() for candidate in electors) == 1
        for task in lives:
            task.cancel()
        watching.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await watching

    run(main())


@pytest.mark.parametrize(
    ("changed", "value"),
    [("renew_deadline", 15.0), ("renew_deadline", 6.0), ("retry_period", 0.0), ("lease_duration", 15.5)],
)
def test_durations_that_cannot_work_are_refused(changed: str, value: float) -> None:
    with pytest.raises(OperatorError, match="lease: "):
        LeaseSettings("system", "operator", "a", **{changed: value})


def test_micro_time_is_utc_with_six_digits() -> None:
    moment = datetime(2026, 3, 4, 5, 6, 7, tzinfo=timezone(timedelta(hours=2)))

    assert micro_time(moment) == "2026-03-04T03:06:07.000000Z"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z", micro_time(datetime.now(UTC)))


def test_the_clock_goes_on() -> None:
    assert boot_clock() <= boot_clock()
