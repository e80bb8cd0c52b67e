"""Reads planted.toml: a tree that looks like vLLM and hides routes."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from pathlib import Path

_DATA = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))


@dataclass(frozen=True)
class Way:
    """One way to hide a route: what must be found, or the kind under which its file must be reported."""

    source: str
    found: tuple[str, ...] = ()
    kind: str = ""


WAYS = {
    name: Way(row["source"], tuple(row.get("found", ())), row.get("kind", "")) for name, row in _DATA["way"].items()
}


def files() -> dict[str, bytes]:
    """The whole tree: path to content."""
    tree = {row["path"]: row["source"].encode() for row in _DATA["file"]}
    body = ["from fastapi import FastAPI", "", "def build_app(args):", "    app = FastAPI()"]
    for name, way in WAYS.items():
        tree[f"vllm/entrypoints/way_{name}.py"] = way.source.encode()
        if "def attach(" in way.source:
            body += [f"    from vllm.entrypoints.way_{name} import attach", "    attach(app)"]
    tree["vllm/entrypoints/app.py"] = "\n".join([*body, "    return app", ""]).encode()
    return tree
