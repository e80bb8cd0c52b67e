"""The form of the policies. What they allow is judged by `tests/property`."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.context import CidrPeer, Context, Peer, PodPeer, Selector
from securevllm.render.meta import Owner
from securevllm.render.policies import default_deny, policies
from securevllm.topology import Outbound, Outside, Pods, PortRule, Role, Topology, plan

OWNER = Owner("llama", "apps", "uid-1")
FINE: dict[str, Any] = {"model": {"name": "a/b", "source": {"huggingFace": {}}}, "image": "v:v0.33.0"}


def test_the_default_deny_selects_every_resource_and_belongs_to_nobody() -> None:
    deny = default_deny("apps")
    assert deny["spec"] == {
        "podSelector": {"matchExpressions": [{"key": "securevllm.io/resource", "operator": "Exists"}]},
        "policyTypes": ["Ingress", "Egress"],
    }
    assert "ownerReferences" not in deny["metadata"]


def test_every_role_has_one_policy_for_both_directions() -> None:
    found = policies(OWNER, plan(parse("llama", FINE).spec, Context()))
    assert [item["metadata"]["name"] for item in found] == ["llama-gateway", "llama-engine", "llama-fetch"]
    for item in found:
        assert item["spec"]["policyTypes"] == ["Ingress", "Egress"]
        assert set(item["spec"]["podSelector"]["matchLabels"]) == {"securevllm.io/resource", "securevllm.io/role"}
        assert item["metadata"]["ownerReferences"][0]["uid"] == "uid-1"


def peers(*given: Peer) -> list[dict[str, Any]]:
    flow = Outbound(Role.ENGINE, Outside.DECLARED, given, (PortRule(443),), "why")
    found = policies(OWNER, Topology((Pods(Role.ENGINE, 1),), (), (flow,)))
    rule: dict[str, Any] = found[0]["spec"]["egress"][0]
    assert rule["ports"] == [{"port": 443, "protocol": "TCP"}]
    return list(rule["to"])


def test_peers() -> None:
    some = Selector((("a", "b"),), (("c", "In", ("d",)), ("e", "Exists", ())))
    written = {
        "matchLabels": {"a": "b"},
        "matchExpressions": [{"key": "c", "operator": "In", "values": ["d"]}, {"key": "e", "operator": "Exists"}],
    }
    assert peers(PodPeer()) == [{"podSelector": {}}]
    assert peers(PodPeer(pods=some)) == [{"podSelector": written}]
    assert peers(PodPeer(namespaces=some)) == [{"namespaceSelector": written}]
    assert peers(PodPeer(Selector(), some)) == [{"namespaceSelector": {}, "podSelector": written}]
    assert peers(CidrPeer("1.0.0.0/8", ("1.1.0.0/16",)), CidrPeer("2.0.0.0/8")) == [
        {"ipBlock": {"cidr": "1.0.0.0/8", "except": ["1.1.0.0/16"]}},
        {"ipBlock": {"cidr": "2.0.0.0/8"}},
    ]


def test_nobody_is_never_everybody() -> None:
    with pytest.raises(ValueError, match="would allow everybody"):
        peers()


def test_a_role_without_flows_has_a_policy_without_rules() -> None:
    spec = policies(OWNER, Topology((Pods(Role.ENGINE, 1),), (), ()))[0]["spec"]
    assert spec.keys() == {"podSelector", "policyTypes"}
