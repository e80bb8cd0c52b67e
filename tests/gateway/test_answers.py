"""What clients, probers and the ops port get to see, and what happens when a file is missing."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import socket
import time
from pathlib import Path

import pytest

from securevllm.render.envoy import (
    ENGINE_VERSION_PATH,
    METRICS_PATH,
    OPS_PATHS,
    READY_PATH,
    VERSIONS_PATH,
    AllowedRoute,
    Timeouts,
    api_keys_file,
)
from securevllm.render.readback import versions_of
from tests.gateway import attacks, wire
from tests.gateway.engine import serving
from tests.gateway.envoy_process import Envoy, local_model
from tests.gateway.gateway import KEYS, MODEL, Gateway, started

pytestmark = pytest.mark.envoy

MARKER = b"x-securevllm-gateway: llama-gateway\r\n"


def test_answer_of_the_engine_is_clean(gateway: Gateway) -> None:
    with wire.Client(gateway.port) as client:
        answer = client.ask(wire.request("GET", "/v1/models"))
    head = answer.partition(b"\r\n\r\n")[0].lower()

    assert answer.startswith(b"HTTP/1.1 200")
    assert b"server:" not in head
    assert b"x-securevllm-gateway" not in head
    assert b"x-envoy" not in head
    assert re.findall(rb"x-request-id: (\S+)", head)[0] == gateway.engine.seen[-1].all("x-request-id")[0].encode()


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (wire.request("GET", "/v1/models", key=None), 401),
        (wire.request("GET", "/metrics"), 403),
        (wire.request("OPTIONS", "/v1/models"), 403),
        (wire.request("GET", "/v1/models%2f"), 400),
        (wire.request("GET", "http://gateway/v1/models"), 404),
        (wire.request("POST", "/v1/chat/completions", "content-length: 2000000"), 413),
        (wire.request("GET", "/v1/models", "x-a: " + "a" * 40000), 431),
        (wire.request("GET", "/v1/models").replace(b"HTTP/1.1", b"HTTP/1.0"), 426),
    ],
)
def test_answer_of_the_gateway_is_marked(gateway: Gateway, request_: bytes, status: int) -> None:
    answer = wire.exchange(gateway.port, request_)

    assert wire.status_of(answer) == status
    assert MARKER in answer
    assert b"server:" not in answer
    if status != 426:
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["type"] == "gateway_error"


def test_verified_client_is_told_to_the_engine(gateway: Gateway) -> None:
    with wire.Client(gateway.port) as client:
        for entry in KEYS:
            client.ask(wire.request("GET", "/v1/models", "x-gateway-client: forged", key=entry.key))
            assert gateway.engine.seen[-1].all("x-gateway-client") == [entry.client]


def test_logs_hold_neither_keys_nor_queries(gateway: Gateway) -> None:
    wire.exchange(gateway.port, wire.request("GET", "/v1/models?secret=in-the-query", "connection: close"))
    wire.exchange(gateway.port, wire.request("GET", "/v1/models", "connection: close", key="wrong-key-in-the-log"))
    deadline = time.monotonic() + 15  # Envoy writes its access log every ten seconds, or when a buffer is full
    while (log := gateway.envoy.log()).count('"path":"/v1/models"') < 2 and time.monotonic() < deadline:
        time.sleep(0.1)

    assert '"client":"alice"' in log
    for secret in (attacks.KEY, attacks.ENGINE_KEY, "in-the-query", "wrong-key-in-the-log"):
        assert secret not in log


def test_an_engine_is_asked_for_its_version_and_for_nothing_else(gateway: Gateway) -> None:
    gateway.engine.clear()
    port = gateway.envoy.model.ops_port
    fields = ("connection: close", "cookie: a=b", "x-api-key: k", "x-request-id: mine", "x-envoy-original-path: /pause")
    answer = wire.exchange(port, wire.request("GET", ENGINE_VERSION_PATH, *fields), tls=False)
    assert wire.status_of(answer) == 200
    (seen,) = [one for one in gateway.engine.seen if one.path != "/health"]
    assert (seen.method, seen.target, seen.body) == ("GET", "/version", b"")
    assert seen.all("host") == ["vllm.internal"]
    for name in ("authorization", "cookie", "x-api-key", "x-envoy-original-path"):
        assert seen.all(name) == []

    # A chunked body cannot be told apart; it changes nothing of what is asked.
    gateway.engine.clear()
    chunked = wire.request("GET", ENGINE_VERSION_PATH, "connection: close", "transfer-encoding: chunked")
    assert wire.status_of(wire.exchange(port, chunked + b"2\r\n{}\r\n0\r\n\r\n", tls=False)) == 200
    assert [one.target for one in gateway.engine.seen if one.path != "/health"] == ["/version"]

    gateway.engine.clear()
    refused = [
        wire.request("GET", ENGINE_VERSION_PATH, "connection: close", body=b"{}"),
        wire.request("GET", ENGINE_VERSION_PATH, "connection: upgrade", "upgrade: websocket"),
        *(
            wire.request("GET", f"{ENGINE_VERSION_PATH}{suffix}", "connection: close")
            for suffix in ("?", "?a", "/", "/..", "/../metrics", "%2f..%2fmetrics", ";a", "#a")
        ),
        wire.request("GET", "/version", "connection: close"),
    ]
    answers = [wire.status_of(wire.exchange(port, data, tls=False)) for data in refused]
    assert set(answers) <= {400, 403, 404, 501}, answers
    assert [one.target for one in gateway.engine.seen if one.path != "/health"] == []


def test_ops_port_answers_four_requests_and_no_more(gateway: Gateway) -> None:
    assert [gateway.envoy.ops(path)[0] for path in OPS_PATHS] == [200] * 4
    for path in OPS_PATHS:
        assert {gateway.envoy.ops(path, method)[0] for method in ("POST", "PUT", "DELETE", "HEAD", "OPTIONS")} == {404}
    admin = "certs clusters config_dump contention cpuprofiler drain_listeners healthcheck/fail help listeners logging"
    more = "memory quitquitquit reset_counters runtime runtime_modify?a=b server_info stats v1/models READY /ready"
    pages = f"{admin} {more}".split()
    others = (
        "/",
        *(f"/{page}" for page in pages),
        *(f"{READY_PATH}{suffix}" for suffix in ("/", "?", "?x", "/../config_dump")),
        *(f"{METRICS_PATH}{suffix}" for suffix in ("/", "?", "?usedonly", "?text_readouts", ";x", "/../config_dump")),
        f"{METRICS_PATH}?text_readouts&filter=.",
        f"{VERSIONS_PATH}&x",
    )
    assert {path: gateway.envoy.ops(path)[0] for path in others} == dict.fromkeys(others, 404)


def test_admin_port_answers_nothing_else_either(gateway: Gateway) -> None:
    port = gateway.envoy.model.admin_port
    answers = {
        path: wire.status_of(wire.exchange(port, wire.request(method, path, "connection: close", key=None), tls=False))
        for method, path in (
            ("GET", METRICS_PATH),
            ("GET", "/ready"),
            ("GET", "/config_dump"),
            ("POST", "/quitquitquit"),
            ("POST", "/logging?level=trace"),
            ("POST", "/runtime_modify?a=b"),
            ("GET", "/stats/prometheus/../../config_dump"),
            ("GET", "/stats/prometheus?text_readouts&filter=."),
        )
    }

    assert answers.pop(METRICS_PATH) == 200
    assert set(answers.values()) == {403}
    with pytest.raises(OSError, match="refused"):
        socket.create_connection(("127.0.0.2", port), timeout=1)


def test_versions_are_those_of_the_files(gateway: Gateway) -> None:
    written = {
        path.name: path.read_text()
        for volume in ("xds", "auth")
        for path in gateway.envoy.volumes.root.glob(f"{volume}/*.yaml")
    }

    assert len(written) == 7
    assert gateway.envoy.versions() == versions_of(written)
    assert "_version_text" not in gateway.envoy.ops(METRICS_PATH)[1]
    assert len(gateway.envoy.ops(VERSIONS_PATH)[1]) < 5000


def test_only_the_named_hosts_are_answered(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, tls=False, hostnames=("llm.example.com", "*.internal.example.com"))
    with started(model, tmp_path) as gateway, wire.Client(gateway.port, tls=False) as client:
        base = wire.request("GET", "/v1/models")
        answers = {
            host: client.ask(base.replace(b"host: gateway", f"host: {host}".encode()))
            for host in (
                "llm.example.com",
                "LLM.example.com:443",
                "a.internal.example.com",
                "evil.example",
                "gateway",
                "vllm.internal",
            )
        }

    assert [wire.status_of(answer) for answer in answers.values()] == [200, 200, 200, 404, 404, 404]
    assert MARKER in answers["evil.example"]


def test_without_authentication_the_allowlist_still_holds(tmp_path: Path) -> None:
    model = dataclasses.replace(MODEL, tls=False, authentication=False, requests_per_second_per_client=5)
    with started(model, tmp_path) as gateway, wire.Client(gateway.port, tls=False) as client:
        first = client.ask(
            wire.request("GET", "/v1/models", "x-gateway-client: alice", "x-api-key: own", key="own-key")
        )
        forbidden = client.ask(wire.request("POST", "/pause", "content-length: 0", key=None))
        statuses = {wire.status_of(client.ask(wire.request("GET", "/v1/models", key=None))) for _ in range(20)}
        versions = gateway.envoy.versions()

    assert wire.status_of(first) == 200
    assert wire.violations(gateway.engine.seen[0], model.routes, clients=["anonymous"]) == []
    assert wire.status_of(forbidden) == 403
    assert statuses == {200, 429}  # everybody is one client
    assert "api_keys.yaml" not in versions
    assert "sds.yaml" not in versions


def test_websocket_is_bounded_by_the_body_limit_and_not_by_the_upload_time(tmp_path: Path) -> None:
    model = dataclasses.replace(
        MODEL,
        tls=False,
        routes=(AllowedRoute("WEBSOCKET", "/v1/realtime"),),
        request_body_bytes=1000,
        timeouts=Timeouts(upload_seconds=0.5),
    )
    handshake = ("upgrade: websocket", "connection: upgrade", "sec-websocket-key: x", "sec-websocket-version: 13")
    echoed = 0
    with started(model, tmp_path) as gateway, wire.connect(gateway.port, tls=False) as sock:
        sock.sendall(wire.request("GET", "/v1/realtime", *handshake))
        assert wire.status_of(sock.recv(1000)) == 101
        time.sleep(1)
        with contextlib.suppress(OSError):
            for _ in range(20):
                sock.sendall(b"x" * 100)
                data = sock.recv(1000)
                if not data:
                    break
                echoed += len(data)

    assert echoed == 1000


def test_plain_http_speaks_no_http2(tmp_path: Path) -> None:
    with started(dataclasses.replace(MODEL, tls=False), tmp_path) as gateway:
        answer = wire.exchange(gateway.port, b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + bytes(9), tls=False)

    assert wire.status_of(answer) in {0, 400, 426}


def test_empty_allowlist_allows_nothing(tmp_path: Path) -> None:
    with started(dataclasses.replace(MODEL, tls=False, routes=()), tmp_path) as gateway:
        answer = wire.exchange(gateway.port, wire.request("GET", "/v1/models", "connection: close"), tls=False)

    assert wire.status_of(answer) == 403


@pytest.mark.parametrize(("volume", "file"), [("auth", "api_keys.yaml"), ("xds", "rbac.yaml"), ("xds", "rds.yaml")])
def test_missing_file_at_start_keeps_the_port_shut(volume: str, file: str, tmp_path: Path) -> None:
    model = dataclasses.replace(local_model(MODEL, 9), tls=False)
    envoy = Envoy(model, root=tmp_path, engine_key=attacks.ENGINE_KEY, keys=KEYS)
    (tmp_path / volume / file).unlink()
    try:
        envoy.start(wait=0)
        time.sleep(1.5)
        assert not envoy.ready()
        with pytest.raises(OSError, match="refused"):
            socket.create_connection(("127.0.0.1", model.listen_port), timeout=1)
    finally:
        envoy.stop()


def test_without_an_engine_key_nothing_is_forwarded(tmp_path: Path) -> None:
    with serving() as engine:
        model = dataclasses.replace(local_model(MODEL, engine.port), tls=False)
        envoy = Envoy(model, root=tmp_path, engine_key=attacks.ENGINE_KEY, keys=KEYS)
        envoy.volumes.write("engine", {})
        try:
            envoy.start(wait=0)
            time.sleep(1.5)
            status = 0
            if envoy.ready():
                status = wire.status_of(
                    wire.exchange(model.listen_port, wire.request("GET", "/v1/models", "connection: close"), tls=False)
                )
        finally:
            envoy.stop()

        assert status in {0, 401}
        assert engine.seen == []


def test_keys_file_without_keys_refuses_everybody(tmp_path: Path) -> None:
    with started(dataclasses.replace(MODEL, tls=False), tmp_path) as gateway:
        text = gateway.envoy.keys([])
        gateway.envoy.wait_for_version("api_keys.yaml", versions_of({"api_keys.yaml": text})["api_keys.yaml"])
        answer = wire.exchange(gateway.port, wire.request("GET", "/v1/models", "connection: close"), tls=False)

    assert text == api_keys_file([])
    assert wire.status_of(answer) == 401
