"""The one value that everything else is a projection of: who exists, what listens, who may talk to whom and why.

``plan`` is pure. What is not a flow is not allowed: NetworkPolicies, the gateway's configuration, vLLM's command line,
probes and ``explain`` all derive from the result, so they cannot disagree.
"""

from securevllm.topology.cluster import check
from securevllm.topology.model import (
    LAST_PORT,
    VLLM,
    WORKER_OF,
    Flow,
    Group,
    Inbound,
    Internal,
    Mesh,
    Outbound,
    Outside,
    Pods,
    PortRule,
    Role,
    Socket,
    Topology,
    every_port,
)
from securevllm.topology.peers import internet, outside_part, public_part, selector
from securevllm.topology.plan import (
    GATEWAY_ADMIN,
    GATEWAY_HTTP,
    GATEWAY_HTTPS,
    GATEWAY_METRICS,
    GATEWAY_OPS,
    Side,
    fetch_source,
    hub_port,
    plan,
    sides,
)

__all__ = [
    "GATEWAY_ADMIN",
    "GATEWAY_HTTP",
    "GATEWAY_HTTPS",
    "GATEWAY_METRICS",
    "GATEWAY_OPS",
    "LAST_PORT",
    "VLLM",
    "WORKER_OF",
    "Flow",
    "Group",
    "Inbound",
    "Internal",
    "Mesh",
    "Outbound",
    "Outside",
    "Pods",
    "PortRule",
    "Role",
    "Side",
    "Socket",
    "Topology",
    "check",
    "every_port",
    "fetch_source",
    "hub_port",
    "internet",
    "outside_part",
    "plan",
    "public_part",
    "selector",
    "sides",
]
