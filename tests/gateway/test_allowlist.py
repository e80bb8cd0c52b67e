"""Every route that vLLM has in any version, with every method: what is not listed does not get through."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator

import pytest

from securevllm import catalogue
from securevllm.render.envoy import AllowedRoute
from tests.gateway import wire
from tests.gateway.attacks import KEY, Attack
from tests.gateway.gateway import MODEL, Gateway, started

pytestmark = pytest.mark.envoy

METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT")
PATHS = sorted({re.sub(r"\{.*?\}", "abc", route.path) for route in catalogue.routes()})
BELOW_METRICS = ("/metrics/", "/metrics/x", "/metricsfoo")  # the mount in vLLM is a prefix

ALLOWABLE = tuple(
    AllowedRoute(route.method, route.path, streaming=route.streaming)
    for route in catalogue.routes_of(catalogue.newest()).values()
    if not route.never
)
CHAT = tuple(
    AllowedRoute(route.method, route.path, streaming=route.streaming)
    for route in catalogue.routes_of(catalogue.newest()).values()
    if "chat" in route.profiles
)


@pytest.fixture(scope="module", params=[CHAT, ALLOWABLE], ids=["chat", "everything-allowable"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]
) -> Iterator[Gateway]:
    with started(
        dataclasses.replace(MODEL, routes=request.param), tmp_path_factory.mktemp("gateway"), certificate
    ) as gateway:
        yield gateway


def _matches(route: AllowedRoute, method: str, path: str) -> bool:
    pattern = re.sub(r"\{.*?\}", "[^/]+", route.path)
    return not route.websocket and route.method == method and re.fullmatch(pattern, path) is not None


def test_everything_else_is_blocked(gateway: Gateway) -> None:
    routes = gateway.envoy.model.routes
    blocked = [
        (method, path)
        for path in (*PATHS, *BELOW_METRICS)
        for method in METHODS
        if not any(_matches(route, method, path) for route in routes)
    ]
    gateway.engine.clear()

    with wire.Client(gateway.port) as client:
        answers = {entry: client.ask(wire.request(*entry, "content-length: 0")) for entry in blocked}

    assert gateway.engine.seen == []
    assert len(blocked) >= (len(PATHS) - len(routes)) * len(METHODS)
    wrong = {entry: answer for entry, answer in answers.items() if wire.status_of(answer) not in {400, 403, 404}}
    assert wrong == {}
    assert all(b"x-securevllm-gateway: llama-gateway\r\n" in answer for answer in answers.values())


def test_everything_listed_gets_through(gateway: Gateway) -> None:
    routes = [route for route in gateway.envoy.model.routes if not route.websocket]
    requests = [
        Attack(
            "route",
            route.name,
            wire.request(route.method, re.sub(r"\{.*?\}", "abc", route.path), "x-attack: @ID@", "connection: close"),
        )
        for route in routes
    ]

    outcomes, _ = wire.run(requests, gateway.port, gateway.engine)

    for route, outcome in zip(routes, outcomes, strict=True):
        assert wire.status_of(outcome.answer) == 200, route.name
        assert [wire.violations(seen, routes) for seen in outcome.seen] == [[]], route.name
        assert b"x-securevllm-gateway" not in outcome.answer


def test_websocket_passes_only_on_its_route(gateway: Gateway) -> None:
    handshake = (
        "upgrade: websocket",
        "connection: upgrade",
        "sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        "sec-websocket-version: 13",
    )
    paths = ("/v1/realtime", "/v1/models", "/v1/chat/completions", "/pause")
    requests = [
        Attack("websocket", path, wire.request("GET", path, "x-attack: @ID@", *handshake) + b"echo") for path in paths
    ]
    without_key = Attack(
        "websocket", "no key", requests[0].data.replace(f"authorization: Bearer {KEY}\r\n".encode(), b"")
    )
    without_upgrade = Attack(
        "websocket", "no upgrade", wire.request("GET", "/v1/realtime", "x-attack: @ID@", "connection: close")
    )

    outcomes, _ = wire.run([*requests, without_key, without_upgrade], gateway.port, gateway.engine)

    open_ = any(route.websocket for route in gateway.envoy.model.routes)
    assert [wire.status_of(outcome.answer) for outcome in outcomes] == (
        # An upgrade that no route has is refused before anybody asks for a key.
        [101, 403, 403, 403, 401, 403] if open_ else [403] * 6
    )
    assert [len(outcome.seen) for outcome in outcomes] == [int(open_), 0, 0, 0, 0, 0]
    assert outcomes[0].answer.endswith(b"echo") or not open_
