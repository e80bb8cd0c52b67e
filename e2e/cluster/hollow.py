"""A hollow node: it does for the pods of a control plane without nodes what a scheduler and a kubelet would do.

What is real: every pod gets bound, a unique address, its volumes (`volumes`: kubelet's atomic swap, synced at once
when the pod changes and otherwise every minute), its environment, its status, readiness gates, restarts, startup and
readiness probes of processes, the preStop sleep and graceful deletion. Services are resolved by a DNS server of its
own (`dns`).

What is not: there are no images and no namespaces. A container runs as what its `Runner` says: a process of this
machine with translated paths and addresses, or nothing at all, and then it counts as running and ready. Addresses are
loopback addresses (127.64.0.0/10), so NetworkPolicies have no effect: the gate of an engine, which waits for their
enforcement, is an init container that no runner wants, and is reported as completed. EndpointSlices stay empty (the
API server refuses loopback addresses in them). Liveness probes, resources, users, security contexts, hostPath, CSI and
sidecar init containers are not implemented.

`hollow_node` runs it in a thread of its own; Linux only.
"""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from e2e.cluster.dns import Responder
from e2e.cluster.errors import ClusterError
from e2e.cluster.kube import SYNC, JsonObject, RefusedError, connect
from e2e.cluster.lifecycle import Cluster, processes_folder
from e2e.cluster.worker import Node, PodWorker, log_file

if TYPE_CHECKING:
    from e2e.cluster.runners import Runner

RESYNC_SECONDS = 60.0
CLUSTER_DOMAIN = "cluster.local"
DNS_PORT = 10053
_ROOM = 0.1
HOLLOW_LABEL = "securevllm.io/hollow-node"

# 127.64.0.0/10 in blocks of 4096 addresses, one block for each node of this machine.
_FIRST_BLOCK, _BLOCKS, _BLOCK_SIZE = 0x7F400000, 1024, 4096

_MESSAGE = (
    "stands in for a kubelet: volumes, addresses and status are real; containers run as processes of this machine or,"
    " where no runner wants them, not at all"
)


@dataclass(frozen=True)
class HollowNode:
    """A running hollow node.

    Attributes:
        name: Name of its Node object.
        ip: Its address; the first of its block.
        dns: Where its DNS server listens (UDP).
        folder: Its folder: `pods/<uid>/`, `claims/<namespace>/<claim>/`, `logs/`.
    """

    name: str
    ip: str
    dns: tuple[str, int]
    folder: Path

    def log(self, namespace: str, pod: str, container: str) -> Path:
        """Return the file with the output of a container; it may not exist (yet)."""
        return log_file(self.folder, namespace, pod, container)

    def volume(self, uid: str, container: str, volume: str) -> Path:
        """Return the folder of a ConfigMap, Secret, projected or downward API volume as this container sees it."""
        return self.folder / "pods" / uid / "volumes" / container / volume


@contextmanager
def hollow_node(
    cluster: Cluster,
    runner: Runner = lambda _start: None,
    *,
    namespace: str | None = None,
    resync: float = RESYNC_SECONDS,
    fits: Callable[[JsonObject], bool] = lambda _pod: True,
) -> Iterator[HollowNode]:
    """Run a hollow node for the length of a `with` block.

    At the end every process is ended; the pods and the Node stay in the API server as they were, as with a node that
    lost power.

    Args:
        cluster: Must have no nodes of its own.
        runner: What containers run as; see `runners`.
        namespace: Take the pods of this namespace only, as node `hollow-<namespace>`: for tests that share a cluster.
        resync: Seconds after which volumes are synced without a reason.
        fits: Whether there is room for a pod; asked again and again (in the node's thread), and until then it is
            pending.

    Raises:
        ClusterError: The cluster has real nodes, or the hollow one ended with an error.
    """
    loop = asyncio.new_event_loop()
    started: Future[HollowNode] = Future()
    life = loop.create_task(_live(cluster, runner, namespace, resync, started, fits=fits))
    thread = threading.Thread(target=_run, args=(loop, life, started), name="hollow-node")
    thread.start()
    try:
        yield started.result()
    finally:
        with suppress(RuntimeError):  # it has ended by itself, and the loop is closed
            loop.call_soon_threadsafe(life.cancel)
        thread.join()
        # Also when the block failed: the reason is probably this one.
        if not life.cancelled() and (error := life.exception()):
            raise ClusterError(f"the hollow node failed: {error!r}") from error


def _run(loop: asyncio.AbstractEventLoop, life: asyncio.Task[None], started: Future[HollowNode]) -> None:
    try:
        loop.run_until_complete(asyncio.wait([life]))
        # What pods were waiting for, when the node ended in the middle of it.
        left = asyncio.all_tasks(loop)
        for task in left:
            task.cancel()
        if left:
            loop.run_until_complete(asyncio.wait(left))
        loop.run_until_complete(loop.shutdown_asyncgens())
    finally:
        loop.close()
        started.cancel()  # nothing happens when it has a result


