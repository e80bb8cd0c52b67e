"""NetworkPolicies, a projection of the topology's flows.

One default-deny per namespace closes every pod of every resource, in both directions, and has no owner: it outlives
the pods. The policies of a resource only allow, so losing one closes. No ``ipBlock`` ever stands for pods or nodes:
Cilium does not match them by address, other engines do.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from securevllm.context import FIELD_MANAGER, CidrPeer, Peer, Selector
from securevllm.render.meta import DENY_NAME, MANAGED_BY, RESOURCE_LABEL, Object, Owner
from securevllm.topology import LAST_PORT, Inbound, Internal, Mesh, Outbound, PortRule, Role, Socket, Topology

if TYPE_CHECKING:
    from securevllm.topology import Flow

_API = "networking.k8s.io/v1"


def default_deny(namespace: str) -> Object:
    """Nothing reaches a pod of any resource of this namespace, and it reaches nothing."""
    return {
        "apiVersion": _API,
        "kind": "NetworkPolicy",
        "metadata": {"name": DENY_NAME, "namespace": namespace, "labels": {MANAGED_BY: FIELD_MANAGER}},
        "spec": {
            "podSelector": {"matchExpressions": [{"key": RESOURCE_LABEL, "operator": "Exists"}]},
            "policyTypes": ["Ingress", "Egress"],
        },
    }


def policies(owner: Owner, topology: Topology) -> list[Object]:
    """What the resource's pods may do: one policy per role, and one per group whose pods talk to each other."""
    by_role = [_policy(owner, item.role, topology.flows) for item in topology.pods]
    return by_role + [_mesh(owner, flow.group) for flow in topology.flows if isinstance(flow, Mesh)]


def _policy(owner: Owner, role: Role, flows: Iterable[Flow]) -> Object:
    ingress, egress = [], []
    for flow in flows:
        match flow:
            case Inbound(to=Socket(role=target)) if target == role:
                ingress.append({"from": _peers(flow.peers), "ports": [_port(flow.to.rule)]})
            case Internal(to=Socket(role=target)) if target == role:
                ingress.append({"from": [_own(owner, flow.source)], "ports": [_port(flow.to.rule)]})
            case Outbound(source=source) if source == role:
                egress.append({"to": _peers(flow.peers), "ports": [_port(rule) for rule in flow.ports]})
            case _:
                pass
        if isinstance(flow, Internal) and flow.source == role:
            egress.append({"to": [_own(owner, flow.to.role)], "ports": [_port(flow.to.rule)]})
    return _allow(owner, role.value, owner.selector(role.value), ingress, egress)


def _mesh(owner: Owner, group: str) -> Object:
    """Every TCP port within one group: its ports are drawn at random, and it is one trust domain."""
    pods = owner.group_selector(group)
    peers, ports = [{"podSelector": {"matchLabels": pods}}], [{"protocol": "TCP"}]
    return _allow(owner, group, pods, [{"from": peers, "ports": ports}], [{"to": peers, "ports": ports}])


def _allow(owner: Owner, name: str, pods: dict[str, str], ingress: list[Object], egress: list[Object]) -> Object:
    # An absent list and an empty one both allow nothing; an empty *peer* list would allow everybody, so _peers refuses.
    return owner.object(
        _API,
        "NetworkPolicy",
        name,
        name,
        spec={
            "podSelector": {"matchLabels": pods},
            "policyTypes": ["Ingress", "Egress"],
            **({"ingress": ingress} if ingress else {}),
            **({"egress": egress} if egress else {}),
        },
    )


def _own(owner: Owner, role: Role) -> dict[str, Any]:
    return {"podSelector": {"matchLabels": owner.selector(role.value)}}


def _port(rule: PortRule) -> dict[str, Any]:
    if (rule.port, rule.last) == (1, LAST_PORT):
        return {"protocol": rule.protocol}
    return {"port": rule.port, **({} if rule.last is None else {"endPort": rule.last}), "protocol": rule.protocol}


def _peers(peers: tuple[Peer, ...]) -> list[dict[str, Any]]:
    if not peers:
        raise ValueError("a rule without peers would allow everybody")
    return [_peer(peer) for peer in peers]


def _peer(peer: Peer) -> dict[str, Any]:
    if isinstance(peer, CidrPeer):
        return {"ipBlock": {"cidr": peer.cidr, **({"except": list(peer.excluded)} if peer.excluded else {})}}
    selected: dict[str, Any] = {}
    if peer.namespaces is not None:
        selected["namespaceSelector"] = _selector(peer.namespaces)
    if peer.pods is not None or peer.namespaces is None:
        selected["podSelector"] = _selector(peer.pods or Selector())
    return selected


def _selector(selector: Selector) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if selector.labels:
        found["matchLabels"] = dict(selector.labels)
    if selector.expressions:
        found["matchExpressions"] = [
            {"key": key, "operator": operator, **({"values": list(values)} if values else {})}
            for key, operator, values in selector.expressions
        ]
    return found
