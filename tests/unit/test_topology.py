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
from securevllm.errors import Problem, SpecError
from securevllm.topology import (
    Group,
    Inbound,
    Internal,
    Mesh,
    Outbound,
    Outside,
    PortRule,
    Role,
    Topology,
    check,
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


# --------------------------------------------------------------------------------------------------- several pods

SPLIT: dict[str, Any] = {
    "connector": "nixl",
    "router": {"image": "vllm/vllm-router:v0.1.17"},
    "prefill": {"replicas": 2, "parallelism": {"tensor": 8, "nodes": 2}},
    "decode": {"replicas": 1},
}
NODES: dict[str, Any] = {"parallelism": {"tensor": 8, "pipeline": 2, "nodes": 4}, "replicas": 2}


def meshes(found: Topology) -> list[str]:
    return [flow.group for flow in found.flows if isinstance(flow, Mesh)]


def counts(found: Topology) -> dict[str, int]:
    return {item.role.value: item.replicas for item in found.pods}


def test_a_replica_over_nodes_is_a_group_whose_head_alone_has_http() -> None:
    found = topology(**NODES)
    worker = Role.ENGINE_WORKER
    assert found.groups == tuple(Group(name, (Role.ENGINE, worker, worker, worker)) for name in ("e0", "e1"))
    assert counts(found) == {"gateway": 2, "engine": 2, "engine-worker": 6}
    assert meshes(found) == ["e0", "e1"]
    assert pairs(found) == BASE | {("engine-worker", "dns", 53)}
    assert {socket.name for socket in found.sockets if socket.role is worker} == {
        "barrier",
        "gloo",
        "nccl",
        "message-queue",
    }
    assert found.socket(Role.ENGINE, "torch-distributed").port == 29501
    assert not [socket for socket in found.sockets if socket.role.headless and socket.name == "api"]


@pytest.mark.parametrize(
    ("data", "members"),
    [
        ({"size": 4, "sizeLocal": 2}, (Role.ENGINE, Role.ENGINE_WORKER)),
        ({"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}, (Role.ENGINE, Role.ENGINE)),
        ({"size": 2, "sizeLocal": 1, "loadBalancing": "external"}, (Role.ENGINE, Role.ENGINE)),
    ],
)
def test_data_parallel_ranks_over_pods(data: dict[str, Any], members: tuple[Role, ...]) -> None:
    found = topology(parallelism={"data": data, "tensor": 2, "expert": True})
    assert found.groups == (Group("e0", members),)
    assert meshes(found) == ["e0"]
    assert found.socket(Role.ENGINE, "data-parallel-rpc").port == 29550
    assert {flow.to.role for flow in found.flows if isinstance(flow, Internal)} == {Role.ENGINE}


def test_data_parallel_ranks_in_one_pod_are_no_group() -> None:
    found = topology(parallelism={"data": {"size": 4}}, replicas=3)
    assert (found.groups, meshes(found), pairs(found)) == ((), [], BASE)


def test_prefill_and_decode_exchange_and_the_router_alone_asks_them() -> None:
    found = topology(disaggregation=SPLIT)
    assert [group.name for group in found.groups] == ["p0", "p1", "d0"]
    assert meshes(found) == ["p0", "p1"]  # a group of one has nobody to talk to
    assert found.entry is Role.ROUTER
    internal = pairs(found) - {(source, to, port) for source, to, port in pairs(found) if "/" not in to}
    assert internal == {
        *((source, to, port) for source, to, port in BASE if to.startswith("gateway")),
        ("gateway", "router/api", 8090),
        ("router", "prefill/api", 8000),
        ("router", "decode/api", 8000),
        ("prefill", "decode/any", 1),
        ("prefill-worker", "decode/any", 1),
        ("decode", "prefill/any", 1),
        ("decode", "prefill-worker/any", 1),
    }
    assert {str(flow.to.rule) for flow in found.flows if isinstance(flow, Internal) and flow.to.name == "any"} == {
        "TCP, every port"
    }


def test_only_mooncake_is_asked_for_its_ranks() -> None:
    found = topology(disaggregation={**SPLIT, "connector": "mooncake"}, ports={"mooncakeBootstrap": 9000})
    assert ("router", "prefill/mooncake-bootstrap", 9000) in pairs(found)
    assert [socket.role for socket in found.sockets if socket.name == "mooncake-bootstrap"] == [Role.PREFILL]


def test_events_are_for_their_readers_one_port_for_each_rank() -> None:
    events = {"from": {"podSelector": {}}, "why": "the router asks"}
    found = topology(parallelism={"data": {"size": 4, "sizeLocal": 2}}, security={"kvEvents": events})
    readers = [flow for flow in found.flows if isinstance(flow, Inbound) and flow.source is Outside.READERS]
    assert [(flow.to.role, str(flow.to.rule), flow.why) for flow in readers] == [
        (Role.ENGINE, "TCP 5557-5560", "the router asks"),
        (Role.ENGINE_WORKER, "TCP 5557-5560", "the router asks"),
    ]
    # Without data parallelism only the head schedules, so only it publishes.
    alone = topology(**NODES, security={"kvEvents": events})
    assert [socket.role for socket in alone.sockets if socket.name == "kv-events"] == [Role.ENGINE]


def test_metrics_are_for_their_scrapers_where_there_is_an_http_server() -> None:
    metrics = {"from": {"namespaceSelector": {"matchLabels": {"team": "ops"}}, "cidrs": ["198.51.100.0/24"]}}
    found = topology(**NODES, security={"metrics": metrics}, ports={"metrics": 9400})
    flows = [flow for flow in found.flows if isinstance(flow, Inbound) and flow.source is Outside.MONITORING]
    told = [(flow.to.role, str(flow.to.rule), len(flow.peers)) for flow in flows]
    # The gateway's port is no port of a spec, as its others are none.
    assert told == [(Role.GATEWAY, "TCP 9903", 2), (Role.ENGINE, "TCP 9400", 2)]
    # No other flow names the socket, and a headless pod has none.
    assert [socket.role for socket in found.sockets if socket.name == "metrics"] == [Role.GATEWAY, Role.ENGINE]

    split = topology(disaggregation=SPLIT, security={"metrics": metrics})
    scraped = [socket.role for socket in split.sockets if socket.name == "metrics"]
    assert scraped == [Role.GATEWAY, Role.PREFILL, Role.DECODE]
    everywhere = {"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}}
    hybrid = topology(parallelism=everywhere, security={"metrics": metrics})
    assert [socket.role for socket in hybrid.sockets if socket.name == "metrics"] == [Role.GATEWAY, Role.ENGINE]
    assert not [socket for socket in topology().sockets if socket.name == "metrics"]


def test_a_group_keeps_its_flows_while_suspended() -> None:
    found = topology(**NODES, suspend=True)
    assert meshes(found) == ["e0", "e1"]
    assert set(counts(found).values()) == {0}


def test_what_is_declared_holds_for_every_role_that_runs_vllm() -> None:
    egress = [{"to": {"cidrs": ["0.0.0.0/0"]}, "ports": [{"port": 443}], "why": "images of users"}]
    found = topology(disaggregation=SPLIT, security={"egress": egress})
    assert {source for source, to, _ in pairs(found) if to == "declared"} == {"prefill", "prefill-worker", "decode"}


@pytest.mark.parametrize(
    ("ranges", "spec", "field"),
    [
        (("2001:db8::/32", "fd00::/8"), NODES, "spec.parallelism"),
        (("2001:db8::/32",), {"disaggregation": SPLIT}, "spec.disaggregation"),
        (("2001:db8::/32",), {"replicas": 3}, None),
        (("10.0.0.0/8", "2001:db8::/32"), NODES, None),
        ((), NODES, None),
    ],
)
def test_groups_need_more_than_ipv6(ranges: tuple[str, ...], spec: dict[str, Any], field: str | None) -> None:
    found: tuple[Problem, ...] = ()
    try:
        check(parse("llama", {**FINE, **spec}).spec, Context(cluster_ranges=ranges))
    except SpecError as error:
        found = error.problems
    assert [(problem.field, problem.reason) for problem in found] == ([(field, "NotSupportedYet")] if field else [])


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
