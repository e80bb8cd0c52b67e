"""The life of groups on a real API server, with its real StatefulSet controller; the hollow node runs the pods."""

from __future__ import annotations

import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.render.meta import EPOCH_LABEL, GROUP_LABEL, MEMBER_LABEL, TEMPLATE_LABEL, WHOLE_CONDITION
from tests.api.kube import eventually
from tests.api.operator_process import await_condition, resource

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.kube import Kube
    from tests.api.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

TWO_NODES = {"tensor": 2, "nodes": 2}


@dataclass(frozen=True)
class Pod:
    """A pod of a group."""

    uid: str
    pair: tuple[str, str]
    ready: bool
    gate: str | None
    raw: KubeObject = field(compare=False, repr=False)


def look(kube: Kube, namespace: str) -> dict[str, Pod]:
    """Pods of groups, by ``e0-1``: group and member."""
    found = {}
    for pod in kube.list(kinds.POD, namespace, GROUP_LABEL):
        labels = pod["metadata"]["labels"]
        conditions = {item["type"]: item["status"] for item in pod.get("status", {}).get("conditions", ())}
        found[f"{labels[GROUP_LABEL]}-{labels[MEMBER_LABEL]}"] = Pod(
            pod["metadata"]["uid"],
            (labels[TEMPLATE_LABEL], labels[EPOCH_LABEL]),
            conditions.get("Ready") == "True" and "deletionTimestamp" not in pod["metadata"],
            conditions.get(WHOLE_CONDITION),
            pod,
        )
    return found


def whole(pods: dict[str, Pod], *groups: str, size: int = 2) -> bool:
    """Whether exactly these groups are there, each with one pair, and every pod is ready."""
    members = {f"{group}-{rank}" for group in groups for rank in range(size)}
    pairs = {group: {pods[name].pair for name in pods if name.startswith(f"{group}-")} for group in groups}
    return pods.keys() == members and all(pod.ready for pod in pods.values()) and all(map(one, pairs.values()))


def one(items: set[Any]) -> bool:
    return len(items) == 1


def uids(pods: dict[str, Pod], group: str) -> set[str]:
    return {pod.uid for name, pod in pods.items() if name.startswith(f"{group}-")}


def svllm(namespace: str) -> Ref:
    return Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama")


def until_whole(kube: Kube, namespace: str, *groups: str, seconds: float = 40) -> dict[str, Pod]:
    """Wait for these groups; gives their pods."""

    def there() -> dict[str, Pod]:
        pods = look(kube, namespace)
        assert whole(pods, *groups), pods
        return pods

    return eventually(there, seconds, pause=0.2)


def events(kube: Kube, namespace: str, reason: str) -> list[str]:
    found = [item for item in kube.list(kinds.EVENT, namespace) if item.get("reason") == reason]
    return [item["note"] for item in sorted(found, key=lambda item: str(item["eventTime"]))]


def test_groups_start_one_after_the_other_and_a_late_member_is_waited_for(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    room = threading.Event()

    def fits(pod: KubeObject) -> bool:
        return room.is_set() or pod["metadata"]["name"] != "llama-e0-1-0"

    with hollow_node(cluster, namespace=namespace, fits=fits):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        found = await_condition(kube, svllm(namespace), "EnginesReady", "False", reason="Progressing")
        eventually(lambda: look(kube, namespace).keys() == {"e0-0", "e0-1"})
        first = look(kube, namespace)
        found = await_condition(kube, svllm(namespace), "EnginesReady", "False", reason="Progressing")
        assert "0 of 2 engines are ready" in found["message"]
        assert "e0" in found["message"]
        # The second looks for nodes only when the first has its own: each could take half of what both need.
        assert {obj["metadata"]["name"] for obj in kube.list(kinds.STATEFUL_SET, namespace)} == {
            "llama-e0-0",
            "llama-e0-1",
        }
        room.set()
        pods = until_whole(kube, namespace, "e0", "e1")
        assert uids(pods, "e0") == uids(first, "e0"), "a member that was late is no reason to start anew"
        assert {pod.gate for pod in pods.values()} == {"True"}
        await_condition(kube, svllm(namespace), "EnginesReady", "True")
        status = kube.get(svllm(namespace))["status"]
        assert (status["replicas"], status["readyReplicas"]) == (2, 2)
