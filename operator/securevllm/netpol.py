"""NetworkPolicies of anybody, read and evaluated: who may reach whom, on which port, and which policy says so.

From the API reference of networking.k8s.io/v1 and the concept page "Network Policies" (Kubernetes 1.36): policies only
add up, a connection needs the egress side of its source *and* the ingress side of its destination, and a side that no
policy selects allows everything. What the API server would refuse, and fields that this module does not know, raise
`PolicyError`: a policy that cannot be read is reported, never guessed.

Two kinds of questions: `Policies.allowed` and `Policies.open_ports` for two ends with addresses, and `Policies.grants`
for a pod template, whose peers are not there yet. Policies of other kinds (Cilium, Calico, cluster-wide) are not read.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_network
from operator import itemgetter
from typing import Any, Generic, Literal, TypeVar, get_args

from securevllm.errors import OperatorError

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network
Direction = Literal["Ingress", "Egress"]
Protocol = Literal["TCP", "UDP", "SCTP"]

PROTOCOLS: tuple[Protocol, ...] = get_args(Protocol)
API_VERSION = "networking.k8s.io/v1"
KIND = "NetworkPolicy"
NAMESPACE_NAME_LABEL = "kubernetes.io/metadata.name"
"""The API server sets it on every namespace."""

_FIRST, _LAST = 1, 65535

T = TypeVar("T")


class PolicyError(OperatorError):
    """A NetworkPolicy that the API server would refuse, or that has a field of a later Kubernetes.

    Attributes:
        path: where in the object, for example ``spec.ingress[0].from[1].ipBlock.cidr``.
        rule: what is wrong, one sentence without a full stop.
    """

    def __init__(self, path: str, rule: str) -> None:
        self.path, self.rule = path, rule
        super().__init__(f"{path}: {rule}")


# ----------------------------------------------------------------------------------------------------------- policies


@dataclass(frozen=True)
class Expression:
    """One entry of ``matchExpressions``."""

    key: str
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"]
    values: frozenset[str] = frozenset()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether it holds; NotIn holds where the key is missing, too."""
        match self.operator:
            case "In":
                return labels.get(self.key) in self.values
            case "NotIn":
                return labels.get(self.key) not in self.values
            case "Exists":
                return self.key in labels
            case "DoesNotExist":
                return self.key not in labels

    def __str__(self) -> str:
        among = f"({','.join(sorted(self.values))})"
        told = {"In": f"{self.key} in {among}", "NotIn": f"{self.key} notin {among}", "Exists": self.key}
        return told.get(self.operator, f"!{self.key}")


@dataclass(frozen=True)
class Selector:
    """A meta/v1 LabelSelector; one without terms selects everything. Its text is what ``kubectl -l`` takes."""

    labels: tuple[tuple[str, str], ...] = ()
    expressions: tuple[Expression, ...] = ()

    def matches(self, labels: Mapping[str, str]) -> bool:
        """Whether every term holds."""
        return all(labels.get(key) == value for key, value in self.labels) and all(
            expression.matches(labels) for expression in self.expressions
        )

    @property
    def everything(self) -> bool:
        """Whether it has no terms."""
        return not self.labels and not self.expressions

    def __str__(self) -> str:
        return ",".join([f"{key}={value}" for key, value in self.labels] + [str(item) for item in self.expressions])


@dataclass(frozen=True)
class IPBlock:
    """An ``ipBlock`` peer: addresses outside the cluster. Some engines also read it as pods and nodes."""

    cidr: Network
    excluded: tuple[Network, ...] = ()

    def contains(self, address: Address) -> bool:
        """Whether the address is in the block and in none of its exceptions; another IP family never is."""
        return address in self.cidr and not any(address in network for network in self.excluded)

    def __str__(self) -> str:
        excluded = f" except {', '.join(map(str, self.excluded))}" if self.excluded else ""
        return f"addresses {self.cidr}{excluded}"


