"""The core does no I/O: no clock, no client, no environment, no randomness, told from its source."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import securevllm

ROOT = Path(securevllm.__file__).parent
CORE = sorted(
    path.relative_to(ROOT)
    for pattern in (
        *("api/*.py", "catalogue/*.py", "render/*.py", "status/*.py", "explain/*.py", "check/*.py", "topology/*.py"),
        *("context.py", "drift.py", "groups.py", "netpol.py"),
    )
    for path in ROOT.glob(pattern)
)
EDGES = frozenset(
    {
        *("aiohttp", "asyncio", "ctypes", "datetime", "http", "httpx", "kopf", "kubernetes", "locale"),
        *("multiprocessing", "os", "pathlib", "platform", "random", "secrets", "select", "shutil", "signal", "socket"),
        *("ssl", "subprocess", "sys", "tempfile", "threading", "time", "urllib.request", "uuid"),
    }
)
CALLS = frozenset({"open", "input", "print", "exec", "eval", "__import__", "hash", "id"})
# Reading files of the package itself is the same everywhere and every time.
PACKAGE_DATA = {Path("catalogue/__init__.py"): "importlib", Path("render/envoy.py"): "jinja2"}


def test_the_core_is_found() -> None:
    assert len(CORE) > 20
    assert all((ROOT / path).exists() for path in PACKAGE_DATA)


@pytest.mark.parametrize("path", CORE, ids=str)
def test_no_io(path: Path) -> None:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    assert list(_impurities(tree, path)) == []


def _impurities(tree: ast.AST, path: Path) -> Iterator[str]:
    for node in ast.walk(tree):
        for name in _imported(node):
            top = name.split(".")[0]
            if top in EDGES or name in EDGES:
                yield f"line {_line(node)}: imports {name}"
            if top in {"importlib", "jinja2"} and PACKAGE_DATA.get(path) != top:
                yield f"line {_line(node)}: reads files with {name}"
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in CALLS:
            yield f"line {_line(node)}: calls {node.func.id}"


def _imported(node: ast.AST) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        return [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
    return []


def _line(node: ast.AST) -> int:
    return getattr(node, "lineno", 0)


@pytest.mark.parametrize(
    "text",
    ["import os", "from datetime import datetime", "import urllib.request", "from urllib import request", "open('/x')"],
)
def test_an_impurity_is_noticed(text: str) -> None:
    assert list(_impurities(ast.parse(text), Path("api/parse.py"))) != []
