"""The checkers that other tests rely on say what a real API server says: policies and Pod Security.

The server runs the original code of both standards, so a checker that misread the documentation is found here.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from kubernetes import client, config

from tests.netpol import InvalidPolicyError
from tests.netpol.policies import compile_policy
from tests.pod_security import violations
from tests.unit.test_netpol_evaluator import CASES, INVALID, SPECS, policy
from tests.unit.test_pod_security import ALLOWED, FORBIDDEN, POD, changed

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = pytest.mark.cluster

NAMESPACE = "test-checkers"
EXAMPLES = settings(
    max_examples=200, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.fixture(scope="module")
def api(cluster: Cluster) -> Iterator[Any]:
    """Give a client, and a namespace that enforces the restricted standard."""
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as connected:  # type: ignore[no-untyped-call]
        core: Any = client.CoreV1Api(connected)
        if NAMESPACE not in {item.metadata.name for item in core.list_namespace().items}:
            labels = {"pod-security.kubernetes.io/enforce": "restricted"}
            core.create_namespace({"metadata": {"name": NAMESPACE, "labels": labels}})
            core.create_namespaced_service_account(NAMESPACE, {"metadata": {"name": "pods"}})
        yield connected


def refusal(call: Any, *arguments: Any) -> tuple[str, Any]:
    """Give the message of a refused dry run, or nothing and the object."""
    try:
        return "", call(*arguments, dry_run="All", field_validation="Strict")
    except client.ApiException as error:
        if error.status not in {400, 403, 422}:
            raise
        return json.loads(error.body or "")["message"], None


def create_policy(api: Any, manifest: dict[str, Any]) -> tuple[str, Any]:
    manifest = {**manifest, "metadata": {"name": manifest["metadata"]["name"]}}
    # Not the typed API: it validates by itself, and the question is what the server says.
    create = client.CustomObjectsApi(api).create_namespaced_custom_object
    return refusal(create, "networking.k8s.io", "v1", NAMESPACE, "networkpolicies", manifest)


@pytest.mark.parametrize("spec", [case[0] for case in INVALID], ids=[case[1] for case in INVALID])
def test_the_api_server_refuses_the_policies_that_the_evaluator_refuses(api: Any, spec: dict[str, Any]) -> None:
    message, _ = create_policy(api, policy(spec))
    assert message


def test_the_api_server_accepts_the_policies_of_every_case(api: Any) -> None:
    for sentence, specs, _ in CASES:
        for spec in specs:
            message, _ = create_policy(api, policy(spec))
            assert not message, sentence


@EXAMPLES
@given(SPECS)
def test_both_agree_on_what_is_valid_and_which_directions_a_policy_isolates(api: Any, spec: dict[str, Any]) -> None:
    message, stored = create_policy(api, policy(spec))
    try:
        compiled = compile_policy(policy(spec))
    except InvalidPolicyError:
        assert message
        return
    assert not message
    assert set(stored["spec"]["policyTypes"]) == set(compiled.rules)


def pod_of(template: dict[str, Any]) -> dict[str, Any]:
    spec = {**template["spec"], "serviceAccountName": "pods"}
    return {"metadata": {"name": "pod", **template.get("metadata", {})}, "spec": spec}


# Such pods break another rule of pods as well, and validation speaks before Pod Security does.
NEVER_VALID = {
    "spec.securityContext.windowsOptions.hostProcess",  # needs hostNetwork
    "spec.containers[0].securityContext.privileged",  # not beside allowPrivilegeEscalation: false
    "spec.initContainers[0].securityContext.privileged",
    "spec.containers[0].securityContext.procMount",  # needs hostUsers: false
}


@pytest.mark.parametrize(("where", "path", "value"), FORBIDDEN, ids=[case[0] for case in FORBIDDEN])
def test_the_api_server_forbids_what_the_checker_forbids(api: Any, where: str, path: Any, value: Any) -> None:
    pod = pod_of(changed(path, value))
    assert violations(pod)
    message, _ = refusal(client.CoreV1Api(api).create_namespaced_pod, NAMESPACE, pod)
    assert "violates PodSecurity" in message or where in NEVER_VALID, message or "accepted"
    assert message


@pytest.mark.parametrize(("path", "value"), [case[1:] for case in ALLOWED], ids=[case[0] for case in ALLOWED])
def test_the_api_server_allows_what_the_checker_allows(api: Any, path: Any, value: Any) -> None:
    message, _ = refusal(client.CoreV1Api(api).create_namespaced_pod, NAMESPACE, pod_of(changed(path, value)))
    assert not message


def test_the_smallest_restricted_pod_is_admitted(api: Any) -> None:
    assert not refusal(client.CoreV1Api(api).create_namespaced_pod, NAMESPACE, pod_of(POD))[0]
