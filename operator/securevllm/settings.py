"""Settings of the operator process, read once at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from securevllm.context import Context


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        namespace: of the operator itself; its Lease is there.
        identity: of this process, unique among the candidates for the Lease; in a cluster the pod's name.
        watch_namespace: one-namespace mode; None: all namespaces.
        kubeconfig: None: the pod's service account.
        lease: name of the Lease.
        workers: resources that are reconciled side by side.
        http_host: address of health and metrics.
        http_port: port of health and metrics.
        canary_listener: whether to listen on ``context.canary_port``.
        log_format: ``json`` or ``console``.
        log_level: for example ``INFO``.
        resync_seconds: how often everything is listed again: a deletion in a watch gap is never told.
        context: what rendering has to know of the cluster.
    """

    namespace: str
    identity: str
    watch_namespace: str | None = None
    kubeconfig: Path | None = None
    lease: str = "secure-vllm-operator"
    workers: int = 8
    http_host: str = "0.0.0.0"  # noqa: S104 - probes come from the node; the operator's own NetworkPolicy limits it
    http_port: int = 8080
    canary_listener: bool = True
    log_format: Literal["json", "console"] = "json"
    log_level: str = "INFO"
    resync_seconds: float = 600.0
    context: Context = field(default_factory=Context)
