"""The operator on a real API server: from an apply to all objects, repair, idleness, start, memory."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path

from bench.report import Measured
from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api.audit import Request, now
from tests.api.kube import eventually
from tests.api.lab import Lab, as_rendered, started
from tests.api.operator_process import USER, OperatorProcess, new_namespace, resource, settled

RESOURCES = 100
REPAIRS = 40
STARTS = 4
IDLE = 30.0
SETTLE = 0.3

NOTES = (
    (
        f"apply → all children: {RESOURCES} resources one after another, from the arrival of the apply to the end of"
        " the last write that creates a child; the model is in the image, so that engines need not wait for a download"
    ),
    (
        "repair: from the end of the foreign write (a NetworkPolicy deleted, a Service edited) to the end of the write"
        " that undoes it"
    ),
    "start: from the start of the process to its first write, that repairs what was damaged while it was down",
    f"idle: {IDLE:g} s with {RESOURCES} settled resources, renewals of the Lease and watches aside",
)


def measure(folder: Path) -> Iterator[Measured]:
    """Run everything in a control plane of its own; about two minutes.

    Args:
        folder: an empty one for logs.
    """
    with started(folder) as lab, new_namespace(lab.kube, "bench") as namespace:
        operator = lab.operator("bench")
        with operator:
            yield _memory(operator, "operator's memory, no resource")
            yield _applies(lab, namespace)
            yield from _repairs(lab, namespace)
            yield from _idle(lab)
            yield _memory(operator, f"operator's memory, {RESOURCES} resources")
            yield Measured(
                f"start to first reconcile, {RESOURCES} resources", tuple(_starts(lab, namespace, operator)), "s", 2.0
            )
            operator.stop()


def _memory(operator: OperatorProcess, what: str) -> Measured:
    status = Path(f"/proc/{operator.pid}/status").read_text(encoding="ascii")
    kibibytes = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS:"))
    return Measured(what, (kibibytes / 1024,), "MiB")


def _name(number: int) -> str:
    return f"model-{number:03}"


def _applies(lab: Lab, namespace: str) -> Measured:
    since = now()
    for number in range(RESOURCES):
        lab.kube.apply(resource(namespace, _name(number)))
        settled(lab.kube, Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, _name(number)))
        # What follows (pods are made, the status moves) must not run into the next one's time.
        time.sleep(SETTLE)
    eventually(lambda: as_rendered(lab.kube, namespace), 60)
    requests = lab.audit.requests(since, namespace=namespace)
    created = [request for request in requests if request.user == USER and request.code == 201]
    times = []
    for number in range(RESOURCES):
        begin = next(r for r in requests if (r.resource, r.name) == ("securevllmdeployments", _name(number)))
        mine = [request for request in created if request.name.startswith(f"{_name(number)}-")]
        times.append(_seconds(begin.began, max(request.ended for request in mine)) * 1000)
    return Measured("apply → all children exist", tuple(times), "ms", 120, 250)


def _repairs(lab: Lab, namespace: str) -> Iterator[Measured]:
    since = now()
    for number in range(REPAIRS):
        policy = Ref(kinds.NETWORK_POLICY, namespace, f"{_name(number)}-engine")
        lab.kube.delete(policy)
        eventually(lambda ref=policy: lab.kube.find(ref), 30, pause=0.02)  # type: ignore[misc]
        service = Ref(kinds.SERVICE, namespace, f"{_name(number)}-gateway")
        lab.kube.patch(service, {"metadata": {"labels": {"added": "yes"}}})
        eventually(
            lambda ref=service: "added" not in lab.kube.get(ref)["metadata"]["labels"],  # type: ignore[misc]
            30,
            pause=0.02,
        )
    requests = [request for request in lab.audit.requests(since, namespace=namespace) if request.done]
    for what, kind, damage in (
        ("repair of a deleted child", "networkpolicies", "delete"),
        ("repair of an edited child", "services", "patch"),
    ):
        touched = [request for request in requests if request.resource == kind]
        yield Measured(what, tuple(_answers(touched, damage)), "ms", 100)


def _answers(requests: Iterable[Request], damage: str) -> Iterator[float]:
    """Milliseconds from each foreign write to the operator's next one on the same object."""
    open_since: dict[str, str] = {}
    for request in requests:
        if request.user == USER and request.name in open_since:
            yield _seconds(open_since.pop(request.name), request.ended) * 1000
        elif request.user != USER and request.verb == damage:
            open_since[request.name] = request.ended


def _idle(lab: Lab) -> Iterator[Measured]:
    since = now()
    time.sleep(IDLE)
    asked = [request for request in lab.audit.requests(since, user=USER) if request.resource != "leases"]
    written = [request for request in asked if request.done]
    per_minute = 60 / IDLE
    yield Measured("idle: writes", (len(written) * per_minute,), "per minute", 0)
    yield Measured("idle: reads", ((len(asked) - len(written)) * per_minute,), "per minute")


def _starts(lab: Lab, namespace: str, operator: OperatorProcess) -> Iterator[float]:
    for number in range(STARTS):
        operator.stop()
        lab.kube.delete(Ref(kinds.SERVICE, namespace, f"{_name(number)}-engine"))
        since = now()
        operator.start()
        eventually(lambda since=since: lab.audit.writes(since, user=USER, namespace=namespace), 30)  # type: ignore[misc]
        yield _seconds(since, lab.audit.writes(since, user=USER, namespace=namespace)[0].began)


def _seconds(begin: str, end: str) -> float:
    return (datetime.fromisoformat(end) - datetime.fromisoformat(begin)).total_seconds()
