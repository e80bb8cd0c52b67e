"""A cluster to ask about: pods of several resources, everybody who is not one of them, and what the topology says.

`expected` is the other side of the comparison: it reads `Topology.flows` and nothing of `render/`. Its labels are
written out here, not imported, because pods get theirs from templates and policies theirs from selectors: if the
two ever differ, this has to notice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from ipaddress import ip_address, ip_network
from typing import Any, Literal

from securevllm.api.addresses import NOT_PUBLIC
from securevllm.api.parse import parse
from securevllm.context import CidrPeer, Context, Peer, Selector
from securevllm.render import Observed, Rendered, render
from securevllm.render.meta import Owner
from securevllm.topology import Inbound, Internal, Mesh, Outbound, Role, Socket, Topology
from tests.netpol import Engine, Evaluator, External, Node, Pod, pod_from_template

NAMESPACES = {
    "apps": {"team": "red"},
    "other": {"team": "blue", "app": "web"},
    "secure-vllm-operator": {},
    "kube-system": {},
}
NODES = (Node("node-1", ("172.18.0.2", "2001:db8:ffff::2")), Node("node-2", ("172.18.0.3", "2001:db8:ffff::3")))
CONTEXT = Context(cluster_ranges=("10.244.0.0/16", "10.96.0.0/12", "172.18.0.0/16", "2001:db8::/32"))
PUBLIC_CONTEXT = Context(
    cluster_ranges=("1.1.0.0/16", "172.18.0.0/16", "2001:db8::/32"),
    dns=(*Context().dns, CidrPeer("169.254.20.10/32")),
    dns_port=5353,
)
"""A cluster whose pods have public addresses: only `cluster_ranges` keeps them out of 0.0.0.0/0.

Its DNS listens elsewhere, and also on the link-local address of NodeLocal DNSCache.
"""

ALL = frozenset(range(1, 65536))
FOREIGN = {"app": "web"}
PROTOCOLS: tuple[Literal["TCP", "UDP"], ...] = ("TCP", "UDP")

Endpoint = Pod | Node | External


@dataclass(frozen=True, eq=False)
class Member:
    """A pod of a resource. Without a topology it is a remainder of a deleted resource: it may do nothing.

    ``group`` is empty for the pods of a Deployment or a Job.
    """

    pod: Pod
    owner: Owner
    role: Role
    group: str
    topology: Topology | None


@dataclass(frozen=True)
class World:
    """Members, everybody else, and the policies that were rendered for all resources."""

    members: tuple[Member, ...]
    outsiders: tuple[Endpoint, ...]
    policies: tuple[dict[str, Any], ...]

    def pods(self) -> list[Pod]:
        """Every pod."""
        return [member.pod for member in self.members] + [item for item in self.outsiders if isinstance(item, Pod)]


def rendered(name: str, namespace: str, uid: str, raw: dict[str, Any], context: Context) -> tuple[Owner, Rendered]:
    """Parse and render one resource."""
    owner = Owner(name, namespace, uid)
    return owner, render(owner, parse(name, raw), context, Observed())


class _Addresses:
    """Pod addresses within the cluster's ranges, one after the other."""

    def __init__(self, prefix: str) -> None:
        self._prefix, self._count = prefix, 0

    def next(self) -> tuple[str, str]:
        self._count += 1
        return f"{self._prefix}.{self._count}", f"2001:db8:1::{self._count:x}"


def world(resources: Iterable[tuple[Owner, Rendered]], context: Context) -> World:
    """Make two pods of each role, all of each group, remainders of the first one's predecessor, and the outside."""
    addresses = _Addresses("1.1.1" if context is PUBLIC_CONTEXT else "10.244.0")
    found = list(resources)
    owner, made = found[0]
    members = _members(owner, made, addresses, made.topology, NODES)
    before = Owner(owner.name, owner.namespace, "uid of the deleted one")
    for one in {(one.role, one.group): one for one in members}.values():
        labels = {**one.pod.labels, "securevllm.io/resource": before.label}
        pod = Pod(f"before-{one.pod.name}", one.pod.namespace, labels, addresses.next())
        members.append(Member(pod, before, one.role, one.group, None))
    for owner, made in found[1:]:
        members += _members(owner, made, addresses, made.topology, NODES[:1])
    # Somebody copied our labels in another namespace; its default-deny keeps those pods shut.
    stranger = Owner("stranger", "other", "")
    members += [
        Member(
            Pod(f"copy-{one.pod.name}", "other", one.pod.labels, addresses.next()), stranger, one.role, one.group, None
        )
        for one in members
        if one.owner == found[0][0]
    ]
    denies = {item.deny["metadata"]["namespace"]: item.deny for _, item in found}
    policies = [*denies.values(), *(policy for _, item in found for policy in item.isolation)]
    return World(tuple(members), (*_other_pods(addresses), *NODES, *_externals()), tuple(policies))


