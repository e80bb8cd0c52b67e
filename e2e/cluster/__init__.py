"""A real Kubernetes control plane from nothing, for tests and the demo (`python -m e2e.cluster` for people).

    with running() as cluster:
        ...  # cluster.kubeconfig, cluster.audit_events(), cluster.restart_apiserver()

What it is made of is decided by `lifecycle`; the programs come from `binaries`; there are no nodes: `hollow` stands
in for one.
"""

from __future__ import annotations

from e2e.cluster.errors import ClusterError
from e2e.cluster.lifecycle import Cluster, load, running, start, stop

__all__ = ["Cluster", "ClusterError", "load", "running", "start", "stop"]
