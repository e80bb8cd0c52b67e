"""What the operator made, set against what ``securevllm render`` prints."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

from securevllm.api.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    JOB,
    KINDS,
    NETWORK_POLICY,
    PERSISTENT_VOLUME_CLAIM,
    POD_DISRUPTION_BUDGET,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    STATEFUL_SET,
    KubeObject,
    Ref,
)
from tests.api.operator_process import ROOT

if TYPE_CHECKING:
    from tests.api.kube import Kube

OURS = "app.kubernetes.io/managed-by=securevllm-operator"
DENY = "securevllm-default-deny"
CHILD_KINDS = (
    NETWORK_POLICY,
    SECRET,
    SERVICE_ACCOUNT,
    CONFIG_MAP,
    SERVICE,
    POD_DISRUPTION_BUDGET,
    PERSISTENT_VOLUME_CLAIM,
    JOB,
    DEPLOYMENT,
    STATEFUL_SET,
)
_SERVER_METADATA = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields", "namespace")
_ALLOCATED = ("clusterIP", "clusterIPs", "healthCheckNodePort")
_NOTES = "deployment.kubernetes.io/"


def children(kube: Kube, namespace: str) -> dict[Ref, KubeObject]:
    """Everything in a namespace that carries the operator's label, without what controllers make of it."""
    return {Ref.of(obj): obj for kind in CHILD_KINDS for obj in kube.list(kind, namespace, OURS)}


def everything(kube: Kube, namespace: str) -> set[Ref]:
    """Everything in a namespace but what Kubernetes puts into each one, and Events."""
    found = {Ref.of(obj) for kind in KINDS if kind.namespaced for obj in kube.list(kind, namespace)}
    given = {Ref(CONFIG_MAP, namespace, "kube-root-ca.crt"), Ref(SERVICE_ACCOUNT, namespace, "default")}
    return {ref for ref in found - given if ref.kind.kind != "Event"}


def rendered(resource: KubeObject, *arguments: str) -> dict[Ref, KubeObject]:
    """What ``securevllm render`` prints for a live resource."""
    command = [sys.executable, "-m", "securevllm", "render", "-f", "-", "-o", "json"]
    command += ["--uid", resource["metadata"]["uid"], *arguments]
    printed = subprocess.run(  # noqa: S603 - fixed arguments
        command,
        input=json.dumps(resource),
        check=True,
        capture_output=True,
        text=True,
        env={"PYTHONPATH": str(ROOT / "operator")},
    )
    return {Ref.of(obj): obj for obj in map(json.loads, printed.stdout.splitlines())}


def defaulted(kube: Kube, obj: KubeObject, namespace: str) -> KubeObject:
    """The object as the API server would store it, without what it allocates (a dry run in another namespace)."""
    body = obj | {"metadata": obj["metadata"] | {"namespace": namespace}}
    return bare(kube.request("POST", Ref.of(body).kind.path(namespace), body, query={"dryRun": "All"}))


def bare(live: KubeObject) -> KubeObject:
    """What somebody wrote: no status, nothing that the API server or a controller fills in."""
    obj = copy.deepcopy({key: value for key, value in live.items() if key != "status"})
    for name in _SERVER_METADATA:
        obj["metadata"].pop(name, None)
    notes = obj["metadata"].get("annotations", {})
    obj["metadata"]["annotations"] = {key: value for key, value in notes.items() if not key.startswith(_NOTES)}
    if obj["kind"] == SERVICE.kind and obj["spec"].get("clusterIP") != "None":
        for name in _ALLOCATED:
            obj["spec"].pop(name, None)
    return obj


def versions(objects: dict[Ref, KubeObject]) -> dict[Ref, tuple[str, Any]]:
    """Uid and what was written: equal when nobody wrote. A resourceVersion also moves with each status."""
    return {ref: (obj["metadata"]["uid"], bare(obj)) for ref, obj in objects.items()}
