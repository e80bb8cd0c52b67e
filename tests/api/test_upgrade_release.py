"""I11 from a release that was there: 0.1.0 as it was, today's, back, and again today's, with twenty models that run."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster import Cluster, running
from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api import older
from tests.api.audit import Audit, now
from tests.api.kube import Kube, eventually
from tests.api.operator_process import (
    INSTALL,
    OperatorProcess,
    await_condition,
    caught_up,
    install,
    new_namespace,
    resource,
)

if TYPE_CHECKING:
    from collections.abc import Iterator

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SECONDS = 600
"""Until something has gone through all models: a limit for a machine that others load, not a measurement."""

SPECS: dict[str, dict[str, Any]] = {
    "plain": {},
    "two": {"replicas": 2},
    "arguments": {"engine": {"args": ["--max-model-len=4096", "--enforce-eager"], "sharedMemory": "1Gi"}},
    "environment": {"engine": {"env": [{"name": "VLLM_LOGGING_LEVEL", "value": "INFO"}], "labels": {"team": "a"}}},
    "tensor": {"parallelism": {"tensor": 4}, "ports": {"api": 8080}},
    "own-tls": {"gateway": {"tls": {"secretName": "own"}}},
    "plain-http": {"gateway": {"tls": {"disabled": "TLS ends at the ingress"}}},
    "open": {
        "gateway": {"authentication": {"none": "I accept that anybody who reaches the gateway can use the model"}}
    },
    "routes": {"gateway": {"routes": {"profiles": ["chat", "embeddings"]}, "limits": {"requestBody": "1Mi"}}},
    "media": {"security": {"media": {"allowedDomains": ["images.example.com"]}}},
}
"""What 0.1.0 knew, each in a model of its own; the others are plain."""
COUNT = 20
CHANGED = "arguments"


@pytest.fixture(scope="module")
def first_release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return older.checkout(older.FIRST, tmp_path_factory.mktemp("first-release"))


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    # One of its own: the definition belongs to the whole cluster.
    with running() as own:
        yield own


def pods(kube: Kube, namespace: str) -> dict[str, str]:
    """Pods of ours by uid, that are not on their way out."""
    found = [item["metadata"] for item in kube.list(kinds.POD, namespace, "securevllm.io/resource")]
    return {metadata["uid"]: metadata["name"] for metadata in found if "deletionTimestamp" not in metadata}


def passwords(kube: Kube, namespace: str) -> dict[tuple[str, str], str]:
    """What clients and engines authenticate with: another value locks somebody out."""
    return {
        (secret["metadata"]["name"], name): value
        for secret in kube.list(kinds.SECRET, namespace)
        for name, value in secret["data"].items()
        # The gateways' file of keys is made of the others, and the prober has one since it measures.
        if not secret["metadata"]["name"].endswith("-gateway-auth") and name != "prober-key"
    }


def engines_ready(kube: Kube, namespace: str) -> bool:
    found = {
        obj["metadata"]["name"]: condition["message"]
        for obj in kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace)
        for condition in obj.get("status", {}).get("conditions", ())
        if condition["type"] == "EnginesReady" and condition["status"] != "True"
    }
    assert not found, found
    return True


def settle(process: OperatorProcess, cluster: Cluster, kube: Kube, namespace: str, since: str) -> None:
    """Wait until a new leader has looked at everything, writes nothing more, and says that engines are ready."""
    caught_up(process, Audit(cluster), since, COUNT)
    eventually(lambda: engines_ready(kube, namespace), SECONDS)


def outdated(kube: Kube, namespace: str) -> dict[str, list[str]]:
    found = kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace)
    return {obj["metadata"]["name"]: obj["status"]["outdated"] for obj in found}


def newer_status(kube: Kube, ref: Ref) -> None:
    """What a release after this one may have left in the status."""
    conditions = kube.get(ref)["status"]["conditions"]
    future = {**conditions[0], "type": "Attested", "reason": "SomeReason", "message": "of a later release"}
    kube.patch(ref, {"status": {"conditions": [*conditions, future]}}, subresource="status")


def test_twenty_models_of_the_first_release_keep_their_pods_through_upgrade_and_rollback(
    cluster: Cluster, first_release: Path, tmp_path: Path
) -> None:
    names = [*SPECS, *(f"model-{index}" for index in range(COUNT - len(SPECS)))]

    def old(term: str) -> OperatorProcess:
        source = first_release / "operator"
        return OperatorProcess(cluster, kube, tmp_path / term, identity=term, source=source, measures=False)

    def new(term: str) -> OperatorProcess:
        return OperatorProcess(cluster, kube, tmp_path / term, identity=term)

    with closing(Kube(cluster.kubeconfig)) as kube:
        install(kube, first_release / "manifests" / "install")
        with new_namespace(kube, "llm") as namespace, hollow_node(cluster, namespace=namespace):
            kube.create(tls(namespace))
            for name in names:
                kube.create(resource(namespace, name, **SPECS.get(name, {})))
            since = now()
            with old("old") as process:
                eventually(lambda: len(pods(kube, namespace)) >= 2 * COUNT, SECONDS, pause=0.5)
                settle(process, cluster, kube, namespace, since)
                assert process.stop() == 0
            before, secrets = pods(kube, namespace), passwords(kube, namespace)

            since = now()
            install(kube, INSTALL)
            with new("new") as process:
                settle(process, cluster, kube, namespace, since)
                assert pods(kube, namespace) == before
                assert passwords(kube, namespace).items() >= secrets.items()
                assert {name: "engine" in what for name, what in outdated(kube, namespace).items()} == dict.fromkeys(
                    names, True
                ), "the gate is new, and nobody has it yet"
                newer_status(kube, Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "plain"))
                assert process.stop() == 0

            since = now()
            install(kube, first_release / "manifests" / "install")
            with old("rolled-back") as process:
                settle(process, cluster, kube, namespace, since)
                assert pods(kube, namespace) == before
                assert passwords(kube, namespace).items() >= secrets.items()
                assert outdated(kube, namespace) == {name: [] for name in names}
                assert process.stop() == 0

            since = now()
            install(kube, INSTALL)
            with new("again") as process:
                settle(process, cluster, kube, namespace, since)
                assert pods(kube, namespace) == before
                # One spec changes: its own engine rolls, and has the gate then. The gateway is not concerned.
                ref = Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, CHANGED)
                kube.patch(ref, {"spec": {"engine": {"args": ["--max-model-len=2048"]}}})
                eventually(lambda: has_gate(kube, namespace, CHANGED), SECONDS)
                await_condition(kube, ref, "EnginesReady", "True", seconds=SECONDS)
                assert "engine" not in outdated(kube, namespace)[CHANGED]
                gone = {before[uid] for uid in before.keys() - pods(kube, namespace).keys()}
                assert len(gone) == 1
                assert {name.startswith(f"{CHANGED}-engine-") for name in gone} == {True}
                assert process.stop() == 0


def tls(namespace: str) -> KubeObject:
    metadata = {"name": "own", "namespace": namespace}
    data = {"tls.crt": "eA==", "tls.key": "eA=="}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "type": "kubernetes.io/tls", "data": data}


def has_gate(kube: Kube, namespace: str, name: str) -> bool:
    template = kube.get(Ref(kinds.DEPLOYMENT, namespace, f"{name}-engine"))["spec"]["template"]["spec"]
    return "gate" in {container["name"] for container in template.get("initContainers", ())}
