"""The product's evaluator of NetworkPolicies: against the independent one of the tests, and what it says in words."""

from __future__ import annotations

import copy
from ipaddress import ip_address
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm import netpol
from tests import netpol as reference
from tests.netpol.endpoints import PROTOCOLS

NAMESPACES = {"a": {"team": "red"}, "b": {"team": "blue"}, "c": {}}
WEB_PORTS = (reference.ContainerPort("http", 80), reference.ContainerPort("dns", 5353, "UDP"))
ENDS: tuple[reference.Pod | reference.Node | reference.External, ...] = (
    reference.Pod("web", "a", {"app": "web", "tier": "front"}, ("10.0.1.1", "fd00:1::1"), WEB_PORTS, "node-1"),
    reference.Pod("db", "a", {"app": "db"}, ("10.0.1.2",), (reference.ContainerPort("http", 8080),), "node-2"),
    reference.Pod("web", "b", {"app": "web"}, ("10.0.2.1", "fd00:2::1"), WEB_PORTS, "node-2"),
    reference.Pod("bare", "c", {}, ("10.0.3.1",), (), "node-2"),
    reference.Pod("agent", "a", {"app": "web"}, ("192.168.0.2",), WEB_PORTS, "node-2", host_network=True),
    reference.Pod("v6", "a", {"app": "v6"}, ("fd00:1::6",), (), "node-1"),
    reference.Node("node-1", ("192.168.0.1",)),
    reference.Node("node-2", ("192.168.0.2", "fd00:9::2")),
    reference.External("internet", ("8.8.8.8", "2001:4860:4860::8888")),
    reference.External("metadata", ("169.254.169.254",)),
)
PODS = [end for end in ENDS if isinstance(end, reference.Pod)]
PORTS = (1, 53, 79, 80, 81, 5353, 8000, 8080, 8081, 65535)


def ours(end: reference.Pod | reference.Node | reference.External) -> netpol.End:
    addresses = tuple(map(ip_address, end.ips))
    if not isinstance(end, reference.Pod):
        return netpol.Host(end.name, addresses, node=isinstance(end, reference.Node))
    ports = tuple(netpol.NamedPort(item.name, item.port, item.protocol) for item in end.ports)
    return netpol.Pod(end.namespace, end.name, end.labels, addresses, ports, end.node, end.host_network)


# ------------------------------------------------------------------------------------ against the independent evaluator

KEYS = st.sampled_from(["app", "tier", "team", "kubernetes.io/metadata.name"])
VALUES = st.sampled_from(["web", "db", "front", "red", "blue", "a", "b"])
EXPRESSIONS = st.one_of(
    st.fixed_dictionaries(
        {"key": KEYS, "operator": st.sampled_from(["In", "NotIn"]), "values": st.lists(VALUES, min_size=1, max_size=3)}
    ),
    st.fixed_dictionaries({"key": KEYS, "operator": st.sampled_from(["Exists", "DoesNotExist"])}),
)
SELECTORS = st.fixed_dictionaries(
    {},
    optional={
        "matchLabels": st.dictionaries(KEYS, VALUES, max_size=2),
        "matchExpressions": st.lists(EXPRESSIONS, max_size=2),
    },
)
BLOCKS = st.sampled_from(
    [
        {"cidr": "0.0.0.0/0"},
        {"cidr": "0.0.0.0/0", "except": ["10.0.0.0/8", "169.254.0.0/16"]},
        {"cidr": "10.0.1.0/24"},
        {"cidr": "10.0.1.1/32"},
        {"cidr": "10.0.2.9/16", "except": ["10.0.3.0/24"]},
        {"cidr": "192.168.0.0/24"},
        {"cidr": "fd00::/8", "except": ["fd00:2::/32"]},
        {"cidr": "::/0"},
    ]
)
PEERS = st.one_of(
    st.fixed_dictionaries({"ipBlock": BLOCKS}),
    st.fixed_dictionaries({"podSelector": SELECTORS}),
    st.fixed_dictionaries({"namespaceSelector": SELECTORS}),
    st.fixed_dictionaries({"podSelector": SELECTORS, "namespaceSelector": SELECTORS, "ipBlock": st.none()}),
)
NUMBERS = st.sampled_from(PORTS)
PORT_RULES = st.one_of(
    st.fixed_dictionaries({}, optional={"protocol": st.sampled_from(PROTOCOLS)}),
    st.fixed_dictionaries({"port": NUMBERS}, optional={"protocol": st.sampled_from(PROTOCOLS)}),
    st.fixed_dictionaries(
        {"port": st.sampled_from(["http", "dns"])}, optional={"protocol": st.sampled_from(PROTOCOLS)}
    ),
    st.tuples(NUMBERS, NUMBERS).map(lambda pair: {"protocol": "TCP", "port": min(pair), "endPort": max(pair)}),
)


