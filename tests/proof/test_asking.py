"""What gateways are asked, over real sockets: a server that answers as told, with TLS and without."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from securevllm import certs
from securevllm.gateways import Pod
from securevllm.proof.asking import Asking, HttpAsks, judged, trusting, unanswered
from securevllm.proof.targets import Request
from securevllm.proof.verdict import Asked
from securevllm.render.envoy import MARKER_HEADER

KEY = "prober-key-0123456789"
SLEEP, BARE = Request("GET", "/sleep"), Request("GET", "/v1/models", keyed=False)


@pytest.mark.parametrize(
    ("status", "marked", "request_", "found"),
    [
        (403, True, SLEEP, Asked.REFUSED),
        (404, True, SLEEP, Asked.REFUSED),
        (401, True, BARE, Asked.REFUSED),
        # The gateway does not know the key yet: only authentication was measured.
        (401, True, SLEEP, Asked.UNCLEAR),
        (503, True, SLEEP, Asked.UNCLEAR),
        (429, True, SLEEP, Asked.UNCLEAR),
        (200, True, SLEEP, Asked.UNCLEAR),
        # Without the marker the answer came from an engine, whatever it says.
        (200, False, SLEEP, Asked.PASSED),
        (404, False, SLEEP, Asked.PASSED),
        (405, False, SLEEP, Asked.PASSED),
    ],
)
def test_what_an_answer_says(status: int, marked: bool, request_: Request, found: Asked) -> None:
    assert judged(status, request_, Asking(1, "", KEY, ()), marked=marked) is found


def test_where_nobody_needs_a_key_401_is_a_refusal() -> None:
    assert judged(401, SLEEP, Asking(1, "", "", ()), marked=True) is Asked.REFUSED


def test_gateways_that_cannot_be_asked_are_unclear_and_the_key_is_not_shown() -> None:
    assert [item.asked for item in unanswered([Pod("a", "10.0.0.1")])] == [Asked.UNCLEAR]
    assert KEY not in repr(Asking(1, "", KEY, ()))


@dataclass
class Gateway:
    """Answers every request alike, and remembers what it was asked."""

    status: int = 403
    headers: dict[str, str] = field(default_factory=lambda: {MARKER_HEADER: "llama-gateway"})
    seen: list[tuple[str, str, str | None, str]] = field(default_factory=list)
    port: int = 0

    async def answer(self, request: web.Request) -> web.Response:
        self.seen.append(
            (request.method, request.path, request.headers.get("Authorization"), (await request.read()).decode())
        )
        return web.Response(status=self.status, headers=self.headers)

    @asynccontextmanager
    async def serving(self, tls: ssl.SSLContext | None = None) -> AsyncIterator[HttpAsks]:
        app = web.Application()
        app.router.add_route("*", "/{path:.*}", self.answer)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0, ssl_context=tls)
        await site.start()
        self.port = runner.addresses[0][1]
        try:
            async with aiohttp.ClientSession(trust_env=False) as session:
                yield HttpAsks(session)
        finally:
            await runner.cleanup()

    async def ask(self, asks: HttpAsks, *requests: Request, certificate: str = "") -> list[Asked]:
        asking = Asking(self.port, certificate, KEY, requests)
        return [item.asked for item in await asks([Pod("g", "127.0.0.1")], asking)]


async def test_the_key_goes_with_what_is_keyed_only_and_no_redirect_is_followed() -> None:
    gateway = Gateway()
    async with gateway.serving() as asks:
        post = Request("POST", "/pause", "{")
        assert await gateway.ask(asks, SLEEP, BARE, post) == [Asked.REFUSED] * 3
        assert gateway.seen == [
            ("GET", "/sleep", f"Bearer {KEY}", ""),
            ("GET", "/v1/models", None, ""),
            ("POST", "/pause", f"Bearer {KEY}", "{"),
        ]
        gateway.seen.clear()
        gateway.status, gateway.headers = 302, {"Location": "/elsewhere"}
        assert await gateway.ask(asks, SLEEP) == [Asked.PASSED]
        assert len(gateway.seen) == 1


async def test_a_gateway_that_does_not_answer_is_unclear() -> None:
    gateway = Gateway()
    async with gateway.serving():
        pass
    async with aiohttp.ClientSession(trust_env=False) as session:
        assert await gateway.ask(HttpAsks(session), SLEEP) == [Asked.UNCLEAR]


def made(folder: Path, name: str) -> tuple[str, ssl.SSLContext]:
    """A certificate for a name that no gateway of the test has, and what serves it."""
    now = datetime.now(UTC)
    authority = certs.ca(None, name, now)
    leaf = certs.leaf(None, authority, (f"{name}.example",), now)
    paths = {key: folder / f"{name}-{key}" for key in ("tls.crt", "tls.key")}
    for key, path in paths.items():
        path.write_bytes(leaf[key])
    served = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    served.load_cert_chain(paths["tls.crt"], paths["tls.key"])
    return leaf["tls.crt"].decode(), served


async def test_the_key_goes_to_whoever_serves_the_certificate_that_is_mounted_and_to_nobody_else(
    tmp_path: Path,
) -> None:
    own, context = made(tmp_path, "own")
    other, _ = made(tmp_path, "other")
    gateway = Gateway()
    async with gateway.serving(context) as asks:
        # Whatever name it is for: a user's own certificate need not be valid for any name of the Service.
        assert await gateway.ask(asks, SLEEP, certificate=own) == [Asked.REFUSED]
        gateway.seen.clear()
        assert await gateway.ask(asks, SLEEP, certificate=other) == [Asked.UNCLEAR]
        assert gateway.seen == []
    assert trusting(own).verify_mode is ssl.CERT_REQUIRED


async def test_a_gateway_that_does_not_answer_holds_up_a_round_twice_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("securevllm.proof.asking._TIMEOUT", aiohttp.ClientTimeout(total=0.2))
    came = 0

    async def silent(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal came
        came += 1
        await reader.read()
        writer.close()

    server = await asyncio.start_server(silent, "127.0.0.1", 0)
    async with server, aiohttp.ClientSession() as session:
        port = server.sockets[0].getsockname()[1]
        requests = tuple(Request("GET", f"/{number}") for number in range(50))
        found = await HttpAsks(session)([Pod("a", "127.0.0.1")], Asking(port, "", KEY, requests))
    assert [item.asked for item in found] == [Asked.UNCLEAR] * 50
    assert came == 2
