"""The catalogue against vLLM's own releases: everything in them is classified, and everything classified is in them."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from securevllm_dev.catalogue.__main__ import main
from securevllm_dev.catalogue.extract import extract
from securevllm_dev.catalogue.findings import API, Findings
from securevllm_dev.catalogue.review import differences
from tests.catalogue.releases import sdist

pytestmark = pytest.mark.slow

STANDARDS = ("model_hosting_container_standards", "0.1.16")
"""What vLLM 0.33.0 depends on; the package that adds keyless routes."""


@pytest.fixture(autouse=True)
def _collector() -> Iterator[None]:
    """The command switches the collector off for its own process; here there are others."""
    yield
    gc.enable()


@pytest.mark.parametrize("version", ["0.33.0", "0.32.0", "0.22.1", "0.11.1"])
def test_release_is_classified_completely(version: str) -> None:
    result = CliRunner().invoke(main, ["check", str(sdist("vllm", version)), "--with", str(sdist(*STANDARDS))])
    assert (result.exit_code, result.output.splitlines()[:-1]) == (0, [])
    assert result.output.startswith(f"vLLM {version}: 0 not classified")


@pytest.fixture(scope="module")
def newest() -> Findings:
    return extract(sdist("vllm", "0.33.0"), [sdist(*STANDARDS)])


def test_what_the_newest_release_has(newest: Findings) -> None:
    routes = {(route.method, route.path): route for route in newest.routes if route.server == API}
    assert len(routes) == 84
    assert routes["POST", "/v1/chat/completions"].when == "task generate"
    assert routes["POST", "/collective_rpc"].when == "VLLM_SERVER_DEV_MODE"
    assert routes["GET", "/tokenizer_info"].when == "--enable-tokenizer-info-endpoint"
    assert routes["POST", "/invocations"].when == ""
    assert newest.guarded == ("/cohere", "/inference", "/v1", "/v2")
    assert newest.problems == ()


def test_flags_variables_and_ports_of_the_newest_release(newest: Findings) -> None:
    flags = {flag.name: flag for flag in newest.flags}
    assert (flags["--port"].type, flags["--port"].default) == ("int", "8000")
    assert flags["--trust-remote-code"].default == "False"
    assert {"--no-enable-prefix-caching", "--headless", "--master-port", "--api-key"} <= flags.keys()
    variables = {variable.name: variable for variable in newest.environment}
    assert variables["VLLM_SERVER_DEV_MODE"].default == "False"
    assert variables["VLLM_NIXL_SIDE_CHANNEL_PORT"].default == "5600"
    ports = {(port.name, port.number) for port in newest.ports}
    assert {("master_port", 29501), ("data_parallel_rpc_port", 29550), ("port", 8000)} <= ports


def test_extraction_does_not_take_minutes() -> None:
    path = sdist("vllm", "0.33.0")
    gc.disable()
    began = time.process_time()
    extract(path)
    assert time.process_time() - began < 60  # bench has the number


def test_difference_of_two_releases(newest: Findings) -> None:
    lines = differences(extract(sdist("vllm", "0.32.0")), newest)
    assert any(line.startswith("+ POST /v1/decisions (api)") for line in lines)
    assert not any(line.startswith("- GET /health") for line in lines)
