"""What the models of the resource are made of: their base, the forms of strings and numbers, lists, CEL rules.

Every form that ends in an object is at most as wide as Kubernetes' own validation (apimachinery,
pkg/util/validation): what is accepted here can be applied.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Annotated, Any, get_args

from pydantic import BaseModel, ConfigDict, Field, JsonValue
from pydantic.alias_generators import to_camel

from securevllm.api.units import QUANTITY_PATTERN

CRD_DEFAULT: dict[str, Any] = {"x-crd-default": True}
"""Marks a field whose default the API server sets."""


class Model(BaseModel):
    """Base of all models: immutable, no unknown fields, camelCase in YAML."""

    # Built when it is needed first: a start, and most commands, read no spec.
    model_config = ConfigDict(
        alias_generator=to_camel, populate_by_name=True, frozen=True, extra="forbid", defer_build=True
    )


def unknown_field(model: type[BaseModel], path: tuple[int | str, ...], page: str) -> tuple[str, str]:
    """What is said of a field that is not there, and of the one that was probably meant.

    Args:
        model: that has not got it, or one that holds that one.
        path: of the field, from there.
        page: what lists the fields.
    """
    inner: type[BaseModel] | None = model
    for part in path[:-1]:
        if isinstance(part, str) and inner is not None:
            inner = next(
                (_model_in(item.annotation) for item in inner.model_fields.values() if item.alias == part), None
            )
    known = [str(item.alias) for item in inner.model_fields.values()] if inner is not None else []
    name = str(path[-1])
    meant = to_camel(name) if to_camel(name) in known else next(iter(get_close_matches(name, known, 1)), "")
    fix = f"Did you mean {meant}?" if meant else "Leave it out:"
    return "there is no such field", f"{fix} {page} lists the fields."


def _model_in(annotation: Any) -> type[BaseModel] | None:
    """The model in an annotation such as ``list[Model] | None``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def rule(expression: str, message: str) -> dict[str, JsonValue]:
    """One entry of ``x-kubernetes-validations`` (CEL)."""
    return {"rule": expression, "message": message}


def rules(*entries: dict[str, JsonValue]) -> dict[str, Any]:
    """Schema extra of a model or a field: rules that the API server judges too."""
    return {"x-kubernetes-validations": list(entries)}


def exactly_one(*fields: str) -> dict[str, JsonValue]:
    """Rule of a model: one of its fields is set."""
    return rule(f"{_count(fields)} == 1", f"exactly one of {_names(fields)}")


def at_most_one(*fields: str) -> dict[str, JsonValue]:
    """Rule of a model: one of its fields is set, or none."""
    return rule(f"{_count(fields)} <= 1", f"at most one of {_names(fields)}")


def _count(fields: tuple[str, ...]) -> str:
    return " + ".join(f"(has(self.{name}) ? 1 : 0)" for name in fields)


def _names(fields: tuple[str, ...]) -> str:
    return f"{', '.join(fields[:-1])} and {fields[-1]}"


def listed(*keys: str, limit: int = 32, set_: bool = False) -> dict[str, Any]:
    """List type for server-side apply (Kubernetes API conventions, "merge strategy"); with keys, a map."""
    kind = "map" if keys else "set" if set_ else "atomic"
    extra: dict[str, Any] = {"x-kubernetes-list-type": kind, "maxItems": limit}
    if keys:
        extra["x-kubernetes-list-map-keys"] = list(keys)
    return extra


_LABEL = r"[a-z0-9]([-a-z0-9]*[a-z0-9])?"
_SUBDOMAIN = rf"{_LABEL}(\.{_LABEL})*"

# A value that becomes a command-line argument never begins with "-": vLLM's parser would read it as a flag.
ModelName = Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9/][A-Za-z0-9._/-]*$")]
Word = Annotated[str, Field(max_length=253, pattern=r"^[A-Za-z0-9][A-Za-z0-9._/-]*$")]
Image = Annotated[str, Field(max_length=512, pattern=r"^[a-z0-9][A-Za-z0-9._/:-]*(@sha256:[a-f0-9]{64})?$")]
DnsLabel = Annotated[str, Field(max_length=63, pattern=rf"^{_LABEL}$")]
DnsName = Annotated[str, Field(max_length=253, pattern=rf"^{_SUBDOMAIN}$")]
Port = Annotated[int, Field(ge=1024, le=65535)]
Quantity = Annotated[
    str | int,
    Field(
        json_schema_extra={
            "x-kubernetes-int-or-string": True,
            "maxLength": 32,
            "minimum": 0,
            "pattern": QUANTITY_PATTERN,
        }
    ),
]
Duration = Annotated[str, Field(max_length=16, pattern=r"^[0-9]{1,6}(s|m|h)$")]
Why = Annotated[str, Field(min_length=10, max_length=500)]
Cidr = Annotated[str, Field(max_length=49, pattern=r"^[0-9a-fA-F.:]+/[0-9]{1,3}$")]
HttpsUrl = Annotated[str, Field(max_length=253, pattern=r"^https://[A-Za-z0-9][A-Za-z0-9.:/-]*$")]
ProxyUrl = Annotated[str, Field(max_length=253, pattern=r"^https?://[a-z0-9]([a-z0-9.-]*[a-z0-9])?:[0-9]{1,5}$")]
# Kubernetes takes 253 characters before the slash. Here they are 253 in all, and no rule has to count to the slash.
LabelKey = Annotated[
    str,
    Field(max_length=253, pattern=rf"^({_SUBDOMAIN}/)?[A-Za-z0-9]([A-Za-z0-9._-]{{0,61}}[A-Za-z0-9])?$"),
]
LabelValue = Annotated[str, Field(max_length=63, pattern=r"^([A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?)?$")]
Labels = Annotated[dict[LabelKey, LabelValue], Field(max_length=32)]
Annotations = Annotated[dict[LabelKey, Annotated[str, Field(max_length=1024)]], Field(max_length=16)]
