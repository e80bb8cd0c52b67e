"""From an accepted spec to its topology."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from securevllm import catalogue
from securevllm.api.shape import Shape, shape
from securevllm.context import Context, PodPeer
from securevllm.topology.model import (
    VLLM,
    WORKER_OF,
    Flow,
    Group,
    Inbound,
    Internal,
    Mesh,
    Outbound,
    Outside,
    Pods,
    PortRule,
    Role,
    Socket,
    Topology,
    every_port,
)
from securevllm.topology.peers import internet, outside_part, peers_of, public_part

if TYPE_CHECKING:
    from securevllm.api import types as api

# Ports of the gateway: above 1024, because nothing in the pod has the capability for less.
GATEWAY_HTTPS = 8443
GATEWAY_HTTP = 8080
GATEWAY_OPS = 9902
GATEWAY_ADMIN = 9901
GATEWAY_METRICS = 9903

ROUTER_HTTP = 8090
"""The P/D router's port; its own metrics stay on the loopback address."""


@dataclass(frozen=True)
class Side:
    """Model replicas of one kind: engines, or the prefill or decode side.

    Attributes:
        role: of the pods that have HTTP.
        letter: first letter of the groups' names.
        replicas: how many.
        parallelism: as the spec says it.
        shape: of each.
        whens: which rows of the socket catalogue apply.
        groups: whether the pods have names of their own; otherwise they are a Deployment.
    """

    role: Role
    letter: str
    replicas: int
    parallelism: api.Parallelism
    shape: Shape
    whens: frozenset[str]
    groups: bool

    @property
    def data(self) -> bool:
        """Whether each is split into data-parallel ranks: then every pod schedules, otherwise the head."""
        return self.parallelism.data is not None

    def members(self) -> tuple[Role, ...]:
        """Role of each pod of one replica."""
        worker = WORKER_OF[self.role]
        return tuple(worker if self.shape.headless(member) else self.role for member in range(self.shape.pods))


def _side(spec: api.Spec, role: Role, letter: str, replicas: int, parallelism: api.Parallelism) -> Side:
    formed = shape(parallelism)
    data = parallelism.data is not None
    connector = spec.disaggregation.connector if spec.disaggregation is not None else None
    found = {
        "api": True,
        "nodes": formed.pods > 1 and not data,
        "data": formed.pods > 1 and data,
        "group": formed.pods > 1,
        "always": True,
        "ranks": formed.pods * formed.gpus > 1,
        "kv-events": spec.security.kv_events is not None,
        "metrics": spec.security.metrics is not None,
        connector or "": connector is not None,
    }
    whens = frozenset(name for name, holds in found.items() if holds)
    return Side(role, letter, replicas, parallelism, formed, whens, groups=formed.pods > 1 or connector is not None)


def sides(spec: api.Spec) -> tuple[Side, ...]:
    """The kinds of model replicas: engines, or prefill and decode."""
    if spec.disaggregation is None:
        return (_side(spec, Role.ENGINE, "e", spec.replicas, spec.parallelism),)
    prefill, decode = spec.disaggregation.prefill, spec.disaggregation.decode
    return (
        _side(spec, Role.PREFILL, "p", prefill.replicas, prefill.parallelism),
        _side(spec, Role.DECODE, "d", decode.replicas, decode.parallelism),
    )


def plan(spec: api.Spec, context: Context) -> Topology:
    """The topology of an accepted spec.

    Args:
        spec: as ``api.parse`` returned it.
        context: the cluster.
    """
    found = sides(spec)
    groups = tuple(_groups(found))
    hub = fetch_source(spec)
    pods = tuple(_pods(spec, found))
    roles = {item.role for item in pods}
    gateway = _gateway_sockets(spec)
    router = Socket(Role.ROUTER, "api", ROUTER_HTTP, "TCP", "requests, to be split into prefill and decode", "--port")
    vllm = [socket for side in found for socket in _vllm_sockets(spec, side)]
    sockets = (*gateway, *([router] if Role.ROUTER in roles else []), *vllm)

    flows: list[Flow] = [*_gateway_flows(spec, gateway, context)]
    apis = [socket for socket in vllm if socket.name == "api"]
    if Role.ROUTER in roles:
        flows.append(Internal(Role.GATEWAY, router, "requests that passed the allowlist"))
        flows += [Internal(Role.ROUTER, socket, "a request, after the gateway let it pass") for socket in apis]
        bootstraps = (socket for socket in vllm if socket.name == "mooncake-bootstrap")
        flows += [Internal(Role.ROUTER, socket, "asks which ranks prefill has") for socket in bootstraps]
        flows += _exchange(found)
    else:
        flows += [Internal(Role.GATEWAY, socket, "requests that passed the allowlist") for socket in apis]
    why = "one model replica: torch.distributed, Gloo, NCCL and ZMQ draw random ports"
    flows += [Mesh(group.name, why) for group in groups if len(group.members) > 1]
    dns_ports = (PortRule(context.dns_port, "UDP"), PortRule(context.dns_port, "TCP"))
    flows += [Outbound(item.role, Outside.DNS, context.dns, dns_ports, "name resolution") for item in pods]
    if hub is not None:
        hub_ports = (PortRule(hub_port(hub)),)
        flows.append(Outbound(Role.FETCH, Outside.HUB, internet(context), hub_ports, "downloads the model, once"))
    flows += _declared(spec, [item.role for item in pods if item.role in VLLM], sockets, context)
    return Topology(
        pods=pods,
        sockets=sockets,
        flows=tuple(flow for flow in flows if isinstance(flow, Internal | Mesh) or flow.peers),
        groups=groups,
    )


