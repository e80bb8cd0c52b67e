"""The gateway's listener for scrapers, a real Envoy: one request, and no other page of the admin interface.

A scraper is somebody whom the spec names, and still gets no more than numbers: neither what the operator may ask of the
ops port, nor an engine, nor what could change this Envoy.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import re
from pathlib import Path
from typing import Any

import pytest

from securevllm.render.envoy import (
    ENGINE_VERSION_PATH,
    METRICS_PATH,
    READY_PATH,
    SCRAPE_PATH,
    SCRAPED_PATH,
    VERSIONS_PATH,
)
from tests.gateway import attacks, wire
from tests.gateway.engine import serving
from tests.gateway.envoy_process import Mutation, local_model, mutated, running
from tests.gateway.gateway import KEYS, MODEL, Gateway, started
from tests.spellings import SPELLINGS, Spelling

pytestmark = pytest.mark.envoy

PLAIN = dataclasses.replace(MODEL, tls=False, scrapes=1_000_000)
ADMIN = (
    "/", "/certs", "/clusters", "/config_dump", "/contention", "/cpuprofiler", "/drain_listeners", "/healthcheck/fail",
    "/heapprofiler", "/help", "/hot_restart_version", "/init_dump", "/listeners", "/logging?level=trace", "/memory",
    "/quitquitquit", "/ready", "/reopen_logs", "/reset_counters", "/runtime", "/runtime_modify?a=b", "/server_info",
    "/stats", "/stats/prometheus", "/stats/recentlookups", "/tap",
)  # fmt: skip
ATTACKS = attacks.h1_attacks()


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with started(PLAIN, tmp_path_factory.mktemp("gateway")) as running:
        yield running


def ask(port: int, method: str, path: str, *headers: str, body: bytes = b"") -> bytes:
    request = wire.request(method, path, "connection: close", *headers, key=None, body=body)
    return wire.exchange(port, request, tls=False, more=0.5)


def refused(answer: bytes) -> bool:
    """No answer, or one of an error; nothing of Envoy's state in it."""
    return not re.search(rb"HTTP/1\.[01] [123]|envoy_|version_info|\"configs\"", answer)


def numbers(answer: bytes) -> dict[str, float]:
    """Samples of a scrape."""
    return {
        name: float(value)
        for name, value in re.findall(r"^(envoy_\w+\{[^}]*\}) ([0-9.e+]+)\r?$", answer.decode(), re.MULTILINE)
    }


def test_a_scraper_sees_what_clients_and_engines_do_and_nobodys_secret(gateway: Gateway) -> None:
    with wire.Client(gateway.port, tls=False) as client:
        client.ask(wire.request("GET", "/v1/models"))
        client.ask(wire.request("GET", "/v1/models", key="0123456789abcdef-wrong"))
        client.ask(wire.request("POST", "/pause", "content-length: 0"))
    answer = ask(gateway.envoy.model.metrics_port, "GET", SCRAPE_PATH)
    assert wire.status_of(answer) == 200
    found = numbers(answer)
    assert found['envoy_http_api_key_auth_unauthorized{envoy_http_conn_manager_prefix="gateway"}'] >= 1
    assert found['envoy_http_rbac_denied{envoy_http_conn_manager_prefix="gateway"}'] >= 1
    assert found['envoy_cluster_membership_healthy{envoy_cluster_name="engine"}'] == 1
    assert found['envoy_http_rds_update_rejected{envoy_rds_route_config="gateway",'
                 'envoy_http_conn_manager_prefix="gateway"}'] == 0  # fmt: skip
    # Of the clients' listener, not of what the operator, kubelet and scrapers themselves ask.
    managers = {match for name in found for match in re.findall(r'conn_manager_prefix="(\w+)"', name)}
    assert managers == {"gateway"}
    assert {match for name in found for match in re.findall(r'cluster_name="(\w+)"', name)} == {"engine"}
    for secret in (*(entry.key for entry in KEYS), *(entry.client for entry in KEYS), attacks.ENGINE_KEY, "0123456789"):
        assert secret.encode() not in answer
    assert not any(leak in answer.lower() for leak in (b"server: ", b"x-envoy", b"version_text", b"/v1/models"))
    assert len(answer) < 64 << 10


@pytest.mark.parametrize("page", ADMIN)
def test_no_page_of_the_admin_interface_is_reached(gateway: Gateway, page: str) -> None:
    port = gateway.envoy.model.metrics_port
    for method in ("GET", "POST"):
        for path in (page, f"{page}?usedonly", f"/metrics/..{page}", f"/metrics/%2e%2e{page}", f"/metrics?{page}"):
            assert refused(ask(port, method, path)), (method, path)
    assert gateway.envoy.ready()


def test_what_the_operator_asks_and_what_the_admin_interface_is_asked_is_not_for_scrapers(gateway: Gateway) -> None:
    port = gateway.envoy.model.metrics_port
    gateway.engine.clear()
    for path in (READY_PATH, METRICS_PATH, VERSIONS_PATH, ENGINE_VERSION_PATH, SCRAPED_PATH):
        assert refused(ask(port, "GET", path)), path
        assert refused(ask(port, "GET", SCRAPE_PATH + path)), path
    assert [seen.target for seen in gateway.engine.seen if seen.target != "/health"] == []


@pytest.mark.parametrize(
    "query", ["?", "?x", "?filter=.", "?text_readouts", "&filter=.", "?format=json", "%3ffilter=."]
)
def test_a_scraper_chooses_nothing_of_what_is_asked(gateway: Gateway, query: str) -> None:
    assert refused(ask(gateway.envoy.model.metrics_port, "GET", SCRAPE_PATH + query))


