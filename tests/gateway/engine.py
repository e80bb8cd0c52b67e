"""A stand-in engine that answers 200 to everything and records every request as bytes on the wire showed it.

It reads HTTP/1.1 strictly enough to see a smuggled request as a request of its own, and percent-decodes the path as
uvicorn does. It refuses nothing: what reaches it is what the gateway let through.

* a JSON body ``{"stream": N, "interval": S}`` is answered with N server-sent events, S seconds apart
* ``upgrade: websocket`` is answered with 101, then bytes are echoed
* every answer carries headers that a gateway must not pass on
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from urllib.parse import unquote_to_bytes

from tests.gateway.envoy_process import free_ports

_WEBSOCKET_GUID = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
LEAKY_HEADERS = {
    "server": "uvicorn",
    "x-request-id": "___prefill_addr_10.0.0.1:14579",
    "x-securevllm-gateway": "forged",
}


@dataclass(frozen=True)
class Seen:
    """One request at the engine.

    Attributes:
        method: as it came.
        target: the raw request target.
        headers: names in lower case, in order, repetitions kept.
        body: what came of it.
        complete: the body was complete.
        address: local address that it came to.
    """

    method: str
    target: str
    headers: tuple[tuple[str, str], ...]
    body: bytes
    complete: bool
    address: str

    @property
    def path(self) -> str:
        """What uvicorn hands to the application: decoded, without the query."""
        return unquote_to_bytes(self.target.partition("?")[0]).decode("latin-1")

    def all(self, name: str) -> list[str]:
        """All values of a header."""
        return [value for key, value in self.headers if key == name]


class Engine:
    """The server. ``seen`` grows; ``healthy`` decides what /health answers; ``events`` counts what was streamed."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.seen: list[Seen] = []
        self.healthy = True
        self.aborted = 0
        self.events = 0

    def clear(self) -> None:
        """Forget what was seen."""
        self.seen.clear()

    async def handle(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        address = writer.get_extra_info("sockname")[0]
        try:
            while True:
                head = await reader.readuntil(b"\r\n\r\n")
                line, *fields = head[:-4].decode("latin-1").split("\r\n")
                method, _, rest = line.partition(" ")
                pairs = (field.partition(":") for field in fields)
                headers = tuple((name.lower(), value.strip()) for name, _, value in pairs)
                if rest.startswith("/health ") and not any(name == "x-request-id" for name, _ in headers):
                    writer.write(b"HTTP/1.1 %d x\r\ncontent-length: 0\r\n\r\n" % (200 if self.healthy else 503))
                    continue
                body, complete = await _body(reader, dict(headers))
                seen = Seen(method, rest.rpartition(" ")[0], headers, body, complete, address)
                self.seen.append(seen)
                if not complete:
                    return
                await self._answer(seen, reader, writer)
        except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
            return
        finally:
            writer.close()

    async def _answer(self, seen: Seen, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        extra = "".join(f"{name}: {value}\r\n" for name, value in LEAKY_HEADERS.items())
        if "websocket" in seen.all("upgrade"):
            digest = hashlib.sha1(seen.all("sec-websocket-key")[0].encode() + _WEBSOCKET_GUID)  # noqa: S324 - RFC 6455
            accept = base64.b64encode(digest.digest()).decode()
            upgraded = "HTTP/1.1 101 x\r\nupgrade: websocket\r\nconnection: upgrade\r\n"
            writer.write(f"{upgraded}sec-websocket-accept: {accept}\r\n\r\n".encode())
            while data := await reader.read(65536):
                writer.write(data)
            return
        try:
            wanted = json.loads(seen.body)
        except ValueError:
            wanted = {}
        if not isinstance(wanted, dict) or "stream" not in wanted:
            text = json.dumps({"address": seen.address})
            writer.write(f"HTTP/1.1 200 OK\r\n{extra}content-length: {len(text)}\r\n\r\n{text}".encode())
            return
        writer.write(
            f"HTTP/1.1 200 OK\r\n{extra}content-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n".encode()
        )
        for number in range(wanted["stream"]):
            event = f"data: {number}\n\n"
            writer.write(f"{len(event):x}\r\n{event}\r\n".encode())
            self.events += 1
            await writer.drain()
            if writer.is_closing() or reader.at_eof():
                self.aborted += 1
                raise ConnectionResetError
            await asyncio.sleep(wanted.get("interval", 0))
        writer.write(b"0\r\n\r\n")


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> tuple[bytes, bool]:
    got = bytearray()
    try:
        if headers.get("transfer-encoding", "").lower() == "chunked":
            while size := int((await reader.readline()).split(b";")[0], 16):
                got += (await reader.readexactly(size + 2))[:-2]
            await reader.readline()
        else:
            left = int(headers.get("content-length", "0"))
            while left:
                data = await reader.read(min(left, 1 << 16))
                if not data:
                    return bytes(got), False
                got += data
                left -= len(data)
    except (asyncio.IncompleteReadError, ValueError):
        return bytes(got), False
    return bytes(got), True


@contextmanager
def serving(*, hosts: tuple[str, ...] = ("127.0.0.1",), port: int = 0) -> Iterator[Engine]:
    """An engine on a port of each loopback address (0: a free one), in a thread of its own."""
    (port,) = (port,) if port else free_ports(1)
    engine = Engine(port)
    loop = asyncio.new_event_loop()
    stop = asyncio.Event()
    started = threading.Event()

    async def serve() -> None:
        servers = [await asyncio.start_server(engine.handle, host, port, limit=1 << 20) for host in hosts]
        started.set()
        await stop.wait()
        for server in servers:
            server.close()
        rest = asyncio.all_tasks() - {asyncio.current_task()}
        for task in rest:
            task.cancel()
        await asyncio.gather(*rest, return_exceptions=True)

    def run() -> None:
        asyncio.set_event_loop(loop)
        loop.run_until_complete(serve())
        loop.close()

    thread = threading.Thread(target=run, name="engine")
    thread.start()
    started.wait(5)
    try:
        yield engine
    finally:
        loop.call_soon_threadsafe(stop.set)
        thread.join(10)
