"""Argo CD itself follows docs/install.md, and then models in Git: what it says of them, and that it finds no drift."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import pytest
import yaml

from e2e.cluster import Cluster, running
from e2e.cluster.hollow import hollow_node
from securevllm import __version__
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.render.meta import DENY_NAME
from tests.api.argocd import APPLICATION, CONTROLLER, MARKS, NAMESPACE, TRACKING, ArgoCD, Repository, managed
from tests.api.audit import Audit, Request, now
from tests.api.children import children
from tests.api.kube import Kube, eventually
from tests.api.lab import real_gateways
from tests.api.operator_process import ROOT, OperatorProcess, quiet, resource
from tests.api.test_three_ways import by_helm, live, path, ready, remove
from tests.argo import argocd
from tests.chart.programs import KUBECTL, Helm, Object, without_labels

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

OPERATOR = "secure-vllm-operator"
"""The Application of the example."""
UNTRACKED = {"CustomResourceDefinition", "Namespace"}
"""Argo CD puts its annotation on no definition (reposerver/repository), nor on a namespace of CreateNamespace."""
PLATFORM = "https://git.example.com/platform/secure-vllm-operator.git"
MODELS = "https://git.example.com/ml/models.git"
"""What stands for repositories of the reader's in the examples."""


@dataclass(frozen=True)
class World:
    """A cluster that somebody runs with Argo CD.

    Attributes:
        cluster: its processes.
        kube: an administrator.
        argo: Argo CD.
        models: what the ApplicationSet of the example makes Applications of.
        by_helm: objects that an installation by helm left, before Argo CD came, by their paths.
        full: namespaces for whose pods there is no room.
    """

    cluster: Cluster
    kube: Kube
    argo: ArgoCD
    models: Repository
    by_helm: dict[str, Object]
    full: set[str]

    def commit(self, folder: str, **files: KubeObject | None) -> str:
        """Put manifests into a folder of models, or take them away; gives the revision."""
        texts = {
            f"models/{folder}/{name}.yaml": None if obj is None else yaml.safe_dump(obj) for name, obj in files.items()
        }
        return self.models.commit(texts)

    def folder(self, name: str, **files: KubeObject) -> None:
        """Begin a folder, and wait for its Application."""
        self.commit(name, **files)
        self.regenerated(name, there=True)

    def regenerated(self, name: str, *, there: bool) -> None:
        """Wait until the Application of a folder is there, or gone."""

        def seen() -> bool:
            # Again and again: one that was asked for during a look at the repository is done with that look.
            self.argo.regenerate("models")
            return (self.kube.find(application(f"model-{name}")) is not None) == there

        eventually(seen, 60, pause=1)

    def synced(self, folder: str, health: str, revision: str = "", name: str = "llama") -> str:
        """Wait until Argo CD has synced a folder and says this of its health, and of a model's; gives the message."""
        found = self.argo.synced(f"model-{folder}", revision, health)
        said = {item["name"]: item for item in managed(found, kinds.SECURE_VLLM_DEPLOYMENT.kind)}[name]
        assert (said["status"], said["health"]["status"]) == ("Synced", health)
        return str(said["health"]["message"])

    def writes(self, since: str, folder: str) -> list[Request]:
        """What Argo CD wrote to the namespace of a folder."""
        return Audit(self.cluster).writes(since, user=CONTROLLER, namespace=folder)


