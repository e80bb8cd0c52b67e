"""The effective allowlist of a spec, and what may never be in it.

A route that vLLM has is named exactly as the catalogue has it. A route that the catalogue does not know needs
``unknownRoute`` with a reason, and is one literal path: no template, and nothing that any version of vLLM could read as
a route that is never opened, whatever the method, the case of letters or what follows a mount.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from securevllm import catalogue
from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm.api import types as api

_SEGMENT = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_LITERAL = re.compile(rf"(?:/{_SEGMENT})+", re.ASCII)
_VARIABLE = re.compile(r"\\\{[a-z_]+\\\}")


def allowed(spec: api.Spec, version: catalogue.Version) -> tuple[catalogue.Route, ...]:
    """What the gateway lets through, sorted: profiles and single entries; never a route that is marked so.

    A route of ``unknownRoute`` counts as one without a key of vLLM's, whose answer may stream.
    """
    entries = {(entry.method, entry.path): entry for entry in spec.gateway.routes.allow}
    profiles = set(spec.gateway.routes.profiles)
    known = catalogue.routes_of(version)
    found = [
        route
        for key, route in known.items()
        if not route.never
        and route.method != catalogue.WEBSOCKET
        and (key in entries or profiles & set(route.profiles))
    ]
    found += [
        catalogue.Route(*key, category="unknown", key=False, source="spec", streaming=True)
        for key, entry in entries.items()
        if key not in known and entry.unknown_route is not None and not forbidden(entry.path)
    ]
    return tuple(sorted(found, key=lambda route: (route.method, route.path)))


def forbidden(path: str) -> catalogue.Route | None:
    """The row that is never opened and that a literal path could be read as, in any version and by any method."""
    return next((route for pattern, route in _never() if pattern.fullmatch(path)), None)


@functools.cache
def _never() -> tuple[tuple[re.Pattern[str], catalogue.Route], ...]:
    rows = [(route, route.path) for route in catalogue.routes() if route.never]
    # A mount answers below its first segment, and the one of /metrics also what only begins so.
    return tuple((_pattern(path, mount=route.mount), route) for route, path in rows)


def _pattern(path: str, *, mount: bool) -> re.Pattern[str]:
    if mount:
        path = path.partition("/{")[0]
    body = _VARIABLE.sub("[^/]+", re.escape(path))
    return re.compile(body + (".*" if mount else "/*"), re.IGNORECASE)


def problems(spec: api.Spec, version: catalogue.Version) -> Iterator[Problem]:
    """What is wrong with ``spec.gateway.routes.allow``."""
    known = catalogue.routes_of(version)
    for index, entry in enumerate(spec.gateway.routes.allow):
        field = f"spec.gateway.routes.allow[{index}]"
        shown = f"{entry.method} {entry.path}"
        route = known.get((entry.method, entry.path))
        never = route if route is not None and route.never else forbidden(entry.path) if route is None else None
        if never is not None:
            yield Problem(
                field,
                "RouteForbidden",
                f"this is or could be read as {never.method} {never.path} ({never.category}), which is never opened",
                "Leave it out; the operator and the cluster's probes reach what they need without the gateway.",
                shown,
            )
        elif route is not None and entry.unknown_route is not None:
            yield Problem(
                f"{field}.unknownRoute", "InvalidSpec", f"vLLM {version} has this route", "Remove unknownRoute.", shown
            )
        elif route is None:
            yield from _unknown(field, entry, version)


def _unknown(field: str, entry: api.AllowEntry, version: catalogue.Version) -> Iterator[Problem]:
    shown = f"{entry.method} {entry.path}"
    if entry.unknown_route is None:
        yield Problem(
            field,
            "RouteUnknown",
            f"vLLM {version} has no such route",
            "Write method and path exactly as `securevllm routes` prints them, or say why it is opened all the same:"
            " unknownRoute: <why>.",
            shown,
        )
    elif _LITERAL.fullmatch(entry.path) is None:
        yield Problem(
            f"{field}.path",
            "RouteUnknown",
            "an unknown route is one literal path: segments of [A-Za-z0-9_-] with single dots inside, no {parameters},"
            " no slash at the end",
            "Name each path that is needed.",
            shown,
        )


def risks(spec: api.Spec) -> Iterator[str]:
    """What the spec gives up by unknown routes, in the user's words."""
    for entry in spec.gateway.routes.allow:
        if entry.unknown_route is not None:
            yield f"gateway.routes.allow {entry.method} {entry.path}: {entry.unknown_route}"
