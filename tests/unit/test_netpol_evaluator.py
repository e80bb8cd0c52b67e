"""The evaluator against the sentences of the API reference, one case each, and against relations that always hold."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.netpol import (
    CALICO,
    CILIUM,
    ContainerPort,
    Evaluator,
    External,
    InvalidPolicyError,
    Node,
    Pod,
    pod_from_template,
)
from tests.netpol.endpoints import PROTOCOLS, Endpoint, Engine, Protocol

NAMESPACES = {"a": {"team": "red"}, "b": {"team": "blue"}, "c": {}}
WEB_PORTS = (ContainerPort("http", 80), ContainerPort("dns", 5353, "UDP"))
PODS = (
    Pod("web", "a", {"app": "web", "tier": "front"}, ("10.0.1.1", "fd00:1::1"), WEB_PORTS, "node-1"),
    Pod("db", "a", {"app": "db"}, ("10.0.1.2", "fd00:1::2"), (ContainerPort("http", 8080),), "node-2"),
    Pod("web", "b", {"app": "web"}, ("10.0.2.1", "fd00:2::1"), WEB_PORTS, "node-2"),
    Pod("bare", "c", {}, ("10.0.3.1",), (), "node-2"),
    Pod("agent", "a", {"app": "web"}, ("192.168.0.2",), WEB_PORTS, "node-2", host_network=True),
    Pod("v6", "a", {"app": "v6"}, ("fd00:1::6",), (), "node-1"),
)
POD = {pod.key: pod for pod in PODS}
NODES = {"node-1": Node("node-1", ("192.168.0.1",)), "node-2": Node("node-2", ("192.168.0.2",))}
INTERNET = External("internet", ("8.8.8.8", "2001:4860:4860::8888"))
METADATA = External("metadata", ("169.254.169.254",))
ENDPOINTS: dict[str, Endpoint] = {**POD, **NODES, "internet": INTERNET, "metadata": METADATA}

ALL: dict[str, Any] = {}
WEB = {"matchLabels": {"app": "web"}}
DB = {"matchLabels": {"app": "db"}}
BLUE = {"matchLabels": {"team": "blue"}}
DENY_INGRESS = {"podSelector": ALL, "policyTypes": ["Ingress"]}
DENY_EGRESS = {"podSelector": ALL, "policyTypes": ["Egress"]}


def policy(spec: Mapping[str, Any], name: str = "p", namespace: str = "a") -> dict[str, Any]:
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": name, "namespace": namespace},
        "spec": dict(spec),
    }


def policies(*specs: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [policy(spec, f"p{index}") for index, spec in enumerate(specs)]


def ingress(*rules: Mapping[str, Any], selector: Mapping[str, Any] = WEB) -> dict[str, Any]:
    return {"podSelector": selector, "policyTypes": ["Ingress"], "ingress": list(rules)}


def egress(*rules: Mapping[str, Any], selector: Mapping[str, Any] = WEB) -> dict[str, Any]:
    return {"podSelector": selector, "policyTypes": ["Egress"], "egress": list(rules)}


def from_pods(operator: str, key: str, *values: str) -> dict[str, Any]:
    """Allow a/web from pods of any namespace that one matchExpression selects."""
    expression = {"key": key, "operator": operator, **({"values": list(values)} if values else {})}
    return ingress({"from": [{"podSelector": {"matchExpressions": [expression]}, "namespaceSelector": ALL}]})


def tcp(port: int | str, **more: Any) -> list[dict[str, Any]]:
    return [{"protocol": "TCP", "port": port, **more}]


Question = tuple[str, str, Protocol, int]
WEB_FROM_DB: Question = ("a/db", "a/web", "TCP", 80)
WEB_FROM_B: Question = ("b/web", "a/web", "TCP", 80)
WEB_FROM_BARE: Question = ("c/bare", "a/web", "TCP", 80)
WEB_FROM_INTERNET: Question = ("internet", "a/web", "TCP", 80)
WEB_TO_DB: Question = ("a/web", "a/db", "TCP", 5432)
WEB_TO_INTERNET: Question = ("a/web", "internet", "TCP", 443)
WEB_TO_METADATA: Question = ("a/web", "metadata", "TCP", 80)

# (sentence, specs of policies in namespace a, (question, allowed) pairs)
CASES: list[tuple[str, list[Mapping[str, Any]], list[tuple[Question, bool]]]] = [
    ("without a policy everything is allowed", [], [(WEB_FROM_B, True), (WEB_TO_INTERNET, True)]),
    (
        "a policy isolates only the pods that its podSelector selects",
        [ingress()],
        [(WEB_FROM_DB, False), (("a/web", "a/db", "TCP", 80), True)],
    ),
    (
        "a policy isolates only pods of its own namespace",
        [DENY_INGRESS],
        [(WEB_FROM_B, False), (("a/web", "b/web", "TCP", 80), True)],
    ),
    (
        "an empty podSelector selects every pod of the namespace",
        [DENY_INGRESS],
        [(WEB_FROM_DB, False), (("a/web", "a/db", "TCP", 80), False)],
    ),
    ("a missing podSelector is an empty one", [{"policyTypes": ["Ingress"]}], [(WEB_FROM_DB, False)]),
    ("ingress isolation leaves egress alone", [DENY_INGRESS], [(WEB_TO_INTERNET, True)]),
    ("egress isolation leaves ingress alone", [DENY_EGRESS], [(WEB_FROM_B, True), (WEB_TO_INTERNET, False)]),
    (
        "without policyTypes a policy without rules affects ingress only",
        [{"podSelector": ALL}],
        [(WEB_FROM_DB, False), (WEB_TO_INTERNET, True)],
    ),
    (
        "without policyTypes an egress rule implies Egress and Ingress",
        [{"podSelector": WEB, "egress": [{}]}],
        [(WEB_TO_INTERNET, True), (WEB_FROM_B, False)],
    ),
    (
        "without policyTypes an empty egress list is no egress rule",
        [{"podSelector": WEB, "egress": []}],
        [(WEB_TO_INTERNET, True), (WEB_FROM_B, False)],
    ),
    (
        "an empty policyTypes list is defaulted like a missing one",
        [{"podSelector": WEB, "policyTypes": [], "egress": [{"ports": tcp(443)}]}],
        [(WEB_TO_INTERNET, True), (WEB_TO_METADATA, False), (WEB_FROM_B, False)],
    ),
    (
        "with policyTypes Egress only, ingress rules do not isolate",
        [{"podSelector": WEB, "policyTypes": ["Egress"], "ingress": []}],
        [(WEB_FROM_B, True), (WEB_TO_INTERNET, False)],
    ),
    (
        "with policyTypes Ingress only, egress rules do not isolate",
        [{"podSelector": WEB, "policyTypes": ["Ingress"], "egress": [{"ports": tcp(1)}]}],
        [(WEB_TO_INTERNET, True), (WEB_FROM_B, False)],
    ),
    ("an empty rule allows every source and port", [ingress({})], [(WEB_FROM_B, True), (WEB_FROM_INTERNET, True)]),
    ("an empty `from` means every source", [ingress({"from": []})], [(WEB_FROM_INTERNET, True)]),
    ("a missing `from` means every source", [ingress({"ports": tcp(80)})], [(WEB_FROM_INTERNET, True)]),
    ("an empty `to` means every destination", [egress({"to": []})], [(WEB_TO_INTERNET, True)]),
    (
        "no rules at all means nothing is allowed",
        [ingress()],
        [(WEB_FROM_DB, False), (WEB_FROM_INTERNET, False)],
    ),
    (
        "a podSelector peer selects pods of the policy's namespace only",
        [ingress({"from": [{"podSelector": ALL}]})],
        [(WEB_FROM_DB, True), (WEB_FROM_B, False), (WEB_FROM_INTERNET, False)],
    ),
    (
        "a namespaceSelector peer selects all pods of the namespaces",
        [ingress({"from": [{"namespaceSelector": BLUE}]})],
        [(WEB_FROM_B, True), (WEB_FROM_DB, False), (WEB_FROM_BARE, False)],
    ),
    (
        "an empty namespaceSelector selects all namespaces",
        [ingress({"from": [{"namespaceSelector": ALL}]})],
        [(WEB_FROM_B, True), (WEB_FROM_DB, True), (WEB_FROM_BARE, True), (WEB_FROM_INTERNET, False)],
    ),
    (
        "namespaceSelector and podSelector in one element are ANDed",
        [ingress({"from": [{"namespaceSelector": BLUE, "podSelector": DB}]}, selector=ALL)],
        [(WEB_FROM_B, False), (WEB_FROM_DB, False)],
    ),
    (
        "namespaceSelector and podSelector in two elements are ORed",
        [ingress({"from": [{"namespaceSelector": BLUE}, {"podSelector": DB}]}, selector=ALL)],
        [(WEB_FROM_B, True), (WEB_FROM_DB, True), (WEB_FROM_BARE, False)],
    ),
    (
        "every namespace carries its name as a label",
        [ingress({"from": [{"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "c"}}}]})],
        [(WEB_FROM_BARE, True), (WEB_FROM_B, False)],
    ),
    ("In matches one of the values", [from_pods("In", "app", "db", "x")], [(WEB_FROM_DB, True), (WEB_FROM_B, False)]),
    ("In does not match a missing key", [from_pods("In", "app", "db")], [(WEB_FROM_BARE, False)]),
    ("NotIn excludes the values", [from_pods("NotIn", "app", "db")], [(WEB_FROM_DB, False), (WEB_FROM_B, True)]),
    ("NotIn matches a missing key", [from_pods("NotIn", "app", "db")], [(WEB_FROM_BARE, True)]),
    ("Exists needs the key", [from_pods("Exists", "app")], [(WEB_FROM_DB, True), (WEB_FROM_BARE, False)]),
    (
        "DoesNotExist needs the key to be missing",
        [from_pods("DoesNotExist", "app")],
        [(WEB_FROM_DB, False), (WEB_FROM_BARE, True)],
    ),
    (
        "matchLabels and matchExpressions are ANDed",
        [
            ingress(
                selector={**WEB, "matchExpressions": [{"key": "tier", "operator": "DoesNotExist"}]},
            )
        ],
        [(WEB_FROM_DB, True)],
    ),
    (
        "an ipBlock selects outside addresses",
        [ingress({"from": [{"ipBlock": {"cidr": "8.8.0.0/16"}}]})],
        [(WEB_FROM_INTERNET, True), (("metadata", "a/web", "TCP", 80), False)],
    ),
    (
        "an address in `except` is not in the ipBlock",
        [egress({"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]})],
        [(WEB_TO_INTERNET, True), (WEB_TO_METADATA, False)],
    ),
    (
        "what one ipBlock excepts another rule may allow",
        [
            egress({"to": [{"ipBlock": {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16"]}}]}),
            egress({"to": [{"ipBlock": {"cidr": "169.254.169.254/32"}}]}),
        ],
        [(WEB_TO_METADATA, True)],
    ),
    (
        "an IPv4 block never matches an IPv6 address",
        [egress({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, selector=ALL)],
        [(("a/v6", "internet", "TCP", 443), False), (WEB_TO_INTERNET, True)],
    ),
    (
        "an IPv6 block opens the IPv6 path of a dual-stack pod",
        [egress({"to": [{"ipBlock": {"cidr": "2001:db8::/32"}}, {"ipBlock": {"cidr": "2001:4860::/32"}}]})],
        [(WEB_TO_INTERNET, True), (WEB_TO_METADATA, False)],
    ),
    (
        "both sides must allow within one IP family",
        [
            egress({"to": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}),
            ingress({"from": [{"ipBlock": {"cidr": "fd00::/16"}}]}, selector=DB),
        ],
        [(WEB_TO_DB, False)],
    ),
    (
        "`ports` restricts to the ports named",
        [ingress({"from": [{"podSelector": DB}], "ports": tcp(80)})],
        [(WEB_FROM_DB, True), (("a/db", "a/web", "TCP", 81), False)],
    ),
    (
        "an empty `ports` means every port and protocol",
        [ingress({"from": [{"podSelector": DB}], "ports": []})],
        [(WEB_FROM_DB, True), (("a/db", "a/web", "SCTP", 9), True)],
    ),
    (
        "a port of one protocol does not open another protocol",
        [ingress({"ports": [{"protocol": "UDP", "port": 80}]})],
        [(WEB_FROM_DB, False), (("a/db", "a/web", "UDP", 80), True)],
    ),
    ("a port without protocol is TCP", [ingress({"ports": [{"port": 80}]})], [(WEB_FROM_DB, True)]),
    (
        "a port entry without number opens all ports of its protocol",
        [ingress({"ports": [{"protocol": "SCTP"}]})],
        [(("a/db", "a/web", "SCTP", 65535), True), (WEB_FROM_DB, False)],
    ),
    (
        "endPort opens the range, both ends included",
        [ingress({"ports": tcp(100, endPort=102)})],
        [
            (("a/db", "a/web", "TCP", 99), False),
            (("a/db", "a/web", "TCP", 100), True),
            (("a/db", "a/web", "TCP", 102), True),
            (("a/db", "a/web", "TCP", 103), False),
        ],
    ),
    (
        "a named port is the port that the destination pod gives the name",
        [ingress({"ports": tcp("http")}, selector=ALL)],
        [(WEB_FROM_DB, True), (("a/web", "a/db", "TCP", 8080), True), (("a/web", "a/db", "TCP", 80), False)],
    ),
    (
        "a named port on the egress side is resolved against the peer",
        [egress({"to": [{"podSelector": DB}], "ports": tcp("http")})],
        [(("a/web", "a/db", "TCP", 8080), True), (("a/web", "a/db", "TCP", 80), False)],
    ),
    (
        "a named port needs the protocol to match as well",
        [ingress({"ports": tcp("dns")})],
        [(("a/db", "a/web", "TCP", 5353), False), (("a/db", "a/web", "UDP", 5353), False)],
    ),
    ("a named port opens nothing outside the cluster", [egress({"ports": tcp("http")})], [(WEB_TO_INTERNET, False)]),
    (
        "policies add up",
        [ingress({"from": [{"podSelector": DB}]}), ingress({"from": [{"namespaceSelector": BLUE}]})],
        [(WEB_FROM_DB, True), (WEB_FROM_B, True), (WEB_FROM_BARE, False)],
    ),
    (
        "both the source's egress and the destination's ingress must allow",
        [DENY_INGRESS, DENY_EGRESS, egress({"to": [{"podSelector": DB}]})],
        [(WEB_TO_DB, False)],
    ),
    (
        "a connection that both sides allow goes through deny-all",
        [
            DENY_INGRESS,
            DENY_EGRESS,
            egress({"to": [{"podSelector": DB}], "ports": tcp(5432)}),
            ingress({"from": [{"podSelector": WEB}], "ports": tcp(5432)}, selector=DB),
        ],
        [(WEB_TO_DB, True), (("a/web", "a/db", "TCP", 80), False), (("a/db", "a/web", "TCP", 5432), False)],
    ),
    ("a pod always reaches itself", [DENY_INGRESS, DENY_EGRESS], [(("a/web", "a/web", "TCP", 1), True)]),
    (
        "the pod's own node always reaches it",
        [DENY_INGRESS],
        [(("node-1", "a/web", "TCP", 80), True), (("node-2", "a/web", "TCP", 80), False)],
    ),
    (
        "selectors never select a node",
        [egress({"to": [{"namespaceSelector": ALL}]})],
        [(("a/web", "node-2", "TCP", 22), False)],
    ),
    (
        "no policy selects a hostNetwork pod",
        [DENY_INGRESS, DENY_EGRESS],
        [(("internet", "a/agent", "TCP", 80), True), (("a/agent", "internet", "TCP", 80), True)],
    ),
    (
        "a hostNetwork pod is no pod to a selector",
        [ingress({"from": [{"podSelector": ALL}, {"namespaceSelector": ALL}]})],
        [(("a/agent", "a/web", "TCP", 80), False), (WEB_FROM_DB, True)],
    ),
    (
        "a hostNetwork pod reaches the pods of its own node, as the node does",
        [ingress(selector=DB)],
        [(("a/agent", "a/db", "TCP", 80), True)],
    ),
    (
        "without a common IP family nothing connects",
        [],
        [(("c/bare", "a/v6", "TCP", 80), False), (("a/web", "a/v6", "TCP", 80), True)],
    ),
]


def evaluator(manifests: Sequence[Mapping[str, Any]], engine: Engine = CALICO) -> Evaluator:
    return Evaluator(manifests, PODS, NAMESPACES, engine=engine)


@pytest.mark.parametrize(
    ("specs", "answers"), [pytest.param(specs, answers, id=sentence) for sentence, specs, answers in CASES]
)
def test_rule(specs: list[Mapping[str, Any]], answers: list[tuple[Question, bool]]) -> None:
    asked = evaluator(policies(*specs))
    for (src, dst, protocol, port), allowed in answers:
        verdict = asked.reachable(ENDPOINTS[src], ENDPOINTS[dst], protocol, port)
        assert verdict.allowed is allowed, f"{src} -> {dst} {protocol}/{port}: {verdict.reason}"


POD_BLOCKS_ONLY = replace(CALICO, ipblock_matches_nodes=False)


@pytest.mark.parametrize(
    ("engine", "pod", "node"), [(CILIUM, False, False), (CALICO, True, True), (POD_BLOCKS_ONLY, True, False)]
)
def test_engines_differ_in_whether_an_ipblock_selects_pods_and_nodes(engine: Engine, pod: bool, node: bool) -> None:
    rules = [egress({"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]})]
    asked = evaluator(policies(*rules), engine)
    assert asked.reachable(POD["a/web"], POD["a/db"], "TCP", 80).allowed is pod
    assert asked.reachable(POD["a/web"], NODES["node-2"], "TCP", 10250).allowed is node
    assert asked.reachable(POD["a/web"], POD["a/agent"], "TCP", 80).allowed is node, "a hostNetwork pod is its node"
    assert asked.reachable(POD["a/web"], INTERNET, "TCP", 80).allowed


@pytest.mark.parametrize("free", [True, False])
def test_engines_differ_in_whether_a_pod_reaches_its_own_node(free: bool) -> None:
    asked = evaluator(policies(DENY_EGRESS), replace(CILIUM, pod_reaches_own_node=free))
    assert asked.reachable(POD["a/web"], NODES["node-1"], "TCP", 10250).allowed is free
    assert not asked.reachable(POD["a/web"], NODES["node-2"], "TCP", 10250)


def test_a_probe_of_the_own_node_can_be_switched_off() -> None:
    asked = evaluator(policies(DENY_INGRESS), replace(CILIUM, node_reaches_own_pods=False))
    assert not asked.reachable(NODES["node-1"], POD["a/web"], "TCP", 80)


def test_a_reason_names_the_rule_that_allows_and_the_policies_that_isolate() -> None:
    asked = evaluator(policies(DENY_INGRESS, ingress({"from": [{"podSelector": DB}], "ports": tcp(80)})))
    allowed = asked.reachable(POD["a/db"], POD["a/web"], "TCP", 80)
    refused = asked.reachable(POD["a/db"], POD["a/web"], "TCP", 81)
    assert "ingress of a/web: allowed by a/p1 ingress[0]" in allowed.reason
    assert refused.reason == "ingress of a/web: isolated by p0, p1; no rule allows a/db there"


def test_open_ports_are_the_ranges_that_both_sides_allow() -> None:
    asked = evaluator(
        policies(
            egress({"ports": [*tcp(1, endPort=100), *tcp(101), *tcp(200, endPort=300)]}),
            ingress({"ports": [*tcp(50, endPort=250), *tcp("http")]}, selector=DB),
        )
    )
    assert asked.open_ports(POD["a/web"], POD["a/db"], "TCP") == ((50, 101), (200, 250))
    assert asked.open_ports(POD["a/web"], POD["a/db"], "UDP") == ()
    assert asked.open_ports(POD["b/web"], POD["c/bare"], "UDP") == ((1, 65535),)


def test_isolation_is_told_for_each_direction() -> None:
    asked = evaluator(policies(DENY_INGRESS))
    assert asked.isolated(POD["a/web"], "Ingress")
    assert not asked.isolated(POD["a/web"], "Egress")
    assert not asked.isolated(POD["b/web"], "Ingress")
    assert not asked.isolated(POD["a/agent"], "Ingress")


INVALID: list[tuple[dict[str, Any], str]] = [
    (ingress({"from": [{}]}), r"a/p0 ingress\[0\]\.from\[0\]: must specify a peer"),
    (ingress({"from": [{"podSelector": None}]}), "must specify a peer"),
    (ingress({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}, "podSelector": ALL}]}), "may not stand beside"),
    (ingress({"to": []}), "unknown field 'to'"),
    (ingress({"from": [{"ipBlock": {"cidr": "10.0.0.1"}}]}), "is not a CIDR"),
    (ingress({"from": [{"ipBlock": {"cidr": "10.0.0.0/33"}}]}), r"ipBlock\.cidr"),
    (ingress({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["11.0.0.0/16"]}}]}), "strict subset"),
    (ingress({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["10.0.0.0/8"]}}]}), "strict subset"),
    (ingress({"from": [{"ipBlock": {"cidr": "10.0.0.0/8", "except": ["fd00::/16"]}}]}), "strict subset"),
    (ingress({"ports": [{"port": 0}]}), "within 1..65535"),
    (ingress({"ports": tcp(65536)}), "within 1..65535"),
    (ingress({"ports": tcp(10, endPort=9)}), "range of ports"),
    (ingress({"ports": tcp("http", endPort=9)}), "named port"),
    (ingress({"ports": [{"endPort": 9}]}), "numeric port"),
    (ingress({"ports": [{"protocol": "ICMP"}]}), "'ICMP' is not one of"),
    ({"podSelector": ALL, "policyTypes": ["Both"]}, "neither Ingress nor Egress"),
    ({"podSelector": ALL, "Ingress": []}, "unknown field 'Ingress'"),
    (from_pods("In", "app"), "needs at least one value"),
    (from_pods("Exists", "app", "x"), "takes no values"),
    (from_pods("Gt", "app", "1"), "'Gt' is not one of"),
    (from_pods("Exists", ""), "key: is required"),
]


@pytest.mark.parametrize(("spec", "message"), INVALID)
def test_a_policy_that_the_api_server_refuses_is_refused(spec: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidPolicyError, match=message):
        evaluator(policies(spec))


@pytest.mark.parametrize(
    ("manifest", "message"),
    [
        ({**policy(ingress()), "kind": "Policy"}, "not a networking"),
        ({**policy(ingress()), "metadata": {"name": "p"}}, "namespace are required"),
    ],
)
def test_an_object_that_is_no_network_policy_is_refused(manifest: Mapping[str, Any], message: str) -> None:
    with pytest.raises(InvalidPolicyError, match=message):
        evaluator([manifest])


def test_questions_that_have_no_answer_are_refused() -> None:
    asked = evaluator([])
    stranger = replace(POD["a/web"], name="stranger")
    with pytest.raises(ValueError, match="a/stranger is not one of the pods"):
        asked.reachable(stranger, POD["a/web"], "TCP", 80)
    with pytest.raises(ValueError, match="is not one of the pods"):
        asked.isolated(stranger, "Ingress")
    with pytest.raises(ValueError, match="not within"):
        asked.reachable(POD["a/db"], POD["a/web"], "TCP", 0)


def test_a_wrong_picture_of_the_cluster_is_refused() -> None:
    twice = (POD["a/web"], replace(POD["a/web"], ips=("10.0.1.9",)))
    with pytest.raises(ValueError, match="two pods"):
        Evaluator([], twice, NAMESPACES, engine=CILIUM)
    with pytest.raises(ValueError, match="two policies"):
        evaluator([policy(DENY_INGRESS), policy(DENY_EGRESS)])
    with pytest.raises(ValueError, match="no labels given for namespace c"):
        Evaluator([], PODS, {"a": {}, "b": {}}, engine=CILIUM)
    with pytest.raises(ValueError, match="no labels given for namespace z"):
        evaluator([policy(DENY_INGRESS, namespace="z")])
    with pytest.raises(ValueError, match="ips is empty"):
        replace(POD["a/web"], ips=())


def test_a_pod_is_made_from_a_template() -> None:
    template = {
        "metadata": {"labels": {"app": "engine"}},
        "spec": {
            "initContainers": [
                {"name": "once", "ports": [{"name": "barrier", "containerPort": 1}]},
                {"name": "sidecar", "restartPolicy": "Always", "ports": [{"name": "ops", "containerPort": 9902}]},
            ],
            "containers": [
                {"name": "engine", "ports": [{"name": "api", "containerPort": 8000}, {"containerPort": 5557}]},
                {"name": "dns", "ports": [{"name": "dns", "containerPort": 53, "protocol": "UDP"}]},
            ],
        },
    }
    pod = pod_from_template(template, name="engine-0", namespace="a", ips=["10.0.0.9"])
    assert pod.labels == {"app": "engine"}
    assert pod.ports == (ContainerPort("api", 8000), ContainerPort("dns", 53, "UDP"), ContainerPort("ops", 9902))
    assert not pod.host_network


# Generated policies: small alphabets, so that selectors, ports and peers collide often.
KEYS, VALUES = st.sampled_from(["app", "tier"]), st.sampled_from(["web", "db", "front"])
EXPRESSIONS = st.one_of(
    st.fixed_dictionaries(
        {"key": KEYS, "operator": st.sampled_from(["In", "NotIn"]), "values": st.lists(VALUES, min_size=1, max_size=2)}
    ),
    st.fixed_dictionaries({"key": KEYS, "operator": st.sampled_from(["Exists", "DoesNotExist"])}),
)
SELECTORS: st.SearchStrategy[dict[str, Any]] = st.one_of(
    st.just({}),
    st.fixed_dictionaries({"matchLabels": st.dictionaries(KEYS, VALUES, max_size=2)}),
    st.fixed_dictionaries({"matchExpressions": st.lists(EXPRESSIONS, max_size=2)}),
)
NAMESPACE_SELECTORS = st.sampled_from(
    [{}, BLUE, {"matchExpressions": [{"key": "team", "operator": "NotIn", "values": ["blue"]}]}]
)
BLOCKS = st.sampled_from(
    [
        {"cidr": "0.0.0.0/0", "except": ["169.254.0.0/16", "10.0.1.0/24"]},
        {"cidr": "10.0.1.2/32"},
        {"cidr": "192.168.0.0/16"},
        {"cidr": "::/0", "except": ["fd00:2::/32"]},
    ]
)
PEERS = st.one_of(
    st.fixed_dictionaries({"podSelector": SELECTORS}),
    st.fixed_dictionaries({"namespaceSelector": NAMESPACE_SELECTORS}),
    st.fixed_dictionaries({"namespaceSelector": NAMESPACE_SELECTORS, "podSelector": SELECTORS}),
    st.fixed_dictionaries({"ipBlock": BLOCKS}),
)
PORT_NUMBERS = (1, 79, 80, 81, 8080, 65535)
PORT_ENTRIES = st.one_of(
    st.fixed_dictionaries({}, optional={"protocol": st.sampled_from(PROTOCOLS)}),
    st.fixed_dictionaries({"port": st.sampled_from([80, 8080, "http", "dns"])}),
    st.fixed_dictionaries({"port": st.just(80), "endPort": st.sampled_from([80, 8080])}),
)


def rules(peers: str) -> st.SearchStrategy[list[dict[str, Any]]]:
    rule = st.fixed_dictionaries(
        {}, optional={peers: st.lists(PEERS, max_size=2), "ports": st.lists(PORT_ENTRIES, max_size=2)}
    )
    return st.lists(rule, max_size=2)


SPECS = st.fixed_dictionaries(
    {"podSelector": SELECTORS},
    optional={
        "ingress": rules("from"),
        "egress": rules("to"),
        "policyTypes": st.lists(st.sampled_from(["Ingress", "Egress"]), unique=True),
    },
)
POLICIES = st.lists(st.tuples(st.sampled_from(sorted(NAMESPACES)), SPECS), max_size=4).map(
    lambda drawn: [policy(spec, f"p{i}", namespace) for i, (namespace, spec) in enumerate(drawn)]
)
ENGINES = st.sampled_from([CILIUM, CALICO])


def matrix(asked: Evaluator) -> dict[tuple[str, str, str, int], bool]:
    return {
        (source, target, protocol, port): asked.reachable(src, dst, protocol, port).allowed
        for source, src in ENDPOINTS.items()
        for target, dst in ENDPOINTS.items()
        for protocol in PROTOCOLS
        for port in PORT_NUMBERS
    }


RELATIONS = settings(max_examples=60, deadline=None)


@RELATIONS
@given(POLICIES, st.randoms(use_true_random=False), ENGINES)
def test_the_order_of_policies_does_not_matter(manifests: list[dict[str, Any]], random: Any, engine: Engine) -> None:
    shuffled = random.sample(manifests, len(manifests))
    assert matrix(evaluator(manifests, engine)) == matrix(evaluator(shuffled, engine))


@RELATIONS
@given(POLICIES, SPECS, ENGINES)
def test_one_more_policy_never_closes_what_is_isolated_already(
    manifests: list[dict[str, Any]], spec: dict[str, Any], engine: Engine
) -> None:
    base = [*manifests, policy(DENY_INGRESS, "deny-in"), policy(DENY_EGRESS, "deny-out")]
    before, after = matrix(evaluator(base, engine)), matrix(evaluator([*base, policy(spec, "more")], engine))
    assert not [question for question, allowed in before.items() if allowed and not after[question]]


@RELATIONS
@given(POLICIES, SPECS, ENGINES)
def test_one_more_policy_never_opens_what_was_not_isolated(
    manifests: list[dict[str, Any]], spec: dict[str, Any], engine: Engine
) -> None:
    """A pod without a policy is open, so for pods that no other policy selects a new policy can only close."""
    elsewhere = [manifest for manifest in manifests if manifest["metadata"]["namespace"] != "a"]
    before, after = matrix(evaluator(elsewhere, engine)), matrix(evaluator([*elsewhere, policy(spec, "more")], engine))
    assert not [question for question, allowed in after.items() if allowed and not before[question]]


@RELATIONS
@given(st.lists(SPECS, max_size=3), ENGINES)
def test_deny_all_without_rules_isolates_whatever_other_namespaces_say(
    specs: list[dict[str, Any]], engine: Engine
) -> None:
    others = [policy(spec, f"p{i}", "b") for i, spec in enumerate(specs)]
    asked = evaluator([*others, policy({"policyTypes": ["Ingress", "Egress"]})], engine)
    for (src, dst, protocol, port), allowed in matrix(asked).items():
        inside = {"a/web", "a/db", "a/v6"} & {src, dst}
        probe = dst in inside and POD[dst].node == {"a/agent": "node-2"}.get(src, src)
        if inside and src != dst and not probe:
            assert not allowed, f"{src} -> {dst} {protocol}/{port}"


@RELATIONS
@given(POLICIES, ENGINES)
def test_open_ports_say_the_same_as_reachable(manifests: list[dict[str, Any]], engine: Engine) -> None:
    asked = evaluator(manifests, engine)
    for (source, target, protocol, port), allowed in matrix(asked).items():
        ranges = asked.open_ports(ENDPOINTS[source], ENDPOINTS[target], protocol)  # type: ignore[arg-type]
        assert any(first <= port <= last for first, last in ranges) is allowed


def test_a_hundred_thousand_questions_take_seconds() -> None:
    specs = [ingress({"from": [{"podSelector": DB}], "ports": tcp(80 + i)}) for i in range(20)]
    asked = evaluator(policies(DENY_INGRESS, DENY_EGRESS, *specs))
    started = time.process_time()
    for port in range(1, 1701):
        for source in POD.values():
            for target in ENDPOINTS.values():
                asked.reachable(source, target, "TCP", port)
    assert time.process_time() - started < 60  # about one
