"""Peers of the spec as plain data, with what no rule may mean carved out."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

from securevllm.api.addresses import IPV4_MAPPED, NOT_PUBLIC, Network
from securevllm.context import CidrPeer, Context, Peer, PodPeer, Selector

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.placement import LabelSelector


def _network(text: str) -> Network:
    return ipaddress.ip_network(text, strict=False)


def outside_part(cidr: str, context: Context) -> CidrPeer | None:
    """The part of a range that is not the cluster's own: engines differ on an ipBlock that holds pods or nodes."""
    return _without(cidr, map(_network, context.cluster_ranges))


def public_part(cidr: str, context: Context) -> CidrPeer | None:
    """The part of a range that is neither private, link-local, shared nor the cluster's own; None: nothing is left."""
    return _without(cidr, (*NOT_PUBLIC, *map(_network, context.cluster_ranges)))


def _without(cidr: str, ranges: Iterable[Network]) -> CidrPeer | None:
    """The part of a range that is in none of the others; None: nothing is left."""
    network = _network(cidr)
    excluded = []
    for carved in ranges:
        if carved.version != network.version or carved == IPV4_MAPPED:
            continue
        if network.subnet_of(carved):  # type: ignore[arg-type]  # same version, checked above
            return None
        if carved.subnet_of(network):  # type: ignore[arg-type]  # same version, checked above
            excluded.append(carved)
    unique = ipaddress.collapse_addresses(excluded)  # type: ignore[type-var]  # one version only
    return CidrPeer(str(network), tuple(str(carved) for carved in unique))


def internet(context: Context) -> tuple[CidrPeer, ...]:
    """Every public address, both families."""
    return tuple(part for cidr in ("0.0.0.0/0", "::/0") if (part := public_part(cidr, context)) is not None)


def selector(labels: LabelSelector | None) -> Selector | None:
    """A label selector of the spec as plain data; None stays None."""
    if labels is None:
        return None
    return Selector(
        labels=tuple(sorted(labels.match_labels.items())),
        expressions=tuple((item.key, item.operator, item.values) for item in labels.match_expressions),
    )


def peers_of(peers: api.Peers, part: Callable[[str, Context], CidrPeer | None], context: Context) -> tuple[Peer, ...]:
    """Peers of the spec, pods first. Neither selector: only the addresses count, and of them only the part."""
    found: list[Peer] = []
    if peers.pod_selector is not None or peers.namespace_selector is not None:
        found.append(PodPeer(selector(peers.namespace_selector), selector(peers.pod_selector)))
    found += [kept for cidr in peers.cidrs if (kept := part(cidr, context)) is not None]
    return tuple(found)
