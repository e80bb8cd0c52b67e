"""A cluster of `kind` (Kubernetes in Docker), where Docker runs and `kind` is on PATH. Thin on purpose.

Never tried where this was written: there is no container engine. It differs from the local control plane in that it
always has a node (images must be loaded), a scheduler and a CNI with a policy engine, and that its API server cannot be
stopped on its own.
"""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import yaml

from e2e.cluster.errors import ClusterError

if TYPE_CHECKING:
    from e2e.cluster.images import Image

_AUDIT_LOG = "/var/log/kubernetes/audit.log"
_AUDIT_POLICY = "/etc/kubernetes/policies/audit-policy.yaml"


def available() -> bool:
    """Tell whether both programs are there and the Docker daemon answers."""
    docker = shutil.which("docker")
    if not docker or not shutil.which("kind"):
        return False
    try:
        return subprocess.run([docker, "info"], capture_output=True, check=False, timeout=20).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def start(name: str, folder: Path, audit_policy: Mapping[str, object], workers: int = 0) -> Path:
    """Create a cluster with a name and a kubeconfig of its own; return the kubeconfig (cluster-admin).

    With no `workers` its one node is the control plane's, and runs pods.

    Raises:
        ClusterError: `kind create cluster` failed.
    """
    policy, config, kubeconfig = folder / "audit-policy.yaml", folder / "kind.yaml", folder / "admin.kubeconfig"
    policy.write_text(yaml.safe_dump(dict(audit_policy)), encoding="utf-8")
    config.write_text(yaml.safe_dump(_config(policy, workers)), encoding="utf-8")
    # --kubeconfig: without it kind writes into the user's own file and changes its current context.
    _kind("create", "cluster", f"--name={name}", f"--config={config}", f"--kubeconfig={kubeconfig}", "--wait=180s")
    return kubeconfig


def stop(name: str, folder: Path) -> None:
    """Delete the cluster; nothing happens when there is none of this name."""
    _kind("delete", "cluster", f"--name={name}", f"--kubeconfig={folder / 'admin.kubeconfig'}")


def load(name: str, image: Image) -> None:
    """Import an image into every node.

    Raises:
        ClusterError: `kind load` failed.
    """
    with tempfile.NamedTemporaryFile(suffix=".tar") as file:
        image.write(file)
        file.flush()
        load_archive(name, Path(file.name))


def load_archive(name: str, file: Path) -> None:
    """Import a docker-archive file into every node.

    Raises:
        ClusterError: `kind load` failed.
    """
    _kind("load", "image-archive", str(file), f"--name={name}")


def audit_lines(name: str) -> list[str]:
    """Read the audit log out of the node: on the host it would belong to root."""
    docker = shutil.which("docker") or "docker"
    command = [docker, "exec", f"{name}-control-plane", "cat", _AUDIT_LOG]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.splitlines(
        keepends=True
    )


def _config(policy: Path, workers: int) -> dict[str, object]:
    arguments = {"audit-log-path": _AUDIT_LOG, "audit-policy-file": _AUDIT_POLICY, "audit-log-maxsize": "4096"}
    volumes = [
        {
            "name": "audit-policy",
            "hostPath": _AUDIT_POLICY,
            "mountPath": _AUDIT_POLICY,
            "readOnly": True,
            "pathType": "File",
        },
        {
            "name": "audit-log",
            "hostPath": "/var/log/kubernetes",
            "mountPath": "/var/log/kubernetes",
            "pathType": "DirectoryOrCreate",
        },
    ]

    def patch(version: str, extra_args: object) -> str:
        api_server = {"extraArgs": extra_args, "extraVolumes": volumes}
        kind = {"apiVersion": f"kubeadm.k8s.io/{version}", "kind": "ClusterConfiguration", "apiServer": api_server}
        return yaml.safe_dump(kind)

    # extraArgs is a map in v1beta3 and a list in v1beta4; kind applies the patch whose version it uses for this
    # Kubernetes.
    as_list = [{"name": name, "value": value} for name, value in arguments.items()]
    node = {
        "role": "control-plane",
        "extraMounts": [{"hostPath": str(policy), "containerPath": _AUDIT_POLICY, "readOnly": True}],
        "kubeadmConfigPatches": [patch("v1beta3", arguments), patch("v1beta4", as_list)],
    }
    return {"apiVersion": "kind.x-k8s.io/v1alpha4", "kind": "Cluster", "nodes": [node, *[{"role": "worker"}] * workers]}


def _kind(*arguments: str) -> None:
    program = shutil.which("kind") or "kind"
    result = subprocess.run([program, *arguments], capture_output=True, text=True, check=False, timeout=600)
    if result.returncode != 0:
        raise ClusterError(
            f"kind {' '.join(arguments)} failed (exit code {result.returncode}):\n{result.stderr.strip()}"
        )
