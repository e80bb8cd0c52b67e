"""GitOps on statuses that the operator really wrote: Argo CD's health, Flux's kstatus, and no drift."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api.kube import Kube, eventually
from tests.api.lab import real_gateways
from tests.api.operator_process import await_condition, quiet, resource, settled
from tests.argo import act, health, kstatus

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]

REGISTRATION = "/apis/admissionregistration.k8s.io/v1"


def until(kube: Kube, ref: Ref, argo: str, flux: str, seconds: float = 60.0) -> tuple[str, str]:
    """Wait for Argo CD's and Flux's view of a resource; gives the former with its message."""

    def there() -> tuple[str, str]:
        obj = kube.get(ref)
        found = health(obj)
        assert (found[0], kstatus(obj)) == (argo, flux), found
        return found

    return eventually(there, seconds)


def test_from_progressing_to_healthy_refused_and_suspended(cluster: Cluster, kube: Kube, namespace: str) -> None:
    # Nothing enforces policies on a hollow node, and the prober would say so.
    unproved = {"verification": {"mode": "Disabled"}}
    ref = Ref.of(kube.create(resource(namespace, engine={"terminationGracePeriod": "2s"}, security=unproved)))
    settled(kube, ref)
    # No node yet: nothing runs.
    until(kube, ref, "Progressing", "InProgress")
    with hollow_node(cluster, real_gateways(), namespace=namespace):
        assert "Clients find it at" in until(kube, ref, "Healthy", "Current", 90)[1]
        kube.patch(ref, {"spec": {"image": "vllm/vllm-openai:latest"}})
        assert "spec.image" in until(kube, ref, "Degraded", "Failed")[1]
        kube.patch(ref, {"spec": {"image": "vllm/vllm-openai:v0.33.0", "suspend": True}})
        until(kube, ref, "Suspended", "InProgress")


def test_what_was_made_this_moment_is_in_progress(kube: Kube, namespace: str) -> None:
    """The answer to the create is the object before any look of the operator: nobody may take it for complete."""
    made = kube.create(resource(namespace))
    assert made["status"] == {"observedGeneration": -1}
    assert (health(made)[0], kstatus(made)) == ("Progressing", "InProgress")


@pytest.fixture
def no_policies(kube: Kube, namespace: str) -> Any:
    """Give a namespace in which nobody can write NetworkPolicies."""
    name = f"no-policies-{namespace}"
    rules = {
        "apiGroups": ["networking.k8s.io"],
        "apiVersions": ["v1"],
        "operations": ["CREATE", "UPDATE"],
        "resources": ["networkpolicies"],
    }
    policy = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicy",
        "metadata": {"name": name},
        "spec": {
            "matchConstraints": {"resourceRules": [rules]},
            "validations": [{"expression": "false", "message": "not today"}],
        },
    }
    selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    binding = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": name},
        "spec": {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": selector},
        },
    }
    kube.request("POST", f"{REGISTRATION}/validatingadmissionpolicies", policy)
    kube.request("POST", f"{REGISTRATION}/validatingadmissionpolicybindings", binding)
    probe = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "probe", "namespace": namespace},
        "spec": {"podSelector": {}},
    }

    def enforced() -> bool:
        try:
            kube.request("POST", kinds.NETWORK_POLICY.path(namespace), probe, query={"dryRun": "All"})
        except AssertionError as refused:
            return "not today" in str(refused)
        return False

    eventually(enforced, 30)
    yield
    kube.request("DELETE", f"{REGISTRATION}/validatingadmissionpolicybindings/{name}")
    kube.request("DELETE", f"{REGISTRATION}/validatingadmissionpolicies/{name}")


def test_isolation_that_cannot_be_made_is_degraded(kube: Kube, namespace: str, no_policies: None) -> None:
    ref = Ref.of(kube.create(resource(namespace)))
    await_condition(kube, ref, "Isolated", "False", seconds=30)
    assert "not today" in until(kube, ref, "Degraded", "InProgress")[1]


def test_the_user_s_own_manifest_changes_nothing_after_reconcile(kube: Kube, namespace: str) -> None:
    """What `argocd app diff` and `flux diff` do: a server-side dry run, set against the live object."""
    manifest = resource(namespace, replicas=2, gateway={"replicas": 1}, engine={"args": ["--max-model-len=4096"]})
    ref = Ref.of(kube.apply(manifest, "gitops"))
    settled(kube, ref)
    live = quiet(kube, ref)
    again = kube.apply(manifest, "gitops", dry_run=True)
    assert written(again) == written(live)
    assert {entry["manager"] for entry in live["metadata"]["managedFields"] if not entry.get("subresource")} == {
        "gitops"
    }
    assert set(live["metadata"]) & {"annotations", "finalizers", "labels"} == set()


def written(obj: KubeObject) -> KubeObject:
    found = copy.deepcopy(obj)
    del found["metadata"]["managedFields"]
    return found


def test_the_restart_action_restarts_engines(kube: Kube, namespace: str) -> None:
    ref = Ref.of(kube.create(resource(namespace)))
    settled(kube, ref)
    engine = Ref(kinds.DEPLOYMENT, namespace, "llama-engine")
    before = kube.get(engine)["spec"]["template"]
    changed = act("restart", kube.get(ref))
    kube.patch(ref, {"metadata": {"annotations": changed["metadata"]["annotations"]}})
    eventually(lambda: kube.get(engine)["spec"]["template"] != before, 30)
