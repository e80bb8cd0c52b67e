"""Policies of others that open what ours close. NetworkPolicies add up, so any of them can. Pure.

For every rule of a foreign policy that selects one of our pods a witness is made: the least that the rule asks of a
peer, and each port that it names. If the topology's own policies do not let that witness through, the rule is wider.
Labels can only add to what our policies allow, so what they refuse the witness they would have refused somebody.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from securevllm import netpol
from securevllm.netpol import Host, IPBlock, Pod, Policies, Ports, Rule, Selector
from securevllm.render.meta import RESOURCE_LABEL

# Addresses that a broad range may hold and that a narrow look at its first address would miss.
_TELLING = tuple(
    map(ipaddress.ip_address, ("8.8.8.8", "10.0.0.1", "169.254.169.254", "192.168.0.1", "100.64.0.1", "2001:4860::1"))
)
_TELLING_PORTS = (22, 80, 443, 8000, 50000)
_HERE = (ipaddress.ip_address("10.255.0.1"), ipaddress.ip_address("fd00:255::1"))
_THERE = (ipaddress.ip_address("10.255.0.2"), ipaddress.ip_address("fd00:255::2"))
_ELSEWHERE = "another-namespace"
_SHOWN = 3


@dataclass(frozen=True, order=True)
class Wider:
    """A rule that allows more than the topology.

    Attributes:
        policy: name.
        told: what it opens, for a person.
    """

    policy: str
    told: str


def wider(
    namespace: str, label: str, ours: Iterable[Mapping[str, Any]], live: Iterable[Mapping[str, Any]],
    templates: Iterable[Mapping[str, Any]],
) -> tuple[Wider, ...]:  # fmt: skip
    """Foreign policies that open what the topology closes.

    Args:
        namespace: of the resource.
        label: value of ``securevllm.io/resource`` of its pods.
        ours: rendered policies of the resource, and the default-deny.
        live: every NetworkPolicy of the namespace; those that are ``asked_for`` another resource may be left out.
        templates: pods or pod templates of the resource: labels and named ports.
    """
    rendered = [netpol.parse(policy, namespace) for policy in ours]
    own = {policy.name for policy in rendered}
    pods = _distinct(namespace, label, templates)
    found = set()
    for obj in live:
        name = obj["metadata"]["name"]
        if name in own or asked_for(obj) not in {"", label}:
            continue
        try:
            policy = netpol.parse(obj, namespace)
        except netpol.PolicyError as error:
            found.add(Wider(name, f"cannot be judged ({error})"))
            continue
        for pod in pods:
            if policy.selects(pod):
                found |= {Wider(name, told) for told in _wider(policy, pod, rendered)}
    return tuple(sorted(found))


def asked_for(policy: Mapping[str, Any]) -> str:
    """The label of a resource that a policy asks for; empty: of none. What asks for another's need not even be read."""
    selector = (policy.get("spec") or {}).get("podSelector") or {}
    return str((selector.get("matchLabels") or {}).get(RESOURCE_LABEL, ""))


def holding(namespace: str, labels: Mapping[str, str], live: Iterable[Mapping[str, Any]]) -> tuple[str, ...]:
    """Names of NetworkPolicies that select a pod with these labels: its silence may be theirs.

    One that cannot be read counts, because it may be the one.
    """
    pod = Pod(namespace, "canary", labels)
    return tuple(sorted(obj["metadata"]["name"] for obj in live if _selects(obj, pod)))


def _selects(obj: Mapping[str, Any], pod: Pod) -> bool:
    try:
        return netpol.parse(obj, pod.namespace).selects(pod)
    except netpol.PolicyError:
        return True