def _members(
    owner: Owner, made: Rendered, addresses: _Addresses, topology: Topology, nodes: tuple[Node, ...]
) -> list[Member]:
    members: list[Member] = []
    for workload in (*made.workloads, *made.withheld):
        template = workload["spec"]["template"]
        labels = template["metadata"]["labels"]
        # A member of a group is one pod; of a Deployment there is one on each node.
        alone = workload["kind"] == "StatefulSet"
        for node in nodes[len(members) % len(nodes) :][:1] if alone else nodes:
            pod = pod_from_template(
                template,
                name=f"{workload['metadata']['name']}-{owner.label}-{node.name}",
                namespace=owner.namespace,
                ips=addresses.next(),
                node=node.name,
            )
            role, group = Role(labels["securevllm.io/role"]), labels.get("securevllm.io/group", "")
            members.append(Member(pod, owner, role, group, topology))
    return members


def _other_pods(addresses: _Addresses) -> Iterable[Pod]:
    operator, dns = {"app.kubernetes.io/name": "secure-vllm-operator"}, {"k8s-app": "kube-dns"}
    labels: list[tuple[str, dict[str, str]]] = [
        ("secure-vllm-operator", operator),
        ("secure-vllm-operator", FOREIGN),
        ("kube-system", dns),
        ("kube-system", FOREIGN),
        ("apps", operator),
        ("other", operator),
        ("other", dns),
        ("apps", {}),
        # Labels of ours, but not the one that the default-deny selects by: they must not count as members.
        ("apps", {"securevllm.io/role": "gateway"}),
        ("other", {"securevllm.io/role": "engine"}),
    ]
    labels += [
        (namespace, {"app": app, "team": team})
        for namespace in ("apps", "other")
        for app, team in (("web", "red"), ("batch", "blue"))
    ]
    for index, (namespace, of) in enumerate(labels):
        yield Pod(f"other-{index}", namespace, of, addresses.next(), node=NODES[index % 2].name)


def _externals() -> Iterable[External]:
    # One address of each range that is never meant, and some of the internet.
    special = [str(network[min(10, network.num_addresses - 1)]) for network in NOT_PUBLIC]
    public = ["1.1.1.250", "8.8.8.8", "192.0.2.7", "192.0.2.200", "2606:4700::1111", "2a00::1"]
    private = ["169.254.20.10", "169.254.169.254", "10.1.2.3", "172.20.0.1", "192.168.7.7", "fd00:ec2::254"]
    for address in dict.fromkeys(special + public + private):
        yield External(address, (address,))


# ------------------------------------------------------------------------------------------------ what flows allow


def expected(world: World, source: Endpoint, destination: Endpoint, protocol: str) -> frozenset[int]:
    """Ports that the flows allow from source to destination."""
    by_pod = {id(member.pod): member for member in world.members}
    sender, receiver = by_pod.get(id(source)), by_pod.get(id(destination))
    out = ALL if sender is None else egress(sender, receiver, destination, protocol)
    into = ALL if receiver is None else ingress(receiver, sender, source, protocol)
    return out & into


def egress(sender: Member, receiver: Member | None, destination: Endpoint, protocol: str) -> frozenset[int]:
    """Ports that the flows let a member open connections to."""
    ports: set[int] = set()
    for flow in sender.topology.flows if sender.topology else ():
        match flow:
            case Internal() if flow.source == sender.role and _is(receiver, sender.owner, flow.to.role):
                ports |= _numbers(flow.to, protocol)
            case Mesh() if flow.group == sender.group and _shares(sender, receiver) and protocol == "TCP":
                return ALL
            case Outbound() if flow.source == sender.role and _any(flow.peers, sender.owner, destination):
                ports |= {rule.port for rule in flow.ports if rule.protocol == protocol}
            case _:
                pass
    return _known(ports)


def ingress(receiver: Member, sender: Member | None, source: Endpoint, protocol: str) -> frozenset[int]:
    """Ports of a member that the flows let somebody open connections to. Its own node always reaches it: probes."""
    if isinstance(source, Node) and source.name == receiver.pod.node:
        return ALL
    ports: set[int] = set()
    for flow in receiver.topology.flows if receiver.topology else ():
        match flow:
            case Internal() if flow.to.role == receiver.role and _is(sender, receiver.owner, flow.source):
                ports |= _numbers(flow.to, protocol)
            case Mesh() if flow.group == receiver.group and _shares(receiver, sender) and protocol == "TCP":
                return ALL
            case Inbound() if flow.to.role == receiver.role and _any(flow.peers, receiver.owner, source):
                ports |= _numbers(flow.to, protocol)
            case _:
                pass
    return _known(ports)


def _known(ports: set[int]) -> frozenset[int]:
    """The set, as an object whose hash is known already when it is that of every port."""
    return ALL if len(ports) == len(ALL) else frozenset(ports)