@dataclass(frozen=True)
class PodPeer:
    """A peer by labels. ``namespaces`` None: the namespace of the policy."""

    pods: Selector
    namespaces: Selector | None = None

    def __str__(self) -> str:
        pods = "all pods" if self.pods.everything else f"pods {self.pods}"
        if self.namespaces is None:
            return f"{pods} of the namespace"
        return f"{pods} of {'all namespaces' if self.namespaces.everything else f'namespaces {self.namespaces}'}"


Peer = IPBlock | PodPeer


@dataclass(frozen=True)
class Ports:
    """One entry of ``ports``: numbers from first to last, or a name that each destination pod resolves for itself."""

    protocol: Protocol
    first: int = _FIRST
    last: int = _LAST
    name: str = ""


@dataclass(frozen=True)
class Rule:
    """One ingress or egress rule. ``peers`` None: everybody; ``ports`` None: every port of every protocol."""

    policy: str
    path: str
    peers: tuple[Peer, ...] | None
    ports: tuple[Ports, ...] | None

    def __str__(self) -> str:
        return f"NetworkPolicy {self.policy} {self.path}"


@dataclass(frozen=True)
class Policy:
    """A NetworkPolicy with the API server's defaults. A direction that is not in ``rules`` it does not touch."""

    namespace: str
    name: str
    selector: Selector
    rules: Mapping[Direction, tuple[Rule, ...]]

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"

    def selects(self, pod: Pod) -> bool:
        """Whether it is about this pod. hostNetwork pods are their node: no policy selects them."""
        return self.namespace == pod.namespace and not pod.host_network and self.selector.matches(pod.labels)


# --------------------------------------------------------------------------------------------------------------- ends


@dataclass(frozen=True)
class NamedPort:
    """One named entry of ``containers[].ports``."""

    name: str
    port: int
    protocol: Protocol = "TCP"


@dataclass(frozen=True)
class Pod:
    """A pod, or the template of one: that has no addresses yet, and only `Policies.grants` can tell something of it."""

    namespace: str
    name: str
    labels: Mapping[str, str]
    addresses: tuple[Address, ...] = ()
    ports: tuple[NamedPort, ...] = ()
    node: str = ""
    host_network: bool = False

    @property
    def key(self) -> str:
        """``namespace/name``."""
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class Host:
    """Who is no pod: an address outside the cluster, or with ``node`` a node of it (kubelet, hostNetwork pods)."""

    name: str
    addresses: tuple[Address, ...]
    node: bool = False

    @property
    def key(self) -> str:
        """``node name``, or the name."""
        return f"node {self.name}" if self.node else self.name


End = Pod | Host


@dataclass(frozen=True)
class Enforcement:
    """Where the API leaves an engine free. The default is what lets most through, except to a pod's own node.

    Attributes:
        ip_block_selects_pods: an ipBlock selects pods by their address (Calico: yes, Cilium: no).
        ip_block_selects_nodes: the same for nodes.
        node_reaches_own_pods: the concept page says so; kubelet's probes need it.
        pod_reaches_own_node: the concept page says so; the engines that were measured enforce it nevertheless.
    """

    ip_block_selects_pods: bool = True
    ip_block_selects_nodes: bool = True
    node_reaches_own_pods: bool = True
    pod_reaches_own_node: bool = False


@dataclass(frozen=True)
class Grant:
    """Ports that one side of a connection allows. ``rule`` None: nothing isolates that side."""

    protocol: Protocol
    first: int
    last: int
    rule: Rule | None = None

    def covers(self, protocol: Protocol, port: int) -> bool:
        """Whether the port is one of them."""
        return self.protocol == protocol and self.first <= port <= self.last


@dataclass(frozen=True)
class Verdict:
    """Whether a connection is allowed. Truthy when it is.

    Attributes:
        allowed: in at least one IP family that both ends have.
        by: every rule that allows it, of both sides; empty when nothing isolates either side.
        why: one sentence.
    """

    allowed: bool
    by: tuple[Rule, ...]
    why: str

    def __bool__(self) -> bool:
        return self.allowed


