"""Labels and annotations that are somebody else's language: neither a spec nor the platform's bounds may use them."""

from __future__ import annotations

import re

_PREFIXES = re.compile(
    r"([a-z0-9.-]*\.)?(securevllm\.io|kubernetes\.io|k8s\.io|istio\.io|linkerd\.io|kuma\.io|cilium\.io|openshift\.io"
    r"|projectcalico\.org|cncf\.io|kubevirt\.io|antrea\.io|ovn\.org|multus[a-z.-]*|cri-o|containerd\.io|consul\.hashicorp\.com"
    r"|azure\.workload\.identity|eks\.amazonaws\.com|iam\.gke\.io)/.*"  # the last three bring cloud credentials
)
"""Prefixes of Kubernetes, CNIs, CRIs, meshes, workload identities and of this operator."""
_NAMES = frozenset({"pod-template-hash", "controller-revision-hash", "controller-uid", "job-name"})


def is_reserved(key: str) -> bool:
    """Whether a label or annotation is read by Kubernetes, a CNI, a CRI, a mesh or this operator."""
    return _PREFIXES.fullmatch(key) is not None or key in _NAMES
