"""Write and read kubeconfig files (kubernetes.io/docs/reference/config-api/kubeconfig.v1)."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster.errors import ClusterError
from e2e.cluster.pki import write_private


def write(path: Path, server: str, ca_file: Path, user: dict[str, str]) -> Path:
    """Write a kubeconfig with one context, mode 0600, and return its path.

    Args:
        path: Where to.
        server: URL of the API server.
        ca_file: Certificate bundle that its certificate is checked with.
        user: Fields of the `user` object: `client-certificate` and `client-key`, `token`, or `tokenFile`.
    """
    name = "securevllm"
    content = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": name, "cluster": {"server": server, "certificate-authority": str(ca_file)}}],
        "users": [{"name": name, "user": user}],
        "contexts": [{"name": name, "context": {"cluster": name, "user": name}}],
        "current-context": name,
    }
    write_private(path, yaml.safe_dump(content, sort_keys=False).encode())
    return path


@dataclass(frozen=True)
class Endpoint:
    """What a kubeconfig's current context points to: the URL and the PEM bundle of its authority."""

    server: str
    ca: bytes


def endpoint(path: Path) -> Endpoint:
    """Read the server and its authority from the current context of a kubeconfig.

    Raises:
        ClusterError: Unreadable, no current context, or no certificate authority (a connection nobody checks).
    """
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        context = _named(content["contexts"], content["current-context"])["context"]
        cluster = _named(content["clusters"], context["cluster"])["cluster"]
        if data := cluster.get("certificate-authority-data"):
            return Endpoint(cluster["server"], base64.b64decode(data))
        return Endpoint(cluster["server"], (path.parent / cluster["certificate-authority"]).read_bytes())
    except (OSError, yaml.YAMLError, KeyError, TypeError, StopIteration) as error:
        raise ClusterError(
            f"{path}: {error!r}: a kubeconfig needs a current-context whose cluster has server and"
            " certificate-authority(-data)"
        ) from error


def _named(items: list[dict[str, Any]], name: str) -> dict[str, Any]:
    return next(item for item in items if item["name"] == name)
