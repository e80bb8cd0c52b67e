"""Who reaches whom, by the rules of networking.k8s.io/v1.

A connection must be allowed by the egress side of its source *and* by the ingress side of its destination. A side
without a policy that selects the pod for that direction is not isolated and allows everything; an isolated side allows
the union of what its policies allow. A pod always reaches itself. hostNetwork pods are treated as their node: that is
what the concept page calls the most common case, and no policy selects them.

Made for a hundred thousand questions about a few dozen pods: selectors are compiled once, and what one pod allows
towards one peer is worked out once and kept as port ranges.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from tests.netpol.endpoints import PROTOCOLS, Address, Endpoint, Engine, Node, Pod, Protocol
from tests.netpol.policies import FIRST_PORT, LAST_PORT, Direction, IPBlock, PodPeer, Policy, Rule, compile_policy

NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"


@dataclass(frozen=True)
class Verdict:
    """The answer and the rule that gave it. Truthy when allowed."""

    allowed: bool
    reason: str

    def __bool__(self) -> bool:
        return self.allowed


@dataclass(frozen=True)
class _Grant:
    """Ports of one protocol that one side allows, and why."""

    protocol: Protocol
    first: int
    last: int
    reason: str


@dataclass(frozen=True)
class _Side:
    """What one side of a connection allows: the grants, and what to say when none fits."""

    grants: tuple[_Grant, ...]
    otherwise: str

    def find(self, protocol: Protocol, port: int) -> _Grant | None:
        for grant in self.grants:
            if grant.protocol == protocol and grant.first <= port <= grant.last:
                return grant
        return None


class Evaluator:
    """The policies of a cluster, ready to be asked.

    Args:
        policies: NetworkPolicy manifests; the order does not matter.
        pods: every pod that will be asked about.
        namespaces: labels by namespace name; `kubernetes.io/metadata.name` is added, as the API server does.
        engine: the behaviour where the API leaves a choice.

    Raises:
        InvalidPolicyError: a policy that the API server would refuse.
        ValueError: two pods or policies of the same name, or a namespace that is not in `namespaces`.
    """

    def __init__(
        self,
        policies: Iterable[Mapping[str, Any]],
        pods: Sequence[Pod],
        namespaces: Mapping[str, Mapping[str, str]],
        *,
        engine: Engine,
    ) -> None:
        self._engine = engine
        self._namespaces = {name: {**labels, NAMESPACE_NAME_LABEL: name} for name, labels in namespaces.items()}
        self._pods = {pod.key: pod for pod in pods}
        if len(self._pods) != len(pods):
            raise ValueError("two pods have the same namespace and name")
        compiled = [compile_policy(policy) for policy in policies]
        if len({(policy.namespace, policy.name) for policy in compiled}) != len(compiled):
            raise ValueError("two policies have the same namespace and name")
        used = {pod.namespace for pod in pods} | {policy.namespace for policy in compiled}
        missing = used - set(self._namespaces)
        if missing:
            raise ValueError(f"no labels given for namespace {min(missing)}")
        self._selecting: dict[tuple[Pod, Direction], tuple[Policy, ...]] = {
            (pod, direction): tuple(_selecting(compiled, pod, direction))
            for pod in pods
            for direction in ("Ingress", "Egress")
        }
        self._sides: dict[tuple[Pod, Direction, Endpoint, int], _Side] = {}
        self._connections: dict[tuple[Endpoint, Endpoint], tuple[tuple[_Side, _Side], ...]] = {}

    def reachable(self, src: Endpoint, dst: Endpoint, protocol: Protocol, port: int) -> Verdict:
        """Tell whether a connection from `src` to `dst` is allowed, in at least one IP family that both have.

        Raises:
            ValueError: a pod that the evaluator was not given, or a port outside 1..65535.
        """
        if not FIRST_PORT <= port <= LAST_PORT:
            raise ValueError(f"port {port} is not within 1..65535")
        reason = f"{src.key} and {dst.key} have no IP family in common"
        for egress, ingress in self._pairs(src, dst):
            out = egress.find(protocol, port)
            into = ingress.find(protocol, port)
            if out and into:
                return Verdict(allowed=True, reason=f"{out.reason}; {into.reason}")
            reason = ingress.otherwise if out else egress.otherwise
        return Verdict(allowed=False, reason=reason)

    def open_ports(self, src: Endpoint, dst: Endpoint, protocol: Protocol) -> tuple[tuple[int, int], ...]:
        """Give every port on which `reachable` is true, as sorted, disjoint, non-adjacent (first, last) ranges."""
        ranges = sorted(
            (max(out.first, into.first), min(out.last, into.last))
            for egress, ingress in self._pairs(src, dst)
            for out in egress.grants
            for into in ingress.grants
            if out.protocol == into.protocol == protocol and out.first <= into.last and into.first <= out.last
        )
        merged: list[tuple[int, int]] = []
        for first, last in ranges:
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return tuple(merged)

    def isolated(self, pod: Pod, direction: Direction) -> bool:
        """Tell whether some policy selects the pod for the direction. hostNetwork pods never are isolated."""
        self._check_known(pod)
        return bool(self._selecting[pod, direction])

    def _pairs(self, src: Endpoint, dst: Endpoint) -> tuple[tuple[_Side, _Side], ...]:
        """Give the (egress, ingress) sides of a connection, one pair for each IP family that both ends have."""
        known = self._connections.get((src, dst))
        if known is not None:
            return known
        self._check_known(src)
        self._check_known(dst)
        if src is dst:
            pairs: tuple[tuple[_Side, _Side], ...] = ((_open("a pod reaches itself"), _open("nothing to cross")),)
        else:
            source, destination = _on_the_wire(src), _on_the_wire(dst)
            families = {a.version for a in source.addresses} & {a.version for a in destination.addresses}
            pairs = tuple(
                (
                    self._side(source, "Egress", destination, family),
                    self._side(destination, "Ingress", source, family),
                )
                for family in sorted(families)
            )
        self._connections[src, dst] = pairs
        return pairs

    def _side(self, subject: Endpoint, direction: Direction, peer: Endpoint, family: int) -> _Side:
        if not isinstance(subject, Pod):
            return _open(f"{direction.lower()} of {subject.key} is not subject to NetworkPolicies")
        key = (subject, direction, peer, family)
        if key not in self._sides:
            self._sides[key] = self._evaluate(subject, direction, peer, family)
        return self._sides[key]

    def _evaluate(self, subject: Pod, direction: Direction, peer: Endpoint, family: int) -> _Side:
        policies = self._selecting[subject, direction]
        side = f"{direction.lower()} of {subject.key}"
        if not policies:
            return _open(f"{side}: no policy selects the pod")
        exempt = self._engine.node_reaches_own_pods if direction == "Ingress" else self._engine.pod_reaches_own_node
        if exempt and isinstance(peer, Node) and peer.name == subject.node:
            return _open(f"{side}: the pod's own node")
        destination = subject if direction == "Ingress" else peer
        grants = tuple(
            grant
            for policy in policies
            for rule in policy.rules[direction]
            if self._matches(rule, policy, peer, family)
            for grant in _grants(rule, destination, side)
        )
        names = ", ".join(sorted(policy.name for policy in policies))
        return _Side(grants, f"{side}: isolated by {names}; no rule allows {peer.key} there")

    def _matches(self, rule: Rule, policy: Policy, peer: Endpoint, family: int) -> bool:
        if rule.peers is None:
            return True
        addresses = [address for address in peer.addresses if address.version == family]
        return any(self._selects(candidate, policy.namespace, peer, addresses) for candidate in rule.peers)

    def _selects(self, candidate: IPBlock | PodPeer, home: str, peer: Endpoint, addresses: Sequence[Address]) -> bool:
        if isinstance(candidate, IPBlock):
            if isinstance(peer, Pod) and not self._engine.ipblock_matches_pods:
                return False
            if isinstance(peer, Node) and not self._engine.ipblock_matches_nodes:
                return False
            return any(candidate.contains(address) for address in addresses)
        if not isinstance(peer, Pod):
            return False
        if candidate.namespaces is None:
            in_namespace = peer.namespace == home
        else:
            in_namespace = candidate.namespaces(self._namespaces[peer.namespace])
        return in_namespace and candidate.pods(peer.labels)

    def _check_known(self, endpoint: Endpoint) -> None:
        if isinstance(endpoint, Pod) and self._pods.get(endpoint.key) is not endpoint:
            raise ValueError(f"pod {endpoint.key} is not one of the pods that this evaluator was made with")


def _selecting(policies: Iterable[Policy], pod: Pod, direction: Direction) -> Iterable[Policy]:
    if pod.host_network:
        return
    for policy in policies:
        if direction in policy.rules and policy.namespace == pod.namespace and policy.selector(pod.labels):
            yield policy


def _on_the_wire(endpoint: Endpoint) -> Endpoint:
    """Turn a hostNetwork pod into its node: its packets cannot be told from the node's."""
    if isinstance(endpoint, Pod) and endpoint.host_network:
        return Node(endpoint.node, endpoint.ips)
    return endpoint


def _open(reason: str) -> _Side:
    return _Side(tuple(_Grant(protocol, FIRST_PORT, LAST_PORT, reason) for protocol in PROTOCOLS), reason)


def _grants(rule: Rule, destination: Endpoint, side: str) -> Iterable[_Grant]:
    reason = f"{side}: allowed by {rule.where}"
    if rule.ports is None:
        yield from _open(reason).grants
        return
    for port in rule.ports:
        if port.name is None:
            yield _Grant(port.protocol, port.first, port.last, reason)
        elif isinstance(destination, Pod):
            for named in destination.ports:
                if named.name == port.name and named.protocol == port.protocol:
                    yield _Grant(port.protocol, named.port, named.port, reason)
