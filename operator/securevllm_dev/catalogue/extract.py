"""From a source tree to `Findings`; `extract` is the one entry for commands and tests."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from securevllm_dev.catalogue.findings import Findings, Route
from securevllm_dev.catalogue.modules import Tree
from securevllm_dev.catalogue.routes import scan
from securevllm_dev.catalogue.settings import settings
from securevllm_dev.catalogue.source import Source, SourceError, read

_VLLM = "vllm/envs.py"
"""A file that every vLLM since 0.3 has."""
_ADDS_ROUTES = "model_hosting_container_standards"
"""The dependency of vLLM that adds routes: its sdist or folder is read with vLLM's."""


def extract(path: Path, dependencies: Iterable[Path] = ()) -> Findings:
    """Read a vLLM sdist or folder, and what its route-adding dependencies add to the same server.

    Raises:
        SourceError: an archive or folder cannot be read, or the first one is not vLLM.
    """
    source = read(path)
    if _VLLM not in source.files:
        raise SourceError(f"{path.name}: not a vLLM source tree: it has no {_VLLM}")
    for dependency in dependencies:
        other = read(dependency)
        if not any(name.startswith(_ADDS_ROUTES) for name in other.files):
            raise SourceError(f"{dependency.name}: not {_ADDS_ROUTES}: it has no such package")
        if not any(_ADDS_ROUTES.encode() in data for data in source.files.values()):
            raise SourceError(f"{path.name}: this vLLM does not use {_ADDS_ROUTES}: leave --with out")
        source.files.update(other.files)
        source.problems += other.problems
    return findings(source)


def findings(source: Source) -> Findings:
    """Everything of one source."""
    tree = Tree(source)
    found = scan(tree)
    other = settings(tree)
    if not other.guarded:
        source.problems.append("no AuthenticationMiddleware with a prefix: which routes the key guards is unknown")
    return Findings(
        version=source.version,
        guarded=tuple(sorted(other.guarded)),
        routes=_merged(found.routes),
        flags=tuple(sorted({flag.name: flag for flag in other.flags}.values())),
        environment=tuple(sorted(other.environment)),
        ports=tuple(sorted(other.ports)),
        unreadable=tuple(sorted(found.unreadable.union(other.unreadable))),
        problems=tuple(sorted(set(source.problems))),
    )


def _merged(routes: Iterable[Route]) -> tuple[Route, ...]:
    """One row per (server, path, method); conditions of several places are alternatives, and "always" wins."""
    merged: dict[tuple[str, str, str], Route] = {}
    for route in sorted(routes):
        key = (route.server, route.path, route.method)
        known = merged.get(key)
        if known is None:
            merged[key] = route
        elif known.when and route.when:
            merged[key] = replace(known, when=f"{known.when} or {route.when}")
        else:
            merged[key] = replace(known, when="")
    return tuple(merged.values())