_EVERYTHING = tuple(Grant(protocol, _FIRST, _LAST) for protocol in PROTOCOLS)


class ByLabel(Generic[T]):
    """What selects pods by labels, filed by one of them: among hundreds of workloads each has its own policies."""

    def __init__(self) -> None:
        self._filed: defaultdict[tuple[str, tuple[str, str] | None], list[tuple[int, T]]] = defaultdict(list)
        self._count = 0

    def add(self, namespace: str, labels: Iterable[tuple[str, str]], item: T) -> None:
        """File an item that selects only pods of this namespace with all of these labels, if there are any."""
        self._filed[namespace, next(iter(labels), None)].append((self._count, item))
        self._count += 1

    def about(self, pod: Pod) -> list[T]:
        """Items that may select a pod, in the order in which they were added; the others surely do not."""
        found = [item for label in (None, *pod.labels.items()) for item in self._filed.get((pod.namespace, label), ())]
        return [item for _, item in sorted(found, key=itemgetter(0))]


class Policies:
    """The union of policies.

    Args:
        policies: in any order.
        namespaces: labels by namespace; ``kubernetes.io/metadata.name`` is added. A namespace that is missing has
            only that one, so a `namespaceSelector` for another label does not select it.
        enforcement: how the cluster's engine reads what the API leaves open.
    """

    def __init__(
        self,
        policies: Iterable[Policy],
        namespaces: Mapping[str, Mapping[str, str]] | None = None,
        enforcement: Enforcement | None = None,
    ) -> None:
        self._enforcement = enforcement or Enforcement()
        self._labels = {name: {**labels, NAMESPACE_NAME_LABEL: name} for name, labels in (namespaces or {}).items()}
        self._filed: ByLabel[Policy] = ByLabel()
        for policy in policies:
            self._filed.add(policy.namespace, policy.selector.labels, policy)

    def selecting(self, pod: Pod, direction: Direction) -> tuple[Policy, ...]:
        """Policies that isolate the pod in this direction; none: everything is allowed."""
        found = self._filed.about(pod)
        return tuple(policy for policy in found if direction in policy.rules and policy.selects(pod))

    def grants(self, pod: Pod, direction: Direction) -> tuple[Grant, ...] | None:
        """What the policies allow a pod, whoever the peer is; named ports of egress rules are left out.

        Returns:
            None when no policy isolates the pod in this direction.
        """
        policies = self.selecting(pod, direction)
        if not policies:
            return None
        destination = pod if direction == "Ingress" else None
        return tuple(
            grant for policy in policies for rule in policy.rules[direction] for grant in _grants(rule, destination)
        )

    def allowed(self, source: End, destination: End, protocol: Protocol, port: int) -> Verdict:
        """Tell whether a connection is allowed, and by which rules.

        Raises:
            ValueError: an end without addresses, or a port outside 1..65535.
        """
        if not _FIRST <= port <= _LAST:
            raise ValueError(f"port {port} is not within 1..65535")
        blocked = f"{source.key} and {destination.key} have no IP family in common"
        for outward, inward in self._sides(source, destination):
            leaving = [grant for grant in outward if grant.covers(protocol, port)]
            entering = [grant for grant in inward if grant.covers(protocol, port)]
            if leaving and entering:
                rules = tuple(dict.fromkeys(item.rule for item in (*leaving, *entering) if item.rule is not None))
                return Verdict(allowed=True, by=rules, why="; ".join(map(str, rules)) or "no policy selects either end")
            direction: Direction = "Ingress" if leaving else "Egress"
            subject = destination if leaving else source
            if isinstance(subject, Pod):
                names = ", ".join(policy.key for policy in self.selecting(subject, direction))
                blocked = f"{direction.lower()} of {subject.key} is isolated by {names}, and no rule allows it"
        return Verdict(allowed=False, by=(), why=blocked)

    def open_ports(self, source: End, destination: End, protocol: Protocol) -> tuple[tuple[int, int], ...]:
        """Every port that is allowed, as sorted (first, last) ranges that neither overlap nor touch.

        Raises:
            ValueError: an end without addresses.
        """
        both = sorted(
            (max(out.first, into.first), min(out.last, into.last))
            for outward, inward in self._sides(source, destination)
            for out in outward
            for into in inward
            if out.protocol == into.protocol == protocol
        )
        merged: list[tuple[int, int]] = []
        for first, last in both:
            if first > last:
                continue
            if merged and first <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], last))
            else:
                merged.append((first, last))
        return tuple(merged)

    def _sides(self, source: End, destination: End) -> Iterator[tuple[tuple[Grant, ...], tuple[Grant, ...]]]:
        """Egress of the source and ingress of the destination, once for each IP family that both have."""
        for end in (source, destination):
            if not end.addresses:
                raise ValueError(f"{end.key} has no address: an ipBlock cannot be judged")
        if isinstance(source, Pod) and isinstance(destination, Pod) and source.key == destination.key:
            yield _EVERYTHING, _EVERYTHING  # a pod always reaches itself
            return
        source, destination = _on_the_wire(source), _on_the_wire(destination)
        versions = {item.version for item in source.addresses} & {item.version for item in destination.addresses}
        for version in sorted(versions):
            yield (
                self._side(source, "Egress", destination, version),
                self._side(destination, "Ingress", source, version),
            )

    def _side(self, subject: End, direction: Direction, peer: End, version: int) -> tuple[Grant, ...]:
        if not isinstance(subject, Pod):
            return _EVERYTHING
        policies = self.selecting(subject, direction)
        exempt = (
            self._enforcement.node_reaches_own_pods
            if direction == "Ingress"
            else self._enforcement.pod_reaches_own_node
        )
        if not policies or (exempt and isinstance(peer, Host) and peer.node and peer.name == subject.node):
            return _EVERYTHING
        destination = subject if direction == "Ingress" else peer
        return tuple(
            grant
            for policy in policies
            for rule in policy.rules[direction]
            if rule.peers is None or any(self._means(item, policy, peer, version) for item in rule.peers)
            for grant in _grants(rule, destination if isinstance(destination, Pod) else None)
        )

    def _means(self, named: Peer, policy: Policy, peer: End, version: int) -> bool:
        if isinstance(named, IPBlock):
            if isinstance(peer, Pod):
                applies = self._enforcement.ip_block_selects_pods
            else:
                applies = self._enforcement.ip_block_selects_nodes or not peer.node
            return applies and any(named.contains(item) for item in peer.addresses if item.version == version)
        if not isinstance(peer, Pod):
            return False
        if named.namespaces is None:
            there = peer.namespace == policy.namespace
        else:
            there = named.namespaces.matches(self._labels.get(peer.namespace, {NAMESPACE_NAME_LABEL: peer.namespace}))
        return there and named.pods.matches(peer.labels)


