"""Earlier states of this repository, from its history: an upgrade is shown from what really was there."""

from __future__ import annotations

import shutil
import subprocess
from typing import TYPE_CHECKING

import pytest

from tests.api.operator_process import ROOT

if TYPE_CHECKING:
    from pathlib import Path

FIRST = "8f69f37c57df52c08860f4404a1304442785640b"
"""Release 0.1.0: one vLLM process per replica, no gate, isolation not measured, installed by kustomize."""

GROUPS = "68659ab57eb6b97756d621723fe8c9a9a812ec96"
"""Before 0.2.0: groups of pods, gates, the chart; no ``status.operator``."""


def checkout(commit: str, folder: Path) -> Path:
    """Unpack the sources of a commit that an installation is made of; skips the test where history lacks it.

    Args:
        commit: one of the above.
        folder: an empty one.
    """
    git = shutil.which("git")
    if git is None or not (ROOT / ".git").exists():
        pytest.skip("an older release is taken from the history of a git checkout, and this is none")
    git_here = [git, "-C", str(ROOT)]
    known = subprocess.run([*git_here, "cat-file", "-e", f"{commit}^{{tree}}"], capture_output=True, check=False)  # noqa: S603 - fixed arguments
    if known.returncode:
        pytest.skip(f"the history of this checkout does not reach back to {commit[:7]}: git fetch --unshallow")
    parts = ["charts", "crds", "manifests", "operator/securevllm"]
    listed = subprocess.run(  # noqa: S603 - fixed arguments
        [*git_here, "ls-tree", "--name-only", commit, *parts], check=True, capture_output=True, text=True
    )
    packed = subprocess.run(  # noqa: S603 - fixed arguments
        [*git_here, "archive", "--format=tar", commit, *listed.stdout.split()], check=True, capture_output=True
    )
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["tar", "-x", "-C", str(folder)], check=True, input=packed.stdout)  # noqa: S603, S607 - fixed arguments
    return folder
