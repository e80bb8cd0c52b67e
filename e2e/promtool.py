"""Find promtool, or take it out of Debian's package of Prometheus, without installing that package.

`PROMTOOL` in the environment comes first, then PATH, then the cache.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked

GO_PACKAGE = "github.com/prometheus/prometheus/cmd/promtool"
"""For machines without Debian's packages: `go install` of it takes some minutes."""


def find_or_unpack(progress: Callable[[str], None] = lambda _line: None) -> Path:
    """Give the path of promtool.

    Raises:
        ClusterError: it cannot be had here; says why and what to do.
    """
    if named := os.environ.get("PROMTOOL"):
        return Path(named)
    if found := shutil.which("promtool"):
        return Path(found)
    program = cache_folder() / "promtool" / "promtool"
    with locked(cache_folder() / "promtool.lock", lambda: progress("another process unpacks promtool: waiting")):
        if not program.exists():
            _unpack(program, progress)
    return program


def _unpack(program: Path, progress: Callable[[str], None]) -> None:
    if not (shutil.which("apt-get") and shutil.which("dpkg")):
        raise ClusterError(f"no promtool on PATH and no Debian packages here: go install {GO_PACKAGE}@latest")
    progress(f"unpacking promtool of Debian's package prometheus in {program.parent}")
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        # A machine that was just made has no package lists yet.
        for refresh in (False, True):
            if refresh:
                _run("apt-get", "update", "-q", folder=scratch)
            failed = _run("apt-get", "download", "-q", "prometheus", folder=scratch)
            if not failed:
                break
        packages = list(Path(scratch).glob("prometheus_*.deb"))
        if not packages:
            raise ClusterError(f"no promtool: apt-get download prometheus: {failed}: go install {GO_PACKAGE}@latest")
        if failed := _run("dpkg", "-x", str(packages[0]), "root", folder=scratch):
            raise ClusterError(f"no promtool: dpkg -x {packages[0].name}: {failed}")
        (Path(scratch) / "root" / "usr" / "bin" / "promtool").rename(program)


def _run(*command: str, folder: str) -> str:
    """Run a program; gives its last words when it failed, nothing otherwise."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=300)
    except (OSError, subprocess.SubprocessError) as error:
        return repr(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
