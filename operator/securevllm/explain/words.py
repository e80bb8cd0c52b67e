"""One resource in words: pods, sockets, flows and routes, ready to be printed in any form."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from securevllm import catalogue
from securevllm.api import routes
from securevllm.context import CidrPeer, Context, PodPeer, Selector
from securevllm.context import Peer as AnyPeer
from securevllm.render import gateway
from securevllm.topology import (
    VLLM,
    Inbound,
    Internal,
    Mesh,
    Outbound,
    Outside,
    PortRule,
    Role,
    Socket,
    Topology,
    every_port,
    plan,
)

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.advisories import Hit
    from securevllm.api.parse import Accepted
    from securevllm.render.meta import Owner


@dataclass(frozen=True)
class BlindSpot:
    """A way past, or out of, what a NetworkPolicy can see; ``name`` also stands in docs/threat-model.md."""

    name: str
    why: str


UNSEEN = (
    BlindSpot("RDMA", "It does not cross the pod network, nor do secondary interfaces; a spec that has it accepts it."),
    BlindSpot("Host network", "A pod with hostNetwork has its node's address: policies cannot tell it from the node."),
    BlindSpot("exec and port-forward", "They come through the API server and the node; RBAC alone decides about them."),
    BlindSpot("A pod's own node", "It reaches every port of its pods, as kubelet's probes must: no policy stops it."),
    BlindSpot("DNS as a channel out", "A name that is looked up carries data to whoever answers for its domain."),
    BlindSpot("Plain HTTP", "From gateway to engine, prompts and the engine's key are readable between the nodes."),
)
"""What no NetworkPolicy sees, whatever the spec says."""

CAVEAT = (
    "This is what the operator asks of the cluster, not a measurement: the network plugin has to enforce it,"
    " and NetworkPolicies of others can open more."
)
CLOSED = "Every other connection is refused, in both directions; what no policy sees is listed below."


class Direction(StrEnum):
    """Where a flow leads, seen from the resource."""

    INBOUND = "inbound"
    INTERNAL = "internal"
    OUTBOUND = "outbound"


@dataclass(frozen=True)
class Peer:
    """Somebody outside in words; ``excluded``: ranges that are not meant."""

    words: str
    excluded: tuple[str, ...] = ()


@dataclass(frozen=True)
class Pods:
    """The pods of a role."""

    role: str
    replicas: int


@dataclass(frozen=True)
class Groups:
    """Model replicas whose pods start and end as one; no flow joins two of them but those of KV transfer.

    Attributes:
        names: of the groups, in the order in which they start.
        members: roles of the pods of each, by rank.
    """

    names: tuple[str, ...]
    members: tuple[str, ...]


@dataclass(frozen=True)
class Flow:
    """Who may open connections to whom.

    Attributes:
        direction: seen from the resource.
        source: a role, or a kind of outsider.
        destination: the same.
        socket: name of the destination's socket; empty outside.
        peers: who the outsider is; empty for an internal flow.
        ports: destination ports.
        why: the reason, of the topology or in the user's words.
    """

    direction: Direction
    source: str
    destination: str
    socket: str
    peers: tuple[Peer, ...]
    ports: tuple[PortRule, ...]
    why: str


@dataclass(frozen=True)
class Route:
    """A route that passes the gateway. ``vllm_key``: vLLM itself would ask for a key, too."""

    method: str
    path: str
    streaming: bool
    vllm_key: bool
    opened_by: str


@dataclass(frozen=True)
class Fact:
    """One line of the summary; ``open``: less closed than the default."""

    name: str
    words: str
    open: bool = False


@dataclass(frozen=True)
class Advisory:
    """A published hole in this vLLM.

    Attributes:
        id: of the advisory.
        severity: of ``catalogue.SEVERITIES``.
        summary: what it is.
        held: what keeps an attacker away from it; empty: only a newer vLLM does.
        fixed_in: first release without it; empty: none is known.
    """

    id: str
    severity: str
    summary: str
    held: str
    fixed_in: str


@dataclass(frozen=True)
class View:
    """Everything that is told about one resource.

    Attributes:
        name: of the resource.
        namespace: of the resource.
        model: what is served.
        image: what serves it.
        version: of vLLM, as the catalogue was asked.
        url: where clients find the gateway.
        suspended: no pods, while the policies are kept.
        summary: the questions that a reviewer has first.
        pods: roles with replicas.
        groups: which of them are bound together; one entry a side.
        sockets: what listens.
        flows: who may talk to whom; nothing else is allowed.
        routes: what passes the gateway; nothing else does.
        refused: number of vLLM's routes that do not pass.
        never: how many of them no spec can open.
        risks: what the spec gives up.
        advisories: published holes that concern the spec, worst first.
        unseen: what no NetworkPolicy sees.
    """

    name: str
    namespace: str
    model: str
    image: str
    version: str
    url: str
    suspended: bool
    summary: tuple[Fact, ...]
    pods: tuple[Pods, ...]
    groups: tuple[Groups, ...]
    sockets: tuple[Socket, ...]
    flows: tuple[Flow, ...]
    routes: tuple[Route, ...]
    refused: int
    never: int
    risks: tuple[str, ...]
    advisories: tuple[Advisory, ...] = ()
    unseen: tuple[BlindSpot, ...] = UNSEEN


def view(owner: Owner, accepted: Accepted, context: Context) -> View:
    """Put a resource into words.

    Args:
        owner: name and namespace of the resource.
        accepted: its judged spec.
        context: the cluster.
    """
    spec = accepted.spec
    topology = plan(spec, context)
    passing = _routes(spec, accepted.version)
    known = catalogue.routes_of(accepted.version)
    groups = tuple(_groups(topology))
    flows = tuple(_flows(topology, owner.namespace))
    risks = tuple(map(_line, accepted.risks))
    advisories = tuple(map(_advisory, accepted.advisories))
    return View(
        name=_line(owner.name),
        namespace=_line(owner.namespace),
        model=_line(spec.model.name),
        image=_line(spec.image),
        version=str(accepted.version),
        url=_line(gateway.url(owner, spec, context)),
        suspended=spec.suspend,
        summary=(
            *_summary(owner, spec, groups=groups, flows=flows, passing=passing, risks=risks),
            _published(advisories),
        ),
        pods=tuple(Pods(item.role.value, item.replicas) for item in topology.pods),
        groups=groups,
        sockets=topology.sockets,
        flows=flows,
        routes=passing,
        refused=len(known) - sum((route.method, route.path) in known for route in passing),
        never=sum(route.never or route.method == catalogue.WEBSOCKET for route in known.values()),
        risks=risks,
        advisories=advisories,
    )


def _advisory(hit: Hit) -> Advisory:
    found = hit.advisory
    held = catalogue.CONTROLS[hit.control] if hit.control else ""
    return Advisory(found.id, found.severity, found.summary, held, str(found.fixed or ""))


def _groups(topology: Topology) -> Iterator[Groups]:
    for members in dict.fromkeys(group.members for group in topology.groups):
        names = tuple(group.name for group in topology.groups if group.members == members)
        yield Groups(names, tuple(role.value for role in members))


def _line(text: str) -> str:
    """The text as one printable line; isprintable() also refuses marks that reverse the direction of writing."""
    return "".join(char if char.isprintable() else f"\\u{ord(char):04x}" for char in text)


def _routes(spec: api.Spec, version: catalogue.Version) -> tuple[Route, ...]:
    wanted = spec.gateway.routes
    entries: dict[tuple[str, str], api.AllowEntry] = {(entry.method, entry.path): entry for entry in wanted.allow}
    found = []
    for route in routes.allowed(spec, version):
        entry = entries.get((route.method, route.path))
        profiles = [name for name in wanted.profiles if name in route.profiles]
        why = "" if entry is None or entry.unknown_route is None else f": {entry.unknown_route}"
        opened = ", ".join([*profiles, *([f"routes.allow{why}"] if entry else [])])
        found.append(Route(route.method, route.path, route.streaming, vllm_key=route.key, opened_by=_line(opened)))
    return tuple(found)


def _flows(topology: Topology, namespace: str) -> Iterator[Flow]:
    """Every flow; groups of one side are alike, so the first stands for all of them."""
    groups = {group.name: group for group in topology.groups}
    told: set[tuple[Role, ...]] = set()
    for flow in topology.flows:
        if not isinstance(flow, Mesh):
            yield _flow(flow, namespace)
        elif (members := groups[flow.group].members) not in told:
            told.add(members)
            pairs = dict.fromkeys(itertools.permutations(members, 2))
            yield from (
                _to_socket(Direction.INTERNAL, one, every_port(other, ""), (), flow.why) for one, other in pairs
            )


def _flow(flow: Inbound | Internal | Outbound, namespace: str) -> Flow:
    match flow:
        case Inbound():
            peers = tuple(_peer(peer, namespace) for peer in flow.peers)
            return _to_socket(Direction.INBOUND, flow.source, flow.to, peers, flow.why)
        case Internal():
            return _to_socket(Direction.INTERNAL, flow.source, flow.to, (), flow.why)
        case Outbound():
            peers = tuple(_peer(peer, namespace) for peer in flow.peers)
            source, destination = flow.source.value, flow.to.value
            return Flow(Direction.OUTBOUND, source, destination, "", peers, flow.ports, _line(flow.why))


def _to_socket(direction: Direction, source: Role | Outside, to: Socket, peers: tuple[Peer, ...], why: str) -> Flow:
    return Flow(direction, source.value, to.role.value, to.name, peers, (to.rule,), _line(why))


def _peer(peer: AnyPeer, namespace: str) -> Peer:
    if isinstance(peer, CidrPeer):
        return Peer(_line(peer.cidr), tuple(map(_line, peer.excluded)))
    return Peer(_line(f"{_pods(peer)} of {_namespaces(peer.namespaces, namespace)}"))


def _pods(peer: PodPeer) -> str:
    return f"pods {_selector(peer.pods)}" if peer.pods is not None and peer.pods != Selector() else "every pod"


def _namespaces(selector: Selector | None, namespace: str) -> str:
    match selector:
        case None:
            return f"namespace {namespace}"
        case Selector(labels=(), expressions=()):
            return "every namespace"
        case Selector(labels=(("kubernetes.io/metadata.name", name),), expressions=()):
            return f"namespace {name}"
        case _:
            return f"namespaces {_selector(selector)}"


def _selector(selector: Selector) -> str:
    """The selector as ``kubectl -l`` takes it."""
    parts = [f"{key}={value}" for key, value in selector.labels]
    for key, operator, values in selector.expressions:
        match operator:
            case "Exists":
                parts.append(key)
            case "DoesNotExist":
                parts.append(f"!{key}")
            case _:
                parts.append(f"{key} {operator.lower()} ({','.join(values)})")
    return ",".join(parts)


def _summary(
    owner: Owner,
    spec: api.Spec,
    *,
    groups: Iterable[Groups],
    flows: tuple[Flow, ...],
    passing: tuple[Route, ...],
    risks: tuple[str, ...],
) -> tuple[Fact, ...]:
    authentication, tls = spec.gateway.authentication, spec.gateway.tls
    clients = [peer for flow in flows if flow.source == Outside.CLIENTS for peer in flow.peers]
    # Every role that runs vLLM may reach the same.
    reached = dict.fromkeys(
        f"{told(flow.peers, counted=True)} at {port_list(flow.ports)}" for flow in flows if _is_declared(flow)
    )
    readers = _outsiders(flows, Outside.READERS)
    scrapers = _outsiders(flows, Outside.MONITORING)
    if authentication.none is not None:
        key = "no key is asked for"
    elif authentication.api_keys is not None:
        key = f"a client key of Secret {', '.join(ref.name for ref in authentication.api_keys.secret_refs)}"
    else:
        key = f"the generated client key, Secret {owner.child(gateway.CLIENT_KEYS_SUFFIX)}"
    if tls.disabled is not None:
        wire = "plain HTTP"
    else:
        wire = f"TLS, certificate of Secret {tls.secret_name or owner.child(gateway.TLS_SUFFIX)}"
    beside = [
        f"{flow.source} to {flow.destination} at {port_list(flow.ports)}"
        for flow in flows
        if flow.direction is Direction.OUTBOUND and flow.source not in set(VLLM) and flow.destination != Outside.DNS
    ]
    together = [f"{count(len(item.names), 'group')} of {count(len(item.members), 'pod')}" for item in groups]
    return (
        Fact(
            "Who may connect",
            told(clients, counted=True) or "nobody",
            any("gateway.clients" in risk for risk in risks),
        ),
        Fact("What they need", _line(f"{key}; {wire}"), authentication.none is not None or tls.disabled is not None),
        Fact("What they may ask", f"{count(len(passing), 'exact route')}; the gateway refuses everything else"),
        *(
            [Fact("Who trusts whom", f"{' and '.join(together)}; within a group every TCP port is open")]
            if any(len(item.members) > 1 for item in groups)
            else []
        ),
        *([Fact("Who reads KV events", told(readers, counted=True), open=True)] if readers else []),
        *([Fact("Who scrapes metrics", told(scrapers, counted=True), open=True)] if scrapers else []),
        Fact("What an engine may reach", "; ".join(["DNS", *reached]) + "; nothing else", bool(reached)),
        Fact("What other pods may reach", "; ".join(["DNS", *beside]) + "; nothing else"),
        Fact(
            "What the spec gives up",
            f"{count(len(risks), 'safe default')}, listed below" if risks else "nothing",
            bool(risks),
        ),
    )


def _outsiders(flows: Iterable[Flow], kind: Outside) -> list[Peer]:
    """Who of a kind opens connections, each once."""
    return list(dict.fromkeys(peer for flow in flows if flow.source == kind for peer in flow.peers))


def _published(advisories: tuple[Advisory, ...]) -> Fact:
    bare = sum(not item.held for item in advisories)
    if not advisories:
        return Fact("Published holes", "none that the catalogue knows")
    told = f"{count(len(advisories), 'advisory', 'advisories')}, {bare or 'none'} without a control; listed below"
    return Fact("Published holes", told, open=bare > 0)


def concern(advisory: Advisory) -> str:
    """What keeps an attacker away, and which release fixes it."""
    fixed = f"vLLM {advisory.fixed_in} fixes it" if advisory.fixed_in else "no fixed vLLM is known"
    return f"{advisory.held or 'nothing here keeps an attacker away'}; {fixed}"


def count(number: int, noun: str, nouns: str = "") -> str:
    """A number of things; ``nouns``: their plural, when it does not end in s alone."""
    return f"{number} {noun}" if number == 1 else f"{number} {nouns or f'{noun}s'}"


def _is_declared(flow: Flow) -> bool:
    return flow.destination == Outside.DECLARED


def told(peers: Iterable[Peer], *, counted: bool = False) -> str:
    """Peers in words. ``counted``: how many ranges are excluded, not which."""
    return (" and " if counted else "; ").join(
        f"{peer.words} except {f'{len(peer.excluded)} ranges' if counted else ', '.join(peer.excluded)}"
        if peer.excluded
        else peer.words
        for peer in peers
    )


def port_list(ports: Iterable[PortRule]) -> str:
    """Protocol and number of each port or range."""
    return ", ".join(map(str, ports))


def target(flow: Flow) -> str:
    """``role/socket`` of this resource, or the kind of outsider."""
    return f"{flow.destination}/{flow.socket}" if flow.socket else flow.destination


def refused(seen: View) -> str:
    """What the gateway does with all other routes."""
    return (
        f"Everything else is refused: {seen.refused} further routes of vLLM {seen.version}, of which no spec can open"
        f" {seen.never}."
    )
