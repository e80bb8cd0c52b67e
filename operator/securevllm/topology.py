"""The one value that everything else is a projection of: who exists, what listens, who may talk to whom and why.

``plan`` is pure. What is not a flow is not allowed: NetworkPolicies, the gateway's configuration, vLLM's command line,
probes and ``explain`` all derive from the result, so they cannot disagree.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from securevllm import catalogue
from securevllm.api.addresses import IPV4_MAPPED, NOT_PUBLIC, Network
from securevllm.context import CidrPeer, Context, Peer, PodPeer, Selector

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.placement import LabelSelector


class Role(StrEnum):
    """Kinds of pods that the operator makes."""

    GATEWAY = "gateway"
    ENGINE = "engine"
    FETCH = "fetch"


class Outside(StrEnum):
    """Kinds of peers that the operator does not make."""

    CLIENTS = "clients"
    OPERATOR = "operator"
    DNS = "dns"
    HUB = "hub"
    DECLARED = "declared"


@dataclass(frozen=True)
class Socket:
    """A listening socket of a role.

    Attributes:
        role: who listens.
        name: port name, unique within the role.
        port: number.
        protocol: TCP or UDP.
        purpose: one phrase for a person.
        knob: what sets the port in the program that listens.
    """

    role: Role
    name: str
    port: int
    protocol: str
    purpose: str
    knob: str


@dataclass(frozen=True)
class PortRule:
    """One destination port outside."""

    port: int
    protocol: str = "TCP"


@dataclass(frozen=True)
class Inbound:
    """Peers outside may open connections to a socket."""

    source: Outside
    peers: tuple[Peer, ...]
    to: Socket
    why: str


@dataclass(frozen=True)
class Internal:
    """Pods of a role may open connections to a socket of another role of the same resource."""

    source: Role
    to: Socket
    why: str


@dataclass(frozen=True)
class Outbound:
    """Pods of a role may open connections to peers outside."""

    source: Role
    to: Outside
    peers: tuple[Peer, ...]
    ports: tuple[PortRule, ...]
    why: str


Flow = Inbound | Internal | Outbound


@dataclass(frozen=True)
class Pods:
    """The pods of one role. Without a group, N pods are N worlds: no flow joins two of them."""

    role: Role
    replicas: int


@dataclass(frozen=True)
class Topology:
    """Who exists, what listens, who may talk to whom."""

    pods: tuple[Pods, ...]
    sockets: tuple[Socket, ...]
    flows: tuple[Flow, ...]

    def socket(self, role: Role, name: str) -> Socket:
        """The socket of that name.

        Raises:
            KeyError: the topology has no such socket.
        """
        for socket in self.sockets:
            if (socket.role, socket.name) == (role, name):
                return socket
        raise KeyError(f"{role}/{name}")


# Ports of the gateway: above 1024, because nothing in the pod has the capability for less.
GATEWAY_HTTPS = 8443
GATEWAY_HTTP = 8080
GATEWAY_OPS = 9902
GATEWAY_ADMIN = 9901


def _network(text: str) -> Network:
    return ipaddress.ip_network(text, strict=False)


def outside_part(cidr: str, context: Context) -> CidrPeer | None:
    """The part of a range that is not the cluster's own: engines differ on an ipBlock that holds pods or nodes."""
    return _without(cidr, map(_network, context.cluster_ranges))


def public_part(cidr: str, context: Context) -> CidrPeer | None:
    """The part of a range that is neither private, link-local, shared nor the cluster's own; None: nothing is left."""
    return _without(cidr, (*NOT_PUBLIC, *map(_network, context.cluster_ranges)))


def _without(cidr: str, ranges: Iterable[Network]) -> CidrPeer | None:
    """The part of a range that is in none of the others; None: nothing is left."""
    network = _network(cidr)
    excluded = []
    for carved in ranges:
        if carved.version != network.version or carved == IPV4_MAPPED:
            continue
        if network.subnet_of(carved):  # type: ignore[arg-type]  # same version, checked above
            return None
        if carved.subnet_of(network):  # type: ignore[arg-type]  # same version, checked above
            excluded.append(carved)
    unique = ipaddress.collapse_addresses(excluded)  # type: ignore[type-var]  # one version only
    return CidrPeer(str(network), tuple(str(carved) for carved in unique))


