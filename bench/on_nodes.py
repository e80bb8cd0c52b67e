"""The operator on real nodes: what takes effect when, measured from inside pods, with Cilium as policy engine.

The times of requests are those of the API server's audit log or of this process; what pods see has the moment at which
their attempt began (`in_pod`). One machine, one clock.
"""

from __future__ import annotations

import base64
import json
import re
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, TypeVar, cast

from bench import in_pod
from bench.report import Measured
from e2e import images
from e2e.cluster import nodes, running
from e2e.cluster.kubectl import Kubectl, program
from e2e.workload import (
    OPERATOR,
    PORT,
    Pod,
    advertise_gpus,
    condition,
    install_operator,
    new_namespace,
    pods_of,
    policy,
    secret,
    start_pods,
    until_resource_ready,
    workers,
)
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.render.gate import GATE
from securevllm.render.meta import GROUP_LABEL, ROLE_LABEL
from tests.api.audit import Audit, now
from tests.api.kube import Kube, eventually
from tests.api.operator_process import resource

POLICIES = 20
CHANGES = 20
KEYS = 10
STARTS = 10
ENDPOINTS = 5
ROUNDS = 10
IDLE = 60.0
GROUPS = 4
TOKENS = 250
"""Of a stream: five seconds."""
T = TypeVar("T")

NAME = "bench"
ROUTE = {"method": "POST", "path": "/classify"}
"""Opened and closed again; in no profile."""

_PATIENCE = 120.0

NOTES = (
    (
        "on nodes: two nodes in namespaces of this machine (containerd, kubelet, kube-proxy, Cilium), two gateways, two"
        " engines (fake-vllm); everything shares the two processors"
    ),
    (
        "policy created → enforced: from before the request that creates a default-deny to the first connection, tried"
        " every 5 ms from a pod on the other node, that gets no answer"
    ),
    (
        "spec change → enforced: from before the PATCH that opens a route or closes it to the first request, sent every"
        " 20 ms on an open connection to each gateway pod, that is answered accordingly by the last of them"
    ),
    "key revoked → refused: the same, from before the PATCH of the Secret",
    (
        "meanwhile: a client that keeps asking for an allowed route at each gateway, and streams of five seconds that"
        " must come to their end"
    ),
    (
        "engine pod deleted: one of two; until the last request begins that it answers. It serves for another 15 s, so"
        " that this fails nobody; 0: none came after the deletion"
    ),
    (
        "gate: from the scheduling of a pod to the first line of its engine, with gate and without"
        " (`security.gate.disabled`); Cilium enforces before a pod starts, so that all of the difference is the gate's"
    ),
    (
        "probe: processor time of the operator during complete rounds (canary pods, controls, all ports, gateways),"
        " less what it takes idle; cheap rounds are in the idle time"
    ),
    "group: two pods of one tensor-parallel world; from the loss of one to Ready again",
)


def _awaited(look: Callable[[], T | None], pause: float = 0.1) -> T:
    """Look until something is there.

    Raises:
        TooLate: Not in time.
    """
    return cast("T", eventually(look, _PATIENCE, pause))


@dataclass
class Watcher:
    """What a pod sees; see `in_pod`.

    Attributes:
        seen: Everything it told, in order.
    """

    seen: list[dict[str, Any]] = field(default_factory=list)

    def since(self, moment: float, kind: str, what: str = "") -> list[dict[str, Any]]:
        """What began at a moment (Unix seconds) or later."""
        return [one for one in list(self.seen) if one["at"] >= moment and one["kind"] == kind and what in one["what"]]

    def first(self, moment: float, what: str, wanted: Callable[[Any], bool]) -> float:
        """When an attempt that ended as wanted began, at a moment or later.

        Raises:
            AssertionError: There is none in time.
        """

        def look() -> float | None:
            return next(
                (
                    one["at"]
                    for one in list(self.seen)
                    if one["at"] >= moment and one["what"] == what and wanted(one["answer"])
                ),
                None,
            )

        return _awaited(look, 0.02)


