"""Which routes a spec can open: exact ones, unknown ones in words, and never one of those that are never opened."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api import routes
from securevllm.api.parse import Accepted, parse, parse_accepted
from securevllm.errors import Problem, SpecError
from securevllm.render import gateway
from tests.spellings import METHODS, NEVER, SPELLINGS, TEMPLATES, Spelling

WHY = "a plugin of ours adds it"
FINE: dict[str, Any] = {"model": {"name": "/models/m"}, "image": "vllm/vllm-openai:v0.33.0"}


def spec(allow: Iterable[dict[str, str]], **fields: Any) -> dict[str, Any]:
    return {**FINE, **fields, "gateway": {"routes": {"allow": list(allow)}}}


def found(allow: Iterable[dict[str, str]], **fields: Any) -> tuple[Problem, ...]:
    try:
        parse("llama", spec(allow, **fields))
    except SpecError as error:
        return error.problems
    return ()


def refused(allow: Iterable[dict[str, str]], **fields: Any) -> tuple[Problem, ...]:
    problems = found(allow, **fields)
    assert problems
    return problems


def accepted(*allow: dict[str, str]) -> Accepted:
    return parse("llama", spec(allow))


def batches(entries: Iterable[dict[str, str]]) -> Iterator[list[dict[str, str]]]:
    """As many at once as a spec takes; those that the schema refuses apart: it would hide what else is wrong."""
    parts: tuple[list[dict[str, str]], list[dict[str, str]]] = ([], [])
    for entry in entries:
        parts[re.fullmatch(r"/[A-Za-z0-9_./{}-]*", entry["path"]) is None].append(entry)
    for part in parts:
        yield from (part[first : first + 64] for first in range(0, len(part), 64))


def unopened(allow: Iterable[dict[str, str]]) -> list[dict[str, str]]:
    """Entries that were not refused each by itself."""
    left = []
    for batch in batches(allow):
        fields = {problem.field for problem in found(batch)}
        left += [
            entry
            for index, entry in enumerate(batch)
            if not any(field.startswith(f"spec.gateway.routes.allow[{index}]") for field in fields)
        ]
    return left


def test_there_are_enough_spellings() -> None:
    assert len(NEVER) > 50
    assert len(SPELLINGS) * len(NEVER) * len(METHODS) + len(TEMPLATES) * len(METHODS) > 100
    assert len({spell("/v1/load_lora_adapter") for spell in SPELLINGS.values()}) == len(SPELLINGS)


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("words", [{}, {"unknownRoute": WHY}], ids=["no-words", "in-words"])
def test_what_is_never_opened_is_not_by_any_spelling(spell: Spelling, words: dict[str, str]) -> None:
    entries = [
        {"method": method, "path": spell(path), **words}
        for path in NEVER
        for method in METHODS
        if catalogue.routes_of(catalogue.newest()).get((method, spell(path)), ONCE).never
    ]
    assert unopened(entries) == []


ONCE = catalogue.Route("GET", "/", category="control", key=False, source="", never=True)
"""For a spelling that is no row: it has to be refused, too."""


@pytest.mark.parametrize("path", TEMPLATES)
def test_no_template_opens_it(path: str) -> None:
    for method in METHODS:
        for words in ({}, {"unknownRoute": WHY}):
            assert refused([{"method": method, "path": path, **words}])


@pytest.mark.parametrize(
    "method", ["post", "Post", "POST ", "HEAD", "OPTIONS", "TRACE", "CONNECT", "WEBSOCKET", "*", ""]
)
def test_no_other_method_can_be_named(method: str) -> None:
    (problem,) = refused([{"method": method, "path": "/v1/custom", "unknownRoute": WHY}])
    assert problem.field.endswith("method")


@pytest.mark.parametrize(
    ("path", "row"),
    [
        ("/metrics", "GET /metrics"),
        ("/metrics/x", "GET /metrics"),
        ("/metricsfoo", "GET /metrics"),
        ("/static/swagger.js", "GET /static/{file}"),
        ("/static/a/b", "GET /static/{file}"),
        ("/adapters/mine", "DELETE /adapters/{adapter_name}"),
        ("/Sleep", "POST /sleep"),
        ("/V2/Embed", "POST /v2/embed"),
    ],
)
def test_the_row_is_named(path: str, row: str) -> None:
    assert routes.forbidden(path) is not None
    (problem,) = refused([{"method": "PUT", "path": path, "unknownRoute": WHY}])
    assert problem.reason == "RouteForbidden"
    assert f"could be read as {row} (" in problem.rule


def test_an_unknown_route_is_opened_in_words_and_is_a_risk() -> None:
    judged = accepted({"method": "POST", "path": "/v1/custom.thing/run", "unknownRoute": WHY})
    assert judged.risks == (f"gateway.routes.allow POST /v1/custom.thing/run: {WHY}",)
    opened = {route.name: route for route in gateway.allowed_routes(judged.spec, judged.version)}
    assert opened["POST /v1/custom.thing/run"].streaming
    assert len(opened) == len(gateway.allowed_routes(accepted().spec, judged.version)) + 1


def test_words_beside_a_known_route_are_a_misunderstanding() -> None:
    (problem,) = refused([{"method": "POST", "path": "/classify", "unknownRoute": WHY}])
    assert (problem.field, problem.reason) == ("spec.gateway.routes.allow[0].unknownRoute", "InvalidSpec")


@pytest.mark.parametrize(
    "path", ["/", "/a/", "//a", "/a//b", "/a/../b", "/./a", "/a.", "/.a", "/a..b", "/{x}", "/a{x}"]
)
def test_an_unknown_route_is_one_literal_path(path: str) -> None:
    (problem,) = refused([{"method": "POST", "path": path, "unknownRoute": WHY}])
    assert problem.reason == "RouteUnknown"


def test_an_unknown_route_without_words_says_what_to_write() -> None:
    (problem,) = refused([{"method": "POST", "path": "/v1/custom"}])
    assert problem.reason == "RouteUnknown"
    assert "unknownRoute: <why>" in problem.fix


def test_what_was_open_in_an_older_version_is_never_opened_there() -> None:
    old = {"image": "vllm/vllm-openai:v0.21.0", "security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": WHY}]}}
    (problem,) = refused([{"method": "POST", "path": "/v2/embed"}], **old)
    assert problem.reason == "RouteForbidden"
    accepted({"method": "POST", "path": "/v2/embed"})


def test_a_spec_that_is_not_judged_again_opens_nothing_that_is_never_opened() -> None:
    """parse_accepted judges by no rule: the allowlist itself has to hold."""
    judged = parse_accepted(spec([{"method": "POST", "path": "/metrics/x", "unknownRoute": WHY}]))
    assert judged is not None
    assert not [route for route in routes.allowed(judged.spec, judged.version) if route.path.startswith("/metrics")]
