"""A work queue of keys for level-based reconciliation.

Two parts. `KeySchedule` is the pure rule book: which key may run when. `WorkQueue` runs it with asyncio workers.

Guarantees:
    * one reconcile at a time per key; a key that is added while it runs, runs once more afterwards
    * nothing is lost: after every ``add`` of a key, a reconcile of that key starts
    * duplicates collapse; waiting keys are served in the order in which they became due, a hot key goes to the end
    * a failing key is retried with exponential back-off and jitter, and events cannot make it spin
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import random
from collections import OrderedDict, deque
from collections.abc import Awaitable, Callable, Hashable
from dataclasses import dataclass, field
from typing import Generic, Protocol, TypeVar

import structlog

from securevllm.errors import ApiError, LeadershipLost

K = TypeVar("K", bound=Hashable)

_HEAP_SLACK = 64

log = structlog.stdlib.get_logger(__name__)


@dataclass(frozen=True)
class Backoff:
    """Delay of the n-th retry in seconds: ``base * 2**(n-1)``, at most ``cap``, times a jitter.

    Attributes:
        base: also the shortest time between a failure and a run that an event asks for.
        cap: before jitter.
        jitter: gives the factor; 0.8 to 1.2 keeps keys that failed together from retrying together.
    """

    base: float = 0.5
    cap: float = 300.0
    jitter: Callable[[], float] = lambda: random.uniform(0.8, 1.2)  # noqa: S311 - spreads load, guards nothing

    def delay(self, failures: int) -> float:
        """Seconds to wait after so many failures in a row (at least 1)."""
        # 2**30 is far above any cap; an unbounded exponent would overflow a float after a week of failures.
        return min(self.cap, self.base * 2.0 ** min(failures - 1, 30)) * self.jitter()


@dataclass
class KeySchedule(Generic[K]):
    """When which key may run. Pure: every method takes the time; no key is in two places of ready, running.

    A run supersedes what was scheduled before it started: a level-based reconcile looks at everything and says itself
    when it wants to be called again.
    """

    backoff: Backoff = field(default_factory=Backoff)
    _ready: OrderedDict[K, float] = field(default_factory=OrderedDict)
    _running: dict[K, float] = field(default_factory=dict)
    _dirty: set[K] = field(default_factory=set)
    _due: dict[K, float] = field(default_factory=dict)
    _heap: list[tuple[float, int, K]] = field(default_factory=list)
    _failures: dict[K, int] = field(default_factory=dict)
    _not_before: dict[K, float] = field(default_factory=dict)
    _sequence: itertools.count[int] = field(default_factory=itertools.count)

    def add(self, key: K, now: float, after: float = 0.0) -> None:
        """Ask for a run in `after` seconds; of two times for one key the earlier one counts."""
        when = max(now + after, self._not_before.get(key, now))
        if when > now:
            self._schedule(key, when)
        elif key in self._running:
            self._dirty.add(key)
        elif key not in self._ready:
            self._due.pop(key, None)
            self._ready[key] = now

    def take(self, now: float) -> K | None:
        """The next key to run, now marked as running; None when no key is due."""
        self._promote(now)
        if not self._ready:
            return None
        key, _ = self._ready.popitem(last=False)
        self._running[key] = now
        self._due.pop(key, None)
        return key

    def succeed(self, key: K, now: float, after: float | None) -> None:
        """A run ended well; `after` seconds until the next, None for a key that is gone or needs nothing."""
        self._failures.pop(key, None)
        self._not_before.pop(key, None)
        self._end(key, now, after)

    def fail(self, key: K, now: float) -> float:
        """A run failed; gives the seconds until the retry."""
        failures = self._failures[key] = self._failures.get(key, 0) + 1
        # Without this floor, a reconcile that writes before it fails would wake itself by its own events for ever.
        delay = self.backoff.delay(failures)
        self._not_before[key] = now + min(self.backoff.base, delay)
        self._end(key, now, delay)
        return delay

    def failures(self, key: K) -> int:
        """How often in a row the key failed."""
        return self._failures.get(key, 0)

    def next_due(self) -> float | None:
        """Time of the earliest key that waits for its time."""
        while self._heap and self._due.get(self._heap[0][2]) != self._heap[0][0]:
            heapq.heappop(self._heap)  # moved or superseded since it was pushed
        return self._heap[0][0] if self._heap else None

    def depth(self, now: float) -> int:
        """Keys that are due and not running."""
        self._promote(now)
        return len(self._ready)

    def oldest_age(self, now: float) -> float:
        """Seconds that the first key has been due; 0 when none is."""
        self._promote(now)
        return now - next(iter(self._ready.values())) if self._ready else 0.0

    def longest_run(self, now: float) -> float:
        """Seconds that the longest of the running keys has run; 0 when none runs."""
        return max((now - started for started in self._running.values()), default=0.0)

    @property
    def running(self) -> int:
        """Keys that run now."""
        return len(self._running)

    def _schedule(self, key: K, when: float) -> None:
        if key in self._ready or self._due.get(key, when + 1.0) <= when:
            return
        self._due[key] = when
        heapq.heappush(self._heap, (when, next(self._sequence), key))
        if len(self._heap) > 2 * len(self._due) + _HEAP_SLACK:
            # A hot key leaves one superseded entry per run; they would pile up until their far time comes.
            self._heap = [entry for entry in self._heap if self._due.get(entry[2]) == entry[0]]
            heapq.heapify(self._heap)

    def _promote(self, now: float) -> None:
        while (when := self.next_due()) is not None and when <= now:
            _, _, key = heapq.heappop(self._heap)
            del self._due[key]
            if key in self._running:
                self._dirty.add(key)
            else:
                self._ready[key] = when

    def _end(self, key: K, now: float, after: float | None) -> None:
        del self._running[key]
        if key in self._dirty:
            self._dirty.discard(key)
            self.add(key, now)
        if after is not None:
            self.add(key, now, after)


class Observer(Protocol):
    """What a queue reports, for metrics. Depth and ages are read from the queue instead."""

    def added(self) -> None:
        """A key was added from outside."""

    def retried(self) -> None:
        """A failed key was scheduled again."""

    def finished(self, result: str, seconds: float, reason: str) -> None:
        """A reconcile ended: ``success`` or ``error``, its duration, and the error's reason (empty on success)."""


