"""What a user may pass to the engine: exact flags and variables of the catalogue, values that cannot be flags.

vLLM's parser accepts unambiguous prefixes, underscores, JSON dotted keys and repeated flags of which the last one wins
(vllm/utils/argparse_utils.py, 0.33.0), so a denylist of spellings is always incomplete. Here a flag is an exact name
of the allowlist with at most one ``=value``, and the operator's own flags come after it on the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from securevllm import catalogue
from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm.api import types as api

# A quantization or parser name is a word; a dot or slash would make some of them a module or a file.
_VALUES = {
    "int": re.compile(r"-?[0-9]{1,18}"),
    "float": re.compile(r"[0-9]{1,9}(\.[0-9]{1,9})?"),
    "word": re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}"),
}
_EXAMPLES = {"int": "8192", "float": "0.9", "word": "bfloat16"}

_GPU = re.compile(r"(nvidia\.com/(gpu|mig-[0-9a-z.-]+)|amd\.com/gpu|gpu\.intel\.com/(i915|xe)|aws\.amazon\.com/neuron)")
_PLAIN_RESOURCES = frozenset({"cpu", "memory", "ephemeral-storage"})

ANNOTATIONS = frozenset({"cluster-autoscaler.kubernetes.io/safe-to-evict", "kueue.x-k8s.io/queue-name"})
"""Annotations a user may set. An allowlist: CNI, CRI and mesh annotations open what policies close."""

SERVICE_ANNOTATION_PREFIXES = (
    "service.beta.kubernetes.io/aws-load-balancer-",
    "service.beta.kubernetes.io/azure-load-balancer-",
    "networking.gke.io/load-balancer-",
    "cloud.google.com/load-balancer-",
    "metallb.universe.tf/",
    "metallb.io/",
)
"""Annotations of the gateway's Service: how a load balancer is made, not who else learns its name."""

_RESERVED_LABELS = re.compile(
    r"([a-z0-9.-]*\.)?(securevllm\.io|kubernetes\.io|k8s\.io|istio\.io|linkerd\.io|kuma\.io|cilium\.io|openshift\.io"
    r"|azure\.workload\.identity)/.*"  # the last one puts a cloud credential into the pod
)
_RESERVED_LABEL_NAMES = frozenset({"pod-template-hash", "controller-revision-hash", "controller-uid", "job-name"})


def is_gpu(resource: str) -> bool:
    """Whether an extended resource is a GPU that the operator knows."""
    return _GPU.fullmatch(resource) is not None


def check_args(args: tuple[str, ...]) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.args``."""
    flags = catalogue.flags()
    seen: set[str] = set()
    for index, arg in enumerate(args):
        field = f"spec.engine.args[{index}]"
        name, equals, value = arg.partition("=")
        if name in seen:
            yield Problem(field, "ArgumentRefused", "a flag may stand only once", "Remove one of the two.", name)
        seen.add(name)
        if name in flags.owned:
            yield Problem(
                field, "ArgumentRefused", "the operator sets this flag", f"Use instead: {flags.owned[name]}.", arg
            )
        elif name not in flags.allowed:
            yield Problem(
                field,
                "ArgumentRefused",
                "only exact names of the allowlist may be passed: a flag can open what the operator closed",
                f"Write the full name of one of: {', '.join(sorted(flags.allowed))}.",
                arg,
            )
        elif (kind := flags.allowed[name]) == "none":
            if equals:
                yield Problem(field, "ArgumentRefused", "this flag takes no value", f"Write {name}.", arg)
        elif not equals or _VALUES[kind].fullmatch(value) is None:
            yield Problem(
                field,
                "ArgumentRefused",
                f"this flag needs a value of kind {kind}",
                f"Write for example {name}={_EXAMPLES[kind]}.",
                arg,
            )


def check_env(env: tuple[api.EnvVar, ...]) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.env``."""
    known = catalogue.environment()
    seen: set[str] = set()
    for index, variable in enumerate(env):
        field = f"spec.engine.env[{index}].name"
        if variable.name in seen:
            yield Problem(
                field, "VariableRefused", "a name may stand only once", "Remove one of the two.", variable.name
            )
        seen.add(variable.name)
        if variable.name not in known.allowed:
            yield Problem(
                field,
                "VariableRefused",
                "only names of the allowlist may be set: a variable can open what the operator closed",
                f"Use one of: {', '.join(sorted(known.allowed))}.",
                variable.name,
            )


def check_labels(labels: dict[str, str]) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.labels``: a label can make a pod part of another one's policy."""
    for key in labels:
        if _RESERVED_LABELS.fullmatch(key) or key in _RESERVED_LABEL_NAMES:
            yield Problem(
                "spec.engine.labels",
                "LabelRefused",
                "labels of Kubernetes, of meshes and of this operator select pods",
                "Use a prefix of your own.",
                key,
            )


def check_annotations(annotations: dict[str, str]) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.annotations``."""
    for key in annotations.keys() - ANNOTATIONS:
        yield Problem(
            "spec.engine.annotations",
            "AnnotationRefused",
            "annotations can add interfaces and sidecars that no policy sees",
            f"Allowed are: {', '.join(sorted(ANNOTATIONS))}.",
            key,
        )


def check_service_annotations(annotations: dict[str, str]) -> Iterator[Problem]:
    """What is wrong with ``spec.gateway.service.annotations``."""
    for key in annotations:
        if not key.startswith(SERVICE_ANNOTATION_PREFIXES):
            yield Problem(
                "spec.gateway.service.annotations",
                "AnnotationRefused",
                "an annotation can publish the Service elsewhere",
                f"Allowed are those that begin with: {', '.join(SERVICE_ANNOTATION_PREFIXES)}.",
                key,
            )


def check_resources(field: str, resources: api.Resources | None, *, gpus: bool) -> Iterator[Problem]:
    """What is wrong with a resources block: RDMA and SR-IOV devices are networks that no policy sees."""
    if resources is None:
        return
    for part, amounts in (("requests", resources.requests), ("limits", resources.limits)):
        for name in amounts:
            if name not in _PLAIN_RESOURCES and not (gpus and is_gpu(name)):
                yield Problem(
                    f"{field}.{part}",
                    "ResourceRefused",
                    "this extended resource may bring a network that no NetworkPolicy sees",
                    "Use cpu, memory, ephemeral-storage" + (" and GPUs such as nvidia.com/gpu." if gpus else "."),
                    name,
                )
