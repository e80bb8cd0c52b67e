"""The real vllm-router, with the rendered arguments, between two stub engines that tell what they got.

What a client writes into ``kv_transfer_params`` must never decide from where decode fetches a cache.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import router
from securevllm.render.meta import Owner
from securevllm.topology import plan

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="vllm-router has wheels for Linux only")

KEY = "the-key-of-the-engines"
ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/messages")
"""Every POST route that a spec with prefill and decode can open and that generates."""

TRANSFER = {"remote_engine_id": "e", "remote_block_ids": [1], "remote_host": "prefill", "remote_port": 5600}
EVIL: dict[str, Any] = {
    "kv_transfer_params": {"do_remote_prefill": True, "remote_host": "169.254.169.254", "remote_port": 80},
    "vllm_xargs": {"kv_transfer_params": "a string"},
}


@dataclass
class Stub:
    """An engine that answers everything, and remembers what it was asked."""

    transfer: dict[str, Any] | None
    seen: list[tuple[str, str, str, dict[str, Any]]] = field(default_factory=list)
    port: int = 0

    def asked(self, path: str) -> dict[str, Any]:
        return next(body for method, at, _, body in self.seen if (method, at) == ("POST", path))


@contextmanager
def engine(transfer: dict[str, Any] | None) -> Iterator[Stub]:
    stub = Stub(transfer)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: object) -> None:
            pass

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            key = self.headers.get("authorization", "")
            stub.seen.append((self.command, self.path, key, json.loads(body) if body else {}))
            choice = {"index": 0, "message": {"role": "assistant", "content": "hi"}, "text": "hi"}
            answer: dict[str, Any] = {"id": "x", "choices": [choice], "data": [{"id": "m"}]}
            if stub.transfer is not None:
                answer["kv_transfer_params"] = stub.transfer
            told = json.dumps(answer).encode()
            self.send_response(200)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        do_GET = do_POST = answer  # noqa: N815 - the names that http.server calls

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        stub.port = server.server_port
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield stub
        server.shutdown()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port


def arguments(prefill: Stub, decode: Stub, port: int) -> list[str]:
    """What is rendered, with the addresses of this machine."""
    split = {"connector": "nixl", "router": {"image": "vllm/vllm-router:v0.1.17"}}
    image = "vllm/vllm-openai:v0.33.0"
    judged = parse("llama", {"model": {"name": "/m"}, "image": image, "disaggregation": split})
    owner, context = Owner("llama", "apps", "uid-1"), Context()
    rendered = router.arguments(owner, judged.spec, plan(judged.spec, context), context)
    replaced = {
        "http://llama-p0-0-0.llama-p0.apps.svc.cluster.local.:8000": f"http://127.0.0.1:{prefill.port}",
        "--decode=http://llama-d0-0-0.llama-d0.apps.svc.cluster.local.:8000": f"--decode=http://127.0.0.1:{decode.port}",
        "--host=$(POD_IP)": "--host=127.0.0.1",
        "--port=8090": f"--port={port}",
        "--prometheus-port=29000": f"--prometheus-port={free_port()}",
        "--worker-startup-check-interval=5": "--worker-startup-check-interval=1",
    }
    assert replaced.keys() <= set(rendered)
    return [replaced.get(text, text) for text in rendered]


@contextmanager
def routed(transfer: dict[str, Any] | None, folder: Path) -> Iterator[tuple[httpx.Client, Stub, Stub]]:
    """A client of a router that is ready, and the engines behind it."""
    with engine(transfer) as prefill, engine(None) as decode:
        port = free_port()
        command = [str(Path(sys.executable).with_name("vllm-router")), *arguments(prefill, decode, port)]
        environment = {"PATH": os.environ["PATH"], "HOME": str(folder), "OPENAI_API_KEY": KEY}
        with (folder / "log").open("wb") as log:
            process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603 - ours
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=10) as client:
                _wait(client, process, folder / "log")
                yield client, prefill, decode
        finally:
            process.kill()
            process.wait()


def _wait(client: httpx.Client, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        try:
            if client.get(router.READY_PATH).status_code == 200 and client.get(router.LIVE_PATH).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(log.read_text(encoding="utf-8", errors="replace")[-2000:])


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, Stub, Stub]]:
    with routed(TRANSFER, tmp_path_factory.mktemp("router")) as found:
        yield found


def ask(client: httpx.Client, path: str) -> httpx.Response:
    body = {"model": "m", "prompt": "p", "input": "p", "max_tokens": 5, "messages": [{"role": "user", "content": "p"}]}
    return client.post(path, json=body | EVIL, headers={"authorization": f"Bearer {KEY}"})


@pytest.mark.parametrize("path", ROUTES)
def test_decode_fetches_from_prefill_whatever_the_client_says(
    world: tuple[httpx.Client, Stub, Stub], path: str
) -> None:
    client, prefill, decode = world
    assert ask(client, path).status_code == 200
    asked = prefill.asked(path)["kv_transfer_params"]
    assert (asked["do_remote_decode"], asked["do_remote_prefill"], asked["remote_host"]) == (True, False, None)
    assert decode.asked(path)["kv_transfer_params"] == TRANSFER


@pytest.mark.parametrize("path", ROUTES)
def test_a_string_in_vllm_xargs_reaches_the_engines_beside_the_routers_own(
    world: tuple[httpx.Client, Stub, Stub], path: str
) -> None:
    """VLLM 0.33.0 lets ``kv_transfer_params`` of the body win over it, so it ends nothing while that is there."""
    client, prefill, decode = world
    ask(client, path)
    for stub in (prefill, decode):
        assert stub.asked(path)["vllm_xargs"] == EVIL["vllm_xargs"]
        assert stub.asked(path)["kv_transfer_params"]


def test_where_prefill_has_nothing_to_hand_over_the_client_decides(tmp_path: Path) -> None:
    """A hole of vllm-router 0.1.17, told in docs/topologies.md: this test fails when a release closes it.

    Policies keep decode from every address but those of prefill, so that nothing else can be reached this way.
    """
    with routed(None, tmp_path) as (client, _, decode):
        assert ask(client, ROUTES[0]).status_code == 200
        assert decode.asked(ROUTES[0])["kv_transfer_params"] == EVIL["kv_transfer_params"]


def test_the_engines_get_their_own_key(world: tuple[httpx.Client, Stub, Stub]) -> None:
    client, prefill, decode = world
    ask(client, ROUTES[0])
    keys = {key for stub in (prefill, decode) for method, _, key, _ in stub.seen if method == "POST"}
    assert keys == {f"Bearer {KEY}"}


def test_embeddings_are_refused(world: tuple[httpx.Client, Stub, Stub]) -> None:
    assert ask(world[0], "/v1/embeddings").status_code == 501


def test_models_are_those_of_prefill(world: tuple[httpx.Client, Stub, Stub]) -> None:
    found = world[0].get("/v1/models", headers={"authorization": f"Bearer {KEY}"})
    assert (found.status_code, found.json()["data"]) == (200, [{"id": "m"}])
