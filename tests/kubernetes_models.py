"""Are rendered objects Kubernetes objects? Judged by the models of the official client, generated from the OpenAPI.

The client's models alone are not strict enough: they accept `pod_selector` for `podSelector`, which the API server does
not. So an object must also come out of the model exactly as it went in.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

from kubernetes import client
from pydantic import BaseModel, ValidationError

MODELS: dict[tuple[str, str], type[BaseModel]] = {
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicy"): client.V1ValidatingAdmissionPolicy,
    ("admissionregistration.k8s.io/v1", "ValidatingAdmissionPolicyBinding"): client.V1ValidatingAdmissionPolicyBinding,
    ("apiextensions.k8s.io/v1", "CustomResourceDefinition"): client.V1CustomResourceDefinition,
    ("apps/v1", "Deployment"): client.V1Deployment,
    ("apps/v1", "ReplicaSet"): client.V1ReplicaSet,
    ("apps/v1", "StatefulSet"): client.V1StatefulSet,
    ("autoscaling/v2", "HorizontalPodAutoscaler"): client.V2HorizontalPodAutoscaler,
    ("batch/v1", "Job"): client.V1Job,
    ("coordination.k8s.io/v1", "Lease"): client.V1Lease,
    ("events.k8s.io/v1", "Event"): client.EventsV1Event,
    ("networking.k8s.io/v1", "NetworkPolicy"): client.V1NetworkPolicy,
    ("policy/v1", "PodDisruptionBudget"): client.V1PodDisruptionBudget,
    ("rbac.authorization.k8s.io/v1", "ClusterRole"): client.V1ClusterRole,
    ("rbac.authorization.k8s.io/v1", "ClusterRoleBinding"): client.V1ClusterRoleBinding,
    ("rbac.authorization.k8s.io/v1", "Role"): client.V1Role,
    ("rbac.authorization.k8s.io/v1", "RoleBinding"): client.V1RoleBinding,
    ("v1", "ConfigMap"): client.V1ConfigMap,
    ("v1", "Namespace"): client.V1Namespace,
    ("v1", "PersistentVolumeClaim"): client.V1PersistentVolumeClaim,
    ("v1", "Pod"): client.V1Pod,
    ("v1", "Secret"): client.V1Secret,
    ("v1", "Service"): client.V1Service,
    ("v1", "ServiceAccount"): client.V1ServiceAccount,
}

_NAME = re.compile(r"[a-z0-9]([-a-z0-9.]*[a-z0-9])?")
_LABEL_VALUE = re.compile(r"([A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?)?")
_LABEL_KEY = re.compile(r"([a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")


class NotAKubernetesObjectError(AssertionError):
    """The message names the object, the path of the field and what is wrong with it, one finding a line."""


def validate_strict(obj: Mapping[str, Any]) -> None:
    """Check one object: its kind, every field name and type, its name, its labels and its annotations' keys.

    Raises:
        NotAKubernetesObjectError: with every finding.
    """
    kind = (str(obj.get("apiVersion")), str(obj.get("kind")))
    metadata = obj.get("metadata") or {}
    title = f"{kind[0]} {kind[1]} {metadata.get('namespace', '')}/{metadata.get('name', '')}"
    if kind not in MODELS:
        raise NotAKubernetesObjectError(f"{title}: no model for this kind; add it to MODELS if it is right")
    problems = [*_metadata_problems(metadata), *_model_problems(obj, MODELS[kind])]
    if problems:
        raise NotAKubernetesObjectError("\n".join(f"{title}: {problem}" for problem in problems))


def _model_problems(obj: Mapping[str, Any], model: type[BaseModel]) -> Iterator[str]:
    try:
        parsed = model.model_validate(obj)
    except ValidationError as error:
        for item in error.errors(include_url=False, include_input=False):
            yield f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"
        return
    yield from _differences(obj, parsed.model_dump(by_alias=True, exclude_unset=True), "")


def _differences(given: object, kept: object, path: str) -> Iterator[str]:
    if isinstance(given, Mapping) and isinstance(kept, Mapping):
        for key in [*given, *(key for key in kept if key not in given)]:
            where = f"{path}.{key}" if path else str(key)
            if key not in kept:
                yield f"{where}: not the name of a field; the API server would drop it"
            elif key in given:
                yield from _differences(given[key], kept[key], where)
    elif isinstance(given, list | tuple) and isinstance(kept, list | tuple):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from _differences(one, other, f"{path}[{index}]")
    elif given != kept and not hasattr(kept, "isoformat"):  # times become datetime objects
        yield f"{path}: {given!r} is read as {kept!r}"


def _metadata_problems(metadata: Mapping[str, Any]) -> Iterator[str]:
    name = metadata.get("name")
    if not isinstance(name, str) or len(name) > 253 or not _NAME.fullmatch(name):
        yield f"metadata.name: {name!r} is not a DNS subdomain name"
    for key, value in (metadata.get("labels") or {}).items():
        if not _LABEL_KEY.fullmatch(key):
            yield f"metadata.labels: {key!r} is not a qualified name"
        if not isinstance(value, str) or not _LABEL_VALUE.fullmatch(value):
            yield f"metadata.labels.{key}: {value!r} is not a label value"
    for key in metadata.get("annotations") or {}:
        if not _LABEL_KEY.fullmatch(key.lower()):
            yield f"metadata.annotations: {key!r} is not a qualified name"