@pytest.fixture(scope="module")
def world(helm: Helm, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """Follow the page, word by word, with repositories of this machine."""
    argocd()
    folder = tmp_path_factory.mktemp("argo")
    checkout, models = Repository(folder / "checkout"), Repository(folder / "models")
    for part in ("charts", "crds", "manifests"):
        shutil.copytree(ROOT / part, checkout.folder / part)
    checkout.commit({}, tag=f"v{__version__}")
    models.commit({"models/first/llama.yaml": yaml.safe_dump(model())})
    for name, repository, url in (("operator", checkout, PLATFORM), ("models", models, MODELS)):
        file = checkout.folder / "manifests" / "argocd" / "examples" / f"{name}.yaml"
        text = file.read_text(encoding="utf-8")
        assert url in text
        file.write_text(text.replace(url, repository.url), encoding="utf-8")
    full: set[str] = set()
    with (
        running() as cluster,
        closing(Kube(cluster.kubeconfig)) as kube,
        hollow_node(cluster, real_gateways(), fits=lambda pod: pod["metadata"]["namespace"] not in full),
    ):
        objects = by_helm(cluster, helm)
        eventually(lambda: ready(kube), 120)
        left = {path(kube, obj): live(kube, obj) for obj in objects}
        remove(kube, objects)
        with ArgoCD(cluster, kube, helm, folder / "argocd") as argo:
            for command in documented():
                done = subprocess.run(  # noqa: S603 - the documentation's own text
                    [str(KUBECTL), "--kubeconfig", str(cluster.kubeconfig), *command.split()[1:]],
                    cwd=checkout.folder,
                    capture_output=True,
                    text=True,
                    check=False,
                )
                assert done.returncode == 0, f"{command}: {done.stderr}"
            argo.synced(OPERATOR, health="Healthy", seconds=120)
            with OperatorProcess(cluster, kube, folder / "operator") as operator:
                yield World(cluster, kube, argo, models, left, full)
                assert operator.stop() == 0
                assert '"level": "error"' not in operator.log


def application(name: str) -> Ref:
    return Ref(APPLICATION, NAMESPACE, name)


def documented() -> list[str]:
    """The commands of docs/install.md for Argo CD."""
    text = (ROOT / "docs" / "install.md").read_text(encoding="utf-8")
    found = re.search(r"^## Argo CD\n.*?^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert found
    commands = found[1].splitlines()
    assert all(command.startswith("kubectl apply ") for command in commands)
    return commands


def model(name: str = "llama", **spec: Any) -> KubeObject:
    """A manifest as it is in Git: the namespace is Argo CD's business."""
    # Nothing enforces policies on a hollow node, and the prober would say so.
    unproved = {"engine": {"terminationGracePeriod": "2s"}, "security": {"verification": {"mode": "Disabled"}}}
    found = resource("", name, **unproved | spec)
    del found["metadata"]["namespace"]
    return found


def test_it_ends_in_the_same_objects_as_helm(world: World) -> None:
    by_helm = dict(world.by_helm)
    # Argo CD leaves Leases out by default, so its example does; the operator makes its own.
    (lease,) = [where for where in by_helm if "/leases/" in where]
    del by_helm[lease]
    assert world.kube.request("GET", lease)["spec"]["holderIdentity"]
    for where, obj in by_helm.items():
        ended = live(world.kube, obj)
        tracked = ended["metadata"].get("annotations", {}).get(TRACKING, "")
        assert tracked.startswith(f"{OPERATOR}:") or obj["kind"] in UNTRACKED, where
        assert without_labels(ended, MARKS) == obj, where
    application = world.argo.synced(OPERATOR)
    assert "conditions" not in application["status"]  # no warning
    found = application["status"]["resources"]
    assert len(found) == len(by_helm) - 1  # the namespace is none of them
    assert all(item["status"] == "Synced" for item in found)


def test_a_model_that_was_in_git_before_the_operator_gets_there(world: World) -> None:
    assert "Clients find it at" in world.synced("first", "Healthy")


def test_health_follows_the_resource(world: World) -> None:
    world.full.add("journey")
    world.folder("journey", llama=model())
    world.synced("journey", "Progressing")
    world.full.discard("journey")
    assert "Clients find it at" in world.synced("journey", "Healthy")
    revision = world.commit("journey", llama=model(image="vllm/vllm-openai:latest"))
    assert "spec.image" in world.synced("journey", "Degraded", revision)
    revision = world.commit("journey", llama=model(suspend=True))
    world.synced("journey", "Suspended", revision)
    revision = world.commit("journey", llama=model())
    world.synced("journey", "Healthy", revision)


def test_there_is_no_drift_and_a_hand_s_change_is_undone(world: World) -> None:
    world.folder("drift", llama=model(replicas=2, gateway={"replicas": 1}))
    world.synced("drift", "Healthy")
    ref = Ref(kinds.SECURE_VLLM_DEPLOYMENT, "drift", "llama")
    quiet(world.kube, ref)
    before = world.kube.get(ref)
    since = now()
    for name in (OPERATOR, "model-drift") * 4:
        found = world.argo.refresh(name)
        assert found["status"]["sync"]["status"] == "Synced"
        assert "operation" not in found
        assert len(found["status"]["history"]) == 1
    for way in ([], ["--server-side-diff"]):
        for name in (OPERATOR, "model-drift"):
            assert world.argo.cli("app", "diff", name, *way) == ""
    assert world.writes(since, "drift") == world.writes(since, OPERATOR) == []
    assert world.kube.get(ref)["metadata"] == before["metadata"]
    world.kube.patch(ref, {"spec": {"replicas": 1}})
    eventually(lambda: world.kube.get(ref)["spec"]["replicas"] == 2, 60)
    world.synced("drift", "Healthy")


def test_a_change_reaches_the_children_and_prune_removes_them(world: World) -> None:
    world.folder("change", llama=model(), second=model("second"))
    world.synced("change", "Healthy")
    revision = world.commit("change", llama=model(replicas=2), second=None)
    world.synced("change", "Healthy", revision)
    assert world.kube.get(Ref(kinds.DEPLOYMENT, "change", "llama-engine"))["spec"]["replicas"] == 2
    eventually(lambda: names(world.kube, "change") == {"llama"}, 60)
    # The last folder's end is its Application's.
    world.commit("change", llama=None)
    world.regenerated("change", there=False)
    eventually(lambda: names(world.kube, "change") == set(), 60)


def names(kube: Kube, namespace: str) -> set[str]:
    """Models of a namespace, and those of which children are left."""
    resources = {obj["metadata"]["name"] for obj in kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace)}
    return resources | {ref.name.partition("-")[0] for ref in children(kube, namespace) if ref.name != DENY_NAME}


def test_actions_run_and_what_they_write_is_no_drift(world: World) -> None:
    world.folder("actions", llama=model())
    world.synced("actions", "Healthy")
    engine = Ref(kinds.DEPLOYMENT, "actions", "llama-engine")
    before = world.kube.get(engine)["spec"]["template"]
    what = ["--kind", kinds.SECURE_VLLM_DEPLOYMENT.kind, "--resource-name", "llama"]
    listed = world.argo.cli("app", "actions", "list", "model-actions", *what)
    assert set(re.findall(r"\b(restart|verify)\b", listed)) == {"restart", "verify"}
    world.argo.cli("app", "actions", "run", "model-actions", "restart", *what)
    world.argo.cli("app", "actions", "run", "model-actions", "verify", *what)
    eventually(lambda: world.kube.get(engine)["spec"]["template"] != before, 30)
    world.synced("actions", "Healthy")
    annotations = world.kube.get(Ref(kinds.SECURE_VLLM_DEPLOYMENT, "actions", "llama"))["metadata"]["annotations"]
    assert {"securevllm.io/restart-at", "securevllm.io/verify-at"} < {*annotations}


def test_children_show_in_the_tree(world: World) -> None:
    world.synced("first", "Healthy")
    tree = world.argo.cli("app", "get", "model-first", "--output", "tree")
    for kind in ("SecureVLLMDeployment", "NetworkPolicy", "Deployment", "ReplicaSet", "Pod", "Service", "Secret"):
        assert f"{kind}/" in tree
