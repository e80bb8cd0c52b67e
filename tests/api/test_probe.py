"""`securevllm probe` as a user with few rights runs it, and the version that engines say they are.

Pods of the hollow node have loopback addresses. Gateways are real Envoys, canary pods their real program; engines are
fake-vllm, or count as Ready and refuse, as one that is isolated would.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import ContainerStart, Launch, Outcome
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api.kube import eventually
from tests.api.lab import real_gateways
from tests.api.operator_process import ROOT, await_condition, new_namespace, resource, token

if TYPE_CHECKING:
    from tests.api.kube import Kube
    from tests.api.lab import Lab

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SHUT = "shut"
"""Engines of resources of this name count as Ready, and nothing listens."""
LIAR = "liar"
"""Engines of resources of this name are another version than their image's tag says."""


def run(start: ContainerStart) -> Launch | Outcome | None:
    name, labels = start.container["name"], start.pod["metadata"]["labels"]
    instance = labels.get("app.kubernetes.io/instance")
    if name == "canary":
        env = {**start.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "operator")}
        return Launch([sys.executable, "-m", "securevllm", *start.args], env)
    if instance == SHUT:
        return Outcome.HOLD
    decided = real_gateways()(start)
    if name == "vllm" and instance == LIAR and isinstance(decided, Launch):
        return replace(decided, env={**decided.env, "FAKE_VLLM_VERSION": "0.32.0"})
    return decided


@pytest.fixture(scope="module")
def served(lab: Lab) -> Iterator[str]:
    """A namespace with a hollow node, and an operator that makes no canary pods of its own."""
    with (
        new_namespace(lab.kube, "probed") as namespace,
        hollow_node(lab.cluster, run, namespace=namespace),
        lab.operator("probed"),
    ):
        yield namespace


