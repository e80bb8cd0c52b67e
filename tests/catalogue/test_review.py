"""`check` and `diff` on findings made by hand: each kind of complaint, and none without a reason."""

from __future__ import annotations

import re
from dataclasses import replace
from fnmatch import fnmatch

import pytest

from securevllm import catalogue
from securevllm_dev.catalogue.findings import API, MOUNT, Findings, Flag, Port, Route, Unreadable, Variable
from securevllm_dev.catalogue.review import differences, review, reviewed

GUARDED = ("/cohere", "/inference", "/v1", "/v2")
SETTABLE = [*catalogue.flags().allowed.values(), *(s for r in catalogue.risks().values() for s in r.flags.values())]
FLAGS = tuple(
    Flag(name, "vllm/x.py:2")
    for setting in SETTABLE
    if catalogue.newest() in setting.versions
    for name in ([setting.name, f"--no-{setting.name[2:]}"] if setting.kind == "bool" else [setting.name])
)
VARIABLES = tuple(
    Variable(setting.name, "vllm/envs.py:2")
    for setting in catalogue.environment().allowed.values()
    if catalogue.newest() in setting.versions
)
EVERYTHING = Findings(
    flags=FLAGS,
    environment=VARIABLES,
    version="0.33.0",
    guarded=GUARDED,
    routes=tuple(
        Route(API, route.path, route.method, "vllm/x.py:1")
        for route in catalogue.routes_of(catalogue.Version(0, 33)).values()
    ),
)


def test_what_is_classified_is_no_complaint() -> None:
    assert review(EVERYTHING, complete=True) == []


def test_release_candidate_has_the_rows_of_its_release() -> None:
    assert review(replace(EVERYTHING, version="0.33.0rc1"), complete=True) == []


def test_a_tree_without_a_version_cannot_be_compared() -> None:
    (complaint,) = review(replace(EVERYTHING, version=""), complete=False)
    assert "not a vLLM release number" in complaint


def test_route_that_a_version_lacks() -> None:
    found = replace(EVERYTHING, routes=EVERYTHING.routes[1:])
    first = EVERYTHING.routes[0]
    assert review(found, complete=False) == []
    assert review(found, complete=True) == [
        f"routes.toml: {first.method} {first.path}: this version has no such route",
    ]


@pytest.mark.parametrize(
    ("route", "complaint"),
    [
        (Route(API, "/new", "GET", "vllm/x.py:7"), "vllm/x.py:7: GET /new: not classified"),
        (Route(API, "/health", "POST", "vllm/x.py:7"), "vllm/x.py:7: POST /health: not classified"),
        (Route(API, "/v1", MOUNT, "vllm/x.py:7"), "vllm/x.py:7: MOUNT /v1: not classified"),
        (
            Route("vllm/y.py", "/a", "GET", "vllm/y.py:7"),
            "vllm/y.py:7: GET /a: on a server that is not reviewed: vllm/y.py",
        ),
    ],
)
def test_route_that_nobody_classified(route: Route, complaint: str) -> None:
    assert review(replace(EVERYTHING, routes=(*EVERYTHING.routes, route)), complete=True) == [complaint]


def test_mount_over_routes_that_are_never_opened_is_classified() -> None:
    mount = Route(API, "/metrics", MOUNT, "vllm/x.py:7")
    assert review(replace(EVERYTHING, routes=(*EVERYTHING.routes, mount)), complete=True) == []


def test_key_that_guards_less_than_the_catalogue_says() -> None:
    complaints = review(replace(EVERYTHING, guarded=("/v1",)), complete=True)
    assert "vllm/x.py:1: POST /v2/rerank: guarded in the catalogue, but the guarded prefixes are /v1" in complaints
    assert not any("/v1/chat/completions" in complaint for complaint in complaints)


def test_key_that_guards_more_than_the_catalogue_says() -> None:
    complaints = review(replace(EVERYTHING, guarded=(*GUARDED, "/pooling")), complete=True)
    assert [complaint.partition(", but")[0] for complaint in complaints] == [
        "vllm/x.py:1: POST /pooling: open in the catalogue"
    ]


@pytest.mark.parametrize(
    ("name", "is_said"),
    [
        ("--remote-debug-port", True),
        ("--no-trust-everything", True),
        ("--max-num-seqs", False),
        ("--middleware", False),
        ("--no-trust-remote-code", False),
        ("--beam-width", False),
    ],
)
def test_flag(name: str, is_said: bool) -> None:
    complaints = review(replace(EVERYTHING, flags=(*FLAGS, Flag(name, "vllm/x.py:3"))), complete=True)
    assert complaints == ([f"vllm/x.py:3: flag {name} is not classified"] if is_said else [])