def _on_the_wire(end: End) -> End:
    """A hostNetwork pod is its node: their packets cannot be told apart."""
    return Host(end.node, end.addresses, node=True) if isinstance(end, Pod) and end.host_network else end


def _grants(rule: Rule, destination: Pod | None) -> Iterator[Grant]:
    if rule.ports is None:
        yield from (Grant(item.protocol, item.first, item.last, rule) for item in _EVERYTHING)
        return
    for ports in rule.ports:
        if not ports.name:
            yield Grant(ports.protocol, ports.first, ports.last, rule)
            continue
        for named in destination.ports if destination is not None else ():
            if (named.name, named.protocol) == (ports.name, ports.protocol):
                yield Grant(named.protocol, named.port, named.port, rule)


# ------------------------------------------------------------------------------------------------------------ reading


def parse(manifest: Mapping[str, Any], namespace: str = "default") -> Policy:
    """Read one NetworkPolicy.

    Args:
        manifest: the object, from the API server or from a file.
        namespace: for a manifest that names none.

    Raises:
        PolicyError: it is not a NetworkPolicy, or not one that can be judged.
    """
    if (manifest.get("apiVersion"), manifest.get("kind")) != (API_VERSION, KIND):
        raise PolicyError("kind", f"not a {API_VERSION} {KIND}")
    metadata = _mapping(manifest.get("metadata"), "metadata")
    name = metadata.get("name") or metadata.get("generateName")
    if not isinstance(name, str):
        raise PolicyError("metadata.name", "is required")
    home = metadata.get("namespace") or namespace
    if not isinstance(home, str):
        raise PolicyError("metadata.namespace", "is not a text")
    spec = _mapping(manifest.get("spec"), "spec", {"podSelector", "ingress", "egress", "policyTypes"})
    rules: dict[Direction, tuple[Rule, ...]] = {}
    for direction in _directions(spec):
        section, peers = ("ingress", "from") if direction == "Ingress" else ("egress", "to")
        rules[direction] = tuple(
            _rule(rule, f"{home}/{name}", f"spec.{section}[{index}]", peers)
            for index, rule in enumerate(_sequence(spec.get(section), f"spec.{section}"))
        )
    return Policy(home, name, selector(spec.get("podSelector"), "spec.podSelector"), rules)


