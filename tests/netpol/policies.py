"""NetworkPolicy objects, checked and compiled into predicates.

Everything here follows the API reference of networking.k8s.io/v1 NetworkPolicySpec and of meta/v1 LabelSelector,
including the defaults that the API server would set. What the API server would refuse raises `InvalidPolicyError`:
an evaluator that guesses what a wrong policy means is worth nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Network, IPv6Network, ip_network
from typing import Any, Literal, cast

from tests.netpol.endpoints import PROTOCOLS, Address, Protocol

Direction = Literal["Ingress", "Egress"]
Network = IPv4Network | IPv6Network
Selector = Callable[[Mapping[str, str]], bool]

FIRST_PORT = 1
LAST_PORT = 65535


class InvalidPolicyError(ValueError):
    """A policy that the API server would not accept. The message starts with the path of the field."""


@dataclass(frozen=True)
class IPBlock:
    """An `ipBlock` peer."""

    cidr: Network
    excluded: tuple[Network, ...]

    def contains(self, address: Address) -> bool:
        """Tell whether the address is in the block and in none of its exceptions. Other IP families never are."""
        return address in self.cidr and not any(address in block for block in self.excluded)


@dataclass(frozen=True)
class PodPeer:
    """A `podSelector`/`namespaceSelector` peer; no namespace selector means the policy's own namespace."""

    pods: Selector
    namespaces: Selector | None


@dataclass(frozen=True)
class PortRule:
    """One `ports[]` entry: a range, or a name to be resolved against the destination pod."""

    protocol: Protocol
    first: int = FIRST_PORT
    last: int = LAST_PORT
    name: str | None = None


@dataclass(frozen=True)
class Rule:
    """One ingress or egress rule; `peers` None means everybody, `ports` None means every port and protocol."""

    where: str
    peers: tuple[IPBlock | PodPeer, ...] | None
    ports: tuple[PortRule, ...] | None


@dataclass(frozen=True)
class Policy:
    """A NetworkPolicy with the API server's defaults applied; a direction that is not in `rules` is not affected."""

    name: str
    namespace: str
    selector: Selector
    rules: Mapping[Direction, tuple[Rule, ...]]


def compile_policy(manifest: Mapping[str, Any]) -> Policy:
    """Check and compile one NetworkPolicy manifest.

    Raises:
        InvalidPolicyError: it is not a NetworkPolicy that the API server would accept.
    """
    if manifest.get("apiVersion") != "networking.k8s.io/v1" or manifest.get("kind") != "NetworkPolicy":
        raise InvalidPolicyError("kind: not a networking.k8s.io/v1 NetworkPolicy")
    metadata = manifest.get("metadata") or {}
    name, namespace = metadata.get("name"), metadata.get("namespace")
    if not name or not namespace:
        raise InvalidPolicyError("metadata: name and namespace are required; an applied policy always has both")
    path = f"{namespace}/{name}"
    spec = manifest.get("spec") or {}
    _only(spec, {"podSelector", "ingress", "egress", "policyTypes"}, path)
    rules: dict[Direction, tuple[Rule, ...]] = {}
    for direction in _policy_types(spec, path):
        section, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
        rules[direction] = tuple(
            _rule(rule, peers, f"{path} {section}[{index}]") for index, rule in enumerate(spec.get(section) or ())
        )
    return Policy(name, namespace, compile_selector(spec.get("podSelector") or {}, f"{path} podSelector"), rules)


def compile_selector(selector: Mapping[str, Any], path: str) -> Selector:
    """Compile a LabelSelector: all matchLabels and matchExpressions must hold, an empty one matches everything.

    Raises:
        InvalidPolicyError: an unknown field or operator, or values where there must be none.
    """
    _only(selector, {"matchLabels", "matchExpressions"}, path)
    equal = tuple((selector.get("matchLabels") or {}).items())
    expressions = tuple(
        _expression(expression, f"{path}.matchExpressions[{index}]")
        for index, expression in enumerate(selector.get("matchExpressions") or ())
    )
    return lambda labels: all(labels.get(k) == v for k, v in equal) and all(holds(labels) for holds in expressions)


def _policy_types(spec: Mapping[str, Any], path: str) -> Sequence[Direction]:
    types = spec.get("policyTypes") or ()
    unknown = set(types) - {"Ingress", "Egress"}
    if unknown:
        raise InvalidPolicyError(f"{path} policyTypes: {sorted(unknown)} is neither Ingress nor Egress")
    if types:
        return cast("Sequence[Direction]", types)
    # The API server's default: Ingress always, Egress only when there is an egress *rule* (`egress: []` is none).
    return ("Ingress", "Egress") if spec.get("egress") else ("Ingress",)


