"""Argo CD's health check and actions in a real Lua and by its own program, and kstatus, as Flux computes it."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from lupa.lua51 import LuaRuntime

from e2e.cluster.binaries import ARGO_CD, ARGO_CD_PROGRAMS, built, program
from e2e.cluster.binaries import ARGOCD as PROGRAM

ARGOCD = Path(__file__).parents[1] / "manifests" / "argocd"
ACTIONS = yaml.safe_load((ARGOCD / "actions.yaml").read_text(encoding="utf-8"))

_SANDBOX = """
-- Argo CD opens base and table; of os there is what tells the time, and only for who requires it (util/lua/lua.go).
local safe = { os = { time = os.time, date = os.date } }
require = function(name) return assert(safe[name], name) end
os, string, math, io, debug, package, dofile, loadfile = nil, nil, nil, nil, nil, nil, nil, nil
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


def argocd() -> Path:
    """Give the program; skips the test where it was not built."""
    if not built(ARGO_CD_PROGRAMS):
        pytest.skip(f"Argo CD {ARGO_CD.version} is not in the cache: python -m e2e.cluster argocd")
    return program(PROGRAM)


def tool(folder: Path, *arguments: str) -> str:
    """Run ``argocd`` without anybody's configuration; gives what it prints."""
    done = subprocess.run(  # noqa: S603 - fixed arguments
        [argocd(), *arguments],
        env={"PATH": os.environ["PATH"]} | environment(folder),
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, f"argocd {' '.join(arguments)}: {done.stdout}{done.stderr}"
    return done.stdout


def environment(folder: Path) -> dict[str, str]:
    """Variables with which its program reads and writes nothing outside of a folder."""
    paths = {
        "HOME": "home",
        "TMPDIR": "tmp",
        "ARGOCD_TLS_DATA_PATH": "tls",
        "ARGOCD_SSH_DATA_PATH": "ssh",
        "ARGOCD_GNUPGHOME": "gpg",
        "ARGOCD_PLUGINSOCKFILEPATH": "plugins",
        "ARGOCD_CONFIG_DIR": "config",
    }
    for path in paths.values():
        (folder / path).mkdir(parents=True, exist_ok=True)
    return {name: str(folder / path) for name, path in paths.items()} | {
        "ARGOCD_ASK_PASS_SOCK": str(folder / "ask"),
        "ARGOCD_GPG_ENABLED": "false",
        # What `https://kubernetes.default.svc` means outside of a pod: the cluster of KUBECONFIG.
        "ARGOCD_FAKE_IN_CLUSTER": "true",
    }


def _plain(value: Any) -> Any:
    """Lua tables as dictionaries and lists."""
    if not hasattr(value, "items"):
        return value
    pairs = {key: _plain(inner) for key, inner in value.items()}
    if pairs and list(pairs) == list(range(1, len(pairs) + 1)):
        return list(pairs.values())
    return pairs
