"""The HTTP side: the catalogue's routes of a version, and vLLM's own rule about the key."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from securevllm import catalogue
from tests.fake.service import KEY, MODEL, Service, Vllm, request, running

NOBODY = {"Authorization": ""}
CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "hi"}]}


@pytest.fixture(scope="module")
def vllm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vllm]:
    folder: Path = tmp_path_factory.mktemp("api")
    with running(folder) as service:
        one = service.vllm("--disable-fastapi-docs", f"--served-model-name={MODEL}")
        one.healthy()
        yield one


def test_every_route_of_the_catalogue_has_vllms_answer_with_and_without_the_key(vllm: Vllm) -> None:
    expected, found = {}, {}
    for route in catalogue.routes_of(catalogue.newest()).values():
        if route.method == catalogue.WEBSOCKET:
            continue
        path = re.sub(r"\{\w+\}", "x", route.path)
        there = route.when in {"", "task generate"} and route.category != "docs"
        elsewhere = {row.method for row in catalogue.routes_of(catalogue.newest()).values() if row.path == route.path}
        missing = 404 if len(elsewhere) == 1 or not there else 405
        served = 200 if there else 403 if "otherwise 403" in route.when else missing
        expected[route.method, path] = (401 if route.key else served, served)
        body = CHAT if route.method == "POST" else None
        found[route.method, path] = (
            vllm.ask(route.method, path, body, **NOBODY)[0],
            vllm.ask(route.method, path, body)[0],
        )
    assert found == expected


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/v1models", 401),
        ("GET", "/%76%31/models", 401),
        ("GET", "/v1%2Fmodels", 401),
        ("GET", "/v1/models/", 401),
        ("GET", "//v1/models", 404),
        ("GET", "/V1/models", 404),
        ("GET", "/./v1/models", 404),
        ("GET", "/x/../v1/models", 404),
        ("OPTIONS", "/v1/models", 405),
        ("DELETE", "/health", 405),
        ("GET", "/metricsfoo", 200),
        ("POST", "/metrics/x", 200),
    ],
)
def test_the_key_guards_prefixes_as_in_vllm(vllm: Vllm, method: str, path: str, status: int) -> None:
    """Measured on the real middleware: shared spellings of a path, none of which gets around the key."""
    assert vllm.ask(method, path, **NOBODY)[0] == status


@pytest.mark.parametrize("value", ["", "Bearer", "Bearer wrong", f"Basic {KEY}", KEY])
def test_a_wrong_key_is_refused(vllm: Vllm, value: str) -> None:
    assert vllm.ask("GET", "/v1/models", Authorization=value) == (401, {"error": "Unauthorized"})


def test_answers_that_programs_read(vllm: Vllm) -> None:
    assert vllm.ask("GET", "/version") == (200, {"version": str(catalogue.newest())})
    assert [model["id"] for model in vllm.ask("GET", "/v1/models")[1]["data"]] == [MODEL]
    assert "vllm:num_requests_running" in vllm.ask("GET", "/metrics")[1]
    status, answer = vllm.ask("POST", "/v1/chat/completions", CHAT | {"max_tokens": 2})
    assert (status, answer["choices"][0]["message"]["content"]) == (200, "Hello from")
    assert answer["usage"]["completion_tokens"] == 2
    assert vllm.ask("POST", "/v1/completions", {"prompt": "hi"})[1]["choices"][0]["text"].startswith("Hello")
    assert vllm.ask("POST", "/v1/chat/completions", b"{")[0] == 400
    assert vllm.ask("POST", "/v1/chat/completions", CHAT | {"model": "other"})[0] == 404


def test_a_stream_comes_word_by_word(vllm: Vllm) -> None:
    status, text = vllm.ask(
        "POST", "/v1/chat/completions", CHAT | {"stream": True, "stream_options": {"include_usage": True}}
    )
    assert status == 200
    events = text.strip().split("\n\n")
    assert len(events) == 8
    assert events[-1] == "data: [DONE]"
    assert '"usage"' in events[-2]


def test_older_versions_guard_less(service: Service) -> None:
    old = service.vllm(env={"FAKE_VLLM_VERSION": "0.21.0"})
    old.healthy()
    assert old.ask("GET", "/version")[1] == {"version": "0.21.0"}
    assert old.ask("POST", "/inference/v1/generate", {}, **NOBODY)[0] == 200
    assert old.ask("POST", "/v1/decisions", {})[0] == 404


def test_settings_open_control_routes(service: Service) -> None:
    open_ = service.vllm(env={"VLLM_SERVER_DEV_MODE": "1"})
    open_.healthy()
    assert open_.ask("POST", "/sleep", {}, **NOBODY) == (200, {"reached": "POST /sleep"})


def test_a_pooling_model_has_other_routes(service: Service) -> None:
    pooling = service.vllm("--runner=pooling")
    pooling.healthy()
    assert pooling.ask("POST", "/v1/embeddings", {})[0] == 200
    assert pooling.ask("POST", "/v1/chat/completions", CHAT)[0] == 404


def test_it_starts_within_a_second_and_ends_with_term(service: Service) -> None:
    began = time.process_time(), time.monotonic()
    one = service.vllm()
    one.healthy()
    used = time.monotonic() - began[1]
    assert one.end() == 0
    assert used < 10, f"{used:.1f} s"  # 0.2 s on an idle machine
    with pytest.raises(OSError, match="refused"):
        request("GET", f"http://{one.address}:{one.port}/health")