@pytest.mark.parametrize(
    "method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "METRICS"]
)
def test_no_other_method(gateway: Gateway, method: str) -> None:
    assert refused(ask(gateway.envoy.model.metrics_port, method, SCRAPE_PATH))


@pytest.mark.parametrize("spell", [spell for name, spell in SPELLINGS.items() if name != "itself"])
def test_no_other_spelling(gateway: Gateway, spell: Spelling) -> None:
    path = spell(SCRAPE_PATH)
    if " " not in path and path != SCRAPE_PATH:
        assert refused(wire.exchange(
            gateway.envoy.model.metrics_port,
            f"GET {path} HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n".encode(),
            tls=False, more=0.5,
        ))  # fmt: skip


def test_a_body_an_upgrade_and_http_2_are_refused(gateway: Gateway) -> None:
    port = gateway.envoy.model.metrics_port
    assert refused(ask(port, "GET", SCRAPE_PATH, body=b"GET /config_dump HTTP/1.1\r\nhost: x\r\n\r\n"))
    upgrade = ("connection: upgrade", "upgrade: websocket", "sec-websocket-key: x", "sec-websocket-version: 13")
    assert wire.status_of(wire.exchange(port, wire.request("GET", SCRAPE_PATH, *upgrade, key=None), tls=False)) != 101
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    assert refused(wire.exchange(port, preface, tls=False))


def test_no_attack_on_a_gateway_brings_an_engine_or_a_page_of_the_admin_interface(gateway: Gateway) -> None:
    outcomes, others = wire.run(ATTACKS, gateway.envoy.model.metrics_port, gateway.engine, tls=False)
    assert len(outcomes) >= 250
    assert [attack.name for attack, one in zip(ATTACKS, outcomes, strict=True) if one.seen] == []
    assert [one.target for one in others if one.target != "/health"] == []
    # What is answered at all is a scrape: no page of the admin interface has these types, and nothing else has none.
    assert [
        attack.name
        for attack, one in zip(ATTACKS, outcomes, strict=True)
        if b"HTTP/1.1 200" in one.answer and b"# TYPE envoy_" not in one.answer
    ] == []
    assert wire.status_of(ask(gateway.envoy.model.metrics_port, "GET", SCRAPE_PATH)) == 200


def _manager(files: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = files["lds.yaml"]["resources"][2]["filter_chains"][0]["filters"][1]["typed_config"]
    return manager


def no_permissions(files: dict[str, Any]) -> None:
    _manager(files)["http_filters"].pop(0)


def every_route(files: dict[str, Any]) -> None:
    routes = _manager(files)["route_config"]["virtual_hosts"][0]["routes"]
    action = copy.deepcopy(routes[0]["route"])
    del action["prefix_rewrite"]
    routes[-1] = {"match": {"prefix": "/"}, "route": action}


def every_page(files: dict[str, Any]) -> None:
    del files["bootstrap.yaml"]["admin"]["allow_paths"]


@pytest.mark.parametrize(
    ("mutations", "status"),
    [
        ((), 403),
        ((no_permissions, every_page), 404),
        ((every_route, every_page), 403),
        ((no_permissions, every_route), 403),
        ((no_permissions, every_route, every_page), 200),
    ],
    ids=["all three", "routes", "permissions", "pages of the admin interface", "none"],
)
def test_each_of_three_layers_holds_alone_and_without_all_the_attack_succeeds(
    mutations: tuple[Mutation, ...], status: int, tmp_path: Path
) -> None:
    with serving() as engine:
        model = local_model(PLAIN, engine.port)
        files = mutated(model, mutations)
        with running(model, root=tmp_path, keys=KEYS, engine_key=attacks.ENGINE_KEY, files=files) as envoy:
            answer = ask(envoy.model.metrics_port, "GET", "/config_dump")
            assert wire.status_of(answer) == status
            assert (b'"configs"' in answer) is (status == 200)
            assert wire.status_of(ask(envoy.model.metrics_port, "GET", SCRAPE_PATH)) == 200


def test_scrapes_and_their_connections_are_limited_and_clients_take_none_of_them(tmp_path: Path) -> None:
    with (
        started(dataclasses.replace(PLAIN, connections=2, scrapes=3), tmp_path) as gateway,
        contextlib.ExitStack() as open_,
    ):
        port = gateway.envoy.model.metrics_port
        for _ in range(4):  # more than the whole gateway takes from clients
            open_.enter_context(wire.connect(gateway.port, tls=False))
        answers = [wire.status_of(ask(port, "GET", SCRAPE_PATH)) for _ in range(3)]
        assert answers[0] == 200
        with wire.connect(port, tls=False) as sock:
            sock.sendall(wire.request("GET", SCRAPE_PATH, key=None) * 8)
            sock.settimeout(2)
            received = b""
            with contextlib.suppress(OSError):
                while chunk := sock.recv(65536):
                    received += chunk
        assert b"HTTP/1.1 429" in received

        waiting = [open_.enter_context(wire.connect(port, tls=False)) for _ in range(80)]
        assert gateway.envoy.ready()
        ended = 0
        for sock in waiting:
            sock.settimeout(0.1)
            with contextlib.suppress(TimeoutError):
                ended += sock.recv(1) == b""
        assert ended >= 80 - 64


def test_without_scrapers_nothing_listens_and_the_admin_interface_does_not_know_their_page(tmp_path: Path) -> None:
    with started(dataclasses.replace(PLAIN, metrics_port=0), tmp_path) as gateway:
        listeners = re.findall(r"total_listeners_active\{\} (\d+)", gateway.envoy.ops(METRICS_PATH)[1])
        assert listeners == ["2"]
        answer = ask(gateway.envoy.model.admin_port, "GET", SCRAPED_PATH)
        assert wire.status_of(answer) == 403