@contextmanager
def _watching(
    pod: Pod,
    *,
    dials: Sequence[str] = (),
    asks: Sequence[Mapping[str, Any]] = (),
    streams: Sequence[Mapping[str, Any]] = (),
) -> Iterator[Watcher]:
    """Let a pod look until the block is left."""
    source = Path(in_pod.__file__).read_text(encoding="utf-8")
    config = json.dumps({"dials": dials, "asks": asks, "streams": streams})
    command = [str(program()), f"--kubeconfig={pod.kubectl.kubeconfig}", "exec", f"--namespace={pod.namespace}"]
    command += ["--stdin", pod.name, "--", "python", "-u", "-c", source, config]
    watcher = Watcher()
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:

        def read() -> None:
            for line in process.stdout or ():
                watcher.seen.append(json.loads(line))

        thread = threading.Thread(target=read)
        thread.start()
        try:
            eventually(lambda: watcher.seen, 30)
            yield watcher
        finally:
            if process.stdin:
                process.stdin.close()
            with suppress(subprocess.TimeoutExpired):
                process.wait(10)
            process.kill()
            thread.join()


@dataclass(frozen=True)
class Lab:
    """A cluster with nodes, the operator installed, and pods to look from.

    Attributes:
        kubectl: With an administrator's rights.
        kube: The same, without the time that kubectl takes.
        audit: Everything that was asked of the API server.
        namespace: Of the resources.
        client: A pod there.
        across: Another one, on the other node.
    """

    kubectl: Kubectl
    kube: Kube
    audit: Audit
    namespace: str
    client: Pod
    across: Pod

    def ref(self, name: str = NAME) -> Ref:
        """A resource."""
        return Ref(kinds.SECURE_VLLM_DEPLOYMENT, self.namespace, name)

    def ready(self, name: str, **spec: Any) -> None:
        """Apply a resource and wait until it is Ready, and all its pods."""
        self.kube.apply(resource(self.namespace, name, **spec), force=True)
        eventually(lambda: self.kube.get(self.ref(name)).get("status"), 30)
        until_resource_ready(self.kubectl, self.namespace, name)

    def remove(self, name: str) -> None:
        """Delete a resource and wait until its engines are gone; gateways take their time to drain."""
        self.kube.delete(self.ref(name))
        label = f"app.kubernetes.io/instance={name},{ROLE_LABEL}=engine"
        eventually(lambda: not self.kube.list(kinds.POD, self.namespace, label), _PATIENCE)

    def pods(self, role: str, name: str = NAME) -> list[KubeObject]:
        """Pods of a role that are not about to go."""
        found = pods_of(self.kubectl, self.namespace, role)
        return [
            pod
            for pod in found
            if pod["metadata"]["labels"]["app.kubernetes.io/instance"] == name
            and not pod["metadata"].get("deletionTimestamp")
        ]


def lacking() -> str:
    """Why this cannot be measured here without a build; empty: it can."""
    return "" if nodes.at_once() else "it needs Linux, root, and what `make e2e-deps` builds"


def measure(_folder: Path) -> Iterator[Measured]:
    """Run everything on a cluster of its own; about ten minutes."""
    with running(progress=_tell, node_count=2) as cluster, closing(Kube(cluster.kubeconfig)) as kube:
        kubectl = cluster.kubectl
        images.load(cluster, _tell)
        here, there = workers(kubectl)[:2]
        advertise_gpus(kubectl, (here, there))
        install_operator(kubectl)
        with new_namespace(kubectl, "bench") as namespace:
            client, across = start_pods(kubectl, [(namespace, "client", here), (namespace, "across", there)])
            lab = Lab(kubectl, kube, Audit(cluster), namespace, client, across)
            yield from _policies(lab)
            lab.ready(NAME, replicas=2)
            yield from _gateway(lab)
            yield from _endpoints(lab)
            yield from _probe(lab)
            yield from _gate(lab)
            yield from _groups(lab)


def _tell(line: str) -> None:
    print(f"  {line}", flush=True)


# ------------------------------------------------------------------------------------------------------------ policies


def _policies(lab: Lab) -> Iterator[Measured]:
    target = f"{lab.client.ip}:{PORT}"
    body = policy(
        "deny", lab.namespace, {"policyTypes": ["Ingress"], "podSelector": {"matchLabels": {"app": "client"}}}
    )
    enforced, opened = [], []
    with _watching(lab.across, dials=[target]) as watcher:
        for _ in range(POLICIES):
            began = time.time()
            lab.kube.create(body)
            enforced.append((watcher.first(began, target, lambda answer: answer == "blocked") - began) * 1000)
            began = time.time()
            lab.kube.delete(Ref.of(body))
            opened.append((watcher.first(began, target, lambda answer: answer == "open") - began) * 1000)
    yield Measured("policy created → enforced", tuple(enforced), "ms")
    yield Measured("policy deleted → open again", tuple(opened), "ms")