async def _live(
    cluster: Cluster,
    runner: Runner,
    namespace: str | None,
    resync: float,
    started: Future[HollowNode],
    *,
    fits: Callable[[JsonObject], bool],
) -> None:
    server = urlsplit(cluster.server)
    env = {"KUBERNETES_SERVICE_HOST": server.hostname or "", "KUBERNETES_SERVICE_PORT": str(server.port or 443)}
    name = f"hollow-{namespace}" if namespace else "hollow"
    folder = cluster.folder / name
    for part in ("pods", "claims", "logs"):
        (folder / part).mkdir(parents=True, exist_ok=True)
    processes = processes_folder(cluster.folder)
    processes.mkdir(exist_ok=True)
    udp, block = _claim_block()
    ip = _address(block, 1)
    async with connect(cluster.kubeconfig) as api:
        node = Node(api, name, ip, (ip, DNS_PORT), folder, runner, env, resync, processes)
        pods = _Pods(node, namespace, block, fits)
        loop = asyncio.get_running_loop()
        transport, _ = await loop.create_datagram_endpoint(lambda: Responder(pods.lookup), sock=udp)
        try:
            await _register(node)
            working: list[asyncio.Future[Any]] = [
                asyncio.create_task(pods.follow_pods()),
                asyncio.create_task(pods.follow_services()),
                pods.failed,
            ]
            synced = asyncio.create_task(pods.wait_synced())
            try:
                await asyncio.wait([*working, synced], return_when=asyncio.FIRST_COMPLETED)
                if synced.done():
                    started.set_result(HollowNode(name, ip, node.dns, folder))
                done, _ = await asyncio.wait(working, return_when=asyncio.FIRST_COMPLETED)
                for future in done:
                    future.result()
            finally:
                for future in (*working, synced):
                    future.cancel()
                await asyncio.gather(*working, synced, return_exceptions=True)
                await pods.close()
        finally:
            transport.close()


async def _register(node: Node) -> None:
    others = (await node.api.get("/api/v1/nodes"))["items"]
    if real := [item["metadata"]["name"] for item in others if HOLLOW_LABEL not in item["metadata"].get("labels", {})]:
        raise ClusterError(f"the cluster has real nodes ({', '.join(real)}): a hollow one would take their pods away")
    body = {
        "apiVersion": "v1",
        "kind": "Node",
        "metadata": {
            "name": node.name,
            "labels": {"kubernetes.io/hostname": node.name, "kubernetes.io/os": "linux", HOLLOW_LABEL: "true"},
        },
    }
    try:
        await node.api.create("/api/v1/nodes", body)
    except RefusedError as refused:
        if refused.status != HTTPStatus.CONFLICT:
            raise
    amounts = {"cpu": "64", "memory": "512Gi", "pods": "1000", "nvidia.com/gpu": "64"}
    ready = {"type": "Ready", "status": "True", "reason": "HollowNode", "message": _MESSAGE}
    status = {
        "capacity": amounts,
        "allocatable": amounts,
        "conditions": [ready],
        "addresses": [{"type": "InternalIP", "address": node.ip}, {"type": "Hostname", "address": node.name}],
    }
    await node.api.merge(f"/api/v1/nodes/{node.name}/status", {"status": status})


