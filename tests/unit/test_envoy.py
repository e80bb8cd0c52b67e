# ruff: noqa: E501 - one case is one line
"""The rendered Envoy files: what is accepted, what is checked, what changes a version."""

from __future__ import annotations

import copy
import dataclasses
import json
import re
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securevllm import catalogue
from securevllm.errors import InternalError
from securevllm.render import envoy, envoy_check
from securevllm.render.envoy import AllowedRoute, ClientKey, GatewayModel, Timeouts, api_keys_file, envoy_files

ROUTES = (
    AllowedRoute("GET", "/v1/models"),
    AllowedRoute("POST", "/v1/chat/completions", streaming=True),
    AllowedRoute("GET", "/v1/responses/{response_id}"),
    AllowedRoute("WEBSOCKET", "/v1/realtime"),
)
MODEL = GatewayModel(
    version_path="/version",
    name="llama-gateway",
    listen_port=8443,
    ops_port=9902,
    admin_port=9901,
    metrics_port=9903,
    routes=ROUTES,
    upstream_host="llama-engine.ns.svc.cluster.local",
    upstream_port=8000,
    tls=True,
    hostnames=(),
    authentication=True,
    request_body_bytes=1 << 26,
    requests_per_second_per_client=100,
    stream_seconds=3600,
    stream_idle_seconds=600,
    max_clients=1000,
    heap_bytes=400 << 20,
    connections=8192,
)
ALICE = ClientKey("alice", "a" * 32)


def _parsed(model: GatewayModel = MODEL) -> dict[str, Any]:
    return {name: json.loads(text) for name, text in envoy_files(model).items()}


def _manager(files: dict[str, Any], listener: int = 0) -> dict[str, Any]:
    manager: dict[str, Any] = files["lds.yaml"]["resources"][listener]["filter_chains"][0]["filters"][0]["typed_config"]
    return manager


def _virtual_host(files: dict[str, Any]) -> dict[str, Any]:
    host: dict[str, Any] = files["rds.yaml"]["resources"][0]["virtual_hosts"][0]
    return host


def _rules(files: dict[str, Any]) -> dict[str, Any]:
    rules: dict[str, Any] = files["rbac.yaml"]["resources"][0]["typed_config"]["rules"]
    return rules


# ------------------------------------------------------------------------------------------------------------- routes


@pytest.mark.parametrize("method", ["OPTIONS", "HEAD", "TRACE", "CONNECT", "get", "", "*", "GET ", "FOO"])
def test_methods_that_are_never_allowed(method: str) -> None:
    with pytest.raises(InternalError, match="method must be one of"):
        AllowedRoute(method, "/v1/models")


@pytest.mark.parametrize(
    "path",
    [
        "", "/", "v1/models", "/v1/models/", "//v1", "/v1//models", "/v1/../pause", "/v1/.", "/v1/.x", "/v1/x.", "/v1/a..b", "/v1/*", "/v1/%2e",
        "/v1;x", "/v1?x", "/v1#x", "/v1/{id", "/v1/id}", "/v1/{}", "/v1/{ID}", "/v1/x{id}", "/v1/{id}x", "/v1/a b", "/v1/\n", "/v1/models\n",
        "/v1/é", "/v1/a\\b", "/v1/(a)", "/v1/{a}{b}",
    ],
)  # fmt: skip
def test_paths_that_could_be_read_in_two_ways(path: str) -> None:
    with pytest.raises(InternalError, match="segments are"):
        AllowedRoute("GET", path)


def test_variable_may_not_repeat() -> None:
    with pytest.raises(InternalError, match="twice"):
        AllowedRoute("GET", "/v1/{id}/{id}")


def test_every_route_of_the_catalogue_can_be_written() -> None:
    for route in catalogue.routes():
        assert AllowedRoute(route.method, route.path).name == f"{route.method} {route.path}"


