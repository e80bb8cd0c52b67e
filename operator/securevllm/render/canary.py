"""Canary pods: short-lived, restricted, without a token, and without a label that any policy of ours selects.

A *listener* runs on a node of engines and accepts on their ports: whoever may reach it shows that silence of an engine
beside it is the engine's own. A *prober* connects to engines and listeners from the resource's namespace.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securevllm.context import FIELD_MANAGER
from securevllm.proof import wire
from securevllm.render import gate, pods
from securevllm.render.meta import COMPONENT, INSTANCE, MANAGED_BY

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.render.meta import Object, Owner

COMPONENT_VALUE = "canary"
USER = GROUP = 65532

LIFETIME_SECONDS = 120
"""Kubelet ends it after that, also when the operator is gone."""


PROBE_MANAGER = "securevllm-probe"
"""Value of ``app.kubernetes.io/managed-by`` when a person's ``securevllm probe`` made them: the operator watches and
removes its own."""


@dataclass(frozen=True)
class Maker:
    """Who makes canary pods, for what and where.

    Attributes:
        owner: the resource that is measured.
        spec: for what kubelet logs in to registries with.
        image: the operator's.
        namespace: of the pods.
        manager: value of ``app.kubernetes.io/managed-by``.
    """

    owner: Owner
    spec: api.Spec
    image: str
    namespace: str
    manager: str = FIELD_MANAGER


def labels(owner: Owner, manager: str = FIELD_MANAGER) -> dict[str, str]:
    """Labels of canary pods; docs/status.md#nocontrol selects them by the name."""
    return {
        **pods.MESH_OPT_OUT_LABELS,
        "app.kubernetes.io/name": "secure-vllm-canary",
        INSTANCE: owner.name,
        COMPONENT: COMPONENT_VALUE,
        MANAGED_BY: manager,
    }


def listener(maker: Maker, name: str, *, node: str, ports: tuple[int, ...]) -> Object:
    """A pod that accepts on ports, on one node.

    Args:
        maker: who makes it.
        name: of the pod.
        node: where it has to run; tolerates whatever engines there tolerate.
        ports: above 1023.
    """
    pod = _pod(maker, name, ("listen", wire.CanaryConfig(listen=ports)))
    field = {"key": "metadata.name", "operator": "In", "values": [node]}
    pod["spec"]["affinity"] = {
        "nodeAffinity": {
            "requiredDuringSchedulingIgnoredDuringExecution": {"nodeSelectorTerms": [{"matchFields": [field]}]}
        }
    }
    pod["spec"]["tolerations"] = [{"operator": "Exists"}]
    # Ready means that it accepts; the port is its own, so kubelet's probe harms nobody.
    pod["spec"]["containers"][0]["readinessProbe"] = {"tcpSocket": {"port": ports[0]}, "periodSeconds": 1}
    return pod


def prober(maker: Maker, name: str, *, targets: tuple[wire.Target, ...]) -> Object:
    """A pod that connects to targets, says what it saw in its termination message, and ends."""
    return _pod(maker, name, ("probe", wire.CanaryConfig(targets=targets)))


def _pod(maker: Maker, name: str, program: tuple[str, wire.CanaryConfig]) -> Object:
    owner = maker.owner
    reference = owner.reference() | {"controller": False, "blockOwnerDeletion": False}
    home = maker.namespace == owner.namespace
    body: dict[str, Any] = {
        "restartPolicy": "Never",
        "activeDeadlineSeconds": LIFETIME_SECONDS,
        "terminationGracePeriodSeconds": 1,
        "automountServiceAccountToken": False,
        "enableServiceLinks": False,
        "securityContext": pods.security(USER, GROUP),
        "containers": [
            {
                "name": COMPONENT_VALUE,
                "image": maker.image,
                "args": [COMPONENT_VALUE, program[0]],
                "env": [
                    pods.field_env(wire.POD_IPS, "status.podIPs"),
                    {"name": wire.CANARY_VARIABLE, "value": wire.dump(program[1])},
                ],
                "resources": gate.RESOURCES,
                "securityContext": pods.CONTAINER_SECURITY,
            }
        ],
        # Secrets of another namespace have nothing to do with the resource.
        **(pods.pull_secrets(maker.spec) if home else {}),
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {
            "name": name,
            "namespace": maker.namespace,
            "labels": labels(owner, maker.manager),
            "annotations": dict(pods.MESH_OPT_OUT_ANNOTATIONS),
            # The garbage collector removes at once what is owned by something of another namespace.
            **({"ownerReferences": [reference]} if home else {}),
        },
        "spec": body,
    }


def is_canary(pod: Object, manager: str = FIELD_MANAGER) -> bool:
    """Whether a pod is one of these."""
    found = pod["metadata"].get("labels", {})
    return (found.get(COMPONENT), found.get(MANAGED_BY)) == (COMPONENT_VALUE, manager)
