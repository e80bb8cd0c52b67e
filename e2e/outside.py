"""A host outside of the cluster, on its nodes' network: it stands for the internet and for a cloud's metadata service.

Only where the nodes are ours: their routes to these addresses are added, and gone with the nodes.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import daemon, lifecycle, network, nodes
from e2e.cluster.errors import ClusterError
from e2e.cluster.node import first_process

if TYPE_CHECKING:
    from e2e.cluster import Cluster

METADATA = ("169.254.169.254", "fd00:ec2::254")
"""Where clouds have their metadata service; the second on AWS."""
INTERNET = ("198.51.100.80", "2001:db8::80")
"""Of the ranges that RFC 5737 and RFC 3849 keep for documentation."""

PORTS = (80, 443)
_NAME = "outside"
_PROGRAM = Path(__file__).with_name("reach.py")


@dataclass(frozen=True)
class Outside:
    """The host.

    Attributes:
        name: For the table.
        ips: From which it connects, one of each family.
        pid: Of a process in its network namespace.
    """

    name: str
    ips: tuple[str, ...]
    pid: int

    def reach(self, targets: Iterable[str], seconds: float = 2.0) -> dict[str, str]:
        """Connect to each `ADDRESS:PORT` once; see `reach` for the answers."""
        command = ["nsenter", f"--target={self.pid}", "--net", sys.executable, str(_PROGRAM), f"--timeout={seconds}"]
        said = subprocess.run([*command, *targets], capture_output=True, text=True, check=True, timeout=120).stdout
        found: dict[str, str] = json.loads(said)
        return found


@contextmanager
def outside_host(cluster: Cluster) -> Iterator[Outside]:
    """Run the host; it listens on `PORTS` of all its addresses, and pods and nodes have a way to it and back.

    Raises:
        ClusterError: The kernel refused; with the reason.
    """
    plan = cluster.nodes[0].plan
    ranges = nodes.pod_ranges(cluster.kubectl, plan)
    if ranges is None:
        raise ClusterError("a node has no pod range")
    folder = lifecycle.processes_folder(cluster.folder)
    folder.mkdir(exist_ok=True)
    serving = [f"--serve={port}" for port in PORTS]
    host = daemon.start(_NAME, ["unshare", "--net", sys.executable, str(_PROGRAM), *serving], folder)
    try:
        _until_apart(host.pid)
        holders = {node.name: first_process(node.folder).pid for node in cluster.nodes}
        switch = first_process(cluster.folder / "switch").pid
        families = len(plan.outsider_ips)
        addresses = (*METADATA[:families], *INTERNET[:families])
        network.connect_outsider(plan, addresses, ranges, switch=switch, holder=host.pid, nodes=holders)
        yield Outside("outside", plan.outsider_ips, host.pid)
    finally:
        daemon.stop(folder, _NAME, grace=0.0)


def _until_apart(pid: int) -> None:
    """Wait until the process has its own network: until then its links are this machine's."""
    deadline = time.monotonic() + 30
    while Path(f"/proc/{pid}/ns/net").readlink() == Path("/proc/self/ns/net").readlink():
        if time.monotonic() > deadline:
            raise ClusterError("the outside host has no network namespace of its own")
        time.sleep(0.01)