@given(st.text(max_size=140))
def test_variable_is_one_segment_of_a_closed_class(value: str) -> None:
    route = AllowedRoute("GET", "/v1/responses/{response_id}/input.items")
    plain = 1 <= len(value) <= 128 and all(char.isascii() and (char.isalnum() or char in "_-") for char in value)

    assert bool(re.fullmatch(route.regex, f"/v1/responses/{value}/input.items")) is plain
    assert not re.fullmatch(route.regex, f"/v1/responses/{value}/inputXitems")


def test_no_allowable_variable_covers_a_route_that_is_never_allowed() -> None:
    known = catalogue.routes_of(catalogue.newest()).values()
    allowable = [AllowedRoute(one.method, one.path) for one in known if not one.never]
    never = [(one.method, re.sub(r"\{.*?\}", "abc", one.path)) for one in known if one.never]
    covered = [
        (route.name, method, path)
        for route in allowable
        for method, path in never
        if route.http_method == method and (path == route.path or (route.regex and re.fullmatch(route.regex, path)))
    ]

    assert covered == []


def test_keys_do_not_appear_in_a_representation() -> None:
    assert ALICE.key not in repr(ALICE)


# -------------------------------------------------------------------------------------------------------------- files


def test_both_allowlists_are_the_model() -> None:
    files = _parsed()

    routes = envoy_check.routes_of(files["rds.yaml"])
    permissions = envoy_check.permissions_of(files["rbac.yaml"], authentication=True)

    assert routes == permissions
    assert {(entry.method, entry.path or entry.regex, entry.websocket) for entry in routes} == {
        ("GET", "/v1/models", False),
        ("POST", "/v1/chat/completions", False),
        ("GET", "/v1/responses/[A-Za-z0-9_-]{1,128}", False),
        ("GET", "/v1/realtime", True),
    }


def test_same_model_gives_the_same_text_and_another_limit_changes_only_its_file() -> None:
    before, after = envoy_files(MODEL), envoy_files(dataclasses.replace(MODEL, request_body_bytes=1))

    assert before == envoy_files(dataclasses.replace(MODEL))
    assert {name for name in before if before[name] != after[name]} == {"lds.yaml"}
    assert envoy.revision(before) != envoy.revision(after)


def test_changed_routes_drain_no_listener_and_need_no_pod() -> None:
    before, after = envoy_files(MODEL), envoy_files(dataclasses.replace(MODEL, routes=ROUTES[1:]))

    assert {name for name in before if before[name] != after[name]} == {"rds.yaml", "rbac.yaml"}


def test_version_is_made_of_the_content() -> None:
    for name, content in _parsed().items():
        version = content.pop("version_info", None)
        assert (version is None) is (name == envoy.BOOTSTRAP_FILE)
        if version is not None:
            text = json.dumps({"version_info": version, **content}, indent=1) + "\n"
            assert envoy._versioned(json.dumps(content, indent=1), content) == envoy_files(MODEL)[name] == text


def test_files_follow_the_spec() -> None:
    plain = _parsed(dataclasses.replace(MODEL, tls=False, authentication=False, hostnames=("a.example",)))

    assert "sds.yaml" not in plain
    assert "transport_socket" not in plain["lds.yaml"]["resources"][0]["filter_chains"][0]
    assert "api_keys" not in {one["name"] for one in _manager(plain)["http_filters"]}
    assert _rules(plain)["policies"]["allowlist"]["principals"] == [{"any": True}]
    assert _virtual_host(plain)["domains"] == ["a.example"]
    assert _virtual_host(_parsed())["domains"] == ["*"]


def test_empty_allowlist_is_valid_and_allows_nothing() -> None:
    files = _parsed(dataclasses.replace(MODEL, routes=()))

    assert [route["name"] for route in _virtual_host(files)["routes"]] == ["deny"]
    assert _rules(files) == {"action": "ALLOW", "policies": {}}


def test_internal_addresses_are_not_an_empty_list() -> None:
    for listener in (0, 1):
        assert _manager(_parsed(), listener)["internal_address_config"]["cidr_ranges"] != []


