"""The CustomResourceDefinition, generated from the models of `types.py`.

The result is a *structural* schema (Kubernetes documentation, "Custom Resources: Specifying a structural schema"): no
`$ref`, no `null` branch, a type everywhere. Every string, list and map has a bound: without one, the API server's cost
estimate for CEL rules is the size of a whole request, and one resource could fill etcd. Whatever the generator cannot
express raises `InternalError` with the path of the field; nothing is dropped silently but what is named here:

* `title`, and `default` of the spec unless the field says `CRD_DEFAULT` (safe defaults are resolved when parsing);
  every default is told at the end of the description, because `kubectl explain` shows nothing else of it;
* `additionalProperties: false` (the API server prunes, or refuses under strict field validation, by itself);
* `propertyNames` and `patternProperties`, the form of a map's keys: OpenAPI v3 has neither, they become a CEL rule.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from securevllm.api.fields import rule
from securevllm.api.types import API_VERSION, GROUP, KIND, NAME_LIMIT, Spec, Status
from securevllm.errors import InternalError

if TYPE_CHECKING:
    from pydantic import BaseModel, JsonValue

PLURAL = "securevllmdeployments"
SINGULAR = "securevllmdeployment"

_Schema = dict[str, Any]

_EXTENSIONS = frozenset(
    {
        "x-kubernetes-int-or-string",
        "x-kubernetes-list-map-keys",
        "x-kubernetes-list-type",
        "x-kubernetes-map-type",
        "x-kubernetes-validations",
    }
)
_COMMON = frozenset({"description", "default", "enum", "type"}) | _EXTENSIONS
_KEYWORDS = {
    "array": frozenset({"items", "maxItems", "minItems"}),
    "boolean": frozenset[str](),
    "integer": frozenset({"maximum", "minimum"}),
    "number": frozenset({"maximum", "minimum"}),
    "object": frozenset({"additionalProperties", "maxProperties", "minProperties", "properties", "required"}),
    "string": frozenset({"format", "maxLength", "minLength", "pattern"}),
}
_LIST_TYPES = frozenset({"atomic", "map", "set"})


def crd() -> _Schema:
    """Give the CustomResourceDefinition of this release; `crds/` holds it as text (`make crd`)."""
    return crd_from_models(Spec, Status)


def crd_from_models(spec: type[BaseModel], status: type[BaseModel]) -> _Schema:
    """Make the CustomResourceDefinition (apiextensions.k8s.io/v1) of two models.

    Raises:
        InternalError: a field that a structural schema cannot express, or a string, list or map without a bound.
    """
    version = {
        "name": API_VERSION.removeprefix(f"{GROUP}/"),
        "served": True,
        "storage": True,
        "additionalPrinterColumns": _printer_columns(),
        "subresources": {
            "status": {},
            "scale": {
                "specReplicasPath": ".spec.replicas",
                "statusReplicasPath": ".status.replicas",
                "labelSelectorPath": ".status.selector",
            },
        },
        "schema": {"openAPIV3Schema": _root(spec, status)},
    }
    return {
        "apiVersion": "apiextensions.k8s.io/v1",
        "kind": "CustomResourceDefinition",
        "metadata": {"name": f"{PLURAL}.{GROUP}"},
        "spec": {
            "group": GROUP,
            "scope": "Namespaced",
            "names": {
                "kind": KIND,
                "listKind": f"{KIND}List",
                "plural": PLURAL,
                "singular": SINGULAR,
                "shortNames": ["svllm"],
                # Not in "all": `kubectl delete all --all` must not end a model that took an hour to load.
                "categories": ["vllm"],
            },
            "versions": [version],
        },
    }


def structural_schema(model: type[BaseModel], path: str) -> _Schema:
    """Turn a model into a structural schema; `path` names it in errors, for example `spec`.

    Raises:
        InternalError: as for `crd_from_models`.
    """
    schema = model.model_json_schema(by_alias=True, mode="validation")
    return _structural(schema, schema.get("$defs", {}), path, ())


def _root(spec: type[BaseModel], status: type[BaseModel]) -> _Schema:
    return {
        "description": "A vLLM service: engines that only an authenticated gateway with exact routes can reach.",
        "type": "object",
        "required": ["spec"],
        "properties": {
            "apiVersion": {"description": "Version of the schema of this object.", "type": "string"},
            "kind": {"description": f"Always {KIND}.", "type": "string"},
            "metadata": {"type": "object"},
            "spec": structural_schema(spec, "spec"),
            # kstatus takes an object without status for complete. With a generation that never was, it waits.
            "status": {**structural_schema(status, "status"), "default": {"observedGeneration": -1}},
        },
        "x-kubernetes-validations": [
            rule(
                f"size(self.metadata.name) <= {NAME_LIMIT}",
                f"metadata.name is at most {NAME_LIMIT} characters: names of StatefulSets are made from it",
            ),
            rule(
                "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
                "metadata.name begins with a letter and has no dots: names of Services are made from it",
            ),
        ],
    }


def _printer_columns() -> list[_Schema]:
    def condition(kind: str) -> str:
        return f'.status.conditions[?(@.type=="{kind}")].status'

    return [
        {"name": "Ready", "type": "string", "jsonPath": condition("Ready")},
        {"name": "Isolated", "type": "string", "jsonPath": condition("Isolated")},
        {"name": "Replicas", "type": "integer", "jsonPath": ".status.replicas"},
        {"name": "Model", "type": "string", "jsonPath": ".spec.model.name"},
        {"name": "URL", "type": "string", "jsonPath": ".status.url"},
        {"name": "Age", "type": "date", "jsonPath": ".metadata.creationTimestamp"},
    ]


def _structural(schema: Mapping[str, Any], defs: Mapping[str, Any], path: str, seen: tuple[str, ...]) -> _Schema:
    """Turn one node of pydantic's JSON schema into a structural one; `seen` are the models around it."""
    node, seen = _resolve(schema, defs, path, seen)
    out: _Schema = {}
    if "description" in node:
        out["description"] = _one_line(node["description"])
    if node.get("x-kubernetes-int-or-string"):
        out.update(_int_or_string(node, path))
    elif node.get("type") == "object":
        out.update(_object(node, defs, path, seen))
    elif node.get("type") == "array":
        out.update(_array(node, defs, path, seen))
    elif node.get("type") in _KEYWORDS:
        out.update(_scalar(node, path))
    else:
        raise InternalError(f"{path}: a structural schema needs one type, not {node.get('anyOf') or node.get('type')}")
    if "default" in node:
        out["default"] = node["default"]
    if "x-kubernetes-validations" in node:
        out.setdefault("x-kubernetes-validations", []).extend(node["x-kubernetes-validations"])
    _check_rules(out, path)
    return out


