"""The *restricted* Pod Security Standard, as the Kubernetes documentation states it, with all of *baseline*.

Written for Linux pods of this project: the relaxations for user namespaces (`hostUsers: false`) and for Windows are
left out, so this may only be stricter than the API server's own admission plugin.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

_VOLUMES = frozenset(
    {
        "configMap",
        "csi",
        "downwardAPI",
        "emptyDir",
        "ephemeral",
        "image",
        "persistentVolumeClaim",
        "projected",
        "secret",
    }
)
_SYSCTLS = frozenset(
    {
        "kernel.shm_rmid_forced",
        "net.ipv4.ip_local_port_range",
        "net.ipv4.ip_local_reserved_ports",
        "net.ipv4.ip_unprivileged_port_start",
        "net.ipv4.ping_group_range",
        "net.ipv4.tcp_fin_timeout",
        "net.ipv4.tcp_keepalive_intvl",
        "net.ipv4.tcp_keepalive_probes",
        "net.ipv4.tcp_keepalive_time",
        "net.ipv4.tcp_rmem",
        "net.ipv4.tcp_syncookies",
        "net.ipv4.tcp_wmem",
    }
)
_SELINUX_TYPES = frozenset({"", "container_engine_t", "container_init_t", "container_kvm_t", "container_t"})
_PROFILES = frozenset({"RuntimeDefault", "Localhost"})
_APPARMOR_ANNOTATION = "container.apparmor.security.beta.kubernetes.io/"


def violations(pod: Mapping[str, Any]) -> list[str]:
    """Give everything that the restricted standard forbids in a Pod or PodTemplateSpec, each with its path."""
    return [*_annotation_violations(pod.get("metadata") or {}), *_pod_violations(pod["spec"])]


def _annotation_violations(metadata: Mapping[str, Any]) -> Iterator[str]:
    for key, value in (metadata.get("annotations") or {}).items():
        allowed = value in {"", "runtime/default"} or value.startswith("localhost/")
        if key.startswith(_APPARMOR_ANNOTATION) and not allowed:
            yield f"metadata.annotations.{key}: {value!r} turns AppArmor off"


def _pod_violations(spec: Mapping[str, Any]) -> Iterator[str]:
    for field in ("hostNetwork", "hostPID", "hostIPC"):
        if spec.get(field):
            yield f"spec.{field}: must not be set"
    for index, volume in enumerate(spec.get("volumes") or ()):
        kinds = set(volume) - {"name"}
        if not kinds or not kinds <= _VOLUMES:
            yield f"spec.volumes[{index}]: {', '.join(sorted(kinds)) or 'nothing'} is not an allowed volume type"
    context = spec.get("securityContext") or {}
    for index, sysctl in enumerate(context.get("sysctls") or ()):
        if sysctl["name"] not in _SYSCTLS:
            yield f"spec.securityContext.sysctls[{index}]: {sysctl['name']} is not a safe sysctl"
    yield from _shared_violations(context, "spec.securityContext")
    for kind in ("initContainers", "containers", "ephemeralContainers"):
        for index, container in enumerate(spec.get(kind) or ()):
            yield from _container_violations(container, context, f"spec.{kind}[{index}]")


def _shared_violations(context: Mapping[str, Any], path: str) -> Iterator[str]:
    """Check what the pod's and a container's securityContext have in common."""
    if context.get("runAsUser") == 0:
        yield f"{path}.runAsUser: must not be 0"
    if context.get("runAsNonRoot") is False:
        yield f"{path}.runAsNonRoot: must not be false"
    seccomp = (context.get("seccompProfile") or {}).get("type")
    if seccomp is not None and seccomp not in _PROFILES:
        yield f"{path}.seccompProfile.type: {seccomp} is neither RuntimeDefault nor Localhost"
    apparmor = (context.get("appArmorProfile") or {}).get("type")
    if apparmor is not None and apparmor not in _PROFILES:
        yield f"{path}.appArmorProfile.type: {apparmor} is neither RuntimeDefault nor Localhost"
    selinux = context.get("seLinuxOptions") or {}
    if selinux.get("type", "") not in _SELINUX_TYPES:
        yield f"{path}.seLinuxOptions.type: {selinux['type']} is not an allowed type"
    for field in ("user", "role"):
        if selinux.get(field):
            yield f"{path}.seLinuxOptions.{field}: must not be set"
    if (context.get("windowsOptions") or {}).get("hostProcess"):
        yield f"{path}.windowsOptions.hostProcess: must not be true"


def _container_violations(container: Mapping[str, Any], pod: Mapping[str, Any], where: str) -> Iterator[str]:
    context = container.get("securityContext") or {}
    path = f"{where}.securityContext"
    yield from _shared_violations(context, path)
    if context.get("privileged"):
        yield f"{path}.privileged: must not be true"
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{path}.allowPrivilegeEscalation: must be false"
    if not (context.get("runAsNonRoot") or pod.get("runAsNonRoot")):
        yield f"{path}.runAsNonRoot: must be true here or in the pod"
    if not ((context.get("seccompProfile") or {}).get("type") or (pod.get("seccompProfile") or {}).get("type")):
        yield f"{path}.seccompProfile.type: must be set here or in the pod"
    if context.get("procMount") not in {None, "Default"}:
        yield f"{path}.procMount: must be Default"
    capabilities = context.get("capabilities") or {}
    if "ALL" not in (capabilities.get("drop") or ()):
        yield f"{path}.capabilities.drop: must include ALL"
    added = set(capabilities.get("add") or ()) - {"NET_BIND_SERVICE"}
    if added:
        yield f"{path}.capabilities.add: {', '.join(sorted(added))} must not be added"
    for index, port in enumerate(container.get("ports") or ()):
        if port.get("hostPort"):
            yield f"{where}.ports[{index}].hostPort: must not be set"
    yield from _handler_violations(container, where)


def _handler_violations(container: Mapping[str, Any], where: str) -> Iterator[str]:
    """Probes and hooks must not name a host: the node would send the request wherever it says."""
    handlers = {name: container.get(name) or {} for name in ("livenessProbe", "readinessProbe", "startupProbe")}
    lifecycle = container.get("lifecycle") or {}
    handlers |= {f"lifecycle.{name}": lifecycle.get(name) or {} for name in ("postStart", "preStop")}
    for name, handler in handlers.items():
        for action in ("httpGet", "tcpSocket"):
            if (handler.get(action) or {}).get("host"):
                yield f"{where}.{name}.{action}.host: must not be set"
