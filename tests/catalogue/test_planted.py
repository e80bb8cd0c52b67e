"""Every way to hide a route is found, or reported in the file where it hides."""

from __future__ import annotations

import pytest

from securevllm_dev.catalogue.extract import findings
from securevllm_dev.catalogue.findings import API, Findings
from securevllm_dev.catalogue.source import Source
from tests.catalogue.planted import WAYS, files


@pytest.fixture(scope="module")
def found() -> Findings:
    return findings(Source(files=files(), version="0.0.0"))


@pytest.mark.parametrize("name", WAYS)
def test_way_is_found_or_reported(found: Findings, name: str) -> None:
    way = WAYS[name]
    routes = {f"{route.method} {route.path}" for route in found.routes}
    assert set(way.found) <= routes
    kinds = {place.kind for place in found.unreadable if place.file == f"vllm/entrypoints/way_{name}.py"}
    assert not way.kind or way.kind in kinds


def test_nothing_is_found_that_was_not_planted(found: Findings) -> None:
    planted = {text for way in WAYS.values() for text in way.found}
    own = {f"GET {path}" for path in ("/docs", "/redoc", "/openapi.json", "/docs/oauth2-redirect")}
    # The mount of the patched route; pairs of a loop are read as every path with every method: never too little.
    extra = {"MOUNT /x", "PUT /p1", "GET /p2"}
    assert {f"{route.method} {route.path}" for route in found.routes} == planted | own | extra


def test_ways_that_are_readable_are_not_reported(found: Findings) -> None:
    noise = {
        place.where
        for place in found.unreadable
        for name, way in WAYS.items()
        if place.file == f"vllm/entrypoints/way_{name}.py" and way.found
    }
    assert noise == set()


def test_conditions_and_servers(found: Findings) -> None:
    by_path = {route.path: route for route in found.routes}
    assert by_path["/plain"].server == API
    assert by_path["/aio"].server == "vllm/entrypoints/way_aiohttp.py"
    assert by_path["/global"].when == "router unknown"
    assert found.guarded == ("/v1", "/v2")


def test_enough_ways() -> None:
    assert len(WAYS) >= 20
