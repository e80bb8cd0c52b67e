"""What ``securevllm probe`` shows of a measurement, for a person and for a program. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from securevllm.proof.verdict import Proof, Round, Vantage
from securevllm.proof.wire import BLOCKED, Reach

if TYPE_CHECKING:
    from securevllm.proof.targets import Endpoint
    from securevllm.topology import Topology

FRESH = timedelta(hours=2)
"""``lastVerified`` moves hourly: older than that, the operator does not measure."""

EXIT_CODES = {"True": 0, "False": 1, "Unknown": 2}
"""Of the command, by the verdict."""

SUSPENDED = Proof("Unknown", "Suspended", "spec.suspend is true: nothing runs that could be reached.")
"""The verdict on what runs nothing: neither isolated nor a failure."""

_HOW = {
    Reach.OPEN: "the handshake was completed",
    Reach.REFUSED: "refused",
    Reach.SILENT: "no answer",
}


@dataclass(frozen=True)
class Row:
    """One attempt.

    Attributes:
        vantage: from where.
        pod: the target.
        node: where it runs.
        port: that was tried.
        socket: name in the topology.
        purpose: of the socket, for a person.
        result: ``open``, ``blocked`` or ``unknown``.
        how: it ended, and what it means that it did.
    """

    vantage: str
    pod: str
    node: str
    port: int
    socket: str
    purpose: str
    result: str
    how: str


@dataclass(frozen=True)
class Report:
    """What is known of one resource.

    Attributes:
        namespace: of the resource.
        name: of the resource.
        proof: the verdict.
        rows: every attempt; none when the operator's own verdict is told.
        notes: what a reader has to know beside it.
    """

    namespace: str
    name: str
    proof: Proof
    rows: tuple[Row, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def exit_code(self) -> int:
        """0 isolated, or suspended; 1 not isolated; 2 could not be measured."""
        return 0 if self.proof == SUSPENDED else EXIT_CODES[self.proof.status]


_OWN_REASONS = frozenset({"CannotMeasure", "OldGeneration", "Stale"})
"""Of this module; all others are reasons of the condition, and have a heading in docs/status.md."""


def failed(why: str) -> Proof:
    """The verdict when there is none, because something did not work."""
    return Proof("Unknown", "CannotMeasure", f"{why}.")


def rows(seen: Round, topology: Topology) -> tuple[Row, ...]:
    """The attempts of a round; the ports say what they are by the topology's sockets."""
    purposes = {(item.name, item.port): item.purpose for item in topology.sockets}
    beside = {(item.vantage, item.node, item.port) for item in seen.controls if item.reach is Reach.OPEN}
    told = []
    for item in sorted(seen.samples, key=lambda one: (one.vantage, one.pod, one.port)):
        how = _HOW.get(item.reach, item.reach.value)
        if not item.steady:
            result, how = "unknown", f"{how}; the pod is another one by now, or not Ready"
        elif item.reach is Reach.OPEN:
            result = "open"
        elif item.reach in BLOCKED and (item.vantage, item.node, item.port) in beside:
            result, how = "blocked", f"{how}; a listener on the same node and port answered"
        else:
            result, how = "unknown", f"{how}; but neither did a listener that may be reached"
        purpose = purposes.get((item.socket, item.port), item.socket)
        told.append(Row(item.vantage, item.pod, item.node, item.port, item.socket, purpose, result, how))
    return tuple(told)


def merged(rounds: Sequence[Round]) -> Round:
    """Several rounds over parts of the targets as one; what is not measured in parts is that of the first."""
    first = rounds[0]
    return Round(
        samples=tuple(item for one in rounds for item in one.samples),
        controls=tuple(item for one in rounds for item in one.controls),
        questions=first.questions,
        targets=first.targets,
        lacking=tuple(dict.fromkeys(item for one in rounds for item in one.lacking)),
        limits=first.limits,
        complete=all(one.complete for one in rounds),
        vantages=first.vantages,
        wanted=first.wanted,
    )


def parts(found: Iterable[Endpoint], targets: int, nodes: int) -> list[list[Endpoint]]:
    """The targets in as many rounds as it takes: each with at most so many targets and so many nodes."""
    made: list[list[Endpoint]] = []
    for endpoint in sorted(found, key=lambda item: (item.node, item.pod, item.port, item.address)):
        last = made[-1] if made else []
        here = {item.node for item in last} | {endpoint.node}
        if made and len(last) < targets and len(here) <= nodes:
            last.append(endpoint)
        else:
            made.append([endpoint])
    return made