# ------------------------------------------------------------------------------------------------------------- gateway


def _asks(lab: Lab) -> dict[str, Any]:
    """What all requests to the gateways have in common."""
    return {
        "host": f"{NAME}-gateway.{lab.namespace}.svc",
        "port": 8443,
        "authority": secret(lab.kubectl, lab.namespace, f"{NAME}-gateway-tls")["ca.crt"],
        "every": False,
        "pause": 0.02,
    }


def _request(method: str, path: str, key: str, **body: Any) -> dict[str, Any]:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    return {"method": method, "path": path, "headers": headers, "body": json.dumps(body) if method == "POST" else None}


def _chat(key: str, **more: Any) -> dict[str, Any]:
    return _request("POST", "/v1/chat/completions", key, messages=[{"role": "user", "content": "hi"}], **more)


def _gateway(lab: Lab) -> Iterator[Measured]:
    own = Ref(kinds.SECRET, lab.namespace, f"{NAME}-client-keys")
    key, second = secret(lab.kubectl, lab.namespace, own.name)["default"], "second-key-of-the-benchmark"
    encoded = base64.b64encode(second.encode()).decode()
    addresses = [pod["status"]["podIP"] for pod in lab.pods("gateway")]
    common = _asks(lab)
    asks, streams = [], []
    for address in addresses:
        at = common | {"address": address}
        asks.append(at | _request("POST", ROUTE["path"], key) | {"what": f"route {address}"})
        asks.append(at | _request("GET", "/v1/models", second) | {"what": f"key {address}"})
        asks.append(at | _chat(key) | {"what": f"load {address}", "every": True, "pause": 0.05})
        streams.append(at | _chat(key, stream=True, ignore_eos=True, max_tokens=TOKENS))
    since = time.time()
    with _watching(lab.client, asks=asks, streams=streams) as watcher:

        def took(change: Callable[[], object], what: str, wanted: Callable[[Any], bool]) -> float:
            began = time.time()
            change()
            last = max(watcher.first(began, f"{what} {address}", wanted) for address in addresses)
            time.sleep(0.5)
            return last - began

        def routes(*allowed: Mapping[str, str]) -> Callable[[], object]:
            return lambda: lab.kube.patch(lab.ref(), {"spec": {"gateway": {"routes": {"allow": [*allowed]}}}})

        def keys(value: str | None) -> Callable[[], object]:
            return lambda: lab.kube.patch(own, {"data": {"second": value}})

        for address in addresses:
            watcher.first(since, f"route {address}", lambda answer: answer == 403)
            watcher.first(since, f"key {address}", lambda answer: answer == 401)
        changes = []
        for _ in range(CHANGES):
            changes.append(took(routes(ROUTE), "route", lambda answer: answer not in {0, 403}))
            changes.append(took(routes(), "route", lambda answer: answer == 403))
        given, revoked = [], []
        for _ in range(KEYS):
            given.append(took(keys(encoded), "key", lambda answer: answer == 200))
            revoked.append(took(keys(None), "key", lambda answer: answer == 401))
        load, long = watcher.since(since, "ask", "load"), watcher.since(since, "stream")
    failed = [one for one in load if one["answer"] != 200]
    broken = [one for one in long if not one["answer"]]
    for one in (*failed, *broken)[:5]:
        _tell(f"failed: {one}")
    yield Measured("spec change → every gateway pod enforces it", tuple(changes), "s", 1.2, 2.5)
    yield Measured("key revoked → every gateway pod refuses it", tuple(revoked), "s", 1.2, 2.5)
    yield Measured("key added → every gateway pod takes it", tuple(given), "s")
    yield Measured(f"failed requests of {len(load)} meanwhile", (float(len(failed)),), "", 0)
    yield Measured(f"broken streams of {len(long)} meanwhile", (float(len(broken)),), "", 0)


# ----------------------------------------------------------------------------------------------------------- endpoints


