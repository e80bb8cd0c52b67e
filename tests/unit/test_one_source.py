"""What vLLM does is written once, in the catalogue: no route and no port of it stands anywhere else in the product."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import securevllm
from securevllm import catalogue

ROOT = Path(securevllm.__file__).parent
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py") if "catalogue" not in path.relative_to(ROOT).parts)
PATHS = {route.path for route in catalogue.routes()}
PORTS = {socket.port for socket in catalogue.sockets().values() if socket.port}
OWN: dict[str, set[object]] = {
    "cli.py": {8080},  # the operator's own health port
    "settings.py": {8080},
    "http.py": {"/metrics"},  # the operator's own metrics
    "topology/plan.py": {8080},  # the gateway's port without TLS
    "render/engine.py": {"/health", "/version"},  # kubelet's probe; what the operator asks
    "render/envoy.py": {"/health", "/metrics"},  # the gateway's health check; the one route for scrapers
    "proof/foreign.py": {8000},  # a port of others, to name what a policy without ports opens
}
"""Values that are not vLLM's, or that name its health route to a probe."""


def literals(path: Path) -> Iterator[object]:
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    described = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, described) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and id(node) not in docstrings and not isinstance(node.value, bool):
            yield node.value


@pytest.mark.parametrize("path", FILES, ids=str)
def test_no_route_and_no_port_of_vllm_is_written_elsewhere(path: Path) -> None:
    again = {value for value in literals(path) if value in PATHS or value in PORTS}
    assert again - OWN.get(path.as_posix(), set()) == set()


def test_the_exceptions_exist() -> None:
    for name, values in OWN.items():
        assert values <= set(literals(Path(name))), name
