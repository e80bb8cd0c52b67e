"""The last init container of an engine: holds it back until its isolation was seen from inside.

    a name resolves -> what is forbidden is blocked, again and again for a moment -> a name still resolves
    -> in a group: all members say the same -> exit 0

There is no way out but that. It never times out into "open": it says what it waits for, in its log and as the pod's
termination message, and goes on looking. It has no token, and needs the standard library only.

In a group the members meet in two steps, on a port of their own: *up* means that the gate answers, *isolated* that it
also saw every member up and its own egress blocked, *released* that it saw every member isolated. A member leaves when
all are released. With one step fewer, a member that has seen everybody closes its listener while a slower one is
refused for ever.

It sees egress only. Ingress, and everything after the start, is the prober's part.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from pathlib import Path

from securevllm.proof.dial import Listener, accepting, addresses, dial, greeting, has_ipv6, knock
from securevllm.proof.wire import (
    BLOCKED,
    GATE_VARIABLE,
    NODE_IP,
    POD_IP,
    TERMINATION_VARIABLE,
    Barrier,
    Forbidden,
    GateConfig,
    Reach,
    load_gate,
)

_TERMINATION_LOG = "/dev/termination-log"
_DIAL_SECONDS = 0.75
_DNS_SECONDS = 3.0
_TELL_AGAIN = 30.0

_KNOCK_SECONDS = 0.1
"""Between two tries of a target. A first packet may be lost; so many are not."""
_LAST_SECONDS = 0.2
"""That the last try has for its answer; those before have more."""
_TRIES = 2
"""At least, however short the time is."""

_PAUSE = 0.25
_LONGEST_PAUSE = 1.0
_PAUSE_PART = 0.05
"""Of the time that it has waited: a gate that waits long does not keep the API server busy. The longest pause and a
look are shorter than a released member lingers."""

_LINGER_SECONDS = 3.0
"""A released member answers for longer than the others pause between two looks, as long as DNS is quick: each sees it
released then, and waits no longer."""
_GONE_SECONDS = 15.0
"""After that long, a member that was isolated and is silent has left: everybody was seen isolated together."""


class Step(IntEnum):
    """How far a member is."""

    UP = 0
    ISOLATED = 1
    RELEASED = 2


@dataclass(frozen=True)
class Hello:
    """What a member says on the barrier port."""

    world: str
    rank: int
    instance: str
    step: Step

    def line(self) -> bytes:
        """As it is sent."""
        told = {"world": self.world, "rank": self.rank, "instance": self.instance, "step": int(self.step)}
        return json.dumps(told).encode() + b"\n"

    @classmethod
    def read(cls, line: bytes) -> Hello:
        """Read it.

        Raises:
            ValueError: it is something else.
        """
        try:
            told = json.loads(line)
            return cls(str(told["world"]), int(told["rank"]), str(told["instance"]), Step(told["step"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError("it speaks something else") from error


@dataclass
class Seen:
    """What is known of one member.

    Attributes:
        hello: the last that it said; None: nothing of this world yet.
        at: when.
        answers: in the last look.
        problem: why not.
        met: the instance that was isolated when this member was first released.
    """

    hello: Hello | None = None
    at: float = 0.0
    answers: bool = False
    problem: str = "it has not answered yet"
    met: str = ""


@dataclass
class Meeting:
    """The barrier, as one member sees it. ``look`` does I/O, ``advance`` decides.

    Attributes:
        barrier: who takes part.
        rank: of this member.
        world: of this start.
        clock: monotonic seconds.
        step: how far this member is.
        met: it was released once: it has seen everybody isolated, and the others may have left since.
    """

    barrier: Barrier
    rank: int
    world: str
    clock: Callable[[], float]
    step: Step = Step.UP
    instance: str = field(default_factory=lambda: secrets.token_hex(4))
    seen: dict[int, Seen] = field(init=False)
    met: bool = False
    _released_at: float = 0.0

    def __post_init__(self) -> None:
        ranks = range(len(self.barrier.members))
        self.seen = {rank: Seen() for rank in ranks if rank != self.rank}

    def hello(self) -> bytes:
        """What this member tells everybody."""
        return Hello(self.world, self.rank, self.instance, self.step).line()

    async def look(self) -> None:
        """Ask every other member once, side by side."""
        await asyncio.gather(*(self._ask(rank, seen) for rank, seen in self.seen.items()))

    async def _ask(self, rank: int, seen: Seen) -> None:
        seen.answers, seen.problem = False, "it does not answer"
        try:
            found = await addresses(self.barrier.members[rank], _DNS_SECONDS)
        except OSError:
            seen.problem = "its name does not resolve"
            return
        for address in found:
            try:
                hello = Hello.read(await greeting(address, self.barrier.port, _DIAL_SECONDS))
            except (OSError, ValueError):
                continue
            if (hello.world, hello.rank) != (self.world, rank):
                seen.problem = "a pod of another start answers in its place"
                continue
            seen.hello, seen.at, seen.answers = hello, self.clock(), True
            return

    def advance(self, *, isolated: bool) -> bool:
        """Take in a look; True: this member may leave.

        Args:
            isolated: whether its own egress is blocked now.
        """
        now = self.clock()
        if not isolated:
            self.step = Step.UP
            return False
        if self.step is Step.UP and self._all(Step.UP):
            self.step = Step.ISOLATED
        if self.step is Step.ISOLATED and self._all(Step.ISOLATED):
            self.step, self._released_at = Step.RELEASED, now
            if not self.met:
                self.met = True
                for seen in self.seen.values():
                    seen.met = seen.hello.instance if seen.hello else ""
        return (
            self.step is Step.RELEASED
            and now - self._released_at >= _LINGER_SECONDS
            and all(self._done(seen, now) for seen in self.seen.values())
        )

    def _all(self, step: Step) -> bool:
        # One that was released, this member or another, has seen everybody isolated: whoever looks again, as its DNS
        # did not answer for a moment, would otherwise wait for ever for those who have left meanwhile.
        return self.met or all(
            seen.hello and (seen.hello.step is Step.RELEASED or (seen.answers and seen.hello.step >= step))
            for seen in self.seen.values()
        )

    @staticmethod
    def _done(seen: Seen, now: float) -> bool:
        if seen.hello is None:
            return False
        if seen.hello.step is Step.RELEASED:
            return True  # whether it still answers or has left
        # One that began anew has not met the others, and needs this one.
        return not seen.answers and seen.hello.instance == seen.met and now - seen.at >= _GONE_SECONDS

    def waits_for(self) -> str:
        """What keeps this member, for a person; empty: nothing."""
        told = []
        for rank, seen in self.seen.items():
            if not seen.answers and not (seen.hello and seen.hello.step is Step.RELEASED):
                told.append(f"{self.barrier.members[rank]}: {seen.problem}")
            elif seen.hello and seen.hello.step is Step.UP:
                told.append(f"{self.barrier.members[rank]}: it is up and waits for its own isolation or for others")
        if told:
            return "the group is not complete: " + "; ".join(told)
        return "" if self.step is Step.RELEASED else "the other members have not all seen this one yet"


class Look(Enum):
    """What came of a target."""

    REACHED = "reached"
    BLOCKED = "blocked"
    NOT_TRIED = "not tried"
    """Something of this pod's own stood in the way: the next look may tell."""
    NOTHING = "nothing"
    """It cannot be measured with here."""


