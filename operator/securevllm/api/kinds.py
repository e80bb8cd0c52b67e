"""The kinds of objects that the operator deals with, and how their URLs are built.

Data instead of discovery: a client that asks the API server for its kinds keeps a cache, and a stale cache after an
upgrade is a hard error to find. Paths follow
https://kubernetes.io/docs/reference/using-api/api-concepts/#resource-uris.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias
from urllib.parse import quote

from securevllm.api.types import API_VERSION, GROUP, KIND
from securevllm.errors import InternalError

KubeObject: TypeAlias = dict[str, Any]
"""A Kubernetes object as JSON: ``apiVersion``, ``kind``, ``metadata`` and the rest."""


@dataclass(frozen=True, order=True)
class Kind:
    """A kind of objects.

    Attributes:
        api_version: ``v1`` or ``group/version``.
        kind: CamelCase name, for example ``NetworkPolicy``.
        plural: the resource's name in URLs and in RBAC rules.
        namespaced: False for Namespaces and Nodes.
    """

    api_version: str
    kind: str
    plural: str
    namespaced: bool = True

    @property
    def group(self) -> str:
        """API group, empty for the core group."""
        return self.api_version.rpartition("/")[0]

    @property
    def version(self) -> str:
        """API version without the group."""
        return self.api_version.rpartition("/")[2]

    @property
    def resource(self) -> str:
        """``plural.group`` as kubectl and RBAC error messages write it."""
        return f"{self.plural}.{self.group}" if self.group else self.plural

    def path(self, namespace: str | None = None, name: str | None = None, subresource: str | None = None) -> str:
        """URL path of a collection or of one object.

        Args:
            namespace: None for a cluster-scoped kind, or for a list over all namespaces.
            name: None for the collection.
            subresource: for example ``status``.

        Raises:
            InternalError: a namespace for a cluster-scoped kind, or one object of a namespaced kind without namespace.
        """
        if namespace is not None and not self.namespaced:
            raise InternalError(f"{self.kind} is cluster-scoped: namespace {namespace!r} must not be given")
        if namespace is None and name is not None and self.namespaced:
            raise InternalError(f"{self.kind} {name!r} is namespaced: its namespace must be given")
        parts = [f"/apis/{self.api_version}" if self.group else f"/api/{self.api_version}"]
        if namespace is not None:
            parts.append(f"namespaces/{quote(namespace, safe='')}")
        parts.append(self.plural)
        # A name is user input in places: an unquoted "/" or "?" would address something else.
        parts += [quote(part, safe="") for part in (name, subresource) if part is not None]
        return "/".join(parts)

    def __str__(self) -> str:
        return self.kind


@dataclass(frozen=True, order=True)
class Ref:
    """The address of one object; ``namespace`` is None for a cluster-scoped kind."""

    kind: Kind
    namespace: str | None
    name: str

    @classmethod
    def of(cls, obj: Mapping[str, Any]) -> Ref:
        """Address of an object.

        Raises:
            InternalError: its kind is not in the table, or it has no name.
        """
        kind = kind_of(obj)
        metadata = obj.get("metadata") or {}
        name = metadata.get("name")
        if not name:
            raise InternalError(f"{kind} without metadata.name")
        return cls(kind, metadata.get("namespace") if kind.namespaced else None, name)

    def path(self, subresource: str | None = None) -> str:
        """URL path of the object or of its subresource."""
        return self.kind.path(self.namespace, self.name, subresource)

    def __str__(self) -> str:
        return f"{self.kind} {self.namespace}/{self.name}" if self.namespace else f"{self.kind} {self.name}"


SECURE_VLLM_DEPLOYMENT = Kind(API_VERSION, KIND, "securevllmdeployments")

CONFIG_MAP = Kind("v1", "ConfigMap", "configmaps")
NAMESPACE = Kind("v1", "Namespace", "namespaces", namespaced=False)
NODE = Kind("v1", "Node", "nodes", namespaced=False)
PERSISTENT_VOLUME_CLAIM = Kind("v1", "PersistentVolumeClaim", "persistentvolumeclaims")
POD = Kind("v1", "Pod", "pods")
SECRET = Kind("v1", "Secret", "secrets")
SERVICE = Kind("v1", "Service", "services")
SERVICE_ACCOUNT = Kind("v1", "ServiceAccount", "serviceaccounts")
DEPLOYMENT = Kind("apps/v1", "Deployment", "deployments")
REPLICA_SET = Kind("apps/v1", "ReplicaSet", "replicasets")
STATEFUL_SET = Kind("apps/v1", "StatefulSet", "statefulsets")
HORIZONTAL_POD_AUTOSCALER = Kind("autoscaling/v2", "HorizontalPodAutoscaler", "horizontalpodautoscalers")
JOB = Kind("batch/v1", "Job", "jobs")
ACCESS_REVIEW = Kind("authorization.k8s.io/v1", "SelfSubjectAccessReview", "selfsubjectaccessreviews", namespaced=False)
"""A question, not an object: it has no name, and cannot be listed."""
LEASE = Kind("coordination.k8s.io/v1", "Lease", "leases")
EVENT = Kind("events.k8s.io/v1", "Event", "events")
NETWORK_POLICY = Kind("networking.k8s.io/v1", "NetworkPolicy", "networkpolicies")
POD_DISRUPTION_BUDGET = Kind("policy/v1", "PodDisruptionBudget", "poddisruptionbudgets")

KINDS: tuple[Kind, ...] = (
    SECURE_VLLM_DEPLOYMENT,
    CONFIG_MAP,
    NAMESPACE,
    NODE,
    PERSISTENT_VOLUME_CLAIM,
    POD,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    DEPLOYMENT,
    REPLICA_SET,
    STATEFUL_SET,
    HORIZONTAL_POD_AUTOSCALER,
    JOB,
    LEASE,
    EVENT,
    NETWORK_POLICY,
    POD_DISRUPTION_BUDGET,
)

_BY_NAME = {(kind.api_version, kind.kind): kind for kind in KINDS}


def kind_of(obj: Mapping[str, Any]) -> Kind:
    """The kind of an object.

    Raises:
        InternalError: ``apiVersion`` and ``kind`` are not in the table.
    """
    name = (obj.get("apiVersion", ""), obj.get("kind", ""))
    try:
        return _BY_NAME[name]
    except KeyError:
        raise InternalError(f"apiVersion {name[0]!r}, kind {name[1]!r} is not in the table of kinds") from None


def is_meant_as_resource(obj: Mapping[str, Any]) -> bool:
    """Whether an object has our group or our kind: perhaps misspelt, but nobody else's."""
    return obj.get("kind") == KIND or str(obj.get("apiVersion")).partition("/")[0] == GROUP


def unlike_resource(obj: Mapping[str, Any]) -> str:
    """What is said of an object that is no SecureVLLMDeployment of this release; empty: it is one."""
    if (obj.get("apiVersion"), obj.get("kind")) == (API_VERSION, KIND):
        return ""
    found = " ".join(str(obj.get(part) or f"(no {part})") for part in ("apiVersion", "kind"))
    return f"holds {found}; this command takes {API_VERSION} {KIND}"
