"""Where things are in the network of a cluster with nodes, and the one piece of it that this machine sees.

Nodes are joined by a bridge in a network namespace of its own (the *switch*), so that no firewall of this machine
stands between them and nothing of theirs can leak into it. This machine holds one end of one link, with an address and
the routes to nodes and pods: when the link is deleted, everything is. A cluster takes the first of 16 address plans
that nobody uses, so that clusters run side by side.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass

from e2e.cluster.errors import ClusterError
from e2e.cluster.packages import SYSTEM_PATH

API_PORT = 6443
DNS_SERVICE_IP = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"
PLANS = 16
_LINK_PREFIX = "svllm"


@dataclass(frozen=True)
class Plan:
    """The addresses of one cluster with nodes.

    Attributes:
        index: 0 to `PLANS` - 1.
        nodes: Names of the nodes.
    """

    index: int
    nodes: tuple[str, ...]

    @property
    def link(self) -> str:
        """Name of the link on this machine (at most 15 bytes)."""
        return f"{_LINK_PREFIX}{self.index}"

    @property
    def gateway(self) -> str:
        """This machine's address on the link; the API server listens there."""
        return f"10.99.{self.index}.1"

    @property
    def node_range(self) -> str:
        """Addresses of the nodes and of this machine."""
        return f"10.99.{self.index}.0/24"

    @property
    def pod_range(self) -> str:
        """Addresses of pods; each node gets a /24 of it."""
        return f"10.{100 + self.index}.0.0/16"

    def node_ip(self, node: str) -> str:
        """Address of a node."""
        return f"10.99.{self.index}.{11 + self.nodes.index(node)}"

    @property
    def outsider_ip(self) -> str:
        """An address on the nodes' network that is no node's, for a host outside the cluster."""
        return f"10.99.{self.index}.200"


def free_plan(nodes: tuple[str, ...], taken: Iterable[int]) -> Plan:
    """Return the first plan that is not taken and whose ranges no route of this machine overlaps.

    Raises:
        ClusterError: All are in use.
    """
    routes = [_network(route["dst"]) for route in json.loads(run_ip("-json", "route")) if route["dst"] != "default"]
    for index in sorted(set(range(PLANS)) - set(taken)):
        plan = Plan(index, nodes)
        ranges = [ipaddress.ip_network(text) for text in (plan.node_range, plan.pod_range)]
        if not any(route.overlaps(own) for route in routes for own in ranges):
            return plan
    raise ClusterError(
        f"no free addresses for nodes: all of 10.99.0.0 to 10.99.{PLANS - 1}.0 (/24) or 10.100.0.0 to"
        f" 10.{100 + PLANS - 1}.0.0 (/16) are routed on this machine; see `ip route` and `python -m e2e.cluster status`"
    )


def connect_switch(plan: Plan, switch: int) -> None:
    """Make the bridge in the switch's network namespace (`switch`: a pid in it), and this machine's link to it."""
    run_ip(f"link add {plan.link} type veth peer name host netns {switch}")
    run_ip(f"address add {plan.gateway}/24 dev {plan.link}")
    run_ip(f"link set {plan.link} up")
    _in_namespace(switch, "link add bridge type bridge", "link set bridge up", "link set lo up")
    _plug(switch, "host")


def connect_node(plan: Plan, node: str, switch: int, holder: int) -> None:
    """Plug a node (`holder`: a pid in its network namespace) into the switch and give it its address."""
    _in_namespace(switch, f"link add {node} type veth peer name eth0 netns {holder}")
    _plug(switch, node)
    _in_namespace(holder, f"address add {plan.node_ip(node)}/24 dev eth0", "link set eth0 up", "link set lo up")


def connect_outsider(
    plan: Plan, addresses: Iterable[str], ranges: dict[str, str], *, switch: int, holder: int, nodes: dict[str, int]
) -> None:
    """Plug a host that is no node (`holder`: a pid in its network namespace) into the switch.

    Args:
        plan: Of the cluster; the host gets its `outsider_ip`.
        addresses: Which the host has besides.
        ranges: Pod range of each node; the host finds back to pods.
        switch: A pid in the switch's network namespace.
        holder: A pid in the host's.
        nodes: A pid in that of each node; they get routes to `addresses`.
    """
    _in_namespace(switch, f"link add outside type veth peer name eth0 netns {holder}")
    _plug(switch, "outside")
    own = [f"address add {address}/32 dev eth0" for address in addresses]
    back = [f"route add {pods} via {plan.node_ip(node)}" for node, pods in ranges.items()]
    first = f"address add {plan.outsider_ip}/24 dev eth0"
    _in_namespace(holder, first, "link set eth0 up", "link set lo up", *own, *back)
    for pid in nodes.values():
        _in_namespace(pid, *(f"route replace {address} via {plan.outsider_ip}" for address in addresses))


def unplug(switch: int, node: str) -> None:
    """Take a node's port of the switch (`switch`: a pid in its network namespace) down."""
    _in_namespace(switch, f"link set {node} down")


def plug(switch: int, node: str) -> None:
    """Take it up again."""
    _in_namespace(switch, f"link set {node} up")


def route_pods(plan: Plan, ranges: dict[str, str], holders: dict[str, int], *, between_nodes: bool) -> None:
    """Route each node's pod range (`ranges`) by its node: on this machine, and on the other nodes if asked to."""
    for node, pods in ranges.items():
        run_ip(f"route replace {pods} via {plan.node_ip(node)}")
        for other, holder in holders.items():
            if between_nodes and other != node:
                _in_namespace(holder, f"route replace {pods} via {plan.node_ip(node)}")


def disconnect(plan: Plan) -> None:
    """Delete the link, and with it the address and the routes; nothing happens when there is none."""
    with suppress(ClusterError):
        run_ip(f"link delete {plan.link}")


def run_ip(*arguments: str) -> str:
    """Run `ip` in this machine's namespace; one argument is split at its spaces.

    Raises:
        ClusterError: With what it said.
    """
    words = arguments[0].split() if len(arguments) == 1 else list(arguments)
    return run(["ip", *words])


def run(command: list[str]) -> str:
    """Run a program of the system and return what it prints.

    Raises:
        ClusterError: It failed; with what it said.
    """
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, env={"PATH": SYSTEM_PATH})
    if result.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed (exit code {result.returncode}): {result.stderr.strip()}")
    return result.stdout


def _in_namespace(pid: int, *commands: str) -> None:
    for command in commands:
        run(["nsenter", f"--target={pid}", "--net", "ip", *command.split()])


def _plug(switch: int, port: str) -> None:
    _in_namespace(switch, f"link set {port} master bridge", f"link set {port} up")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)
