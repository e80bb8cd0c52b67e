"""What vLLM does in which version, as data.

One TOML table per concern in ``data/``; this module only reads and types them. Everything that comes from vLLM
(a route, a port, a flag, a variable) is a row there and nowhere else; api, topology, render and tests derive from it.
"""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib import resources
from types import MappingProxyType
from typing import Any

_VERSION = re.compile(
    r"v?(\d{1,4})\.(\d{1,4})(?:\.(\d{1,4}))?(?:\.post\d+)?(?:[-+](?!rc|alpha|beta|dev|nightly)[0-9A-Za-z.-]+)?",
    re.ASCII,
)

WEBSOCKET = "WEBSOCKET"
"""Method of a row that is a WebSocket and not an HTTP route."""


@dataclass(frozen=True, order=True)
class Version:
    """A vLLM release; ordered. A build suffix (``-cu130``, ``+cpu``) does not count; a pre-release is no release."""

    major: int
    minor: int
    patch: int = 0

    @classmethod
    def parse(cls, text: str) -> Version:
        """Read ``0.33.0``, ``v0.33.0`` or ``v0.33.0-cu130``.

        Raises:
            ValueError: the text is not a release number.
        """
        match = _VERSION.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is not a vLLM release number such as 0.33.0")
        return cls(*(int(part or 0) for part in match.groups()))

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}.{self.patch}"


@dataclass(frozen=True)
class Range:
    """Versions ``since <= v < until``; an absent end is open."""

    since: Version | None = None
    until: Version | None = None

    def __contains__(self, version: Version) -> bool:
        return (self.since is None or version >= self.since) and (self.until is None or version < self.until)


@dataclass(frozen=True)
class Route:
    """One (method, path) that a vLLM server may answer on. Columns: see ``data/routes.toml``."""

    method: str
    path: str
    category: str
    key: bool
    source: str
    profiles: tuple[str, ...] = ()
    never: bool = False
    mount: bool = False
    streaming: bool = False
    when: str = ""
    versions: Range = Range()


@dataclass(frozen=True)
class Socket:
    """One listening socket of vLLM. Columns: see ``data/sockets.toml``."""

    name: str
    role: str
    on: str
    port: int
    knob: str
    protocol: str
    speaks: str
    bind: str
    when: str
    source: str
    spec: str = ""
    last: int | None = None
    per: str = ""
    versions: Range = Range()

    @property
    def random(self) -> bool:
        """Whether the kernel chooses the port."""
        return self.port == 0

    @property
    def ours(self) -> bool:
        """Whether a program of this project opens it, in the pod but not in vLLM."""
        return self.knob.startswith("securevllm ")


CONTROLS: Mapping[str, str] = MappingProxyType(
    {
        "network-policy": "only pods of the same group reach the engine's sockets",
        "egress-policy": "engines reach nothing but what the spec declares",
        "route-allowlist": "the gateway does not let the route through",
        "gateway-headers": "the gateway writes Host and X-Request-Id itself",
        "gateway-authentication": "the gateway asks for its own key on every route",
        "gateway-limits": "the gateway limits headers, body and rate of requests",
        "guard": "the flag, variable or connector that it needs is refused",
    }
)
"""What keeps an attacker away from a hole in vLLM, by the names that ``data/advisories.toml`` uses."""

FEATURES: Mapping[str, str] = MappingProxyType(
    {
        "nodes": "several pods in one group",
        "pipeline": "pipeline parallelism",
        "mooncake": "the Mooncake connector",
        "nixl": "the NIXL connector",
        "p2p-nccl": "the P2pNccl connector",
        "p2p-offload": "the P2P offload tier",
        "lmcache": "LMCache",
        "prompt-embeds": "--enable-prompt-embeds",
        "trust-remote-code": "--trust-remote-code",
        "speculative": "speculative decoding with extract_hidden_states",
        "shm-cache": "--mm-processor-cache-type=shm",
        "rust-frontend": "the Rust frontend",
        "grpc": "gRPC",
        "run-batch": "vllm run-batch",
    }
)
"""What has to be in use for some advisories."""

SEVERITIES = ("critical", "high", "medium")
"""Of advisories, worst first."""


@dataclass(frozen=True)
class Advisory:
    """A published hole. Columns: see ``data/advisories.toml``."""

    id: str
    summary: str
    plane: str
    severity: str
    controls: tuple[str, ...]
    aliases: tuple[str, ...] = ()
    cvss: float | None = None
    routes: tuple[tuple[str, str], ...] = ()
    feature: str = ""
    component: str = ""
    versions: Range = Range()

    @property
    def fixed(self) -> Version | None:
        """First vLLM without it; None: no fixed release is known, or it depends on another package."""
        return self.versions.until


