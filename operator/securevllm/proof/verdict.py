"""From what one round saw to a verdict. Pure, and the only place where it is decided what proves what.

* Against a target that is known to listen, only a completed handshake is "reachable"; silence and refusal are both
  "blocked". A target that was not Ready with the same address before and after says nothing.
* Blocked counts only beside a positive control of the same round: the same vantage point reached something on the same
  node and port that it may reach, by the same family of addresses. An egress deny at the source would look like
  isolation otherwise.
* Where a round says what it had to try, all of it has to be blocked: what nobody tried is not isolated.
* Reachable needs no control: it is a fact.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from securevllm.proof.wire import BLOCKED, Reach

REACHABLE = frozenset({"EngineReachable", "GatewayReachable"})
"""Reasons of verdicts that something was reached that must not be."""


class Vantage(StrEnum):
    """From where the operator tries; it needs both. ``securevllm probe`` has others, named in the same way."""

    OPERATOR = "the operator"
    CANARY = "a canary pod of the same namespace"


@dataclass(frozen=True, order=True)
class Attempt:
    """What a round had to try.

    Attributes:
        vantage: from where.
        pod: name of the target.
        address: of the pod; each family is tried.
        port: of the target.
    """

    vantage: str
    pod: str
    address: str
    port: int

    def __str__(self) -> str:
        return f"{self.pod} port {self.port} ({self.address}) from {self.vantage}"


@dataclass(frozen=True)
class Sample:
    """One attempt to reach what must not be reached.

    Attributes:
        vantage: from where.
        pod: name of the target.
        node: where it runs.
        port: that was tried.
        socket: name of the socket in the topology.
        reach: how it ended.
        steady: the target was Ready with the same address before and after.
        address: of the pod, that was tried.
        gateway: the pod is one, and the port one that only declared peers may reach.
    """

    vantage: str
    pod: str
    node: str
    port: int
    socket: str
    reach: Reach
    steady: bool = True
    address: str = ""
    gateway: bool = False

    @property
    def attempt(self) -> Attempt:
        """What was to be tried, and was."""
        return Attempt(self.vantage, self.pod, self.address, self.port)


@dataclass(frozen=True)
class Control:
    """One attempt to reach what may be reached: a listener of ours on the same node and port."""

    vantage: str
    node: str
    port: int
    reach: Reach
    address: str = ""


class Asked(StrEnum):
    """What a gateway made of a request that it must refuse."""

    REFUSED = "refused"
    """By itself: 401, 403 or 404 with its marker."""
    PASSED = "passed"
    """The answer is not the gateway's own: the request reached an engine."""
    UNCLEAR = "unclear"
    """No answer, or one that tells neither: not measured."""


@dataclass(frozen=True)
class Question:
    """One request that a gateway must refuse.

    Attributes:
        pod: the gateway.
        method: of the request.
        path: of the request.
        keyed: with the prober's own key; without one only authentication is measured.
        asked: what came of it.
    """

    pod: str
    method: str
    path: str
    keyed: bool
    asked: Asked


@dataclass(frozen=True)
class Round:
    """What one round saw.

    Attributes:
        samples: of engines and routers.
        controls: beside them.
        questions: to gateways; None: none of them could be asked; empty: asking was not wanted.
        targets: how many pods could have been targets.
        lacking: vantage points and measurements that this round lacks, each with its reason.
        limits: what is never measured, or is present and not evaluated; told with every verdict.
        complete: with canary pods: only such a round can say that something is isolated.
        vantages: from all of these something has to be tried.
        wanted: all that had to be tried; empty: whatever was tried counts, and the verdict says how much that was.
    """

    samples: tuple[Sample, ...] = ()
    controls: tuple[Control, ...] = ()
    questions: tuple[Question, ...] | None = None
    targets: int = 0
    lacking: tuple[str, ...] = ()
    limits: tuple[str, ...] = ()
    complete: bool = False
    vantages: tuple[str, ...] = tuple(Vantage)
    wanted: tuple[Attempt, ...] = ()


def merged(parts: Iterable[Round]) -> Round:
    """The parts of one complete round as one; what is told of gateways, and the limits, are those of the last."""
    *before, last = parts
    return replace(
        last,
        samples=tuple(item for part in (*before, last) for item in part.samples),
        controls=tuple(item for part in (*before, last) for item in part.controls),
        lacking=tuple(dict.fromkeys(told for part in (*before, last) for told in part.lacking)),
    )


@dataclass(frozen=True)
class Proof:
    """A verdict, as the condition ``Isolated`` shows it.

    Attributes:
        status: True, False or Unknown.
        reason: CamelCase.
        message: for a person; the same for the same findings, whatever the time.
        verified_at: RFC 3339 time of the measurement; empty: nothing was measured.
    """

    status: str
    reason: str
    message: str
    verified_at: str = field(default="", compare=False)

    @property
    def breached(self) -> bool:
        """Whether something is known to be open to others.

        Also the statistics of a gateway: what hides behind them, an engine or a forbidden route, was perhaps not tried.
        """
        return self.status == "False"


_SHOWN = 5


