"""GitOps on statuses that the operator really wrote: Argo CD's health, Flux's kstatus, and no drift."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api.kube import Kube, Refused, eventually
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


FLUX = yaml.safe_load(
    (Path(__file__).parents[2] / "docs" / "gitops.md")
    .read_text(encoding="utf-8")
    .partition("```yaml\nhealthCheckExprs:\n")[2]
    .partition("```")[0]
)[0]
"""What the page tells people to write into a Kustomization of Flux."""


@pytest.fixture
def flux(kube: Kube, namespace: str) -> Iterator[Callable[[KubeObject], str]]:
    """Flux's health of a status, by the API server's own CEL: admission policies whose expressions are the page's."""
    names = {part: f"flux-{part}-{namespace}" for part in ("current", "failed")}
    selector = {"matchLabels": {"kubernetes.io/metadata.name": namespace}}
    rules = {"apiGroups": ["securevllm.io"], "apiVersions": ["v1alpha1"], "operations": ["UPDATE"]}
    for part, name in names.items():
        # Flux gives the top level of the object as variables, an admission policy below `object`.
        expression = re.sub(r"(?<![.\w])(status|metadata)\.", r"object.\1.", FLUX[part])
        metadata = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": name}}
        matched = {"resourceRules": [{**rules, "resources": ["securevllmdeployments/status"]}]}
        validation = {"expression": f"!({expression})", "message": f"flux: {part}"}
        spec: KubeObject = {"matchConstraints": matched, "validations": [validation]}
        policy = {**metadata, "kind": "ValidatingAdmissionPolicy", "spec": spec}
        kube.request("POST", f"{REGISTRATION}/validatingadmissionpolicies", policy)
        spec = {
            "policyName": name,
            "validationActions": ["Deny"],
            "matchResources": {"namespaceSelector": selector},
        }
        binding = {**metadata, "kind": "ValidatingAdmissionPolicyBinding", "spec": spec}
        kube.request("POST", f"{REGISTRATION}/validatingadmissionpolicybindings", binding)

    def told(obj: KubeObject) -> str:
        path = f"{Ref.of(obj).path()}/status"
        body = {"status": obj["status"]}
        try:
            kube.request("PATCH", path, body, query={"dryRun": "All"}, content_type="application/merge-patch+json")
        except Refused as refused:
            found = re.search(r"flux: (\w+)", str(refused))
            if found is None:
                raise
            return found[1]
        return "inProgress"

    yield told
    for name in names.values():
        kube.request("DELETE", f"{REGISTRATION}/validatingadmissionpolicybindings/{name}")
        kube.request("DELETE", f"{REGISTRATION}/validatingadmissionpolicies/{name}")


def test_the_expressions_for_flux_say_what_is_well(
    kube: Kube, namespace: str, flux: Callable[[KubeObject], str]
) -> None:
    made = kube.create(resource(namespace))

    def status(ready: str, reason: str, stalled: str = "False", generation: int = 1) -> KubeObject:
        common = {"message": "x", "lastTransitionTime": "2026-01-01T00:00:00Z"}
        conditions = [
            {"type": "Ready", "status": ready, "reason": reason, **common},
            {"type": "Stalled", "status": stalled, "reason": "InvalidSpec", **common},
        ]
        return made | {"status": {"observedGeneration": generation, "conditions": conditions}}

    # A policy needs a moment until the API server asks it.
    eventually(lambda: flux(status("True", "AllReady")) == "current", 60)
    eventually(lambda: flux(status("False", "InvalidSpec", "True")) == "failed", 60)
    assert flux(status("False", "Suspended")) == "current"
    assert flux(status("False", "ScaledToZero")) == "current"
    assert flux(status("False", "Progressing")) == "inProgress"
    assert flux(status("False", "Suspended", generation=0)) == "inProgress"


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
