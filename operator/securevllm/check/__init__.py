"""`securevllm check`: what manifests or a namespace that run vLLM expose, to whom, and what a resource would look like.

`examine` takes objects and gives a `Report`; `text`, `as_json` and `suggestions` print it. Pure: what is told follows
from the objects and the catalogue alone. NetworkPolicies are evaluated by `netpol`; policies of other kinds are named
and not evaluated. Nothing that is wrong with one object hides another.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from securevllm.api import kinds
from securevllm.api import types as api
from securevllm.api.bounds import PlatformBounds
from securevllm.api.parse import parse
from securevllm.check import findings, resource
from securevllm.check.documents import MAX_BYTES, Document, Source, Wrong, objects, read
from securevllm.check.exposure import World
from securevllm.check.findings import Finding, Severity
from securevllm.check.report import Checked, Report, as_json, line, text
from securevllm.check.suggest import Suggestion, suggest
from securevllm.check.workloads import KINDS, Workload, workload
from securevllm.context import FIELD_MANAGER, Context
from securevllm.errors import SpecError
from securevllm.netpol import KIND as NETWORK_POLICY
from securevllm.netpol import NAMESPACE_NAME_LABEL, Policies, Policy, PolicyError
from securevllm.netpol import parse as parse_policy
from securevllm.render.meta import MANAGED_BY, RESOURCE_LABEL, Owner

if TYPE_CHECKING:
    from securevllm.check.resource import Resource

NOT_EVALUATED: Mapping[str, tuple[str, ...]] = {
    "cilium.io": ("CiliumNetworkPolicy", "CiliumClusterwideNetworkPolicy"),
    "projectcalico.org": ("NetworkPolicy", "GlobalNetworkPolicy"),
    "crd.projectcalico.org": ("NetworkPolicy", "GlobalNetworkPolicy"),
    "policy.networking.k8s.io": ("AdminNetworkPolicy", "BaselineAdminNetworkPolicy", "ClusterNetworkPolicy"),
    "security.istio.io": ("AuthorizationPolicy",),
}
"""Policies of other kinds, by API group: present, and not evaluated."""

ADMISSION_POLICIES = frozenset({"pods", "pod-templates", "controller-revisions"})
"""ValidatingAdmissionPolicies that reserve the labels by which our policies select (manifests/admission): the ends of
their names; a release of the chart puts its own in front."""

_NO_UID = "00000000-0000-0000-0000-000000000000"

__all__ = [
    "ADMISSION_POLICIES",
    "MAX_BYTES",
    "Document",
    "Report",
    "Severity",
    "Source",
    "Suggestion",
    "Wrong",
    "as_json",
    "examine",
    "line",
    "objects",
    "read",
    "suggestions",
    "text",
]


def examine(
    given: Iterable[Document | Wrong],
    namespace: str = "default",
    context: Context | None = None,
    bounds: PlatformBounds | None = None,
    *,
    live: bool = False,
) -> Report:
    """Check objects.

    Args:
        given: objects and what could not be read.
        namespace: of objects that name none.
        context: the cluster, for SecureVLLMDeployments.
        bounds: what the platform lets them ask for.
        live: the objects are all that a cluster has, so that what is missing is missing.
    """
    documents: list[Document] = []
    wrong: list[Wrong] = []
    for item in given:
        (documents if isinstance(item, Document) else wrong).append(item)  # type: ignore[arg-type]  # sorted by type
    policies, refused = _policies(documents, namespace)
    wrong += refused
    config = _config_maps(documents, namespace)
    owners = _owners(documents)
    found = [
        workload(item.source, item.object, home, config[home])
        for item in documents
        if item.object["kind"] in KINDS and not _is_child(item.object, owners)
        for home in [_namespace(item.object, namespace)]
    ]
    workloads = [item for item in found if item is not None]
    world = World(
        policies=Policies(policies, _namespaces(documents)),
        services=tuple(_of(documents, namespace, "Service", "InferencePool")),
        ways=tuple(_of(documents, namespace, "Ingress", "HTTPRoute", "GRPCRoute")),
        pods=tuple(part.pod for item in workloads for part in item.parts),
    )
    checked = []
    for one in workloads:
        seen = findings.look(one, world)
        checked.append(Checked(seen, findings.judge(seen, world)))
    resources, unacceptable = _resources(
        documents, namespace, context or Context(), bounds or PlatformBounds(), policies
    )
    return Report(
        len(documents),
        tuple(checked),
        tuple(resources),
        tuple(_whole(documents, live=live, used=bool(resources))),
        (*wrong, *unacceptable),
    )


def suggestions(report: Report) -> Iterator[tuple[Workload, Suggestion | None]]:
    """A SecureVLLMDeployment for each workload; None: none can be made."""
    for item in report.workloads:
        yield item.seen.workload, suggest(item.seen)


def _owners(documents: Iterable[Document]) -> frozenset[tuple[str, str]]:
    """Kind and name of what may own others."""
    return frozenset(
        (item.object["kind"], str((item.object.get("metadata") or {}).get("name")))
        for item in documents
        if item.object["kind"] in KINDS or item.object["kind"] == api.KIND
    )


def _is_child(obj: Mapping[str, Any], owners: frozenset[tuple[str, str]]) -> bool:
    """Whether another object of the input makes this one, or the operator does."""
    metadata = obj.get("metadata") or {}
    labels = metadata.get("labels") or {}
    if isinstance(labels, Mapping) and (labels.get(MANAGED_BY) == FIELD_MANAGER or RESOURCE_LABEL in labels):
        return True
    references = metadata.get("ownerReferences") or []
    return isinstance(references, list) and any(
        isinstance(item, Mapping) and (str(item.get("kind")), str(item.get("name"))) in owners for item in references
    )


def _namespace(obj: Mapping[str, Any], default: str) -> str:
    return str((obj.get("metadata") or {}).get("namespace") or default)


def _of(documents: Iterable[Document], namespace: str, *kinds: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for item in documents:
        if item.object["kind"] in kinds:
            yield _namespace(item.object, namespace), item.object


def _policies(documents: Iterable[Document], namespace: str) -> tuple[list[Policy], list[Wrong]]:
    found, refused = [], []
    for item in documents:
        if (item.object["apiVersion"].partition("/")[0], item.object["kind"]) != ("networking.k8s.io", NETWORK_POLICY):
            continue
        try:
            found.append(parse_policy(item.object, namespace))
        except PolicyError as error:
            name = str((item.object.get("metadata") or {}).get("name") or "(no name)")
            refused.append(Wrong(item.source, f"NetworkPolicy {name} cannot be evaluated: {error}"))
    return found, refused


def _namespaces(documents: Iterable[Document]) -> dict[str, dict[str, str]]:
    found = {}
    for item in documents:
        metadata = item.object.get("metadata") or {}
        labels = metadata.get("labels") or {}
        if item.object["kind"] == "Namespace" and isinstance(labels, Mapping):
            found[str(metadata.get("name"))] = {str(key): str(value) for key, value in labels.items()}
    return found


def _config_maps(documents: Iterable[Document], namespace: str) -> defaultdict[str, dict[str, dict[str, str]]]:
    found: defaultdict[str, dict[str, dict[str, str]]] = defaultdict(dict)
    for home, obj in _of(documents, namespace, "ConfigMap"):
        data = obj.get("data") or {}
        if isinstance(data, Mapping):
            name = str((obj.get("metadata") or {}).get("name"))
            found[home][name] = {str(key): str(value) for key, value in data.items()}
    return found


def _resources(
    documents: Iterable[Document], namespace: str, context: Context, bounds: PlatformBounds, policies: Iterable[Policy]
) -> tuple[list[Resource], list[Wrong]]:
    own = {
        f"{_namespace(item.object, namespace)}/{(item.object.get('metadata') or {}).get('name')}"
        for item in documents
        if item.object["kind"] == NETWORK_POLICY and _is_child(item.object, frozenset())
    }
    foreign: defaultdict[str, list[Policy]] = defaultdict(list)
    for policy in policies:
        if policy.key not in own:
            foreign[policy.namespace].append(policy)
    others = {home: tuple(found) for home, found in foreign.items()}
    accepted, wrong = [], []
    for item in documents:
        if not kinds.is_meant_as_resource(item.object):
            continue
        if unlike := kinds.unlike_resource(item.object):
            wrong.append(Wrong(item.source, unlike))
            continue
        metadata = item.object.get("metadata") or {}
        owner = Owner(
            str(metadata.get("name") or ""), _namespace(item.object, namespace), str(metadata.get("uid") or _NO_UID)
        )
        try:
            spec = parse(owner.name, resource.spec_of(item.object), bounds)
        except SpecError as error:
            wrong += [
                Wrong(item.source, f"{owner.name or '(no name)'}: {problem.reason}: {problem}")
                for problem in error.problems
            ]
            continue
        accepted.append(resource.examine(item.source, owner, spec, context, others))
    return accepted, wrong


def _whole(documents: list[Document], *, live: bool, used: bool) -> Iterator[Finding]:
    for item in documents:
        group = item.object["apiVersion"].rpartition("/")[0]
        if item.object["kind"] in NOT_EVALUATED.get(group, ()):
            name = (item.object.get("metadata") or {}).get("name")
            yield Finding(
                Severity.INFO,
                "PolicyNotEvaluated",
                f"{item.object['kind']} {name} of {group} is present and not evaluated: it may close or open more",
                "measure it: `securevllm probe` connects for real",
            )
    if not live:
        return
    namespaces = {(item.object.get("metadata") or {}).get("namespace") for item in documents} - {None}
    bound = {
        _reserved(item.object, namespaces)
        for item in documents
        if item.object["kind"] == "ValidatingAdmissionPolicyBinding"
    }
    missing = ADMISSION_POLICIES - bound
    if missing:
        yield Finding(
            Severity.HIGH if used else Severity.INFO,
            "AdmissionMissing",
            f"no ValidatingAdmissionPolicyBinding denies here for {', '.join(sorted(missing))}: who may create pods may"
            " give them the labels that the operator's policies select by",
            "kubectl apply -k manifests/admission, or the chart's admission values",
        )


def _reserved(binding: Mapping[str, Any], namespaces: set[str | None]) -> str:
    """Which of our admission policies a binding has in force in all these namespaces; empty: none, or not surely."""
    metadata, spec = binding.get("metadata") or {}, binding.get("spec") or {}
    ours = (metadata.get("labels") or {}).get("app.kubernetes.io/part-of") == "secure-vllm-operator"
    if not ours or "Deny" not in (spec.get("validationActions") or ()):
        return ""
    # Only what surely matches: everything, or the one namespace by its name.
    scope = {name: value for name, value in (spec.get("matchResources") or {}).items() if value}
    selectors = [{"namespaceSelector": {"matchLabels": {NAMESPACE_NAME_LABEL: name}}} for name in namespaces]
    scope.pop("matchPolicy", None)
    if scope and selectors != [scope]:
        return ""
    policy = str(spec.get("policyName", ""))
    return next((end for end in ADMISSION_POLICIES if policy.endswith(f"-{end}")), "")
