"""A DNS server that answers for Services from what the hollow node knows, in place of cluster DNS.

A records of `<service>.<namespace>.svc.cluster.local` and of a pod's `<hostname>.<subdomain>...` name; NXDOMAIN for
unknown names, no data for other types. It resolves a Service with a cluster IP to pod addresses as well: there is no
kube-proxy, so its ports are the pods' ports.
"""

from __future__ import annotations

import asyncio
import ipaddress
import struct
from collections.abc import Callable, Sequence
from typing import Any, cast

Lookup = Callable[[str], Sequence[str] | None]
"""Lower-case name without trailing dot -> IPv4 addresses; None when there is no such name."""

_HEADER = struct.Struct("!6H")
_TYPE_A, _CLASS_IN = 1, 1
_TTL_SECONDS = 1
_RESPONSE, _AUTHORITATIVE, _RECURSION_DESIRED = 0x8000, 0x0400, 0x0100
_NO_ERROR, _NAME_ERROR = 0, 3


class Responder(asyncio.DatagramProtocol):
    """Answers over UDP."""

    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._transport: asyncio.DatagramTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Remember where answers go out."""
        # Not every loop's datagram transport is a subclass.
        self._transport = cast("asyncio.DatagramTransport", transport)

    def datagram_received(self, data: bytes, addr: tuple[str | Any, int]) -> None:
        """Answer one query; what cannot be parsed is dropped."""
        if self._transport and (reply := answer(data, self._lookup)):
            self._transport.sendto(reply, addr)


def answer(query: bytes, lookup: Lookup) -> bytes | None:
    """Return the response to a query with one question (RFC 1035), or None when it is not one."""
    try:
        identifier, flags, questions, *_ = _HEADER.unpack_from(query)
        labels, offset = [], _HEADER.size
        while length := query[offset]:
            labels.append(query[offset + 1 : offset + 1 + length].decode("ascii"))
            offset += 1 + length
        kind, klass = struct.unpack_from("!2H", query, offset + 1)
    except (struct.error, IndexError, UnicodeDecodeError):
        return None
    if questions != 1 or flags & _RESPONSE:
        return None
    addresses = lookup(".".join(labels).lower())
    records = b""
    count = 0
    if addresses and (kind, klass) == (_TYPE_A, _CLASS_IN):
        count = len(addresses)
        for address in addresses:
            # 0xC00C: the name of the question.
            records += (
                struct.pack("!3HIH", 0xC00C, kind, klass, _TTL_SECONDS, 4) + ipaddress.IPv4Address(address).packed
            )
    code = _NAME_ERROR if addresses is None else _NO_ERROR
    header = _HEADER.pack(identifier, _RESPONSE | _AUTHORITATIVE | (flags & _RECURSION_DESIRED) | code, 1, count, 0, 0)
    return header + query[_HEADER.size : offset + 5] + records
