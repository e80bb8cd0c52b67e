"""Which sockets are shut from where the prober stands: what the spec lets it reach would show no breach."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.proof.targets import Endpoint, Place, endpoints, shut
from securevllm.render import canary
from securevllm.render.meta import Owner
from securevllm.topology import Topology, plan

OWNER = Owner("llama", "apps", "uid-1")
CANARY = Place("apps", beside=True, labels=canary.labels(OWNER), exact=True)
OPERATOR = Place("secure-vllm-operator", beside=False, labels={"app.kubernetes.io/name": "secure-vllm-operator"})
NAME = "kubernetes.io/metadata.name"
NOT_HERE = {"key": NAME, "operator": "NotIn", "values": ["apps"]}


def topology(peers: dict[str, Any], kind: str = "metrics") -> Topology:
    declared: dict[str, Any] = {"from": peers, **({"why": "an index of the test"} if kind == "kvEvents" else {})}
    raw = {"model": {"name": "/m"}, "image": "vllm/vllm-openai:v0.33.0", "security": {kind: declared}}
    return plan(parse("llama", raw).spec, Context())


def found(made: Topology, address: str = "10.244.0.9") -> tuple[Endpoint, ...]:
    pod = {
        "metadata": {"name": "e0", "uid": "1", "labels": OWNER.pod_labels("engine")},
        "spec": {"nodeName": "n"},
        "status": {"podIPs": [{"ip": address}], "conditions": [{"type": "Ready", "status": "True"}]},
    }
    return endpoints(made, [pod])


def names(peers: dict[str, Any], place: Place, kind: str = "metrics") -> set[str]:
    made = topology(peers, kind)
    return {item.socket for item in shut(made, found(made), place)}


@pytest.mark.parametrize(
    ("peers", "canary_may", "operator_may"),
    [
        ({"podSelector": {}}, True, False),
        ({"podSelector": {"matchLabels": {"app": "prometheus"}}}, False, False),
        ({"podSelector": {"matchLabels": {"app.kubernetes.io/name": "secure-vllm-canary"}}}, True, False),
        ({"podSelector": {"matchExpressions": [{"key": "app", "operator": "DoesNotExist"}]}}, True, False),
        ({"podSelector": {"matchExpressions": [{"key": "app", "operator": "Exists"}]}}, False, False),
        ({"namespaceSelector": {"matchLabels": {NAME: "monitoring"}}}, False, False),
        ({"namespaceSelector": {"matchLabels": {NAME: "apps"}}}, True, False),
        ({"namespaceSelector": {"matchLabels": {NAME: "secure-vllm-operator"}}}, False, True),
        # What labels namespaces have, and what further ones the operator's pods have, is not known: perhaps these.
        ({"namespaceSelector": {"matchLabels": {"team": "ops"}}}, True, True),
        ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"tier": "control"}}}, False, True),
        ({"namespaceSelector": {}, "podSelector": {"matchLabels": {"app.kubernetes.io/name": "x"}}}, False, False),
        ({"namespaceSelector": {"matchExpressions": [NOT_HERE]}}, False, True),
        # Some network plugins read a range as pods, too.
        ({"cidrs": ["10.0.0.0/8"]}, True, True),
        ({"cidrs": ["10.244.1.0/24"]}, True, True),  # of another node than the engine's; the place may be there
        ({"cidrs": ["0.0.0.0/0"]}, True, True),
        ({"cidrs": ["203.0.113.0/24", "fd00::/8"]}, False, False),
    ],
)  # fmt: skip
def test_what_the_spec_may_let_somebody_reach_is_not_shut_to_them(
    peers: dict[str, Any], canary_may: bool, operator_may: bool
) -> None:
    for place, may in ((CANARY, canary_may), (OPERATOR, operator_may)):
        assert names(peers, place) == {"api"} | (set() if may else {"metrics"})


def test_it_holds_for_readers_of_kv_events_alike_and_never_for_the_api() -> None:
    assert names({"podSelector": {}}, CANARY, "kvEvents") == {"api"}
    assert names({"podSelector": {}}, OPERATOR, "kvEvents") == {"api", "kv-events"}


def test_an_operator_in_the_namespace_of_the_resource_is_beside_it() -> None:
    here = Place("apps", beside=True, labels=OPERATOR.labels)
    assert names({"podSelector": {}}, here) == {"api"}
    assert names({"podSelector": {"matchLabels": {"app.kubernetes.io/name": "prometheus"}}}, here) == {"api", "metrics"}