class Gate:
    """Looks, tells, and decides.

    Args:
        config: what it is told.
        environment: for ``$NAME`` in it, and the addresses of pod and node.
        tell: takes what it waits for, each time that this changes, and at the end an empty text.
        clock: monotonic seconds.
    """

    def __init__(
        self,
        config: GateConfig,
        environment: Mapping[str, str],
        tell: Callable[[str], None],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._environment, self._tell, self._clock = config, environment, tell, clock
        self._node = {address for address in environment.get(NODE_IP, "").split(",") if address}

    async def wait(self) -> None:
        """Return when the engine may start; not before.

        Raises:
            OSError: the barrier port cannot be opened.
            ValueError: the rank is no number.
        """
        barrier = self._config.barrier
        if barrier is None:
            await self._wait(None)
            return
        meeting = Meeting(barrier, int(self._expanded(barrier.rank)), self._expanded(barrier.world), self._clock)
        listener = accepting(self._environment.get(POD_IP) or "0.0.0.0", barrier.port)  # noqa: S104 - without a pod
        async with Listener((listener,), meeting.hello):
            await self._wait(meeting)

    async def _wait(self, meeting: Meeting | None) -> None:
        began = self._clock()
        while True:
            problem, _ = await asyncio.gather(self._round(), meeting.look() if meeting else asyncio.sleep(0))
            if meeting is None:
                if not problem:
                    return
            elif meeting.advance(isolated=not problem):
                return
            self._tell(problem or ("" if meeting is None else meeting.waits_for()))
            await asyncio.sleep(pause(self._clock() - began))

    async def _round(self) -> str:
        """One look at everything; what is wrong, or an empty text."""
        if problem := await self._dead():
            return problem
        if not self._config.isolation:
            return ""
        results = await asyncio.gather(*(self._look(target) for target in self._config.forbidden))
        by = {look: [told for seen, told in results if seen is look] for look in Look}
        if reached := by[Look.REACHED]:
            return (
                f"{', '.join(reached)} can be reached, and no policy allows it: NetworkPolicies are not enforced for"
                " this pod (yet). If it stays, install a network plugin that enforces them, such as Cilium or Calico"
            )
        if untried := by[Look.NOT_TRIED]:
            return f"nobody knows whether {', '.join(untried)} can be reached: this pod could not even try (yet)"
        if not by[Look.BLOCKED]:
            return f"nothing to measure with: {'; '.join(by[Look.NOTHING]) or 'no target was given'}"
        return await self._dead()  # it was silent all that time, and the network was there all that time

    async def _dead(self) -> str:
        """Why there is no sign of life of the network; empty: there is one."""
        try:
            await addresses(self._config.dns, _DNS_SECONDS)
        except OSError as error:
            why = str(error) or "no answer in time"
            return (
                f"DNS does not answer for {self._config.dns} ({why}): without a sign of life silence proves nothing."
                " If it stays, look at the operator's DNS settings"
            )
        return ""

    async def _look(self, target: Forbidden) -> tuple[Look, str]:
        """Try to reach a target: what came of it, and what to tell."""
        host, port = self._expanded(target.host), self._expanded(target.port)
        if not host or not port.isdigit():
            return Look.NOTHING, f"{target.name} is not in the environment"
        try:
            found = await addresses(host, _DNS_SECONDS)
        except OSError:
            return Look.NOTHING, f"{target.name} ({host}) does not resolve"
        foreign = [address for address in found if address not in self._node]
        reaches = await asyncio.gather(*(self._knock(address, int(port)) for address in foreign))
        tried = dict(zip(foreign, reaches, strict=True))
        opened = [address for address, reach in tried.items() if reach is Reach.OPEN]
        if opened and await self._may_be_own_node(target):
            return Look.NOTHING, f"{target.name} may be on the pod's own node, which no plugin closes"
        if opened:
            return Look.REACHED, f"{target.name} ({opened[0]}:{port})"
        return _unreached(target, host, tried)

    async def _knock(self, address: str, port: int) -> Reach:
        seconds = max(self._config.stable_seconds, (_TRIES - 1) * _KNOCK_SECONDS + _LAST_SECONDS)
        tries = 1 + int((seconds - _LAST_SECONDS) / _KNOCK_SECONDS + 1e-6)
        return await knock(address, port, tries=tries, every=_KNOCK_SECONDS, seconds=seconds)

    async def _may_be_own_node(self, target: Forbidden) -> bool:
        """Behind a Service address may be the own node: its answer on the same service's port gives it away."""
        tries = [dial(address, port, _DIAL_SECONDS) for address in self._node for port in target.node_ports]
        return Reach.OPEN in await asyncio.gather(*tries)

    def _expanded(self, text: str) -> str:
        return self._environment.get(text[1:], "") if text.startswith("$") else text


def _unreached(target: Forbidden, host: str, tried: Mapping[str, Reach]) -> tuple[Look, str]:
    """What it means that none of these addresses was reached."""
    # Policies may hold for one family of addresses and not for the other, and an IPv6 address may not be usable yet.
    for address, reach in tried.items():
        if reach is Reach.NO_ATTEMPT and (":" not in address or has_ipv6()):
            return Look.NOT_TRIED, f"{target.name} ({address})"
    if any(reach in BLOCKED for reach in tried.values()):
        return Look.BLOCKED, target.name
    return Look.NOTHING, f"{target.name} ({host}) has no {'way to it' if tried else 'address to try'}"


def pause(waited: float) -> float:
    """Seconds until the next look, of a gate that has waited for so long."""
    return min(_LONGEST_PAUSE, max(_PAUSE, waited * _PAUSE_PART))


class Teller:
    """The log and the termination message: what is waited for, when it changes and once in a while."""

    def __init__(self, path: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self._path, self._clock = path, clock
        self._last, self._at, self._began = "", clock(), clock()

    def __call__(self, problem: str) -> None:
        """Tell it."""
        now = self._clock()
        if not problem or (problem == self._last and now - self._at < _TELL_AGAIN):
            return
        self._last, self._at = problem, now
        self._write(f"waiting since {now - self._began:.0f} s: {problem}.")

    def done(self) -> None:
        """The engine may start."""
        self._write(f"isolated after {self._clock() - self._began:.1f} s: the engine may start.")

    def _write(self, text: str) -> None:
        sys.stdout.write(f"securevllm gate: {text}\n")
        sys.stdout.flush()
        leave(self._path, text)


def termination_log() -> Path:
    """Where kubelet looks for the termination message."""
    return Path(os.environ.get(TERMINATION_VARIABLE, _TERMINATION_LOG))


def leave(path: Path, text: str) -> None:
    """Replace the termination message. Kubelet has made the file; where there is none, none is made."""
    with contextlib.suppress(OSError), path.open("r+", encoding="utf-8") as file:
        file.truncate()
        file.write(text)


def main(arguments: list[str]) -> int:
    """``securevllm gate [JSON]``; the configuration is otherwise in ``$SECUREVLLM_GATE``.

    Returns:
        Exit code: 0 the engine may start, 1 the barrier's port is taken, 2 the configuration is wrong; a signal ends it
        with 128 + its number.
    """
    text = arguments[0] if arguments else os.environ.get(GATE_VARIABLE, "")
    try:
        config = load_gate(text)
    except ValueError as error:
        sys.stderr.write(f"securevllm gate: {error}: give it as JSON in the argument or in ${GATE_VARIABLE}\n")
        return 2
    # Python ignores SIGTERM as process 1 of a container otherwise, and every stopped pod would take its grace period.
    signal.signal(signal.SIGTERM, lambda *_: os._exit(128 + signal.SIGTERM))
    # glibc waits 5 s for a lost answer: longer than this waits for it.
    os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:2")
    teller = Teller(termination_log())
    try:
        asyncio.run(Gate(config, os.environ, teller).wait())
    except OSError as error:
        teller(f"the barrier port cannot be opened: {error}")
        return 1
    except ValueError as error:
        teller(f"the barrier cannot be used: {error}")
        return 2
    teller.done()
    return 0