def rules(peers: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    rule = st.fixed_dictionaries(
        {}, optional={peers: st.lists(PEERS, max_size=2), "ports": st.lists(PORT_RULES, max_size=2)}
    )
    return st.lists(rule, max_size=2)


SPECS = st.fixed_dictionaries(
    {"podSelector": SELECTORS},
    optional={
        "policyTypes": st.lists(st.sampled_from(["Ingress", "Egress"]), unique=True),
        "ingress": rules("from"),
        "egress": rules("to"),
    },
)


def manifest(spec: dict[str, Any], name: str = "p", namespace: str = "a") -> dict[str, Any]:
    return {
        "apiVersion": netpol.API_VERSION,
        "kind": netpol.KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": spec,
    }


MANIFESTS = st.lists(st.tuples(SPECS, st.sampled_from(["a", "b"])), max_size=4).map(
    lambda found: [manifest(spec, f"p{index}", namespace) for index, (spec, namespace) in enumerate(found)]
)
ENGINES = st.builds(reference.Engine, st.booleans(), st.booleans(), st.booleans(), st.booleans())


@settings(max_examples=300, deadline=None)
@given(manifests=MANIFESTS, engine=ENGINES)
def test_it_agrees_with_the_independent_evaluator(manifests: list[dict[str, Any]], engine: reference.Engine) -> None:
    theirs = reference.Evaluator(copy.deepcopy(manifests), PODS, NAMESPACES, engine=engine)
    enforcement = netpol.Enforcement(
        engine.ipblock_matches_pods,
        engine.ipblock_matches_nodes,
        engine.node_reaches_own_pods,
        engine.pod_reaches_own_node,
    )
    policies = netpol.Policies(map(netpol.parse, manifests), NAMESPACES, enforcement)
    for source in ENDS:
        for destination in ENDS:
            here, there = ours(source), ours(destination)
            for protocol in PROTOCOLS:
                expected = theirs.open_ports(source, destination, protocol)
                assert policies.open_ports(here, there, protocol) == expected, (here, there, protocol)
            verdict = policies.allowed(here, there, "TCP", 80)
            assert bool(verdict) == bool(theirs.reachable(source, destination, "TCP", 80))
            assert verdict.why


@settings(deadline=None)
@given(manifests=MANIFESTS)
def test_the_grants_of_a_template_hold_every_port_that_some_peer_reaches(manifests: list[dict[str, Any]]) -> None:
    policies = netpol.Policies(map(netpol.parse, manifests), NAMESPACES)
    for end in PODS:
        if end.host_network:
            continue
        pod = ours(end)
        assert isinstance(pod, netpol.Pod)
        grants = policies.grants(pod, "Ingress")
        assert (grants is None) == (not policies.selecting(pod, "Ingress"))
        for source in map(ours, ENDS):
            if grants is None or source.key in {pod.key, f"node {pod.node}"}:
                continue
            if isinstance(source, netpol.Pod) and source.host_network and source.node == pod.node:
                continue
            for port in PORTS:
                if policies.allowed(source, pod, "TCP", port):
                    assert any(grant.covers("TCP", port) for grant in grants)


# ---------------------------------------------------------------------------------------------------------- in words

INGRESS = manifest(
    {
        "podSelector": {"matchLabels": {"app": "web"}},
        "ingress": [
            {"from": [{"podSelector": {"matchLabels": {"app": "db"}}}], "ports": [{"port": "http"}]},
            {"from": [{"namespaceSelector": {}, "podSelector": {}}, {"ipBlock": {"cidr": "192.0.2.0/24"}}]},
        ],
    }
)
WEB, DB, V6 = (ours(PODS[index]) for index in (0, 1, 5))


def test_a_verdict_names_every_rule_that_allows() -> None:
    policies = netpol.Policies([netpol.parse(INGRESS)], NAMESPACES)
    verdict = policies.allowed(DB, WEB, "TCP", 80)
    assert [str(rule) for rule in verdict.by] == [
        "NetworkPolicy a/p spec.ingress[0]",
        "NetworkPolicy a/p spec.ingress[1]",
    ]
    assert verdict.why == "; ".join(map(str, verdict.by))


def test_a_verdict_names_the_policy_that_isolates() -> None:
    policies = netpol.Policies([netpol.parse(INGRESS)], NAMESPACES)
    verdict = policies.allowed(netpol.Host("internet", (ip_address("8.8.8.8"),)), WEB, "TCP", 80)
    assert not verdict
    assert verdict.why == "ingress of a/web is isolated by a/p, and no rule allows it"
    assert "no IP family in common" in policies.allowed(V6, DB, "TCP", 80).why
    assert policies.allowed(WEB, DB, "TCP", 80).why == "no policy selects either end"


def test_peers_are_told_as_kubectl_writes_them() -> None:
    rule = netpol.parse(INGRESS).rules["Ingress"]
    assert [str(peer) for item in rule for peer in item.peers or ()] == [
        "pods app=db of the namespace",
        "all pods of all namespaces",
        "addresses 192.0.2.0/24",
    ]
    every = [
        {"key": "a", "operator": "In", "values": ["y", "x"]},
        {"key": "b", "operator": "NotIn", "values": ["z"]},
        {"key": "c", "operator": "Exists"},
        {"key": "d", "operator": "DoesNotExist"},
    ]
    assert str(netpol.selector({"matchExpressions": every}, "s")) == "a in (x,y),b notin (z),c,!d"


def test_an_end_without_address_and_a_port_that_is_none_are_refused() -> None:
    policies = netpol.Policies([])
    template = netpol.Pod("a", "template", {})
    with pytest.raises(ValueError, match="a/template has no address"):
        policies.allowed(template, WEB, "TCP", 80)
    with pytest.raises(ValueError, match="port 0 is not within"):
        policies.allowed(DB, WEB, "TCP", 0)


def test_null_in_a_list_of_rules_allows_everything_as_the_api_server_reads_it() -> None:
    policies = netpol.Policies([netpol.parse(manifest({"podSelector": {}, "ingress": [None]}))])
    assert policies.open_ports(DB, WEB, "UDP") == ((1, 65535),)


def test_the_namespace_of_a_manifest_that_names_none_is_the_given_one() -> None:
    made = manifest({"podSelector": None})
    del made["metadata"]["namespace"]
    assert netpol.parse(made, "team").key == "team/p"
    assert netpol.parse(made).key == "default/p"


@pytest.mark.parametrize(
    ("spec", "path"),
    [
        ({"podSelector": "web"}, "spec.podSelector"),
        ({"podSelector": {"matchLabels": {"a": 1}}}, "spec.podSelector.matchLabels.a"),
        ({"podSelector": {"matchLabel": {}}}, "spec.podSelector"),
        ({"podSelector": {"matchExpressions": [{"operator": "In"}]}}, "spec.podSelector.matchExpressions[0].key"),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}, ".values"),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In", "values": [1]}]}}, ".values"),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["x"]}]}}, ".values"),
        ({"podSelector": {"matchExpressions": [{"key": "a", "operator": "Gt", "values": ["1"]}]}}, ".operator"),
        ({"policyTypes": ["ingress"]}, "spec.policyTypes"),
        ({"policyTypes": "Ingress"}, "spec.policyTypes"),
        ({"ingress": {"from": []}}, "spec.ingress"),
        ({"ingress": [{"to": []}]}, "spec.ingress[0]"),
        ({"ingress": [{"from": [{}]}]}, "spec.ingress[0].from[0]"),
        ({"ingress": [{"from": [None]}]}, "spec.ingress[0].from[0]"),
        ({"ingress": [{"from": [{"serviceAccountSelector": {}}]}]}, "spec.ingress[0].from[0]"),
        ({"ingress": [{"from": [{"podSelector": {}, "ipBlock": {"cidr": "::/0"}}]}]}, "spec.ingress[0].from[0]"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.1"}}]}]}, "spec.ingress[0].from[0].ipBlock.cidr"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/40"}}]}]}, ".ipBlock.cidr"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}]}]}, ".except[0]"),
        ({"ingress": [{"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["::/8"]}}]}]}, ".except[0]"),
        ({"ingress": [{"ports": [{"port": 0}]}]}, "spec.ingress[0].ports[0]"),
        ({"ingress": [{"ports": [{"port": True}]}]}, "spec.ingress[0].ports[0]"),
        ({"ingress": [{"ports": [{"port": "80"}]}]}, "spec.ingress[0].ports[0]"),
        ({"ingress": [{"ports": [{"port": 80, "endPort": 79}]}]}, "spec.ingress[0].ports[0]"),
        ({"ingress": [{"ports": [{"port": "http", "endPort": 90}]}]}, "spec.ingress[0].ports[0].endPort"),
        ({"ingress": [{"ports": [{"protocol": "tcp"}]}]}, "spec.ingress[0].ports[0].protocol"),
        ({"egress": [{"ports": [{"port": 70000}]}]}, "spec.egress[0].ports[0]"),
    ],
)
def test_what_the_api_server_would_refuse_is_named(spec: dict[str, Any], path: str) -> None:
    with pytest.raises(netpol.PolicyError) as refused:
        netpol.parse(manifest(spec))
    assert path in refused.value.path


@pytest.mark.parametrize(
    ("wrong", "path"),
    [
        ({"kind": "CiliumNetworkPolicy"}, "kind"),
        ({"metadata": {"namespace": "a"}}, "metadata.name"),
        ({"metadata": {"name": "a", "namespace": 1}}, "metadata.namespace"),
        ({"metadata": []}, "metadata"),
        ({"spec": []}, "spec"),
    ],
)
def test_what_is_no_network_policy_is_named(wrong: dict[str, Any], path: str) -> None:
    with pytest.raises(netpol.PolicyError) as refused:
        netpol.parse({**manifest({}), **wrong})
    assert refused.value.path == path
