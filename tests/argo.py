"""Argo CD's health check and actions in a real Lua, and kstatus, as Flux computes it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from lupa.lua51 import LuaRuntime

ARGOCD = Path(__file__).parents[1] / "manifests" / "argocd"
ACTIONS = yaml.safe_load((ARGOCD / "actions.yaml").read_text(encoding="utf-8"))

_SANDBOX = """
-- Argo CD opens base, table, string and math, and of os only what tells the time (gopher-lua, util/lua/lua.go).
os = { time = os.time, date = os.date }
io, debug, package, require, dofile, loadfile = nil, nil, nil, nil, nil, nil
"""


def run(script: str, obj: Mapping[str, Any]) -> Any:
    """What a script returns for an object, as Argo CD calls it: `obj` is a global."""
    lua = LuaRuntime(unpack_returned_tuples=True)
    lua.execute(_SANDBOX)
    lua.globals().obj = lua.table_from(dict(obj), recursive=True)
    return _plain(lua.execute(script))


def health(obj: Mapping[str, Any]) -> tuple[str, str]:
    """Argo CD's health of an object: status and message."""
    found = run((ARGOCD / "health.lua").read_text(encoding="utf-8"), obj)
    return found["status"], found["message"]


def act(name: str, obj: Mapping[str, Any]) -> dict[str, Any]:
    """The object after an action."""
    (action,) = [item for item in ACTIONS["definitions"] if item["name"] == name]
    changed: dict[str, Any] = run(action["action.lua"], obj)
    return changed


def kstatus(obj: Mapping[str, Any]) -> str:
    """The generic rules of kstatus (sigs.k8s.io/cli-utils pkg/kstatus/status), in their order."""
    metadata, status = obj["metadata"], obj.get("status", {})
    if metadata.get("deletionTimestamp"):
        return "Terminating"
    if "observedGeneration" in status and status["observedGeneration"] != metadata["generation"]:
        return "InProgress"
    conditions = {item["type"]: item["status"] for item in status.get("conditions", ())}
    if conditions.get("Reconciling") == "True":
        return "InProgress"
    if conditions.get("Stalled") == "True":
        return "Failed"
    if conditions.get("Ready") in {"False", "Unknown"}:
        return "InProgress"
    return "Current"


def _plain(value: Any) -> Any:
    """Lua tables as dictionaries and lists."""
    if not hasattr(value, "items"):
        return value
    pairs = {key: _plain(inner) for key, inner in value.items()}
    if pairs and list(pairs) == list(range(1, len(pairs) + 1)):
        return list(pairs.values())
    return pairs
