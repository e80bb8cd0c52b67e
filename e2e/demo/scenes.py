"""What both demos show: a resource, what becomes of it, requests to its gateway."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import yaml

from e2e import images
from e2e.demo.tell import DemoError, Table
from e2e.workload import pods_of, secret
from securevllm.render.meta import DENY_NAME

if TYPE_CHECKING:
    from e2e.cluster.kubectl import Kubectl
    from e2e.demo.tell import Teller

NAMESPACE = "demo"
SAMPLE = images.QUICKSTART.relative_to(images.ROOT)
CHAT = "/v1/chat/completions"

_KINDS = "netpol,deploy,job,svc,cm,secret,sa,pdb,pvc"


@dataclass(frozen=True)
class Service:
    """The resource of the demo.

    Attributes:
        kubectl: Of the cluster, with an administrator's rights.
        namespace: Where it is.
        name: Its name.
    """

    kubectl: Kubectl
    namespace: str
    name: str

    @property
    def host(self) -> str:
        """Name of the gateway's Service."""
        return f"{self.name}-gateway.{self.namespace}.svc"

    def resource(self) -> dict[str, Any]:
        """Read the resource."""
        return self.kubectl.get(f"--namespace={self.namespace}", "svllm", self.name)

    def key(self) -> str:
        """Read the client key that was made for it."""
        return next(iter(secret(self.kubectl, self.namespace, f"{self.name}-client-keys").values()))

    def authority(self) -> str:
        """Read the authority of the gateway's certificate, in PEM."""
        return secret(self.kubectl, self.namespace, f"{self.name}-gateway-tls")["ca.crt"]

    def address(self, role: str) -> str:
        """Address of a pod of this role."""
        pods = pods_of(self.kubectl, self.namespace, role)
        mine = [pod for pod in pods if pod["metadata"]["labels"]["app.kubernetes.io/instance"] == self.name]
        return str(mine[0]["status"]["podIP"])


def apply_sample(kubectl: Kubectl, tell: Teller, namespace: str = NAMESPACE) -> Service:
    """Apply the quickstart, unchanged, to a namespace that is there."""
    tell.step(f"kubectl apply -f {SAMPLE}")
    manifest = images.QUICKSTART.read_text(encoding="utf-8")
    tell.text(manifest)
    kubectl(f"--namespace={namespace}", "apply", f"--filename={images.QUICKSTART}")
    return Service(kubectl, namespace, yaml.safe_load(manifest)["metadata"]["name"])


class Conditions:
    """Tells every turn of a condition, once.

    Args:
        service: Whose.
        tell: Where to.
    """

    def __init__(self, service: Service, tell: Teller) -> None:
        self._service, self._tell = service, tell
        self._seen: dict[str, tuple[str, str]] = {}

    def look(self) -> Mapping[str, tuple[str, str]]:
        """Read and tell; condition type -> status and reason."""
        for condition in self._service.resource().get("status", {}).get("conditions", ()):
            kind, state = condition["type"], (condition["status"], condition["reason"])
            if self._seen.get(kind) != state:
                self._seen[kind] = state
                self._tell.line(f"{kind:<13} {state[0]:<8} {state[1]:<22} {condition['message'][:90]}")
        return self._seen

    def until(self, kind: str, status: str) -> None:
        """Wait for a status of a condition.

        Raises:
            DemoError: Not in time.
        """
        what = f"{self._service.name} is {kind}" if status == "True" else f"{kind} of {self._service.name} is {status}"
        self._tell.until(lambda: self.look().get(kind, ("", ""))[0] == status or None, what)


