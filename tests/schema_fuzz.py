"""Values for every field of an OpenAPI schema, right ones and wrong ones: what a user might write by mistake.

For each node of the schema `mutations` gives (path, value) pairs around its bounds and of wrong types; `with_value`
puts one into a spec and makes the parents that are missing. All is deterministic: a failure can be looked at.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator, Mapping
from itertools import combinations
from typing import Any

Path = tuple[str, ...]
"""Names of properties; `[]` is the first item of a list, `*` a value of a map."""

_SAMPLES = (
    "a", "10.0.0.0/8", "1m", "--enforce-eager", "/a", "I accept this for the test", "https://a.example", "0.33.0",
    "because of the test", "A", "/mnt/a", "http://a.example:3128",
)  # fmt: skip


def nodes(schema: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    """Give every node below `schema`, parents first."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, (*path, name))
    if "items" in schema:
        yield from nodes(schema["items"], (*path, "[]"))
    if "additionalProperties" in schema:
        yield from nodes(schema["additionalProperties"], (*path, "*"))


def mutations(schema: Mapping[str, Any]) -> Iterator[tuple[Path, Any]]:
    """Give (path, value) pairs for every node below `schema`; of fields of an object with one type, for the first."""
    for path, node in _different_nodes(schema):
        for value in _values(node):
            yield path, value


def _different_nodes(schema: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Mapping[str, Any]]]:
    yield path, schema
    seen: list[object] = []
    for name, child in schema.get("properties", {}).items():
        described = {key: value for key, value in child.items() if key != "description"}
        if "properties" not in child or described not in seen:
            seen.append(described)
            yield from _different_nodes(child, (*path, name))
    if "items" in schema:
        yield from _different_nodes(schema["items"], (*path, "[]"))
    if "additionalProperties" in schema:
        yield from _different_nodes(schema["additionalProperties"], (*path, "*"))


def with_value(spec: Mapping[str, Any], schema: Mapping[str, Any], path: Path, value: Any) -> Any:
    """Give a copy of `spec` with `value` at `path`; missing parents get their required fields and nothing else."""
    if not path:
        return copy.deepcopy(value)
    changed = copy.deepcopy(dict(spec))
    node: Any = changed
    for part, following in zip(path, (*path[1:], None), strict=True):
        schema = _child(schema, part)
        if following is None:
            _set(node, part, copy.deepcopy(value))
        else:
            node = _descend(node, part, schema)
    return changed


def sample(node: Mapping[str, Any], *, number: int = 0) -> Any:
    """Give a valid value of a node; different numbers give different values where that is possible."""
    value: Any
    match node:
        case {"enum": [*choices]}:
            value = choices[number % len(choices)]
        case {"x-kubernetes-int-or-string": True}:
            value = number + 1
        case {"type": "string"}:
            value = _string(node, number)
        case {"type": "integer"}:
            value = min(node.get("minimum", 0) + number, node.get("maximum", number))
        case {"type": "boolean"}:
            value = number % 2 == 0
        case {"type": "array", "items": item}:
            value = [sample(item, number=number + index) for index in range(max(1, node.get("minItems", 0)))]
        case {"properties": properties}:
            value = {name: sample(properties[name], number=number) for name in node.get("required", ())}
        case _:
            value = {f"key-{number}": sample(node["additionalProperties"]) if "additionalProperties" in node else 1}
    return value


def _child(schema: Mapping[str, Any], part: str) -> Mapping[str, Any]:
    child: Mapping[str, Any]
    if part == "[]":
        child = schema["items"]
    elif part == "*":
        child = schema["additionalProperties"]
    else:
        child = schema["properties"][part]
    return child


def _set(node: Any, part: str, value: Any) -> None:
    if part == "[]":
        node[:1] = [value]
    else:
        node["key" if part == "*" else part] = value


def _descend(node: Any, part: str, schema: Mapping[str, Any]) -> Any:
    if part == "[]":
        if not node:
            node.append(sample(schema))
        return node[0]
    return node.setdefault("key" if part == "*" else part, sample(schema))


def _string(node: Mapping[str, Any], number: int) -> str:
    pattern = node.get("pattern", "")
    for candidate in (f"{text}{number}" if number else text for text in _SAMPLES):
        if re.search(pattern, candidate) and len(candidate) >= node.get("minLength", 0):
            return candidate
    for candidate in _SAMPLES:
        if re.search(pattern, candidate) and len(candidate) >= node.get("minLength", 0):
            return candidate
    raise AssertionError(f"no sample matches {pattern}; add one to _SAMPLES")


def _values(node: Mapping[str, Any]) -> Iterator[Any]:
    yield from (sample(node), sample(node, number=1), None, "", "-a", 1, 1.5, True, [], [None], {}, {"unknown": 1})
    if node.get("x-kubernetes-int-or-string"):
        yield from (
            "8Gi",
            "1.5",
            "100m",
            "1e3",
            "8 Gi",
            "1K",
            "1ki",
            "1mi",
            "1n",
            "1.5E",
            "99E",
            "0.5n",
            "0",
            "-1",
            -1,
            "x" * (node["maxLength"] + 1),
        )
        return
    match node["type"]:
        case "string":
            yield from _string_values(node)
        case "integer":
            low, high = node.get("minimum", 0), node.get("maximum", 2**31)
            yield from (low, low - 1, high, high + 1, 1.0, "1", 2**63)
        case "boolean":
            yield from (False, "true", 0)
        case "array":
            yield from _list_values(node)
        case "object" if "properties" in node:
            filled = {name: sample(child) for name, child in node["properties"].items()}
            yield from (filled, {**sample(node), "unknown": 1})
            for name in node["properties"]:
                yield {key: value for key, value in filled.items() if key != name}
                yield {**sample(node), name: None}
            for one, other in combinations(node["properties"], 2):
                yield {**sample(node), one: filled[one], other: filled[other]}
        case "object":
            yield from _map_values(node)


def _string_values(node: Mapping[str, Any]) -> Iterator[Any]:
    yield from node.get("enum", ())
    text = sample(node)
    yield from (f"{text}\n", f"\n{text}", f" {text}", f"{text} --host=0.0.0.0", f"{text}é", f"{text}$(A)", "A", "a.b")
    yield from ("a..b", "../a", "a//b", "0", "none", "https://a.example/b", "::/0", "fd00::/8", "10.0.0.1/8", "1/99")
    limit = node.get("maxLength")
    if limit:
        yield from (text.ljust(limit, text[-1]), text.ljust(limit + 1, text[-1]))


def _list_values(node: Mapping[str, Any]) -> Iterator[Any]:
    one = sample(node["items"])
    different = [sample(node["items"], number=number) for number in range(1, node["maxItems"] + 2)]
    yield from ([one], [one, one], different[:-1], different, [one, None], one)


def _map_values(node: Mapping[str, Any]) -> Iterator[Any]:
    value = sample(node["additionalProperties"]) if "additionalProperties" in node else 1
    limit = node["maxProperties"]
    yield {f"key-{number}": value for number in range(limit)}
    yield {f"key-{number}": value for number in range(limit + 1)}
    for key in ("", "a b", "-a", "a/b/c", "example.com/a", "kubernetes.io/a", "A/b", "k" * 318, "k" * 64, "cpu"):
        yield {key: value}
