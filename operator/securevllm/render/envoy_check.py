"""Reads the rendered Envoy configuration back and compares it with what was meant.

The two copies of the allowlist are derived from the parsed files by two functions that share nothing with the
templates. Besides, the shape that both layers rely on is checked: one virtual host, a refusing last route, no route
that switches a filter off, authentication first and the router last.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from securevllm.errors import InternalError


@dataclass(frozen=True)
class Entry:
    """One (method, path) as Envoy matches it: an exact path, or a regex of the whole path."""

    method: str
    path: str
    regex: str
    websocket: bool


_NO_BODY = {"name": "content-length", "present_match": True, "invert_match": True}
_WEBSOCKET = {"name": "upgrade", "string_match": {"exact": "websocket", "ignore_case": True}}
_DENY = {
    "name": "deny",
    "match": {"prefix": "/"},
    "direct_response": {"status": 404, "body": {"inline_string": "not found"}},
}
_ROUTE_FIELDS = {"name", "match", "route"}
_ACTION_FIELDS = {
    "cluster",
    "host_rewrite_literal",
    "timeout",
    "idle_timeout",
    "max_stream_duration",
    "retry_policy",
    "upgrade_configs",
}
_FILTERS = (
    "api_keys",
    "allowlist",
    "envoy.filters.http.local_ratelimit",
    "envoy.filters.http.body_size_limit",
    "envoy.filters.http.credential_injector",
    "envoy.filters.http.router",
)


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise InternalError(f"rendered Envoy configuration: {message}")


def routes_of(rds: Mapping[str, Any]) -> frozenset[Entry]:
    """The allowlist that rds.yaml enforces.

    Raises:
        InternalError: something in it could let another request through.
    """
    _require(len(rds["resources"]) == 1, "rds.yaml must hold one route configuration")
    hosts = rds["resources"][0]["virtual_hosts"]
    _require(len(hosts) == 1, "rds.yaml must hold one virtual host")
    _require("typed_per_filter_config" not in hosts[0], "the virtual host overrides a filter")
    *routes, last = hosts[0]["routes"]
    _require(last == _DENY, "the last route must refuse")
    entries = []
    for route in routes:
        name, match, action = route.get("name"), route.get("match", {}), route.get("route", {})
        _require(set(route) == _ROUTE_FIELDS, f"route {name} has fields {sorted(route)}")
        _require(set(action) <= _ACTION_FIELDS, f"route {name} has an action with {sorted(action)}")
        exact = set(match) == {"path", "case_sensitive", "headers"} and match["case_sensitive"] is True
        _require(exact or set(match) == {"safe_regex", "headers"}, f"route {name} matches by {sorted(match)}")
        method, *conditions = match["headers"]
        _require(
            method["name"] == ":method" and set(method["string_match"]) == {"exact"}, f"route {name} has no method"
        )
        websocket = _WEBSOCKET in conditions
        upgrades = [{"upgrade_type": "websocket", "enabled": True}] if websocket else None
        _require(action.get("upgrade_configs") == upgrades, f"route {name} upgrades")
        verb = method["string_match"]["exact"]
        bodiless = [_NO_BODY] * (verb in {"GET", "DELETE"})
        _require(conditions == [_WEBSOCKET] * websocket + bodiless, f"route {name} has conditions {conditions}")
        entries.append(Entry(verb, match.get("path", ""), match.get("safe_regex", {}).get("regex", ""), websocket))
    return _unique(entries, "rds.yaml")


def permissions_of(rbac: Mapping[str, Any], *, authentication: bool) -> frozenset[Entry]:
    """The allowlist that rbac.yaml enforces.

    Raises:
        InternalError: something in it could let another request, or another principal, through.
    """
    rules = rbac["resources"][0]["typed_config"]["rules"]
    _require(
        len(rbac["resources"]) == 1 and set(rules) == {"action", "policies"}, "rbac.yaml must hold one set of rules"
    )
    _require(rules["action"] == "ALLOW", "rbac.yaml must be a list of what is allowed")
    if not rules["policies"]:
        return frozenset()
    _require(set(rules["policies"]) == {"allowlist"}, "rbac.yaml must hold one policy")
    policy = rules["policies"]["allowlist"]
    principal = {"header": {"name": "x-gateway-client", "present_match": True}} if authentication else {"any": True}
    _require(policy["principals"] == [principal], "rbac.yaml has another principal")
    entries = []
    for permission in policy["permissions"]:
        _require(set(permission) == {"and_rules"}, "a permission is not a conjunction")
        method, path, *conditions = permission["and_rules"]["rules"]
        _require(
            method["header"]["name"] == ":method" and set(method["header"]["string_match"]) == {"exact"},
            "a permission has no method",
        )
        matcher = path["url_path"]["path"]
        _require(set(matcher) in ({"exact"}, {"safe_regex"}), f"a permission matches paths by {sorted(matcher)}")
        _require(conditions in ([], [{"header": _WEBSOCKET}]), f"a permission has conditions {conditions}")
        regex = matcher.get("safe_regex", {}).get("regex", "")
        entries.append(
            Entry(method["header"]["string_match"]["exact"], matcher.get("exact", ""), regex, bool(conditions))
        )
    return _unique(entries, "rbac.yaml")


def _unique(entries: list[Entry], name: str) -> frozenset[Entry]:
    result = frozenset(entries)
    _require(len(result) == len(entries), f"{name} repeats an entry")
    return result


def check(
    parsed: Mapping[str, Mapping[str, Any]],
    *,
    wanted: frozenset[Entry],
    authentication: bool,
    engine_version: tuple[str, str] | None = None,
    scraped: tuple[str, str] | None = None,
) -> None:
    """Compare all files with what was meant.

    Args:
        parsed: file name to parsed content.
        wanted: the allowlist.
        authentication: whether a client key is demanded.
        engine_version: path on the ops listener, and the one path of an engine that it leads to; None: to none.
        scraped: the one path of the listener for scrapers, and the one of the admin interface that it leads to; None:
            there is no such listener.

    Raises:
        InternalError: a difference, or a shape that the layers do not hold in.
    """
    try:
        _check(parsed, wanted, authentication=authentication)
        _check_ops(parsed["lds.yaml"]["resources"][1], engine_version)
        _check_metrics(parsed["lds.yaml"]["resources"][2:], scraped)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise InternalError(f"rendered Envoy configuration: unexpected shape ({error!r})") from error


def _check(parsed: Mapping[str, Mapping[str, Any]], wanted: frozenset[Entry], *, authentication: bool) -> None:
    routes = routes_of(parsed["rds.yaml"])
    _require(routes == wanted, f"rds.yaml allows {_difference(routes, wanted)}")
    permissions = permissions_of(parsed["rbac.yaml"], authentication=authentication)
    _require(permissions == wanted, f"rbac.yaml allows {_difference(permissions, wanted)}")

    gateway, ops, *_ = parsed["lds.yaml"]["resources"]
    _require((gateway["name"], ops["name"]) == ("gateway", "ops"), "lds.yaml must hold the listeners gateway and ops")
    (chain,) = gateway["filter_chains"]
    (manager,) = (network["typed_config"] for network in chain["filters"])
    filters = tuple(entry["name"] for entry in manager["http_filters"])
    _require(filters == (_FILTERS if authentication else _FILTERS[1:]), f"filters are {filters}")
    disabled = [entry["name"] for entry in manager["http_filters"] if entry.get("disabled") or entry.get("is_optional")]
    _require(not disabled, f"filters may be absent: {disabled}")
    websocket = any(entry.websocket for entry in wanted)
    upgrades = [{"upgrade_type": "websocket", "enabled": False}] if websocket else []
    _require(manager["upgrade_configs"] == upgrades, "the listener upgrades")
    _require(
        parsed["bootstrap.yaml"]["admin"]["address"]["socket_address"]["address"] == "127.0.0.1",
        "the admin interface must listen on loopback",
    )


def _check_ops(ops: Mapping[str, Any], engine_version: tuple[str, str] | None) -> None:
    """No request of the ops listener reaches an engine but one, whose method and path are fixed."""
    (chain,) = ops["filter_chains"]
    (manager,) = (network["typed_config"] for network in chain["filters"])
    (host,) = manager["route_config"]["virtual_hosts"]
    *routes, last = host["routes"]
    _require(last == {"match": {"prefix": "/"}, "direct_response": {"status": 404}}, "the last ops route must refuse")
    _require(all("route" in route for route in routes), "an ops route is no route")
    to_engines = [route for route in routes if route["route"]["cluster"] != "self_admin"]
    _require(len(to_engines) == (engine_version is not None), "the ops listener leads to engines")
    for route in to_engines:
        path, rewritten = engine_version or ("", "")
        told = [
            {"name": name, "string_match": {"exact": value}} for name, value in ((":method", "GET"), (":path", path))
        ]
        absent = [{"name": name, "present_match": True, "invert_match": True} for name in ("content-length", "upgrade")]
        _require(route["match"] == {"path": path, "headers": [*told, *absent]}, "the ops listener's way to engines")
        _require(route["route"]["prefix_rewrite"] == rewritten, "the ops listener asks engines for something else")


def _check_metrics(listeners: Sequence[Mapping[str, Any]], scraped: tuple[str, str] | None) -> None:
    """A scraper reaches one path of the admin interface, by one request, and two layers say so."""
    names = [listener["name"] for listener in listeners]
    _require(names == ["metrics"] * (scraped is not None), f"lds.yaml has more listeners: {names}")
    for listener in listeners:
        path, asked = scraped or ("", "")
        told = [
            {"name": name, "string_match": {"exact": value}} for name, value in ((":method", "GET"), (":path", path))
        ]
        (chain,) = listener["filter_chains"]
        _, manager = (network["typed_config"] for network in chain["filters"])
        rbac, _, router = manager["http_filters"]
        _require(
            router["name"] == "envoy.filters.http.router" and manager["upgrade_configs"] == [],
            "the listener for scrapers does more than to route",
        )
        rules = rbac["typed_config"]["rules"]
        permissions = [{"and_rules": {"rules": [{"header": header} for header in told]}}]
        _require(
            rules
            == {
                "action": "ALLOW",
                "policies": {"metrics": {"principals": [{"any": True}], "permissions": permissions}},
            },
            "the listener for scrapers allows something else",
        )
        (host,) = manager["route_config"]["virtual_hosts"]
        match = {"path": path, "case_sensitive": True, "headers": [*told, _NO_BODY]}
        route = {"cluster": "self_admin", "prefix_rewrite": asked, "timeout": "10s"}
        _require(
            host["routes"]
            == [{"match": match, "route": route}, {"match": {"prefix": "/"}, "direct_response": {"status": 404}}],
            "the listener for scrapers leads somewhere else",
        )


def _difference(got: frozenset[Entry], wanted: frozenset[Entry]) -> str:
    more = sorted(f"{entry.method} {entry.path or entry.regex}" for entry in got - wanted)
    less = sorted(f"{entry.method} {entry.path or entry.regex}" for entry in wanted - got)
    return f"{more} too much and {less} too little"
