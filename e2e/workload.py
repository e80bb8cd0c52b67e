"""Namespaces, pods and policies of the tests on a cluster with nodes, and what happened to them."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeVar

from e2e import images
from e2e.cluster.errors import TooLate
from e2e.cluster.kubectl import Kubectl, KubectlError, kustomize
from securevllm.render.meta import RESOURCE_LABEL

T = TypeVar("T")

OPERATOR = "secure-vllm-operator"
GPU = "nvidia.com/gpu"
GPUS = "96"
"""Of each node: every topology of the samples fits, side by side."""
PORT = 8080
"""On which the tests' own pods listen."""
SIDE_PORT = 7070
"""Of a container that was added to a pod: it has to do something."""

_REQUEST = """\
import json, ssl, sys, urllib.error, urllib.request
url, method, authority, headers, body = json.loads(sys.argv[1])
request = urllib.request.Request(url, method=method, headers=headers, data=body and body.encode())
try:
    answer = urllib.request.urlopen(request, timeout=100, context=ssl.create_default_context(cadata=authority))
except urllib.error.HTTPError as error:
    answer = error
print(json.dumps([answer.status, answer.read().decode()]))
"""


class Waiter(Protocol):
    """Waits as `until` does, and may tell a person meanwhile."""

    def __call__(self, look: Callable[[], T | None], what: str, /) -> T:
        """Look until something is there, and return it."""


@dataclass(frozen=True)
class Pod:
    """A pod of the tests' own: it listens on `PORT`, and can look what it reaches.

    Attributes:
        kubectl: Of the cluster.
        namespace: Where it is.
        name: Its name.
        ips: Its addresses, one of each family.
        container: In which programs run; empty: the first. It needs Python and `reach`.
    """

    kubectl: Kubectl
    namespace: str
    name: str
    ips: tuple[str, ...]
    container: str = ""

    @property
    def ip(self) -> str:
        """Its address, where one is asked for."""
        return self.ips[0]

    def reach(self, targets: Iterable[str], seconds: float = 2.0) -> dict[str, str]:
        """Connect to each `ADDRESS:PORT` once; see `reach` for the answers."""
        said = self.run("python", "-m", "reach", f"--timeout={seconds}", *targets)
        found: dict[str, str] = json.loads(said)
        return found

    def request(
        self, url: str, authority: str, *, method: str = "GET", headers: dict[str, str] | None = None, body: Any = None
    ) -> tuple[int, str]:
        """Send an HTTPS request that trusts `authority` (PEM) alone; return status and body."""
        content = {"Content-Type": "application/json"} if body is not None else {}
        encoded = json.dumps(body) if body is not None else None
        argument = json.dumps([url, method, authority, {**content, **(headers or {})}, encoded])
        status, text = json.loads(self.run("python", "-c", _REQUEST, argument))
        return status, text

    def run(self, *command: str) -> str:
        """Run a program in the pod and return what it prints."""
        return self.kubectl(*self.exec_arguments(), "--", *command)

    def listening(self) -> list[tuple[str, int]]:
        """Address and port of each TCP socket in the pod that others could reach; see `reach`."""
        return [(address, port) for address, port in json.loads(self.run("python", "-m", "reach", "--listening"))]

    def exec_arguments(self, *options: str) -> list[str]:
        """Arguments of kubectl that run a program in the pod, up to the `--` before it."""
        container = [f"--container={self.container}"] if self.container else []
        return ["exec", f"--namespace={self.namespace}", self.name, *container, *options]