def test_engine_key_and_client_keys_are_in_no_config_map() -> None:
    text = "".join(envoy_files(MODEL).values())

    assert '"filename": "/etc/envoy/engine/api-key"' in text
    assert '"credentials"' not in text
    assert '"inline_string": "not found"' in text  # and nothing else is inline
    assert text.count("inline_") == 1


@pytest.mark.parametrize(
    "change",
    [
        {"routes": (ROUTES[0], ROUTES[0])},
        {"hostnames": ('a"b',)},
        {"hostnames": ("*",)},
        {"hostnames": ("a.example, b.example",)},
        {"upstream_host": "a b"},
        {"upstream_host": "trailing.dot."},
        {"timeouts": Timeouts(upstream_idle_seconds=envoy.ENGINE_KEEP_ALIVE_SECONDS)},
    ],
)
def test_models_that_make_no_sense(change: dict[str, Any]) -> None:
    with pytest.raises(InternalError):
        dataclasses.replace(MODEL, **change)


def test_words_that_stand_for_a_name_are_replaced_and_no_name_of_a_user_is_taken_for_one() -> None:
    hostnames = ("the-host", "the-name", "host.the-host")
    model = dataclasses.replace(MODEL, hostnames=hostnames, name="mistral-gateway")
    texts = envoy_files(model)
    assert [name for name, text in texts.items() if "the_name" in text or '"the-host.' in text] == []
    files = {name: json.loads(text) for name, text in texts.items()}
    assert _virtual_host(files)["domains"] == [*hostnames]
    assert files["bootstrap.yaml"]["node"]["id"] == files["bootstrap.yaml"]["node"]["cluster"] == model.name
    assert f'"{MODEL.upstream_host}."' in texts["cds.yaml"]


def test_template_cannot_print_a_bare_value() -> None:
    template = envoy._ENVIRONMENT.from_string("name: {{ name }}")

    with pytest.raises(InternalError, match="without tojson"):
        template.render(name="x: y")


@given(st.text())
def test_any_text_survives_a_template(value: str) -> None:
    rendered = envoy._ENVIRONMENT.from_string("name: {{ name | tojson }}").render(name=value)

    assert json.loads(rendered.removeprefix("name: ")) == value


def test_arguments_keep_streams_and_reject_unknown_fields() -> None:
    arguments = envoy.arguments(MODEL, concurrency=2)

    assert arguments[arguments.index("--drain-time-s") + 1] == "3600"
    assert arguments[arguments.index("--concurrency") + 1] == "2"
    assert "--reject-unknown-dynamic-fields" in arguments


# ------------------------------------------------------------------------------------------------------------- checks


def _first(files: dict[str, Any]) -> dict[str, Any]:
    route: dict[str, Any] = _virtual_host(files)["routes"][0]
    return route


def _ops(files: dict[str, Any]) -> list[dict[str, Any]]:
    (network,) = files["lds.yaml"]["resources"][1]["filter_chains"][0]["filters"]
    routes: list[dict[str, Any]] = network["typed_config"]["route_config"]["virtual_hosts"][0]["routes"]
    return routes


def _scraped(files: dict[str, Any]) -> dict[str, Any]:
    manager: dict[str, Any] = files["lds.yaml"]["resources"][2]["filter_chains"][0]["filters"][1]["typed_config"]
    return manager


def _scrape_routes(files: dict[str, Any]) -> list[dict[str, Any]]:
    routes: list[dict[str, Any]] = _scraped(files)["route_config"]["virtual_hosts"][0]["routes"]
    return routes


def _scrape_rules(files: dict[str, Any]) -> dict[str, Any]:
    rules: dict[str, Any] = _scraped(files)["http_filters"][0]["typed_config"]["rules"]
    return rules


