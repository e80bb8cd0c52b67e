"""Compares findings with the catalogue, and findings with findings."""

from __future__ import annotations

import functools
import re
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import resources

from securevllm import catalogue
from securevllm_dev.catalogue.findings import API, Findings, Route, Unreadable


@dataclass(frozen=True)
class Reviewed:
    """Judgements of people about what is no row of the operator's own catalogue (`reviewed.toml`)."""

    servers: dict[str, str]
    unreadable: tuple[dict[str, str], ...]
    flags: dict[str, str]
    variables: dict[str, str]
    dangerous_flags: re.Pattern[str]
    dangerous_variables: re.Pattern[str]


@functools.cache
def reviewed() -> Reviewed:
    """The judgements that ship with this package."""
    data = tomllib.loads((resources.files(__package__) / "reviewed.toml").read_text(encoding="utf-8"))
    return Reviewed(
        servers=data["servers"],
        unreadable=tuple(data["unreadable"]),
        flags=data["flags"]["refused"],
        variables=data["environment"]["refused"],
        dangerous_flags=re.compile(data["flags"]["dangerous"]),
        dangerous_variables=re.compile(data["environment"]["dangerous"]),
    )


def review(found: Findings, *, complete: bool) -> list[str]:
    """What the catalogue does not classify for this version, one sentence each.

    Args:
        found: an extraction.
        complete: route-adding dependencies were read too, so that a catalogued route that was not found is wrong.
    """
    try:
        version = catalogue.Version.parse(re.sub(r"\.?(rc|dev|a|b)\d.*", "", found.version))
    except ValueError as error:
        return [f"version: {error}; rows of the catalogue cannot be chosen"]
    known = catalogue.routes_of(version)
    complaints = list(_routes(found.routes, known, found.guarded))
    if complete:
        complaints += _missing(found.routes, known)
    flags = catalogue.flags()
    listed = {*flags.owned, *flags.allowed, *reviewed().flags}
    complaints += [
        f"{flag.where}: flag {flag.name} looks dangerous and is not classified"
        for flag in found.flags
        if reviewed().dangerous_flags.search(flag.name) and not _listed(flag.name, listed)
    ]
    environment = catalogue.environment()
    variables = {*environment.fixed, *environment.allowed, *reviewed().variables}
    complaints += [
        f"{variable.where}: variable {variable.name} looks dangerous and is not classified"
        for variable in found.environment
        if reviewed().dangerous_variables.search(variable.name) and variable.name not in variables
    ]
    complaints += [
        f"{place.where}: {place.kind}: {place.code}: not reviewed"
        for place in found.unreadable
        if not any(_matches(place, row) for row in reviewed().unreadable)
    ]
    return complaints


def _listed(name: str, listed: set[str]) -> bool:
    """A negation is as dangerous as what it negates."""
    return name in listed or (name.startswith("--no-") and "--" + name[5:] in listed)


def _routes(
    routes: Iterable[Route], known: dict[tuple[str, str], catalogue.Route], guarded: tuple[str, ...]
) -> Iterator[str]:
    for route in routes:
        shown = f"{route.where}: {route.method} {route.path}"
        if route.server != API:
            if route.server not in reviewed().servers:
                yield f"{shown}: on a server that is not reviewed: {route.server}"
            continue
        row = known.get((route.method, route.path))
        if row is None:
            yield f"{shown}: not classified"
        elif row.key != route.path.startswith(guarded or ("\0",)):
            said = "guarded" if row.key else "open"
            yield f"{shown}: {said} in the catalogue, but the guarded prefixes are {' '.join(guarded)}"


def _missing(routes: Iterable[Route], known: dict[tuple[str, str], catalogue.Route]) -> list[str]:
    found = {(route.method, route.path) for route in routes if route.server == API}
    return [
        f"routes.toml: {method} {path}: this version has no such route" for method, path in sorted(set(known) - found)
    ]


def _matches(place: Unreadable, row: dict[str, str]) -> bool:
    return place.kind == row["kind"] and fnmatch(place.file, row["file"]) and fnmatch(place.code, row["code"])


def differences(old: Findings, new: Findings) -> list[str]:
    """What `new` added (+), removed (-), moved (>) or changed (~); one line each, a heading per concern."""
    lines = [f"vLLM {old.version} -> {new.version}"]
    if old.guarded != new.guarded:
        lines.append(f"~ guarded prefixes {' '.join(old.guarded)} -> {' '.join(new.guarded)}")
    lines += _block(
        "routes",
        {f"{r.method} {r.path} ({r.server})": (r.where.rpartition(":")[0], r.when) for r in old.routes},
        {f"{r.method} {r.path} ({r.server})": (r.where.rpartition(":")[0], r.when) for r in new.routes},
    )
    lines += _block("flags", {f.name: ("", f.default) for f in old.flags}, {f.name: ("", f.default) for f in new.flags})
    lines += _block(
        "environment",
        {v.name: ("", v.default) for v in old.environment},
        {v.name: ("", v.default) for v in new.environment},
    )
    lines += _block(
        "ports",
        {f"{p.number} {p.name}": (p.where.rpartition(":")[0], "") for p in old.ports},
        {f"{p.number} {p.name}": (p.where.rpartition(":")[0], "") for p in new.ports},
    )
    return lines


def _block(heading: str, old: dict[str, tuple[str, str]], new: dict[str, tuple[str, str]]) -> list[str]:
    lines = [f"+ {name}{_said(new[name][1])}" for name in sorted(set(new) - set(old))]
    lines += [f"- {name}" for name in sorted(set(old) - set(new))]
    for name in sorted(set(old) & set(new)):
        if old[name][0] != new[name][0]:
            lines.append(f"> {name}: {old[name][0]} -> {new[name][0]}")
        if old[name][1] != new[name][1]:
            lines.append(f"~ {name}: {old[name][1] or '-'} -> {new[name][1] or '-'}")
    return [f"\n{heading}", *lines] if lines else []


def _said(text: str) -> str:
    return f"  [{text}]" if text else ""
