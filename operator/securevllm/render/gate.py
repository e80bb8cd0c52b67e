"""The init containers that hold an engine back: the gate last, and in a group its own image first.

Kubelet pulls the image of a container when its turn comes. So in a group the engine's image is first, with nothing to
do: when the members meet in their gates, no pull of ten minutes is left that would eat up vLLM's start-up time. A pod
that waits for nobody does without: kubelet looks for ended containers once a second, so that each one costs as much.

What must be unreachable comes from what the topology does *not* allow: a target that a declared egress may reach is
left out, because reaching it would be no breach.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from securevllm.context import CidrPeer
from securevllm.proof import wire
from securevllm.render import pods
from securevllm.render.meta import EPOCH_LABEL, MEMBER_LABEL, TEMPLATE_LABEL
from securevllm.topology import Outbound, Outside

if TYPE_CHECKING:
    from collections.abc import Mapping

    from securevllm.api import types as api
    from securevllm.context import Context
    from securevllm.render.meta import Object
    from securevllm.topology import Role, Topology

PULL, GATE = "pull", "gate"

RESOURCES = {"requests": {"cpu": "10m", "memory": "32Mi"}, "limits": {"memory": "64Mi"}}
"""Of gate and canary containers. An init container's requests count only where they exceed the engine's."""

_API_SERVER_NODE_PORTS = (443, 6443, 8443, 16443)
"""Ports on which API servers listen on their nodes: kubeadm, kind, k3s and k0s; minikube; MicroK8s."""


def init_containers(
    spec: api.Spec,
    topology: Topology,
    role: Role,
    context: Context,
    *,
    image: str,
    barrier: wire.Barrier | None = None,
) -> list[Object]:
    """What runs before the containers of a pod with model code.

    Args:
        spec: the accepted spec.
        topology: what the role may reach.
        role: whose pod it is.
        context: the cluster and the operator.
        image: of the pod's own container; in a group it is pulled first.
        barrier: who waits for whom; None: the pod is a world of its own.
    """
    measured = spec.security.gate.disabled is None
    if not measured and barrier is None:
        return []
    config = wire.GateConfig(
        dns=f"kubernetes.default.svc.{context.cluster_domain}.",
        isolation=measured,
        forbidden=forbidden(topology, role, context) if measured else (),
        barrier=barrier,
    )
    place = [] if barrier is None else _place()
    pull: Object = {
        "name": PULL,
        "image": image,
        "command": ["/bin/true"],
        "resources": RESOURCES,
        "securityContext": pods.CONTAINER_SECURITY,
    }
    return [
        *([] if barrier is None else [pull]),
        {
            "name": GATE,
            "image": context.operator_image,
            "args": ["gate"],
            "env": [
                pods.field_env(wire.POD_IP, "status.podIP"),
                pods.field_env(wire.NODE_IP, "status.hostIPs"),
                *place,
                {"name": wire.GATE_VARIABLE, "value": wire.dump(config)},
            ],
            "resources": RESOURCES,
            "securityContext": pods.CONTAINER_SECURITY,
        },
    ]


def barrier(port: int, members: tuple[str, ...]) -> wire.Barrier:
    """Where the members of a group meet; the pods' own labels say which of them this is, and of which start.

    Args:
        port: of the socket ``barrier``.
        members: names of all pods of the group, the head first.
    """
    return wire.Barrier(port, "$MEMBER", members, "$WORLD")


def _place() -> list[Object]:
    labels = {"MEMBER": MEMBER_LABEL, "TEMPLATE": TEMPLATE_LABEL, "EPOCH": EPOCH_LABEL}
    return [
        *(pods.field_env(name, f"metadata.labels['{label}']") for name, label in labels.items()),
        {"name": "WORLD", "value": "$(TEMPLATE)/$(EPOCH)"},
    ]


def forbidden(topology: Topology, role: Role, context: Context) -> tuple[wire.Forbidden, ...]:
    """What is known to listen and must not be reachable from a role."""
    api_server = wire.Forbidden(
        "the Kubernetes API", "$KUBERNETES_SERVICE_HOST", "$KUBERNETES_SERVICE_PORT", _API_SERVER_NODE_PORTS
    )
    canary = wire.Forbidden("the operator's canary listener", context.canary_host, str(context.canary_port))
    ranges, ports = _declared(topology, role)
    # Where the API server really listens, after DNAT, nobody can tell here: it may be a public address.
    return (*(() if ranges else (api_server,)), *(() if context.canary_port in ports else (canary,)))


def _declared(topology: Topology, role: Role) -> tuple[bool, frozenset[int]]:
    """Whether a role may reach ranges of addresses over TCP, and on which ports it may reach anything but DNS."""
    flows = [
        flow
        for flow in topology.flows
        if isinstance(flow, Outbound) and flow.source == role and flow.to is not Outside.DNS
    ]
    ranges = any(
        isinstance(peer, CidrPeer) and any(rule.protocol == "TCP" for rule in flow.ports)
        for flow in flows
        for peer in flow.peers
    )
    return ranges, frozenset(rule.port for flow in flows for rule in flow.ports if rule.protocol == "TCP")


def inputs(raw: Mapping[str, Any], topology: Topology, role: Role, context: Context) -> dict[str, Any]:
    """What the gate depends on; empty as long as nothing is said: an operator upgrade must not roll pods (I11).

    Args:
        raw: ``spec`` as the user wrote it.
        topology: what the role may reach.
        role: whose pod it is.
        context: the cluster and the operator.
    """
    ranges, ports = _declared(topology, role)
    found = {
        "gate": raw.get("security", {}).get("gate"),
        "gateWithoutApiServer": ranges,
        "gateWithoutCanary": context.canary_port in ports,
    }
    return {name: value for name, value in found.items() if value}