def addresses(pod: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the addresses of a pod (its object), one of each family."""
    return tuple(one["ip"] for one in pod["status"].get("podIPs") or ())


def at(address: str, port: int) -> str:
    """Write `ADDRESS:PORT`, an IPv6 address in brackets."""
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


ALLOW_INGRESS: dict[str, Any] = {"policyTypes": ["Ingress"], "podSelector": {}, "ingress": [{}]}
"""Opens every pod of a namespace to everybody."""

OPEN_EVERYTHING: dict[str, Any] = {
    "podSelector": {"matchExpressions": [{"key": RESOURCE_LABEL, "operator": "Exists"}]},
    "policyTypes": ["Ingress", "Egress"],
    "ingress": [{}],
    "egress": [{}],
}
"""Opens every pod of ours to everybody, and lets it reach everything: what is blocked without it has to be open."""


def until(look: Callable[[], T | None], what: str, seconds: float = 120.0) -> T:
    """Look until something is there.

    Raises:
        TooLate: Not within `seconds`; with the last error of kubectl, if that was the reason.
    """
    deadline = time.monotonic() + seconds
    while True:
        refused = ""
        try:
            found = look()
        except KubectlError as error:
            found, refused = None, f": {error}"
        if found is not None and found is not False:
            return found
        if time.monotonic() > deadline:
            raise TooLate(f"not seen within {seconds:.0f} s: {what}{refused}")
        time.sleep(0.2)


@contextmanager
def opened(kubectl: Kubectl, namespace: str, look: Callable[[], bool]) -> Iterator[None]:
    """Open all pods of ours in a namespace, shut again at the end; `look` tells whether it is enforced by now."""
    apply(kubectl, policy("open-everything", namespace, OPEN_EVERYTHING))
    try:
        until(look, "the policy that opens everything is enforced", seconds=300)
        yield
    finally:
        kubectl("delete", f"--namespace={namespace}", "networkpolicy", "open-everything")
        until(lambda: not look(), "everything is shut again", seconds=300)


def reach_all(wanted: Mapping[Pod, Sequence[str]]) -> dict[Pod, dict[str, str]]:
    """Let pods connect to their targets, all at the same time; see `Pod.reach`."""
    with ThreadPoolExecutor(max_workers=max(len(wanted), 1)) as pool:
        found = pool.map(lambda item: item[0].reach(item[1]), wanted.items())
        return dict(zip(wanted, found, strict=True))


@dataclass
class Cells:
    """What was tried, what had to come of it and what did: the artefact of a test.

    Attributes:
        file: Where the table is kept.
    """

    file: Path
    _rows: list[tuple[str, str, str, str, str]] = field(default_factory=list)

    def check(self, scene: str, expected: Mapping[Pod, Mapping[str, str]]) -> None:
        """Let pods connect to their targets, and add a row for each: target -> what has to come of it."""
        found = reach_all({pod: list(targets) for pod, targets in expected.items()})
        for pod, targets in expected.items():
            for target, wanted in targets.items():
                self._rows.append((scene, f"{pod.namespace}/{pod.name}", target, wanted, found[pod][target]))

    def write(self) -> None:
        """Keep the table as text."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text("\n".join(self._lines()) + "\n", encoding="utf-8")

    def check_all(self) -> None:
        """Fail with every cell that is not as it had to be.

        Raises:
            AssertionError: There are some, or there is none at all.
        """
        wrong = [line for line, row in zip(self._lines()[1:], self._rows, strict=True) if row[3] != row[4]]
        if wrong or not self._rows:
            raise AssertionError(
                "\n".join([f"{len(wrong)} of {len(self._rows)} cells, all of them in {self.file}", *wrong])
            )

    def _lines(self) -> list[str]:
        rows = [("scene", "from", "to", "expected", "found"), *self._rows]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]


@contextmanager
def new_namespace(kubectl: Kubectl, prefix: str = "test", **labels: str) -> Iterator[str]:
    """Give a namespace with a fresh name: one that is still terminating gives odd network results."""
    name = f"{prefix}-{secrets.token_hex(3)}"
    kubectl("create", "namespace", name)
    if labels:
        kubectl("label", "namespace", name, *(f"{key}={value}" for key, value in labels.items()))
    try:
        yield name
    finally:
        kubectl("delete", "namespace", name, "--wait=false")


