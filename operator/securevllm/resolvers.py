"""Whether the DNS servers of the settings can be those that pods use: pure, for a look at the start.

A wrong setting closes DNS for every engine and gateway, and shows much later, as a gateway that finds no engine.
"""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator

from securevllm.context import CidrPeer, Context


def unnamed(resolv_conf: str, context: Context) -> Iterator[str]:
    """Nameservers of a pod's resolv.conf that the settings cannot mean, each with what to do.

    A cluster address is a Service, and which pods stand behind it is not seen here. A link-local or loopback address is
    a cache on the node (NodeLocal DNSCache: 169.254.20.10): no pod, so only a range can name it.

    Args:
        resolv_conf: content of the operator's own ``/etc/resolv.conf`` (``dnsPolicy: ClusterFirst``, as every pod).
        context: with the DNS peers of the settings.
    """
    ranges = [ipaddress.ip_network(peer.cidr) for peer in context.dns if isinstance(peer, CidrPeer)]
    for line in resolv_conf.splitlines():
        keyword, _, rest = line.partition("#")[0].strip().partition(" ")
        if keyword != "nameserver":
            continue
        try:
            address = ipaddress.ip_address(rest.strip().partition("%")[0])
        except ValueError:
            continue
        if address.is_link_local and not any(address in known for known in ranges):
            yield (
                f"pods ask the DNS server {address}, a cache on their node, which no policy will let them reach:"
                f" --dns-cidr={address}/{address.max_prefixlen} (chart: dns.peers, {{cidr: ...}})"
            )
