"""Labels, annotations, devices and volumes of a spec: closed sets, which the platform may widen in part.

Labels that nobody else's machinery reads have no prefix; a prefix belongs to somebody. What a CNI, a CRI, a mesh or
this operator reads is refused whatever the platform says: it would lead traffic past the policies.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING

from securevllm.api.guard import values
from securevllm.api.reserved import is_reserved
from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.bounds import PlatformBounds

_GPU = re.compile(r"(nvidia\.com/(gpu|mig-[0-9a-z.-]+)|amd\.com/gpu|gpu\.intel\.com/(i915|xe)|aws\.amazon\.com/neuron)")
_PLAIN_RESOURCES = frozenset({"cpu", "memory", "ephemeral-storage"})

NETWORK_DEVICES = "networkDevices"
"""The risk that opens RDMA and SR-IOV devices."""

LABELS = ("kueue.x-k8s.io/queue-name", "kueue.x-k8s.io/priority-class")
"""Labels with a prefix that a user may set; the platform may name more."""

ANNOTATIONS = ("cluster-autoscaler.kubernetes.io/safe-to-evict", "kueue.x-k8s.io/queue-name")
"""Annotations that a user may set; the platform may name more."""

SERVICE_ANNOTATION_PREFIXES = (
    "service.beta.kubernetes.io/aws-load-balancer-",
    "service.beta.kubernetes.io/azure-load-balancer-",
    "networking.gke.io/load-balancer-",
    "cloud.google.com/load-balancer-",
    "metallb.universe.tf/",
    "metallb.io/",
)
"""Annotations of the gateway's Service: how a load balancer is made, not who else learns its name."""

OWN_SECRETS = ("-client-keys", "-engine-key", "-gateway-auth", "-gateway-ca", "-gateway-tls")
"""Ends of the names of Secrets that the operator makes (render/gateway.py, render/engine.py)."""


_NODE = "pods share nothing with their node, where no NetworkPolicy reaches"
_FIXED = "the operator alone decides about the pod, its containers and their rights"
_VOLUMES = "volumes are configMap, secret, persistentVolumeClaim and emptyDir: nothing of the node, no code of a driver"
NOT_OFFERED: Mapping[str, tuple[str, str]] = {
    "envFrom": ("it would bring names that nobody sees", "Name each variable in env, with valueFrom."),
    "fieldRef": ("engines learn nothing about their node", "Use secretKeyRef or configMapKeyRef."),
    **dict.fromkeys(
        ("hostNetwork", "hostPID", "hostIPC", "hostUsers", "hostPort", "dnsPolicy"), (_NODE, "Leave it out.")
    ),
    **dict.fromkeys(("hostPath", "csi", "projected", "ephemeral", "nfs"), (_VOLUMES, "Use a persistentVolumeClaim.")),
    **dict.fromkeys(
        ("containers", "initContainers", "securityContext", "serviceAccountName", "command", "volumeMounts"),
        (_FIXED, "Leave it out; docs/guard.md has what may be set."),
    ),
}
"""Fields of a pod that people look for, and why a spec has none of them."""


def is_gpu(resource: str) -> bool:
    """Whether an extended resource is a GPU that the operator knows."""
    return _GPU.fullmatch(resource) is not None


def check_labels(labels: Iterable[str], bounds: PlatformBounds) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.labels``: a label can make a pod part of another one's policy."""
    for key in labels:
        if key in LABELS:
            continue
        if is_reserved(key):
            yield Problem(
                "spec.engine.labels",
                "LabelRefused",
                "labels of Kubernetes, of meshes and of this operator select pods",
                "Use a name without a prefix.",
                key,
            )
        elif "/" in key and key not in bounds.labels:
            yield Problem(
                "spec.engine.labels",
                "LabelRefused",
                "a label with a prefix is read by somebody else's machinery",
                f"Use a name without a prefix, or one of: {', '.join((*LABELS, *bounds.labels))}."
                " The platform may allow more: labels in its bounds.",
                key,
            )


