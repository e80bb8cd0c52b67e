"""Helm, kustomize and Argo CD, each on an empty cluster, end in the same objects.

Argo CD itself is in test_argocd_itself.py, where it is built. Here is what it does with an Application of a chart, with
the parameters of the example: `helm template` (util/helm and reposerver of argo-cd), the namespace by `CreateNamespace`
and `managedNamespaceMetadata`, and a server-side apply. Its tracking annotation is its own and is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import pytest
import yaml

from e2e.cluster import Cluster, running
from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api.kube import Kube, Refused, eventually
from tests.chart.programs import KUBERNETES, MANIFESTS, NAME, ROOT, Helm, Object, key, without_labels
from tests.chart.test_kustomize import HELM_ONLY, documented

if TYPE_CHECKING:
    from tests.chart.programs import Key

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

APPLICATION = MANIFESTS / "argocd" / "examples" / "operator.yaml"
IMAGE = "registry.example.com/secure-vllm-operator"
_SERVER_METADATA = ("uid", "resourceVersion", "generation", "creationTimestamp", "managedFields")
_ALLOCATED = ("clusterIP", "clusterIPs")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # One of its own: it has to be empty.
    with running() as own:
        yield own


def test_the_three_ways_end_in_the_same_objects(cluster: Cluster, helm: Helm, tmp_path: Path) -> None:
    ways: dict[str, Callable[[Kube], list[Object]]] = {
        "helm": lambda _: by_helm(cluster, helm),
        "kustomize": lambda kube: applied(kube, documented(tmp_path)),
        "argo-cd": lambda kube: applied(kube, by_argo(helm, tmp_path)),
    }
    ends: dict[str, dict[Key, Object]] = {}
    with closing(Kube(cluster.kubeconfig)) as kube, hollow_node(cluster):
        for name, install in ways.items():
            objects = install(kube)
            eventually(lambda: ready(kube), 120)
            ends[name] = {key(obj): live(kube, obj) for obj in objects}
            assert len(ends[name]) >= 20
            remove(kube, objects)
    # Argo CD leaves Leases out by default, so its example does; the operator makes its own.
    lease = ("Lease", NAME, NAME)
    assert ends["kustomize"].keys() == ends["helm"].keys() == {*ends["argo-cd"], lease}
    for named, obj in ends["helm"].items():
        assert ends["kustomize"][named] == obj, named
        assert named == lease or ends["argo-cd"][named] == obj, named


# ----------------------------------------------------------------------------------------------------------- the ways


def by_helm(cluster: Cluster, helm: Helm) -> list[Object]:
    """As docs/install.md says; the label of the namespace is its third command."""
    where = ["--namespace", NAME, "--create-namespace", "--wait", "--timeout", "120s"]
    helm("install", NAME, str(CHART), *where, "--set", f"image.repository={IMAGE}", kubeconfig=cluster.kubeconfig)
    with closing(Kube(cluster.kubeconfig)) as kube:
        kube.patch(Ref(kinds.NAMESPACE, None, NAME), {"metadata": {"labels": RESTRICTED}})
    return [namespace(), *helm.template("--skip-tests", "--set", f"image.repository={IMAGE}")]


def by_argo(helm: Helm, folder: Path) -> list[Object]:
    """What the Application of the example makes."""
    spec = yaml.safe_load(APPLICATION.read_text(encoding="utf-8"))["spec"]
    source, destination, policy = spec["source"], spec["destination"], spec["syncPolicy"]
    assert {"CreateNamespace=true", "ServerSideApply=true"} <= {*policy["syncOptions"]}
    settings = folder / "argocd-values.yaml"
    settings.write_text(yaml.safe_dump(source["helm"]["valuesObject"]), encoding="utf-8")
    command = ["template", source["helm"]["releaseName"], str(ROOT / source["path"])]
    command += ["--namespace", destination["namespace"], "--values", str(settings), "--include-crds"]
    made = namespace(destination["namespace"], policy["managedNamespaceMetadata"]["labels"])
    printed = helm(*command, "--kube-version", KUBERNETES)
    return [made, *filter(None, yaml.safe_load_all(printed))]


RESTRICTED = {"pod-security.kubernetes.io/enforce": "restricted"}
CHART = ROOT / "charts" / "secure-vllm-operator"


def namespace(name: str = NAME, labels: dict[str, str] = RESTRICTED) -> Object:
    return {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": labels}}


# -------------------------------------------------------------------------------------------------------- the cluster


def applied(kube: Kube, objects: list[Object]) -> list[Object]:
    """Server-side apply, definitions and namespaces first."""
    for obj in sorted(objects, key=lambda obj: obj["kind"] not in {"Namespace", "CustomResourceDefinition"}):
        query = {"fieldManager": "gitops", "force": "true"}
        kube.request("PATCH", path(kube, obj), obj, query=query, content_type="application/apply-patch+yaml")
    return objects


def path(kube: Kube, obj: Object) -> str:
    """Of an object of any kind, by discovery."""
    api_version = obj["apiVersion"]
    root = f"/api/{api_version}" if "/" not in api_version else f"/apis/{api_version}"
    found = {item["kind"]: item for item in kube.request("GET", root)["resources"] if "/" not in item["name"]}
    resource = found[obj["kind"]]
    where = f"/namespaces/{obj['metadata']['namespace']}" if resource["namespaced"] else ""
    return f"{root}{where}/{resource['name']}/{obj['metadata']['name']}"


def live(kube: Kube, obj: Object) -> Object:
    """The object as the API server has it, without what differs from one apply to the next, and who made it."""
    found = kube.request("GET", path(kube, obj))
    found.pop("status", None)
    for name in _SERVER_METADATA:
        found["metadata"].pop(name, None)
    found["metadata"].get("annotations", {}).pop("deployment.kubernetes.io/revision", None)
    if found["kind"] == "Service":
        for name in _ALLOCATED:
            if found["spec"].get(name) not in ("None", ["None"]):
                found["spec"].pop(name, None)
    if found["kind"] == "Namespace":
        # kustomize labels it as its own; the one thing that isolates is the label of Pod Security.
        found["metadata"]["labels"] = {
            name: value for name, value in found["metadata"]["labels"].items() if name in RESTRICTED
        }
    return without_labels(found, [*HELM_ONLY, "meta.helm.sh/release-name", "meta.helm.sh/release-namespace"])


def ready(kube: Kube) -> bool:
    status: dict[str, Any] = kube.get(Ref(kinds.DEPLOYMENT, NAME, NAME)).get("status", {})
    return bool(status.get("readyReplicas", 0) == 2)


def remove(kube: Kube, objects: list[Object]) -> None:
    """Leave an empty cluster."""
    paths = [path(kube, obj) for obj in objects]
    for where in paths:
        if not gone(kube, where):
            kube.request("DELETE", where)
    eventually(lambda: all(gone(kube, where) for where in paths), 120, pause=0.5)


def gone(kube: Kube, where: str) -> bool:
    try:
        kube.request("GET", where)
    except Refused as refused:
        return refused.code == httpx.codes.NOT_FOUND
    return False
