"""A policy engine that is late, or not there: Cilium's agents are told to enforce nothing for a while.

The policies exist all the time; nobody acts on them. That is what other engines show between the start of a pod and the
moment when its policies are programmed, and what a cluster without an engine shows for ever. Cilium itself programs a
pod before it starts.
"""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from e2e.cluster.binaries import CILIUM_AGENT
from e2e.cluster.errors import ClusterError
from e2e.cluster.node import first_process

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.node import Node

_SOCKET = "run/cilium/cilium.sock"
_PATH = "/v1/config"
_SECONDS = 300.0
"""The agent compiles its programs anew before it answers."""


class _OverSocket(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=_SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(_SECONDS)
        self.sock.connect(self._path)


def can_be_withheld(cluster: Cluster) -> bool:
    """Whether the nodes are ours and Cilium's."""
    return bool(cluster.nodes) and all(node.cni == "cilium" for node in cluster.nodes)


def works(node: Node) -> bool:
    """Whether the node's agent runs and answers; one that ended is started again, as kubelet would.

    An agent ends by itself when it finds no API server for a minute after its start.
    """
    if not node.runs(CILIUM_AGENT):
        node.start(CILIUM_AGENT)
    try:
        _ask(node, "GET")
    except ClusterError:
        return False
    return True


@contextmanager
def withheld(cluster: Cluster) -> Iterator[Callable[[], None]]:
    """Let the agents enforce nothing, until the function that is given is called or the block ends.

    Raises:
        ClusterError: An agent refused; with what it said.
    """

    def enforce() -> None:
        _everywhere(cluster, "default")

    try:
        _everywhere(cluster, "never")
        yield enforce
    finally:
        enforce()


def _everywhere(cluster: Cluster, mode: str) -> None:
    with ThreadPoolExecutor(max_workers=len(cluster.nodes)) as pool:
        list(pool.map(lambda node: _set(node, mode), cluster.nodes))


def _set(node: Node, mode: str) -> None:
    if _ask(node, "GET")["spec"]["policy-enforcement"] != mode:
        _ask(node, "PATCH", {"policy-enforcement": mode})
    now = _ask(node, "GET")["spec"]["policy-enforcement"]
    if now != mode:
        raise ClusterError(f"the agent of {node.name} should enforce {mode}, and says {now}")


def _ask(node: Node, method: str, body: Any = None) -> Any:
    connection = _OverSocket(str(Path("/proc") / str(first_process(node.folder).pid) / "root" / _SOCKET))
    try:
        content = None if body is None else json.dumps(body)
        connection.request(method, _PATH, content, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        text = answer.read().decode()
    except OSError as error:
        raise ClusterError(f"the agent of {node.name} does not answer: {error}") from error
    finally:
        connection.close()
    if answer.status != 200:
        raise ClusterError(f"the agent of {node.name}: {method} {_PATH}: {answer.status} {text.strip()}")
    return json.loads(text) if text.strip() else {}