def _rule(rule: Mapping[str, Any], peers: str, path: str) -> Rule:
    _only(rule, {peers, "ports"}, path)
    compiled = [_peer(peer, f"{path}.{peers}[{index}]") for index, peer in enumerate(rule.get(peers) or ())]
    ports = [_port(port, f"{path}.ports[{index}]") for index, port in enumerate(rule.get("ports") or ())]
    return Rule(path, tuple(compiled) or None, tuple(ports) or None)


def _peer(peer: Mapping[str, Any], path: str) -> IPBlock | PodPeer:
    _only(peer, {"podSelector", "namespaceSelector", "ipBlock"}, path)
    # A field that is null is absent, a field that is {} selects everything.
    given = {key: value for key, value in peer.items() if value is not None}
    if not given:
        raise InvalidPolicyError(f"{path}: must specify a peer")
    if "ipBlock" in given:
        if len(given) > 1:
            raise InvalidPolicyError(f"{path}: ipBlock may not stand beside a selector")
        return _ip_block(given["ipBlock"], f"{path}.ipBlock")
    namespaces = given.get("namespaceSelector")
    return PodPeer(
        pods=compile_selector(given.get("podSelector", {}), f"{path}.podSelector"),
        namespaces=None if namespaces is None else compile_selector(namespaces, f"{path}.namespaceSelector"),
    )


def _ip_block(block: Mapping[str, Any], path: str) -> IPBlock:
    _only(block, {"cidr", "except"}, path)
    cidr = _network(block.get("cidr"), f"{path}.cidr")
    excluded = tuple(_network(text, f"{path}.except[{i}]") for i, text in enumerate(block.get("except") or ()))
    for inner in excluded:
        if inner.version != cidr.version or inner == cidr or not inner.subnet_of(cidr):  # type: ignore[arg-type]
            raise InvalidPolicyError(f"{path}.except: {inner} must be a strict subset of {cidr}")
    return IPBlock(cidr, excluded)


def _network(text: object, path: str) -> Network:
    if not isinstance(text, str) or "/" not in text:
        raise InvalidPolicyError(f"{path}: {text!r} is not a CIDR")
    try:
        return ip_network(text, strict=False)
    except ValueError as error:
        raise InvalidPolicyError(f"{path}: {error}") from error


def _port(entry: Mapping[str, Any], path: str) -> PortRule:
    _only(entry, {"protocol", "port", "endPort"}, path)
    protocol = entry.get("protocol") or "TCP"
    if protocol not in PROTOCOLS:
        raise InvalidPolicyError(f"{path}.protocol: {protocol!r} is not one of TCP, UDP, SCTP")
    port, end = entry.get("port"), entry.get("endPort")
    if isinstance(port, str):
        if end is not None:
            raise InvalidPolicyError(f"{path}.endPort: may not stand beside a named port")
        return PortRule(protocol, name=port)
    if port is None:
        if end is not None:
            raise InvalidPolicyError(f"{path}.endPort: needs a numeric port")
        return PortRule(protocol)
    last = port if end is None else end
    if not FIRST_PORT <= port <= last <= LAST_PORT:
        raise InvalidPolicyError(f"{path}: {port}..{last} is not a range of ports within 1..65535")
    return PortRule(protocol, port, last)


def _expression(expression: Mapping[str, Any], path: str) -> Selector:
    _only(expression, {"key", "operator", "values"}, path)
    key, operator = expression.get("key"), expression.get("operator")
    values = frozenset(expression.get("values") or ())
    if not key:
        raise InvalidPolicyError(f"{path}.key: is required")
    if operator in {"In", "NotIn"} and not values:
        raise InvalidPolicyError(f"{path}.values: {operator} needs at least one value")
    if operator in {"Exists", "DoesNotExist"} and values:
        raise InvalidPolicyError(f"{path}.values: {operator} takes no values")
    match operator:
        case "In":
            return lambda labels: labels.get(key) in values
        case "NotIn":  # "key not in values" also holds where the key is missing
            return lambda labels: labels.get(key) not in values
        case "Exists":
            return lambda labels: key in labels
        case "DoesNotExist":
            return lambda labels: key not in labels
    raise InvalidPolicyError(f"{path}.operator: {operator!r} is not one of In, NotIn, Exists, DoesNotExist")


def _only(mapping: Mapping[str, Any], known: set[str], path: str) -> None:
    unknown = set(mapping) - known
    if unknown:
        raise InvalidPolicyError(f"{path}: unknown field {min(unknown)!r}")
