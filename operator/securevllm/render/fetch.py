"""The weights: where they are mounted, and the Job that downloads them with an egress and a token of its own."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from securevllm.api.guard import trusts_remote_code
from securevllm.render import pods
from securevllm.render.meta import Object, Owner, digest
from securevllm.topology import Role, fetch_source

if TYPE_CHECKING:
    from securevllm.api import types as api

ROLE = Role.FETCH.value
MOUNT = "/models"

_CODE = ("*.py",)
_PICKLES = ("*.bin", "*.pt", "*.pkl", "*.pth", "*.ckpt")
"""A model that needs these is not served; code only after a decision in words (``trustRemoteCode``)."""


def claim(owner: Owner, spec: api.Spec) -> Object | None:
    """The volume for fetched weights, unless the spec names one."""
    source = fetch_source(spec)
    if source is None or source.storage.claim_name is not None:
        return None
    storage = source.storage
    return owner.object(
        "v1",
        "PersistentVolumeClaim",
        "model",
        ROLE,
        spec={
            "accessModes": list(storage.access_modes),
            "resources": {"requests": {"storage": str(storage.size)}},
            **({"storageClassName": storage.storage_class_name} if storage.storage_class_name else {}),
        },
    )


def claim_name(owner: Owner, spec: api.Spec) -> str | None:
    """The claim that engines mount; None when the image holds the model."""
    source = fetch_source(spec)
    if source is not None:
        return source.storage.claim_name or owner.child("model")
    if spec.model.source is not None and spec.model.source.persistent_volume_claim is not None:
        return spec.model.source.persistent_volume_claim.claim_name
    return None


def volume(owner: Owner, spec: api.Spec) -> dict[str, Any] | None:
    """The pod volume of the engines: read-only."""
    name = claim_name(owner, spec)
    if name is None:
        return None
    return {"name": "model", "persistentVolumeClaim": {"claimName": name, "readOnly": True}}


def path(owner: Owner, spec: api.Spec) -> str | None:
    """Folder of the model in the engine's container; None when the image holds it."""
    if fetch_source(spec) is not None:
        return f"{MOUNT}/{_key(owner, spec)}"
    if spec.model.source is not None and spec.model.source.persistent_volume_claim is not None:
        inner = spec.model.source.persistent_volume_claim.path
        return f"{MOUNT}/{inner}" if inner else MOUNT
    return None


def job_name(owner: Owner, spec: api.Spec) -> str:
    """One Job per model, revision and place: a Job cannot change."""
    return owner.child(f"{ROLE}-{_key(owner, spec)}")


def _key(owner: Owner, spec: api.Spec) -> str:
    source = fetch_source(spec)
    endpoint = source.endpoint if source is not None else None
    what = [spec.model.name, spec.model.revision, endpoint, claim_name(owner, spec)]
    # Another folder: one without code must not get any by a later change of the spec.
    return digest([*what, "with code"] if trusts_remote_code(spec) else what, 10)


def _excluded(spec: api.Spec) -> tuple[str, ...]:
    return _PICKLES if trusts_remote_code(spec) else (*_CODE, *_PICKLES)


def job(owner: Owner, spec: api.Spec) -> Object | None:
    """The download, next to where the engines run. Runs once; it continues where it stopped."""
    source = fetch_source(spec)
    if source is None:
        return None
    token = source.token_secret_ref
    container: dict[str, Any] = {
        "name": ROLE,
        "image": spec.image,  # vLLM's image brings the hub's client
        "command": ["hf", "download"],
        "args": [
            spec.model.name,
            *([f"--revision={spec.model.revision}"] if spec.model.revision else []),
            f"--local-dir={MOUNT}/{_key(owner, spec)}",
            *(f"--exclude={pattern}" for pattern in _excluded(spec)),
        ],
        "env": [
            *([pods.secret_env("HF_TOKEN", token.name, token.key)] if token else []),
            *([{"name": "HF_ENDPOINT", "value": source.endpoint}] if source.endpoint else []),
            {"name": "HF_HOME", "value": f"{pods.HOME}/.cache/huggingface"},
            {"name": "HF_HUB_DISABLE_TELEMETRY", "value": "1"},
            {"name": "HOME", "value": pods.HOME},
        ],
        "resources": {"requests": {"cpu": "500m", "memory": "1Gi"}, "limits": {"memory": "4Gi"}},
        "securityContext": pods.CONTAINER_SECURITY,
        "volumeMounts": [
            {"name": "home", "mountPath": pods.HOME},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of the pod
            {"name": "model", "mountPath": MOUNT},
        ],
    }
    template = pods.template(
        owner,
        ROLE,
        user=pods.VLLM_USER,
        group=pods.VLLM_GROUP,
        pod={
            "restartPolicy": "OnFailure",
            "containers": [container],
            "volumes": [
                pods.empty_dir("home"),
                pods.empty_dir("tmp"),
                {"name": "model", "persistentVolumeClaim": {"claimName": claim_name(owner, spec)}},
            ],
            **pods.placement(spec),
        },
    )
    fetched = owner.object("batch/v1", "Job", ROLE, ROLE, spec={"backoffLimit": 10, "template": template})
    fetched["metadata"]["name"] = job_name(owner, spec)
    return fetched