@dataclass(frozen=True)
class Danger:
    """Why a flag or variable is refused. Columns: see ``data/dangers.toml``."""

    why: str
    severity: str


@dataclass(frozen=True)
class Setting:
    """A flag or a variable that a user may set. Columns: see ``data/flags.toml``.

    Attributes:
        name: ``--max-model-len``, ``OMP_NUM_THREADS``.
        kind: kind of value; ``choice`` when `choices` are all of them.
        choices: the values.
        path: whether a path below a declared volume is a value, too.
        versions: releases that have it.
    """

    name: str
    kind: str
    choices: tuple[str, ...] = ()
    path: bool = False
    versions: Range = Range()


@dataclass(frozen=True)
class Flags:
    """Command-line flags of ``vllm serve``.

    Attributes:
        owned: those that the operator sets, and the spec field that a user writes instead.
        allowed: those that a user may set.
        json: per flag with a JSON value: keys that it may have, nested ones with dots.
        short: short forms and their long names.
        since: releases for which the operator sets an owned flag, where it was not always there.
    """

    owned: dict[str, str]
    allowed: dict[str, Setting]
    json: dict[str, dict[str, Setting]]
    short: dict[str, str]
    since: dict[str, Range]


@dataclass(frozen=True)
class RouterFlags:
    """Command-line flags of vllm-router. Columns: see ``data/router.toml``."""

    owned: dict[str, str]
    allowed: dict[str, Setting]


@dataclass(frozen=True)
class Connector:
    """A KV connector. Columns: see ``data/connectors.toml``."""

    name: str
    roles: dict[str, str]
    settled: dict[str, Any]
    since: dict[str, Range]
    extra: dict[str, str]

    def settings(self, version: Version) -> dict[str, Any]:
        """Further keys of ``--kv-transfer-config`` that this version knows."""
        known = {key: value for key, value in self.settled.items() if version in self.since.get(key, Range())}
        return known | ({"kv_connector_extra_config": self.extra} if self.extra else {})


@dataclass(frozen=True)
class Risk:
    """A risk that a spec may take in words. Columns: see ``data/risks.toml``."""

    name: str
    why: str
    default: bool
    flags: dict[str, Setting]


@dataclass(frozen=True)
class Environment:
    """Variables of engine containers: what the operator sets, and what a user may set."""

    fixed: dict[str, str]
    allowed: dict[str, Setting]


@dataclass(frozen=True)
class Service:
    """An HTTP route of a socket that is not the API. Columns: see ``data/server.toml``."""

    socket: str
    method: str
    path: str
    answer: str


@dataclass(frozen=True)
class Server:
    """How a vLLM server reads its command line and answers (``data/server.toml``).

    Attributes:
        guarded: prefixes that the API key guards, with the releases in which it does.
        answers: path of a route and the kind of its answer.
        services: HTTP routes of other sockets.
        flags: kind of value of each flag that no user may set.
    """

    guarded: tuple[tuple[str, Range], ...]
    answers: dict[str, str]
    services: tuple[Service, ...]
    flags: dict[str, str]

    def guarded_in(self, version: Version) -> tuple[str, ...]:
        """Prefixes of paths that need the API key in a release."""
        return tuple(prefix for prefix, versions in self.guarded if version in versions)


def _read(name: str) -> dict[str, Any]:
    return tomllib.loads((resources.files(__package__) / "data" / name).read_text(encoding="utf-8"))


def _range(row: dict[str, Any]) -> Range:
    ends = (row.pop(end, None) for end in ("since", "until"))
    return Range(*(None if end is None else Version.parse(end) for end in ends))


@functools.cache
def routes() -> tuple[Route, ...]:
    """All routes of all versions."""
    return tuple(
        Route(
            versions=_range(row),
            category=row.pop("class"),
            profiles=tuple(row.pop("profiles", ())),
            **row,
        )
        for row in map(dict, _read("routes.toml")["route"])
    )


@functools.cache
def routes_of(version: Version) -> dict[tuple[str, str], Route]:
    """Routes that a server of this version may have, by (method, path)."""
    return {(route.method, route.path): route for route in routes() if version in route.versions}


@functools.cache
def profiles() -> tuple[str, ...]:
    """Names of the gateway profiles, in the order in which the routes introduce them."""
    return tuple(dict.fromkeys(name for route in routes() for name in route.profiles))


