"""An evaluator of NetworkPolicies that knows nothing of the operator.

It is written from the Kubernetes API reference (networking.k8s.io/v1) and the concept page "Network Policies", and
imports nothing from `securevllm`: tests compare what the operator meant with what the rendered policies say.
"""

from __future__ import annotations

from tests.netpol.endpoints import CALICO, CILIUM, ContainerPort, Engine, External, Node, Pod, pod_from_template
from tests.netpol.evaluator import Evaluator, Verdict
from tests.netpol.policies import InvalidPolicyError

__all__ = [
    "CALICO",
    "CILIUM",
    "ContainerPort",
    "Engine",
    "Evaluator",
    "External",
    "InvalidPolicyError",
    "Node",
    "Pod",
    "Verdict",
    "pod_from_template",
]
