"""A stand-in for vLLM's HTTP server, for the demo: the routes of the catalogue and vLLM's own key rule, no model.

Run like the real one, with the arguments that the operator renders (``MODEL --host=IP --port=N ...``);
the key comes from VLLM_API_KEY. As in vLLM, the key guards some prefixes only: everything else answers to anybody who
reaches the port, which is why nobody but the gateway may.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from typing import Any

from aiohttp import web

from securevllm import catalogue

# vllm/entrypoints/serve/middleware/authenticate.py, 0.33.0
_GUARDED = ("/v1", "/v2", "/inference", "/cohere")


def _option(name: str, default: str) -> str:
    values = [argument.partition("=")[2] for argument in sys.argv if argument.startswith(f"--{name}=")]
    return values[-1] if values else default


_MODEL = _option("served-model-name", "model")


@web.middleware
async def _key(request: web.Request, handler: Any) -> web.StreamResponse:
    wanted = f"Bearer {os.environ.get('VLLM_API_KEY', '')}"
    if request.path.startswith(_GUARDED) and request.headers.get("Authorization") != wanted:
        return web.json_response({"error": "Unauthorized"}, status=401)
    answer: web.StreamResponse = await handler(request)
    return answer


async def _health(_request: web.Request) -> web.Response:
    return web.Response()


async def _models(_request: web.Request) -> web.Response:
    return web.json_response({"object": "list", "data": [{"id": _MODEL, "object": "model", "owned_by": "vllm"}]})


async def _chat(request: web.Request) -> web.StreamResponse:
    body = await request.json()
    words = ["Hello", " from", " behind", " the", " gateway."]
    if not body.get("stream"):
        message = {"role": "assistant", "content": "".join(words)}
        return web.json_response({"object": "chat.completion", "model": _MODEL, "choices": [{"message": message}]})
    stream = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await stream.prepare(request)
    for word in words:
        chunk = {"object": "chat.completion.chunk", "model": _MODEL, "choices": [{"delta": {"content": word}}]}
        await stream.write(f"data: {json.dumps(chunk)}\n\n".encode())
        await asyncio.sleep(0.02)
    await stream.write(b"data: [DONE]\n\n")
    return stream


async def _anything(request: web.Request) -> web.Response:
    return web.json_response({"reached": f"{request.method} {request.path}"})


def main() -> None:
    """Serve until the process is ended."""
    app = web.Application(middlewares=[_key])
    own = {"/health": _health, "/v1/models": _models, "/v1/chat/completions": _chat}
    for route in catalogue.routes_of(catalogue.newest()).values():
        if route.method != catalogue.WEBSOCKET:
            app.router.add_route(route.method, route.path, own.get(route.path, _anything))
    web.run_app(app, host=_option("host", "127.0.0.1"), port=int(_option("port", "8000")), print=None)


main()
