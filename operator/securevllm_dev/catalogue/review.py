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
from securevllm_dev.catalogue.findings import API, MOUNT, Findings, Route, Unreadable

_Known = dict[tuple[str, str], catalogue.Route]


@dataclass(frozen=True)
class Reviewed:
    """Judgements of people: `reviewed.toml`, and the dangers that ship with the catalogue.

    Attributes:
        servers: file that makes another HTTP server than the API's, to why its routes are no concern of the gateway.
        unreadable: rows with kind, file, code (patterns) and why.
        flags: names that are classified, as dangerous or as harmless.
        variables: the same.
        suspicious_flags: what a flag's name looks like that must be classified.
        suspicious_variables: the same.
    """

    servers: dict[str, str]
    unreadable: tuple[dict[str, str], ...]
    flags: frozenset[str]
    variables: frozenset[str]
    suspicious_flags: re.Pattern[str]
    suspicious_variables: re.Pattern[str]


@functools.cache
def reviewed() -> Reviewed:
    """The judgements that ship with this package and with the catalogue."""
    data = tomllib.loads((resources.files(__package__) / "reviewed.toml").read_text(encoding="utf-8"))
    flags, variables = catalogue.dangers()
    return Reviewed(
        servers=data["servers"],
        unreadable=tuple(data["unreadable"]),
        flags=frozenset({*flags, *data["flags"]["harmless"]}),
        variables=frozenset({*variables, *data["variables"]["harmless"]}),
        suspicious_flags=re.compile(data["flags"]["suspicious"]),
        suspicious_variables=re.compile(data["variables"]["suspicious"]),
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
        f"{flag.where}: flag {flag.name} is not classified"
        for flag in found.flags
        if reviewed().suspicious_flags.search(flag.name) and not _listed(flag.name, listed)
    ]
    environment = catalogue.environment()
    variables = {*environment.fixed, *environment.allowed, *reviewed().variables}
    complaints += [
        f"{variable.where}: variable {variable.name} is not classified"
        for variable in found.environment
        if reviewed().suspicious_variables.search(variable.name) and variable.name not in variables
    ]
    complaints += _ranges(found, version)
    complaints += [
        f"{place.where}: {place.kind}: {place.code}: not reviewed"
        for place in found.unreadable
        if not any(_matches(place, row) for row in reviewed().unreadable)
    ]
    return complaints


def _ranges(found: Findings, version: catalogue.Version) -> Iterator[str]:
    """What a user may set, and this version has not; or the other way round; or takes no value, or one."""
    known = dict(catalogue.flags().allowed)
    for risk in catalogue.risks().values():
        known |= risk.flags
    names = {flag.name for flag in found.flags}
    for name, setting in known.items():
        has, expected = name in names, version in setting.versions
        if has != expected:
            yield f"flags.toml: {name}: {'outside of its versions, but there' if has else 'not in this version'}"
        elif has and (f"--no-{name[2:]}" in names) != (setting.kind == "bool"):
            yield f"flags.toml: {name}: kind {setting.kind}, but its negation says otherwise"
    for flag in found.flags:
        if flag.short and flag.short not in _SHORT_REFUSED and catalogue.flags().short.get(flag.short) != flag.name:
            yield f"flags.toml: {flag.short}: this version's short form of {flag.name}"
    variables = {variable.name for variable in found.environment}
    for name, setting in catalogue.environment().allowed.items():
        # Other prefixes are variables of libraries, which vllm/envs.py does not list.
        if name.startswith("VLLM_") and (name in variables) != (version in setting.versions):
            yield f"environment.toml: {name}: its versions are not those that have it"


_SHORT_REFUSED = {"-O", "-dc"}
"""Short forms that the guard refuses by themselves: -O is another flag in 0.11 than later."""


def _listed(name: str, listed: set[str]) -> bool:
    """A negation is as dangerous as what it negates."""
    return name in listed or (name.startswith("--no-") and "--" + name[5:] in listed)


def _routes(routes: Iterable[Route], known: _Known, guarded: tuple[str, ...]) -> Iterator[str]:
    for route in routes:
        shown = f"{route.where}: {route.method} {route.path}"
        if route.server != API:
            if route.server not in reviewed().servers:
                yield f"{shown}: on a server that is not reviewed: {route.server}"
            continue
        row = _row(route, known)
        is_guarded = bool(guarded) and route.path.startswith(guarded)
        if row is None:
            yield f"{shown}: not classified"
        elif row.key != is_guarded:
            said = "guarded" if row.key else "open"
            yield f"{shown}: {said} in the catalogue, but the guarded prefixes are {' '.join(guarded)}"


def _row(route: Route, known: _Known) -> catalogue.Route | None:
    """The catalogue's row; for a mount one at or below it, and then every such row must be `never`."""
    if route.method != MOUNT:
        return known.get((route.method, route.path))
    rows = [row for row in known.values() if row.path == route.path or row.path.startswith(route.path + "/")]
    return rows[0] if rows and all(row.never for row in rows) else None


def _missing(routes: Iterable[Route], known: _Known) -> list[str]:
    found = {(route.method, route.path) for route in routes if route.server == API}
    mounts = tuple(route.path + "/" for route in routes if route.server == API and route.method == MOUNT)
    return [
        f"routes.toml: {method} {path}: this version has no such route"
        for method, path in sorted(set(known) - found)
        if not path.startswith(mounts or ("\0",))
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