def _numbers(socket: Socket, protocol: str) -> frozenset[int]:
    if socket.protocol != protocol:
        return frozenset()
    return _range(socket.port, socket.last or socket.port)


@cache
def _range(first: int, last: int) -> frozenset[int]:
    return ALL if (first, last) == (1, 65535) else frozenset(range(first, last + 1))


def _shares(one: Member, other: Member | None) -> bool:
    return other is not None and (one.owner, one.group) == (other.owner, other.group)


def _is(member: Member | None, owner: Owner, role: Role) -> bool:
    return member is not None and (member.owner, member.role) == (owner, role)


def _any(peers: tuple[Peer, ...], owner: Owner, endpoint: Endpoint) -> bool:
    return any(_names(peer, owner, endpoint) for peer in peers)


def _names(peer: Peer, owner: Owner, endpoint: Endpoint) -> bool:
    if isinstance(peer, CidrPeer):
        if not isinstance(endpoint, External):
            return False
        address = ip_address(endpoint.ips[0])
        return address in _network(peer.cidr) and not any(address in _network(cidr) for cidr in peer.excluded)
    if not isinstance(endpoint, Pod):
        return False
    if peer.namespaces is None:
        there = endpoint.namespace == owner.namespace
    else:
        labels = {**NAMESPACES.get(endpoint.namespace, {}), "kubernetes.io/metadata.name": endpoint.namespace}
        there = _selects(peer.namespaces, labels)
    return there and (peer.pods is None or _selects(peer.pods, endpoint.labels))


_network = cache(ip_network)

_HOLDS: Mapping[str, Callable[[Mapping[str, str], str, tuple[str, ...]], bool]] = {
    "In": lambda labels, key, values: labels.get(key) in values,
    "NotIn": lambda labels, key, values: labels.get(key) not in values,
    "Exists": lambda labels, key, _: key in labels,
    "DoesNotExist": lambda labels, key, _: key not in labels,
}


def _selects(selector: Selector, labels: Mapping[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.labels) and all(
        _HOLDS[operator](labels, key, values) for key, operator, values in selector.expressions
    )


# ------------------------------------------------------------------------------------------------------ comparison

Side = Literal["both", "Ingress", "Egress"]
ONE_SIDE: tuple[Side, ...] = ("Ingress", "Egress")


def differences(world: World, engine: Engine, sides: tuple[Side, ...] = ONE_SIDE) -> Iterator[str]:
    """Where the policies allow something else than the flows, as sentences, about the first resource's pods.

    A connection needs both directions. Each is asked for alone as well: what one side keeps shut must not hide that
    the other is open. If both are right alone, they are right together.
    """
    for side in sides:
        policies = world.policies if side == "both" else [_only(policy, side) for policy in world.policies]
        wanted = [policy for policy in policies if policy["spec"]["policyTypes"]]
        evaluator = Evaluator(wanted, world.pods(), NAMESPACES, engine=engine)
        for source, sender, destination, receiver in _pairs(world, side):
            for protocol in PROTOCOLS:
                if side == "both":
                    meant = expected(world, source, destination, protocol)
                elif side == "Ingress":
                    meant = ingress(receiver, sender, source, protocol) if receiver else ALL
                else:
                    meant = egress(sender, receiver, destination, protocol) if sender else ALL
                said = evaluator.open_ports(source, destination, protocol)
                if said != _ranges(meant):
                    yield f"{side} {source.key} -> {destination.key} {protocol}: {said}, not {_ranges(meant)}"


def _pairs(world: World, side: Side) -> Iterator[tuple[Endpoint, Member | None, Endpoint, Member | None]]:
    everybody: list[tuple[Endpoint, Member | None]] = [(member.pod, member) for member in world.members]
    everybody += [(item, None) for item in world.outsiders]
    first = world.members[0].owner
    for member in world.members:
        if (member.owner.namespace, member.owner.name) != (first.namespace, first.name):
            continue
        for other, peer in everybody:
            if member.pod is other or not _families(member.pod) & _families(other):
                continue
            if side != "Ingress":
                yield member.pod, member, other, peer
            if side != "Egress":
                yield other, peer, member.pod, member


def _families(endpoint: Endpoint) -> set[int]:
    return {address.version for address in endpoint.addresses}


def _only(policy: dict[str, Any], direction: str) -> dict[str, Any]:
    spec = policy["spec"]
    return {**policy, "spec": {**spec, "policyTypes": [item for item in spec["policyTypes"] if item == direction]}}


@cache
def _ranges(ports: frozenset[int]) -> tuple[tuple[int, int], ...]:
    ranges: list[tuple[int, int]] = []
    for port in sorted(ports):
        if ranges and port == ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], port)
        else:
            ranges.append((port, port))
    return tuple(ranges)
