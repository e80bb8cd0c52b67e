"""The nodes of a local cluster: from an address plan to Ready, and everything undone again.

What is changed on this machine, and how it is undone: the namespaces of nodes and switch end with their first
processes, and mounts, links and firewall rules with them; one link (`network`), the nodes' cgroups and one sysctl are
put back by `stop`. All names follow from the plan, which is written down before anything is changed: after a crash the
next start of any cluster undoes it.

Linux and root; tried on cgroup v1 hierarchies.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from e2e.cluster import binaries, daemon, images, machine, network, packages
from e2e.cluster.errors import ClusterError
from e2e.cluster.node import SWITCH, Cni, Node, first_process, power_off, remove_cgroups, start_init

if TYPE_CHECKING:
    from e2e.cluster.binaries import Progress
    from e2e.cluster.images import Image
    from e2e.cluster.kubectl import Kubectl
    from e2e.cluster.network import Plan

T = TypeVar("T")

MANIFESTS = Path(__file__).parent / "manifests"
READY_SECONDS = 120.0

# Volumes for claims without a class: folders of this machine that all nodes see.
VOLUMES = 16


def check_machine() -> None:
    """Make sure that nodes can run here at all.

    Raises:
        ClusterError: Not Linux, or not root; with the alternative.
    """
    if not _is_linux_root():
        raise ClusterError(
            "nodes of our own need Linux and root (namespaces, cgroups, BPF): run this as root, or start Docker and put"
            " kind on PATH, or give a cluster made for tests: SVLLM_KUBECONFIG=/path/to/kubeconfig"
        )


def prepare(cni: Cni, progress: Progress) -> None:
    """Install packages, build programs and pack the base images; returns at once when all is there.

    Raises:
        ClusterError: See `packages.ensure` and `binaries.build`.
    """
    packages.ensure(progress, cilium=cni == "cilium")
    without = () if cni == "cilium" else (binaries.CILIUM_AGENT, binaries.CILIUM_CNI)
    binaries.build([name for name in binaries.NODE_PROGRAMS if name not in without], progress)
    for image in images.base():
        image.prepare(progress)


def at_once() -> bool:
    """Tell whether nodes can start here now: Linux, root, and nothing that has to be installed or built before."""
    return (
        _is_linux_root()
        and not packages.missing(cilium=True)
        and binaries.built((*binaries.CONTROL_PLANE, *binaries.NODE_PROGRAMS))
    )


def members(folder: Path, plan: Plan, cni: Cni) -> list[Node]:
    """Return the nodes of a cluster, started or not."""
    return [Node(name, plan, folder, cni) for name in plan.nodes]


def connect(folder: Path, plan: Plan) -> None:
    """Start the switch and this machine's link to it: the API server's address exists from now on.

    Raises:
        ClusterError: The kernel refused; with the reason.
    """
    machine.allow_many_inotify_instances()
    switch = _switch(folder)
    switch.mkdir(parents=True)
    start_init(switch, "switch")
    network.connect_switch(plan, first_process(switch).pid)


def boot(folder: Path, plan: Plan, cni: Cni) -> None:
    """Start the nodes with their container runtimes and base images; needs no API server."""
    switch = first_process(_switch(folder)).pid

    def one(node: Node) -> None:
        node.boot(switch)
        node.wait_for_runtime()
        for image in images.base():
            image.load(node.ctr)

    _for_each(members(folder, plan, cni), one)


def join(folder: Path, plan: Plan, cni: Cni, kubectl: Kubectl, progress: Progress) -> None:
    """Let the nodes join the cluster and return when they are Ready and cluster DNS answers.

    Args:
        folder: Of the cluster.
        plan: Its addresses.
        cni: Network plugin.
        kubectl: With an administrator's rights.
        progress: For a person who waits.

    Raises:
        ClusterError: A process ended, or a node is not Ready in time.
    """
    began = time.monotonic()
    nodes = members(folder, plan, cni)
    if cni == "cilium":
        kubectl("create", "--recursive", "--filename", str(binaries.CILIUM.folder / "crds"))
    _for_each(nodes, Node.start_rest)
    ranges = _until(lambda: pod_ranges(kubectl, plan), "every node has its pod range", nodes)
    holders = {node.name: first_process(node.folder).pid for node in nodes}
    network.route_pods(plan, ranges, holders, between_nodes=cni == "bridge")
    if cni == "bridge":
        for node in nodes:
            node.write_bridge_network(ranges[node.name])
    kubectl("apply", "--server-side", "--filename", str(MANIFESTS), "--filename", "-", stdin=_volumes(folder))
    _until(lambda: _ready(kubectl, plan), "every node is Ready", nodes)
    progress(f"{len(nodes)} nodes Ready after {time.monotonic() - began:.1f} s")
    _until(lambda: _dns_answers(kubectl), "cluster DNS is available", nodes)
    progress(f"cluster DNS answers after {time.monotonic() - began:.1f} s")


def stop(folder: Path, plan: Plan) -> None:
    """End the nodes and undo what was changed on this machine; does nothing where nothing was started."""
    for name in (*plan.nodes, ""):
        power_off(folder / "nodes" / name if name else _switch(folder))
    network.disconnect(plan)
    for node in members(folder, plan, "cilium"):
        remove_cgroups(node.cgroup)


def load_image(nodes: Iterable[Node], image: Image) -> None:
    """Import an image into every node that does not have it.

    Raises:
        ClusterError: The runtime refused it; with what it said.
    """
    digest = image.digest()

    def one(node: Node) -> None:
        marker = node.folder / "images" / digest
        if not marker.exists():
            image.load(node.ctr)
            marker.parent.mkdir(exist_ok=True)
            marker.write_text(image.name, encoding="utf-8")

    _for_each(list(nodes), one)


def load_archive(nodes: Iterable[Node], file: Path) -> None:
    """Import a docker-archive file into every node.

    Raises:
        ClusterError: The runtime refused it; with what it said.
    """

    def one(node: Node) -> None:
        with file.open("rb") as archive:
            images.load(str(file), lambda out: shutil.copyfileobj(archive, out), node.ctr)

    _for_each(list(nodes), one)


def _is_linux_root() -> bool:
    return platform.system() == "Linux" and os.geteuid() == 0


def _switch(folder: Path) -> Path:
    return folder / SWITCH


def _for_each(nodes: list[Node], action: Callable[[Node], object]) -> None:
    """Do something on all nodes at once; every failure is told."""
    with ThreadPoolExecutor(max_workers=max(len(nodes), 1)) as pool:
        futures = [pool.submit(action, node) for node in nodes]
        wait(futures)
    failures = [error for future in futures if (error := future.exception())]
    unexpected = next((error for error in failures if not isinstance(error, ClusterError)), None)
    if unexpected:
        raise unexpected
    if failures:
        raise ClusterError("\n".join(str(error) for error in failures))


def _until(look: Callable[[], T | None], what: str, nodes: list[Node]) -> T:
    deadline = time.monotonic() + READY_SECONDS
    while (found := look()) is None:
        for node in nodes:
            node.check()
        if time.monotonic() > deadline:
            logs = "\n".join(
                f"{node.folder / name}.log:\n{daemon.log_tail(node.folder, name, 3)}"
                for node in nodes
                for name in node.daemons
            )
            raise ClusterError(f"not seen within {READY_SECONDS:.0f} s: {what}; the ends of the logs:\n{logs}")
        time.sleep(0.1)
    return found


def pod_ranges(kubectl: Kubectl, plan: Plan) -> dict[str, tuple[str, ...]] | None:
    """Return the pod ranges of each node, one of each family; None while a node has none."""
    nodes = kubectl.get("nodes")["items"]
    ranges = {item["metadata"]["name"]: tuple(item["spec"].get("podCIDRs") or ()) for item in nodes}
    return {name: ranges[name] for name in plan.nodes} if all(ranges.get(name) for name in plan.nodes) else None


def _ready(kubectl: Kubectl, plan: Plan) -> bool | None:
    ready = {
        item["metadata"]["name"]
        for item in kubectl.get("nodes")["items"]
        for condition in item["status"].get("conditions") or ()
        if condition["type"] == "Ready" and condition["status"] == "True"
    }
    return True if ready >= set(plan.nodes) else None


def _dns_answers(kubectl: Kubectl) -> bool | None:
    deployment = kubectl.get("deployment/coredns", "--namespace=kube-system")
    return True if deployment["status"].get("availableReplicas") else None


def _volumes(folder: Path) -> str:
    volumes = []
    for index in range(VOLUMES):
        path = folder / "volumes" / str(index)
        path.mkdir(parents=True)
        path.chmod(0o777)  # a hostPath volume has no fsGroup
        volumes.append(
            {
                "apiVersion": "v1",
                "kind": "PersistentVolume",
                "metadata": {"name": f"shared-{index}"},
                "spec": {
                    "capacity": {"storage": "1Ti"},
                    "accessModes": ["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany"],
                    "persistentVolumeReclaimPolicy": "Retain",
                    "hostPath": {"path": f"/run/cluster/volumes/{index}", "type": "Directory"},
                },
            }
        )
    return json.dumps({"apiVersion": "v1", "kind": "List", "items": volumes})