class WorkQueue(Generic[K]):
    """Runs `reconcile(key)` for the keys that are added.

    `reconcile` gives the seconds until it wants to run again, or None. Any exception is a failure and is retried, but
    for `LeadershipLost`, which ends `run`: the process must stop.

    Args:
        reconcile: called with one key; never twice at once for one key.
        observer: told about additions, retries and results.
        backoff: of failing keys.
    """

    def __init__(
        self,
        reconcile: Callable[[K], Awaitable[float | None]],
        *,
        observer: Observer,
        backoff: Backoff | None = None,
    ) -> None:
        self._reconcile = reconcile
        self._observer = observer
        self._keys: KeySchedule[K] = KeySchedule(backoff or Backoff())
        self._idle: deque[asyncio.Future[None]] = deque()
        self._timer: asyncio.TimerHandle | None = None
        self._closed = False
        self._workers: set[asyncio.Task[None]] = set()
        self._serial = itertools.count(1)

    def add(self, key: K, after: float = 0.0) -> None:
        """Ask for a reconcile of `key` in `after` seconds. To be called in the event loop's thread."""
        if self._closed:
            return
        self._observer.added()
        self._keys.add(key, _now(), after)
        self._dispatch()

    async def run(self, workers: int) -> None:
        """Work until `shutdown`.

        Raises:
            ExceptionGroup: a worker ended by an error that is not the reconcile's, or by `LeadershipLost`.
        """
        async with asyncio.TaskGroup() as group:
            self._workers = {group.create_task(self._work(), name=f"worker {n}") for n in range(workers)}

    async def shutdown(self, deadline: float) -> bool:
        """Take no further key, and let the running ones end; cancel what still runs after `deadline` seconds.

        Returns:
            Whether all of them ended by themselves.
        """
        self._closed = True
        if self._timer is not None:
            self._timer.cancel()
        self._wake(len(self._idle))
        workers = {worker for worker in self._workers if not worker.done()}
        if not workers:
            return True
        _, late = await asyncio.wait(workers, timeout=deadline)
        for worker in late:
            worker.cancel()
        if late:
            await asyncio.wait(late)
        return not late

    def depth(self) -> int:
        """Keys that are due and wait for a worker."""
        return self._keys.depth(_now())

    def oldest_age(self) -> float:
        """Seconds that the longest waiting key has been due."""
        return self._keys.oldest_age(_now())

    def unhealthy(self, longest_run: float = 600.0) -> str | None:
        """Why the workers are not alive, for a liveness check; None when they are."""
        dead = sum(worker.done() for worker in self._workers)
        if not self._workers or dead:
            return f"{len(self._workers) - dead} of {len(self._workers)} workers run"
        if (age := self._keys.longest_run(_now())) > longest_run:
            return f"a reconcile has been running for {age:.0f} s, the limit is {longest_run:.0f} s"
        return None

    async def _work(self) -> None:
        while (key := await self._next()) is not None:
            await self._run_one(key)

    async def _next(self) -> K | None:
        while not self._closed:
            if (key := self._keys.take(_now())) is not None:
                return key
            idle = asyncio.get_running_loop().create_future()
            self._idle.append(idle)
            self._dispatch()
            await idle
        return None

    def _dispatch(self) -> None:
        """Wake one idle worker per due key, and come back when the next key is due."""
        if self._closed:
            return
        now = _now()
        self._wake(self._keys.depth(now))
        if self._timer is not None:
            self._timer.cancel()
        due = self._keys.next_due()
        self._timer = None if due is None else asyncio.get_running_loop().call_at(due, self._dispatch)

    def _wake(self, count: int) -> None:
        while count > 0 and self._idle:
            idle = self._idle.popleft()
            if not idle.done():  # done: its worker was cancelled
                idle.set_result(None)
                count -= 1

    async def _run_one(self, key: K) -> None:
        started = _now()
        with structlog.contextvars.bound_contextvars(key=str(key), reconcile=next(self._serial)):
            try:
                after = await self._reconcile(key)
            except LeadershipLost:
                raise
            except Exception as error:  # any failure of one key is retried, and must not end the others
                delay = self._keys.fail(key, _now())
                self._observer.finished("error", _now() - started, reason_of(error))
                self._observer.retried()
                # The API server's answers say all in their text; a traceback is for errors of our own.
                log.warning(
                    "reconcile failed",
                    error=str(error),
                    reason=reason_of(error),
                    attempt=self._keys.failures(key),
                    retry_in=round(delay, 1),
                    exc_info=None if isinstance(error, ApiError) else error,
                )
            else:
                self._keys.succeed(key, _now(), after)
                self._observer.finished("success", _now() - started, "")
            self._dispatch()


def _now() -> float:
    return asyncio.get_running_loop().time()


def reason_of(error: BaseException) -> str:
    """Short word for metrics: the API's reason, otherwise the name of the exception's class."""
    return (error.reason if isinstance(error, ApiError) else "") or type(error).__name__
