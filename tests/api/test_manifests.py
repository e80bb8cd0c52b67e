"""`manifests/` on a real API server: what the README tells people to apply is taken, without a warning."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster, running
from securevllm.context import Context
from securevllm.settings import Settings
from tests.api.kube import eventually

pytestmark = pytest.mark.cluster

ROOT = Path(__file__).parents[2]
MANIFESTS = ROOT / "manifests"
SAMPLES = sorted((MANIFESTS / "samples").glob("*.yaml"))
ACCOUNT = "system:serviceaccount:secure-vllm-operator:secure-vllm-operator"


@pytest.fixture(scope="module", params=["install", "install-namespaced"])
def installed(request: pytest.FixtureRequest) -> Iterator[tuple[str, Cluster]]:
    """A cluster of its own for each kind of installation: they use the same names."""
    with running() as cluster:
        kubectl(cluster, "create", "namespace", "llm")
        yield str(request.param), cluster


def kubectl(
    cluster: Cluster, *arguments: str, check: bool = True, stdin: str | None = None
) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "kubectl"), "--kubeconfig", str(cluster.kubeconfig), *arguments]
    done = subprocess.run(  # noqa: S603 - fixed
        command, input=stdin, capture_output=True, text=True, check=False, timeout=120
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def may(cluster: Cluster, verb: str, resource: str, namespace: str, *, subresource: str = "") -> bool:
    question = ["auth", "can-i", verb, resource, f"--subresource={subresource}", "-n", namespace, f"--as={ACCOUNT}"]
    answer = kubectl(cluster, *question, check=False).stdout.strip()
    assert answer in {"yes", "no"}
    return answer == "yes"


def test_one_command_installs(installed: tuple[str, Cluster]) -> None:
    variant, cluster = installed
    done = kubectl(cluster, "apply", "-k", str(MANIFESTS / variant))
    # The namespace warns about pods that are not restricted.
    assert "Warning" not in done.stderr, done.stderr
    again = kubectl(cluster, "apply", "-k", str(MANIFESTS / variant))
    assert {line.split()[-1] for line in again.stdout.splitlines()} <= {"unchanged", "configured"}


def test_samples_are_taken(installed: tuple[str, Cluster]) -> None:
    _, cluster = installed
    wait = ["wait", "--for=condition=Established", "crd/securevllmdeployments.securevllm.io", "--timeout=30s"]
    # kubectl ends with an error while a new definition has no conditions at all.
    eventually(lambda: kubectl(cluster, *wait, check=False).returncode == 0)
    for sample in SAMPLES:
        taken = kubectl(cluster, "apply", "--dry-run=server", "--validate=strict", "-n", "llm", "-f", str(sample))
        assert "Warning" not in taken.stderr, f"{sample.name}: {taken.stderr}"


def test_rights_end_where_the_installation_says(installed: tuple[str, Cluster]) -> None:
    variant, cluster = installed
    everywhere = variant == "install"
    assert may(cluster, "list", "secrets", "llm")
    assert may(cluster, "list", "secrets", "default") is everywhere
    assert may(cluster, "patch", "securevllmdeployments.securevllm.io", "llm", subresource="status")
    # The Lease: only its own, only at home.
    lease = Settings(namespace="", identity="", watch_namespace=None if everywhere else "llm").lease
    assert may(cluster, "update", f"leases.coordination.k8s.io/{lease}", "secure-vllm-operator")
    assert not may(cluster, "update", "leases.coordination.k8s.io/other", "secure-vllm-operator")
    assert not may(cluster, "update", f"leases.coordination.k8s.io/{lease}", "llm")
    for verb, resource, subresource in [
        ("patch", "securevllmdeployments.securevllm.io", ""),
        ("deletecollection", "pods", ""),
        ("delete", "persistentvolumeclaims", ""),
        ("create", "pods", "exec"),
        ("create", "serviceaccounts", "token"),
        ("create", "roles.rbac.authorization.k8s.io", ""),
        ("impersonate", "users", ""),
    ]:
        assert not may(cluster, verb, resource, "llm", subresource=subresource), f"{verb} {resource} {subresource}"


def test_admission_reserves_the_labels_where_the_installation_says(installed: tuple[str, Cluster]) -> None:
    variant, cluster = installed
    everywhere = variant == "install"
    kubectl(cluster, "apply", "--server-side", "-k", str(MANIFESTS / variant.replace("install", "admission")))
    eventually(lambda: not borrowed(cluster, "llm"), 30)
    assert borrowed(cluster, "default") is not everywhere


def borrowed(cluster: Cluster, namespace: str) -> bool:
    """Whether a pod may take a label by which the operator's policies trust pods; only asked, not made."""
    labelled = ["--labels=securevllm.io/resource=llama-00000000", "--image=example.com/image", "--dry-run=server"]
    done = kubectl(cluster, "run", "borrower", "-n", namespace, *labelled, check=False)
    assert done.returncode == 0 or "ValidatingAdmissionPolicy" in done.stderr, done.stderr
    return done.returncode == 0