def selector(given: object, path: str) -> Selector:
    """Read a meta/v1 LabelSelector; null selects everything, as an empty one does.

    Raises:
        PolicyError: it is not one.
    """
    found = _mapping(given, path, {"matchLabels", "matchExpressions"})
    labels = _mapping(found.get("matchLabels"), f"{path}.matchLabels")
    for key, value in labels.items():
        if not isinstance(value, str):
            raise PolicyError(f"{path}.matchLabels.{key}", f"{value!r} is not a text: write it in quotes")
    expressions = _sequence(found.get("matchExpressions"), f"{path}.matchExpressions")
    return Selector(
        tuple(sorted(labels.items())),
        tuple(_expression(item, f"{path}.matchExpressions[{index}]") for index, item in enumerate(expressions)),
    )


def _directions(spec: Mapping[str, Any]) -> tuple[Direction, ...]:
    types = _sequence(spec.get("policyTypes"), "spec.policyTypes")
    for item in types:
        if item not in get_args(Direction):
            raise PolicyError("spec.policyTypes", f"{item!r} is neither Ingress nor Egress")
    # The API server's default: Ingress always, Egress where there is an egress rule (`egress: []` is none).
    return tuple(dict.fromkeys(types)) or (("Ingress", "Egress") if spec.get("egress") else ("Ingress",))


def _rule(given: object, policy: str, path: str, peers: str) -> Rule:
    rule = _mapping(given, path, {peers, "ports"})
    named = [
        _peer(item, f"{path}.{peers}[{index}]")
        for index, item in enumerate(_sequence(rule.get(peers), f"{path}.{peers}"))
    ]
    ports = [
        _port(item, f"{path}.ports[{index}]")
        for index, item in enumerate(_sequence(rule.get("ports"), f"{path}.ports"))
    ]
    return Rule(policy, path, tuple(named) or None, tuple(ports) or None)


def _peer(given: object, path: str) -> Peer:
    peer = _mapping(given, path, {"podSelector", "namespaceSelector", "ipBlock"})
    # A field that is null is absent; one that is {} selects everything.
    block, pods, namespaces = (peer.get(name) for name in ("ipBlock", "podSelector", "namespaceSelector"))
    if block is not None:
        if pods is not None or namespaces is not None:
            raise PolicyError(path, "ipBlock may not stand beside a selector")
        return _ip_block(block, f"{path}.ipBlock")
    if pods is None and namespaces is None:
        raise PolicyError(path, "names nobody: needs podSelector, namespaceSelector or ipBlock")
    return PodPeer(
        selector(pods, f"{path}.podSelector"),
        None if namespaces is None else selector(namespaces, f"{path}.namespaceSelector"),
    )