@functools.cache
def sockets() -> dict[str, Socket]:
    """All sockets of all versions, by name."""
    rows = map(dict, _read("sockets.toml")["socket"])
    return {row["name"]: Socket(versions=_range(row), **row) for row in rows}


def _settings(table: dict[str, Any]) -> dict[str, Setting]:
    return {name: _setting(name, row if isinstance(row, dict) else {"value": row}) for name, row in table.items()}


def _setting(name: str, row: dict[str, Any]) -> Setting:
    row = dict(row)
    value, versions = row.pop("value"), _range(row)
    if isinstance(value, list):
        return Setting(name, "choice", tuple(value), versions=versions, **row)
    return Setting(name, value, versions=versions, **row)


@functools.cache
def flags() -> Flags:
    """The flags that the guard knows."""
    table = _read("flags.toml")
    return Flags(
        owned=table["owned"],
        allowed=_settings(table["allowed"]),
        json={name: _settings(keys) for name, keys in table["json"].items()},
        short=table["short"],
        since=_since(table["since"]),
    )


@functools.cache
def router_flags() -> RouterFlags:
    """The flags of vllm-router that the guard knows."""
    table = _read("router.toml")
    return RouterFlags(owned=table["owned"], allowed=_settings(table["allowed"]))


@functools.cache
def connectors() -> dict[str, Connector]:
    """The KV connectors that can be rendered, by their name in ``spec.disaggregation.connector``."""
    rows = _read("connectors.toml")
    return {name: Connector(**row | {"since": _since(row["since"])}) for name, row in rows.items()}


def _since(column: dict[str, str]) -> dict[str, Range]:
    return {name: Range(since=Version.parse(version)) for name, version in column.items()}


@functools.cache
def risks() -> dict[str, Risk]:
    """The risks that a spec may take, by name."""
    return {
        name: Risk(name, row["why"], row["default"], _settings(row.get("flags", {})))
        for name, row in _read("risks.toml").items()
    }


@functools.cache
def risky_flags() -> dict[str, Risk]:
    """Flags that an accepted risk opens."""
    return {flag: risk for risk in risks().values() for flag in risk.flags}


@functools.cache
def server() -> Server:
    """What a program that behaves like a vLLM server has to know beside the other tables."""
    table = _read("server.toml")
    return Server(
        guarded=tuple((row.pop("prefix"), _range(row)) for row in map(dict, table["guarded"])),
        answers=table["answers"],
        services=tuple(Service(**row) for row in table["services"]),
        flags=table["flags"],
    )


@functools.cache
def environment() -> Environment:
    """The variables that the guard knows."""
    table = _read("environment.toml")
    return Environment(fixed=table["set"], allowed=_settings(table["allowed"]))


@functools.cache
def advisories() -> tuple[Advisory, ...]:
    """All advisories, worst first."""
    found = []
    for row in map(dict, _read("advisories.toml")["advisory"]):
        routes_ = tuple(route.partition(" ")[::2] for route in row.pop("routes", ()))
        lists: dict[str, Any] = {name: tuple(row.pop(name, ())) for name in ("aliases", "controls")}
        found.append(Advisory(versions=_range(row), routes=routes_, **lists, **row))
    return tuple(sorted(found, key=lambda item: SEVERITIES.index(item.severity)))


def advisories_of(version: Version, features: Collection[str]) -> tuple[Advisory, ...]:
    """Advisories that hit a version when these features are in use, worst first."""
    return tuple(
        item for item in advisories() if version in item.versions and (not item.feature or item.feature in features)
    )


@functools.cache
def dangers() -> tuple[dict[str, Danger], dict[str, Danger]]:
    """Dangerous flags and dangerous variables, by name."""
    flags_, variables = (
        {
            name: Danger(group["why"], group["severity"])
            for group in _read("dangers.toml")[part]
            for name in group["names"]
        }
        for part in ("flags", "variables")
    )
    return flags_, variables


@functools.cache
def floor() -> Version:
    """Oldest version without a known critical hole that no control of ours covers."""
    return Version.parse(_read("versions.toml")["floor"])


@functools.cache
def newest() -> Version:
    """Newest version that is catalogued."""
    return Version.parse(_read("versions.toml")["newest"])


def too_new(version: Version) -> bool:
    """Whether the catalogue says nothing about a release; a patch release is of its minor one."""
    return (version.major, version.minor) > (newest().major, newest().minor)


@functools.cache
def oldest() -> Version:
    """Oldest version that was compared with its source."""
    return Version.parse(_read("versions.toml")["oldest"])
