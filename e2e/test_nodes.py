"""The cluster that all others of these tests stand on: its policy engine enforces, and the quickstart serves on it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e import images
from e2e.reach import OPEN, SILENT
from e2e.workload import (
    ALLOW_INGRESS,
    PORT,
    apply,
    at,
    condition,
    pods_of,
    policy,
    reach_all,
    secret,
    start_pods,
    until,
    until_resource_ready,
)

if TYPE_CHECKING:
    from e2e.cluster.kubectl import Kubectl
    from e2e.workload import Cells, Pod

DENY = {"policyTypes": ["Ingress", "Egress"], "podSelector": {"matchLabels": {"app": "guarded"}}}


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
    ways: dict[Pod, list[str]] = {pod: [at(ip, PORT) for ip in guarded.ips] for pod in others}
    ways[guarded] = [at(ip, PORT) for pod in others for ip in pod.ips]

    def expect(answer: str) -> dict[Pod, dict[str, str]]:
        return {pod: dict.fromkeys(targets, answer) for pod, targets in ways.items()}

    cells.check("no policy", expect(OPEN))
    apply(kubectl, policy("deny", namespace, DENY))
    until(lambda: reach_all(ways) == expect(SILENT), "the policy is enforced", seconds=30)
    cells.check("denied", expect(SILENT))
    assert condition(kubectl.get(f"--namespace={namespace}", "pod", "guarded"), "Ready"), "kubelet's probes pass"
    kubectl("delete", f"--namespace={namespace}", "networkpolicy", "deny")
    until(lambda: reach_all(ways) == expect(OPEN), "the policy is gone", seconds=30)
    cells.check("policy deleted", expect(OPEN))


@pytest.mark.usefixtures("operator")
def test_quickstart_serves_through_its_gateway_and_nowhere_else(
    kubectl: Kubectl, namespace: str, pods: dict[str, Pod], cells: Cells
) -> None:
    sample = images.QUICKSTART.read_text(encoding="utf-8")
    name = yaml.safe_load(sample)["metadata"]["name"]
    kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=sample)

    until_resource_ready(kubectl, namespace, name)
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
    cells.check("attack", {attacker: dict.fromkeys(targets, SILENT) for attacker in attackers})
    entrance = {attacker: OPEN if attacker.namespace == namespace else SILENT for attacker in attackers}
    cells.check("entrance", {attacker: {f"{gateway}:8443": answer} for attacker, answer in entrance.items()})
    # Silence of something that never answers proves nothing: with a policy that opens it, everybody gets through.
    apply(kubectl, policy("open-everything", namespace, ALLOW_INGRESS))
    until(lambda: attackers[-1].reach(targets[:1]).popitem()[1] == OPEN, "the engine is open", seconds=30)
    cells.check("control: opened by a policy", {attacker: dict.fromkeys(targets, OPEN) for attacker in attackers})
    kubectl("delete", f"--namespace={namespace}", "networkpolicy", "open-everything")
    until(lambda: attackers[-1].reach(targets[:1]).popitem()[1] == SILENT, "the engine is shut again", seconds=30)
    cells.check("attack again", {attacker: dict.fromkeys(targets, SILENT) for attacker in attackers})


def _addresses(kubectl: Kubectl, namespace: str) -> tuple[str, str]:
    """Address of an engine's and of a gateway's pod."""

    def address(role: str) -> str:
        pods: list[dict[str, Any]] = pods_of(kubectl, namespace, role)
        return str(pods[0]["status"]["podIP"])

    return address("engine"), address("gateway")
