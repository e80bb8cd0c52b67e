"""The restricted Pod Security Standard, one sentence of it a case."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.pod_security import violations

CONTAINER: dict[str, Any] = {
    "name": "main",
    "image": "main",
    "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
}
POD: dict[str, Any] = {
    "metadata": {"name": "pod"},
    "spec": {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [CONTAINER],
    },
}
C = ("spec", "containers", 0)
CS = (*C, "securityContext")
PS = ("spec", "securityContext")
Path = tuple[str | int, ...]

FORBIDDEN: list[tuple[str, Path, Any]] = [
    ("spec.hostNetwork", ("spec", "hostNetwork"), True),
    ("spec.hostPID", ("spec", "hostPID"), True),
    ("spec.hostIPC", ("spec", "hostIPC"), True),
    ("spec.volumes[0]", ("spec", "volumes"), [{"name": "v", "hostPath": {"path": "/"}}]),
    (
        "spec.volumes[1]",
        ("spec", "volumes"),
        [{"name": "v", "emptyDir": {}}, {"name": "n", "nfs": {"path": "/", "server": "s"}}],
    ),
    ("spec.securityContext.sysctls[0]", (*PS, "sysctls"), [{"name": "kernel.msgmax", "value": "1"}]),
    ("spec.securityContext.runAsUser", (*PS, "runAsUser"), 0),
    ("spec.securityContext.seccompProfile.type", (*PS, "seccompProfile"), {"type": "Unconfined"}),
    ("spec.securityContext.appArmorProfile.type", (*PS, "appArmorProfile"), {"type": "Unconfined"}),
    ("spec.securityContext.seLinuxOptions.type", (*PS, "seLinuxOptions"), {"type": "spc_t"}),
    ("spec.securityContext.windowsOptions.hostProcess", (*PS, "windowsOptions"), {"hostProcess": True}),
    ("spec.containers[0].securityContext.seLinuxOptions.user", (*CS, "seLinuxOptions"), {"user": "root"}),
    ("spec.containers[0].securityContext.seLinuxOptions.role", (*CS, "seLinuxOptions"), {"role": "root"}),
    ("spec.containers[0].securityContext.runAsUser", (*CS, "runAsUser"), 0),
    ("spec.containers[0].securityContext.runAsNonRoot", (*CS, "runAsNonRoot"), False),
    ("spec.containers[0].securityContext.privileged", (*CS, "privileged"), True),
    ("spec.containers[0].securityContext.allowPrivilegeEscalation", (*CS, "allowPrivilegeEscalation"), True),
    ("spec.containers[0].securityContext.allowPrivilegeEscalation", (*CS, "allowPrivilegeEscalation"), None),
    ("spec.containers[0].securityContext.seccompProfile.type", (*CS, "seccompProfile"), {"type": "Unconfined"}),
    ("spec.containers[0].securityContext.procMount", (*CS, "procMount"), "Unmasked"),
    ("spec.containers[0].securityContext.capabilities.drop", (*CS, "capabilities"), {"drop": ["NET_RAW"]}),
    ("spec.containers[0].securityContext.capabilities.drop", (*CS, "capabilities"), None),
    (
        "spec.containers[0].securityContext.capabilities.add",
        (*CS, "capabilities"),
        {"drop": ["ALL"], "add": ["SYS_NICE", "NET_BIND_SERVICE"]},
    ),
    ("spec.containers[0].ports[0].hostPort", (*C, "ports"), [{"containerPort": 1, "hostPort": 1}]),
    ("spec.containers[0].livenessProbe.httpGet.host", (*C, "livenessProbe"), {"httpGet": {"port": 1, "host": "h"}}),
    ("spec.containers[0].startupProbe.tcpSocket.host", (*C, "startupProbe"), {"tcpSocket": {"port": 1, "host": "h"}}),
    (
        "spec.containers[0].lifecycle.preStop.httpGet.host",
        (*C, "lifecycle"),
        {"preStop": {"httpGet": {"port": 1, "host": "h"}}},
    ),
    (
        "metadata.annotations.container.apparmor.security.beta.kubernetes.io/main",
        ("metadata", "annotations"),
        {"container.apparmor.security.beta.kubernetes.io/main": "unconfined"},
    ),
    (
        "spec.initContainers[0].securityContext.privileged",
        ("spec", "initContainers"),
        [{**CONTAINER, "securityContext": {**CONTAINER["securityContext"], "privileged": True}}],
    ),
]
ALLOWED: list[tuple[str, Path, Any]] = [
    ("nothing more", ("spec", "hostNetwork"), False),
    ("volumes", ("spec", "volumes"), [{"name": "a", "emptyDir": {}}, {"name": "b", "secret": {"secretName": "s"}}]),
    ("projected", ("spec", "volumes"), [{"name": "a", "projected": {"sources": []}}]),
    ("a safe sysctl", (*PS, "sysctls"), [{"name": "net.ipv4.tcp_rmem", "value": "1"}]),
    ("a user", (*CS, "runAsUser"), 2000),
    ("a localhost profile", (*CS, "seccompProfile"), {"type": "Localhost", "localhostProfile": "p.json"}),
    ("an SELinux type", (*CS, "seLinuxOptions"), {"type": "container_t"}),
    ("the default procMount", (*CS, "procMount"), "Default"),
    ("a low port", (*CS, "capabilities"), {"drop": ["ALL"], "add": ["NET_BIND_SERVICE"]}),
    ("a probe without host", (*C, "readinessProbe"), {"httpGet": {"path": "/", "port": 1}}),
    (
        "an AppArmor annotation",
        ("metadata", "annotations"),
        {"container.apparmor.security.beta.kubernetes.io/main": "localhost/p"},
    ),
]


def changed(path: Path, value: Any) -> dict[str, Any]:
    pod = copy.deepcopy(POD)
    node: Any = pod
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return pod


def test_the_smallest_restricted_pod_passes() -> None:
    assert violations(POD) == []


@pytest.mark.parametrize(
    ("where", "path", "value"), FORBIDDEN, ids=[f"{case[0]}-{i}" for i, case in enumerate(FORBIDDEN)]
)
def test_forbidden(where: str, path: Path, value: Any) -> None:
    found = violations(changed(path, value))
    assert [finding.split(": ")[0] for finding in found] == [where]


@pytest.mark.parametrize(("path", "value"), [case[1:] for case in ALLOWED], ids=[case[0] for case in ALLOWED])
def test_allowed(path: Path, value: Any) -> None:
    assert violations(changed(path, value)) == []


@pytest.mark.parametrize("field", ["runAsNonRoot", "seccompProfile"])
def test_what_the_pod_does_not_say_each_container_must(field: str) -> None:
    pod = copy.deepcopy(POD)
    value = pod["spec"]["securityContext"].pop(field)
    assert [finding for finding in violations(pod) if field in finding]
    pod["spec"]["containers"][0]["securityContext"][field] = value
    assert violations(pod) == []


def test_without_any_security_context_everything_required_is_missing() -> None:
    bare = {"spec": {"containers": [{"name": "main"}]}}
    missing = {
        finding.split(": ")[0].removeprefix("spec.containers[0].securityContext.") for finding in violations(bare)
    }
    assert missing == {"allowPrivilegeEscalation", "runAsNonRoot", "seccompProfile.type", "capabilities.drop"}
