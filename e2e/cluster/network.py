"""Where things are in the network of a cluster with nodes, and the one piece of it that this machine sees.

Nodes are joined by a bridge in a network namespace of its own (the *switch*), so that no firewall of this machine
stands between them and nothing of theirs can leak into it. This machine holds one end of one link, with an address and
the routes to nodes and pods: when the link is deleted, everything is. A cluster takes the first of 16 address plans
that nobody uses, so that clusters run side by side. Where this machine has IPv6, every node, pod and Service range has
both families: what isolates has to hold in each.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.packages import SYSTEM_PATH

API_PORT = 6443
DNS_SERVICE_IP = "10.96.0.10"
CLUSTER_DOMAIN = "cluster.local"
PLANS = 16
SERVICE_RANGE, SERVICE_RANGE_6 = "10.96.0.0/16", "fd73:766c:6d:ffff::/112"
_LINK_PREFIX = "svllm"


@dataclass(frozen=True)
class Plan:
    """The addresses of one cluster with nodes.

    Attributes:
        index: 0 to `PLANS` - 1.
        nodes: Names of the nodes.
        dual: Whether there are addresses of both families, IPv4 first; otherwise IPv4 only.
    """

    index: int
    nodes: tuple[str, ...]
    dual: bool = False

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
    def pod_ranges(self) -> tuple[str, ...]:
        """Addresses of pods in each family; each node gets a /24 and a /64 of them."""
        return self._families(f"10.{100 + self.index}.0.0/16", f"fd73:766c:6d:{self.index + 1:x}00::/56")

    @property
    def service_ranges(self) -> tuple[str, ...]:
        """Addresses of Services in each family; the same in all clusters, as nobody routes them."""
        return self._families(SERVICE_RANGE, SERVICE_RANGE_6)

    @property
    def own_ips(self) -> tuple[str, ...]:
        """This machine's addresses on the link; `gateway` is the first."""
        return self._node_network("1")

    @property
    def outsider_ips(self) -> tuple[str, ...]:
        """Addresses on the nodes' network that are no node's, for a host outside the cluster."""
        return self._node_network("200")

    def node_ips(self, node: str) -> tuple[str, ...]:
        """Addresses of a node; the first is its IPv4."""
        return self._node_network(str(11 + self.nodes.index(node)))

    def _node_network(self, host: str) -> tuple[str, ...]:
        return self._families(f"10.99.{self.index}.{host}", f"fd73:766c:6d:{self.index:x}::{host}")

    def _families(self, first: str, second: str) -> tuple[str, ...]:
        return (first, second) if self.dual else (first,)


def free_plan(nodes: tuple[str, ...], taken: Iterable[int]) -> Plan:
    """Return the first plan that is not taken and whose ranges no route of this machine overlaps.

    Raises:
        ClusterError: All are in use.
    """
    routes = [_network(route["dst"]) for route in json.loads(run_ip("-json", "route")) if route["dst"] != "default"]
    for index in sorted(set(range(PLANS)) - set(taken)):
        plan = Plan(index, nodes, dual=has_ipv6())
        # The second family has a prefix of its own that only clusters use, and follows the first.
        ranges = [ipaddress.ip_network(text) for text in (plan.node_range, plan.pod_ranges[0])]
        if not any(route.overlaps(own) for route in routes for own in ranges):
            return plan
    raise ClusterError(
        f"no free addresses for nodes: all of 10.99.0.0 to 10.99.{PLANS - 1}.0 (/24) or 10.100.0.0 to"
        f" 10.{100 + PLANS - 1}.0.0 (/16) are routed on this machine; see `ip route` and `python -m e2e.cluster status`"
    )


def has_ipv6() -> bool:
    """Tell whether new network namespaces of this machine have IPv6."""
    switch = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    return switch.exists() and switch.read_text(encoding="ascii").strip() == "0"


