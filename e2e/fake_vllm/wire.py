"""Connections between the processes of one service: listening, dialling with patience, and lines of JSON.

Whatever listens here survives bare connects and nonsense: probes and scanners must not end a server.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import ipaddress
import json
import logging
import os
import socket
import struct
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import argparse

    from securevllm.catalogue import Socket

log = logging.getLogger("fake_vllm")

_ATTEMPT = 3.0
"""Seconds for one handshake: the kernel repeats a lost SYN after one."""
_PAUSE = 0.1
_TELL = 5.0
_LINE = 1 << 20

_SIOCGIFADDR = 0x8915
_SIOCGIFNETMASK = 0x891B
_LAST_PORT = 65535

Address = tuple[str, int]


class StartError(Exception):
    """The process cannot become part of its group; the text says why."""


class LostError(Exception):
    """The other side of a connection is gone."""


@dataclass
class Link:
    """One connection."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter

    async def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        try:
            self.writer.write(json.dumps(message).encode() + b"\n")
            await self.writer.drain()
        except OSError as error:
            raise LostError(str(error)) from error

    async def receive(self) -> dict[str, Any]:
        """The next message.

        Raises:
            LostError: the connection ended, or what came is no message.
        """
        try:
            line = await self.reader.readline()
            message = json.loads(line) if line else None
        except (OSError, ValueError) as error:
            raise LostError(str(error)) from error
        if not isinstance(message, dict):
            raise LostError("closed" if message is None else "not a message")
        return message

    async def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send a message and wait for its answer."""
        await self.send(message)
        return await self.receive()

    async def ended(self) -> None:
        """Wait until the other side is gone."""
        with contextlib.suppress(OSError):
            while await self.reader.read(_LINE):
                pass

    def close(self) -> None:
        """End it without waiting."""
        self.writer.close()


Handler = Callable[[Link], Awaitable[None]]


def bound(host: str, first: int, last: int) -> socket.socket:
    """A socket bound to the first free port of a range, not yet listening.

    Args:
        host: an address; empty: all of both families.
        first: first port; 0: the kernel chooses.
        last: last port.

    Raises:
        StartError: no port is free, or the address is not this machine's.
    """
    everywhere = not host
    family = socket.AF_INET6 if (everywhere and socket.has_dualstack_ipv6()) or ":" in host else socket.AF_INET
    failure: OSError | None = None
    for port in range(first, last + 1):
        server = socket.socket(family, socket.SOCK_STREAM)
        try:
            server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            if family == socket.AF_INET6:
                server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, not everywhere)
            server.bind((host, port))
        except OSError as error:
            server.close()
            failure = error
            continue
        return server
    raise StartError(f"cannot bind {host or 'all interfaces'}, port {first}: {failure}")


async def serve(listener: socket.socket, handler: Handler) -> asyncio.Server:
    """Listen; each connection gets the handler, and is closed when that returns."""

    async def run(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(Link(reader, writer))
        except (LostError, KeyError, TypeError, ValueError) as error:
            log.debug("a connection ended: %s", error)
        except asyncio.CancelledError:
            log.debug("a connection ended with the process")
        finally:
            writer.close()

    return await asyncio.start_server(run, sock=listener, limit=_LINE)


async def reach(address: Address, what: str, deadline: float) -> Link:
    """Connect, again and again; says every few seconds what it waits for.

    Args:
        address: host and port.
        what: of whom, for the log.
        deadline: on ``time.monotonic()``.

    Raises:
        StartError: not reached in time.
    """
    told = 0.0
    while True:
        try:
            async with asyncio.timeout(_ATTEMPT):
                host = await resolved(address[0])
                return Link(*await asyncio.open_connection(host, address[1], limit=_LINE))
        except TimeoutError:
            why = "no answer"
        except OSError as error:
            # asyncio words a refusal in its own way; a resolver's numbers are negative.
            why = os.strerror(error.errno) if error.errno and error.errno > 0 else error.strerror or str(error)
        now = time.monotonic()
        if now > deadline:
            raise StartError(f"timed out waiting for {what} at {shown(address)}: {why}")
        if now - told > _TELL:
            told = now
            log.warning("waiting for %s at %s: %s", what, shown(address), why)
        await asyncio.sleep(_PAUSE)


async def resolved(host: str) -> str:
    """The name, or what FAKE_VLLM_DNS says: one question over UDP (RFC 1035), as a resolver would ask it.

    Raises:
        OSError: there is no such name.
    """
    server = os.environ.get("FAKE_VLLM_DNS")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host))
    if not server:
        return host
    name = b"".join(bytes([len(label)]) + label.encode() for label in host.rstrip(".").split("."))
    question = struct.pack("!6H", 1, 0x0100, 1, 0, 0, 0) + name + b"\0" + struct.pack("!2H", 1, 1)
    where, _, port = server.rpartition(":")
    loop = asyncio.get_running_loop()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
        one.setblocking(False)
        await loop.sock_connect(one, (where, int(port)))
        await loop.sock_sendall(one, question)
        answer = await loop.sock_recv(one, 512)
    # The first record follows the question: a pointer, type, class, TTL and length, and then the address.
    if len(answer) < len(question) + 16 or answer[7] == 0:
        raise socket.gaierror(socket.EAI_NONAME, f"no such name: {host}")
    return socket.inet_ntoa(answer[len(question) + 12 : len(question) + 16])


def shown(address: Address) -> str:
    """``host:port``."""
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def place(row: Socket, args: argparse.Namespace, env: Mapping[str, str]) -> str:
    """Address to which a row of the catalogue is bound; empty: all interfaces.

    Raises:
        StartError: an interface does not exist.
    """
    bind = row.bind
    if bind.startswith("--"):
        bind = getattr(args, bind[2:].replace("-", "_")) or ("" if row.when == "api" else "127.0.0.1")
    elif bind == "address of the interface":
        bind = _interface(row.knob, env)
    elif bind in {"VLLM_HOST_IP", "get_ip()"}:
        bind = own_address(env)
    elif bind.isupper():
        bind = env.get(bind, "localhost")
    everywhere = bind in {"all interfaces", "0.0.0.0", "", "*"}  # noqa: S104 - as the real one does
    if everywhere:
        return own_address(env) if env.get("FAKE_VLLM_CONFINED") == "1" else ("0.0.0.0" if bind == "0.0.0.0" else "")  # noqa: S104
    return _resolved(bind)


def own_address(env: Mapping[str, str]) -> str:
    """VLLM_HOST_IP, or the address of the default route; no packet is sent to find it."""
    if given := env.get("VLLM_HOST_IP"):
        return given
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))
        except OSError:
            return "127.0.0.1"
        address: str = probe.getsockname()[0]
        return address


def _resolved(host: str) -> str:
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise StartError(f"cannot bind {host}: {error.strerror or error}") from error


def _interface(knob: str, env: Mapping[str, str]) -> str:
    """Address of the interface that a variable names: VLLM_HOST_IP where that is one of its addresses."""
    own = own_address(env)
    name = env.get(knob, "").split(",")[0]
    if name in {"", "all"}:
        return own
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", name.encode()[:15])
        try:
            address, mask = (
                socket.inet_ntoa(fcntl.ioctl(probe.fileno(), code, request)[20:24])
                for code in (_SIOCGIFADDR, _SIOCGIFNETMASK)
            )
        except OSError as error:
            raise StartError(f"{knob}={name}: {error.strerror}") from error
    network = ipaddress.ip_network(f"{address}/{mask}", strict=False)
    return own if ipaddress.ip_address(own) in network else address