def internet(context: Context) -> tuple[CidrPeer, ...]:
    """Every public address, both families."""
    return tuple(part for cidr in ("0.0.0.0/0", "::/0") if (part := public_part(cidr, context)) is not None)


def selector(labels: LabelSelector | None) -> Selector | None:
    """A label selector of the spec as plain data; None stays None."""
    if labels is None:
        return None
    return Selector(
        labels=tuple(sorted(labels.match_labels.items())),
        expressions=tuple((item.key, item.operator, item.values) for item in labels.match_expressions),
    )


def _peers(peers: api.Peers, part: Callable[[str, Context], CidrPeer | None], context: Context) -> tuple[Peer, ...]:
    """Peers of the spec, pods first. Neither selector: only the addresses count, and of them only the part."""
    found: list[Peer] = []
    if peers.pod_selector is not None or peers.namespace_selector is not None:
        found.append(PodPeer(selector(peers.namespace_selector), selector(peers.pod_selector)))
    found += [kept for cidr in peers.cidrs if (kept := part(cidr, context)) is not None]
    return tuple(found)


def plan(spec: api.Spec, context: Context) -> Topology:
    """The topology of an accepted spec.

    Args:
        spec: as ``api.parse`` returned it.
        context: the cluster.
    """
    row = catalogue.sockets()["api"]
    api_socket = Socket(Role.ENGINE, row.name, spec.ports.api or row.port, row.protocol, "vLLM's HTTP API", row.knob)
    plain = spec.gateway.tls.disabled is not None
    entry = Socket(
        Role.GATEWAY,
        "http" if plain else "https",
        GATEWAY_HTTP if plain else GATEWAY_HTTPS,
        "TCP",
        "the allowed routes, for clients",
        "listener address (lds.yaml)",
    )
    ops = Socket(
        Role.GATEWAY, "ops", GATEWAY_OPS, "TCP", "readiness and metrics of the gateway", "listener address (lds.yaml)"
    )
    hub = fetch_source(spec)
    replicas = 0 if spec.suspend else spec.replicas
    pods = [
        Pods(Role.GATEWAY, 0 if spec.suspend else spec.gateway.replicas),
        Pods(Role.ENGINE, replicas),
        *([Pods(Role.FETCH, 1)] if hub is not None else []),
    ]

    clients = (PodPeer(),) if spec.gateway.clients is None else _peers(spec.gateway.clients, outside_part, context)
    operator = (context.operator,)
    dns_ports = (PortRule(context.dns_port, "UDP"), PortRule(context.dns_port, "TCP"))
    flows: list[Flow] = [
        Inbound(Outside.CLIENTS, clients, entry, "requests to the allowed routes"),
        Inbound(Outside.OPERATOR, operator, entry, "asks for forbidden routes, to see them refused"),
        Inbound(Outside.OPERATOR, operator, ops, "reads back which configuration is served"),
        Internal(Role.GATEWAY, api_socket, "requests that passed the allowlist"),
        *(Outbound(item.role, Outside.DNS, context.dns, dns_ports, "name resolution") for item in pods),
    ]
    if hub is not None:
        hub_ports = (PortRule(hub_port(hub)),)
        flows.append(Outbound(Role.FETCH, Outside.HUB, internet(context), hub_ports, "downloads the model, once"))
    for declared in spec.security.egress:
        ports = tuple(PortRule(item.port, item.protocol) for item in declared.ports)
        flows.append(
            Outbound(Role.ENGINE, Outside.DECLARED, _peers(declared.to, public_part, context), ports, declared.why)
        )
    return Topology(
        pods=tuple(pods),
        sockets=(entry, ops, api_socket),
        flows=tuple(flow for flow in flows if isinstance(flow, Internal) or flow.peers),
    )


def hub_port(source: api.HuggingFaceSource) -> int:
    """The port that the fetch Job connects to."""
    return urlsplit(source.endpoint or "").port or 443


def fetch_source(spec: api.Spec) -> api.HuggingFaceSource | None:
    """The source that a fetch Job downloads; None when the model is there already."""
    return spec.model.source.hugging_face if spec.model.source is not None else None