def _ip_block(given: object, path: str) -> IPBlock:
    block = _mapping(given, path, {"cidr", "except"})
    cidr = _network(block.get("cidr"), f"{path}.cidr")
    excluded = []
    for index, item in enumerate(_sequence(block.get("except"), f"{path}.except")):
        inner = _network(item, f"{path}.except[{index}]")
        # The two are of one version, so the comparison that mypy cannot know of is one of like with like.
        if inner.version != cidr.version or inner == cidr or not inner.subnet_of(cidr):  # type: ignore[arg-type]
            raise PolicyError(f"{path}.except[{index}]", f"{inner} is not a smaller part of {cidr}")
        excluded.append(inner)
    return IPBlock(cidr, tuple(excluded))


def _network(given: object, path: str) -> Network:
    if isinstance(given, str) and "/" in given:
        try:
            return ip_network(given, strict=False)
        except ValueError:
            pass
    raise PolicyError(path, f"{given!r} is not a network such as 192.0.2.0/24")


def _port(given: object, path: str) -> Ports:
    entry = _mapping(given, path, {"protocol", "port", "endPort"})
    protocol = entry.get("protocol") or "TCP"
    if protocol not in PROTOCOLS:
        raise PolicyError(f"{path}.protocol", f"{protocol!r} is not one of {', '.join(PROTOCOLS)}")
    port, end = entry.get("port"), entry.get("endPort")
    if end is not None and not _is_port(port):
        raise PolicyError(f"{path}.endPort", "needs a port that is a number")
    if port is None:
        return Ports(protocol)
    if isinstance(port, str) and port and not port.isdigit():
        return Ports(protocol, name=port)
    last = port if end is None else end
    if not _is_port(port) or not _is_port(last) or port > last:
        raise PolicyError(path, f"port {port!r}, endPort {end!r}: not a port, or not a range, within 1..65535")
    return Ports(protocol, port, last)


def _is_port(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and _FIRST <= value <= _LAST


def _expression(given: object, path: str) -> Expression:
    expression = _mapping(given, path, {"key", "operator", "values"})
    key, operator = expression.get("key"), expression.get("operator")
    values = _sequence(expression.get("values"), f"{path}.values")
    if not isinstance(key, str) or not key:
        raise PolicyError(f"{path}.key", "is required")
    if not all(isinstance(value, str) for value in values):
        raise PolicyError(f"{path}.values", "are not all texts: write them in quotes")
    match operator:
        case "In" | "NotIn" if not values:
            raise PolicyError(f"{path}.values", f"{operator} needs at least one")
        case "Exists" | "DoesNotExist" if values:
            raise PolicyError(f"{path}.values", f"{operator} takes none")
        case "In" | "NotIn" | "Exists" | "DoesNotExist":
            return Expression(key, operator, frozenset(values))
    raise PolicyError(f"{path}.operator", f"{operator!r} is not one of In, NotIn, Exists, DoesNotExist")


def _mapping(given: object, path: str, known: set[str] | None = None) -> Mapping[str, Any]:
    if given is None:
        return {}  # as the API server decodes null, also in a list: an empty rule allows everything
    if not isinstance(given, Mapping):
        raise PolicyError(path, f"{type(given).__name__} is not a mapping")
    for key in given:
        if not isinstance(key, str) or (known is not None and key not in known):
            raise PolicyError(path, f"{key!r} is not a field that this release knows")
    return given


def _sequence(given: object, path: str) -> Sequence[Any]:
    if given is None:
        return ()
    if not isinstance(given, list | tuple):
        raise PolicyError(path, f"{type(given).__name__} is not a list")
    return given
