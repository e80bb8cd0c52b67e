"""The life of groups on a real API server, with its real StatefulSet controller; the hollow node runs the pods."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import pytest

from e2e.cluster.daemon import pid_file
from e2e.cluster.hollow import hollow_node
from e2e.cluster.lifecycle import processes_folder
from e2e.cluster.runners import ContainerStart, Launch
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.render.meta import (
    EPOCH_LABEL,
    GROUP_LABEL,
    MEMBER_LABEL,
    RESTART_ANNOTATION,
    TEMPLATE_LABEL,
    WHOLE_CONDITION,
)
from tests.api.audit import now
from tests.api.kube import Refused, eventually
from tests.api.operator_process import USER, await_condition, new_namespace, resource

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.kube import Kube
    from tests.api.lab import Lab
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


def described(kube: Kube, namespace: str, pods: dict[str, Pod]) -> str:
    """What a failure has to say: the pods, and what the operator makes of them."""
    lines = []
    for name, pod in sorted(pods.items()):
        metadata, status = pod.raw["metadata"], pod.raw.get("status", {})
        states = {item["name"]: item["state"] for item in status.get("containerStatuses", ())}
        lines.append(
            f"{name} {pod.pair} {status.get('phase')} on {pod.raw['spec'].get('nodeName')}, ready {pod.ready},"
            f" gate {pod.gate}, deleted {metadata.get('deletionTimestamp')}, {states}"
        )
    conditions = kube.get(svllm(namespace)).get("status", {}).get("conditions", ())
    lines += [f"{item['type']} {item['status']}: {item['message']}" for item in conditions if "Ready" in item["type"]]
    return "\n".join(lines)


def uids(pods: dict[str, Pod], group: str) -> set[str]:
    return {pod.uid for name, pod in pods.items() if name.startswith(f"{group}-")}


def svllm(namespace: str) -> Ref:
    return Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama")


def until_whole(kube: Kube, namespace: str, *groups: str, seconds: float = 40) -> dict[str, Pod]:
    """Wait for these groups; gives their pods."""

    def there() -> dict[str, Pod]:
        pods = look(kube, namespace)
        assert whole(pods, *groups), described(kube, namespace, pods)
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


# -------------------------------------------------------------------------------------------------- what ends a group


def restarted_as_one(kube: Kube, namespace: str, before: dict[str, Pod], why: str) -> dict[str, Pod]:
    """Wait until e0 started anew and e1 was left alone; gives the pods."""

    def there() -> dict[str, Pod]:
        pods = look(kube, namespace)
        assert whole(pods, "e0", "e1"), described(kube, namespace, pods)
        assert not uids(pods, "e0") & uids(before, "e0"), "no pod of the broken world is left"
        return pods

    after = eventually(there, 40, pause=0.2)
    assert uids(after, "e1") == uids(before, "e1"), "the other group was not touched"
    assert int(after["e0-0"].pair[1]) == int(before["e0-0"].pair[1]) + 1
    assert after["e0-0"].pair[0] == before["e0-0"].pair[0]
    told = events(kube, namespace, "GroupRestarted")
    assert why in told[-1], told
    await_condition(kube, svllm(namespace), "EnginesReady", "True")
    return after


def test_a_pod_that_is_lost_takes_its_group_along_and_no_other(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        before = until_whole(kube, namespace, "e0", "e1")
        kube.delete(Ref(kinds.POD, namespace, "llama-e0-1-0"))
        after = restarted_as_one(kube, namespace, before, "e0 starts anew (epoch 1): ")
        assert {pod.pair[1] for name, pod in after.items() if name.startswith("e1")} == {"0"}


@pytest.mark.parametrize("disrupted", ["evicted-by-the-api", "failed-on-its-node"])
def test_eviction_and_failure_of_a_pod_are_the_end_of_its_group(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str, disrupted: str
) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        before = until_whole(kube, namespace, "e0", "e1")
        pod = Ref(kinds.POD, namespace, "llama-e0-1-0")
        if disrupted == "evicted-by-the-api":
            evict(kube, namespace, pod.name)
            restarted_as_one(kube, namespace, before, "e0 starts anew")
        else:
            status = {"phase": "Failed", "reason": "Evicted", "message": "The node was low on resource: memory."}
            kube.patch(pod, {"status": status}, subresource="status")
            restarted_as_one(kube, namespace, before, "e0 starts anew")


def evict(kube: Kube, namespace: str, name: str) -> None:
    """What kubectl drain asks for each pod."""
    body = {"apiVersion": "policy/v1", "kind": "Eviction", "metadata": {"name": name, "namespace": namespace}}
    kube.request("POST", f"/api/v1/namespaces/{namespace}/pods/{name}/eviction", body)


def drained(kube: Kube, namespace: str, name: str) -> bool:
    """Evict a pod; refused, it is told with the pod's conditions.

    Also a pod that may go is refused (429, "still being processed") when its status is written at that moment: the API
    server deletes an unready pod only at the resourceVersion at which it saw it (eviction.go, AlwaysAllow). Drains ask
    again, and so do the tests.
    """
    try:
        evict(kube, namespace, name)
    except Refused as refused:
        pod = kube.get(Ref(kinds.POD, namespace, name))
        raise AssertionError(f"{refused}; {pod['metadata'].get('deletionTimestamp')} {pod['status']}") from refused
    return True


def sleeping(start: ContainerStart) -> Launch | None:
    """Engines are processes: a head that answers its probes, others that sleep."""
    if start.container["name"] != "vllm":
        return None
    if "--headless" in start.args:
        return Launch([sys.executable, "-c", "import time; time.sleep(10_000)"], {})
    program = (
        "import http.server as h, sys\n"
        "class A(h.BaseHTTPRequestHandler):\n"
        "    def do_GET(self): self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *_): pass\n"
        "h.ThreadingHTTPServer((sys.argv[1], 8000), A).serve_forever()\n"
    )
    return Launch([sys.executable, "-c", program, start.ip], {})


def kill_engine(cluster: Cluster, pod: Pod) -> None:
    recorded = json.loads(pid_file(processes_folder(cluster.folder), f"{pod.uid}.vllm").read_text(encoding="utf-8"))
    os.kill(recorded["pid"], signal.SIGKILL)


def test_a_container_that_restarts_ends_its_group_and_the_second_time_it_waits(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    with hollow_node(cluster, sleeping, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, engine={"terminationGracePeriod": "2s"}))
        before = until_whole(kube, namespace, "e0")
        kill_engine(cluster, before["e0-1"])

        def anew() -> dict[str, Pod]:
            pods = look(kube, namespace)
            assert whole(pods, "e0"), described(kube, namespace, pods)
            assert not uids(pods, "e0") & uids(before, "e0")
            return pods

        second = eventually(anew, 40, pause=0.2)
        told = events(kube, namespace, "GroupRestarted")
        assert told == [
            "e0 starts anew (epoch 1): member 1 (llama-e0-1-0): its container vllm ended with exit code 137 (Error)"
        ]
        kill_engine(cluster, second["e0-1"])
        broken = await_condition(kube, svllm(namespace), "EnginesReady", "False", reason="GroupBroken")
        assert "member 1 (llama-e0-1-0): its container vllm ended with exit code 137" in broken["message"]
        assert "It starts anew at 20" in broken["message"]
        waiting = look(kube, namespace)
        assert uids(waiting, "e0") == uids(second, "e0"), "its logs can be read until the back-off is over"
        # The head's own probe still succeeds: without the gate it would get requests.
        assert waiting["e0-0"].gate == "False"
        eventually(lambda: not look(kube, namespace)["e0-0"].ready)
        before = second
        eventually(anew, 40, pause=0.2)
        assert len(events(kube, namespace, "GroupRestarted")) == 2


# ----------------------------------------------------------------------------------------------- changes of the spec


class Snapshots:
    """Which groups served, looked at again and again."""

    def __init__(self, kube: Kube, namespace: str, *groups: str) -> None:
        self._kube, self._namespace, self._groups = kube, namespace, groups
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self.fewest = len(groups)
        self.looks = 0

    def _watch(self) -> None:
        while not self._end.wait(0.05):
            pods = look(self._kube, self._namespace)
            serving = [
                group
                for group in self._groups
                if {name for name in pods if name.startswith(f"{group}-")} == {f"{group}-0", f"{group}-1"}
                and all(pods[f"{group}-{rank}"].ready for rank in (0, 1))
            ]
            self.fewest = min(self.fewest, len(serving))
            self.looks += 1

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()


@pytest.mark.parametrize("change", ["spec", "restart-at"])
def test_groups_are_replaced_one_after_the_other_and_the_rest_serves(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str, change: str
) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=3))
        groups = ("e0", "e1", "e2")
        before = until_whole(kube, namespace, *groups)
        with Snapshots(kube, namespace, *groups) as seen:
            if change == "spec":
                kube.patch(svllm(namespace), {"spec": {"engine": {"args": ["--max-model-len=4096"]}}})
            else:
                kube.patch(svllm(namespace), {"metadata": {"annotations": {RESTART_ANNOTATION: "2026-11-24"}}})

            def replaced() -> dict[str, Pod]:
                pods = look(kube, namespace)
                assert whole(pods, *groups), described(kube, namespace, pods)
                assert not {pod.uid for pod in pods.values()} & {pod.uid for pod in before.values()}
                return pods

            after = eventually(replaced, 90, pause=0.2)
        assert seen.looks > 10
        assert seen.fewest == 2, "one group at a time"
        assert len({pod.pair for pod in after.values()}) == 1
        assert {pod.pair[0] for pod in after.values()} != {pod.pair[0] for pod in before.values()}
        order = [note.split()[0] for note in events(kube, namespace, "GroupRolled")]
        assert order == ["e0", "e1", "e2"]
        assert events(kube, namespace, "GroupRestarted") == []


def test_scaling_down_takes_the_highest_groups_and_their_policies_after_their_pods(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=3))
        before = until_whole(kube, namespace, "e0", "e1", "e2")
        last = Ref(kinds.POD, namespace, "llama-e2-1-0")
        kube.patch(last, {"metadata": {"finalizers": ["securevllm.io/test"]}})
        kube.patch(svllm(namespace), {"spec": {"replicas": 1}}, subresource="scale")
        # The StatefulSet stays until its pod is gone, so that none of its name is made anew while the pod is there.
        names = {"llama-e0-0", "llama-e0-1", "llama-e2-1"}
        eventually(lambda: {obj["metadata"]["name"] for obj in kube.list(kinds.STATEFUL_SET, namespace)} == names, 30)
        eventually(lambda: look(kube, namespace).keys() == {"e0-0", "e0-1", "e2-1"}, 30)
        gone, stays = Ref(kinds.NETWORK_POLICY, namespace, "llama-e1"), Ref(kinds.NETWORK_POLICY, namespace, "llama-e2")
        eventually(lambda: kube.find(gone) is None)
        time.sleep(1)
        assert kube.find(stays) is not None, "a pod of the group still ends"
        assert kube.find(Ref(kinds.SERVICE, namespace, "llama-e2")) is not None
        kube.patch(last, {"metadata": {"finalizers": None}})
        eventually(lambda: kube.find(stays) is None)
        eventually(lambda: kube.find(Ref(kinds.SERVICE, namespace, "llama-e2")) is None)
        assert uids(look(kube, namespace), "e0") == uids(before, "e0")
        deleted = [
            event["objectRef"]["name"]
            for event in cluster.audit_events()
            if event["verb"] == "delete"
            and event.get("objectRef", {}).get("resource") == "statefulsets"
            and event["objectRef"].get("namespace") == namespace
        ]
        assert deleted == ["llama-e2-0", "llama-e2-1", "llama-e1-0", "llama-e1-1"]


def test_scaled_up_again_a_group_waits_until_its_old_statefulsets_are_gone(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        until_whole(kube, namespace, "e0", "e1")
        held = Ref(kinds.STATEFUL_SET, namespace, "llama-e1-1")
        kube.patch(held, {"metadata": {"finalizers": ["securevllm.io/test"]}})
        kube.patch(svllm(namespace), {"spec": {"replicas": 1}}, subresource="scale")
        eventually(lambda: look(kube, namespace).keys() == {"e0-0", "e0-1"}, 30)
        eventually(lambda: kube.find(Ref(kinds.STATEFUL_SET, namespace, "llama-e1-0")) is None)
        uid = kube.get(held)["metadata"]["uid"]
        kube.patch(svllm(namespace), {"spec": {"replicas": 2}}, subresource="scale")
        eventually(lambda: "when StatefulSet llama-e1-1 has ended" in str(kube.get(svllm(namespace))["status"]))
        since = now()
        time.sleep(1)
        assert events(kube, namespace, "GroupStarted") == []
        tried = [
            event["verb"]
            for event in cluster.audit_events()
            if event.get("objectRef", {}).get("resource") == "statefulsets"
            and event["objectRef"].get("namespace") == namespace
            and event["stageTimestamp"] > since
            and event["user"]["username"] == USER
        ]
        assert tried == []
        kube.patch(held, {"metadata": {"finalizers": None}})
        until_whole(kube, namespace, "e0", "e1")
        assert kube.get(held)["metadata"]["uid"] != uid
        assert len(events(kube, namespace, "GroupStarted")) <= 1


def test_suspended_and_resumed(cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        until_whole(kube, namespace, "e0", "e1")
        kube.patch(svllm(namespace), {"spec": {"suspend": True}})
        eventually(lambda: look(kube, namespace) == {}, 30)
        await_condition(kube, svllm(namespace), "EnginesReady", "False", reason="Suspended")
        assert kube.find(Ref(kinds.NETWORK_POLICY, namespace, "llama-e1")) is not None
        assert len(kube.list(kinds.STATEFUL_SET, namespace)) == 4
        kube.patch(svllm(namespace), {"spec": {"suspend": False}})
        until_whole(kube, namespace, "e0", "e1")
        assert events(kube, namespace, "GroupRestarted") == []


def test_a_group_that_waits_for_its_turn_is_repaired_also_by_an_operator_that_did_not_roll_it_out(lab: Lab) -> None:
    kube, room = lab.kube, threading.Event()
    room.set()
    with (
        new_namespace(kube, "groups") as namespace,
        hollow_node(lab.cluster, namespace=namespace, fits=lambda _pod: room.is_set()),
        lab.operator("turns") as operator,
    ):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        before = until_whole(kube, namespace, "e0", "e1")
        waiting = Ref(kinds.STATEFUL_SET, namespace, "llama-e1-1")
        old = kube.get(waiting)["spec"]
        room.clear()  # e0 finds no node after it was rolled, and e1 waits for it
        kube.patch(svllm(namespace), {"spec": {"engine": {"args": ["--max-model-len=4096"]}}})
        eventually(lambda: events(kube, namespace, "GroupRolled"), 60)
        eventually(lambda: uids(look(kube, namespace), "e0") & uids(before, "e0") == set(), 60)

        def edit() -> None:
            pod = {"hostNetwork": True, "priority": None, "serviceAccountName": "default"}
            kube.patch(waiting, {"spec": {"template": {"metadata": {"labels": {"team": "x"}}, "spec": pod}}})

        def repaired() -> bool:
            assert kube.get(waiting)["spec"] == old
            return True

        edit()
        eventually(repaired, 60)
        with operator.down():
            edit()
            assert kube.get(waiting)["spec"] != old
        eventually(repaired, 60)
        assert uids(look(kube, namespace), "e1") == uids(before, "e1")
        room.set()
        eventually(lambda: not uids(look(kube, namespace), "e1") & uids(before, "e1"), 60)
        after = until_whole(kube, namespace, "e0", "e1", seconds=60)
        assert len({pod.pair[0] for pod in after.values()}) == 1
        assert operator.stop() == 0


# ------------------------------------------------------------------------------------------------ the operator's end


@pytest.mark.slow
def test_killed_in_the_middle_of_a_restart_it_never_leaves_a_mixed_group(lab: Lab) -> None:
    dice = random.Random(20)  # noqa: S311 - moments
    unfinished = 0
    kube = lab.kube
    with (
        new_namespace(kube, "groups") as namespace,
        hollow_node(lab.cluster, namespace=namespace),
        lab.operator("mortal") as operator,
    ):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        pods = until_whole(kube, namespace, "e0", "e1")
        # In turns, because each break in a row has a longer back-off.
        for killed, other in [("e0", "e1"), ("e1", "e0")] * 3:
            epoch = int(pods[f"{killed}-0"].pair[1])
            kube.delete(Ref(kinds.POD, namespace, f"llama-{killed}-1-0"))
            time.sleep(dice.uniform(0.0, 0.4))
            operator.kill()
            unfinished += not whole(look(kube, namespace), "e0", "e1")
            others = uids(pods, other)
            operator.start()

            def anew(before: dict[str, Pod] = pods, epoch: int = epoch, killed: str = killed) -> dict[str, Pod]:
                found = look(kube, namespace)
                assert whole(found, "e0", "e1"), found
                assert not uids(found, killed) & uids(before, killed)
                assert int(found[f"{killed}-0"].pair[1]) > epoch
                return found

            pods = eventually(anew, 60, pause=0.2)
            assert uids(pods, other) == others
        assert operator.stop() == 0
    assert unfinished >= 3, "otherwise the moments are badly chosen and this shows nothing"


def test_while_the_operator_is_down_whole_groups_serve_and_what_was_lost_is_seen_afterwards(lab: Lab) -> None:
    kube = lab.kube
    with (
        new_namespace(kube, "groups") as namespace,
        hollow_node(lab.cluster, namespace=namespace),
        lab.operator("away") as operator,
    ):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        before = until_whole(kube, namespace, "e0", "e1")
        with operator.down():
            kube.delete(Ref(kinds.POD, namespace, "llama-e0-1-0"))

            def made_again() -> bool:
                pods = look(kube, namespace)
                return "e0-1" in pods and pods["e0-1"].uid != before["e0-1"].uid

            eventually(made_again, 30)
            pods = look(kube, namespace)
            # The controller made it of the same epoch, but its gate is closed: only the operator knows the group.
            assert pods["e0-1"].pair == before["e0-1"].pair
            time.sleep(1)
            pods = look(kube, namespace)
            assert not pods["e0-1"].ready
            assert pods["e1-0"].ready
            assert pods["e1-1"].ready
        restarted_as_one(kube, namespace, before, "the pod of member 1 (llama-e0-1-0) was replaced")
        assert operator.stop() == 0


def test_a_whole_group_is_left_alone_by_a_new_operator_also_without_memory(lab: Lab) -> None:
    kube = lab.kube
    with (
        new_namespace(kube, "groups") as namespace,
        hollow_node(lab.cluster, namespace=namespace),
        lab.operator("renewed") as operator,
    ):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        before = until_whole(kube, namespace, "e0", "e1")
        await_condition(kube, svllm(namespace), "EnginesReady", "True")
        with operator.down():
            pass
        # The memory of all groups gets lost.
        kube.delete(Ref(kinds.CONFIG_MAP, namespace, "llama-accepted"))
        eventually(lambda: kube.find(Ref(kinds.CONFIG_MAP, namespace, "llama-accepted")), 20)
        time.sleep(2)
        after = look(kube, namespace)
        assert after == before
        assert operator.stop() == 0


# --------------------------------------------------------------------------------------------------------- the drain


def test_a_drain_takes_one_group_at_a_time_although_budgets_count_pods(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str
) -> None:
    del operator
    room = threading.Event()
    room.set()
    with hollow_node(cluster, namespace=namespace, fits=lambda _pod: room.is_set()):
        kube.create(resource(namespace, parallelism=TWO_NODES, replicas=2))
        before = until_whole(kube, namespace, "e0", "e1")
        budget = Ref(kinds.POD_DISRUPTION_BUDGET, namespace, "llama-engine")

        def allowed() -> tuple[int, int]:
            status = kube.get(budget).get("status", {})
            return status.get("disruptionsAllowed", -1), status.get("currentHealthy", -1)

        eventually(lambda: allowed() == (1, 4), 30)
        room.clear()  # e0 does not come back for now
        evict(kube, namespace, "llama-e0-0-0")
        # One pod was evicted, and both members of its group count as disrupted.
        eventually(lambda: allowed() == (0, 2), 30)
        with pytest.raises(Refused, match="429"):
            evict(kube, namespace, "llama-e1-0-0")
        assert uids(look(kube, namespace), "e1") == uids(before, "e1")
        # What does not serve may go: its node would never be empty otherwise. kubectl drain asks again, too.
        eventually(lambda: drained(kube, namespace, "llama-e0-1-0"), 60, pause=0.2)
        room.set()
        until_whole(kube, namespace, "e0", "e1")
        eventually(lambda: allowed() == (1, 4), 30)
        eventually(lambda: drained(kube, namespace, "llama-e1-0-0"), 60, pause=0.2)