def check_annotations(annotations: Iterable[str], bounds: PlatformBounds) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.annotations``."""
    allowed = (*ANNOTATIONS, *bounds.annotations)
    for key in annotations:
        if key not in allowed:
            yield Problem(
                "spec.engine.annotations",
                "AnnotationRefused",
                "annotations can add interfaces and sidecars that no policy sees",
                f"Allowed are: {', '.join(allowed)}. The platform may allow more: annotations in its bounds.",
                key,
            )


def check_service_annotations(annotations: Iterable[str], bounds: PlatformBounds) -> Iterator[Problem]:
    """What is wrong with ``spec.gateway.service.annotations``."""
    for key in annotations:
        if not key.startswith(SERVICE_ANNOTATION_PREFIXES) and key not in bounds.service_annotations:
            yield Problem(
                "spec.gateway.service.annotations",
                "AnnotationRefused",
                "an annotation can publish the Service elsewhere",
                f"Allowed are those that begin with: {', '.join(SERVICE_ANNOTATION_PREFIXES)}."
                " The platform may allow more: serviceAnnotations in its bounds.",
                key,
            )


def network_devices(resources: api.Resources | None, bounds: PlatformBounds) -> tuple[str, ...]:
    """Extended resources that are no GPU, and of which the platform did not say that they are no network."""
    if resources is None:
        return ()
    names = {*resources.requests, *resources.limits} - {*_PLAIN_RESOURCES, *bounds.extended_resources}
    return tuple(sorted(name for name in names if not is_gpu(name)))


def check_resources(
    field: str, resources: api.Resources | None, bounds: PlatformBounds, *, devices: bool, accepted: frozenset[str]
) -> Iterator[Problem]:
    """What is wrong with a resources block.

    Args:
        field: its path.
        resources: the block.
        bounds: what the platform allows.
        devices: whether pods of this kind may have any device; the gateway's may not.
        accepted: risks that are taken.
    """
    if resources is None:
        return
    for part, amounts in (("requests", resources.requests), ("limits", resources.limits)):
        for name in amounts:
            problem = _device(f"{field}.{part}", name, bounds, devices=devices, accepted=accepted)
            if problem is not None:
                yield problem


def _device(
    field: str, name: str, bounds: PlatformBounds, *, devices: bool, accepted: frozenset[str]
) -> Problem | None:
    if name in _PLAIN_RESOURCES or (devices and (is_gpu(name) or name in bounds.extended_resources)):
        return None
    if devices and name in bounds.network_devices:
        if NETWORK_DEVICES in accepted:
            return None
        return Problem(
            field,
            "ResourceRefused",
            "this device is a network that no NetworkPolicy sees",
            f"Accept it in words: security: {{accept: [{{risk: {NETWORK_DEVICES}, why: ...}}]}}.",
            name,
        )
    return Problem(
        field,
        "ResourceRefused",
        "this extended resource may bring a network that no NetworkPolicy sees",
        "Use cpu, memory, ephemeral-storage"
        + (
            " and GPUs such as nvidia.com/gpu. The platform may allow more: extendedResources and networkDevices in"
            " its bounds."
            if devices
            else "."
        ),
        name,
    )


def mounts(volumes: Iterable[api.EngineVolume]) -> tuple[str, ...]:
    """Folders of the declared volumes."""
    return tuple(volume.mount_path for volume in volumes)


def check_volumes(spec: api.Spec) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.volumes``.

    A mount elsewhere could shadow Python's or vLLM's own files, CUDA's libraries, the model, or the operator's mounts.
    """
    seen: dict[str, str] = {}
    for index, volume in enumerate(spec.engine.volumes):
        field, path = f"spec.engine.volumes[{index}]", volume.mount_path
        if not path.startswith(tuple(f"{root}/" for root in values.ROOTS)):
            yield Problem(
                f"{field}.mountPath",
                "VolumeRefused",
                f"volumes are mounted below {' or '.join(values.ROOTS)} only, where they shadow neither code nor mounts"
                " of the operator",
                f"Write for example {values.ROOTS[-1]}/{volume.name}.",
                path,
            )
        for other, where in seen.items():
            if f"{path}/".startswith(f"{other}/") or f"{other}/".startswith(f"{path}/"):
                yield Problem(
                    f"{field}.mountPath",
                    "VolumeRefused",
                    f"it is within the mount of {where}, or holds it: one would hide files of the other",
                    "Use folders side by side.",
                    path,
                )
        seen[path] = field
        if volume.secret is not None and volume.secret.secret_name.endswith(OWN_SECRETS):
            yield Problem(f"{field}.secret.secretName", "VolumeRefused", *OWN_SECRET, volume.secret.secret_name)
        claim = volume.persistent_volume_claim
        if claim is not None and not claim.read_only and claim.claim_name == _model_claim(spec):
            yield Problem(
                f"{field}.persistentVolumeClaim.readOnly",
                "VolumeRefused",
                "this claim holds the weights, which engines must not change",
                "Write readOnly: true.",
                claim.claim_name,
            )


def _model_claim(spec: api.Spec) -> str | None:
    source = spec.model.source
    if source is None:
        return None
    if source.persistent_volume_claim is not None:
        return source.persistent_volume_claim.claim_name
    return source.hugging_face.storage.claim_name if source.hugging_face is not None else None


OWN_SECRET = (
    "Secrets of this name are the operator's own: keys of gateways and engines",
    "Use a Secret of yours, under another name.",
)


def check_secret_names(names: Mapping[str, str]) -> Iterator[Problem]:
    """Secrets that the operator makes for itself, where a spec would hand them to an engine or to a hub.

    Args:
        names: field of the spec to the name of a Secret.
    """
    for field, name in names.items():
        if name.endswith(OWN_SECRETS):
            yield Problem(field, "SecretRefused", *OWN_SECRET, name)
