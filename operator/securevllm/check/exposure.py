"""Which sockets a workload has, and who may reach each, given the policies, Services and routes of the same input.

What is told is what the NetworkPolicies say, never a measurement, and only what was given: a policy that is not in the
input is not there.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from securevllm import catalogue, netpol
from securevllm.check.workloads import Part, mappings
from securevllm.netpol import ByLabel, IPBlock, Pod, PodPeer, Policies, Rule

if TYPE_CHECKING:
    from securevllm.check.command import Launch

EPHEMERAL = (32768, 60999)
"""net.ipv4.ip_local_port_range, from which a port that is not configurable is drawn."""

EVERYBODY = "every pod of the cluster, and whoever is routed to it"


@dataclass(frozen=True)
class Socket:
    """A socket that a part of a workload listens on. ``inner``: made for the pods of the same group only."""

    name: str
    first: int
    last: int
    speaks: str
    inner: bool
    role: str = ""
    protocol: netpol.Protocol = "TCP"

    @property
    def ports(self) -> str:
        """Ports in words."""
        if (self.first, self.last) == EPHEMERAL:
            return "random ports"
        return f"port {self.first}" if self.first == self.last else f"ports {self.first}-{self.last}"


@dataclass(frozen=True)
class Reach:
    """Who may connect to a socket.

    Attributes:
        everybody: nothing isolates it, or a rule names nobody in particular.
        peers: those that rules name, each with the rule; own pods left out.
        own: pods of the same workload may.
        outside: addresses outside the cluster may.
    """

    everybody: bool
    peers: tuple[tuple[str, str], ...]
    own: bool
    outside: bool

    @property
    def nobody(self) -> bool:
        """Whether nobody but its own pods and its node may connect."""
        return not self.everybody and not self.peers


@dataclass(frozen=True)
class Published:
    """A way to a workload beside its pods' addresses.

    Attributes:
        by: the object, as ``Ingress ns/name``.
        how: in words, for example ``host example.org path /v1 and below``.
        outside: from outside of the cluster.
        exact: only this path; empty: everything below ``prefix``.
        prefix: path that the way begins with; empty: it does not look at paths.
    """

    by: str
    how: str
    outside: bool
    exact: str = ""
    prefix: str = ""


_Names = Mapping[tuple[str, str], set[int | str]]
"""Ports and port names that lead to the pods, by kind and name of what selects them."""


@dataclass(frozen=True)
class World:
    """What else is in the input.

    Attributes:
        policies: the NetworkPolicies.
        services: core/v1 Services, Gateway API's InferencePools too: both select pods.
        ways: Ingresses, HTTPRoutes and GRPCRoutes.
        pods: templates of everything that runs vLLM, to tell own pods from others.
    """

    policies: Policies
    services: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    ways: tuple[tuple[str, Mapping[str, Any]], ...] = ()
    pods: tuple[Pod, ...] = ()

    @cached_property
    def selectors(self) -> ByLabel[Mapping[str, Any]]:
        """The services, by what they select."""
        filed: ByLabel[Mapping[str, Any]] = ByLabel()
        for namespace, service in self.services:
            if selector := _selector(service):
                filed.add(namespace, selector.items(), service)
        return filed


def sockets(part: Part, version: catalogue.Version, *, grouped: bool) -> Iterator[Socket]:
    """The sockets that the flags and variables of a part open, from the catalogue.

    Args:
        part: of a workload.
        version: whose defaults.
        grouped: the workload has several pods in one group.
    """
    opened = _opened(part.launch, grouped=grouped)
    for row in catalogue.sockets().values():
        if row.when not in opened or version not in row.versions or not _listens(row, part):
            continue
        first = row.port or EPHEMERAL[0]
        last = row.last or row.port or EPHEMERAL[1]
        moved = _moved(row, part.launch)
        if moved is not None and row.port:
            first, last = moved, moved + (last - first)
        yield Socket(row.name, first, last, row.speaks, row.when != "api", part.role)


def _listens(row: catalogue.Socket, part: Part) -> bool:
    """Whether this pod does: no program of another pod or of ours, no first pod's socket in the others, no loopback."""
    if (
        row.role == "pod"
        or row.source.startswith("securevllm")
        or (row.on != "every" and (part.role == "worker" or part.launch.ray == "worker"))
    ):
        return False
    if row.bind in {"localhost", "127.0.0.1"}:
        return row.when == "ray" and part.launch.dashboard
    return True


