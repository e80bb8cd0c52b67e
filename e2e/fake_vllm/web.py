"""A small HTTP/1.1 server and client of the standard library: enough for vLLM's clients, Envoy and vllm-router."""

from __future__ import annotations

import asyncio
import contextlib
import http
import json
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

from e2e.fake_vllm.wire import resolved

if TYPE_CHECKING:
    import socket

_HEAD = 4 << 20
"""Bytes of a head: vLLM's --h11-max-incomplete-event-size."""
_BODY = 1 << 30


class BadRequestError(Exception):
    """What came is not HTTP, or too much of it."""


@dataclass(frozen=True)
class Request:
    """One request; header names are in lower case, the path is percent-decoded, as the real server sees it."""

    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes


@dataclass(frozen=True)
class Answer:
    """One answer: a body, or parts that are sent as they come (chunked)."""

    status: int = 200
    body: bytes = b""
    content_type: str = "application/json"
    headers: Mapping[str, str] = field(default_factory=dict)
    parts: AsyncIterator[bytes] | None = None


Handler = Callable[[Request], Awaitable[Answer]]


def as_json(value: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
    """An answer with a JSON body."""
    return Answer(status, json.dumps(value).encode(), headers=headers or {})


class Server:
    """Serves connections until it is closed; `active` counts requests that are being answered."""

    def __init__(self, handler: Handler) -> None:
        self.active = 0
        self._handler = handler
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, listener: socket.socket) -> None:
        """Listen on a bound socket."""
        self._server = await asyncio.start_server(self._connection, sock=listener, limit=_HEAD)

    def close(self) -> None:
        """Listen no more and cut what is open."""
        if self._server is not None:
            self._server.close()
        for writer in self._writers:
            writer.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while await self._exchange(reader, writer):
                pass
        except (OSError, asyncio.IncompleteReadError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        """One request and its answer; whether the connection goes on."""
        try:
            request = await _request(reader, writer)
        except (BadRequestError, asyncio.LimitOverrunError, ValueError):
            await _answer(writer, Answer(400, b"Invalid HTTP request received.", "text/plain"), keep=False)
            return False
        if request is None:
            return False
        keep = request.headers.get("connection", "").lower() != "close"
        self.active += 1
        try:
            await _answer(writer, await self._handler(request), keep=keep)
        finally:
            self.active -= 1
        return keep


async def _request(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> Request | None:
    try:
        head = await reader.readuntil(b"\r\n\r\n")
    except asyncio.IncompleteReadError as error:
        if error.partial.strip():
            raise BadRequestError from error
        return None
    first, *lines = head[:-4].decode("latin-1").split("\r\n")
    method, target, version = first.split(" ")
    if version not in {"HTTP/1.1", "HTTP/1.0"}:
        raise BadRequestError
    headers = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    if version == "HTTP/1.0":
        headers.setdefault("connection", "close")
    if headers.get("expect", "").lower() == "100-continue":
        writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
    body = await _body(reader, headers)
    return Request(method, unquote(target.partition("?")[0]), headers, body)


async def _body(reader: asyncio.StreamReader, headers: Mapping[str, str]) -> bytes:
    if "chunked" in headers.get("transfer-encoding", "").lower():
        parts = []
        while size := int((await reader.readuntil(b"\r\n")).partition(b";")[0], 16):
            parts.append(await reader.readexactly(size))
            await reader.readexactly(2)
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass
        return b"".join(parts)
    length = int(headers.get("content-length", "0"))
    if not 0 <= length <= _BODY:
        raise BadRequestError
    return await reader.readexactly(length)


async def _answer(writer: asyncio.StreamWriter, answer: Answer, *, keep: bool) -> None:
    reason = http.HTTPStatus(answer.status).phrase
    headers = {"content-type": answer.content_type, "server": "uvicorn"} | dict(answer.headers)
    if answer.status == http.HTTPStatus.SWITCHING_PROTOCOLS:
        headers = dict(answer.headers)
    elif answer.parts is None:
        headers["content-length"] = str(len(answer.body))
    else:
        headers["transfer-encoding"] = "chunked"
    if not keep:
        headers["connection"] = "close"
    lines = [f"HTTP/1.1 {answer.status} {reason}", *(f"{name}: {value}" for name, value in headers.items())]
    writer.write("\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + answer.body)
    if answer.parts is not None:
        async for part in answer.parts:
            writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
    await writer.drain()


async def ask(method: str, host: str, port: int, path: str, body: Any = None) -> Any:
    """One request to another process; the decoded JSON of its answer.

    Raises:
        OSError: not reached, or not a success.
    """
    content = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection(await resolved(host), port)
    try:
        lines = (f"{method} {path} HTTP/1.1", f"host: {host}:{port}", "connection: close",
                 f"content-length: {len(content)}", "content-type: application/json", "", "")  # fmt: skip
        writer.write("\r\n".join(lines).encode() + content)
        await writer.drain()
        head_, _, answer = (await reader.read()).partition(b"\r\n\r\n")
    finally:
        with contextlib.suppress(OSError):
            writer.close()
    if b" 200 " not in head_.partition(b"\r\n")[0]:
        raise ConnectionError(head_.partition(b"\r\n")[0].decode(errors="replace") or "no answer")
    return json.loads(answer)
