"""Definitions (CustomResourceDefinitions) of other projects' kinds, as those projects publish them.

They come out of the projects' Go modules, pinned in the `go.mod` files below `cluster/`, and stay in the cache. So a
test's API server checks our objects of these kinds as one does on which the project is installed.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from e2e.cluster.binaries import CILIUM, PROMETHEUS_OPERATOR, unpack

FILES = {
    "servicemonitors.monitoring.coreos.com": (PROMETHEUS_OPERATOR, "monitoring.coreos.com_servicemonitors.yaml"),
    "podmonitors.monitoring.coreos.com": (PROMETHEUS_OPERATOR, "monitoring.coreos.com_podmonitors.yaml"),
    "prometheusrules.monitoring.coreos.com": (PROMETHEUS_OPERATOR, "monitoring.coreos.com_prometheusrules.yaml"),
    "ciliumnetworkpolicies.cilium.io": (CILIUM, "v2/ciliumnetworkpolicies.yaml"),
}
"""Name of a definition: whose it is, and its file among theirs."""


def find_or_fetch(progress: Callable[[str], None] = lambda _line: None) -> dict[str, Path]:
    """Give the file of each definition.

    Raises:
        ClusterError: they cannot be had here; says why.
    """
    folders = {component: unpack(component, progress) / "crds" for component, _ in FILES.values()}
    return {name: folders[component] / file for name, (component, file) in FILES.items()}