def _endpoints(lab: Lab) -> Iterator[Measured]:
    key = secret(lab.kubectl, lab.namespace, f"{NAME}-client-keys")["default"]
    common = _asks(lab)
    asks = [
        common | _chat(key) | {"address": address, "what": "load", "every": True}
        for address in (pod["status"]["podIP"] for pod in lab.pods("gateway"))
    ]
    since, last = time.time(), []
    with _watching(lab.client, asks=asks) as watcher:
        for _ in range(ENDPOINTS):
            victim = lab.pods("engine")[0]["metadata"]["name"]
            began = time.time()

            def by_victim(moment: float, victim: str = victim) -> list[float]:
                return [one["at"] for one in watcher.since(moment, "ask") if one["by"] == victim]

            eventually(lambda moment=began, seen=by_victim: seen(moment), _PATIENCE)  # type: ignore[misc]
            began = time.time()
            lab.kube.delete(Ref(kinds.POD, lab.namespace, victim))
            eventually(lambda name=victim: lab.kube.find(Ref(kinds.POD, lab.namespace, name)) is None, _PATIENCE)  # type: ignore[misc]
            last.append(max((at - began for at in by_victim(began)), default=0.0))
            eventually(lambda: _engines_ready(lab, 2), _PATIENCE)
        load = watcher.since(since, "ask")
    failed = [one for one in load if one["answer"] != 200]
    for one in failed[:5]:
        _tell(f"failed: {one}")
    yield Measured("engine pod deleted → the last request to it", tuple(last), "s")
    yield Measured(f"failed requests of {len(load)} meanwhile", (float(len(failed)),), "", 0)


def _engines_ready(lab: Lab, count: int) -> bool:
    return sum(bool(condition(pod, "Ready")) for pod in lab.pods("engine")) == count


# --------------------------------------------------------------------------------------------------------------- probe


@dataclass(frozen=True)
class _Cost:
    """Counters of the operator: processor seconds, connections that were tried, complete rounds."""

    cpu: float
    connections: float
    complete: float


def _cost(lab: Lab) -> _Cost:
    [pod] = [
        pod["metadata"]["name"]
        for pod in lab.kubectl.get(f"--namespace={OPERATOR}", "pods")["items"]
        if _leads(_metrics(lab, pod["metadata"]["name"]))
    ]
    text = _metrics(lab, pod)

    def total(pattern: str) -> float:
        return sum(float(value) for value in re.findall(rf"^{pattern} (\S+)$", text, re.MULTILINE))

    return _Cost(
        total("process_cpu_seconds_total"),
        total(r"securevllm_probe_connections_total\{.*\}"),
        total(r'securevllm_probe_round_duration_seconds_count\{tier="complete"\}'),
    )


def _leads(metrics: str) -> bool:
    return re.search(r"^securevllm_leader 1(\.0)?$", metrics, re.MULTILINE) is not None


def _metrics(lab: Lab, pod: str) -> str:
    ask = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/metrics', timeout=10).read().decode())"
    return lab.kubectl("exec", f"--namespace={OPERATOR}", pod, "--", "python", "-c", ask)


def _probe(lab: Lab) -> Iterator[Measured]:
    eventually(lambda: condition(lab.kube.get(lab.ref()), "Isolated"), _PATIENCE)
    before, began = _cost(lab), time.monotonic()
    time.sleep(IDLE)
    idle, seconds = _cost(lab), time.monotonic() - began
    # Reading the metrics costs something, too; it is in both times.
    per_second = (idle.cpu - before.cpu) / seconds
    cpu, connections, took = [], [], []
    for number in range(ROUNDS):
        before, began = _cost(lab), time.monotonic()
        lab.kube.patch(lab.ref(), {"metadata": {"annotations": {"securevllm.io/verify-at": str(number)}}})
        after = _awaited(lambda done=before.complete: _later(_cost(lab), done), 0.5)  # type: ignore[misc]
        took.append(time.monotonic() - began)
        rounds = after.complete - before.complete
        cpu.append((after.cpu - before.cpu - per_second * took[-1]) / rounds * 1000)
        connections.append((after.connections - before.connections) / rounds)
    yield Measured("operator idle, one resource with cheap rounds", (per_second * 1000,), "ms of CPU per s")
    yield Measured("complete round: operator's processor time", tuple(cpu), "ms")
    yield Measured("complete round: operator's connections", tuple(connections), "")
    yield Measured("verify-at → measured", tuple(took), "s")


def _later(cost: _Cost, complete: float) -> _Cost | None:
    return cost if cost.complete > complete else None