def _resolve(
    schema: Mapping[str, Any], defs: Mapping[str, Any], path: str, seen: tuple[str, ...]
) -> tuple[_Schema, tuple[str, ...]]:
    """Inline `$ref`, take `null` out of `anyOf`, drop what the module docstring names. The outer keyword wins."""
    node = {key: value for key, value in schema.items() if key not in {"$defs", "title"}}
    told = _default_in_words(node.get("default"))
    if told and "description" in node:
        node["description"] += f" {told}"
    if not node.pop("x-crd-default", False):
        node.pop("default", None)
    if "const" in node:
        node["enum"] = [node.pop("const")]
    if "$ref" in node:
        name = node.pop("$ref").rpartition("/")[2]
        if name in seen:
            raise InternalError(f"{path}: {name} contains itself, which a structural schema cannot express")
        inner, seen = _resolve(defs[name], defs, path, (*seen, name))
        return _merge(node, inner), seen
    branches = [branch for branch in node.get("anyOf", ()) if branch.get("type") != "null"]
    if len(branches) == 1:
        del node["anyOf"]
        inner, seen = _resolve(branches[0], defs, path, seen)
        return _merge(node, inner), seen
    return node, seen


def _default_in_words(value: object) -> str:
    """A default as a sentence; nothing for null and for what is empty, which descriptions explain."""
    if value in (None, "", [], {}):
        return ""
    told = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return f"Default: {told.lower() if isinstance(value, bool) else told}."


def _merge(outer: _Schema, inner: _Schema) -> _Schema:
    rules = [*inner.get("x-kubernetes-validations", ()), *outer.get("x-kubernetes-validations", ())]
    return {**inner, **outer, **({"x-kubernetes-validations": rules} if rules else {})}


def _int_or_string(node: _Schema, path: str) -> _Schema:
    kinds = sorted(branch.get("type", "") for branch in node.pop("anyOf", ()))
    if kinds != ["integer", "string"]:
        raise InternalError(f"{path}: x-kubernetes-int-or-string stands on a field that is not `int | str`")
    keywords = _KEYWORDS["integer"] | _KEYWORDS["string"]
    _only(node, keywords, path)
    _bounded(node, "maxLength", path)
    return {
        "anyOf": [{"type": "integer"}, {"type": "string"}],
        "x-kubernetes-int-or-string": True,
        **_copy(node, *sorted(keywords)),
    }


