"""Probes and metrics of the operator as kubelet and Prometheus see them, on a leader and on a standby."""

from __future__ import annotations

import re
import time
from typing import TYPE_CHECKING, Any

import pytest

from securevllm import __version__
from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api.kube import eventually
from tests.api.lab import as_rendered
from tests.api.operator_process import OperatorProcess, new_namespace, resource

if TYPE_CHECKING:
    from tests.api.kube import Kube
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

PAGES = "https://docs.example.com/secure-vllm-operator"


def metrics(operator: OperatorProcess) -> dict[str, float]:
    """Sample, with its labels as they are printed, to value."""
    code, text = operator.get("/metrics")
    assert code == 200
    lines = [line.rpartition(" ") for line in text.splitlines() if not line.startswith("#")]
    return {sample: float(value) for sample, _, value in lines}


def test_a_leader_and_a_standby_tell_their_state_and_metrics_end_with_the_resource(lab: Lab) -> None:
    kube = lab.kube
    with (
        new_namespace(kube, "health") as namespace,
        lab.operator("leader", arguments=(f"--docs-url={PAGES}/",)) as leader,
    ):
        standby = lab.operator("standby", identity="operator-1").start(lead=False)
        try:
            assert leader.get("/healthz") == (200, "[+]workers ok\n[+]watches ok\n")
            assert leader.get("/readyz") == (200, "[+]ready ok\n")
            assert leader.get("/leadz") == (200, "[+]leader ok\n[+]caches ok\n")
            assert standby.get("/healthz") == (200, "[+]workers ok\n[+]watches ok\n")
            assert standby.get("/readyz") == (200, "[+]ready ok\n")
            code, told = standby.get("/leadz")
            assert code == 503
            assert told.startswith("[-]leader failed: not the leader\n")
            assert metrics(standby)["securevllm_leader"] == 0
            assert leader.get("/debug")[0] == 404

            kube.create(resource(namespace))
            eventually(lambda: as_rendered(kube, namespace), 30)
            eventually(lambda: conditions(leader, namespace)["Accepted"] == "True")
            live = kube.get(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama"))["status"]["conditions"]
            assert conditions(leader, namespace) == {item["type"]: item["status"] for item in live}
            assert conditions(standby, namespace) == {}

            found = metrics(leader)
            assert found["securevllm_leader"] == 1
            assert found[f'securevllm_build_info{{version="{__version__}"}}'] == 1
            assert found['securevllm_reconcile_total{result="success"}'] >= 1
            assert found["securevllm_reconcile_duration_seconds_count"] >= 1
            assert found["securevllm_workqueue_adds_total"] >= 1
            assert found["securevllm_workqueue_depth"] == 0
            assert found['securevllm_api_requests_total{code="201",kind="Deployment",verb="apply"}'] >= 2
            assert found['securevllm_watch_last_event_timestamp_seconds{kind="SecureVLLMDeployment"}'] > 0
            assert found["process_resident_memory_bytes"] > 0

            of = f'{{name="llama",namespace="{namespace}"}}'
            assert 0 <= time.time() - found[f"securevllm_engine_key_created_timestamp_seconds{of}"] < 600
            days = (found[f"securevllm_gateway_certificate_expiration_timestamp_seconds{of}"] - time.time()) / 86400
            assert 89 < days < 91
            assert found[f"securevllm_foreign_policies_wider{of}"] == 0
            kube.create(everybody(namespace))
            eventually(lambda: metrics(leader)[f"securevllm_foreign_policies_wider{of}"] == 1)
            eventually(lambda: f" See {PAGES}/status.md#" in message(kube, namespace, "Isolated"))

            kube.delete(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama"))
            eventually(lambda: conditions(leader, namespace) == {})
            assert namespace not in leader.get("/metrics")[1]
        finally:
            assert standby.stop() == 0
        assert leader.stop() == 0


def message(kube: Kube, namespace: str, name: str) -> str:
    """The message of a condition."""
    live = kube.get(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama"))["status"]["conditions"]
    return next(str(item["message"]) for item in live if item["type"] == name)


def everybody(namespace: str) -> dict[str, Any]:
    """A NetworkPolicy of somebody who lets everybody in."""
    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "everybody", "namespace": namespace},
        "spec": {"podSelector": {}, "policyTypes": ["Ingress"], "ingress": [{}]},
    }


def conditions(operator: OperatorProcess, namespace: str) -> dict[str, str]:
    """Type to status of a resource's conditions; each has exactly one status."""
    found: dict[str, str] = {}
    for sample, value in metrics(operator).items():
        if sample.startswith("securevllm_resource_condition{") and f'namespace="{namespace}"' in sample and value == 1:
            labels = dict(re.findall(r'(\w+)="([^"]*)"', sample))
            assert labels["type"] not in found
            found[labels["type"]] = labels["status"]
    return found