MISTAKES: dict[str, Callable[[dict[str, Any]], object]] = {
    "prefix": lambda f: _first(f)["match"].update(prefix=_first(f)["match"].pop("path")),
    "other path": lambda f: _first(f)["match"].update(path="/pause"),
    "case insensitive": lambda f: _first(f)["match"].update(case_sensitive=False),
    "no method": lambda f: _first(f)["match"]["headers"].pop(0),
    "method by prefix": lambda f: _first(f)["match"]["headers"][0].update(string_match={"prefix": "G"}),
    "body allowed": lambda f: _first(f)["match"]["headers"].pop(),
    "filter override": lambda f: _first(f).update(typed_per_filter_config={"api_keys": {}}),
    "override for all": lambda f: _virtual_host(f).update(typed_per_filter_config={"api_keys": {}}),
    "redirect": lambda f: _first(f)["route"].update(internal_redirect_policy={}),
    "path rewrite": lambda f: _first(f)["route"].update(prefix_rewrite="/pause"),
    "upgrade on a route": lambda f: _first(f)["route"].update(upgrade_configs=[{"upgrade_type": "websocket"}]),
    "no deny": lambda f: _virtual_host(f)["routes"].pop(),
    "deny forwards": lambda f: _virtual_host(f)["routes"][-1].update(route=_first(f)["route"]),
    "deny first": lambda f: _virtual_host(f)["routes"].insert(0, _virtual_host(f)["routes"].pop()),
    "route missing": lambda f: _virtual_host(f)["routes"].pop(0),
    "route twice": lambda f: _virtual_host(f)["routes"].insert(0, copy.deepcopy(_first(f))),
    "second host": lambda f: f["rds.yaml"]["resources"][0]["virtual_hosts"].append(_virtual_host(f)),
    "second configuration": lambda f: f["rds.yaml"]["resources"].append({}),
    "loose variable": lambda f: _virtual_host(f)["routes"][2]["match"]["safe_regex"].update(regex="/v1/responses/.+"),
    "deny list": lambda f: _rules(f).update(action="DENY"),
    "shadow rules": lambda f: _rules(f).update(shadow={}),
    "second policy": lambda f: _rules(f)["policies"].update(more={}),
    "everybody": lambda f: _rules(f)["policies"]["allowlist"].update(principals=[{"any": True}]),
    "permission for all": lambda f: _rules(f)["policies"]["allowlist"]["permissions"].append({"any": True}),
    "permission missing": lambda f: _rules(f)["policies"]["allowlist"]["permissions"].pop(),
    "permission by prefix": lambda f: _rules(f)["policies"]["allowlist"]["permissions"][0]["and_rules"]["rules"].__setitem__(
        1, {"url_path": {"path": {"prefix": "/v1/models"}}}
    ),
    "no authentication": lambda f: _manager(f)["http_filters"].pop(0),
    "authentication second": lambda f: _manager(f)["http_filters"].reverse(),
    "filter disabled": lambda f: _manager(f)["http_filters"][1].update(disabled=True),
    "generic upgrade": lambda f: _manager(f).update(upgrade_configs=[{"upgrade_type": "websocket"}]),
    "admin on the pod": lambda f: f["bootstrap.yaml"]["admin"]["address"]["socket_address"].update(address="::"),
    "ops leads to another path": lambda f: _ops(f)[2]["route"].update(prefix_rewrite="/metrics"),
    "ops takes every path": lambda f: _ops(f)[2].update(match={"prefix": "/"}),
    "ops takes a body": lambda f: _ops(f)[2]["match"]["headers"].pop(2),
    "ops leads to engines twice": lambda f: _ops(f).insert(0, copy.deepcopy(_ops(f)[2])),
    "ops leads metrics to engines": lambda f: _ops(f)[0]["route"].update(cluster="engine"),
    "ops refuses nothing": lambda f: _ops(f).pop(),
    "scrapers get all of the admin interface": lambda f: _scrape_routes(f)[0].update(match={"prefix": "/"}),
    "scrapers get another page": lambda f: _scrape_routes(f)[0]["route"].update(prefix_rewrite="/config_dump"),
    "scrapers get to engines": lambda f: _scrape_routes(f)[0]["route"].update(cluster="engine"),
    "scrapers may post": lambda f: _scrape_routes(f)[0]["match"]["headers"].pop(0),
    "scrapers may send a body": lambda f: _scrape_routes(f)[0]["match"]["headers"].pop(),
    "scrapers get a second route": lambda f: _scrape_routes(f).insert(0, copy.deepcopy(_scrape_routes(f)[0])),
    "scrapers are not refused": lambda f: _scrape_routes(f).pop(),
    "scrapers may ask all": lambda f: _scrape_rules(f)["policies"]["metrics"].update(permissions=[{"any": True}]),
    "scrapers may upgrade": lambda f: _scraped(f).update(upgrade_configs=[{"upgrade_type": "websocket"}]),
    "no rules for scrapers": lambda f: _scraped(f)["http_filters"].pop(0),
    "nobody to scrape": lambda f: f["lds.yaml"]["resources"].pop(),
    "listener added": lambda f: f["lds.yaml"]["resources"].append({"name": "back-door"}),
}  # fmt: skip


