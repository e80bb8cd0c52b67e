"""The metrics sidecar in engine pods: who has it, what it is told, and what does not change it."""

from __future__ import annotations

import json
from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.errors import InternalError
from securevllm.render import Observed, Rendered, accepted, engine, gateway, render, sidecar
from securevllm.render.envoy import ADMIN_PATHS, SCRAPED_PATH
from securevllm.render.meta import Owner
from securevllm.render.sidecar import SidecarModel
from securevllm.topology import sides

OWNER = Owner("llama", "apps", "uid-1")
LOCAL: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
FROM = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}}}
METRICS: dict[str, Any] = {"security": {"metrics": {"from": FROM}}}
ROUTER = {"image": "registry.example/vllm-router:v0.1.17"}
TOPOLOGIES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "replicas": ({"replicas": 3}, {"llama-engine"}),
    "nodes": ({"parallelism": {"tensor": 2, "nodes": 2}}, {"llama-e0-0"}),
    "data": ({"parallelism": {"data": {"size": 4, "sizeLocal": 2}}}, {"llama-e0-0"}),
    "hybrid": (
        {"parallelism": {"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}}},
        {"llama-e0-0", "llama-e0-1"},
    ),
    "split": ({"disaggregation": {"connector": "nixl", "router": ROUTER}}, {"llama-p0-0", "llama-d0-0"}),
}


def made(pins: dict[str, Any] | None = None, **spec: Any) -> Rendered:
    return render(OWNER, parse("llama", {**LOCAL, **spec}), Context(), Observed(seal_key=b"seal", pins=pins or {}))


def pods(found: Rendered) -> dict[str, dict[str, Any]]:
    return {obj["metadata"]["name"]: obj["spec"]["template"]["spec"] for obj in found.workloads}


def beside(pod: dict[str, Any]) -> list[dict[str, Any]]:
    return [container for container in pod["containers"] if container["name"] == "metrics"]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_pod_with_an_http_server_has_it_and_no_other_pod(name: str) -> None:
    spec, wanted = TOPOLOGIES[name]
    assert {name for name, pod in pods(made(**spec, **METRICS)).items() if beside(pod)} == wanted
    assert not any(beside(pod) for pod in pods(made(**spec)).values())


def test_it_comes_after_the_gate_as_a_container_of_its_own_user_and_without_any_secret() -> None:
    pod = pods(made(**METRICS))["llama-engine"]
    assert [container["name"] for container in pod["initContainers"]] == ["gate"]
    assert [container["name"] for container in pod["containers"]] == ["vllm", "metrics"]
    (found,) = beside(pod)
    assert found["image"] == Context().gateway_image
    assert "volumeMounts" not in found
    assert [entry["name"] for entry in found["env"]] == ["POD_IP"]
    assert found["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
        "readOnlyRootFilesystem": True,
        "runAsUser": 65532,
        "runAsGroup": 65532,
    }
    assert found["ports"] == [{"name": "metrics", "containerPort": 9464, "protocol": "TCP"}]
    # An engine serves on while nobody can count it: only the start of the sidecar is waited for.
    assert not {"readinessProbe", "livenessProbe"} & set(found)


def test_it_listens_and_connects_where_the_engine_does_and_has_no_admin_interface() -> None:
    (found,) = beside(pods(made(ports={"api": 9000, "metrics": 9400}, **METRICS))["llama-engine"])
    config = json.loads(found["args"][found["args"].index("--config-yaml") + 1])
    (listener,) = config["static_resources"]["listeners"]
    (cluster,) = config["static_resources"]["clusters"]
    (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
    assert listener["address"] == {"socket_address": {"address": "$(POD_IP)", "port_value": 9400}}
    assert endpoint["endpoint"]["address"] == {"socket_address": {"address": "$(POD_IP)", "port_value": 9000}}
    assert not {"admin", "dynamic_resources"} & set(config)


def test_kubelet_replaces_nothing_in_it_but_the_address() -> None:
    model = SidecarModel("llama-metrics", 9464, 8000)
    assert sidecar.config(model).count("$(") == sidecar.config(model).count("$(POD_IP)") == 2
    with pytest.raises(InternalError, match=r"a variable other than"):
        sidecar.config(SidecarModel("$(HOSTNAME)", 9464, 8000))


def test_who_may_scrape_is_no_matter_of_pods_but_that_somebody_may_is() -> None:

    def pins(found: Rendered) -> dict[str, Any]:
        kept = accepted.read(OWNER, found.configuration[0]["data"], b"seal")
        assert kept is not None
        return dict(kept.pins)

    before = made(**METRICS)
    other: dict[str, Any] = {"security": {"metrics": {"from": {"podSelector": {}}}}}
    engines = [pods(found)["llama-engine"] for found in (before, made(pins(before), **other))]
    assert engines[0] == engines[1]
    assert [obj for obj in before.isolation if obj not in made(pins(before), **other).isolation] != []
    assert not beside(pods(made(pins(before)))["llama-engine"])

    # The same holds for the gateways, whose port a monitor finds by its name.
    gateways = [pods(found)["llama-gateway"] for found in (before, made(pins(before), **other))]
    assert gateways[0] == gateways[1]
    ports = {"clients": 8443, "ops": 9902, "envoy-metrics": 9903}
    assert {port["name"]: port["containerPort"] for port in gateways[0]["containers"][0]["ports"]} == ports
    (left,) = pods(made(pins(before)))["llama-gateway"]["containers"]
    assert [port["name"] for port in left["ports"]] == ["clients", "ops"]


def test_a_gateway_that_nobody_may_scrape_listens_nowhere_for_it() -> None:
    told = [made(**spec).gateway_files for spec in ({}, METRICS)]
    listeners = [[one["name"] for one in json.loads(files["lds.yaml"])["resources"]] for files in told]
    assert listeners == [["gateway", "ops"], ["gateway", "ops", "metrics"]]
    paths = [json.loads(files["bootstrap.yaml"])["admin"]["allow_paths"] for files in told]
    assert paths == [[{"exact": path} for path in found] for found in (ADMIN_PATHS, (*ADMIN_PATHS, SCRAPED_PATH))]


def test_a_resource_without_metrics_is_rolled_by_no_upgrade_to_this_release() -> None:

    judged = parse("llama", LOCAL)
    (side,) = sides(judged.spec)
    assert "metrics" not in engine.inputs(judged.raw, side, engine.StartedWith("", ""), {})
    assert "metrics" not in gateway.inputs(judged.raw)


def test_everybody_as_a_scraper_is_told_as_a_risk() -> None:
    wide = {"security": {"metrics": {"from": {"namespaceSelector": {}, "cidrs": ["0.0.0.0/0"]}}}}
    assert parse("llama", {**LOCAL, **wide}).risks == (
        "security.metrics.from.cidrs: every address may scrape",
        "security.metrics.from.namespaceSelector: pods of every namespace may scrape",
    )
    assert parse("llama", {**LOCAL, **METRICS}).risks == ()
