"""Where pods may run: the types of core/v1 and meta/v1 that a spec contains, field by field.

They are typed and not passed through, so that a mistake is refused with the resource, and not later with a Deployment
that cannot be applied. Source: API reference of Kubernetes 1.36, core/v1 Affinity, Toleration and
TopologySpreadConstraint, meta/v1 LabelSelector; what types cannot say is in `applicable.py` and, as CEL, here.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, JsonValue

from securevllm.api.fields import DnsLabel, DnsName, LabelKey, Labels, LabelValue, Model, listed, rule, rules

_INT32 = 2**31 - 1

_VALUES_BY_OPERATOR = rule(
    "self.operator in ['Exists', 'DoesNotExist'] ? !has(self.values) || size(self.values) == 0"
    " : has(self.values) && size(self.values) > 0",
    "operators other than Exists and DoesNotExist need values, and these two take none",
)


def _distinct(field: str) -> dict[str, JsonValue]:
    """Rule: no key of a list of label keys is named by the labelSelector too."""
    return rule(
        f"!has(self.{field}) || size(self.{field}) == 0 || has(self.labelSelector)"
        f" && self.{field}.all(key,"
        " (!has(self.labelSelector.matchLabels) || !(key in self.labelSelector.matchLabels))"
        " && (!has(self.labelSelector.matchExpressions)"
        " || self.labelSelector.matchExpressions.all(item, item.key != key)))",
        f"{field} needs a labelSelector, and a key stands in one of them only",
    )


class LabelSelectorRequirement(Model):
    """One condition on a label."""

    model_config = ConfigDict(json_schema_extra=rules(_VALUES_BY_OPERATOR))

    key: LabelKey = Field(description="Key of the label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist"] = Field(
        description="Relation of the label to the values. NotIn holds for an absent label, too."
    )
    values: Annotated[tuple[LabelValue, ...], Field(json_schema_extra=listed(limit=16))] = Field(
        (), description="Values for In and NotIn; empty for Exists and DoesNotExist."
    )


class LabelSelector(Model):
    """meta/v1 LabelSelector: all conditions must hold. An empty one selects everything."""

    match_labels: Labels = Field(default_factory=dict, description="Labels that must have exactly these values.")
    match_expressions: Annotated[tuple[LabelSelectorRequirement, ...], Field(json_schema_extra=listed(limit=16))] = (
        Field((), description="Further conditions on labels.")
    )


class Toleration(Model):
    """A taint that the pods tolerate."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "has(self.key) || has(self.operator) && self.operator == 'Exists'",
                "a toleration without key tolerates every taint: it needs operator Exists",
            ),
            rule(
                "!has(self.operator) || self.operator != 'Exists' || !has(self.value) || self.value == ''",
                "operator Exists takes no value",
            ),
            rule(
                "!has(self.tolerationSeconds) || has(self.effect) && self.effect == 'NoExecute'",
                "tolerationSeconds needs effect NoExecute",
            ),
        )
    )

    key: LabelKey | None = Field(None, description="Key of the taint. Absent, with operator Exists: every taint.")
    operator: Literal["Exists", "Equal"] | None = Field(
        None, description="Exists: the taint may have any value. Absent: Equal."
    )
    value: LabelValue | None = Field(None, description="Value of the taint, for Equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint. Absent: all effects."
    )
    toleration_seconds: Annotated[int, Field(ge=0, le=86400)] | None = Field(
        None, description="How long NoExecute is tolerated. Absent: for ever."
    )


