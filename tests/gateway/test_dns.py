"""The engines are what DNS says: a removed pod gets nothing more, and an empty Service stops everything."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from securevllm.render.envoy import envoy_files
from tests.gateway import attacks, dns_server, wire
from tests.gateway.dns_server import NOERROR, NXDOMAIN, SERVFAIL, DnsServer
from tests.gateway.engine import Engine, serving
from tests.gateway.envoy_process import Envoy, local_model, running
from tests.gateway.gateway import KEYS, MODEL

pytestmark = pytest.mark.envoy

ONE, TWO = "127.0.0.2", "127.0.0.3"
NAME = "llama-engine.ns.svc.cluster.local"
SEARCH = "ns.svc.cluster.local svc.cluster.local cluster.local"


@dataclass
class World:
    """A gateway that asks our DNS server for its engines."""

    envoy: Envoy
    engine: Engine
    dns: DnsServer

    def ask(self) -> tuple[int, str]:
        """Status, and the address of the engine that answered."""
        with wire.Client(self.envoy.model.listen_port, tls=False) as client:
            answer = client.ask(wire.request("GET", "/v1/models"))
        body = json.loads(answer.partition(b"\r\n\r\n")[2])
        return wire.status_of(answer), body.get("address", "")

    def settles(self, condition: Callable[[set[tuple[int, str]]], bool], seconds: float = 4) -> bool:
        """Whether ten answers in a row meet the condition within some time."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            if condition({self.ask() for _ in range(10)}):
                return True
            time.sleep(0.05)
        return False


def _cluster(files: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    content = json.loads(files["cds.yaml"])
    return content, content["resources"][0]


def _with_resolver(files: Mapping[str, str], port: int) -> dict[str, str]:
    """Ask our server instead of the one in resolv.conf, and more often."""
    content, cluster = _cluster(files)
    dns = cluster["cluster_type"]["typed_config"]
    dns["dns_refresh_rate"] = "0.1s"
    dns["dns_failure_refresh_rate"] = {"base_interval": "0.1s", "max_interval": "0.1s"}
    dns["typed_dns_resolver_config"] = {
        "name": "envoy.network.dns_resolver.cares",
        "typed_config": {
            "@type": "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig",
            "resolvers": [{"socket_address": {"address": "127.0.0.1", "port_value": port}}],
        },
    }
    return {**files, "cds.yaml": json.dumps(content)}


@pytest.fixture
def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Iterator[World]:
    # What kubelet writes to resolv.conf of a pod.
    monkeypatch.setenv("LOCALDOMAIN", SEARCH)
    monkeypatch.setenv("RES_OPTIONS", "ndots:5")
    with dns_server.serving() as dns, serving(hosts=(ONE, TWO)) as engine:
        dns.addresses = [ONE, TWO]
        model = dataclasses.replace(local_model(MODEL, engine.port), tls=False, upstream_host=NAME)
        files = _with_resolver(envoy_files(model), dns.port)
        mutate = getattr(request, "param", None)
        with running(
            model,
            root=tmp_path,
            keys=KEYS,
            engine_key=attacks.ENGINE_KEY,
            files=mutate(files) if mutate else files,
            resolve=True,
        ) as envoy:
            yield World(envoy, engine, dns)


def test_name_is_asked_for_once_and_not_with_the_search_list(world: World) -> None:
    assert {world.ask()[0] for _ in range(5)} == {200}
    assert set(world.dns.asked) == {NAME}


def test_both_engines_get_requests_and_a_removed_one_gets_no_more(world: World) -> None:
    assert world.settles(lambda answers: answers == {(200, ONE), (200, TWO)})
    world.dns.addresses = [TWO]
    assert world.settles(lambda answers: answers == {(200, TWO)})
    world.dns.addresses = [ONE, TWO]
    assert world.settles(lambda answers: answers == {(200, ONE), (200, TWO)})


@pytest.mark.parametrize("code", [NOERROR, NXDOMAIN], ids=["no records", "no such name"])
def test_empty_service_stops_all_requests_though_health_still_answers(world: World, code: int) -> None:
    world.dns.addresses, world.dns.code = [], code

    assert world.settles(lambda answers: answers == {(503, "")})
    assert world.envoy.healthy_engines() == 0
    assert world.envoy.ready()  # the gateway itself is fine: its pods stay

    world.dns.addresses, world.dns.code = [ONE], NOERROR
    assert world.settles(lambda answers: answers == {(200, ONE)})


def test_failing_dns_changes_nothing(world: World) -> None:
    world.dns.code = SERVFAIL
    asked = len(world.dns.asked)
    while len(world.dns.asked) < asked + 3:
        time.sleep(0.05)

    assert {status for status, _ in (world.ask() for _ in range(10))} == {200}


def _keep_removed_hosts(files: Mapping[str, str]) -> dict[str, str]:
    content, cluster = _cluster(files)
    cluster["ignore_health_on_host_removal"] = False
    return {**files, "cds.yaml": json.dumps(content)}


@pytest.mark.parametrize("world", [_keep_removed_hosts], indirect=True)
def test_without_ignore_health_on_host_removal_an_empty_service_stops_nothing(world: World) -> None:
    world.dns.addresses = []

    assert not world.settles(lambda answers: answers == {(503, "")}, seconds=1.5)
