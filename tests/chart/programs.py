"""helm and kubectl as a person runs them, and objects in a form that can be compared."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CHART = ROOT / "charts" / "secure-vllm-operator"
MANIFESTS = ROOT / "manifests"
NAME = "secure-vllm-operator"
KUBERNETES = "1.36.0"
KUBECTL = Path(sys.executable).parent / "kubectl"

Object = dict[str, Any]
Key = tuple[str, str, str]
"""kind, namespace, name."""


class HelmError(AssertionError):
    """helm ended with an error; the message is what it printed."""


@dataclass(frozen=True)
class Helm:
    """The helm program. Nothing of the user's own configuration or environment is used."""

    program: Path

    def __call__(self, *arguments: str, kubeconfig: Path | None = None) -> str:
        """Run it; gives what it prints.

        Raises:
            HelmError: it ended with an error.
        """
        nowhere = "/nonexistent"
        env = {
            "PATH": os.environ["PATH"],
            "HOME": nowhere,
            "HELM_CONFIG_HOME": nowhere,
            "HELM_CACHE_HOME": nowhere,
            "HELM_DATA_HOME": nowhere,
            "KUBECONFIG": str(kubeconfig or nowhere),
        }
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [self.program, *arguments], capture_output=True, text=True, check=False, env=env, timeout=300
        )
        if done.returncode:
            raise HelmError(done.stderr)
        return done.stdout

    def template(self, *options: str, release: str = NAME, namespace: str = NAME) -> list[Object]:
        """Objects of the chart, rendered without a cluster."""
        printed = self(
            "template", release, str(CHART), "--namespace", namespace, "--kube-version", KUBERNETES, *options
        )
        return list(filter(None, yaml.safe_load_all(printed)))


def kustomize(folder: Path) -> list[Object]:
    """Objects of a kustomization."""
    command = [str(KUBECTL), "kustomize", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - fixed
    assert done.returncode == 0, done.stderr
    return list(filter(None, yaml.safe_load_all(done.stdout)))


def key(obj: Object) -> Key:
    """What names an object in a cluster."""
    metadata = obj["metadata"]
    return obj["kind"], metadata.get("namespace", ""), metadata["name"]


def by_key(objects: Iterable[Object]) -> dict[Key, Object]:
    """Objects by what names them; each once."""
    objects = list(objects)
    found = {key(obj): obj for obj in objects}
    assert len(found) == len(objects), "an object is there twice"
    return found


def without_labels(obj: Object, names: Sequence[str]) -> Object:
    """The object without these labels and annotations of its own."""
    obj = copy.deepcopy(obj)
    for part in ("labels", "annotations"):
        kept = {name: value for name, value in obj["metadata"].get(part, {}).items() if name not in names}
        obj["metadata"].pop(part, None)
        if kept:
            obj["metadata"][part] = kept
    return obj
