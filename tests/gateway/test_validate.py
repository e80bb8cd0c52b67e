"""``envoy --mode validate`` accepts every shape that a model can take, and this check can fail."""

from __future__ import annotations

import dataclasses
import json

import pytest

from securevllm import catalogue
from securevllm.render.envoy import AllowedRoute, GatewayModel, api_keys_file, envoy_files
from tests.gateway.envoy_process import validate
from tests.gateway.gateway import KEYS, MODEL

pytestmark = pytest.mark.envoy

EVERY_ROUTE = tuple(
    AllowedRoute(route.method, route.path, streaming=route.streaming) for route in catalogue.routes() if not route.never
)
MODELS = {
    "default": MODEL,
    "every route": dataclasses.replace(MODEL, routes=EVERY_ROUTE),
    "no route": dataclasses.replace(MODEL, routes=()),
    "plain": dataclasses.replace(MODEL, tls=False, listen_port=8080),
    "anonymous": dataclasses.replace(MODEL, authentication=False),
    "hosts": dataclasses.replace(MODEL, hostnames=("llm.example.com", "*.example.org")),
    "both families": dataclasses.replace(MODEL, listen_address="::"),
    "largest": dataclasses.replace(
        MODEL,
        request_body_bytes=1 << 32,
        requests_per_second_per_client=100_000,
        stream_seconds=86400,
        stream_idle_seconds=86400,
        max_clients=10_000,
        heap_bytes=1 << 36,
        connections=1_000_000,
    ),
    "smallest": dataclasses.replace(
        MODEL,
        request_body_bytes=1,
        requests_per_second_per_client=1,
        stream_seconds=1,
        stream_idle_seconds=1,
        max_clients=1,
        heap_bytes=1 << 20,
        connections=1,
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_accepted(name: str, certificate: tuple[str, str]) -> None:
    assert validate(envoy_files(MODELS[name]), api_keys_file(KEYS), certificate) == ""


@pytest.mark.parametrize("keys", [KEYS, []], ids=["two", "none"])
def test_keys_are_accepted(keys: list[str], certificate: tuple[str, str]) -> None:
    model: GatewayModel = MODEL
    assert validate(envoy_files(model), api_keys_file(KEYS if keys else []), certificate) == ""


@pytest.mark.parametrize(
    ("file", "old", "new"),
    [
        ("rds.yaml", '"cluster": "engine"', '"cluster": "nowhere"'),
        ("rds.yaml", "{1,128}", "{1,128}("),
        ("lds.yaml", '"max_headers_count": 64', '"max_header_count": 64'),
        ("cds.yaml", '"connect_timeout": "5s"', '"connect_timeout": "-5s"'),
        ("rbac.yaml", '"action": "ALLOW"', '"action": "PERMIT"'),
    ],
)
def test_broken_files_are_refused(file: str, old: str, new: str, certificate: tuple[str, str]) -> None:
    files = envoy_files(MODEL)
    assert old in files[file]
    broken = {**files, file: files[file].replace(old, new)}
    json.loads(broken[file])

    assert "error" in validate(broken, api_keys_file(KEYS), certificate).lower()
