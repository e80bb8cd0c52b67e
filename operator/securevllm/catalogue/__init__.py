"""What vLLM does in which version, as data.

One TOML table per concern in ``data/``; this module only reads and types them. Everything that comes from vLLM
(a route, a port, a flag, a variable) is a row there and nowhere else; api, topology, render and tests derive from it.
"""

from __future__ import annotations

import functools
import re
import tomllib
from dataclasses import dataclass
from importlib import resources
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


@dataclass(frozen=True)
class Flags:
    """Command-line flags of ``vllm serve``: which the operator owns, which a user may set, with the kind of value."""

    owned: dict[str, str]
    allowed: dict[str, str]


@dataclass(frozen=True)
class Environment:
    """Variables of engine containers: what the operator sets, and what a user may set."""

    fixed: dict[str, str]
    allowed: frozenset[str]


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


@functools.cache
def flags() -> Flags:
    """The flags that the guard knows."""
    return Flags(**_read("flags.toml"))


@functools.cache
def environment() -> Environment:
    """The variables that the guard knows."""
    table = _read("environment.toml")
    return Environment(fixed=table["set"], allowed=frozenset(table["allowed"]["names"]))


@functools.cache
def floor() -> Version:
    """Oldest version without a known critical hole that no control of ours covers."""
    return Version.parse(_read("versions.toml")["floor"])


@functools.cache
def newest() -> Version:
    """Newest version that is catalogued."""
    return Version.parse(_read("versions.toml")["newest"])


@functools.cache
def oldest() -> Version:
    """Oldest version that was compared with its source."""
    return Version.parse(_read("versions.toml")["oldest"])
