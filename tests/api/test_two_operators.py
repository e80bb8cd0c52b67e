"""Two installations over one namespace: each resource has one that cares for it, and the other writes nothing to it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.claims import REASON
from tests.api.audit import Audit, now
from tests.api.kube import Kube, eventually
from tests.api.operator_process import OperatorProcess, new_namespace, resource

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = pytest.mark.cluster

RBAC = "/apis/rbac.authorization.k8s.io/v1"
ACCOUNT = "operator"


@contextmanager
def home(kube: Kube, prefix: str) -> Iterator[str]:
    """A namespace with the service account of one more installation; the rules are those of ``manifests/rbac``."""
    with new_namespace(kube, prefix) as name:
        kube.create({"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": ACCOUNT, "namespace": name}})
        lease = {"apiGroups": ["coordination.k8s.io"], "resources": ["leases"], "verbs": ["create", "get", "update"]}
        role = {"metadata": {"name": "lease"}, "rules": [lease]}
        kube.request("POST", f"{RBAC}/namespaces/{name}/roles", role)
        subjects = [{"kind": "ServiceAccount", "name": ACCOUNT, "namespace": name}]
        api = "rbac.authorization.k8s.io"
        own = {"roleRef": {"apiGroup": api, "kind": "Role", "name": "lease"}, "subjects": subjects}
        kube.request("POST", f"{RBAC}/namespaces/{name}/rolebindings", {"metadata": {"name": "lease"}, **own})
        rules = {"roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": "secure-vllm-operator"}}
        binding = {"metadata": {"name": name}, **rules, "subjects": subjects}
        kube.request("POST", f"{RBAC}/clusterrolebindings", binding)
        try:
            yield name
        finally:
            kube.request("DELETE", f"{RBAC}/clusterrolebindings/{name}")


def operator(cluster: Cluster, kube: Kube, folder: Path, where: str, *arguments: str) -> OperatorProcess:
    options: dict[str, Any] = {"namespace": where, "account": ACCOUNT, "identity": where}
    return OperatorProcess(cluster, kube, folder / where, arguments=arguments, **options)


def user(where: str) -> str:
    return f"system:serviceaccount:{where}:{ACCOUNT}"


def marked(kube: Kube, ref: Ref) -> str:
    return str(kube.get(ref).get("status", {}).get("operator", ""))


def whole(kube: Kube, namespace: str, *names: str) -> bool:
    """Whether resources have what their clients and their repairs show; ``Kube.find`` gives None for what is not."""
    return all(
        kube.find(Ref(kind, namespace, f"{name}-{role}")) is not None
        for name in names
        for kind in (kinds.DEPLOYMENT, kinds.SERVICE)
        for role in ("engine", "gateway")
    )


def told(kube: Kube, namespace: str) -> list[KubeObject]:
    return [event for event in kube.list(kinds.EVENT, namespace) if event["reason"] == REASON]


@pytest.mark.slow
def test_a_second_operator_leaves_alone_what_the_first_cares_for_until_it_may_take_over(
    cluster: Cluster, kube: Kube, tmp_path: Path
) -> None:
    audit = Audit(cluster)
    with (
        new_namespace(kube, "shared") as namespace,
        home(kube, "first") as one,
        home(kube, "second") as two,
    ):
        # One-namespace beside cluster-wide would be this too: what differs is the installation, not the scope.
        first = operator(cluster, kube, tmp_path, one, f"--namespace={namespace}")
        mark, other = f"{one}/secure-vllm-operator-{namespace}", f"{two}/secure-vllm-operator-{namespace}"
        since = now()
        with first:
            ref = Ref.of(kube.create(resource(namespace)))
            eventually(lambda: whole(kube, namespace, "llama"), 60)
            assert marked(kube, ref) == mark
            service = Ref(kinds.SERVICE, namespace, "llama-engine")
            with operator(cluster, kube, tmp_path, two, f"--namespace={namespace}") as second:
                (event,) = eventually(lambda: told(kube, namespace), 30)
                assert f"--take-over={mark}" in event["note"]
                assert f"--take-over={mark}" in second.log
                # Drift is a reason for both to look; only one repairs.
                kube.delete(service)
                eventually(lambda: whole(kube, namespace, "llama"), 30)
                assert first.stop() == 0
                # The first is silent, and may only be slow: what is marked stays as it is.
                kube.delete(service)
                # Its look at something new, after that, is the moment at which nothing more is to come.
                new = Ref.of(kube.create(resource(namespace, "mine")))
                eventually(lambda: marked(kube, new) == other, 30)
                eventually(lambda: kube.find(Ref(kinds.DEPLOYMENT, namespace, "mine-engine")), 30)
                assert kube.find(service) is None
                assert second.stop() == 0
            written = audit.writes(since, user=user(two), namespace=namespace)
            assert {request.name for request in written if request.name.startswith("llama")} == set()
            assert [request.name for request in written if request.resource == "securevllmdeployments"][:1] == ["mine"]

        # The first is gone for good, and a person says so.
        with operator(cluster, kube, tmp_path, two, f"--namespace={namespace}", f"--take-over={mark}") as second:
            eventually(lambda: marked(kube, ref) == other, 30)
            eventually(lambda: whole(kube, namespace, "llama"), 30)
            # It was not: back again, it finds itself displaced.
            since = now()
            with first:
                eventually(lambda: f"--take-over={other}" in first.log, 30)
                kube.delete(service)
                eventually(lambda: whole(kube, namespace, "llama"), 30)
                assert first.stop() == 0
            assert {request.resource for request in audit.writes(since, user=user(one), namespace=namespace)} <= {
                "events"
            }
            assert second.stop() == 0


@pytest.mark.slow
def test_of_two_that_start_together_one_cares_for_each_resource(cluster: Cluster, kube: Kube, tmp_path: Path) -> None:
    names = [f"model{index}" for index in range(10)]
    with new_namespace(kube, "race") as namespace, home(kube, "left") as left, home(kube, "right") as right:
        since = now()
        with (
            operator(cluster, kube, tmp_path, left, f"--namespace={namespace}") as first,
            operator(cluster, kube, tmp_path, right, f"--namespace={namespace}") as second,
        ):
            for name in names:
                kube.create(resource(namespace, name))
            eventually(lambda: whole(kube, namespace, *names), 90)
            owners = {
                obj["metadata"]["name"]: obj["status"]["operator"]
                for obj in kube.list(kinds.SECURE_VLLM_DEPLOYMENT, namespace)
            }
            assert owners.keys() == set(names)
            assert (first.stop(), second.stop()) == (0, 0)
        for where in (left, right):
            mine = {name for name, owner in owners.items() if owner.startswith(f"{where}/")}
            written = Audit(cluster).writes(since, user=user(where), namespace=namespace)
            touched = {request.name.partition("-")[0] for request in written if request.resource != "events"}
            # The default-deny is the namespace's, and whoever comes first makes it.
            assert touched - {"", "securevllm"} == mine


def test_who_may_edit_resources_cannot_forge_the_mark(kube: Kube, namespace: str) -> None:
    def allowed(subresource: str) -> bool:
        attributes = {
            "namespace": namespace,
            "verb": "patch",
            "group": "securevllm.io",
            "resource": "securevllmdeployments",
            "subresource": subresource,
        }
        review = {
            "apiVersion": "authorization.k8s.io/v1",
            "kind": "SubjectAccessReview",
            "spec": {"user": "tenant", "resourceAttributes": attributes},
        }
        answer = kube.request("POST", "/apis/authorization.k8s.io/v1/subjectaccessreviews", review)
        return bool(answer["status"]["allowed"])

    api = "rbac.authorization.k8s.io"
    binding = {
        "metadata": {"name": "tenant"},
        "roleRef": {"apiGroup": api, "kind": "ClusterRole", "name": "admin"},
        "subjects": [{"apiGroup": api, "kind": "User", "name": "tenant"}],
    }
    kube.request("POST", f"{RBAC}/namespaces/{namespace}/rolebindings", binding)
    eventually(lambda: allowed(""), 30)
    assert not allowed("status")
