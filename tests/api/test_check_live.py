"""`securevllm check --namespace` on a real API server: what is there is told, and what may not be read is said."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import yaml
from click.testing import CliRunner, Result

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from securevllm.cli import main
from tests.api.kube import eventually
from tests.api.operator_process import resource, token

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.kube import Kube

pytestmark = pytest.mark.cluster

PUBLISHED = Path(__file__).parents[1] / "unit" / "published" / "production-stack.yaml"


def check(cluster: Cluster, namespace: str, *more: str) -> Result:
    return CliRunner().invoke(main, ["check", "--namespace", namespace, "--kubeconfig", str(cluster.kubeconfig), *more])


def test_a_live_namespace_is_told(cluster: Cluster, kube: Kube, namespace: str) -> None:
    for obj in yaml.safe_load_all(PUBLISHED.read_text(encoding="utf-8")):
        obj["metadata"]["namespace"] = namespace
        kube.apply(obj)
    kube.apply(resource(namespace, "llama"))
    result = check(cluster, namespace, "-o", "json")
    assert result.exit_code == 1, result.output
    told = json.loads(result.stdout)
    # The controllers have made ReplicaSets and pods meanwhile: the Deployment is told once.
    assert [(item["kind"], item["name"]) for item in told["workloads"]] == [
        ("Deployment", "stack-llama3-deployment-vllm")
    ]
    assert told["workloads"][0]["published"][0]["outside"] is True
    assert [item["name"] for item in told["resources"]] == ["llama"]
    assert {finding["code"] for finding in told["findings"]} >= {"AdmissionMissing"}
    assert told["errors"] == []


def test_an_empty_namespace_has_nothing(cluster: Cluster, kube: Kube, namespace: str) -> None:
    result = check(cluster, namespace)
    assert result.exit_code == 0, result.output
    assert "with vLLM: 0" in result.stdout


def test_what_may_not_be_read_is_said_and_the_rest_is_told(
    cluster: Cluster, kube: Kube, namespace: str, tmp_path: Path
) -> None:
    kube.apply(resource(namespace, "llama"))
    # A controller makes it, a moment after the namespace.
    eventually(lambda: kube.find(Ref(kinds.SERVICE_ACCOUNT, namespace, "default")) is not None)
    powerless = cluster.kubeconfig_for_token(token(kube, namespace=namespace, account="default"), tmp_path / "config")
    result = CliRunner().invoke(main, ["check", "--namespace", namespace, "--kubeconfig", str(powerless)])
    assert result.exit_code == 2
    assert f"deployments.apps of namespace {namespace}: may not be read" in result.stderr
    assert "with vLLM: 0" in result.stdout


def test_a_server_that_is_away_is_named(cluster: Cluster, tmp_path: Path) -> None:
    config = yaml.safe_load(cluster.kubeconfig.read_text(encoding="utf-8"))
    for entry in config["clusters"]:
        entry["cluster"]["server"] = "https://127.0.0.1:1"
    path = tmp_path / "config"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    result = CliRunner().invoke(main, ["check", "--namespace", "x", "--kubeconfig", str(path)])
    assert result.exit_code == 2
    assert result.stdout == ""
    assert "securevllm: " in result.stderr