def tree(service: Service, tell: Teller) -> None:
    """Show what the operator made of the resource."""
    tell.step("What the operator made of it")
    here = f"--namespace={service.namespace}"
    tell.text(service.kubectl(here, "get", "svllm"))
    uid = service.resource()["metadata"]["uid"]
    objects = service.kubectl.get(here, _KINDS)["items"]
    owned = [item for item in objects if any(r["uid"] == uid for r in item["metadata"].get("ownerReferences", ()))]
    shared = [item for item in objects if item["metadata"]["name"] == DENY_NAME]
    pods = service.kubectl.get(here, "pods", "--selector=securevllm.io/resource")["items"]
    lines = [f"SecureVLLMDeployment/{service.name}"]
    lines += [f"├─ {item['kind']}/{item['metadata']['name']}" for item in owned]
    lines += [
        f"│  └─ Pod/{pod['metadata']['name']} {pod['status'].get('phase')} {pod['status'].get('podIP', '')}"
        f" {pod['spec'].get('nodeName', '')}"
        for pod in pods
    ]
    lines += [f"(namespace) {item['kind']}/{item['metadata']['name']}: outlives every pod" for item in shared]
    tell.text("\n".join(lines))


@dataclass(frozen=True)
class Attempt:
    """One request to the gateway, and what has to come of it."""

    what: str
    method: str
    path: str
    key: str | None
    expected: int
    stream: bool = False

    @property
    def headers(self) -> dict[str, str]:
        """Headers of the request."""
        return {"Authorization": f"Bearer {self.key}"} if self.key is not None else {}

    @property
    def body(self) -> dict[str, Any] | None:
        """JSON of the request, if it has any."""
        if self.method != "POST":
            return None
        asked: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}]}
        return asked | {"stream": True} if self.stream else asked


Ask = Callable[[Attempt], tuple[int, str]]
"""Sends a request to the gateway, trusting its authority alone; status and body."""


def requests(service: Service, tell: Teller, ask: Ask, whence: str) -> None:
    """Send six requests.

    Raises:
        DemoError: One was not answered as it has to be.
    """
    tell.step(f"Six requests to the gateway, {whence}")
    key = service.key()
    attempts = (
        Attempt("allowed, with key", "POST", CHAT, key, 200),
        Attempt("the same, streaming", "POST", CHAT, key, 200, stream=True),
        Attempt("allowed, without key", "POST", CHAT, None, 401),
        Attempt("allowed, wrong key", "POST", CHAT, "not-the-key-that-was-made", 401),
        Attempt("forbidden route", "POST", "/invocations", key, 403),
        Attempt("forbidden method", "DELETE", "/v1/models", key, 403),
    )
    table = Table(("", "request", "answer"))
    for attempt in attempts:
        status, body = ask(attempt)
        said = streamed(body) if attempt.stream else body.replace("\n", " ")
        row = (attempt.what, f"{attempt.method} {attempt.path}", f"{status}  {said[:70]}")
        table.add(row, found=status, expected=attempt.expected)
    table.show(tell)


def streamed(body: str) -> str:
    """Sum up server-sent events."""
    events = [line.removeprefix("data: ") for line in body.splitlines() if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise DemoError(f"the stream does not end with [DONE]: {body[-200:]!r}")
    chunks = [json.loads(event) for event in events[:-1]]
    text = "".join(choice["delta"].get("content", "") for chunk in chunks for choice in chunk["choices"])
    return f"{len(events)} events: {text}"


def policy_deleted(service: Service, tell: Teller) -> None:
    """Delete a policy, as anybody with the right may, and wait until it is back.

    Raises:
        DemoError: It does not come back.
    """
    name = f"{service.name}-engine"
    tell.step(f"kubectl delete networkpolicy {name}")
    place = (f"--namespace={service.namespace}", "networkpolicy", name)
    before = service.kubectl.get(*place)["metadata"]["uid"]
    service.kubectl("delete", *place)
    gone = time.monotonic()
    tell.until(lambda: service.kubectl.get(*place)["metadata"]["uid"] != before or None, f"{name} is back")
    tell.line(f"{name} is back, less than {time.monotonic() - gone:.1f} s later; the default-deny stood meanwhile")