# ---------------------------------------------------------------------------------------------------------------- gate


@dataclass(frozen=True)
class _Start:
    """One start of an engine's pod: its name, the first line of the engine's log, what the gate said of itself."""

    pod: str
    first: str
    gate: float | None


def _gate(lab: Lab) -> Iterator[Measured]:
    lab.remove(NAME)
    gated, looked = _engine_starts(lab, "with-gate")
    without, _ = _engine_starts(lab, "no-gate", security={"gate": {"disabled": "the benchmark compares"}})
    middle = sorted(without)[len(without) // 2]
    yield Measured("pod scheduled → engine starts, without gate", without, "s")
    yield Measured("pod scheduled → engine starts, with gate", gated, "s")
    yield Measured("added by the gate", tuple(one - middle for one in gated), "s", 2.0, 2.0)
    yield Measured("of that: the gate looks", looked, "s")


def _engine_starts(lab: Lab, name: str, **spec: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Seconds from the scheduling of an engine's pod to the first line of its log; and how long the gate looked."""
    lab.ready(name, engine={"terminationGracePeriod": "1s"}, **spec)
    since, starts = now(), []
    for _ in range(STARTS):
        [old] = lab.pods("engine", name)
        lab.kube.delete(Ref(kinds.POD, lab.namespace, old["metadata"]["name"]), gracePeriodSeconds=0)
        starts.append(_awaited(lambda uid=old["metadata"]["uid"]: _start(lab, name, uid), 0.2))  # type: ignore[misc]
    bound = {r.name: r.began for r in lab.audit.requests(since, namespace=lab.namespace) if r.subresource == "binding"}
    lab.remove(name)
    took = tuple((_moment(one.first) - _moment(bound[one.pod])).total_seconds() for one in starts)
    return took, tuple(one.gate for one in starts if one.gate is not None)


def _start(lab: Lab, name: str, uid: str) -> _Start | None:
    """Look at the pod that came after one, once it is ready."""
    found = [pod for pod in lab.pods("engine", name) if pod["metadata"]["uid"] != uid and condition(pod, "Ready")]
    if not found:
        return None
    pod = str(found[0]["metadata"]["name"])
    logs = ("logs", f"--namespace={lab.namespace}", pod)
    first = lab.kubectl(*logs, "--container=vllm", "--timestamps").split()[0]
    if not any(one["name"] == GATE for one in found[0]["spec"].get("initContainers", ())):
        return _Start(pod, first, None)
    said = re.search(r"isolated after (\S+) s", lab.kubectl(*logs, f"--container={GATE}"))
    return _Start(pod, first, float(said[1]) if said else None)


def _moment(text: str) -> datetime:
    """Read a time with up to nine digits behind the point."""
    return datetime.fromisoformat(re.sub(r"(\.\d{6})\d+", r"\1", text))


# --------------------------------------------------------------------------------------------------------------- groups


def _groups(lab: Lab) -> Iterator[Measured]:
    lab.ready("group", parallelism={"tensor": 2, "nodes": 2}, engine={"terminationGracePeriod": "1s"})
    took = []
    for number in range(GROUPS):
        pods = sorted(_members(lab), key=lambda pod: str(pod["metadata"]["name"]))
        victim, uids = pods[number % len(pods)], {pod["metadata"]["uid"] for pod in pods}
        began = time.monotonic()
        lab.kube.delete(Ref(kinds.POD, lab.namespace, victim["metadata"]["name"]), gracePeriodSeconds=0)
        eventually(lambda old=uids: _whole_again(lab, old), _PATIENCE, pause=0.2)  # type: ignore[misc]
        took.append(time.monotonic() - began)
    yield Measured("pod of a group lost → the group serves again", tuple(took), "s")


def _members(lab: Lab) -> list[KubeObject]:
    pods = lab.kube.list(kinds.POD, lab.namespace, GROUP_LABEL)
    return [pod for pod in pods if not pod["metadata"].get("deletionTimestamp")]


def _whole_again(lab: Lab, old: set[str]) -> bool:
    pods = _members(lab)
    fresh = [pod for pod in pods if pod["metadata"]["uid"] not in old and condition(pod, "Ready")]
    return len(fresh) == len(pods) == len(old) and bool(condition(lab.kube.get(lab.ref("group")), "Ready"))