@pytest.fixture(scope="module")
def user(lab: Lab, served: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Log in as somebody with the rights that the help names, in this namespace only."""
    return login(lab, served, tmp_path_factory.mktemp("user"), "prober", ["create", "list", "delete"])


def login(lab: Lab, namespace: str, folder: Path, account: str, verbs: list[str]) -> Path:
    metadata = {"name": account, "namespace": namespace}
    rules = [
        {"apiGroups": ["securevllm.io"], "resources": ["securevllmdeployments"], "verbs": ["get"]},
        {"apiGroups": [""], "resources": ["pods"], "verbs": verbs},
    ]
    role = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    subjects = [{"kind": "ServiceAccount", **metadata}]
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}"
    lab.kube.request("POST", f"/api/v1/namespaces/{namespace}/serviceaccounts", {"metadata": metadata})
    lab.kube.request("POST", f"{rbac}/roles", {"metadata": metadata, "rules": rules})
    body = {"metadata": metadata, "roleRef": role, "subjects": subjects}
    lab.kube.request("POST", f"{rbac}/rolebindings", body)
    return lab.cluster.kubeconfig_for_token(token(lab.kube, namespace=namespace, account=account), folder / "config")


def command(namespace: str, kubeconfig: Path, *arguments: str) -> list[str]:
    options = ("-n", namespace, "--kubeconfig", str(kubeconfig))
    return [sys.executable, "-m", "securevllm", "probe", *arguments, *options]


def probe(namespace: str, kubeconfig: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    words = command(namespace, kubeconfig, *arguments)
    return subprocess.run(words, capture_output=True, text=True, check=False, timeout=300, env=ENVIRONMENT)  # noqa: S603 - fixed


def measured(wanted: int, *arguments: Any) -> subprocess.CompletedProcess[str]:
    """Probe until the exit code is this: on a slow machine a canary pod may come too late, and nothing is measured."""
    for _ in range(5):
        done = probe(*arguments)
        if done.returncode == wanted:
            return done
        assert done.returncode == 2, done.stderr
        assert "did not get ready" in done.stdout, done.stdout
    raise AssertionError(done.stdout)


ENVIRONMENT = {"PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "operator")}


def create(kube: Kube, namespace: str, name: str, **spec: Any) -> Ref:
    ref = Ref.of(kube.create(resource(namespace, name, gateway={"replicas": 1}, **spec)))
    await_condition(kube, ref, "EnginesReady", "True", seconds=180)
    return ref


def canaries(kube: Kube, namespace: str) -> list[KubeObject]:
    return kube.list(kinds.POD, namespace, "app.kubernetes.io/component=canary")


def test_a_user_measures_and_reads_what_came_of_it(lab: Lab, served: str, user: Path) -> None:
    ref = create(lab.kube, served, SHUT)
    done = measured(0, served, user, SHUT, "--wait", "60")
    print(done.stderr, done.stdout)  # noqa: T201 - what a person would read
    assert "WHAT LISTENS" in done.stdout
    assert "vLLM's HTTP API  blocked" in done.stdout
    assert f"{served}/{SHUT}: ISOLATED (Measured, measured at" in done.stdout
    assert "trying 1 sockets from a canary pod of the same namespace" in done.stderr
    assert canaries(lab.kube, served) == []
    # The operator did not: it makes no canary pods here.
    told = probe(served, user, SHUT, "--status", "-o", "json")
    assert (told.returncode, json.loads(told.stdout)["isolated"]) == (2, "Unknown")
    lab.kube.delete(ref)


def test_an_engine_that_answers_is_told(lab: Lab, served: str, user: Path) -> None:
    """Nothing enforces policies on a hollow node, and this engine runs."""
    ref = create(lab.kube, served, "open")
    done = measured(1, served, user, "open", "-o", "json")
    told = json.loads(done.stdout)
    assert told["reason"] == "EngineReachable"
    assert {(row["socket"], row["result"]) for row in told["attempts"]} == {("api", "open")}
    assert canaries(lab.kube, served) == []
    lab.kube.delete(ref)


def test_missing_rights_are_named_and_nothing_is_made(lab: Lab, served: str, tmp_path: Path) -> None:
    ref = create(lab.kube, served, SHUT)
    reader = login(lab, served, tmp_path, "reader", ["list"])
    done = probe(served, reader, SHUT)
    assert (done.returncode, done.stdout) == (2, "")
    assert f"create, delete pods in namespace {served}" in done.stderr
    assert probe(served, reader, SHUT, "--status").returncode == 2
    assert canaries(lab.kube, served) == []
    lab.kube.delete(ref)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_leaves_no_pod(lab: Lab, served: str, user: Path, number: signal.Signals) -> None:
    ref = create(lab.kube, served, SHUT)
    words = command(served, user, SHUT)
    with subprocess.Popen(words, stderr=subprocess.PIPE, stdout=subprocess.PIPE, env=ENVIRONMENT) as process:  # noqa: S603 - fixed
        eventually(lambda: canaries(lab.kube, served), 120)
        process.send_signal(number)
        _, told = process.communicate(timeout=120)
    assert process.returncode == 130, told
    assert canaries(lab.kube, served) == []
    lab.kube.delete(ref)


def test_the_version_that_runs_is_asked_through_the_gateway(lab: Lab, served: str) -> None:
    kube = lab.kube
    honest, liar = create(kube, served, "honest"), create(kube, served, LIAR)
    ready = await_condition(kube, honest, "GatewayReady", "True", seconds=180)
    eventually(lambda: kube.get(honest)["status"]["runningVersion"] == "0.33.0", 60)
    assert "claimed by the image" not in condition_message(kube, honest), ready

    found = await_condition(kube, liar, "GatewayReady", "False", reason="VersionMismatch", seconds=180)
    assert "vLLM 0.32.0, and the image's tag says 0.33.0" in found["message"]
    status = kube.get(liar)["status"]
    assert (status["vllmVersion"], status["runningVersion"]) == ("0.33.0", "0.32.0")

    # Said in words: the routes are those of 0.33.0, whatever the image holds.
    accept = [{"risk": "vllmVersionBelowFloor", "why": "the test runs an old one"}]
    kube.patch(liar, {"spec": {"vllmVersion": {"assume": "0.33.0"}, "security": {"accept": accept}}})
    await_condition(kube, liar, "GatewayReady", "True", seconds=180)
    for ref in (honest, liar):
        kube.delete(ref)


def condition_message(kube: Kube, ref: Ref) -> str:
    return str(await_condition(kube, ref, "GatewayReady", "True", seconds=60)["message"])
