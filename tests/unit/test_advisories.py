"""The table of advisories, and which of them a spec is told."""

from __future__ import annotations

import re
from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api.advisories import FEATURE_FLAGS
from securevllm.api.parse import parse
from securevllm.catalogue import Version, conditions
from securevllm.catalogue.conditions import Started
from securevllm.errors import SpecError
from securevllm.status import Facts, status

WHY = "because of the test"
FINE: dict[str, Any] = {"model": {"name": "/models/m"}, "image": "vllm/vllm-openai:v0.33.0"}
OLD: dict[str, Any] = {"security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": WHY}]}}


def told(version: str, **fields: Any) -> dict[str, str]:
    """Control by id."""
    found = parse("llama", {**FINE, **OLD, **fields, "image": f"vllm/vllm-openai:v{version}"})
    return {hit.advisory.id: hit.control for hit in found.advisories}


@pytest.mark.parametrize("advisory", catalogue.advisories(), ids=lambda advisory: advisory.id)
def test_a_row_is_whole(advisory: catalogue.Advisory) -> None:
    for number in (advisory.id, *advisory.aliases):
        assert re.fullmatch(r"CVE-\d{4}-\d{4,6}|GHSA(-[a-z0-9]{4}){3}|PYSEC-\d{4}-\d{1,6}", number)
    assert advisory.summary
    assert advisory.plane in {"inter-node", "http", "model"}
    assert advisory.severity in catalogue.SEVERITIES
    assert set(advisory.controls) <= catalogue.CONTROLS.keys()
    assert advisory.feature == "" or advisory.feature in catalogue.FEATURES
    assert {
        ("critical" if score >= 9 else "high" if score >= 7 else "medium") for score in [advisory.cvss] if score
    } <= {advisory.severity}
    known = {(route.method, route.path) for route in catalogue.routes()}
    assert set(advisory.routes) <= known
    ends = (advisory.versions.since, advisory.versions.until)
    assert None in ends or ends[0] < ends[1]  # type: ignore[operator]  # neither is None


def test_no_number_stands_twice() -> None:
    numbers = [number for item in catalogue.advisories() for number in (item.id, *item.aliases)]
    assert len(numbers) == len(set(numbers))


def test_every_control_and_feature_is_used() -> None:
    assert {name for item in catalogue.advisories() for name in item.controls} == set(catalogue.CONTROLS)
    assert {item.feature for item in catalogue.advisories()} - {""} == set(catalogue.FEATURES)
    assert set(FEATURE_FLAGS.values()) <= catalogue.FEATURES.keys()


def test_the_floor_is_the_first_version_without_a_serious_hole_that_nothing_covers() -> None:
    open_until = [
        item.versions.until for item in catalogue.advisories() if not item.controls and item.severity != "medium"
    ]
    assert max(until for until in open_until if until is not None) == catalogue.floor()
    assert None not in open_until


def test_the_newest_version_has_nothing_that_concerns_a_plain_spec() -> None:
    assert told("0.33.0") == {}


def test_controls_are_those_of_the_spec() -> None:
    plain = told("0.21.0")
    assert plain["CVE-2026-48746"] == "gateway-headers"
    assert plain["CVE-2026-130686"] == ""
    assert plain["CVE-2026-114052" if "CVE-2026-114052" in plain else "CVE-2026-114051"] == "route-allowlist"
    assert "CVE-2025-62164" not in plain, "needs --enable-prompt-embeds, which is refused"
    assert "CVE-2026-94622" not in plain, "needs NIXL"


def test_what_a_topology_uses_is_what_its_holes_need() -> None:
    sides = {"prefill": {"replicas": 1}, "decode": {"replicas": 1}, "router": {"image": "vllm/vllm-router:v0.1.17"}}
    mooncake = told("0.29.0", disaggregation={"connector": "mooncake", **sides})
    assert mooncake["CVE-2026-103764"] == "network-policy"
    assert mooncake["CVE-2026-94625"] == "network-policy"
    nixl = told("0.29.0", disaggregation={"connector": "nixl", **sides})
    assert nixl["CVE-2026-94622"] == ""
    assert "CVE-2026-103764" not in nixl
    assert told("0.20.2", parallelism={"pipeline": 2})["GHSA-v97p-wpxp-px84"] == ""
    assert "GHSA-v97p-wpxp-px84" not in told("0.20.2", parallelism={"tensor": 2})


def test_an_opened_route_is_not_covered_by_the_allowlist() -> None:
    routes = {"gateway": {"routes": {"profiles": ["chat", "responses"]}}}
    assert told("0.31.0")["CVE-2026-115911"] == "route-allowlist"
    assert told("0.31.0", **routes)["CVE-2026-115911"] == ""


def test_declared_egress_is_not_covered_by_the_egress_policy() -> None:
    egress = {"to": {"cidrs": ["8.8.8.0/24"]}, "ports": [{"port": 443}], "why": WHY}
    assert told("0.13.0")["CVE-2026-24779"] == "egress-policy"
    assert told("0.13.0", security={**OLD["security"], "egress": [egress]})["CVE-2026-24779"] == ""


def test_the_tag_counts_even_when_another_version_is_assumed() -> None:
    raw = {**FINE, **OLD, "image": "vllm/vllm-openai:v0.21.0", "vllmVersion": {"assume": "0.33.0"}}
    assert parse("llama", raw).advisories


def test_the_worst_that_nothing_covers_comes_first() -> None:
    raw = {**FINE, **OLD, "image": "vllm/vllm-openai:v0.13.0"}
    found = parse("llama", raw).advisories
    ranks = [(catalogue.SEVERITIES.index(hit.advisory.severity), bool(hit.control)) for hit in found]
    assert ranks == sorted(ranks)
    assert len(found) > 10


