"""Leader election by a Lease (coordination.k8s.io/v1).

    elector = Elector(client, LeaseSettings(namespace, name, identity))
    await elector.acquire()            # returns as the leader
    await elector.renew()              # for ever; raises LeadershipLost

A Lease does not fence: it only says who should act. Hence `may_write`, which the client asks before every write, and
which turns False by itself at the renew deadline, before anybody else may take the Lease over.

Guarantees:
    * every change of the Lease is a PUT with resourceVersion or a POST: of two candidates one is refused
    * clocks of other machines do not matter: a Lease has expired when it did not change for its duration, measured
      by the own monotonic clock
    * no request is awaited beyond the renew deadline
"""

from __future__ import annotations

import asyncio
import copy
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import structlog

from securevllm.api.kinds import LEASE, KubeObject, Ref
from securevllm.cluster import micro_time
from securevllm.errors import AlreadyExists, ApiError, Conflict, LeadershipLost, NotFound, OperatorError

log = structlog.stdlib.get_logger(__name__)


class LeaseClient(Protocol):
    """The part of `Kubernetes` that an elector needs. Its fence must be open: renewing is what keeps the other shut."""

    async def get(self, ref: Ref) -> KubeObject:
        """Read the Lease."""

    async def create(self, obj: KubeObject) -> KubeObject:
        """POST the Lease."""

    async def replace(self, obj: KubeObject) -> KubeObject:
        """PUT the Lease with its resourceVersion."""


@dataclass(frozen=True)
class LeaseSettings:
    """Which Lease, and how long things take, in seconds.

    Attributes:
        namespace: of the Lease.
        name: of the Lease.
        identity: of this process, unique: two processes with one identity would both be the leader.
        lease_duration: how long others wait for a sign of life.
        renew_deadline: how long the leader may act after its last sign of life.
        retry_period: between two attempts.
        request_timeout: of one request to the API server.
    """

    namespace: str
    name: str
    identity: str
    lease_duration: float = 15.0
    renew_deadline: float = 10.0
    retry_period: float = 2.0
    request_timeout: float = 4.0

    def __post_init__(self) -> None:
        """Refuse durations with which two leaders could act, or none could renew."""
        order = (self.lease_duration, self.renew_deadline, self.request_timeout + self.retry_period, self.retry_period)
        if not all(longer > shorter for longer, shorter in zip(order, (*order[1:], 0.0), strict=True)):
            raise OperatorError(
                "lease: wanted lease_duration > renew_deadline > request_timeout + retry_period > retry_period > 0, "
                f"got {self.lease_duration:g}, {self.renew_deadline:g}, {self.request_timeout:g} + "
                f"{self.retry_period:g} s"
            )
        if self.lease_duration != int(self.lease_duration):
            raise OperatorError(f"lease: leaseDurationSeconds is a whole number, got {self.lease_duration:g}")


