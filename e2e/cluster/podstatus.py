"""What a kubelet reports about a pod (core/v1 PodStatus), computed from what is known about its containers. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

WAITING = {"waiting": {"reason": "ContainerCreating"}}
INITIALIZING = {"waiting": {"reason": "PodInitializing"}}


@dataclass
class Container:
    """The state of one container.

    Attributes:
        spec: Container of the pod's spec.
        state: core/v1 ContainerState: one of waiting, running, terminated.
        last_state: The one before the last restart, or empty.
        started: Its startup probe succeeded, or it has none and runs.
        ready: It is started and its readiness probe succeeds, or it has none.
        restart_count: How often it was started again.
        container_id: Changes with each start.
    """

    spec: Mapping[str, Any]
    state: dict[str, Any] = field(default_factory=lambda: WAITING)
    last_state: dict[str, Any] = field(default_factory=dict)
    started: bool = False
    ready: bool = False
    restart_count: int = 0
    container_id: str = ""

    @property
    def exit_code(self) -> int | None:
        """Exit code when it has ended for good, otherwise None."""
        code: int | None = self.state.get("terminated", {}).get("exitCode")
        return code

    def status(self) -> dict[str, Any]:
        """Return the core/v1 ContainerStatus."""
        return {
            "name": self.spec["name"],
            "image": self.spec.get("image", ""),
            # There is no image; kubelet has to say something here.
            "imageID": f"hollow://{self.spec.get('image', '')}",
            "containerID": self.container_id,
            "state": self.state,
            "lastState": self.last_state,
            "started": self.started,
            "ready": self.ready,
            "restartCount": self.restart_count,
        }


def pod_status(
    *,
    ip: str,
    node_ip: str,
    start_time: str,
    now: str,
    init: Sequence[Container],
    containers: Sequence[Container],
    restart_policy: str,
    previous: Mapping[str, Any],
    closed_gates: Sequence[str] = (),
) -> dict[str, Any]:
    """Compute the status of a pod.

    Args:
        ip: Address of the pod.
        node_ip: Address of the node.
        start_time: When the node accepted the pod (RFC 3339).
        now: Time for conditions that change (RFC 3339).
        init: Init containers, in order.
        containers: Containers.
        restart_policy: `restartPolicy` of the pod's spec.
        previous: What this said last: conditions that did not change keep their time.
        closed_gates: Readiness gates that somebody else has not set to True.
    """
    initialized = all(container.exit_code == 0 for container in init)
    phase = _phase(initialized, containers, restart_policy, failed=_init_failed(init, restart_policy))
    done = phase in {"Succeeded", "Failed"}
    unready = [container.spec["name"] for container in containers if not container.ready]
    reason = "PodCompleted" if done else "ContainersNotReady"
    message = "" if done else f"containers with unready status: [{' '.join(unready)}]"
    running = ("True", "", "") if not unready and not done else ("False", reason, message)
    ready = running
    if running[0] == "True" and closed_gates:
        told = "; ".join(f'corresponding condition of pod readiness gate "{gate}" is not True' for gate in closed_gates)
        ready = ("False", "ReadinessGatesNotReady", told)
    uninitialized = [container.spec["name"] for container in init if container.exit_code != 0]
    wanted = {
        "PodScheduled": ("True", "", ""),
        "PodReadyToStartContainers": ("False" if done else "True", "", ""),
        "Initialized": ("True", "", "")
        if initialized
        else ("False", "ContainersNotInitialized", f"containers with incomplete status: [{' '.join(uninitialized)}]"),
        "ContainersReady": running,
        "Ready": ready,
    }
    before = {condition["type"]: condition for condition in previous.get("conditions", [])}
    conditions = []
    for kind, (status, why, text) in wanted.items():
        # Empty texts, because the status is merged by kind: an old reason would stay.
        condition = {"type": kind, "status": status, "lastTransitionTime": now, "reason": why, "message": text}
        old = before.get(kind)
        if old and old["status"] == status:
            condition["lastTransitionTime"] = old.get("lastTransitionTime", now)
        conditions.append(condition)
    return {
        "phase": phase,
        "conditions": conditions,
        "hostIP": node_ip,
        "hostIPs": [{"ip": node_ip}],
        "podIP": ip,
        "podIPs": [{"ip": ip}],
        "startTime": start_time,
        "initContainerStatuses": [container.status() for container in init],
        "containerStatuses": [container.status() for container in containers],
    }


def may_restart(restart_policy: str, exit_code: int) -> bool:
    """Tell whether a container that ended is started again."""
    return restart_policy == "Always" or (restart_policy == "OnFailure" and exit_code != 0)


def _init_failed(init: Sequence[Container], restart_policy: str) -> bool:
    return restart_policy == "Never" and any(container.exit_code not in {None, 0} for container in init)


def _phase(initialized: bool, containers: Sequence[Container], restart_policy: str, *, failed: bool) -> str:
    if failed:
        return "Failed"
    if not initialized or any("waiting" in item.state and not item.last_state for item in containers):
        return "Pending"
    codes = [container.exit_code for container in containers]
    if any(code is None or may_restart(restart_policy, code) for code in codes):
        return "Running"
    return "Failed" if any(codes) else "Succeeded"
