"""What an extraction finds, as plain data; JSON and tables are projections of it."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

API = "api"
"""Server of the routes that clients of `vllm serve` reach; any other server is named by the file that makes it."""
WEBSOCKET = "WEBSOCKET"
MOUNT = "MOUNT"
"""Method of a mounted ASGI application: every method, and every path below it."""


@dataclass(frozen=True, order=True)
class Route:
    """One (method, path) of one server. `when` is what must hold for it to be registered; empty: always."""

    server: str
    path: str
    method: str
    where: str
    when: str = ""


@dataclass(frozen=True, order=True)
class Unreadable:
    """A place that may add routes, answer requests or add flags, and that a program cannot read.

    `code` is its text without layout: it identifies the place across releases, where line numbers do not.
    """

    where: str
    kind: str
    code: str

    @property
    def file(self) -> str:
        """Path without the line."""
        return self.where.rpartition(":")[0]


@dataclass(frozen=True, order=True)
class Flag:
    """A command-line flag of `vllm serve`; type and default as the source writes them, `short` as `-tp`."""

    name: str
    where: str
    type: str = ""
    default: str = ""
    short: str = ""


@dataclass(frozen=True, order=True)
class Variable:
    """An environment variable of vllm/envs.py."""

    name: str
    where: str
    type: str = ""
    default: str = ""


@dataclass(frozen=True, order=True)
class Port:
    """A default that is a port number."""

    number: int
    name: str
    where: str


@dataclass(frozen=True)
class Findings:
    """All of one release, sorted."""

    version: str
    guarded: tuple[str, ...] = ()
    routes: tuple[Route, ...] = ()
    flags: tuple[Flag, ...] = ()
    environment: tuple[Variable, ...] = ()
    ports: tuple[Port, ...] = ()
    unreadable: tuple[Unreadable, ...] = ()
    problems: tuple[str, ...] = field(default=())

    def to_json(self) -> dict[str, Any]:
        """As JSON-ready dictionaries."""
        return asdict(self)


def table(found: Findings) -> str:
    """For people: one line per finding, a heading per concern."""
    lines = [f"vLLM {found.version or '(version unknown)'}", f"guarded prefixes: {' '.join(found.guarded) or 'none'}"]
    lines += _block("routes", [(r.method, r.path, r.server, r.where, r.when) for r in found.routes])
    lines += _block("flags", [(f.name, f.type, f.default, f.where) for f in found.flags])
    lines += _block("environment", [(v.name, v.type, v.default, v.where) for v in found.environment])
    lines += _block("ports", [(str(p.number), p.name, p.where) for p in found.ports])
    lines += _block("unreadable", [(u.where, u.kind, u.code) for u in found.unreadable])
    lines += _block("problems", [(text,) for text in found.problems])
    return "\n".join(lines)


def _block(heading: str, rows: list[tuple[str, ...]]) -> list[str]:
    if not rows:
        return [f"\n{heading}: none"]
    widths = [min(max(map(len, column)), 48) for column in zip(*rows, strict=True)]
    shown = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return [f"\n{heading}: {len(rows)}", *shown]