def engines_of(kubectl: Kubectl, namespace: str, name: str) -> list[dict[str, Any]]:
    """Return the pods of a resource that run vLLM behind one API: heads first, then the others of their groups."""
    pods = [pod for role in ("engine", "engine-worker") for pod in pods_of(kubectl, namespace, role)]
    return [pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/instance"] == name]


def started(pod: dict[str, Any]) -> bool:
    """Whether the engine's own container runs or ever ran."""
    statuses = pod["status"].get("containerStatuses") or ()
    return any({"running", "terminated"} & {*one["state"], *one.get("lastState", {})} for one in statuses)


def start_pods(
    kubectl: Kubectl,
    wanted: Sequence[tuple[str, str, str]],
    wait: Waiter = until,
    *,
    port: int = PORT,
    host_network: bool = False,
    labels: Mapping[str, str] | None = None,
    cpu: str = "",
) -> list[Pod]:
    """Start pods, each given as namespace, name and node, and return them when all are ready.

    Args:
        kubectl: Of the cluster.
        wanted: Namespace, name and node of each; the label `app` is the name.
        wait: Tells what is waited for.
        port: On which they listen.
        host_network: Whether they share the network of their node.
        labels: More labels.
        cpu: What each asks for; without it, it gets what all others leave.
    """
    pods = [_pod(*one, port, labels or {}) for one in wanted]
    for pod in pods:
        pod["spec"]["hostNetwork"] = host_network
        if cpu:
            pod["spec"]["containers"][0]["resources"] = {"requests": {"cpu": cpu}}
    kubectl("apply", "--filename=-", stdin=_list(pods))
    return [_ready_pod(kubectl, namespace, name, wait) for namespace, name, _ in wanted]


def add_reach(kubectl: Kubectl, namespace: str, pod: dict[str, Any]) -> Pod:
    """Add a container with Python and `reach` to a running pod that has none (gateways), and return when it runs."""
    name = pod["metadata"]["name"]
    container = {
        "name": "reach",
        "image": images.ATTACKER,
        "args": [f"--serve={SIDE_PORT}"],
        "securityContext": {"runAsUser": 65532, "runAsNonRoot": True},
    }
    patch = json.dumps({"spec": {"ephemeralContainers": [container]}})
    kubectl("patch", f"--namespace={namespace}", "pod", name, "--subresource=ephemeralcontainers", f"--patch={patch}")

    def runs() -> bool | None:
        status = kubectl.get(f"--namespace={namespace}", "pod", name)["status"]
        states = [one["state"] for one in status.get("ephemeralContainerStatuses") or ()]
        return any("running" in state for state in states) or None

    until(runs, f"the added container of {name} runs")
    return Pod(kubectl, namespace, name, addresses(pod), "reach")


def policy(name: str, namespace: str, spec: dict[str, Any]) -> dict[str, Any]:
    """Make a NetworkPolicy."""
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": metadata, "spec": spec}


def apply(kubectl: Kubectl, *objects: dict[str, Any]) -> None:
    """Apply objects, server-side."""
    kubectl("apply", "--server-side", "--filename=-", stdin=_list(list(objects)))


def workers(kubectl: Kubectl) -> list[str]:
    """Name the nodes that run pods."""
    nodes = kubectl.get("nodes")["items"]
    return [node["metadata"]["name"] for node in nodes if not node["spec"].get("taints")]


def advertise_gpus(kubectl: Kubectl, nodes: Iterable[str]) -> None:
    """Let nodes say that they have GPUs: the scheduler asks no more, and a stand-in needs none."""
    for node in nodes:
        capacity = json.dumps({"status": {"capacity": {GPU: GPUS}}})
        kubectl("patch", "node", node, "--subresource=status", "--type=merge", f"--patch={capacity}")


def install_operator(kubectl: Kubectl, wait: Waiter = until, *, as_pods: bool = True) -> None:
    """Apply `manifests/install` and return when the operator is available.

    Args:
        kubectl: With an administrator's rights.
        wait: Tells what is waited for.
        as_pods: Otherwise the Deployment is left out: there are no nodes, and somebody runs the operator by hand.
    """
    objects = kustomize(images.ROOT / "manifests" / "install")
    if not as_pods:
        objects = [item for item in objects if item["kind"] != "Deployment"]
    first = [item for item in objects if item["kind"] in {"Namespace", "CustomResourceDefinition"}]
    apply(kubectl, *first)
    for item in first:
        if item["kind"] == "CustomResourceDefinition":
            _until_condition(kubectl, wait, "Established", "crd", item["metadata"]["name"])
    apply(kubectl, *[item for item in objects if item not in first])
    if as_pods:
        _until_condition(kubectl, wait, "Available", f"--namespace={OPERATOR}", "deployment", OPERATOR)


def condition(item: dict[str, Any], kind: str) -> bool | None:
    """Tell whether a condition of this type is True; None where it is not."""
    conditions = item.get("status", {}).get("conditions") or ()  # null in a definition of this moment
    return any(one["type"] == kind and one["status"] == "True" for one in conditions) or None


def until_resource_ready(
    kubectl: Kubectl, namespace: str, name: str, seconds: float = 240.0, *, kind: str = "Ready"
) -> None:
    """Wait until a SecureVLLMDeployment is Ready, or has another condition.

    Raises:
        TooLate: With every condition and its message.
    """
    what = "securevllmdeployment"
    try:
        _wait(kubectl, namespace, kind, [f"{what}/{name}"], seconds)
    except TooLate as error:
        found = kubectl.get(f"--namespace={namespace}", what, name).get("status", {}).get("conditions") or ()
        lines = [f"{one['type']} {one['status']} {one['reason']}: {one['message']}" for one in found]
        raise TooLate("\n".join([str(error), *lines])) from error


def secret(kubectl: Kubectl, namespace: str, name: str) -> dict[str, str]:
    """Read the data of a Secret, decoded."""
    data: dict[str, str] = kubectl.get(f"--namespace={namespace}", "secret", name)["data"]
    return {key: base64.b64decode(value).decode() for key, value in data.items()}


def api_service(kubectl: Kubectl) -> str:
    """Address and port of the API server's Service, as pods find it."""
    spec = kubectl.get("--namespace=default", "service", "kubernetes")["spec"]
    return f"{spec['clusterIP']}:{spec['ports'][0]['port']}"


def pods_of(kubectl: Kubectl, namespace: str, role: str) -> list[dict[str, Any]]:
    """Return the pods of a role, of every resource in a namespace."""
    answer = kubectl.get(f"--namespace={namespace}", "pods", f"--selector=securevllm.io/role={role}")
    items: list[dict[str, Any]] = answer["items"]
    return items


def _until_condition(kubectl: Kubectl, wait: Waiter, kind: str, *what: str) -> None:
    wait(lambda: condition(kubectl.get(*what), kind), f"{' '.join(what)} is {kind}")


def _ready_pod(kubectl: Kubectl, namespace: str, name: str, wait: Waiter) -> Pod:
    def look() -> Pod | None:
        item = kubectl.get(f"--namespace={namespace}", "pod", name)
        return Pod(kubectl, namespace, name, addresses(item)) if condition(item, "Ready") else None

    return wait(look, f"pod {namespace}/{name} is ready")


def _wait(kubectl: Kubectl, namespace: str, kind: str, objects: Sequence[str], seconds: float = 120.0) -> None:
    """Wait for a condition by a watch: asking again and again would take from what is waited for.

    Raises:
        TooLate: With the words of kubectl.
    """
    arguments = [f"--namespace={namespace}", f"--for=condition={kind}", f"--timeout={seconds:.0f}s"]
    try:
        kubectl("wait", *arguments, *objects, timeout=seconds + 60)
    except KubectlError as error:
        raise TooLate(str(error)) from error


def _pod(namespace: str, name: str, node: str, port: int, labels: Mapping[str, str]) -> dict[str, Any]:
    container = {
        "name": "reach",
        "image": images.ATTACKER,
        "args": [f"--serve={port}"],
        "ports": [{"containerPort": port}],
        "readinessProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1},
    }
    spec = {"nodeName": node, "terminationGracePeriodSeconds": 0, "containers": [container]}
    metadata = {"name": name, "namespace": namespace, "labels": {"app": name, **labels}}
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": spec}


def _list(objects: list[dict[str, Any]]) -> str:
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": objects})
