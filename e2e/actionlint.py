"""Find actionlint, or build it from its Go module (some seconds, once)."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked

PACKAGE = "github.com/rhysd/actionlint/cmd/actionlint@v1.7.12"


def find_or_build() -> Path:
    """Give the path of actionlint.

    Raises:
        ClusterError: it cannot be had here; says why and what to do.
    """
    if found := shutil.which("actionlint"):
        return Path(found)
    folder = cache_folder() / PACKAGE.rpartition("/")[2]
    with locked(cache_folder() / "actionlint.lock"):
        if not (folder / "actionlint").exists():
            _build(folder)
    return folder / "actionlint"


def _build(folder: Path) -> None:
    go = shutil.which("go")
    if go is None:
        raise ClusterError(f"no actionlint and no Go on PATH: go install {PACKAGE}")
    env = os.environ | {"GOBIN": str(folder), "GOFLAGS": "-trimpath", "GOTOOLCHAIN": "local", "CGO_ENABLED": "0"}
    try:
        subprocess.run([go, "install", PACKAGE], check=True, capture_output=True, text=True, timeout=600, env=env)
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"go install {PACKAGE}: {error.stderr.strip().splitlines()[-1]}") from error