def judge(seen: Round, before: Proof | None) -> Proof:
    """The verdict after a round.

    Args:
        seen: the round.
        before: the verdict so far; a round without canary pods keeps a verdict that it does not contradict.
    """
    certain = _reached(seen) or _passed(seen) or _nothing(seen)
    if certain is not None:
        return certain
    if not seen.complete:
        return before or Proof("Unknown", "NotMeasured", "The first complete round is under way.")
    unclear = _unclear(seen)
    if unclear and before is not None and before.reason == "ForbiddenRouteOpen":
        return before  # a gateway without engines answers 503, which takes nothing back
    return _uncontrolled(seen) or _untried(seen) or _not_asked(seen, unclear) or _isolated(seen)


def _nothing(seen: Round) -> Proof | None:
    if seen.targets:
        return None
    return Proof("Unknown", "NothingToMeasure", "No engine is Ready: there is nothing that could be reached.")


def _not_asked(seen: Round, unclear: list[str]) -> Proof | None:
    if not unclear:
        return None
    told = "The gateways could not be asked for forbidden routes."
    return Proof("Unknown", "GatewayNotAsked", _join(told, *unclear, *_reasons(seen)))


def _reached(seen: Round) -> Proof | None:
    opened = sorted(
        (item for item in seen.samples if item.steady and item.reach is Reach.OPEN),
        key=lambda item: (item.pod, item.port, item.vantage),
    )
    if not opened:
        return None
    engines = [item for item in opened if not item.gateway]
    told = [f"{item.pod} port {item.port} ({item.socket}) from {item.vantage}" for item in engines or opened]
    return Proof(
        "False",
        "EngineReachable" if engines else "GatewayReachable",
        f"{_some(told)} can be reached, and no policy allows it: the network does not enforce the NetworkPolicies."
        f" {'Requests can pass the gateway by' if engines else 'No engine was reached so far'}."
        " Install a network plugin that enforces them, or look at what it says.",
    )


def _passed(seen: Round) -> Proof | None:
    passed = sorted({(item.pod, f"{item.method} {item.path}") for item in _asked(seen, Asked.PASSED)})
    if not passed:
        return None
    told = [f"{route} at {pod}" for pod, route in passed]
    return Proof(
        "False",
        "ForbiddenRouteOpen",
        f"{_some(told)} was not refused by the gateway: its configuration is not the one that was rendered.",
    )


def _unclear(seen: Round) -> list[str]:
    """What to tell of gateways that were not, or not usefully, asked; empty: all refused."""
    if seen.questions is None:
        return ["None is ready."]
    unclear = sorted({item.pod for item in _asked(seen, Asked.UNCLEAR)})
    return [f"No clear answer from {_some(unclear)}."] if unclear else []


def _uncontrolled(seen: Round) -> Proof | None:
    reached = {_way(item) for item in seen.controls if item.reach is Reach.OPEN}
    blocked = _blocked(seen)
    bare = sorted({*map(_way, blocked)} - reached)
    vantages = {item.vantage for item in blocked}
    if vantages >= {*seen.vantages} and not bare:
        return None
    told = [f"port {port} on node {node} from {vantage}{family}" for vantage, node, port, family in bare]
    missing = [f"Nothing was tried from {vantage}." for vantage in seen.vantages if vantage not in vantages]
    return Proof(
        "Unknown",
        "NoControl",
        _join(
            "Nothing was reached that must not be, but silence proves nothing here.",
            *([f"What may be reached was not reached either: {_some(told)}."] if told else []),
            *missing,
            *_reasons(seen),
        ),
    )


def _way(item: Sample | Control) -> tuple[str, str, int, str]:
    """What a control stands for: policies may hold for one family of addresses and not for the other."""
    return item.vantage, item.node, item.port, " (IPv6)" if ":" in item.address else ""


def _untried(seen: Round) -> Proof | None:
    left = sorted({*seen.wanted} - {item.attempt for item in _blocked(seen)})
    if not left:
        return None
    return Proof(
        "Unknown",
        "NotAllTried",
        _join(
            "Not measured completely: nothing was reached that must not be, but of"
            f" {len(seen.wanted)} attempts {len(left)} were not made, or their targets changed meanwhile:"
            f" {_some([*map(str, left)])}.",
            *_reasons(seen),
        ),
    )


def _blocked(seen: Round) -> list[Sample]:
    return [item for item in seen.samples if item.steady and item.reach in BLOCKED]


def _isolated(seen: Round) -> Proof:
    blocked = _blocked(seen)
    pods = {item.pod for item in blocked}
    nodes = {item.node for item in blocked}
    sockets = sorted({(item.port, item.socket) for item in blocked})
    refused = len({(item.method, item.path) for item in _asked(seen, Asked.REFUSED)})
    return Proof(
        "True",
        "Measured",
        _join(
            f"{_some([f'{socket} {port}' for port, socket in sockets])} of {len(pods)} of {seen.targets} pods on"
            f" {len(nodes)} {'node' if len(nodes) == 1 else 'nodes'} cannot be reached from"
            f" {' and '.join(sorted({item.vantage for item in blocked}, reverse=True))}, which reach other pods"
            " on the same nodes and ports.",
            *([f"The gateways refuse {refused} forbidden requests."] if refused else []),
            *_reasons(seen),
        ),
    )


def _asked(seen: Round, asked: Asked) -> Iterable[Question]:
    return (item for item in seen.questions or () if item.asked is asked)


def _reasons(seen: Round) -> list[str]:
    return [*seen.lacking, *([f"Not measured: {', '.join(seen.limits)}."] if seen.limits else [])]


def _join(*sentences: str) -> str:
    return " ".join(sentences)


def _some(told: Sequence[str]) -> str:
    more = len(told) - _SHOWN
    return ", ".join(told[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
