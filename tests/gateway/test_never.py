"""What is never opened is not reached by any spelling, through the gateway of the widest spec that the parser takes.

The spellings are those of tests/spellings.py, for which a parser test exists as well; here a real Envoy reads the path,
and the engine behind it tells what came through.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from urllib.parse import unquote

import pytest

from securevllm import catalogue
from securevllm.api.parse import Accepted, parse
from securevllm.render.gateway import allowed_routes
from tests.gateway import wire
from tests.gateway.gateway import MODEL, Gateway, started
from tests.spellings import NEVER, SPELLINGS, Spelling

pytestmark = pytest.mark.envoy

METHODS = ("GET", "POST", "DELETE")
WHY = "as much as the parser takes"


def widest() -> Accepted:
    """Every profile that is rendered, every single route, and unknown ones near those that are never opened."""
    known = catalogue.routes_of(catalogue.newest()).values()
    single = [
        route for route in known if not route.never and not route.profiles and route.method != catalogue.WEBSOCKET
    ]
    near = (
        "/v1/sleep",
        "/v1/adapters",
        "/v1/metrics",
        "/api/tokenize",
        "/v1/chat",
        "/pausex",
        "/health.json",
        "/x/ping",
    )
    allow = [{"method": route.method, "path": route.path} for route in single]
    allow += [{"method": method, "path": path, "unknownRoute": WHY} for path in near for method in ("GET", "POST")]
    profiles = [name for name in catalogue.profiles() if name != "realtime"]
    gateway = {"routes": {"profiles": profiles, "allow": allow}}
    return parse("llama", {"model": {"name": "/m"}, "image": "vllm/vllm-openai:v0.33.0", "gateway": gateway})


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]) -> Iterator[Gateway]:
    accepted = widest()
    routes = allowed_routes(accepted.spec, accepted.version)
    assert len(routes) > 30
    folder = tmp_path_factory.mktemp("never")
    with started(dataclasses.replace(MODEL, routes=routes), folder, certificate) as gateway:
        yield gateway


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_no_spelling_reaches_the_engine(gateway: Gateway, spell: Spelling) -> None:
    gateway.engine.clear()
    paths = [path for path in map(spell, NEVER) if " " not in path]
    assert len(paths) > 30
    with wire.Client(gateway.port) as client:
        for path in paths:
            for method in METHODS:
                client.ask(wire.request(method, path, "content-length: 0"))
    reached = [seen.path for seen in gateway.engine.seen]
    # What came through is, as the engine reads it, one of the routes that are allowed, and none that is never opened.
    allowed = [re.compile(route.regex or re.escape(route.path)) for route in gateway.envoy.model.routes]
    assert [path for path in reached if not any(one.fullmatch(path.partition("?")[0]) for one in allowed)] == []
    decoded = {unquote(path.partition("?")[0]).rstrip("/").lower() for path in reached}
    # A path that older versions left without a key is open in the newest.
    open_now = {route.path for route in catalogue.routes_of(catalogue.newest()).values() if not route.never}
    assert decoded & {path.lower() for path in set(NEVER) - open_now} == set()


def test_what_the_parser_took_does_come_through(gateway: Gateway) -> None:
    gateway.engine.clear()
    with wire.Client(gateway.port) as client:
        answer = client.ask(wire.request("POST", "/v1/sleep", "content-length: 0"))
    assert wire.status_of(answer) == 200
    assert [seen.path for seen in gateway.engine.seen] == ["/v1/sleep"]
