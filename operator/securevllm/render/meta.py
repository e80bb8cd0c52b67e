"""Names, labels and owner of every child, in one place."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from securevllm.api import types as api
from securevllm.context import FIELD_MANAGER

Object = dict[str, Any]
"""A Kubernetes object as the API server takes it: JSON."""

MANAGED_BY = "app.kubernetes.io/managed-by"
RESOURCE_LABEL = f"{api.GROUP}/resource"
ROLE_LABEL = f"{api.GROUP}/role"
GROUP_LABEL = f"{api.GROUP}/group"
"""On the pods of a group only: the pods of a Deployment are as many worlds."""

MEMBER_LABEL = f"{api.GROUP}/member"
"""On the pods of a group: number of the pod in it. 0 is the head: one for each model replica."""

EPOCH_LABEL = f"{api.GROUP}/epoch"
TEMPLATE_LABEL = f"{api.GROUP}/template"
"""Both on the pods of a group: a group is whole when all its pods carry the same pair."""

WHOLE_CONDITION = f"{api.GROUP}/group-whole"
"""Readiness gate of a group's pods: whether the rest of the group is as it should be. The operator sets it."""

HASH_ANNOTATION = f"{api.GROUP}/rendered"
"""On every child: hash of what was rendered. Differs: the operator has something new to say."""

RESTART_ANNOTATION = f"{api.GROUP}/restart-at"
"""A user writes it on the resource; the engines restart when it changes."""

VERIFY_ANNOTATION = f"{api.GROUP}/verify-at"
"""A user writes it on the resource; isolation is measured anew when it changes."""

ENGINE_KEY_ANNOTATION = f"{api.GROUP}/engine-key"
"""On engine pods: stands for the API key that they were started with."""

REVISION_ANNOTATION = f"{api.GROUP}/revision"
"""The nudge: a change of it on a gateway *pod* makes kubelet sync the pod's volumes now instead of within 80 s."""

ISOLATION = "isolation"
"""Component of policies, in conditions."""

INSTANCE = "app.kubernetes.io/instance"
COMPONENT = "app.kubernetes.io/component"

SECRET_LABEL = f"{api.GROUP}/secret"
"""On every Secret that is watched: the operator's own, and those of users that want a change noticed at once."""

DENY_NAME = "securevllm-default-deny"


def digest(value: Any, length: int = 16) -> str:
    """Hash of JSON data; the same for equal data, whatever the order of keys."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:length]


@dataclass(frozen=True)
class Owner:
    """The resource that owns the children."""

    name: str
    namespace: str
    uid: str

    @cached_property
    def label(self) -> str:
        """Value of ``securevllm.io/resource``: a recreated resource must not join pods of the old one."""
        return f"{self.name}-{digest(self.uid, 8)}"

    def child(self, suffix: str) -> str:
        """Name of a child."""
        return f"{self.name}-{suffix}"

    def labels(self, component: str) -> dict[str, str]:
        """Labels of a child object (not of pods: no policy selects it)."""
        return {
            "app.kubernetes.io/name": "vllm",
            INSTANCE: self.name,
            COMPONENT: component,
            MANAGED_BY: FIELD_MANAGER,
        }

    def selector(self, role: str) -> dict[str, str]:
        """Labels that policies, Services and workloads select the pods of a role by."""
        return {RESOURCE_LABEL: self.label, ROLE_LABEL: role}

    def group_selector(self, group: str) -> dict[str, str]:
        """Labels that the policy, Service and workloads of one group select its pods by."""
        return {RESOURCE_LABEL: self.label, GROUP_LABEL: group}

    def pod_labels(self, role: str) -> dict[str, str]:
        """Labels of the pods of a role."""
        return self.labels(role) | self.selector(role)

    def object(self, api_version: str, kind: str, suffix: str, component: str, **body: Any) -> Object:
        """A child with its metadata; ``body`` holds the top-level fields."""
        watched = {SECRET_LABEL: suffix} if kind == "Secret" else {}
        return {
            "apiVersion": api_version,
            "kind": kind,
            "metadata": {
                "name": self.child(suffix),
                "namespace": self.namespace,
                "labels": self.labels(component) | watched,
                "ownerReferences": [self.reference()],
            },
            **body,
        }

    def reference(self) -> dict[str, Any]:
        """Owner reference: the garbage collector removes the child with the resource."""
        return {
            "apiVersion": api.API_VERSION,
            "kind": api.KIND,
            "name": self.name,
            "uid": self.uid,
            "controller": True,
            "blockOwnerDeletion": True,
        }


def is_resource(reference: Mapping[str, Any]) -> bool:
    """Whether an owner reference names a resource of ours, in any version; other groups may use the kind."""
    return bool(reference["kind"] == api.KIND and reference["apiVersion"].partition("/")[0] == api.GROUP)


def stamp(obj: Object) -> Object:
    """The object with the hash of itself in an annotation."""
    metadata = obj["metadata"]
    annotations = metadata.get("annotations", {}) | {HASH_ANNOTATION: digest(obj)}
    return obj | {"metadata": metadata | {"annotations": annotations}}