INTO_A_POD = [
    *((verb, f"pods/{way}") for verb in ("get", "create") for way in ("exec", "attach", "portforward", "proxy")),
    *((verb, "services/proxy") for verb in ("get", "create")),
    *((verb, "pods/ephemeralcontainers") for verb in ("update", "patch")),
]
"""What goes past every NetworkPolicy; both verbs, because the older protocol of kubectl asks by GET."""
AROUND = [
    *((verb, "pods") for verb in ("create", "update", "patch", "delete")),
    *((verb, "deployments.apps") for verb in ("create", "patch", "delete")),
    *((verb, "jobs.batch") for verb in ("create", "patch")),
    *((verb, "networkpolicies.networking.k8s.io") for verb in ("create", "patch", "delete")),
    *((verb, "secrets") for verb in ("get", "list", "watch", "create", "patch")),
    ("patch", "configmaps"),
    ("create", "serviceaccounts/token"),
    ("impersonate", "serviceaccounts"),
    ("create", "rolebindings.rbac.authorization.k8s.io"),
    ("bind", "clusterroles.rbac.authorization.k8s.io"),
    ("patch", "securevllmdeployments.securevllm.io/status"),
]
"""Other ways to the same, or to the keys."""
NEEDED = [
    *((verb, "securevllmdeployments.securevllm.io") for verb in ("get", "list", "watch", "create", "patch", "delete")),
    ("patch", "securevllmdeployments.securevllm.io/scale"),
    *((verb, "pods") for verb in ("get", "list", "watch")),
    ("get", "pods/log"),
    ("list", "networkpolicies.networking.k8s.io"),
]
PEOPLE = ("--as=ana", "--as-group=llm-team", "--as-group=system:authenticated")
EDITORS = ("--as=ed", "--as-group=editors", "--as-group=system:authenticated")


def can(cluster: Cluster, person: tuple[str, ...], verb: str, resource: str, name: str = "") -> bool:
    """What the API server answers to a SelfSubjectAccessReview of that person in the namespace of the models."""
    kind, _, subresource = resource.partition("/")
    attributes = {"namespace": "llm", "verb": verb, "name": name, "subresource": subresource}
    attributes["resource"], _, attributes["group"] = kind.partition(".")
    review = {
        "apiVersion": "authorization.k8s.io/v1",
        "kind": "SelfSubjectAccessReview",
        "spec": {"resourceAttributes": attributes},
    }
    # Validation would list the definitions, which these people may not.
    command = ["create", *person, "--validate=false", "-f", "-", "-o", "json"]
    answered = json.loads(kubectl(cluster, *command, stdin=json.dumps(review)).stdout)
    return bool(answered["status"]["allowed"])


def test_people_of_a_namespace_change_resources_and_do_not_get_into_a_pod(installed: tuple[str, Cluster]) -> None:
    _, cluster = installed
    kubectl(cluster, "apply", "-k", str(MANIFESTS / "tenants"))
    kubectl(cluster, "create", "rolebinding", "editors", "-n", "llm", "--clusterrole=edit", "--group=editors")
    # Aggregation and the authorizer's caches take a moment.
    eventually(lambda: can(cluster, PEOPLE, *NEEDED[0]) and can(cluster, EDITORS, "create", "pods/exec"))
    refused = {asked: can(cluster, PEOPLE, *asked) for asked in INTO_A_POD + AROUND}
    assert [asked for asked, allowed in refused.items() if allowed] == []
    assert [asked for asked in NEEDED if not can(cluster, PEOPLE, *asked)] == []
    assert can(cluster, PEOPLE, "get", "secrets", "quickstart-client-keys")
    assert not can(cluster, PEOPLE, "get", "secrets", "quickstart-engine-key")
    # The control: the cluster's own role has what is held back here, and the same questions are answered with yes.
    for way in ("exec", "attach", "portforward", "proxy"):
        assert can(cluster, EDITORS, "create", f"pods/{way}"), way
    # And not only asked: refused before anybody looks whether there is such a pod.
    for way in ("exec", "attach", "portforward"):
        raw = ["create", "--raw", f"/api/v1/namespaces/llm/pods/llama-engine-0/{way}?command=id&ports=8000", "-f", "-"]
        done = kubectl(cluster, *raw, *PEOPLE, check=False, stdin="{}")
        assert "cannot create resource" in done.stderr, done.stderr


def test_the_pod_is_what_the_operator_expects(installed: tuple[str, Cluster]) -> None:
    variant, cluster = installed
    live = json.loads(
        kubectl(cluster, "-n", "secure-vllm-operator", "get", "deploy/secure-vllm-operator", "-o", "json").stdout
    )
    template = live["spec"]["template"]
    operator = Context().operator
    assert operator.pods is not None
    assert set(operator.pods.labels) <= set(template["metadata"]["labels"].items())
    container = template["spec"]["containers"][0]
    settings = Settings(namespace="", identity="")
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {
        "http": settings.http_port,
        "canary": Context().canary_port,
    }
    assert container["args"] == (["run"] if variant == "install" else ["run", "--namespace=llm"])
    fields = {
        item["name"]: item["valueFrom"]["fieldRef"]["fieldPath"] for item in container["env"] if "valueFrom" in item
    }
    assert fields == {
        "POD_NAME": "metadata.name",
        "POD_NAMESPACE": "metadata.namespace",
        "POD_IPS": "status.podIPs",
    }
    # Gates run the image that the operator runs.
    assert {"name": "SECUREVLLM_OPERATOR_IMAGE", "value": container["image"]} in container["env"]
    assert container["image"] == Context().operator_image
    namespace, name = Context().canary_service
    service = json.loads(kubectl(cluster, "-n", namespace, "get", f"service/{name}", "-o", "json").stdout)
    assert service["spec"]["clusterIP"] == "None"
    assert service["spec"]["selector"].items() <= template["metadata"]["labels"].items()
    assert [port["port"] for port in service["spec"]["ports"]] == [Context().canary_port]
