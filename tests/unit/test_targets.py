"""What is probed, and what gateways are asked."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api import routes
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.proof.targets import (
    ASKED_AT_MOST,
    Place,
    Request,
    endpoints,
    is_ready,
    one_per_group,
    requests,
    shut,
)
from securevllm.render import Observed, render
from securevllm.render.meta import Owner
from securevllm.topology import Topology, plan

OWNER = Owner("llama", "apps", "uid-1")
SPEC: dict[str, Any] = {"model": {"name": "/m"}, "image": "vllm/vllm-openai:v0.33.0"}
GROUPS = SPEC | {"parallelism": {"tensor": 2, "nodes": 2}}


def topology(spec: dict[str, Any]) -> Topology:
    return plan(parse("llama", spec).spec, Context())


def pod(name: str, role: str = "engine", *, ready: str = "True", group: str = "", **metadata: Any) -> dict[str, Any]:
    labels = OWNER.pod_labels(role) | ({"securevllm.io/group": group} if group else {})
    return {
        "metadata": {"name": name, "uid": f"uid-{name}", "labels": labels, **metadata},
        "spec": {"nodeName": "n1"},
        "status": {
            "podIPs": [{"ip": "10.0.0.1"}, {"ip": "fd00::1"}],
            "conditions": [{"type": "Ready", "status": ready}],
        },
    }


def test_each_family_of_each_ready_engine_is_a_target_and_no_gateway() -> None:
    found = endpoints(topology(SPEC), [pod("b"), pod("a"), pod("g", "gateway"), pod("late", ready="False")])
    assert [(item.pod, item.address, item.port, item.socket, item.node) for item in found] == [
        ("a", "10.0.0.1", 8000, "api", "n1"),
        ("a", "fd00::1", 8000, "api", "n1"),
        ("b", "10.0.0.1", 8000, "api", "n1"),
        ("b", "fd00::1", 8000, "api", "n1"),
    ]


def started_as(spec: dict[str, Any]) -> list[dict[str, Any]]:
    """A Ready pod of every template of a spec."""
    rendered = render(OWNER, parse("llama", spec), Context(), Observed(seal_key=b"seal"))
    pods = []
    for obj in rendered.workloads:
        template = obj["spec"]["template"]
        metadata = {"name": obj["metadata"]["name"], "uid": "1", "labels": template["metadata"]["labels"]}
        status = {"podIPs": [{"ip": "10.0.0.1"}], "conditions": [{"type": "Ready", "status": "True"}]}
        pods.append({"metadata": metadata, "spec": template["spec"] | {"nodeName": "n1"}, "status": status})
    return pods


METRICS: dict[str, Any] = {"security": {"metrics": {"from": {"podSelector": {}}}}}
SPLIT: dict[str, Any] = {
    "disaggregation": {"connector": "nixl", "router": {"image": "registry.example/vllm-router:v0.1.17"}}
}


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        # Groups that wait for their turn, and all while no operator runs, listen on what they were started with.
        ({}, {"ports": {"api": 8124}}, {("llama-engine", "api", 8000)}),
        ({"ports": {"api": 8124}}, {}, {("llama-engine", "api", 8124)}),
        (
            METRICS,
            METRICS | {"ports": {"api": 8124, "metrics": 9000}},
            {("llama-engine", "api", 8000), ("llama-engine", "metrics", 9464), ("llama-gateway", "metrics", 9903)},
        ),
        # A sidecar of before is closed now; one that is not there yet does not listen.
        (METRICS, {}, {("llama-engine", "api", 8000), ("llama-engine", "metrics", 9464)}),
        ({}, METRICS, {("llama-engine", "api", 8000)}),
        (
            {"parallelism": {"tensor": 2, "nodes": 2}},
            {"parallelism": {"tensor": 2, "nodes": 2}, "ports": {"api": 8124}},
            {("llama-e0-0", "api", 8000), ("llama-e0-0", "torch-distributed", 29501)},
        ),
        (
            SPLIT,
            SPLIT | {"ports": {"api": 8124}},
            {
                ("llama-router", "api", 8090),
                *((f"llama-{name}-0", "api", 8000) for name in ("p0", "d0")),
                *((f"llama-{name}-0", "nixl-side-channel", 5600) for name in ("p0", "d0")),
            },
        ),
        # Of a side that the topology does not know any more.
        (SPLIT, {}, {("llama-router", "api", 8090), ("llama-p0-0", "api", 8000), ("llama-d0-0", "api", 8000)}),
    ],
)
def test_what_a_pod_names_itself_is_where_it_listens(
    before: dict[str, Any], after: dict[str, Any], wanted: set[tuple[str, str, int]]
) -> None:
    found = endpoints(topology(SPEC | after), started_as(SPEC | before))
    assert {(item.pod, item.socket, item.port) for item in found} == wanted
    assert len(found) == len(wanted)


def test_only_declared_peers_may_reach_the_metrics_of_gateways_and_the_prober_tries_that() -> None:
    made, pods = topology(SPEC | METRICS), started_as(SPEC | METRICS)
    found = endpoints(made, pods)
    assert {(item.pod, item.port, item.gateway) for item in found} == {
        ("llama-engine", 8000, False),
        ("llama-engine", 9464, False),
        ("llama-gateway", 9903, True),
    }
    # Cheap rounds are about engines, and gateways alone have nobody to isolate.
    assert [item.pod for item in one_per_group(found)] == ["llama-engine"]
    assert endpoints(made, [item for item in pods if item["metadata"]["name"] == "llama-gateway"]) == ()
    # What listens there for clients and for the operator is not meant.
    assert {item.socket for item in found if item.gateway} == {"metrics"}
    elsewhere, beside = Place("monitoring", beside=False, labels={}, exact=True), Place("apps", beside=True, labels={})
    assert 9903 in {item.port for item in shut(made, found, elsewhere)}
    assert not {9903, 9464} & {item.port for item in shut(made, found, beside)}


def test_what_others_put_beside_an_engine_says_nothing_of_it() -> None:
    (stranger,) = (pod for pod in started_as(SPEC) if pod["metadata"]["name"] == "llama-engine")
    stranger["spec"]["containers"] = [
        {"name": "proxy", "ports": [{"name": "http", "containerPort": 15000}]},
        *stranger["spec"]["containers"],
    ]
    assert [item.port for item in endpoints(topology(SPEC), [stranger])] == [8000]


def test_a_pod_that_goes_or_says_nothing_is_not_known_to_listen() -> None:
    assert is_ready(pod("a"))
    assert not is_ready(pod("a", deletionTimestamp="2026-01-01T00:00:00Z"))
    assert not is_ready({"metadata": {"name": "new"}})


def test_the_barrier_is_closed_when_a_pod_is_ready_and_says_nothing() -> None:
    made = topology(GROUPS)
    assert any(socket.name == "barrier" for socket in made.sockets)
    names = {item.socket for item in endpoints(made, [pod("a", group="e0"), pod("b", "engine-worker", group="e0")])}
    assert names
    assert "barrier" not in names


def test_the_cheap_round_has_one_target_for_each_group() -> None:
    members = [pod("e0-0", group="e0"), pod("e0-1", group="e0"), pod("e1-0", group="e1")]
    assert [item.group for item in one_per_group(endpoints(topology(GROUPS), members))] == ["e0", "e1"]
    assert [item.pod for item in one_per_group(endpoints(topology(SPEC), [pod("a"), pod("b")]))] == ["a", "b"]


def asked(*, authenticated: bool = True, **gateway: Any) -> tuple[list[Request], set[tuple[str, str]]]:
    accepted = parse("llama", SPEC | {"gateway": gateway})
    allowed = {(item.method, item.path) for item in routes.allowed(accepted.spec, accepted.version)}
    return requests(accepted.version, allowed, authenticated=authenticated), allowed


@pytest.mark.parametrize("profiles", [["chat"], ["chat", "embeddings", "responses", "audio"]])
def test_nothing_that_is_open_is_asked_with_a_key_and_nothing_could_do_harm(profiles: list[str]) -> None:
    found, allowed = asked(routes={"profiles": profiles})
    known = catalogue.routes_of(catalogue.newest())
    for request in found:
        assert "{" not in request.path
        if not request.keyed:
            continue
        assert (request.method, request.path) not in allowed
        if request.method == "POST":
            # Only what reads a body, which vLLM refuses: a control route that reads none would do what it does.
            assert known["POST", request.path].category == "inference"
            assert request.body == "{"
        else:
            assert (request.method, request.body) == ("GET", "")


def test_the_worst_are_all_among_those_that_are_asked() -> None:
    found, _ = asked()
    known = catalogue.routes_of(catalogue.newest()).values()
    control = {route.path for route in known if route.category == "control" and "{" not in route.path}
    paths = [request.path for request in found]
    assert control
    assert control <= {*paths}
    assert len(found) <= ASKED_AT_MOST + 1
    assert len({*found}) == len(found)


def test_one_request_without_a_key_where_a_key_is_needed() -> None:
    found, allowed = asked()
    (bare,) = [request for request in found if not request.keyed]
    assert ("GET", bare.path) in allowed
    assert [request for request in asked(authenticated=False)[0] if not request.keyed] == []
