"""One way to connect for gate, canary and prober: connect, send nothing, close with a reset.

A byte more could end an engine: vLLM's ZMQ sockets take what arrives for frames and unpack it without a try. A
connection that is held can hang NCCL's accept. So the socket is closed at once, and with a reset (SO_LINGER 0): it
leaves no TIME_WAIT behind either.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import socket
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Self

from securevllm.proof.wire import BLOCKED, Reach

_LINGER_RESET = struct.pack("ii", 1, 0)

# What a rejected packet makes of a connect: a reset (Linux calls it ECONNREFUSED), ICMP port unreachable, host
# unreachable or prohibited; EPERM and EACCES come from a filter on the own machine.
_REFUSALS = frozenset({errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.EPERM, errno.EACCES, errno.ECONNABORTED})
# Only after a handshake: a proxy that takes every connection and ends it at once.
_ENDED = frozenset({errno.ECONNRESET, errno.EPIPE})
_NO_ROUTES = frozenset({errno.ENETUNREACH, errno.EAFNOSUPPORT})


async def dial(address: str, port: int, seconds: float) -> Reach:
    """Try a handshake.

    Args:
        address: an IP address.
        port: of the target.
        seconds: after which no answer is silence.
    """
    family = socket.AF_INET6 if ipaddress.ip_address(address).version == 6 else socket.AF_INET  # noqa: PLR2004
    try:
        with socket.socket(family, socket.SOCK_STREAM) as connection:
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_RESET)
            try:
                await asyncio.wait_for(asyncio.get_running_loop().sock_connect(connection, (address, port)), seconds)
            except TimeoutError:  # the kernel's own ETIMEDOUT is the same class
                return _afterwards(connection)
            return Reach.OPEN
    except OSError as error:
        return _named(error.errno)


def _afterwards(connection: socket.socket) -> Reach:
    """What the kernel says when time is up: on a busy machine this process may have its turn long after an answer."""
    if error := connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
        return _named(error)
    with contextlib.suppress(OSError):
        connection.getpeername()
        return Reach.OPEN
    return Reach.SILENT


def _named(error: int | None) -> Reach:
    if error in _ENDED:
        return Reach.OPEN
    if error in _REFUSALS:
        return Reach.REFUSED
    if error == errno.ETIMEDOUT:
        return Reach.SILENT
    return Reach.NO_ROUTE if error in _NO_ROUTES else Reach.NO_ATTEMPT


def has_ipv6(table: Path = Path("/proc/net/if_inet6")) -> bool:
    """Whether this machine has an IPv6 address that others may reach, also one that cannot be used yet."""
    try:
        rows = [line.split() for line in table.read_text(encoding="ascii").splitlines()]
    except FileNotFoundError:  # a kernel without it
        return False
    return any(scope == "00" for _, _, _, scope, *_ in rows)


async def knock(address: str, port: int, *, tries: int, every: float, seconds: float) -> Reach:
    """Try so many handshakes, begun one after another; one that completes is enough, and all have to be blocked.

    Args:
        address: an IP address.
        port: of the target.
        tries: how many.
        every: seconds between the beginnings of two.
        seconds: after which no answer is silence: of all of them, so that the first has most.
    """

    async def one(after: float) -> Reach:
        await asyncio.sleep(after)
        return await dial(address, port, seconds - after)

    attempts = [asyncio.create_task(one(number * every)) for number in range(tries)]
    found = list[Reach]()
    try:
        for attempt in asyncio.as_completed(attempts):
            found.append(await attempt)
            if found[-1] is Reach.OPEN:
                return Reach.OPEN
    finally:
        for left in attempts:
            left.cancel()
        await asyncio.gather(*attempts, return_exceptions=True)
    return next((reach for reach in found if reach not in BLOCKED), found[-1])


async def addresses(name: str, seconds: float) -> tuple[str, ...]:
    """The addresses of a name; an address is its own.

    Raises:
        OSError: it does not resolve, or not in time.
    """
    loop = asyncio.get_running_loop()
    found = await asyncio.wait_for(loop.getaddrinfo(name, None, type=socket.SOCK_STREAM), seconds)
    return tuple(sorted({str(entry[4][0]) for entry in found}))


def accepting(address: str, port: int) -> socket.socket:
    """A listening socket; for an IPv6 wildcard, of both families.

    Raises:
        OSError: it cannot listen there.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if address == "::":
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind((address, port))
        listener.listen(128)
        listener.setblocking(False)
    except OSError:
        listener.close()
        raise
    return listener


class Listener:
    """Accepts, says something or nothing, and closes: known to listen, and nothing can be done with it.

    Args:
        sockets: as ``accepting`` makes them; closed at the end.
        greeting: what every peer is told; nothing is ever read from one.
    """

    def __init__(self, sockets: Sequence[socket.socket], greeting: Callable[[], bytes] = bytes) -> None:
        self._sockets, self._greeting = sockets, greeting
        self._servers: list[asyncio.Server] = []

    async def __aenter__(self) -> Self:
        for listener in self._sockets:
            self._servers.append(await asyncio.start_server(self._answer, sock=listener))
        return self

    async def __aexit__(self, *_: object) -> None:
        for server in self._servers:
            server.close()

    async def _answer(self, _: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if said := self._greeting():
            with contextlib.suppress(OSError):
                writer.write(said)
                await writer.drain()
                writer.close()
        else:
            writer.transport.abort()


async def greeting(address: str, port: int, seconds: float, limit: int = 512) -> bytes:
    """What a ``Listener`` says to those who connect; at most one line of ``limit`` bytes.

    Raises:
        OSError: no answer, or not in time.
    """
    async with asyncio.timeout(seconds):
        reader, writer = await asyncio.open_connection(address, port, limit=limit)
        try:
            return await reader.readline()
        except ValueError as error:
            raise OSError(f"more than {limit} bytes") from error
        finally:
            writer.transport.abort()
