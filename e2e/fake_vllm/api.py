"""The HTTP API: the catalogue's routes of one version, and vLLM's own rule about the key.

As in vLLM, the key guards some prefixes only: everything else answers to anybody who reaches the port, which is why
nobody but the gateway may. Answers that programs read have vLLM's form; every other route says that it was reached.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
import itertools
import json
import re
import secrets
import socket
import time
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e2e.fake_vllm import web
from e2e.fake_vllm.wire import StartError, log
from securevllm import catalogue
from securevllm.catalogue.conditions import Started, holds

if TYPE_CHECKING:
    import argparse

    from e2e.fake_vllm.group import Group
    from e2e.fake_vllm.transfer import Transfer
    from e2e.fake_vllm.world import World

_WORDS = ("Hello", " from", " behind", " the", " gateway", ".")
_TOKEN_SECONDS = 0.02
_OFF = {"", "0", "false"}
_WEBSOCKET = b"258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
"""RFC 6455, section 1.3."""


class Api:
    """Answers requests."""

    def __init__(
        self, world: World, args: argparse.Namespace, env: Mapping[str, str], group: Group, transfer: Transfer
    ) -> None:
        self._names: Sequence[str] = args.served_model_name or [args.model_tag or args.model or "model"]
        keys: Sequence[str] = args.api_key or ([env["VLLM_API_KEY"]] if env.get("VLLM_API_KEY") else [])
        self._keys = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._guarded = catalogue.server().guarded_in(world.version)
        self._group = group
        self._transfer = transfer
        self._served = 0
        self._plain: dict[str, Callable[[], web.Answer]] = {
            "health": web.Answer,
            "version": lambda: web.as_json({"version": str(world.version)}),
            "models": self._models,
            "metrics": self._metrics,
        }
        started = started_as(args, env)
        self._routes: list[tuple[re.Pattern[str], catalogue.Route, bool]] = []
        for route in catalogue.routes_of(world.version).values():
            registered = bool(holds(route.when, world.version, started))
            refused = not registered and "otherwise 403" in route.when
            if (registered or refused) and not (route.category == "docs" and args.disable_fastapi_docs):
                pattern = re.sub(r"\\{\w+\\}", "[^/]+", re.escape(route.path)) + (".*" if route.mount else "")
                self._routes.append((re.compile(pattern), route, refused))

    async def __call__(self, request: web.Request) -> web.Answer:
        """The answer to one request."""
        if request.method != "OPTIONS" and request.path.startswith(self._guarded) and not self._has_key(request):
            return web.as_json({"error": "Unauthorized"}, 401)
        found = [(route, refused) for pattern, route, refused in self._routes if pattern.fullmatch(request.path)]
        if not found:
            return web.as_json({"detail": "Not Found"}, 404)
        method = request.method
        if request.headers.get("upgrade", "").lower() == "websocket":
            method = catalogue.WEBSOCKET
        for route, refused in found:
            if route.method == method or route.mount:
                if refused:
                    return web.as_json({"error": {"message": "This endpoint is disabled", "code": 403}}, 403)
                return await self._answer(route, request)
        return web.as_json({"detail": "Method Not Allowed"}, 405)

    def _has_key(self, request: web.Request) -> bool:
        if not self._keys:
            return True
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        given = hashlib.sha256(value.encode("latin-1")).digest()
        return scheme.lower() == "bearer" and any(secrets.compare_digest(given, key) for key in self._keys)

    async def _answer(self, route: catalogue.Route, request: web.Request) -> web.Answer:
        kind = catalogue.server().answers.get(route.path)
        if route.method == catalogue.WEBSOCKET:
            return _session(request)
        if kind in self._plain:
            return self._plain[kind]()
        if route.category == "inference" and self._group.lost.is_set():
            log.error("%s %s hangs: a member of the group is gone", request.method, request.path)
            await asyncio.Event().wait()
        if kind in {"chat", "completion"}:
            return await self._generate(request, chat=kind == "chat")
        return web.as_json({"reached": f"{request.method} {request.path}"})

    def _models(self) -> web.Answer:
        data = [{"id": name, "object": "model", "created": 0, "owned_by": "vllm"} for name in self._names]
        return web.as_json({"object": "list", "data": data})

    def _metrics(self) -> web.Answer:
        labels = f'{{engine="0",model_name="{self._names[0]}"}}'
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        gauges = [f"# TYPE {name} gauge\n{name}{labels} 0.0" for name in names]
        counter = f"# TYPE vllm:request_success_total counter\nvllm:request_success_total{labels} {self._served}.0"
        text = "\n".join([*gauges, counter]) + "\n"
        return web.Answer(body=text.encode(), content_type="text/plain; version=0.0.4; charset=utf-8")

    async def _generate(self, request: web.Request, *, chat: bool) -> web.Answer:
        try:
            body = dict(json.loads(request.body))
        except (ValueError, TypeError):
            return _error(400, "BadRequestError", "the body is not a JSON object")
        if body.get("model") not in {None, *self._names}:
            return _error(404, "NotFoundError", f"The model `{body['model']}` does not exist.")
        params = body.get("kv_transfer_params")
        params = params if isinstance(params, dict) else {}
        try:
            await self._transfer.pull(params)
        except StartError as error:
            log.error("KV transfer: %s", error)
            return _error(500, "InternalServerError", f"KV load failed: {error}")
        self._served += 1
        limit = body.get("max_completion_tokens") or body.get("max_tokens") or len(_WORDS)
        # As in vLLM: only who asks for it gets text beyond the end, and then as much as was asked for.
        endless = itertools.cycle(_WORDS) if body.get("ignore_eos") else _WORDS
        words = tuple(itertools.islice(endless, int(limit)))
        base: dict[str, Any] = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": self._names[0],
            "system_fingerprint": socket.gethostname(),  # which pod it was
        }
        usage = {"prompt_tokens": 1, "completion_tokens": len(words), "total_tokens": 1 + len(words)}
        if body.get("stream"):
            with_usage = (body.get("stream_options") or {}).get("include_usage")
            events = _events(base, words, chat=chat, usage=usage if with_usage else None)
            return web.Answer(content_type="text/event-stream; charset=utf-8", parts=events)
        reason = "stop" if words == _WORDS else "length"
        text = "".join(words)
        said = {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
        answer = base | {"choices": [{"index": 0, **said, "finish_reason": reason}], "usage": usage}
        offered = self._transfer.offer(params)
        return web.as_json(answer | ({"kv_transfer_params": offered} if offered else {}))


async def _events(
    base: Mapping[str, Any], words: Sequence[str], *, chat: bool, usage: Mapping[str, int] | None
) -> AsyncIterator[bytes]:
    chunk = dict(base) | ({"object": "chat.completion.chunk"} if chat else {})
    for number, word in enumerate(words):
        last = number == len(words) - 1
        said = {"delta": {"role": "assistant", "content": word}} if chat else {"text": word}
        choice = {"index": 0, **said, "finish_reason": "stop" if last else None}
        yield f"data: {json.dumps(chunk | {'choices': [choice]})}\n\n".encode()
        await asyncio.sleep(_TOKEN_SECONDS)
    if usage is not None:
        yield f"data: {json.dumps(chunk | {'choices': [], 'usage': usage})}\n\n".encode()
    yield b"data: [DONE]\n\n"


def _session(request: web.Request) -> web.Answer:
    """Accept a WebSocket, greet as vLLM's realtime API does, and close."""
    key = request.headers.get("sec-websocket-key", "").encode()
    accept = base64.b64encode(hashlib.sha1(key + _WEBSOCKET).digest()).decode()  # noqa: S324 - RFC 6455 says so
    text = json.dumps({"type": "session.created", "id": uuid.uuid4().hex}).encode()
    frames = bytes([0x81, len(text)]) + text + bytes([0x88, 2]) + (1000).to_bytes(2, "big")
    headers = {"upgrade": "websocket", "connection": "Upgrade", "sec-websocket-accept": accept}
    return web.Answer(101, frames, headers=headers)


def _error(status: int, kind: str, message: str) -> web.Answer:
    return web.as_json({"error": {"message": message, "type": kind, "param": None, "code": status}}, status)


def started_as(args: argparse.Namespace, env: Mapping[str, str]) -> Started:
    """How this process was started, in the words of the catalogue's conditions."""
    tasks = env.get("FAKE_VLLM_TASKS") or ("embed" if getattr(args, "runner", None) == "pooling" else "generate")
    return Started(
        flags={
            f"--{name.replace('_', '-')}": value is not None and value is not False
            for name, value in vars(args).items()
        },
        variables={name: value.lower() not in _OFF for name, value in env.items()},
        tasks=frozenset(tasks.split(",")),
    )