def _groups(sides: Iterable[Side]) -> Iterator[Group]:
    for side in sides:
        if side.groups:
            yield from (Group(f"{side.letter}{number}", side.members()) for number in range(side.replicas))


def _pods(spec: api.Spec, sides: Iterable[Side]) -> Iterator[Pods]:
    """Every role that exists, with the number of its pods; a suspended resource keeps its roles."""
    alive = 0 if spec.suspend else 1
    yield Pods(Role.GATEWAY, alive * spec.gateway.replicas)
    if spec.disaggregation is not None:
        yield Pods(Role.ROUTER, alive * spec.disaggregation.router.replicas)
    for side in sides:
        yield from (Pods(role, alive * side.replicas * count) for role, count in Counter(side.members()).items())
    if fetch_source(spec) is not None:
        yield Pods(Role.FETCH, 1)


def _gateway_sockets(spec: api.Spec) -> tuple[Socket, ...]:
    plain = spec.gateway.tls.disabled is not None
    entry = Socket(
        Role.GATEWAY,
        "http" if plain else "https",
        GATEWAY_HTTP if plain else GATEWAY_HTTPS,
        "TCP",
        "the allowed routes, for clients",
        "listener address (lds.yaml)",
    )
    knob = "listener address (lds.yaml)"
    ops = Socket(Role.GATEWAY, "ops", GATEWAY_OPS, "TCP", "readiness and readback of the gateway", knob)
    # Not the ops port: behind that one is also what only the operator may ask.
    purpose = "GET /metrics of the gateway itself, and nothing else"
    metrics = Socket(Role.GATEWAY, "metrics", GATEWAY_METRICS, "TCP", purpose, knob)
    return (entry, ops) if spec.security.metrics is None else (entry, ops, metrics)


def _gateway_flows(spec: api.Spec, sockets: tuple[Socket, ...], context: Context) -> Iterator[Flow]:
    entry, ops, *_ = sockets
    clients = spec.gateway.clients
    peers = (PodPeer(),) if clients is None else peers_of(clients, outside_part, context)
    operator = (context.operator,)
    yield Inbound(Outside.CLIENTS, peers, entry, "requests to the allowed routes")
    yield Inbound(Outside.OPERATOR, operator, entry, "asks for forbidden routes, to see them refused")
    yield Inbound(Outside.OPERATOR, operator, ops, "reads back which configuration is served")


_PURPOSES = {
    "api": "vLLM's HTTP API",
    "kv-events": "KV events: which token blocks are cached",
    "mooncake-bootstrap": "Mooncake's bootstrap server",
    "barrier": "the gates of a group meet before its engines start; closed afterwards",
    "metrics": "GET /metrics of the engine beside it, and nothing else",
}


_HTTP = frozenset({"api", "metrics"})
"""Sockets of pods with an HTTP server: a headless one has nothing to scrape, its head counts for it."""


def _vllm_sockets(spec: api.Spec, side: Side) -> Iterator[Socket]:
    """The rows of the catalogue that this side opens, on the roles that open them."""
    roles = tuple(dict.fromkeys(side.members()))
    for row in catalogue.sockets().values():
        if row.when not in side.whens or row.role not in {"engine", side.role}:
            continue
        port = (row.spec and spec.ports.number(row.spec)) or row.port
        last = row.last
        if row.per == "rank":
            # One port for each rank; a rank's number is that of the whole replica, not of the pod.
            ranks = side.shape.ranks * side.shape.pods if side.data else 1
            last = port + ranks - 1 if ranks > 1 else None
        purpose = _PURPOSES.get(row.name, f"{row.name} ({row.speaks})")
        everywhere = row.on == "every" or (row.on == "scheduler" and side.data)
        for role in roles if everywhere else roles[:1]:
            if row.name in _HTTP and role.headless:
                continue
            yield Socket(role, row.name, port, row.protocol, purpose, row.knob, last)


def _exchange(sides: tuple[Side, ...]) -> Iterator[Flow]:
    """KV transfer: every rank of prefill and every rank of decode, both ways, on random ports."""
    here, there = (tuple(dict.fromkeys(side.members())) for side in sides)
    why = "KV transfer"
    for one in here:
        for other in there:
            yield Internal(one, every_port(other, why), why)
            yield Internal(other, every_port(one, why), why)


def _declared(spec: api.Spec, roles: list[Role], sockets: Sequence[Socket], context: Context) -> Iterator[Flow]:
    """What the spec opens in words, in both directions."""
    for rule in spec.security.egress:
        ports = tuple(PortRule(item.port, item.protocol) for item in rule.ports)
        peers = peers_of(rule.to, public_part, context)
        yield from (Outbound(role, Outside.DECLARED, peers, ports, rule.why) for role in roles)
    events = spec.security.kv_events
    if events is not None:
        readers = peers_of(events.from_, outside_part, context)
        yield from (
            Inbound(Outside.READERS, readers, socket, events.why) for socket in sockets if socket.name == "kv-events"
        )
    metrics = spec.security.metrics
    if metrics is not None:
        scrapers = peers_of(metrics.from_, outside_part, context)
        for socket in sockets:
            if socket.name == "metrics":
                scraped = "gateways" if socket.role is Role.GATEWAY else "engines"
                yield Inbound(Outside.MONITORING, scrapers, socket, f"scrapes the {scraped}' metrics")


def hub_port(source: api.HuggingFaceSource) -> int:
    """The port that the fetch Job connects to."""
    return urlsplit(source.endpoint or "").port or 443


def fetch_source(spec: api.Spec) -> api.HuggingFaceSource | None:
    """The source that a fetch Job downloads; None when the model is there already."""
    return spec.model.source.hugging_face if spec.model.source is not None else None