class _Pods:
    """The pods of the cluster: binds them, and keeps a worker for each that is bound to this node."""

    def __init__(self, node: Node, namespace: str | None, block: int, fits: Callable[[JsonObject], bool]) -> None:
        self._node, self._fits = node, fits
        self._scope = f"/api/v1/namespaces/{namespace}" if namespace else "/api/v1"
        self._block = block
        self._next = 1
        self._pods: dict[str, JsonObject] = {}
        self._services: dict[tuple[str, str], JsonObject] = {}
        self._workers: dict[str, tuple[PodWorker, asyncio.Task[None]]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._synced = {"pods": asyncio.Event(), "services": asyncio.Event()}
        self.failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def wait_synced(self) -> None:
        """Return when pods and Services were listed once."""
        for event in self._synced.values():
            await event.wait()

    async def follow_pods(self) -> None:
        """Keep up with the pods, for ever."""
        async for kind, value in self._node.api.follow(f"{self._scope}/pods"):
            if kind == SYNC:
                present = {pod["metadata"]["uid"] for pod in value}
                for uid in set(self._pods) - present:
                    self._gone(uid)
                for pod in value:
                    self._seen(pod)
                self._synced["pods"].set()
            elif kind == "DELETED":
                self._gone(value["metadata"]["uid"])
            elif kind in {"ADDED", "MODIFIED"}:
                self._seen(value)

    async def follow_services(self) -> None:
        """Keep up with the Services, for ever."""
        async for kind, value in self._node.api.follow(f"{self._scope}/services"):
            if kind == SYNC:
                self._services = {_key(service): service for service in value}
                self._synced["services"].set()
            elif kind == "DELETED":
                self._services.pop(_key(value), None)
            elif kind in {"ADDED", "MODIFIED"}:
                self._services[_key(value)] = value

    def lookup(self, name: str) -> list[str] | None:
        """Resolve the name of a Service, or of a pod in a Service; see `dns.Lookup`."""
        labels = name.removesuffix(f".svc.{CLUSTER_DOMAIN}").split(".")
        if not name.endswith(f".svc.{CLUSTER_DOMAIN}") or len(labels) not in {2, 3}:
            return None
        service = self._services.get((labels[-1], labels[-2]))
        if service is None:
            return None
        pods = [pod for pod in self._pods.values() if _serves(pod, service)]
        if len(labels) == 3:
            pods = [pod for pod in pods if _host_name(pod) == (labels[0], labels[1])]
            if not pods:
                return None
        return [pod["status"]["podIP"] for pod in pods]

    async def close(self) -> None:
        """End all pods of this node at once."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def _seen(self, pod: JsonObject) -> None:
        uid, spec = pod["metadata"]["uid"], pod["spec"]
        self._pods[uid] = pod
        if uid in self._workers:
            self._workers[uid][0].update(pod)
        elif not spec.get("nodeName"):
            if not spec.get("schedulingGates") and not pod["metadata"].get("deletionTimestamp"):
                self._spawn(self._bind(pod))
        elif spec["nodeName"] == self._node.name and not _finished(pod):
            worker = PodWorker(self._node, pod, self._new_address())
            self._workers[uid] = (worker, self._spawn(worker.run()))

    def _gone(self, uid: str) -> None:
        self._pods.pop(uid, None)
        if entry := self._workers.pop(uid, None):
            entry[1].cancel()

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(self._check)
        return task

    def _check(self, task: asyncio.Task[None]) -> None:
        if not task.cancelled() and (error := task.exception()) and not self.failed.done():
            self.failed.set_exception(error)

    async def _bind(self, pod: JsonObject) -> None:
        metadata = pod["metadata"]
        while metadata["uid"] in self._pods and not self._fits(pod):  # noqa: ASYNC110 - nobody tells when there is room
            await asyncio.sleep(_ROOM)
        body = {
            "apiVersion": "v1",
            "kind": "Binding",
            "metadata": {"name": metadata["name"], "uid": metadata["uid"]},
            "target": {"apiVersion": "v1", "kind": "Node", "name": self._node.name},
        }
        try:
            path = f"/api/v1/namespaces/{metadata['namespace']}/pods/{metadata['name']}/binding"
            await self._node.api.create(path, body)
        except RefusedError as refused:
            # Bound already, or gone.
            if refused.status not in {HTTPStatus.CONFLICT, HTTPStatus.NOT_FOUND}:
                raise

    def _new_address(self) -> str:
        used = {pod.get("status", {}).get("podIP") for pod in self._pods.values()}
        while True:
            self._next = self._next + 1 if self._next < _BLOCK_SIZE - 2 else 2
            address = _address(self._block, self._next)
            if address not in used:
                return address


def _claim_block() -> tuple[socket.socket, int]:
    """Claim a block of addresses by binding its first one, so that two nodes of this machine never share one."""
    blocks = list(range(_BLOCKS))
    random.shuffle(blocks)
    for block in blocks:
        claim = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        try:
            claim.bind((_address(block, 1), DNS_PORT))
        except OSError:
            claim.close()
        else:
            claim.setblocking(False)
            return claim, block
    raise ClusterError("all blocks of 127.64.0.0/10 are taken by other hollow nodes")


def _address(block: int, index: int) -> str:
    return socket.inet_ntoa((_FIRST_BLOCK + block * _BLOCK_SIZE + index).to_bytes(4, "big"))


def _key(thing: JsonObject) -> tuple[str, str]:
    return thing["metadata"]["namespace"], thing["metadata"]["name"]


def _finished(pod: Mapping[str, Any]) -> bool:
    return pod.get("status", {}).get("phase") in {"Succeeded", "Failed"} and not pod["metadata"].get(
        "deletionTimestamp"
    )


def _host_name(pod: Mapping[str, Any]) -> tuple[str | None, str | None]:
    return pod["spec"].get("hostname"), pod["spec"].get("subdomain")


def _serves(pod: Mapping[str, Any], service: Mapping[str, Any]) -> bool:
    selector = service["spec"].get("selector")
    labels = pod["metadata"].get("labels", {})
    status = pod.get("status", {})
    if not selector or pod["metadata"]["namespace"] != service["metadata"]["namespace"]:
        return False
    if not selector.items() <= labels.items() or not status.get("podIP") or status["phase"] in {"Succeeded", "Failed"}:
        return False
    if service["spec"].get("publishNotReadyAddresses"):
        return True
    ready = any(item["type"] == "Ready" and item["status"] == "True" for item in status.get("conditions", []))
    return ready and not pod["metadata"].get("deletionTimestamp")
