"""Who exists, what listens, who may talk to whom, for given specs; and what an address range really means."""

from __future__ import annotations

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm.api.addresses import NOT_PUBLIC, is_public
from securevllm.api.parse import parse
from securevllm.context import CidrPeer, Context, PodPeer, Selector
from securevllm.topology import (
    Inbound,
    Internal,
    Outbound,
    Outside,
    PortRule,
    Role,
    Topology,
    hub_port,
    internet,
    outside_part,
    plan,
    public_part,
)

FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
HUB: dict[str, Any] = {"model": {"name": "a/b", "source": {"huggingFace": {}}}}
CLUSTER = Context(cluster_ranges=("10.244.0.0/16", "203.0.113.0/24", "2001:db8::/32"))


def topology(context: Context = CLUSTER, **spec: Any) -> Topology:
    return plan(parse("llama", {**FINE, **spec}).spec, context)


def pairs(found: Topology) -> set[tuple[str, str, int | None]]:
    """Source, destination and port of every flow; for destinations outside the first port."""
    told: set[tuple[str, str, int | None]] = set()
    for flow in found.flows:
        match flow:
            case Outbound():
                told.add((flow.source, flow.to, flow.ports[0].port))
            case Inbound() | Internal():
                told.add((flow.source, f"{flow.to.role}/{flow.to.name}", flow.to.port))
    return told


BASE = {
    ("clients", "gateway/https", 8443),
    ("operator", "gateway/https", 8443),
    ("operator", "gateway/ops", 9902),
    ("gateway", "engine/api", 8000),
    ("gateway", "dns", 53),
    ("engine", "dns", 53),
}


def test_the_smallest_topology() -> None:
    found = topology()
    assert pairs(found) == BASE
    assert [(item.role, item.replicas) for item in found.pods] == [(Role.GATEWAY, 2), (Role.ENGINE, 1)]
    assert all(flow.why for flow in found.flows)


def test_a_fetch_reaches_the_hub_and_names() -> None:
    assert pairs(topology(**HUB)) - BASE == {("fetch", "dns", 53), ("fetch", "hub", 443)}


@pytest.mark.parametrize(
    ("endpoint", "port"),
    [(None, 443), ("https://hub.example.com", 443), ("https://hub.example.com:8443", 8443), ("https://h:444/api", 444)],
)
def test_the_port_of_a_hub(endpoint: str | None, port: int) -> None:
    source = {"endpoint": endpoint} if endpoint else {}
    spec = parse("llama", {**FINE, "model": {"name": "a/b", "source": {"huggingFace": source}}}).spec
    assert spec.model.source is not None
    assert spec.model.source.hugging_face is not None
    assert hub_port(spec.model.source.hugging_face) == port
    assert ("fetch", "hub", port) in pairs(plan(spec, CLUSTER))


def test_plain_http_moves_the_entry() -> None:
    found = topology(gateway={"tls": {"disabled": "a mesh does it"}})
    assert ("clients", "gateway/http", 8080) in pairs(found)
    assert found.socket(Role.GATEWAY, "http").port == 8080
    with pytest.raises(KeyError, match="gateway/https"):
        found.socket(Role.GATEWAY, "https")


def test_moved_port_and_replicas() -> None:
    found = topology(ports={"api": 9000}, replicas=3, gateway={"replicas": 1})
    assert ("gateway", "engine/api", 9000) in pairs(found)
    assert [(item.role, item.replicas) for item in found.pods] == [(Role.GATEWAY, 1), (Role.ENGINE, 3)]


def test_suspended_has_the_same_flows_and_no_pods() -> None:
    found = topology(suspend=True)
    assert pairs(found) == BASE
    assert {item.replicas for item in found.pods} == {0}


def clients(**peers: Any) -> tuple[Any, ...]:
    found = topology(gateway={"clients": peers})
    return tuple(
        peer
        for flow in found.flows
        if isinstance(flow, Inbound) and flow.source == Outside.CLIENTS
        for peer in flow.peers
    )


def test_clients_are_those_of_the_namespace_unless_said() -> None:
    flow = next(flow for flow in topology().flows if isinstance(flow, Inbound))
    assert flow.peers == (PodPeer(),)


def test_clients_that_are_said() -> None:
    assert clients() == ()
    assert clients(podSelector={}) == (PodPeer(None, Selector()),)
    assert clients(namespaceSelector={"matchLabels": {"b": "2", "a": "1"}}) == (
        PodPeer(Selector((("a", "1"), ("b", "2"))), None),
    )
    expression = {"key": "app", "operator": "In", "values": ["x", "y"]}
    assert clients(podSelector={"matchExpressions": [expression]}) == (
        PodPeer(None, Selector(expressions=(("app", "In", ("x", "y")),))),
    )


