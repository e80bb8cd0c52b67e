"""What the core has to know about the cluster and the operator, as plain data.

The edge fills it from settings; ``securevllm render`` uses these defaults.
"""

from __future__ import annotations

from dataclasses import dataclass

from securevllm import __version__

FIELD_MANAGER = "securevllm-operator"
"""Field manager of every server-side apply, and value of ``app.kubernetes.io/managed-by``."""


@dataclass(frozen=True)
class Selector:
    """meta/v1 LabelSelector, hashable: ``matchLabels`` pairs and ``matchExpressions`` (key, operator, values)."""

    labels: tuple[tuple[str, str], ...] = ()
    expressions: tuple[tuple[str, str, tuple[str, ...]], ...] = ()


@dataclass(frozen=True)
class PodPeer:
    """Pods by label. ``namespaces`` None: the namespace of the resource. ``pods`` None: all pods there."""

    namespaces: Selector | None = None
    pods: Selector | None = None


@dataclass(frozen=True)
class CidrPeer:
    """Addresses outside the cluster; ``excluded`` ranges within are not meant."""

    cidr: str
    excluded: tuple[str, ...] = ()


Peer = PodPeer | CidrPeer


def namespace(name: str) -> Selector:
    """The namespace of this name, by the label that every API server sets since 1.21."""
    return Selector(labels=(("kubernetes.io/metadata.name", name),))


@dataclass(frozen=True)
class Context:
    """The cluster and the operator.

    Attributes:
        operator: the operator's own pods; they read the gateways' revision and probe them.
        cluster_domain: suffix of service names.
        dns: the cluster's DNS servers, after DNAT: policies apply to the real address and port.
        dns_port: port on which those servers listen (5353 on OpenShift).
        cluster_ranges: pod, service and node ranges; carved out of every declared egress.
        gateway_image: Envoy, the version that the templates were tested with.
        operator_image: the operator's own: gate and canary pods run it.
        canary_service: namespace and name of the headless Service of the operator's canary listener.
        canary_port: of that listener. It accepts and closes; it is there for pods to be seen not to reach it.
        ipv6: pods have IPv6 addresses, alone or beside IPv4.
    """

    operator: PodPeer = PodPeer(
        namespaces=namespace("secure-vllm-operator"),
        pods=Selector(labels=(("app.kubernetes.io/name", "secure-vllm-operator"),)),
    )
    cluster_domain: str = "cluster.local"
    dns: tuple[Peer, ...] = (
        PodPeer(namespaces=namespace("kube-system"), pods=Selector(labels=(("k8s-app", "kube-dns"),))),
    )
    dns_port: int = 53
    cluster_ranges: tuple[str, ...] = ()
    gateway_image: str = "envoyproxy/envoy:distroless-v1.40.0"
    operator_image: str = f"secure-vllm-operator:{__version__}"
    canary_service: tuple[str, str] = ("secure-vllm-operator", "secure-vllm-operator-canary")
    canary_port: int = 9094
    ipv6: bool = False

    @property
    def listen_address(self) -> str:
        """Of sockets that are open on every address of a pod; ``::`` is both families, and needs a kernel with IPv6."""
        return "::" if self.ipv6 else "0.0.0.0"  # noqa: S104 - NetworkPolicies say who reaches a pod

    @property
    def canary_host(self) -> str:
        """Name of the canary listener; its trailing dot spares the search list."""
        namespace_, name = self.canary_service
        return f"{name}.{namespace_}.svc.{self.cluster_domain}."
