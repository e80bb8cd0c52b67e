"""The part of the CRD's schema that the models do not check: sizes and uniqueness of lists and maps.

The API server checks these before an object is stored. A file that was never sent there (`check -f`, `render -f`), or
an object that an older CRD let through, is judged by this; so the parser is never looser than the schema.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from securevllm.api.crd import structural_schema
from securevllm.api.types import Spec
from securevllm.errors import Problem


def size_problems(raw: Mapping[str, Any]) -> Iterator[Problem]:
    """Give every list or map of a spec that is too long or names something twice.

    Args:
        raw: `spec` as JSON, one that the models accept: types are not checked here.
    """
    yield from _problems(raw, _spec_schema(), "spec")


@cache
def _spec_schema() -> Mapping[str, Any]:
    return structural_schema(Spec, "spec")


def _problems(value: object, schema: Mapping[str, Any], path: str) -> Iterator[Problem]:
    if isinstance(value, Mapping):
        yield from _limit(value, schema.get("maxProperties"), path)
        properties, others = schema.get("properties", {}), schema.get("additionalProperties", {})
        for key, child in value.items():
            yield from _problems(child, properties.get(key, others), f"{path}.{key}")
    elif isinstance(value, str):
        yield from _limit(value, schema.get("maxLength"), path)
    elif isinstance(value, Sequence):
        yield from _limit(value, schema.get("maxItems"), path)
        yield from _duplicates(value, schema, path)
        for index, child in enumerate(value):
            yield from _problems(child, schema.get("items", {}), f"{path}[{index}]")


def _limit(value: Mapping[str, Any] | Sequence[Any], limit: int | None, path: str) -> Iterator[Problem]:
    if limit is not None and len(value) > limit:
        yield Problem(path, "InvalidSpec", f"at most {limit}, not {len(value)}", "Leave some out.")


def _duplicates(value: Sequence[Any], schema: Mapping[str, Any], path: str) -> Iterator[Problem]:
    kind, keys = schema.get("x-kubernetes-list-type"), schema.get("x-kubernetes-list-map-keys", ())
    if kind not in {"map", "set"}:
        return
    seen = set()
    for index, item in enumerate(value):
        identity = json.dumps([item[key] for key in keys] if keys else item)
        if identity in seen:
            rule = f"the same {' and '.join(keys)} twice" if keys else "the same value twice"
            yield Problem(f"{path}[{index}]", "InvalidSpec", rule, "Keep one of them.", identity.strip('["]'))
        seen.add(identity)