def connect_switch(plan: Plan, switch: int) -> None:
    """Make the bridge in the switch's network namespace (`switch`: a pid in it), and this machine's link to it."""
    run_ip(f"link add {plan.link} type veth peer name host netns {switch}")
    for command in _own(plan.own_ips, plan.link):
        run_ip(command)
    run_ip(f"link set {plan.link} up")
    _in_namespace(switch, "link add bridge type bridge", "link set bridge up", "link set lo up")
    _plug(switch, "host")


def connect_node(plan: Plan, node: str, switch: int, holder: int) -> None:
    """Plug a node (`holder`: a pid in its network namespace) into the switch and give it its addresses."""
    _in_namespace(switch, f"link add {node} type veth peer name eth0 netns {holder}")
    _plug(switch, node)
    _in_namespace(holder, *_own(plan.node_ips(node), "eth0"), "link set eth0 up", "link set lo up")


def connect_outsider(
    plan: Plan,
    addresses: Iterable[str],
    ranges: dict[str, tuple[str, ...]],
    *,
    switch: int,
    holder: int,
    nodes: dict[str, int],
) -> None:
    """Plug a host that is no node (`holder`: a pid in its network namespace) into the switch.

    Args:
        plan: Of the cluster; the host gets its `outsider_ips`.
        addresses: Which the host has besides.
        ranges: Pod ranges of each node; the host finds back to pods.
        switch: A pid in the switch's network namespace.
        holder: A pid in the host's.
        nodes: A pid in that of each node; they get routes to `addresses`.
    """
    _in_namespace(switch, f"link add outside type veth peer name eth0 netns {holder}")
    _plug(switch, "outside")
    besides = [ipaddress.ip_interface(address) for address in addresses]
    own = [f"address add {address} dev eth0{_NO_PROBE[address.version]}" for address in besides]
    back = [command for node, pods in ranges.items() for command in _routes(pods, plan.node_ips(node))]
    first = _own(plan.outsider_ips, "eth0")
    _in_namespace(holder, *first, "link set eth0 up", "link set lo up", *own, *back)
    for pid in nodes.values():
        _in_namespace(pid, *_routes(map(str, besides), plan.outsider_ips))


def unplug(switch: int, node: str) -> None:
    """Take a node's port of the switch (`switch`: a pid in its network namespace) down."""
    _in_namespace(switch, f"link set {node} down")


def plug(switch: int, node: str) -> None:
    """Take it up again."""
    _in_namespace(switch, f"link set {node} up")


def route_pods(plan: Plan, ranges: dict[str, tuple[str, ...]], holders: dict[str, int], *, between_nodes: bool) -> None:
    """Route each node's pod ranges by its node: on this machine, and on the other nodes if asked to."""
    for node, pods in ranges.items():
        commands = _routes(pods, plan.node_ips(node))
        for command in commands:
            run_ip(command)
        for other, holder in holders.items():
            if between_nodes and other != node:
                _in_namespace(holder, *commands)


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


# An IPv6 address cannot be used for a second or two, until nobody else was found to have it.
_NO_PROBE = {4: "", 6: " nodad"}
_NODE_PREFIX = {4: 24, 6: 64}


def _own(addresses: Iterable[str], link: str) -> list[str]:
    """Commands of `ip` that give a link its addresses on the nodes' network."""
    found = [ipaddress.ip_address(address) for address in addresses]
    return [f"address add {one}/{_NODE_PREFIX[one.version]} dev {link}{_NO_PROBE[one.version]}" for one in found]


def _routes(targets: Iterable[str], ways: Iterable[str]) -> list[str]:
    """Commands of `ip` that route each target by the way of its family; one without a way has none."""
    by_family = {ipaddress.ip_address(way).version: way for way in ways}
    networks = [_network(target) for target in targets]
    return [f"route replace {one} via {by_family[one.version]}" for one in networks if one.version in by_family]


def _plug(switch: int, port: str) -> None:
    _in_namespace(switch, f"link set {port} master bridge", f"link set {port} up")


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network:
    return ipaddress.ip_network(text, strict=False)
