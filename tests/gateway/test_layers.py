# ruff: noqa: E501 - one case is one line
"""One layer is taken away on purpose, and the other one still holds; with both gone the attack succeeds.

The last column is the proof that these tests can fail.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.gateway import attacks, wire
from tests.gateway.engine import serving
from tests.gateway.envoy_process import Mutation, local_model, mutated, running
from tests.gateway.gateway import KEYS, MODEL

pytestmark = pytest.mark.envoy

Files = dict[str, Any]


def _routes(files: Files) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = files["rds.yaml"]["resources"][0]["virtual_hosts"][0]["routes"]
    return routes


def _permissions(files: Files) -> list[dict[str, Any]]:
    policy = files["rbac.yaml"]["resources"][0]["typed_config"]["rules"]["policies"]["allowlist"]
    permissions: list[dict[str, Any]] = policy["permissions"]
    return permissions


def _manager(files: Files) -> dict[str, Any]:
    (network,) = files["lds.yaml"]["resources"][0]["filter_chains"][0]["filters"]
    manager: dict[str, Any] = network["typed_config"]
    return manager


def routes_forward_everything(files: Files) -> None:
    routes = _routes(files)
    action = copy.deepcopy(routes[0]["route"])
    routes[-1] = {"name": "catch-all", "match": {"prefix": "/"}, "route": action}


def routes_are_prefixes(files: Files) -> None:
    for route in _routes(files)[:-1]:
        if "path" in route["match"]:
            route["match"]["prefix"] = route["match"].pop("path")


def routes_have_no_methods(files: Files) -> None:
    for route in _routes(files)[:-1]:
        route["match"].pop("headers")


def routes_have_loose_variables(files: Files) -> None:
    for route in _routes(files)[:-1]:
        if "safe_regex" in route["match"]:
            route["match"]["safe_regex"]["regex"] = "/v1/responses/.+"


def route_needs_no_key(files: Files) -> None:
    for route in _routes(files)[:-1]:
        route["typed_per_filter_config"] = {
            "api_keys": {
                "@type": "type.googleapis.com/envoy.config.route.v3.FilterConfig",
                "config": {},
                "disabled": True,
            }
        }


def no_authentication_filter(files: Files) -> None:
    _manager(files)["http_filters"].pop(0)


def identity_is_not_stripped(files: Files) -> None:
    (early,) = _manager(files)["early_header_mutation_extensions"]
    mutations = early["typed_config"]["mutations"]
    mutations.remove({"remove": "x-gateway-client"})


def rbac_allows_all_paths(files: Files) -> None:
    _permissions(files).append({"any": True})


def rbac_allows_everybody(files: Files) -> None:
    policies = files["rbac.yaml"]["resources"][0]["typed_config"]["rules"]["policies"]
    policies["allowlist"]["principals"] = [{"any": True}]


def rbac_is_gone(files: Files) -> None:
    filters = _manager(files)["http_filters"]
    filters[:] = [one for one in filters if one["name"] != "allowlist"]


PAUSE = wire.request("POST", "/pause", "content-length: 0")
BY_RBAC = b"RBAC: access denied"
BY_ROUTES = b"not found"
BY_KEYS = b"Client authentication failed"

CASES: Mapping[str, tuple[bytes, Mutation, bytes, Mutation]] = {
    # name: attack, one layer's mistake, who refuses, the other layer's mistake
    "catch-all": (PAUSE, routes_forward_everything, BY_RBAC, rbac_allows_all_paths),
    "catch-all, no filter": (PAUSE, rbac_is_gone, BY_ROUTES, routes_forward_everything),
    "prefix": (wire.request("GET", "/v1/models/x"), routes_are_prefixes, BY_RBAC, rbac_allows_all_paths),
    "prefix of POST": (
        wire.request("POST", "/v1/chat/completions/render", "content-length: 0"),
        routes_are_prefixes,
        BY_RBAC,
        rbac_is_gone,
    ),
    "method": (wire.request("DELETE", "/v1/models"), routes_have_no_methods, BY_RBAC, rbac_allows_all_paths),
    "options": (wire.request("OPTIONS", "/v1/chat/completions"), routes_have_no_methods, BY_RBAC, rbac_is_gone),
    "variable": (wire.request("GET", "/v1/responses/a/b/c"), routes_have_loose_variables, BY_RBAC, rbac_allows_all_paths),
    "no key on a route": (wire.request("GET", "/v1/models", key=None), route_needs_no_key, BY_RBAC, rbac_allows_everybody),
    "no key filter": (wire.request("GET", "/v1/models", key=None), no_authentication_filter, BY_RBAC, rbac_allows_everybody),
    "principal": (wire.request("GET", "/v1/models", key=None), rbac_allows_everybody, BY_KEYS, no_authentication_filter),
    "paths": (PAUSE, rbac_allows_all_paths, BY_ROUTES, routes_forward_everything),
    "forged client": (
        wire.request("GET", "/v1/models", "x-gateway-client: alice", key=None),
        no_authentication_filter,
        BY_RBAC,
        identity_is_not_stripped,
    ),
}  # fmt: skip


def _ask(attack: bytes, mutations: list[Mutation], root: Path, certificate: tuple[str, str]) -> tuple[bytes, int]:
    with serving() as engine:
        model = local_model(MODEL, engine.port)
        files = mutated(model, mutations)
        with (
            running(
                model, root=root, keys=KEYS, engine_key=attacks.ENGINE_KEY, certificate=certificate, files=files
            ) as envoy,
            wire.Client(envoy.model.listen_port) as client,
        ):
            return client.ask(attack), len(engine.seen)


@pytest.mark.parametrize("name", CASES)
def test_one_layer_is_enough_and_both_are_needed_for_a_breach(
    name: str, tmp_path: Path, certificate: tuple[str, str]
) -> None:
    attack, mistake, refusal, second_mistake = CASES[name]

    answer, seen = _ask(attack, [mistake], tmp_path / "one", certificate)
    assert refusal in answer
    assert seen == 0

    answer, seen = _ask(attack, [mistake, second_mistake], tmp_path / "both", certificate)
    assert wire.status_of(answer) == 200, answer
    assert seen == 1
