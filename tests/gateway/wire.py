"""Sends bytes to a gateway and reads what comes back, without a client library in between."""

from __future__ import annotations

import contextlib
import functools
import re
import socket
import ssl
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

from tests.gateway.attacks import ENGINE_KEY, KEY, Attack

if TYPE_CHECKING:
    from securevllm.render.envoy import AllowedRoute
    from tests.gateway.engine import Engine, Seen

_PATIENCE_SECONDS = 3.0
_MORE_SECONDS = 1.0
_PARALLEL = 24


def connect(
    port: int, *, tls: bool = True, alpn: str = "http/1.1", timeout: float = 5, host: str = "127.0.0.1"
) -> socket.socket:
    """A connection to this machine; the certificate is not verified."""
    plain = socket.create_connection((host, port), timeout=timeout)
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    if not tls:
        return plain
    return _context(alpn).wrap_socket(plain, server_hostname="gateway")


@functools.cache
def _context(alpn: str) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    context.set_alpn_protocols([alpn])
    return context


def exchange(
    port: int,
    data: bytes,
    *,
    tls: bool = True,
    alpn: str = "http/1.1",
    patience: float = _PATIENCE_SECONDS,
    more: float = _MORE_SECONDS,
) -> bytes:
    """Send, and read all that comes back.

    Ends when the peer closes or says that it will, after ``patience`` seconds without an answer, or after ``more``
    seconds of silence that follow one.
    """
    received = bytearray()
    with connect(port, tls=tls, alpn=alpn) as sock, contextlib.suppress(OSError):
        sock.settimeout(patience)
        with contextlib.suppress(OSError):
            sock.sendall(data)
        while chunk := sock.recv(65536):
            received += chunk
            if _is_last(bytes(received)):
                break
            sock.settimeout(more)
    return bytes(received)


def request(method: str, path: str, *headers: str, key: str | None = KEY, body: bytes = b"") -> bytes:
    """An ordinary request, with a client key and the length of its body."""
    fields = ["host: gateway", *headers]
    if key is not None:
        fields.append(f"authorization: Bearer {key}")
    if body:
        fields.append(f"content-length: {len(body)}")
    return "\r\n".join((f"{method} {path} HTTP/1.1", *fields, "", "")).encode() + body


class Client:
    """Asks one request after the other on a keep-alive connection, and reconnects when it was closed."""

    def __init__(self, port: int, *, tls: bool = True) -> None:
        self._port, self._tls = port, tls
        self._socket: socket.socket | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connection, if there is one."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def ask(self, request: bytes) -> bytes:
        """Send one request and read its answer (content-length framing).

        Raises:
            OSError: the connection was closed before the answer was complete.
        """
        if self._socket is None:
            self._socket = connect(self._port, tls=self._tls)
        self._socket.sendall(request)
        answer = b""
        while b"\r\n\r\n" not in answer:
            answer += self._receive()
        head, _, body = answer.partition(b"\r\n\r\n")
        length = re.search(rb"content-length: (\d+)", head)
        while length and not request.startswith(b"HEAD ") and len(body) < int(length[1]):
            body += self._receive()
        if b"connection: close" in head:
            self.close()
        return head + b"\r\n\r\n" + body

    def _receive(self) -> bytes:
        data = self._socket.recv(65536) if self._socket else b""
        if not data:
            self.close()
            raise ConnectionResetError("closed before the answer was complete")
        return data


def status_of(answer: bytes) -> int:
    """Status code of the first answer; 0 when there is none."""
    fields = answer.split(b" ", 2)
    return int(fields[1]) if answer.startswith(b"HTTP/") and len(fields) > 1 else 0


def _is_last(received: bytes) -> bool:
    """Whether the last answer is complete and says ``connection: close``; Envoy then waits a second for our end."""
    head, _, rest = received.partition(b"\r\n\r\n")
    while length := re.search(rb"content-length: (\d+)", head):
        size = int(length[1])
        if len(rest) < size:
            return False
        if b"connection: close" in head:
            return True
        head, _, rest = rest[size:].partition(b"\r\n\r\n")
    return False


@dataclass(frozen=True)
class Outcome:
    """What became of an attack."""

    answer: bytes
    seen: tuple[Seen, ...]


def run(
    attacks: Sequence[Attack], port: int, engine: Engine, *, tls: bool = True, alpn: str = "http/1.1"
) -> tuple[list[Outcome], list[Seen]]:
    """Run all attacks, some at a time.

    Returns:
        One outcome per attack, and the requests at the engine that carry no attack's id.
    """
    engine.clear()
    ids = [f"{number:04d}" for number in range(len(attacks))]
    payloads = [attack.data.replace(b"@ID@", name.encode()) for attack, name in zip(attacks, ids, strict=True)]
    with ThreadPoolExecutor(_PARALLEL) as pool:
        answers = list(pool.map(lambda data: exchange(port, data, tls=tls, alpn=alpn), payloads))
    seen = list(engine.seen)
    outcomes = [
        Outcome(answer, tuple(one for one in seen if one.all("x-attack")[:1] == [name]))
        for answer, name in zip(answers, ids, strict=True)
    ]
    return outcomes, [one for one in seen if one.all("x-attack")[:1] not in [[name] for name in ids]]


_ENGINE_MAY_SEE = frozenset(
    {
        "host",
        "authorization",
        "x-request-id",
        "x-gateway-client",
        "x-attack",
        "x-a",
        "content-length",
        "transfer-encoding",
        "content-type",
        "accept",
        "user-agent",
        "origin",
        "expect",
        "x-forwarded-uri",  # no server of the stack reads it
        "http2-settings",  # meaningless without the upgrade, which is gone
    }
)


def violations(seen: Seen, allowed: Sequence[AllowedRoute], clients: Sequence[str] = ("alice", "bob")) -> list[str]:
    """What is wrong with a request that reached the engine; an independent reading of the allowlist."""
    found = []
    if not any(_allows(route, seen) for route in allowed):
        found.append(f"{seen.method} {seen.path} is not allowed")
    if seen.path != seen.target.partition("?")[0]:
        found.append(f"{seen.target} is read differently by the gateway and by the engine")
    if seen.all("authorization") != [f"Bearer {ENGINE_KEY}"]:
        found.append(f"authorization is {seen.all('authorization')}")
    if seen.all("host") != ["vllm.internal"]:
        found.append(f"host is {seen.all('host')}")
    if len(client := seen.all("x-gateway-client")) != 1 or client[0] not in clients:
        found.append(f"client is {client}")
    if len(identity := seen.all("x-request-id")) != 1 or "forged" in identity[0]:
        found.append(f"request id is {identity}")
    found += [f"header {name} got through" for name, _ in seen.headers if name not in _ENGINE_MAY_SEE]
    found += [f"{name}: {value!r}" for name, value in seen.headers if "forged" in value or not value.isprintable()]
    return found


def _allows(route: AllowedRoute, seen: Seen) -> bool:
    if route.http_method != seen.method:
        return False
    want, got = route.path.split("/"), seen.path.split("/")
    return len(want) == len(got) and all(
        part == other or (part.startswith("{") and _plain(other)) for part, other in zip(want, got, strict=True)
    )


def _plain(segment: str) -> bool:
    return 1 <= len(segment) <= 128 and segment.isascii() and segment.replace("_", "").replace("-", "a").isalnum()
