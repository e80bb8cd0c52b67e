"""Address ranges that "the internet" never means: they are refused in a spec, and carved out of wider ranges.

Source: the IANA special-purpose address registries (RFC 6890), and the prefixes through which an IPv6 pod would reach
IPv4 addresses.
"""

from __future__ import annotations

import ipaddress

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

IPV4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
"""No packet carries such an address (a socket that names one sends IPv4), and the API server refuses it in a policy."""

NOT_PUBLIC: tuple[Network, ...] = tuple(
    map(
        ipaddress.ip_network,
        (
            "0.0.0.0/8",
            "10.0.0.0/8",
            "100.64.0.0/10",  # shared (RFC 6598)
            "127.0.0.0/8",
            "169.254.0.0/16",  # link-local, with the metadata services
            "172.16.0.0/12",
            "192.0.0.0/24",
            "192.168.0.0/16",
            "198.18.0.0/15",
            "224.0.0.0/4",  # multicast
            "240.0.0.0/4",  # reserved; some clusters number their pods from it
            "::/127",
            str(IPV4_MAPPED),
            "64:ff9b::/96",  # NAT64
            "64:ff9b:1::/48",  # NAT64, local use
            "2001::/32",  # Teredo
            "2002::/16",  # 6to4
            "fc00::/7",
            "fe80::/10",
            "ff00::/8",
        ),
    )
)


def is_public(network: Network) -> bool:
    """Whether some part of the range is public."""
    return not any(
        network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]  # same version
        for other in NOT_PUBLIC
    )
