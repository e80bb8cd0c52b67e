"""A tiny DNS server (UDP, A and AAAA) whose answer tests change; it records the names that were asked for."""

from __future__ import annotations

import socketserver
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address

NOERROR, SERVFAIL, NXDOMAIN = 0, 2, 3
_TYPE_A = 1


class DnsServer(socketserver.ThreadingUDPServer):
    """``addresses`` answer queries of type A; other types and an empty list get no records."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.addresses: list[str] = []
        self.code = NOERROR
        self.asked: list[str] = []

    @property
    def port(self) -> int:
        """Where it listens."""
        return int(self.server_address[1])


class _Handler(socketserver.BaseRequestHandler):
    server: DnsServer

    def handle(self) -> None:
        query, sock = self.request
        labels, at = [], 12
        while query[at]:
            labels.append(query[at + 1 : at + 1 + query[at]].decode())
            at += query[at] + 1
        question = query[12 : at + 5]
        (kind,) = struct.unpack_from("!H", query, at + 1)
        self.server.asked.append(".".join(labels))
        answers = self.server.addresses if kind == _TYPE_A and self.server.code == NOERROR else []
        records = b"".join(
            b"\xc0\x0c" + struct.pack("!HHIH", _TYPE_A, 1, 1, 4) + IPv4Address(address).packed for address in answers
        )
        header = query[:2] + struct.pack("!HHHHH", 0x8180 | self.server.code, 1, len(answers), 0, 0)
        sock.sendto(header + question + records, self.client_address)


@contextmanager
def serving() -> Iterator[DnsServer]:
    """A running server."""
    with DnsServer() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