def _opened(launch: Launch, *, grouped: bool) -> set[str]:
    opened = set()
    if launch.serves:
        opened |= {"always"} if launch.on("--headless") else {"always", "api"}
    backends = [_value(launch, name) for name in ("--distributed-executor-backend", "--data-parallel-backend")]
    by_ray = bool(launch.ray) or any(re.search(r"\bray\b", backend) for backend in backends)
    nodes, data = launch.number("--nnodes", 1), launch.number("--data-parallel-size", 1)
    if (grouped or nodes != 1) and not by_ray:
        opened |= {"nodes", "group"}
    spread = launch.flag("--data-parallel-address") or launch.flag("--data-parallel-size-local")
    if data != 1 and (spread or grouped or launch.on("--headless")):
        opened |= {"data", "group"}
    if by_ray:
        opened |= {"ray", "group"}
    sizes = (launch.number(f"--{name}-parallel-size", 1) for name in ("tensor", "pipeline", "data"))
    if "group" in opened or any(size != 1 for size in sizes):
        opened.add("ranks")
    connectors = {
        "nixl": "nixl", "mooncakestore": "mooncake-store", "mooncake": "mooncake", "p2pnccl": "p2p-nccl",
        "moriio": "moriio", "lmcache": "lmcache", "hf3fs": "hf3fs",
    }  # fmt: skip
    configured = _value(launch, "--kv-transfer-config").lower()
    opened |= {when for word, when in connectors.items() if word in configured}
    for flag, when in (
        ("--kv-events-config", "kv-events"),
        ("--ec-transfer-config", "encoder-cache"),
        ("--enable-elastic-ep", "elastic-ep"),
        ("--data-parallel-multi-port-external-lb", "multi-port"),
    ):
        if launch.flag(flag) is not None:
            opened.add(when)
    return opened


def _value(launch: Launch, name: str) -> str:
    """Everything that flags of this name say: a JSON key may be given by itself."""
    return " ".join(f"{flag.written} {flag.value}" for flag in launch.flags if flag.name == name)


def _moved(row: catalogue.Socket, launch: Launch) -> int | None:
    if row.knob.startswith("--"):
        return launch.number(row.knob, row.port)
    variable = launch.variables.get(row.knob)
    if variable is not None and variable.value is not None and re.fullmatch(r"[0-9]{1,5}", variable.value):
        return int(variable.value)
    return None


def reach(pod: Pod, socket: Socket, world: World) -> Reach:
    """Who may connect, by the policies of the input."""
    grants = world.policies.grants(pod, "Ingress")
    if grants is None:
        return Reach(everybody=True, peers=(), own=True, outside=True)
    rules = dict.fromkeys(
        grant.rule
        for grant in grants
        if grant.rule is not None
        and grant.protocol == socket.protocol
        and grant.first <= socket.last
        and socket.first <= grant.last
    )
    everybody = any(rule.peers is None or any(_is_everybody(peer) for peer in rule.peers) for rule in rules)
    named = [(peer, rule) for rule in rules for peer in rule.peers or ()]
    others = tuple(
        (str(peer), str(rule)) for peer, rule in named if not _is_own(peer, pod, world.pods) and not _is_everybody(peer)
    )
    return Reach(
        everybody=everybody,
        peers=others,
        own=everybody or any(_is_own(peer, pod, world.pods) for peer, _ in named),
        outside=any(rule.peers is None or any(isinstance(peer, IPBlock) for peer in rule.peers) for rule in rules),
    )


def _is_everybody(peer: netpol.Peer) -> bool:
    if isinstance(peer, IPBlock):
        return peer.cidr.prefixlen == 0
    return peer.namespaces is not None and peer.namespaces.everything and peer.pods.everything


def _is_own(peer: netpol.Peer, pod: Pod, pods: Iterable[Pod]) -> bool:
    """Whether a peer names pods of this template, and of no other template of the input."""
    if not isinstance(peer, PodPeer) or peer.pods.everything or not peer.pods.matches(pod.labels):
        return False
    if peer.namespaces is not None and not peer.namespaces.matches({netpol.NAMESPACE_NAME_LABEL: pod.namespace}):
        return False
    owner = pod.name.partition("/")[0]
    return not any(
        other.namespace == pod.namespace and other.name.partition("/")[0] != owner and peer.pods.matches(other.labels)
        for other in pods
    )


# ---------------------------------------------------------------------------------------------- Services and routes


def published(part: Part, port: int, world: World) -> Iterator[Published]:
    """Ports of the node and Services that lead to a port of a pod, and Ingresses and routes that lead to those."""
    pod = part.pod
    for entry in mappings(part.container.get("ports")):
        if entry.get("hostPort") and entry.get("containerPort") == port:
            yield Published(f"Pod {pod.key}", f"hostPort {entry['hostPort']} of its node", outside=True)
    names: defaultdict[tuple[str, str], set[int | str]] = defaultdict(set)
    for service in world.selectors.about(pod):
        if not _selector(service).items() <= pod.labels.items():
            continue
        name = str(_get(service, "metadata", "name"))
        by = f"{service['kind']} {pod.namespace}/{name}"
        if service["kind"] == "InferencePool":
            names["InferencePool", name].add(0)
            yield Published(by, "an InferencePool: its router leads every path to the pods", outside=False)
            continue
        ports = [entry for entry in mappings(_get(service, "spec", "ports")) if _target(entry, pod) == port]
        if not ports and _get(service, "spec", "clusterIP") != "None":
            continue
        names["Service", name] |= {
            value for entry in ports for key in ("port", "name") if isinstance(value := entry.get(key), int | str)
        }
        kind = str(_get(service, "spec", "type") or "ClusterIP")
        reached = ", ".join(str(entry.get("port")) for entry in ports) or "the pods' own ports"
        external = kind in {"NodePort", "LoadBalancer"} or bool(_get(service, "spec", "externalIPs"))
        ranges = _get(service, "spec", "loadBalancerSourceRanges")
        limited = f", for {', '.join(map(str, ranges))}" if isinstance(ranges, list) and ranges else ""
        yield Published(by, f"{kind} at port {reached}{limited}", outside=external)
    for namespace, way in world.ways:
        yield from _ways(namespace, way, names, pod.namespace)