def test_addresses_of_clients_are_never_the_clusters() -> None:
    assert clients(cidrs=["10.0.0.0/8", "10.244.7.0/24", "198.51.100.0/24"]) == (
        CidrPeer("10.0.0.0/8", ("10.244.0.0/16",)),
        CidrPeer("198.51.100.0/24"),
    )


def test_declared_egress() -> None:
    rule = {
        "to": {"podSelector": {"matchLabels": {"app": "redis"}}, "cidrs": ["198.51.100.0/24", "203.0.113.0/25"]},
        "ports": [{"port": 6379}, {"port": 53, "protocol": "UDP"}],
        "why": "the prefix cache",
    }
    flow = topology(security={"egress": [rule]}).flows[-1]
    assert flow == Outbound(
        Role.ENGINE,
        Outside.DECLARED,
        (PodPeer(None, Selector((("app", "redis"),))), CidrPeer("198.51.100.0/24")),
        (PortRule(6379), PortRule(53, "UDP")),
        "the prefix cache",
    )


def test_a_rule_of_which_nothing_is_left_is_no_flow() -> None:
    """An empty list of peers would allow everybody."""
    rule = {"to": {"cidrs": ["203.0.113.0/25"]}, "ports": [{"port": 443}], "why": "nothing is left"}
    assert pairs(topology(security={"egress": [rule]})) == BASE


# --------------------------------------------------------------------------------------------------------- addresses

V4 = st.integers(0, 2**32 - 1).map(IPv4Address)
V6 = st.integers(0, 2**128 - 1).map(IPv6Address)
SPECIAL = st.sampled_from([*NOT_PUBLIC, *map(ip_network, CLUSTER.cluster_ranges)]).flatmap(
    lambda network: st.integers(0, network.num_addresses - 1).map(lambda offset: network[offset])
)
ADDRESSES = V4 | V6 | SPECIAL


def _holds(peer: CidrPeer | None, address: IPv4Address | IPv6Address) -> bool:
    if peer is None:
        return False
    return address in ip_network(peer.cidr) and not any(address in ip_network(text) for text in peer.excluded)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(base=ADDRESSES, length=st.integers(0, 128), address=ADDRESSES)
def test_a_part_is_the_range_without_what_is_carved_out(
    base: IPv4Address | IPv6Address, length: int, address: IPv4Address | IPv6Address
) -> None:
    network = ip_network((base, min(length, base.max_prefixlen)), strict=False)
    own = [ip_network(text) for text in CLUSTER.cluster_ranges]
    for probe in (address, base, network[0], network[-1]):
        if isinstance(probe, IPv6Address) and probe.ipv4_mapped is not None:
            continue  # no packet carries one, and the API server refuses them
        inside = probe in network
        assert _holds(public_part(str(network), CLUSTER), probe) is (
            inside and not any(probe in carved for carved in (*NOT_PUBLIC, *own))
        )
        assert _holds(outside_part(str(network), CLUSTER), probe) is (
            inside and not any(probe in carved for carved in own)
        )


@settings(max_examples=200, deadline=None, derandomize=True)
@given(base=ADDRESSES, length=st.integers(0, 128))
def test_exceptions_are_strictly_within_and_of_one_family(base: IPv4Address | IPv6Address, length: int) -> None:
    """The API server refuses any other."""
    network = ip_network((base, min(length, base.max_prefixlen)), strict=False)
    part = public_part(str(network), CLUSTER)
    if part is None:
        return
    for text in part.excluded:
        hole = ip_network(text)
        assert hole.version == network.version
        assert hole != network
        assert hole.subnet_of(network)  # type: ignore[arg-type]


@settings(max_examples=200, deadline=None, derandomize=True)
@given(base=ADDRESSES, length=st.integers(0, 128))
def test_a_range_that_is_accepted_has_a_public_part(base: IPv4Address | IPv6Address, length: int) -> None:
    network = ip_network((base, min(length, base.max_prefixlen)), strict=False)
    assert is_public(network) is (public_part(str(network), Context()) is not None)


@pytest.mark.parametrize(
    "address",
    ["169.254.169.254", "169.254.170.2", "100.100.100.200", "127.0.0.1", "10.0.0.1",
      "172.16.0.1", "192.168.0.1", "0.0.0.1",
     "224.0.0.251", "255.255.255.255", "fd00:ec2::254", "fe80::1", "::1", "64:ff9b::a9fe:a9fe", "ff02::1", "10.244.0.1",
     "203.0.113.5", "2001:db8::1"],
)  # fmt: skip
def test_the_internet_is_none_of_these(address: str) -> None:
    assert not any(_holds(peer, ip_address(address)) for peer in internet(CLUSTER))


@pytest.mark.parametrize("address", ["1.1.1.1", "8.8.8.8", "172.32.0.1", "192.167.0.1", "2606:4700::1111", "11.0.0.1"])
def test_the_internet_is_these(address: str) -> None:
    assert any(_holds(peer, ip_address(address)) for peer in internet(CLUSTER))
