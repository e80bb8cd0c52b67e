"""What traffic goes between: pods, nodes and everything else, and the engine that enforces the policies.

Addresses are those that the enforcing side sees: pod to pod without NAT, and a Service already resolved to one of its
backends (the API leaves the order of policy and DNAT open; every engine in common use filters after it).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Any, Literal

Protocol = Literal["TCP", "UDP", "SCTP"]
PROTOCOLS: tuple[Protocol, ...] = ("TCP", "UDP", "SCTP")

Address = IPv4Address | IPv6Address


@dataclass(frozen=True)
class ContainerPort:
    """One `containers[].ports[]` entry: named ports in policies are resolved against these."""

    name: str
    port: int
    protocol: Protocol = "TCP"


@dataclass(frozen=True, eq=False)
class Pod:
    """One pod. Compared by identity: the evaluator is asked about the pods that it was given.

    Raises:
        ValueError: no address, or one that is not an IP: without one an ipBlock would silently match nothing.
    """

    name: str
    namespace: str
    labels: Mapping[str, str]
    ips: tuple[str, ...]
    ports: tuple[ContainerPort, ...] = ()
    node: str = "node-1"
    host_network: bool = False

    def __post_init__(self) -> None:
        if not self.addresses:
            raise ValueError(f"pod {self.key}: ips is empty; give it at least one address")

    @cached_property
    def addresses(self) -> tuple[Address, ...]:
        """`ips`, parsed."""
        return tuple(ip_address(ip) for ip in self.ips)

    @property
    def key(self) -> str:
        """`namespace/name`."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Node:
    """A node, as the source of probes or the place of a kubelet; hostNetwork pods are their node."""

    name: str
    ips: tuple[str, ...]

    @cached_property
    def addresses(self) -> tuple[Address, ...]:
        """`ips`, parsed."""
        return tuple(ip_address(ip) for ip in self.ips)

    @property
    def key(self) -> str:
        """`node name`."""
        return f"node {self.name}"


@dataclass(frozen=True)
class External:
    """An address that is neither a pod nor a node of the cluster: the internet, a metadata service."""

    name: str
    ips: tuple[str, ...]

    @cached_property
    def addresses(self) -> tuple[Address, ...]:
        """`ips`, parsed."""
        return tuple(ip_address(ip) for ip in self.ips)

    @property
    def key(self) -> str:
        """`external name`."""
        return f"external {self.name}"


Endpoint = Pod | Node | External


@dataclass(frozen=True)
class Engine:
    """The points where the API leaves an engine free.

    Attributes:
        ipblock_matches_pods: an ipBlock that contains a pod's address selects the pod. The reference only says that
            ipBlocks are meant for addresses outside the cluster.
        ipblock_matches_nodes: the same for the addresses of nodes.
        node_reaches_own_pods: "traffic to and from the node where a Pod is running is always allowed": probes.
        pod_reaches_own_node: the other half of that sentence. The engines that we measured do enforce egress
            policies towards the pod's own node, so it is off.
    """

    ipblock_matches_pods: bool
    ipblock_matches_nodes: bool
    node_reaches_own_pods: bool = True
    pod_reaches_own_node: bool = False


CILIUM = Engine(ipblock_matches_pods=False, ipblock_matches_nodes=False)
CALICO = Engine(ipblock_matches_pods=True, ipblock_matches_nodes=True)


def pod_from_template(
    template: Mapping[str, Any], *, name: str, namespace: str, ips: Sequence[str], node: str = "node-1"
) -> Pod:
    """Make a pod from a `PodTemplateSpec` or a `Pod`: labels, named ports (sidecars too) and hostNetwork from it."""
    spec = template["spec"]
    sidecars = [c for c in spec.get("initContainers") or () if c.get("restartPolicy") == "Always"]
    ports = tuple(
        ContainerPort(port["name"], port["containerPort"], port.get("protocol", "TCP"))
        for container in (*spec["containers"], *sidecars)
        for port in container.get("ports") or ()
        if "name" in port
    )
    return Pod(
        name=name,
        namespace=namespace,
        labels=template.get("metadata", {}).get("labels") or {},
        ips=tuple(ips),
        ports=ports,
        node=node,
        host_network=spec.get("hostNetwork", False),
    )
