"""What is probed, and what gateways are asked. Pure: from the topology, the pods and the catalogue."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from securevllm import catalogue, netpol
from securevllm.api import addresses
from securevllm.context import CidrPeer
from securevllm.render import engine, gateway, router, sidecar
from securevllm.render.meta import GROUP_LABEL, ROLE_LABEL
from securevllm.topology import VLLM, Inbound, Role, Topology

if TYPE_CHECKING:
    from securevllm.context import Peer, Selector

PROBED = frozenset({*VLLM, Role.ROUTER})
_OF_GATEWAYS = frozenset({"metrics"})
"""Sockets of gateways that only declared peers may reach; the others are for clients, or for the operator."""
_STARTUP_ONLY = frozenset({"barrier"})
"""Sockets that are closed when a pod is Ready: refused would say nothing."""

_DECLARED = {
    (engine.CONTAINER, engine.API_PORT): "api",
    (router.ROLE, engine.API_PORT): "api",
    (sidecar.NAME, sidecar.NAME): sidecar.SOCKET,
    (gateway.CONTAINER, gateway.METRICS_PORT): "metrics",
}
"""Sockets that pods themselves name: container and name of its port."""

ASKED_AT_MOST = 64
"""Forbidden requests that one gateway is asked in a round."""

_POSTS = 4
_DANGEROUS = frozenset({"control", "observability"})

_VARIABLE = re.compile(r"\{[a-z_]+\}")

LIMITS = ("random ports", "UDP", "the pods' own nodes", "hostNetwork pods", "exec and port-forward")
"""What no round measures; said with every verdict."""


@dataclass(frozen=True)
class Endpoint:
    """A socket of a pod that must not be reached.

    Attributes:
        pod: name.
        uid: of the pod: a recreated one is another.
        node: where it runs.
        group: the world that it belongs to: its group, or the pod itself.
        address: one of its addresses; each family is probed.
        port: number.
        socket: name in the topology.
        gateway: the pod is one: no engine, and no reason to say that engines are isolated.
    """

    pod: str
    uid: str
    node: str
    group: str
    address: str
    port: int
    socket: str
    gateway: bool = False


def endpoints(topology: Topology, pods: Iterable[Mapping[str, Any]]) -> tuple[Endpoint, ...]:
    """Every named fixed TCP port of every Ready pod that runs model code or routes to it, and what gateways hide.

    Without one of the former there is nothing: a gateway without engines has nobody to isolate.
    """
    ports: dict[str, dict[str, int]] = {}
    for socket in topology.sockets:
        probed = socket.name in _OF_GATEWAYS if socket.role is Role.GATEWAY else socket.role in PROBED
        if probed and socket.protocol == "TCP" and socket.port and socket.name not in _STARTUP_ONLY:
            # Of a range (one port for each rank) the first is listened on by some pod only: the others would say less.
            ports.setdefault(socket.role, {})[socket.name] = socket.port
    found = tuple(
        Endpoint(
            pod["metadata"]["name"],
            pod["metadata"]["uid"],
            pod["spec"].get("nodeName", ""),
            pod["metadata"]["labels"].get(GROUP_LABEL) or pod["metadata"]["name"],
            address["ip"],
            port,
            name,
            gateway=pod["metadata"]["labels"].get(ROLE_LABEL) == Role.GATEWAY,
        )
        for pod in sorted(pods, key=lambda item: str(item["metadata"]["name"]))
        if is_ready(pod)
        for address in pod["status"].get("podIPs", ())
        for name, port in sorted(_listening(pod, ports).items(), key=lambda item: item[1])
    )
    return found if any(not item.gateway for item in found) else ()


def _listening(pod: Mapping[str, Any], ports: Mapping[str, Mapping[str, int]]) -> Mapping[str, int]:
    """Ports of a pod by the names of their sockets.

    A pod may be of an older template than the topology, and listen on what it was started with: what it names itself
    counts, and of these sockets it has no others.
    """
    role = pod["metadata"]["labels"].get(ROLE_LABEL, "")
    known = ports.get(role, {})
    probed = role in PROBED or (role == Role.GATEWAY and bool(known))  # Envoy opens and shuts, whatever the pod names
    named = {
        _DECLARED[container["name"], port.get("name", "")]: int(port["containerPort"])
        for container in pod["spec"].get("containers", ())
        for port in container.get("ports", ())
        if probed and (container["name"], port.get("name", "")) in _DECLARED
    }
    if role == Role.GATEWAY:
        return named
    return {name: port for name, port in known.items() if name not in _DECLARED.values()} | named if named else known


def is_ready(pod: Mapping[str, Any]) -> bool:
    """Whether a pod is Ready, and stays: only then its sockets are known to listen."""
    conditions = {item["type"]: item["status"] for item in pod.get("status", {}).get("conditions", ())}
    return conditions.get("Ready") == "True" and not pod["metadata"].get("deletionTimestamp")


def one_per_group(found: Iterable[Endpoint]) -> tuple[Endpoint, ...]:
    """The cheap round: one port of each group; none of a gateway."""
    first: dict[str, Endpoint] = {}
    for endpoint in found:
        if not endpoint.gateway:
            first.setdefault(endpoint.group, endpoint)
    return tuple(first.values())


@dataclass(frozen=True)
class Place:
    """Where somebody stands who tries connections.

    Attributes:
        namespace: of the pod; None: not known.
        beside: that is the namespace of the resource.
        labels: of the pod.
        exact: the pod has no other labels; otherwise it has these and perhaps more.
    """

    namespace: str | None
    beside: bool
    labels: Mapping[str, str]
    exact: bool = False


def shut(topology: Topology, found: Iterable[Endpoint], place: Place) -> tuple[Endpoint, ...]:
    """The endpoints that nobody at a place may reach, for certain: to reach another one would be no breach."""
    opened = [flow for flow in topology.flows if isinstance(flow, Inbound)]
    return tuple(
        endpoint
        for endpoint in found
        if not any(
            (flow.to.name, flow.to.role is Role.GATEWAY) == (endpoint.socket, endpoint.gateway)
            and any(_may(peer, place, endpoint.address) for peer in flow.peers)
            for flow in opened
        )
    )


def left_out(topology: Topology, found: Iterable[Endpoint], places: Mapping[str, Place]) -> tuple[str, ...]:
    """What is not tried because the spec may allow it, for a person.

    Args:
        topology: what is allowed.
        found: what would be tried.
        places: name of a vantage point to where it is.
    """
    everything, told = [*found], []
    for vantage, place in places.items():
        left = {*everything} - {*shut(topology, everything, place)}
        names = ", ".join(sorted({f"{item.socket} {item.port}" for item in left}))
        told += [f"{names} from {vantage} (the spec may allow it)"] if left else []
    return tuple(told)


def _may(peer: Peer, place: Place, address: str) -> bool:
    """Whether a peer may be at a place; what is not known of it counts as yes."""
    if isinstance(peer, CidrPeer):
        # Some network plugins read a range as pods, too. Pods have addresses like those of the engines, but every node
        # has a range of its own: one that is not public may be that of the place, though the engine is not in it.
        there, network = ipaddress.ip_address(address), ipaddress.ip_network(peer.cidr)
        if there.version != network.version:
            return False
        excluded = any(there in ipaddress.ip_network(cidr) for cidr in peer.excluded)
        return not addresses.is_public(network) or (there in network and not excluded)
    name = {netpol.NAMESPACE_NAME_LABEL: place.namespace} if place.namespace is not None else {}
    home = place.beside if peer.namespaces is None else _selects(peer.namespaces, name, exact=False)
    return home and (peer.pods is None or _selects(peer.pods, place.labels, exact=place.exact))


def _selects(selector: Selector, labels: Mapping[str, str], *, exact: bool) -> bool:
    known = [item for item in selector.labels if exact or item[0] in labels]
    terms = [item for item in selector.expressions if exact or item[0] in labels]
    return all(labels.get(key) == value for key, value in known) and all(
        netpol.Expression(key, cast("Any", operator), frozenset(values)).matches(labels)
        for key, operator, values in terms
    )


@dataclass(frozen=True)
class Request:
    """A request that every gateway must refuse, and that would do no harm if it did not.

    Attributes:
        method: GET on what vLLM takes by POST only, so that vLLM itself would refuse it.
        path: without variables.
        body: not JSON, for what is sent by POST.
        keyed: with the prober's key.
    """

    method: str
    path: str
    body: str = ""
    keyed: bool = True


def requests(version: catalogue.Version, allowed: Iterable[tuple[str, str]], *, authenticated: bool) -> list[Request]:
    """What a gateway is asked in a full round.

    Args:
        version: of vLLM.
        allowed: method and path of the effective allowlist.
        authenticated: whether clients need a key.
    """
    opened = {*allowed}
    # A path with a variable may be the neighbour of an open one: only literal ones are surely shut.
    shut = [
        route
        for key, route in sorted(catalogue.routes_of(version).items())
        if key not in opened and route.method != catalogue.WEBSOCKET and _VARIABLE.search(route.path) is None
    ]
    shut.sort(key=lambda route: route.category not in _DANGEROUS)
    wanted = [
        Request("GET", path) for path in dict.fromkeys(route.path for route in shut) if ("GET", path) not in opened
    ]
    # Inference reads a body: vLLM answers 4xx to what is not JSON. Control routes that read none are never sent a POST.
    posts = [route.path for route in shut if route.method == "POST" and route.category == "inference"]
    wanted = [*wanted[: ASKED_AT_MOST - len(posts[:_POSTS])], *(Request("POST", path, "{") for path in posts[:_POSTS])]
    if authenticated:
        wanted += [Request("GET", path, keyed=False) for method, path in sorted(opened) if method == "GET"][:1]
    return wanted