def _ways(namespace: str, way: Mapping[str, Any], names: _Names, home: str) -> Iterator[Published]:
    by = f"{way['kind']} {namespace}/{_get(way, 'metadata', 'name')}"
    if way["kind"] == "Ingress":
        if namespace == home:
            yield from (
                Published(by, how, outside=True, exact=exact, prefix=prefix)
                for how, exact, prefix in _ingress(way, names)
            )
        return
    hosts = _get(way, "spec", "hostnames")
    host = f"host {', '.join(map(str, hosts))}, " if isinstance(hosts, list) and hosts else ""
    for rule in mappings(_get(way, "spec", "rules")):
        if not any(_backend(backend, names, namespace, home) for backend in mappings(rule.get("backendRefs"))):
            continue
        for match in mappings(rule.get("matches")) or [{}]:
            path = match.get("path") if isinstance(match.get("path"), Mapping) else {}
            kind, value = str((path or {}).get("type") or "PathPrefix"), str((path or {}).get("value") or "/")
            if kind == "Exact":
                yield Published(by, f"{host}path {value}", outside=True, exact=value)
            elif kind == "PathPrefix":
                yield Published(by, f"{host}{_below(value)}", outside=True, prefix=value)
            else:
                yield Published(by, f"{host}path matches {value}", outside=True, prefix="/")


def _ingress(way: Mapping[str, Any], names: _Names) -> Iterator[tuple[str, str, str]]:
    if _is_backend(_get(way, "spec", "defaultBackend", "service"), names):
        yield "default backend: every path", "", "/"
    for rule in mappings(_get(way, "spec", "rules")):
        host = f"host {rule['host']}, " if rule.get("host") else ""
        for entry in mappings(_get(rule, "http", "paths")):
            if not _is_backend(_get(entry, "backend", "service"), names):
                continue
            path = str(entry.get("path") or "/")
            if entry.get("pathType") == "Exact":
                yield f"{host}path {path}", path, ""
            elif entry.get("pathType") == "Prefix":
                yield f"{host}{_below(path)}", "", path
            else:  # a matter of the controller, often a regular expression
                yield f"{host}path {path}, as the controller reads it", "", "/"


def _is_backend(service: Any, names: _Names) -> bool:
    """Whether an IngressServiceBackend is one of the Services, at one of the ports that lead to the pods."""
    ports = names.get(("Service", str(_get(service, "name")))) if isinstance(service, Mapping) else None
    return ports is not None and any(
        isinstance(port := _get(service, "port", key), int | str) and port in ports for key in ("number", "name")
    )


def _below(path: str) -> str:
    return "every path" if path == "/" else f"path {path} and below"


def _backend(backend: Mapping[str, Any], names: _Names, namespace: str, home: str) -> bool:
    kind = str(backend.get("kind") or "Service")
    ports = names.get((kind, str(backend.get("name"))))
    port = backend.get("port")
    right = kind != "Service" or (ports is not None and isinstance(port, int) and port in ports)
    return (backend.get("namespace") or namespace) == home and ports is not None and right


def _selector(service: Mapping[str, Any]) -> dict[str, Any]:
    """The labels that a pod needs; empty: it selects none."""
    selector = _get(service, "spec", "selector")
    if service["kind"] == "InferencePool" and isinstance(selector, Mapping):
        selector = selector.get("matchLabels", selector)
    pairs = selector.items() if isinstance(selector, Mapping) else ()
    return {str(key): value if isinstance(value, Hashable) else repr(value) for key, value in pairs}  # of any YAML


def _target(entry: Mapping[str, Any], pod: Pod) -> int | None:
    target = entry.get("targetPort", entry.get("port"))
    if isinstance(target, str) and not target.isdigit():
        return next((named.port for named in pod.ports if named.name == target), None)
    return int(target) if isinstance(target, int | str) else None


def _get(obj: Mapping[str, Any], *path: str) -> Any:
    found: Any = obj
    for part in path:
        found = found.get(part) if isinstance(found, Mapping) else None
    return found


def egress(pod: Pod, world: World) -> tuple[Rule, ...] | None:
    """Rules that let a pod out; None: nothing holds it."""
    grants = world.policies.grants(pod, "Egress")
    if grants is None:
        return None
    # A rule whose ports are names has no grant here; it names pods, not the internet.
    policies: Sequence[netpol.Policy] = world.policies.selecting(pod, "Egress")
    return tuple(rule for policy in policies for rule in policy.rules["Egress"])