def _scalar(node: _Schema, path: str) -> _Schema:
    kind = node["type"]
    _only(node, _KEYWORDS[kind], path)
    if kind == "string" and "enum" not in node:
        _bounded(node, "maxLength", path)
    return {"type": kind, **_copy(node, "enum", *sorted(_KEYWORDS[kind]))}


def _array(node: _Schema, defs: Mapping[str, Any], path: str, seen: tuple[str, ...]) -> _Schema:
    _only(node, _KEYWORDS["array"], path)
    _bounded(node, "maxItems", path)
    list_type = node.setdefault("x-kubernetes-list-type", "atomic")  # the API server's own default
    if list_type not in _LIST_TYPES:
        raise InternalError(f"{path}: the list type {list_type} is not one of {', '.join(sorted(_LIST_TYPES))}")
    items = _structural(node["items"], defs, f"{path}[]", seen)
    keys = node.get("x-kubernetes-list-map-keys", ())
    if (list_type == "map") is not bool(keys):
        raise InternalError(f"{path}: a list of type map, and no other, needs x-kubernetes-list-map-keys")
    optional = set(keys) - set(items.get("required", ()))
    if optional:
        raise InternalError(f"{path}: {', '.join(sorted(optional))} is a key of the list and must be required")
    lists = _copy(node, "minItems", "maxItems", "x-kubernetes-list-type", "x-kubernetes-list-map-keys")
    return {"type": "array", **lists, "items": items}


def _object(node: _Schema, defs: Mapping[str, Any], path: str, seen: tuple[str, ...]) -> _Schema:
    names = _take_key_schema(node, path)
    _only(node, _KEYWORDS["object"], path)
    out: _Schema = {"type": "object", **_copy(node, "x-kubernetes-map-type")}
    if "properties" in node:
        properties = node["properties"].items()
        out.update(_copy(node, "required"))
        out["properties"] = {key: _structural(value, defs, f"{path}.{key}", seen) for key, value in properties}
        return out
    _bounded(node, "maxProperties", path)
    out.update(_copy(node, "minProperties", "maxProperties"))
    values = node.get("additionalProperties")
    if not isinstance(values, dict):
        raise InternalError(f"{path}: a map of anything cannot be judged; give its values a type")
    out["additionalProperties"] = _structural(values, defs, f"{path}.*", seen)
    if names:
        out["x-kubernetes-validations"] = [_key_rule(names, path)]
    return out


def _take_key_schema(node: _Schema, path: str) -> _Schema:
    """Take out of the node what it says about the keys of the map, as a schema of a string."""
    names: _Schema = {key: value for key, value in node.pop("propertyNames", {}).items() if key != "type"}
    patterns = node.pop("patternProperties", {})
    if len(patterns) > 1:
        raise InternalError(f"{path}: keys of more than one pattern cannot be told apart")
    for pattern, values in patterns.items():
        names["pattern"], node["additionalProperties"] = pattern, values
    return names


def _key_rule(names: _Schema, path: str) -> dict[str, JsonValue]:
    keys = _scalar({"type": "string", **names}, f"{path} (keys)")
    limit, pattern = keys["maxLength"], keys.get("pattern")
    if pattern is None:
        return rule(f"self.all(key, size(key) <= {limit})", f"a key has at most {limit} characters")
    return rule(
        f"self.all(key, size(key) <= {limit} && key.matches(r'{pattern}'))",
        f"a key has at most {limit} characters and matches {pattern}",
    )


def _only(node: Mapping[str, Any], known: frozenset[str], path: str) -> None:
    unknown = set(node) - known - _COMMON
    if unknown:
        raise InternalError(f"{path}: a structural schema has no {', '.join(sorted(unknown))} here")
    pattern = node.get("pattern", "")
    # Go's RE2 has no look-around and no back-references; pydantic's engine has named groups that RE2 spells otherwise.
    if re.search(r"\(\?[^:]|\\[1-9]", pattern):
        raise InternalError(f"{path}: the pattern {pattern} is not in the syntax that the API server reads (RE2)")


def _bounded(node: Mapping[str, Any], keyword: str, path: str) -> None:
    if keyword not in node:
        raise InternalError(f"{path}: has no {keyword}; give the field a max_length")


def _check_rules(out: Mapping[str, Any], path: str) -> None:
    for entry in out.get("x-kubernetes-validations", ()):
        if not entry.get("rule") or not entry.get("message"):
            raise InternalError(f"{path}: a validation needs a rule and a message that says what to write")


def _copy(node: Mapping[str, Any], *keys: str) -> _Schema:
    return {key: node[key] for key in keys if key in node}


def _one_line(text: str) -> str:
    """Join the lines of a docstring; `kubectl explain` wraps by itself."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