def _check(files: dict[str, Any]) -> None:
    wanted = frozenset(
        envoy_check.Entry(one.http_method, "" if one.regex else one.path, one.regex, one.websocket) for one in ROUTES
    )
    version = (envoy.ENGINE_VERSION_PATH, "/version")
    scraped = (envoy.SCRAPE_PATH, envoy.SCRAPED_PATH)
    envoy_check.check(files, wanted=wanted, authentication=True, engine_version=version, scraped=scraped)


def test_rendered_files_pass_the_check() -> None:
    _check(_parsed())


def test_behind_a_router_nothing_of_the_ops_port_leads_there() -> None:
    files = envoy.envoy_files(dataclasses.replace(MODEL, version_path=""))
    assert envoy.ENGINE_VERSION_PATH not in files["lds.yaml"]
    assert envoy.ENGINE_VERSION_PATH in envoy.envoy_files(MODEL)["lds.yaml"]


@pytest.mark.parametrize("name", MISTAKES)
def test_check_finds(name: str) -> None:
    files = _parsed()
    MISTAKES[name](files)

    with pytest.raises(InternalError, match="rendered Envoy configuration"):
        _check(files)


# --------------------------------------------------------------------------------------------------------------- keys


def test_keys_are_sorted_and_counted_once() -> None:
    bob, rotated = ClientKey("bob", "b" * 16), ClientKey("alice", "0" * 16)
    text = api_keys_file([bob, ALICE, rotated, ALICE])
    credentials = json.loads(text)["resources"][0]["typed_config"]["credentials"]

    assert [entry["client"] for entry in credentials] == ["alice", "alice", "bob"]
    assert text == api_keys_file([rotated, ALICE, bob])
    salted = api_keys_file([rotated, ALICE, bob], b"salt")
    assert json.loads(text)["version_info"] != json.loads(salted)["version_info"]
    assert json.loads(api_keys_file([]))["resources"][0]["typed_config"]["credentials"] == []


@pytest.mark.parametrize(
    "key", ["", "short", "a" * 513, "a" * 16 + " ", "a" * 16 + ",", "a" * 16 + "\n", "é" * 16, 'a"' * 16]
)
def test_keys_that_a_header_cannot_carry(key: str) -> None:
    with pytest.raises(InternalError, match="key of client 'alice'") as caught:
        api_keys_file([ClientKey("alice", key)])
    assert not key or key not in str(caught.value)


@pytest.mark.parametrize("client", ["", "a b", "a,b", "-a", "a" * 64, "é", "a\n"])
def test_clients_that_a_header_cannot_carry(client: str) -> None:
    with pytest.raises(InternalError, match="client id"):
        api_keys_file([ClientKey(client, ALICE.key)])


def test_key_of_two_clients_is_refused_and_not_quoted() -> None:
    with pytest.raises(InternalError, match="'alice' and 'bob' have the same key") as caught:
        api_keys_file([ALICE, ClientKey("bob", ALICE.key)])
    assert ALICE.key not in str(caught.value)