def _distinct(namespace: str, label: str, templates: Iterable[Mapping[str, Any]]) -> list[Pod]:
    pods: dict[tuple[tuple[str, str], ...], Pod] = {}
    for template in templates:
        labels = template["metadata"].get("labels", {})
        if labels.get(RESOURCE_LABEL) != label:
            continue
        ports = tuple(
            netpol.NamedPort(port["name"], port["containerPort"], port.get("protocol", "TCP"))
            for container in template["spec"]["containers"]
            for port in container.get("ports", ())
            if port.get("name")
        )
        pods[tuple(sorted(labels.items()))] = Pod(namespace, "ours", labels, _HERE, ports, node="ours")
    return [*pods.values()]


@dataclass(frozen=True)
class _Witness:
    """Somebody whom a rule lets through.

    Attributes:
        told: who that is, for a person.
        end: the peer.
        namespaces: labels of its namespace.
    """

    told: str
    end: Pod | Host
    namespaces: Mapping[str, Mapping[str, str]]


def _wider(policy: netpol.Policy, pod: Pod, rendered: list[netpol.Policy]) -> Iterator[str]:
    for direction, rules in policy.rules.items():
        for rule in rules:
            for witness in _witnesses(rule, policy.namespace):
                union = Policies(rendered, witness.namespaces)
                for protocol, port in _ports(rule, pod if direction == "Ingress" else None):
                    source, destination = (witness.end, pod) if direction == "Ingress" else (pod, witness.end)
                    if not union.allowed(source, destination, protocol, port):
                        yield f"{direction.lower()}: {witness.told}, {'every port' if rule.ports is None else port}"
                        break


def _witnesses(rule: Rule, namespace: str) -> Iterator[_Witness]:
    """The least that a rule asks of a peer."""
    if rule.peers is None:
        yield _Witness("everybody", Host("anybody", _TELLING[:1] + _TELLING[-1:]), {})
        return
    for peer in rule.peers:
        if isinstance(peer, IPBlock):
            first = peer.cidr.network_address
            tried = [address for address in (*_TELLING, first, first + 1) if address in peer.cidr]
            for address in dict.fromkeys(tried):
                if peer.contains(address):
                    yield _Witness(str(peer), Host("outside", (address,)), {})
        else:
            labels = _least(peer.namespaces) if peer.namespaces is not None else {}
            home = namespace if peer.namespaces is None else labels.get(netpol.NAMESPACE_NAME_LABEL, _ELSEWHERE)
            pod = Pod(home, "witness", _least(peer.pods), _THERE, node="theirs")
            yield _Witness(str(peer), pod, {} if peer.namespaces is None else {home: labels})


def _least(selector: Selector) -> dict[str, str]:
    labels = dict(selector.labels)
    for term in selector.expressions:
        if term.operator == "In":
            labels.setdefault(term.key, min(term.values))
        elif term.operator == "Exists":
            labels.setdefault(term.key, "")
    return labels


def _ports(rule: Rule, destination: Pod | None) -> Iterator[tuple[netpol.Protocol, int]]:
    if rule.ports is None:
        for port in _TELLING_PORTS:
            yield "TCP", port
        yield "UDP", _TELLING_PORTS[-1]
        return
    for ports in rule.ports:
        yield from ((ports.protocol, port) for port in _tried(ports, destination))


def _tried(ports: Ports, destination: Pod | None) -> Iterable[int]:
    if ports.name:
        named = destination.ports if destination is not None else ()
        return [item.port for item in named if (item.name, item.protocol) == (ports.name, ports.protocol)]
    return dict.fromkeys(
        (ports.first, ports.last, *(port for port in _TELLING_PORTS if ports.first <= port <= ports.last))
    )


def told(found: tuple[Wider, ...]) -> str:
    """For a condition's message; empty when there is nothing to tell."""
    by_policy: dict[str, list[str]] = {}
    for item in found:
        by_policy.setdefault(item.policy, []).append(item.told)
    parts = [f"NetworkPolicy {name} opens {'; '.join(opened[:_SHOWN])}" for name, opened in by_policy.items()]
    return ". ".join(parts)