def measured_by_operator(resource: Mapping[str, Any], now: datetime) -> Report:
    """What the operator says in the status.

    Args:
        resource: the SecureVLLMDeployment.
        now: UTC.
    """
    metadata, status = resource["metadata"], resource.get("status", {})
    where = metadata["namespace"], metadata["name"]
    if resource.get("spec", {}).get("suspend") and not status.get("replicas"):
        return Report(*where, SUSPENDED)
    found = _condition(resource, "Isolated")
    if found is None:
        told = "The status says nothing of isolation: no operator has looked at this resource yet."
        return Report(*where, Proof("Unknown", "NotMeasured", told))
    at = str(status.get("lastVerified", ""))
    proof = Proof(found["status"], found["reason"], found["message"], at)
    if _old(found, resource):
        told = f"The status is about an older spec. It said {proof.status}, {proof.reason}: {proof.message}"
        return Report(*where, Proof("Unknown", "OldGeneration", told, at))
    if proof.status == "True" and age(at, now) > FRESH:
        told = (
            f"The last measurement is from {at or 'never'}: no operator measures any more."
            f" It said {proof.reason}: {proof.message}"
        )
        return Report(*where, Proof("Unknown", "Stale", told, at))
    return Report(*where, proof)


def not_in_force(resource: Mapping[str, Any]) -> str:
    """Why what runs is not, or perhaps not, what the spec says now; empty: it is.

    Args:
        resource: the SecureVLLMDeployment.
    """
    found = _condition(resource, "Accepted")
    if found is None or _old(found, resource):
        return "The operator has not looked at the present spec"
    return "" if found["status"] == "True" else "The operator refuses the present spec"


def looked_at(resource: Mapping[str, Any]) -> bool:
    """Whether an operator has ever judged the spec of a resource."""
    return _condition(resource, "Accepted") is not None


def _condition(resource: Mapping[str, Any], name: str) -> Mapping[str, Any] | None:
    conditions = resource.get("status", {}).get("conditions", ())
    return next((item for item in conditions if item["type"] == name), None)


def _old(condition: Mapping[str, Any], resource: Mapping[str, Any]) -> bool:
    """Whether a condition is about an earlier spec."""
    return int(condition.get("observedGeneration", 0)) < int(resource["metadata"].get("generation", 0))


def age(moment: str, now: datetime) -> timedelta:
    """How long ago a moment of the status is; what cannot be read is very old.

    Without a sign: a moment that a wrong clock put into the future must not count as young until it has come.
    """
    try:
        return abs(now.astimezone(UTC) - datetime.fromisoformat(moment))
    except ValueError:
        return timedelta.max


def as_dict(report: Report) -> dict[str, Any]:
    """For a program; one resource."""
    return {
        "namespace": report.namespace,
        "name": report.name,
        "isolated": report.proof.status,
        "reason": report.proof.reason,
        "message": report.proof.message,
        "measuredAt": report.proof.verified_at or None,
        "attempts": [_renamed(asdict(row)) for row in report.rows],
        "notes": list(report.notes),
    }


def _renamed(row: dict[str, Any]) -> dict[str, Any]:
    return {"from": row.pop("vantage"), **row}


HEAD = ("FROM", "TARGET", "NODE", "PORT", "WHAT LISTENS", "RESULT", "HOW IT ENDED")


def table(report: Report) -> list[list[str]]:
    """The attempts as rows of words, in the order of ``HEAD``."""
    return [[row.vantage, row.pod, row.node, str(row.port), row.purpose, row.result, row.how] for row in report.rows]


_WORDS = {"True": "ISOLATED", "False": "NOT ISOLATED", "Unknown": "NOT MEASURED"}


def verdict(report: Report) -> list[str]:
    """The verdict in lines, with what to read next."""
    proof = report.proof
    at = f", measured at {proof.verified_at}" if proof.verified_at else ""
    words = "NOTHING RUNS" if proof == SUSPENDED else _WORDS[proof.status]
    page = f"docs/status.md#{proof.reason.lower()}"
    told = proof.reason in _OWN_REASONS or page in proof.message
    return [
        f"{report.namespace}/{report.name}: {words} ({proof.reason}{at})",
        f"  {proof.message}",
        *(f"  {note}" for note in report.notes),
        *([] if told else [f"  See {page}"]),
    ]


HERE = "this machine"
SAME_NAMESPACE = Vantage.CANARY.value


def other_namespace(namespace: str) -> str:
    """Name of a canary pod elsewhere as vantage point."""
    return f"a canary pod of namespace {namespace}"
