"""The cluster that all others of these tests stand on: its policy engine enforces, and the quickstart serves on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e import images
from e2e.reach import OPEN, SILENT
from e2e.workload import PORT, apply, condition, pods_of, policy, secret, start_pods, until

if TYPE_CHECKING:
    from e2e.cluster.kubectl import Kubectl
    from e2e.workload import Cells, Pod

DENY = {"policyTypes": ["Ingress", "Egress"], "podSelector": {"matchLabels": {"app": "guarded"}}}
ALLOW_INGRESS = {"policyTypes": ["Ingress"], "podSelector": {}, "ingress": [{}]}


@pytest.fixture
def pods(kubectl: Kubectl, nodes: list[str], namespace: str, other_namespace: str) -> dict[str, Pod]:
    """One pod that will be guarded, and others beside it, on the other node and in another namespace."""
    here, there = nodes
    wanted = [
        (namespace, "guarded", here),
        (namespace, "beside", here),
        (namespace, "across", there),
        (other_namespace, "foreign", here),
        (other_namespace, "foreign-across", there),
    ]
    return {pod.name: pod for pod in start_pods(kubectl, wanted)}


def test_default_deny_is_enforced_in_both_directions(
    kubectl: Kubectl, namespace: str, pods: dict[str, Pod], cells: Cells
) -> None:
    guarded = pods["guarded"]
    others = [pod for pod in pods.values() if pod is not guarded]
    outward = [f"{pod.ip}:{PORT}" for pod in others]

    def look(scene: str, expected: str) -> None:
        for pod in others:
            target = f"{guarded.ip}:{PORT}"
            cells.check(scene, pod.name, {target: expected}, pod.reach([target]))
        cells.check(scene, guarded.name, dict.fromkeys(outward, expected), guarded.reach(outward))

    def blocked() -> bool:
        return set(guarded.reach(outward).values()) == {SILENT} and all(
            pod.reach([f"{guarded.ip}:{PORT}"]).popitem()[1] == SILENT for pod in others
        )

    look("no policy", OPEN)
    apply(kubectl, policy("deny", namespace, DENY))
    until(blocked, "the policy is enforced", seconds=30)
    look("denied", SILENT)
    assert condition(kubectl.get(f"--namespace={namespace}", "pod", "guarded"), "Ready"), "kubelet's probes pass"
    kubectl("delete", f"--namespace={namespace}", "networkpolicy", "deny")
    until(lambda: set(guarded.reach(outward).values()) == {OPEN}, "the policy is gone", seconds=30)
    look("policy deleted", OPEN)


@pytest.mark.usefixtures("operator")
def test_quickstart_serves_through_its_gateway_and_nowhere_else(
    kubectl: Kubectl, namespace: str, pods: dict[str, Pod], cells: Cells
) -> None:
    sample = images.QUICKSTART.read_text(encoding="utf-8")
    name = yaml.safe_load(sample)["metadata"]["name"]
    kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=sample)

    def ready() -> bool | None:
        return condition(kubectl.get(f"--namespace={namespace}", "securevllmdeployment", name), "Ready")

    until(ready, f"{name} is Ready", seconds=240)
    client = pods["beside"]
    url = f"https://{name}-gateway.{namespace}.svc"
    authority = secret(kubectl, namespace, f"{name}-gateway-tls")["ca.crt"]
    key = next(iter(secret(kubectl, namespace, f"{name}-client-keys").values()))

    def ask(path: str, bearer: str | None) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        body = {"messages": [{"role": "user", "content": "hi"}]}
        return client.request(f"{url}{path}", authority, method="POST", headers=headers, body=body)

    status, answer = ask("/v1/chat/completions", key)
    assert (status, "Hello from behind the gateway." in answer) == (200, True), answer
    assert ask("/v1/chat/completions", None)[0] == 401
    assert ask("/v1/chat/completions", "not-the-key-that-was-made")[0] == 401
    assert ask("/invocations", key)[0] == 403

    engine, gateway = _addresses(kubectl, namespace)
    attackers = list(pods.values())
    targets = [f"{engine}:8000", f"{name}-engine.{namespace}.svc:8000"]
    for attacker in attackers:
        cells.check("attack", attacker.name, dict.fromkeys(targets, SILENT), attacker.reach(targets))
    entrance = f"{gateway}:8443"
    for attacker in attackers:
        expected = OPEN if attacker.namespace == namespace else SILENT
        cells.check("entrance", attacker.name, {entrance: expected}, attacker.reach([entrance]))
    # Silence of something that never answers proves nothing: with a policy that opens it, everybody gets through.
    apply(kubectl, policy("open-everything", namespace, ALLOW_INGRESS))
    until(lambda: attackers[-1].reach(targets[:1]).popitem()[1] == OPEN, "the engine is open", seconds=30)
    for attacker in attackers:
        cells.check("control: opened", attacker.name, dict.fromkeys(targets, OPEN), attacker.reach(targets))
    kubectl("delete", f"--namespace={namespace}", "networkpolicy", "open-everything")
    until(lambda: attackers[-1].reach(targets[:1]).popitem()[1] == SILENT, "the engine is shut again", seconds=30)


def _addresses(kubectl: Kubectl, namespace: str) -> tuple[str, str]:
    """Address of an engine's and of a gateway's pod."""

    def address(role: str) -> str:
        pods: list[dict[str, Any]] = pods_of(kubectl, namespace, role)
        return str(pods[0]["status"]["podIP"])

    return address("engine"), address("gateway")