def test_the_status_lists_them() -> None:
    raw = {**FINE, **OLD, "image": "vllm/vllm-openai:v0.21.0"}
    shown = status(Facts(generation=1, advisories=parse("llama", raw).advisories), {}, "2026-11-24T00:00:00Z")
    rows = {row["id"]: row for row in shown["advisories"]}
    assert rows["CVE-2026-48746"] == {
        "id": "CVE-2026-48746", "severity": "critical", "control": "gateway-headers", "fixedIn": "0.22.0"
    }  # fmt: skip
    assert rows["CVE-2026-130686"] == {"id": "CVE-2026-130686", "severity": "high", "fixedIn": "0.33.0"}
    assert len(status(Facts(generation=1, advisories=parse("llama", raw).advisories * 9), {}, "")["advisories"]) == 64


# -------------------------------------------------------------------------------------------------- vllmVersion.minimum


@pytest.mark.parametrize(
    ("image", "minimum", "reasons"),
    [
        ("v0.33.0", "0.33.0", set()),
        ("v0.33.0", "0.33.1", {"VersionBelowMinimum"}),
        ("v0.32.0", "0.32.0", set()),
        ("v0.31.0", "0.32.0", {"VersionBelowMinimum"}),
    ],
)
def test_the_spec_can_ask_for_a_minimum(image: str, minimum: str, reasons: set[str]) -> None:
    raw = {**FINE, **OLD, "image": f"vllm/vllm-openai:{image}", "vllmVersion": {"minimum": minimum}}
    assert _reasons(raw) == reasons


def test_a_minimum_below_the_floor_accepts_nothing() -> None:
    raw = {**FINE, "image": "vllm/vllm-openai:v0.32.0", "vllmVersion": {"minimum": "0.30.0"}}
    assert _reasons(raw) == {"VersionBelowFloor"}


def test_a_minimum_says_nothing_of_an_unreadable_tag() -> None:
    raw = {**FINE, "image": "vllm/vllm-openai:latest", "vllmVersion": {"minimum": "0.33.0"}}
    assert _reasons(raw) == {"VersionUnreadable"}
    assert parse("llama", {**raw, "vllmVersion": {"minimum": "0.33.0", "assume": "0.33.0"}}).risks


def test_a_release_that_nobody_catalogued_needs_an_assumption_that_the_status_shows() -> None:
    newer = f"vllm/vllm-openai:v0.{catalogue.newest().minor + 1}.0"
    assert _reasons({**FINE, "image": newer}) == {"VersionUnknown"}
    found = parse("llama", {**FINE, "image": newer, "vllmVersion": {"assume": str(catalogue.newest())}})
    assert found.version == catalogue.newest()
    assert found.risks == ("vllmVersion.assume: the routes are those of 0.33.0, whatever the image holds",)


def _reasons(raw: dict[str, Any]) -> set[str]:
    try:
        parse("llama", raw)
    except SpecError as error:
        return {problem.reason for problem in error.problems}
    return set()


# ----------------------------------------------------------------------------------------------------------- conditions


@pytest.mark.parametrize("route", catalogue.routes(), ids=lambda route: f"{route.method} {route.path}")
def test_the_condition_of_every_route_can_be_read(route: catalogue.Route) -> None:
    assert conditions.holds(route.when, catalogue.newest(), Started()) in {True, False, None}


GENERATE, EMBED = frozenset({"generate"}), frozenset({"embed"})


@pytest.mark.parametrize(
    ("when", "version", "started", "holds"),
    [
        ("", "0.33", Started(), True),
        ("task generate", "0.33", Started(), None),
        ("task generate", "0.33", Started(tasks=GENERATE), True),
        ("task generate", "0.33", Started(tasks=EMBED), False),
        ("task embed or task token_embed", "0.33", Started(tasks=frozenset({"token_embed"})), True),
        ("scoring", "0.33", Started(tasks=EMBED), True),
        ("scoring", "0.33", Started(tasks=GENERATE), False),
        ("any pooling task", "0.33", Started(tasks=frozenset({"reward"})), True),
        ("--a or --b", "0.33", Started(flags={"--b": True}), True),
        ("--a or --b", "0.33", Started(complete=False), None),
        ("--a with BB=1", "0.33", Started(flags={"--a": True}), False),
        ("--a with BB=1", "0.33", Started(flags={"--a": True}, variables={"BB": True}), True),
        ("no --a", "0.33", Started(), True),
        ("no --a", "0.33", Started(flags={"--a": True}), False),
        ("no --a", "0.33", Started(complete=False), None),
        ("AA=1 and the cohere package, with --a or --b", "0.33", Started(), False),
        ("AA=1 and the cohere package, with --a or --b", "0.33", Started({"--b": True}, {"AA": True}), None),
        ("--a, otherwise 403; before 0.30 without them", "0.30", Started(), False),
        ("--a, otherwise 403; before 0.30 without them", "0.29", Started(), True),
        ("--a; before 0.13 BB", "0.12", Started(flags={"--a": True}), False),
        ("--a; before 0.13 BB", "0.12", Started(variables={"BB": True}), True),
    ],
)
def test_a_condition_is_read(when: str, version: str, started: Started, holds: bool | None) -> None:
    assert conditions.holds(when, Version.parse(version), started) is holds


@pytest.mark.parametrize("when", ["sometimes", "--a or sometimes", "--a; before 0.30 sometimes"])
def test_a_condition_in_other_words_is_refused(when: str) -> None:
    with pytest.raises(ValueError, match="not a condition"):
        conditions.holds(when, Version.parse("0.12"), Started())
