"""The command line: what the operator renders is accepted, in every topology; what vLLM does not know is refused."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.fake_vllm.arguments import ArgumentError, parse
from e2e.fake_vllm.world import World, world
from securevllm import catalogue
from securevllm.catalogue import Version

NEWEST = catalogue.newest()
EXPECTED = Path(__file__).parents[1] / "golden" / "expected"
# The pinned template of one case has a made-up flag, to be told from today's.
CASES = sorted({path.parent.name for path in EXPECTED.glob("*/objects.yaml")} - {"outdated-pin"})


def placed(*flags: str) -> World:
    return world(parse(["m", *flags], NEWEST), NEWEST)


def engines(case: str) -> Iterator[dict[str, Any]]:
    """Containers of vLLM of a golden case."""
    for item in yaml.safe_load_all((EXPECTED / case / "objects.yaml").read_text(encoding="utf-8")):
        template = (
            item.get("spec", {}).get("template") if item and item["kind"] in {"Deployment", "StatefulSet"} else None
        )
        for container in template["spec"]["containers"] if template else ():
            if container["name"] == "vllm":
                yield container


@pytest.mark.parametrize("case", CASES)
def test_what_the_operator_renders_is_a_command_line_of_vllm(case: str) -> None:
    for container in engines(case):
        tag = re.search(r":v?(\d+\.\d+\.\d+)", container["image"])
        version = Version.parse(tag[1]) if tag else NEWEST
        found = world(parse(container["args"], version), version)
        assert found.http is ("--headless" not in container["args"])
        declared = {port["containerPort"] for port in container.get("ports", ())}
        assert bool(declared) is found.http


def test_golden_cases_have_members_of_every_kind() -> None:
    """Otherwise the test above would show little."""
    found = [
        world(parse(container["args"], NEWEST), NEWEST)
        for case in CASES
        for container in engines(case)
        if container["image"].endswith(str(NEWEST))
    ]
    whens = {when for one in found for when in one.whens}
    assert {"api", "nodes", "data", "group", "nixl"} <= whens
    assert {(one.head, one.http) for one in found if not one.alone} >= {(True, True), (False, False), (False, True)}


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
        (["--grpc"], "unrecognized arguments: --grpc"),
        (["--uds=/x"], "unrecognized arguments: --uds=/x"),
        (["--data-parallel-r=1"], "ambiguous option: --data-parallel-r=1 could match"),
        (["--port=http"], "invalid int value: 'http'"),
        (["--port"], "expected one argument"),
        (["--kv-transfer-config={"], "invalid loads value"),
        (["--kv-transfer-config.kv_role"], "expected one argument"),
    ],
)
def test_flags_that_vllm_does_not_know_are_refused_as_argparse_says(flags: Sequence[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        parse(["m", *flags], NEWEST)


def test_spellings_of_vllms_parser() -> None:
    dotted = ("--kv-transfer-config.kv_role=r", "--kv_transfer_config.kv_connector_extra_config.n", "1")
    args = parse(["m", "--tensor_parallel_size", "2", "-pp", "3", "--nnod=2", "--nnodes=3", *dotted], NEWEST)
    assert (args.model_tag, args.tensor_parallel_size, args.pipeline_parallel_size, args.nnodes) == ("m", 2, 3, 3)
    assert args.kv_transfer_config == {"kv_role": "r", "kv_connector_extra_config": {"n": 1}}


def test_an_older_release_does_not_know_newer_flags() -> None:
    since = catalogue.flags().since["--distributed-timeout-seconds"].since
    assert since is not None
    parse(["m", "--distributed-timeout-seconds=1"], since)
    with pytest.raises(ArgumentError, match="unrecognized"):
        parse(["m", "--distributed-timeout-seconds=1"], catalogue.oldest())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--headless", "--api-server-count=1"], "cannot be used with --headless"),
        (["--headless", "--data-parallel-hybrid-lb"], "not applicable in headless mode"),
        (["--nnodes=3", "--tensor-parallel-size=4"], "must evenly divide"),
        (["--nnodes=2", "--node-rank=2", "--tensor-parallel-size=2"], "must be between 0 and 1"),
        (["--nnodes=2", "--node-rank=1", "--tensor-parallel-size=2"], "must be --headless"),
        (["--nnodes=2", "--node-rank=0", "--tensor-parallel-size=2", "--headless"], "cannot be --headless"),
        (["--data-parallel-external-lb"], "requires a data-parallel rank"),
        (["--data-parallel-hybrid-lb", "--data-parallel-size=2"], "requires --data-parallel-size-local"),
        (["--data-parallel-rank=0", "--data-parallel-size=4", "--data-parallel-size-local=2"], "size-local 1"),
        (["--data-parallel-size=2", "--data-parallel-rank=2"], "not within --data-parallel-size 2"),
        (["--headless", "--data-parallel-size=2", "--data-parallel-size-local=0"], "must be > 0"),
        (['--kv-transfer-config={"kv_connector": "NoConnector"}'], "Unsupported connector type: NoConnector"),
        (['--kv-transfer-config={"kv_connector": "NixlConnector", "kv_role": "x"}'], "Unsupported kv_role: x"),
    ],
)
def test_numbers_and_modes_that_vllm_refuses(flags: Sequence[str], message: str) -> None:
    with pytest.raises(ArgumentError, match=re.escape(message)):
        placed(*flags)


def test_the_catalogue_alone_gives_ports_and_routes() -> None:
    """No literal of them in the program: a row that changes is a row that the stand-in follows."""
    folder = Path(__file__).parents[2] / "e2e" / "fake_vllm"
    text = "\n".join(path.read_text(encoding="utf-8") for path in folder.glob("*.py"))
    ports = {port for row in catalogue.sockets().values() for port in (row.port, row.last) if port}
    assert {port for port in ports if re.search(rf"\b{port}\b", text)} == set()
    assert {route.path for route in catalogue.routes() if f'"{route.path}"' in text} == set()
    assert {service.path for service in catalogue.server().services if f'"{service.path}"' in text} == set()