class NodeSelectorRequirement(Model):
    """One condition on a label of the node."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            _VALUES_BY_OPERATOR,
            rule(
                "!(self.operator in ['Gt', 'Lt'])"
                " || has(self.values) && size(self.values) == 1 && self.values[0].matches('^[0-9]{1,18}$')",
                "Gt and Lt compare with one number",
            ),
        )
    )

    key: LabelKey = Field(description="Key of the label.")
    operator: Literal["In", "NotIn", "Exists", "DoesNotExist", "Gt", "Lt"] = Field(
        description="Relation of the label to the values."
    )
    values: Annotated[tuple[LabelValue, ...], Field(json_schema_extra=listed(limit=16))] = Field(
        (), description="Values for In and NotIn, one number for Gt and Lt, empty for Exists and DoesNotExist."
    )


class NodeFieldRequirement(Model):
    """One condition on a field of the node; Kubernetes knows its name only."""

    key: Literal["metadata.name"] = Field(description="Field of the node: metadata.name.")
    operator: Literal["In", "NotIn"] = Field(description="Whether the field has the value or has not.")
    values: Annotated[tuple[DnsName, ...], Field(json_schema_extra=listed(limit=1), min_length=1, max_length=1)] = (
        Field(description="Name of one node.")
    )


class NodeSelectorTerm(Model):
    """Conditions on a node that must all hold. One without any condition selects no node."""

    match_expressions: Annotated[tuple[NodeSelectorRequirement, ...], Field(json_schema_extra=listed(limit=16))] = (
        Field((), description="Conditions on labels of the node.")
    )
    match_fields: Annotated[tuple[NodeFieldRequirement, ...], Field(json_schema_extra=listed(limit=16))] = Field(
        (), description="Conditions on fields of the node."
    )


class NodeSelector(Model):
    """Nodes by terms of which one must hold."""

    node_selector_terms: Annotated[
        tuple[NodeSelectorTerm, ...], Field(json_schema_extra=listed(limit=8), min_length=1)
    ] = Field(description="Terms of which one must hold.")


class PreferredSchedulingTerm(Model):
    """Nodes that are preferred, with a weight."""

    weight: Annotated[int, Field(ge=1, le=100)] = Field(description="Weight beside the other preferences.")
    preference: NodeSelectorTerm = Field(description="The nodes that get the weight.")


class NodeAffinity(Model):
    """Nodes by their labels."""

    required_during_scheduling_ignored_during_execution: NodeSelector | None = Field(
        None, description="Nodes on which the pods may run."
    )
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[PreferredSchedulingTerm, ...], Field(json_schema_extra=listed(limit=8))
    ] = Field((), description="Nodes on which the pods run where possible.")


class PodAffinityTerm(Model):
    """Pods, and the domain in which one counts as near."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            _distinct("matchLabelKeys"),
            _distinct("mismatchLabelKeys"),
            rule(
                "!has(self.matchLabelKeys) || !has(self.mismatchLabelKeys)"
                " || self.matchLabelKeys.all(key, !(key in self.mismatchLabelKeys))",
                "a key stands in one of matchLabelKeys and mismatchLabelKeys only",
            ),
        )
    )

    topology_key: LabelKey = Field(
        description="Label of nodes; those with the same value are one domain, for example kubernetes.io/hostname."
    )
    label_selector: LabelSelector | None = Field(None, description="The pods. Absent: none.")
    namespaces: Annotated[tuple[DnsLabel, ...], Field(json_schema_extra=listed(limit=8))] = Field(
        (), description="Namespaces of the pods by name. This and namespaceSelector absent: the own namespace."
    )
    namespace_selector: LabelSelector | None = Field(
        None, description="Namespaces of the pods by label, beside namespaces. An empty selector: all namespaces."
    )
    match_label_keys: Annotated[tuple[LabelKey, ...], Field(json_schema_extra=listed(limit=8))] = Field(
        (), description="Labels in which the pods equal the new pod, for example pod-template-hash."
    )
    mismatch_label_keys: Annotated[tuple[LabelKey, ...], Field(json_schema_extra=listed(limit=8))] = Field(
        (), description="Labels in which the pods differ from the new pod."
    )


class WeightedPodAffinityTerm(Model):
    """A preference about other pods, with a weight."""

    weight: Annotated[int, Field(ge=1, le=100)] = Field(description="Weight beside the other preferences.")
    pod_affinity_term: PodAffinityTerm = Field(description="The pods that give the weight.")


class PodAffinity(Model):
    """Other pods that are to be near."""

    required_during_scheduling_ignored_during_execution: Annotated[
        tuple[PodAffinityTerm, ...], Field(json_schema_extra=listed(limit=4))
    ] = Field((), description="Terms that must all hold for a node.")
    preferred_during_scheduling_ignored_during_execution: Annotated[
        tuple[WeightedPodAffinityTerm, ...], Field(json_schema_extra=listed(limit=4))
    ] = Field((), description="Terms that should hold for a node.")


class PodAntiAffinity(PodAffinity):
    """Other pods that are not to be near."""


class Affinity(Model):
    """core/v1 Affinity: on which nodes the pods may run, and beside which other pods."""

    node_affinity: NodeAffinity | None = Field(None, description="Nodes by their labels.")
    pod_affinity: PodAffinity | None = Field(None, description="Other pods that are to be near.")
    pod_anti_affinity: PodAntiAffinity | None = Field(None, description="Other pods that are not to be near.")


class TopologySpreadConstraint(Model):
    """How evenly pods are spread over domains."""

    model_config = ConfigDict(
        json_schema_extra=rules(
            rule(
                "!has(self.minDomains) || self.whenUnsatisfiable == 'DoNotSchedule'",
                "minDomains needs whenUnsatisfiable DoNotSchedule",
            ),
            _distinct("matchLabelKeys"),
        )
    )

    max_skew: Annotated[int, Field(ge=1, le=_INT32)] = Field(
        description="How many pods a domain may have more than the emptiest one."
    )
    topology_key: LabelKey = Field(
        description="Label of nodes; those with the same value are one domain, for example topology.kubernetes.io/zone."
    )
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = Field(
        description="What becomes of a pod for which no node fits."
    )
    label_selector: LabelSelector | None = Field(None, description="The pods that are counted. Absent: none.")
    min_domains: Annotated[int, Field(ge=1, le=_INT32)] | None = Field(
        None, description="With fewer domains than this, the emptiest one counts as having no pods."
    )
    node_affinity_policy: Literal["Honor", "Ignore"] | None = Field(
        None, description="Whether only nodes that nodeSelector and affinity allow are counted. Absent: Honor."
    )
    node_taints_policy: Literal["Honor", "Ignore"] | None = Field(
        None, description="Whether only nodes with tolerated taints are counted. Absent: Ignore."
    )
    match_label_keys: Annotated[tuple[LabelKey, ...], Field(json_schema_extra=listed(limit=8))] = Field(
        (), description="Labels in which the counted pods equal the new pod, for example pod-template-hash."
    )
