"""The tables agree with the models, with each other and with themselves."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from typing import Any, get_args

import pytest

from securevllm import catalogue
from securevllm.api import types as api
from securevllm.catalogue import Range, Version


def table(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files(catalogue) / "data" / name).read_text(encoding="utf-8"))


def test_profiles_of_the_routes_are_those_of_the_spec() -> None:
    assert set(catalogue.profiles()) == set(get_args(api.Profile))


def test_every_profile_opens_a_route_of_the_newest_version() -> None:
    opened = {name for route in catalogue.routes_of(catalogue.newest()).values() for name in route.profiles}
    assert opened == set(get_args(api.Profile))


def test_a_route_that_is_never_open_is_in_no_profile() -> None:
    assert [route.path for route in catalogue.routes() if route.never and route.profiles] == []


def test_a_route_without_a_key_of_its_own_is_opened_by_name_only() -> None:
    """I4: the engine's key is the second lock behind the gateway's; these two have none, so no profile opens them."""
    keyless = [route for route in catalogue.routes() if not route.key and not route.never]
    assert {route.path for route in keyless} == {"/pooling", "/classify"}
    assert {route.profiles for route in keyless} == {()}


@pytest.mark.parametrize("route", catalogue.routes(), ids=lambda route: f"{route.method} {route.path}")
def test_a_route_is_a_full_row(route: catalogue.Route) -> None:
    assert route.source
    assert route.category in {"inference", "utility", "observability", "control", "docs"}
    assert route.path.startswith("/")
    assert route.method in {"GET", "POST", "PUT", "PATCH", "DELETE", catalogue.WEBSOCKET}
    ends = (route.versions.since, route.versions.until)
    assert None in ends or ends[0] < ends[1]  # type: ignore[operator]  # neither is None


def test_no_version_has_a_route_twice() -> None:
    for version in (catalogue.floor(), catalogue.newest(), Version(0, 15), Version(0, 22)):
        rows = [(route.method, route.path) for route in catalogue.routes() if version in route.versions]
        assert len(rows) == len(set(rows))


def test_ports_of_the_spec_are_the_sockets_that_can_be_moved() -> None:
    fields = {field.alias for field in api.Ports.model_fields.values()}
    assert {socket.spec for socket in catalogue.sockets().values() if socket.spec} == fields
    assert not [row.name for row in catalogue.sockets().values() if row.spec and row.random]


def test_default_ports_do_not_meet() -> None:
    ports = [socket.port for socket in catalogue.sockets().values() if socket.spec]
    assert len(ports) == len(set(ports))
    assert all(socket.source and socket.protocol in {"TCP", "UDP"} for socket in catalogue.sockets().values())


def test_a_flag_is_owned_or_allowed_and_never_both() -> None:
    flags = catalogue.flags()
    assert flags.owned.keys() & flags.allowed.keys() == set()
    names = {*flags.owned, *flags.allowed, *catalogue.risky_flags(), *flags.short.values()}
    assert all(name.startswith("--") and name == name.lower() and "_" not in name for name in names)
    assert not any(name.startswith("--no-") for name in names), "a negation comes from kind bool"
    assert {flag.kind for flag in flags.allowed.values()} <= {*KINDS, "none", "bool", "loras", "json"}
    assert all((name in flags.json) == (flag.kind == "json") for name, flag in flags.allowed.items())
    assert flags.json.keys() <= flags.allowed.keys()
    in_json = {key.kind for keys in flags.json.values() for key in keys.values()}
    assert in_json <= {"bool", "choice", "count", "float", "floats", "int", "ints", "ops", "path", "word", "words"}


KINDS = {"choice", "count", "endpoint", "float", "int", "path", "size", "text", "word"}


def test_a_risk_opens_nothing_that_the_operator_sets() -> None:
    flags, (dangers, _) = catalogue.flags(), catalogue.dangers()
    assert set(catalogue.risks()) == set(get_args(api.Risk))
    for name, risk in catalogue.risky_flags().items():
        assert name not in flags.owned
        assert name not in flags.allowed
        assert name in dangers or risk.flags[name].kind == "count"
        assert risk.flags[name].kind in {"bool", "count"}
    assert all(risk.why for risk in catalogue.risks().values())
    assert not catalogue.risks()["networkDevices"].default


def test_short_forms_lead_to_flags_that_are_known() -> None:
    flags = catalogue.flags()
    assert set(flags.short.values()) <= {*flags.owned, *flags.allowed, *catalogue.dangers()[0]}
    assert all(re.fullmatch("-[a-z]{1,3}", name) for name in flags.short)


def test_no_name_is_both_dangerous_and_settable() -> None:
    flags, environment, dangers = catalogue.flags(), catalogue.environment(), catalogue.dangers()
    assert dangers[0].keys() & flags.allowed.keys() == set()
    assert dangers[0].keys() & flags.owned.keys() == set()
    assert dangers[1].keys() & environment.allowed.keys() == set()


def test_keys_within_json_name_no_code_and_no_file_unless_it_is_in_a_volume() -> None:
    harmful = re.compile(
        "auto_map|module|class$|plugin|backend$|dir$|file|revision|trust|endpoint|host|addr|port|url|custom_op"
    )
    reviewed = {"backend", "custom_ops"}  # of attention and of structured outputs: words from an enumeration; op names
    for flag, keys in catalogue.flags().json.items():
        assert {key for key in keys if harmful.search(key)} <= reviewed, flag
    assert "backend" not in catalogue.flags().json["--compilation-config"]


def test_a_variable_is_set_or_allowed_and_never_both() -> None:
    environment = catalogue.environment()
    assert environment.fixed.keys() & environment.allowed.keys() == set()
    assert {variable.kind for variable in environment.allowed.values()} <= KINDS - {"path", "endpoint"}


def test_versions_are_ordered_and_the_floor_is_catalogued() -> None:
    assert catalogue.floor() <= catalogue.newest()
    texts = table("versions.toml")
    assert {str(catalogue.floor()), str(catalogue.newest())} == {texts["floor"], texts["newest"]}


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("0.33.0", Version(0, 33)),
        ("v0.33.1", Version(0, 33, 1)),
        ("v0.33", Version(0, 33)),
        ("v0.33.0-cu130", Version(0, 33)),
        ("0.33.0+cpu", Version(0, 33)),
        ("v0.10.1.post1", Version(0, 10, 1)),
    ],
)
def test_a_version_is_read(text: str, version: Version) -> None:
    assert Version.parse(text) == version


@pytest.mark.parametrize(
    "text", ["", "latest", "nightly", "0", "v", "0.33.0\n", "v0.33.x", "99999.1", "\u0660.33.0", "0.33.0 "]
)
def test_what_is_no_version_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="not a vLLM release number"):
        Version.parse(text)


def test_versions_are_compared_as_numbers() -> None:
    assert Version.parse("0.9.2") < Version.parse("0.10.0") < Version.parse("0.10.1")
    assert str(Version(0, 33, 1)) == "0.33.1"


def test_a_range_holds_its_beginning_and_not_its_end() -> None:
    some = Range(Version(0, 16), Version(0, 24))
    inside = [
        version for version in (Version(0, 15, 9), Version(0, 16), Version(0, 23, 9), Version(0, 24)) if version in some
    ]
    assert inside == [Version(0, 16), Version(0, 23, 9)]
    assert Version(0, 1) in Range()


def test_a_route_needs_the_key_exactly_when_a_guarded_prefix_says_so() -> None:
    server = catalogue.server()
    for version in map(Version.parse, table("versions.toml")["compared"]):
        guarded = server.guarded_in(version)
        for route in catalogue.routes_of(version).values():
            assert route.key is route.path.startswith(guarded), (str(version), route.path)


def test_what_a_server_knows_is_in_the_other_tables() -> None:
    server = catalogue.server()
    assert set(server.answers) <= {route.path for route in catalogue.routes()}
    assert {service.socket for service in server.services} <= set(catalogue.sockets())
    assert set(server.flags) >= set(catalogue.flags().owned)
    assert set(server.flags) & set(catalogue.flags().allowed) == set()
    assert set(server.flags.values()) <= {"none", "int", "text", "list", "json"}
