"""What every pod has in common: the *restricted* Pod Security Standard, no token, nothing writable but emptyDirs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.fields import Model
    from securevllm.render.meta import Object, Owner

# Meshes would put a proxy into the pod that policies and the gateway know nothing of.
MESH_OPT_OUT_LABELS = {"sidecar.istio.io/inject": "false"}
MESH_OPT_OUT_ANNOTATIONS = {"linkerd.io/inject": "disabled", "sidecar.istio.io/inject": "false"}

# The official image has this user prepared, with group 0 (vLLM 0.33.0: docker/Dockerfile).
VLLM_USER, VLLM_GROUP = 2000, 0
HOME = "/home/vllm"

CONTAINER_SECURITY = {
    "allowPrivilegeEscalation": False,
    "capabilities": {"drop": ["ALL"]},
    "readOnlyRootFilesystem": True,
}


def service_account(owner: Owner, role: str) -> Object:
    """An identity without rights and without a token."""
    return owner.object("v1", "ServiceAccount", role, role, automountServiceAccountToken=False)


def template(
    owner: Owner,
    role: str,
    *,
    user: int,
    group: int,
    pod: dict[str, Any],
    labels: dict[str, str] | None = None,
    annotations: dict[str, str] | None = None,
) -> Object:
    """A pod template.

    Args:
        owner: the resource.
        role: whose pods these are.
        user: numeric user id, not 0.
        group: numeric group id; also owns the volumes.
        pod: the fields of the pod's spec that are the role's own.
        labels: further labels; the operator's own win.
        annotations: further annotations; the operator's own win.
    """
    return {
        "metadata": {
            "labels": {**(labels or {}), **MESH_OPT_OUT_LABELS, **owner.pod_labels(role)},
            "annotations": {**(annotations or {}), **MESH_OPT_OUT_ANNOTATIONS},
        },
        "spec": {
            "serviceAccountName": owner.child(role),
            "automountServiceAccountToken": False,
            # A Service called vllm would inject VLLM_PORT=tcp://..., on which vLLM stops.
            "enableServiceLinks": False,
            "securityContext": security(user, group),
            **pod,
        },
    }


def security(user: int, group: int) -> dict[str, Any]:
    """A pod's security context: what the restricted standard asks of it."""
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": group,
        "fsGroup": group,
        # Without it kubelet changes the owner of every file of a model volume at every start.
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def empty_dir(name: str, *, memory: str | int | None = None) -> dict[str, Any]:
    """A scratch volume, on disk or in memory."""
    return {"name": name, "emptyDir": {"medium": "Memory", "sizeLimit": str(memory)} if memory is not None else {}}


def field_env(name: str, path: str) -> dict[str, Any]:
    """A variable from the pod's own fields (downward API)."""
    return {"name": name, "valueFrom": {"fieldRef": {"fieldPath": path}}}


def secret_env(name: str, secret: str, key: str) -> dict[str, Any]:
    """A variable from a Secret."""
    return {"name": name, "valueFrom": {"secretKeyRef": {"name": secret, "key": key}}}


def placement(spec: api.Spec) -> dict[str, Any]:
    """Where the pods of engine and fetch may run: the same, because a volume can be bound to a zone."""
    engine = spec.engine
    fields: dict[str, Any] = {
        "nodeSelector": engine.node_selector,
        "tolerations": [_written(item) for item in engine.tolerations],
        "affinity": _written(engine.affinity) if engine.affinity is not None else {},
        "topologySpreadConstraints": [_written(item) for item in engine.topology_spread_constraints],
        "priorityClassName": engine.priority_class_name,
        "schedulerName": engine.scheduler_name,
        "runtimeClassName": engine.runtime_class_name,
    }
    return {name: value for name, value in fields.items() if value} | pull_secrets(spec)


def pull_secrets(spec: api.Spec) -> dict[str, Any]:
    """What kubelet logs in to registries with; every pod's image may come from a private one."""
    references = [{"name": ref.name} for ref in spec.image_pull_secrets]
    return {"imagePullSecrets": references} if references else {}


def _written(model: Model) -> dict[str, Any]:
    """A type of core/v1 as the user wrote it: no default of ours is added."""
    return model.model_dump(mode="json", by_alias=True, exclude_unset=True, exclude_none=True)