@pytest.mark.parametrize(
    ("name", "is_said"), [("VLLM_ADMIN_PORT", True), ("VLLM_SERVER_DEV_MODE", False), ("VLLM_USE_SOMETHING", False)]
)
def test_variable(name: str, is_said: bool) -> None:
    complaints = review(replace(EVERYTHING, environment=(*VARIABLES, Variable(name, "vllm/envs.py:3"))), complete=True)
    assert complaints == ([f"vllm/envs.py:3: variable {name} is not classified"] if is_said else [])


def test_versions_of_what_a_user_may_set_are_those_of_the_release() -> None:
    def without(name: str) -> list[str]:
        return review(replace(EVERYTHING, flags=tuple(flag for flag in FLAGS if flag.name != name)), complete=True)

    assert without("--max-model-len") == ["flags.toml: --max-model-len: not in this version"]
    assert without("--trust-remote-code") == ["flags.toml: --trust-remote-code: not in this version"]
    assert without("--no-enforce-eager") == ["flags.toml: --enforce-eager: kind bool, but its negation says otherwise"]
    gone = Flag("--override-pooler-config", "vllm/x.py:3")  # until 0.12
    assert review(replace(EVERYTHING, flags=(*FLAGS, gone)), complete=True) == [
        "flags.toml: --override-pooler-config: outside of its versions, but there"
    ]
    assert review(replace(EVERYTHING, environment=()), complete=True)[0].startswith("environment.toml: VLLM_")


def test_unreadable_place_is_reviewed_by_file_kind_and_code() -> None:
    known = Unreadable("vllm/entrypoints/a.py:9", "middleware", "app.add_middleware(imported)")
    for place in (
        replace(known, where="vllm/other.py:9"),
        replace(known, kind="server"),
        replace(known, code="app.add_middleware(other)"),
    ):
        (complaint,) = review(replace(EVERYTHING, unreadable=(known, place)), complete=True)
        assert complaint == f"{place.where}: {place.kind}: {place.code}: not reviewed"


def test_judgements_have_reasons_and_are_narrow() -> None:
    for row in reviewed().unreadable:
        assert row["why"]
    assert all(reviewed().servers.values())
    hidden = Unreadable("vllm/entrypoints/hidden.py:1", "path or methods are computed", "app.get(name)(f)")
    assert not any(
        fnmatch(hidden.file, row["file"]) and fnmatch(hidden.code, row["code"]) for row in reviewed().unreadable
    )


def test_no_name_is_both_dangerous_and_settable() -> None:
    flags, environment = catalogue.flags(), catalogue.environment()
    assert reviewed().flags & flags.allowed.keys() == set()
    assert reviewed().variables & environment.allowed.keys() == set()


def test_differences_are_told_per_concern() -> None:
    old = replace(
        EVERYTHING,
        routes=(Route(API, "/a", "GET", "vllm/a.py:1"), Route(API, "/b", "GET", "vllm/b.py:1")),
        flags=(Flag("--x", "f:1", "int", "1"),),
        environment=(Variable("VLLM_X", "e:1", "bool", "False"),),
        ports=(Port(8000, "port", "vllm/a.py:4"),),
    )
    new = replace(
        old,
        version="0.34.0",
        guarded=("/v1",),
        routes=(Route(API, "/a", "GET", "vllm/moved.py:8"), Route(API, "/c", "POST", "vllm/c.py:1", "--c")),
        flags=(Flag("--x", "f:1", "int", "2"),),
        environment=(),
        ports=(Port(8001, "port", "vllm/a.py:4"),),
    )
    assert differences(old, new) == [
        "vLLM 0.33.0 -> 0.34.0",
        "~ guarded prefixes /cohere /inference /v1 /v2 -> /v1",
        "\nroutes",
        "+ POST /c (api)  [--c]",
        "- GET /b (api)",
        "> GET /a (api): vllm/a.py -> vllm/moved.py",
        "\nflags",
        "~ --x: 1 -> 2",
        "\nenvironment",
        "- VLLM_X",
        "\nports",
        "+ 8001 port",
        "- 8000 port",
    ]
    assert differences(old, old) == ["vLLM 0.33.0 -> 0.33.0"]


def test_patterns_match_what_they_are_for() -> None:
    for name in ("--host", "--middleware", "--root-path", "--trust-remote-code", "--tool-server", "--grpc-port"):
        assert reviewed().suspicious_flags.search(name)
    for name in ("VLLM_PLUGINS", "VLLM_SERVER_DEV_MODE", "VLLM_ALLOW_INSECURE_SERIALIZATION", "VLLM_HOST_IP"):
        assert re.search(reviewed().suspicious_variables, name)
