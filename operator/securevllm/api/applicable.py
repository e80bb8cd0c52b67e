"""What Kubernetes would refuse in the objects that are rendered from a spec, found before anything is rendered.

A spec that is accepted and cannot be applied would leave the resource half changed. The rules are those of the API
server's validation (kubernetes/kubernetes 1.36, pkg/apis/core/validation and apimachinery); most stand as CEL beside
the models, too. They are looked up by the type of the model, so a type has its rules wherever a spec contains it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from securevllm.api import placement
from securevllm.api import types as api
from securevllm.api.fields import Model
from securevllm.api.guard.pod import is_gpu
from securevllm.api.units import quantity, seconds
from securevllm.errors import Problem


def unapplicable(spec: api.Spec) -> Iterator[Problem]:
    """Give everything in a spec that an API server would refuse in an object made from it."""
    for path, model in _models(spec, "spec"):
        for check in _CHECKS.get(type(model), ()):
            yield from check(path, model)


def _models(value: object, path: str) -> Iterator[tuple[str, Model]]:
    """Every model of a spec with its path, parents first."""
    if isinstance(value, Model):
        yield path, value
        for name, field in type(value).model_fields.items():
            yield from _models(getattr(value, name), f"{path}.{field.alias}")
    elif isinstance(value, tuple):
        for index, item in enumerate(value):
            yield from _models(item, f"{path}[{index}]")


def _invalid(field: str, rule: str, fix: str, value: object = "") -> Problem:
    return Problem(field, "InvalidSpec", rule, fix, str(value))


def _requirement(
    path: str, item: placement.LabelSelectorRequirement | placement.NodeSelectorRequirement
) -> Iterator[Problem]:
    if (item.operator in {"Exists", "DoesNotExist"}) == bool(item.values):
        yield _invalid(
            f"{path}.values",
            "operators other than Exists and DoesNotExist need values, and these two take none",
            "Write for example {key: team, operator: In, values: [a]}.",
            item.operator,
        )
    if item.operator in {"Gt", "Lt"} and not (len(item.values) == 1 and _is_number(item.values[0])):
        yield _invalid(
            f"{path}.values",
            "Gt and Lt compare with one number",
            'Write for example {key: cores, operator: Gt, values: ["8"]}.',
            ", ".join(item.values),
        )


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit() and len(text) <= 18  # noqa: PLR2004 - fits into 64 bits


def _toleration(path: str, item: placement.Toleration) -> Iterator[Problem]:
    if item.key is None and item.operator != "Exists":
        yield _invalid(
            path,
            "a toleration without key tolerates every taint: it needs operator Exists",
            "Name a key, or write operator: Exists.",
        )
    if item.operator == "Exists" and item.value:
        yield _invalid(
            f"{path}.value", "operator Exists takes no value", "Leave it out, or use operator: Equal.", item.value
        )
    if item.toleration_seconds is not None and item.effect != "NoExecute":
        yield _invalid(
            f"{path}.tolerationSeconds",
            "tolerationSeconds needs effect NoExecute",
            "Leave it out, or write effect: NoExecute.",
            item.toleration_seconds,
        )


def _pod_affinity_term(path: str, term: placement.PodAffinityTerm) -> Iterator[Problem]:
    for field, keys in (("matchLabelKeys", term.match_label_keys), ("mismatchLabelKeys", term.mismatch_label_keys)):
        yield from _label_keys(f"{path}.{field}", keys, term.label_selector)
    for key in set(term.match_label_keys) & set(term.mismatch_label_keys):
        yield _invalid(
            f"{path}.mismatchLabelKeys",
            "a key stands in one of matchLabelKeys and mismatchLabelKeys only",
            "Remove it from one of them.",
            key,
        )


def _spread(path: str, item: placement.TopologySpreadConstraint) -> Iterator[Problem]:
    if item.min_domains is not None and item.when_unsatisfiable != "DoNotSchedule":
        yield _invalid(
            f"{path}.minDomains",
            "minDomains needs whenUnsatisfiable DoNotSchedule",
            "Leave it out, or write whenUnsatisfiable: DoNotSchedule.",
            item.min_domains,
        )
    yield from _label_keys(f"{path}.matchLabelKeys", item.match_label_keys, item.label_selector)


def _label_keys(path: str, keys: tuple[str, ...], selector: placement.LabelSelector | None) -> Iterator[Problem]:
    selected = {*selector.match_labels, *(item.key for item in selector.match_expressions)} if selector else set()
    for key in keys:
        if selector is None or key in selected:
            yield _invalid(
                path,
                f"{path.rpartition('.')[2]} needs a labelSelector, and a key stands in one of them only",
                "Add a labelSelector that does not name the key, or leave the key out.",
                key,
            )


def _resources(path: str, item: api.Resources) -> Iterator[Problem]:
    for name in sorted(item.requests.keys() & item.limits.keys()):
        if is_gpu(name):
            continue  # parse.py wants an exact number of them
        request, limit = item.requests[name], item.limits[name]
        if _less(limit, request):
            yield _invalid(
                f"{path}.requests.{name}",
                "a request is at most the limit",
                f"Write {limit} or less, or raise the limit.",
                request,
            )


def _storage(path: str, item: api.ModelStorage) -> Iterator[Problem]:
    yield from _positive(f"{path}.size", item.size)
    if "ReadWriteOncePod" in item.access_modes and len(item.access_modes) > 1:
        yield _invalid(
            f"{path}.accessModes",
            "ReadWriteOncePod stands beside no other mode",
            "Write accessModes: [ReadWriteMany], or one other mode.",
            ", ".join(item.access_modes),
        )


def _engine(path: str, item: api.EngineSpec) -> Iterator[Problem]:
    yield from _positive(f"{path}.sharedMemory", item.shared_memory)
    yield from _lasts(f"{path}.startupTimeout", item.startup_timeout, api.STARTUP_TIMEOUT)
    yield from _lasts(f"{path}.terminationGracePeriod", item.termination_grace_period, api.GRACE_PERIOD)


def _env_var(path: str, item: api.EnvVar) -> Iterator[Problem]:
    if (item.value is None) == (item.value_from is None):
        yield _invalid(path, "exactly one of value and valueFrom", "Keep one of them.", item.name)
    source = item.value_from
    if source is not None and (source.secret_key_ref is None) == (source.config_map_key_ref is None):
        yield _invalid(
            f"{path}.valueFrom", "exactly one of secretKeyRef and configMapKeyRef", "Keep one of them.", item.name
        )


def _volume(path: str, item: api.EngineVolume) -> Iterator[Problem]:
    kinds = (item.config_map, item.secret, item.persistent_volume_claim, item.empty_dir)
    if sum(kind is not None for kind in kinds) != 1:
        rule = "exactly one of configMap, secret, persistentVolumeClaim and emptyDir"
        yield _invalid(path, rule, "Keep one of them.", item.name)
    if item.empty_dir is not None:
        yield from _positive(f"{path}.emptyDir.sizeLimit", item.empty_dir.size_limit)


def _verification(path: str, item: api.Verification) -> Iterator[Problem]:
    yield from _lasts(f"{path}.interval", item.interval, api.VERIFICATION_INTERVAL)


def _lasts(path: str, value: str, bounds: api.Bounds) -> Iterator[Problem]:
    if not seconds(bounds.least) <= seconds(value) <= seconds(bounds.most):
        yield _invalid(path, str(bounds), f"Write for example {bounds.most}.", value)


def _positive(path: str, value: str | int) -> Iterator[Problem]:
    if not _less("0", value, otherwise=True):
        yield _invalid(path, "more than 0", "Write for example 8Gi.", value)


def _less(one: str | int, other: str | int, *, otherwise: bool = False) -> bool:
    """Compare two quantities; what is none is told elsewhere, and compares as `otherwise`."""
    try:
        return quantity(one) < quantity(other)
    except ValueError:
        return otherwise


_CHECKS: Mapping[type[Model], tuple[Callable[[str, Any], Iterator[Problem]], ...]] = {
    placement.LabelSelectorRequirement: (_requirement,),
    placement.NodeSelectorRequirement: (_requirement,),
    placement.PodAffinityTerm: (_pod_affinity_term,),
    placement.Toleration: (_toleration,),
    placement.TopologySpreadConstraint: (_spread,),
    api.EngineSpec: (_engine,),
    api.EngineVolume: (_volume,),
    api.EnvVar: (_env_var,),
    api.ModelStorage: (_storage,),
    api.Resources: (_resources,),
    api.Verification: (_verification,),
}