def boot_clock() -> float:
    """Monotonic seconds that go on while the machine is suspended; a leader that wakes up late must know it."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)


class Elector:
    """One candidate for one Lease.

    Args:
        client: with an open fence, own connections, and a timeout of about `request_timeout`.
        settings: which Lease, and the durations.
        on_lost: called once, at once, when leadership is lost; the process should be made to end here, also if some
            task does not react to being cancelled.
        clock: monotonic seconds.
        now: wall clock, only written into the Lease for people.
        jitter: factor for the pauses of a candidate, so that several do not ask in step.
    """

    def __init__(
        self,
        client: LeaseClient,
        settings: LeaseSettings,
        *,
        on_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = boot_clock,
        now: Callable[[], datetime] = lambda: datetime.now(UTC),
        jitter: Callable[[], float] = lambda: random.uniform(1.0, 1.2),  # noqa: S311 - spreads load, guards nothing
    ) -> None:
        self._client = client
        self._settings = settings
        self._ref = Ref(LEASE, settings.namespace, settings.name)
        self._on_lost = on_lost
        self._clock = clock
        self._now = now
        self._jitter = jitter
        self._lease: KubeObject | None = None
        self._observed_at = clock()
        self._read_at: float | None = None
        self._problem = "not read yet"
        self._write_until: float | None = None

    @property
    def is_leader(self) -> bool:
        """Whether the Lease was ours at the last look. Not a licence to write: that is `may_write`."""
        return self._write_until is not None

    @property
    def holder(self) -> str:
        """Identity of the holder that was seen last; empty when there is none."""
        return _spec(self._lease).get("holderIdentity") or ""

    def may_write(self) -> bool:
        """Whether a write may start now: we are the leader and the renew deadline has not passed."""
        return self._write_until is not None and self._clock() < self._write_until

    def unreadable(self) -> str | None:
        """Why a standby is not ready: it cannot read the Lease. None when it can."""
        limit = self._settings.lease_duration
        if self._read_at is not None and self._clock() - self._read_at <= limit:
            return None
        return f"{self._ref} was not read in the last {limit:.0f} s: {self._problem}"

    async def acquire(self) -> None:
        """Wait until the Lease is ours. An API server that does not answer, or forbids, is asked again."""
        while True:
            if await self._attempt():
                log.info("became the leader", lease=str(self._ref), identity=self._settings.identity)
                return
            await asyncio.sleep(self._settings.retry_period * self._jitter())

    async def renew(self) -> None:
        """Renew for ever.

        Raises:
            LeadershipLost: the Lease is not ours any more, or the renew deadline has passed.
        """
        while True:
            await asyncio.sleep(min(self._settings.retry_period, self._remaining()))
            if self.may_write() and await self._attempt():
                continue
            # Emptied or deleted counts as lost: any candidate may take it at once.
            if self.holder != self._settings.identity:
                self._lose(f"{self._ref} is held by {self.holder or 'nobody'}")
            if not self.may_write():
                self._lose(f"{self._ref} could not be renewed: {self._problem}")

    async def release(self) -> None:
        """Hand the Lease over, so that a standby need not wait. After all work has ended; never raises."""
        lease, was_leader = self._lease, self.may_write()
        self._write_until = None
        if lease is None or not was_leader:
            return
        spec = _spec(lease) | {"holderIdentity": "", "leaseDurationSeconds": 1, "renewTime": micro_time(self._now())}
        try:
            async with asyncio.timeout(self._settings.request_timeout):
                await self._client.replace(lease | {"spec": spec})
        except (ApiError, TimeoutError) as error:
            log.warning("lease not released", lease=str(self._ref), error=str(error))

    def _lose(self, why: str) -> None:
        self._write_until = None
        self._on_lost()
        raise LeadershipLost(why)

    async def _attempt(self) -> bool:
        """Try once to take or renew the Lease; whether it is ours now."""
        started = self._clock()
        # A leader does not wait beyond its deadline: what comes later is of no use to it.
        timeout = self._settings.request_timeout
        if self._write_until is not None:
            timeout = min(timeout, self._remaining())
        try:
            async with asyncio.timeout(timeout):
                return await self._take(started)
        except TimeoutError:
            self._note(f"no answer within {timeout:.1f} s")
        except ApiError as error:
            self._note(str(error))
        return False

    async def _take(self, started: float) -> bool:
        if not self.is_leader:
            await self._observe()
        if self._lease is None:
            return await self._write(self._client.create, started)
        if self.holder not in ("", self._settings.identity) and not self._expired():
            return False
        try:
            return await self._write(self._client.replace, started)
        except (Conflict, NotFound):
            # Somebody wrote in between. A leader looks again: it may only have been a label.
            await self._observe()
            return self.holder == self._settings.identity and await self._write(self._client.replace, started)

    async def _observe(self) -> None:
        try:
            lease: KubeObject | None = await self._client.get(self._ref)
        except NotFound:
            lease = None
        self._read_at = self._clock()
        self._note("")
        if _spec(lease) != _spec(self._lease):
            self._observed_at = self._read_at
        self._lease = lease

    async def _write(self, send: Callable[[KubeObject], Awaitable[KubeObject]], started: float) -> bool:
        try:
            self._lease = await send(self._desired())
        except AlreadyExists:
            return False
        # Counted from before the request was sent: others count from when they see the new Lease, which is later.
        self._write_until = started + self._settings.renew_deadline
        self._read_at = self._observed_at = self._clock()
        self._note("")
        return True

    def _remaining(self) -> float:
        return max(0.0, (self._write_until or 0.0) - self._clock())

    def _expired(self) -> bool:
        duration = _spec(self._lease).get("leaseDurationSeconds") or self._settings.lease_duration
        return self._clock() >= self._observed_at + duration

    def _desired(self) -> KubeObject:
        now = micro_time(self._now())
        spec = _spec(self._lease)
        taken = spec.get("holderIdentity") != self._settings.identity
        lease = copy.deepcopy(self._lease) or {
            "apiVersion": LEASE.api_version,
            "kind": LEASE.kind,
            "metadata": {"namespace": self._settings.namespace, "name": self._settings.name},
        }
        lease["spec"] = spec | {
            "holderIdentity": self._settings.identity,
            "leaseDurationSeconds": int(self._settings.lease_duration),
            "acquireTime": now if taken else spec.get("acquireTime", now),
            "renewTime": now,
            "leaseTransitions": int(spec.get("leaseTransitions") or 0) + (1 if taken and self._lease else 0),
        }
        return lease

    def _note(self, problem: str) -> None:
        if problem and problem != self._problem:
            log.warning("lease not held", lease=str(self._ref), problem=problem)
        self._problem = problem


def _spec(lease: KubeObject | None) -> dict[str, Any]:
    spec: dict[str, Any] = (lease or {}).get("spec") or {}
    return spec
