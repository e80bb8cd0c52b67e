"""The generator of the CRD: what it makes of each kind of field, what it refuses, and that `crds/` is up to date."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
import yaml
from click.testing import CliRunner
from pydantic import BaseModel, ConfigDict, Field, create_model

from securevllm.api.crd import crd, crd_from_models, structural_schema
from securevllm.api.fields import CRD_DEFAULT, rule
from securevllm.api.types import Status
from securevllm.cli import main
from securevllm.errors import InternalError

FILE = Path(__file__).parents[2] / "crds" / "securevllm.io_securevllmdeployments.yaml"
Text = Annotated[str, Field(max_length=9)]
ATOMIC = {"x-kubernetes-list-type": "atomic"}


def schema_of(annotation: Any, default: Any = ...) -> dict[str, Any]:
    """Give the structural schema of one field."""
    model = create_model("Example", field=(annotation, default))
    field: dict[str, Any] = structural_schema(model, "spec")["properties"]["field"]
    return field


def nodes(schema: dict[str, Any], path: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """Give every node below a schema with its path."""
    yield path, schema
    for name, child in schema.get("properties", {}).items():
        yield from nodes(child, f"{path}.{name}")
    for key in ("items", "additionalProperties"):
        if key in schema:
            yield from nodes(schema[key], f"{path}[]")


class Inner(BaseModel):
    """One entry.

    Second paragraph.
    """

    model_config = ConfigDict(
        extra="forbid", json_schema_extra={"x-kubernetes-validations": [rule("has(self.key)", "inner")]}
    )
    key: Text
    title: Annotated[str, Field(max_length=4, description="A field that is called title.")] | None = None


class Loop(BaseModel):
    again: Loop | None = None


class OneEntry(BaseModel):
    key: Text = "x"


def test_the_file_in_crds_is_up_to_date() -> None:
    printed = CliRunner().invoke(main, ["crd"])
    assert printed.exit_code == 0, printed.output
    assert FILE.exists(), "missing; run: make crd"
    assert FILE.read_text(encoding="utf-8") == printed.output, "the models changed; run: make crd"
    assert yaml.safe_load(printed.output) == crd()


def test_names_and_columns_are_those_of_the_design() -> None:
    spec = crd()["spec"]
    assert (spec["group"], spec["scope"]) == ("securevllm.io", "Namespaced")
    assert spec["names"] == {
        "kind": "SecureVLLMDeployment",
        "listKind": "SecureVLLMDeploymentList",
        "plural": "securevllmdeployments",
        "singular": "securevllmdeployment",
        "shortNames": ["svllm"],
        "categories": ["vllm"],
    }
    (version,) = spec["versions"]
    assert version["name"] == "v1alpha1"
    columns = [column["name"] for column in version["additionalPrinterColumns"]]
    assert columns == ["Ready", "Isolated", "Replicas", "Model", "URL", "Age"]
    assert version["subresources"] == {
        "status": {},
        "scale": {
            "specReplicasPath": ".spec.replicas",
            "statusReplicasPath": ".status.replicas",
            "labelSelectorPath": ".status.selector",
        },
    }


def test_every_path_of_a_column_and_of_scale_exists_in_the_schema() -> None:
    (version,) = crd()["spec"]["versions"]
    paths = {path for path, _ in nodes(version["schema"]["openAPIV3Schema"])}
    wanted = [*version["subresources"]["scale"].values(), ".spec.model.name", ".status.url", ".status.conditions"]
    assert not [path for path in wanted if path not in paths]


def test_the_real_schema_is_structural_and_bounded() -> None:
    """Kubernetes' own rules for structural schemas, judged without the generator's code."""
    forbidden = {"$ref", "$defs", "title", "allOf", "oneOf", "not", "const", "propertyNames", "patternProperties"}
    for path, node in nodes(crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]):
        assert not forbidden & set(node), path
        assert not {"properties", "additionalProperties"} <= set(node), path
        assert node.get("additionalProperties", {}) is not False, path
        if node.get("x-kubernetes-int-or-string"):
            assert "type" not in node, path
            assert "maxLength" in node, f"{path}: a string without a bound"
        else:
            assert node["type"] in {"object", "array", "string", "integer", "number", "boolean"}, path
        if path in {"", ".metadata", ".apiVersion", ".kind"}:
            continue
        if node.get("type") == "string":
            assert "maxLength" in node or "enum" in node, f"{path}: a string without a bound"
        if node.get("type") == "array":
            assert "maxItems" in node, f"{path}: a list without a bound"
            assert node["x-kubernetes-list-type"] in {"atomic", "map", "set"}, path
        if node.get("type") == "object" and "properties" not in node:
            assert "maxProperties" in node, f"{path}: a map without a bound"


def test_every_field_is_explained() -> None:
    """`kubectl explain` is the reference; a field that is named again is not explained."""
    for path, node in nodes(crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]):
        if path and path != ".metadata" and not path.endswith("[]"):
            assert len(node.get("description", "")) > len("Protocol"), f"{path}: give the field a description"


def test_a_default_is_told() -> None:
    schema = dict(nodes(crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]))
    for path, told in {
        ".spec.gateway.routes.profiles": "Default: chat.",
        ".spec.engine.sharedMemory": "Default: 8Gi.",
        ".spec.suspend": "Default: false.",
        ".spec.gateway.limits.streamSeconds": "Default: 3600.",
        ".spec.gateway.replicas": "Default: 2.",
    }.items():
        assert schema[path]["description"].endswith(told), path


def test_only_replicas_and_a_generation_that_never_was_are_defaulted_by_the_api_server() -> None:
    """A default in the CRD is frozen in etcd; scale cannot do without replicas, nor kstatus without that."""
    schema = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
    defaults = {path: node["default"] for path, node in nodes(schema) if "default" in node}
    assert defaults == {".spec.replicas": 1, ".spec.gateway.replicas": 2, ".status": {"observedGeneration": -1}}


def test_the_name_is_limited_at_the_root() -> None:
    rules = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["x-kubernetes-validations"]
    assert [entry["rule"] for entry in rules] == [
        "size(self.metadata.name) <= 40",
        "self.metadata.name.matches('^[a-z]([-a-z0-9]*[a-z0-9])?$')",
    ]


@pytest.mark.parametrize(
    ("annotation", "expected"),
    [
        pytest.param(Text, {"type": "string", "maxLength": 9}, id="a bounded string"),
        pytest.param(Text | None, {"type": "string", "maxLength": 9}, id="Optional has no null branch"),
        pytest.param(Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}, id="an enum"),
        pytest.param(Literal["a"], {"type": "string", "enum": ["a"]}, id="an enum of one value"),
        pytest.param(bool, {"type": "boolean"}, id="a boolean"),
        pytest.param(
            Annotated[int, Field(ge=1, le=5)], {"type": "integer", "maximum": 5, "minimum": 1}, id="integer bounds"
        ),
        pytest.param(
            Annotated[str, Field(max_length=9, pattern="^a$", json_schema_extra={"format": "date-time"})],
            {"type": "string", "format": "date-time", "maxLength": 9, "pattern": "^a$"},
            id="pattern and format",
        ),
        pytest.param(
            Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True, "maxLength": 8})],
            {
                "anyOf": [{"type": "integer"}, {"type": "string"}],
                "x-kubernetes-int-or-string": True,
                "maxLength": 8,
            },
            id="int-or-string has no type",
        ),
        pytest.param(
            Annotated[tuple[Text, ...], Field(max_length=3)],
            {"type": "array", "maxItems": 3, **ATOMIC, "items": {"type": "string", "maxLength": 9}},
            id="a list is atomic unless it says otherwise",
        ),
        pytest.param(
            Annotated[tuple[Text, ...], Field(json_schema_extra={"x-kubernetes-list-type": "set", "maxItems": 3})],
            {
                "type": "array",
                "maxItems": 3,
                "x-kubernetes-list-type": "set",
                "items": {"type": "string", "maxLength": 9},
            },
            id="a set",
        ),
        pytest.param(
            Annotated[dict[str, Text], Field(max_length=4)],
            {"type": "object", "maxProperties": 4, "additionalProperties": {"type": "string", "maxLength": 9}},
            id="a map",
        ),
        pytest.param(
            Annotated[dict[Annotated[str, Field(max_length=5)], Text], Field(max_length=4)],
            {
                "type": "object",
                "maxProperties": 4,
                "additionalProperties": {"type": "string", "maxLength": 9},
                "x-kubernetes-validations": [
                    rule("self.all(key, size(key) <= 5)", "a key has at most 5 characters"),
                ],
            },
            id="a bound of keys becomes a rule",
        ),
        pytest.param(
            Annotated[dict[Annotated[str, Field(max_length=5, pattern="^[a-z]+$")], Text], Field(max_length=4)],
            {
                "type": "object",
                "maxProperties": 4,
                "additionalProperties": {"type": "string", "maxLength": 9},
                "x-kubernetes-validations": [
                    rule(
                        "self.all(key, size(key) <= 5 && key.matches(r'^[a-z]+$'))",
                        "a key has at most 5 characters and matches ^[a-z]+$",
                    ),
                ],
            },
            id="a pattern of keys becomes a rule",
        ),
    ],
)
def test_a_field_becomes(annotation: Any, expected: dict[str, Any]) -> None:
    assert schema_of(annotation) == expected


def test_a_model_is_inlined_with_its_description_rules_and_required_fields() -> None:
    described = Annotated[Inner | None, Field(description="Of the field.")]
    assert schema_of(Inner)["description"] == "One entry.\n\nSecond paragraph."
    schema = schema_of(described, None)
    assert schema["description"] == "Of the field."
    assert schema["required"] == ["key"]
    assert schema["x-kubernetes-validations"] == [rule("has(self.key)", "inner")]
    assert schema["properties"]["title"] == {
        "description": "A field that is called title.",
        "type": "string",
        "maxLength": 4,
    }


def test_rules_of_the_field_come_beside_those_of_its_model() -> None:
    outer = Annotated[Inner, Field(json_schema_extra={"x-kubernetes-validations": [rule("true", "outer")]})]
    messages = [entry["message"] for entry in schema_of(outer)["x-kubernetes-validations"]]
    assert messages == ["inner", "outer"]


def test_a_list_of_type_map_keeps_its_keys() -> None:
    extra: dict[str, Any] = {"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["key"]}
    schema = schema_of(Annotated[tuple[Inner, ...], Field(max_length=2, json_schema_extra=extra)])
    assert schema["x-kubernetes-list-map-keys"] == ["key"]
    assert schema["items"]["required"] == ["key"]


def test_a_default_is_kept_only_where_the_field_says_so() -> None:
    assert "default" not in schema_of(Text, "safe")
    assert schema_of(Annotated[int, Field(json_schema_extra=CRD_DEFAULT)], 1) == {"type": "integer", "default": 1}


@pytest.mark.parametrize(
    ("annotation", "message"),
    [
        pytest.param(str, "spec.field: has no maxLength", id="a string without a bound"),
        pytest.param(tuple[Text, ...], "spec.field: has no maxItems", id="a list without a bound"),
        pytest.param(Annotated[tuple[str, ...], Field(max_length=1)], r"spec.field\[\]: has no maxLength", id="items"),
        pytest.param(dict[str, Text], "spec.field: has no maxProperties", id="a map without a bound"),
        pytest.param(Annotated[dict[str, str], Field(max_length=1)], r"spec.field.\*: has no maxLength", id="values"),
        pytest.param(
            Annotated[int | str, Field(json_schema_extra={"x-kubernetes-int-or-string": True})],
            "has no maxLength",
            id="int-or-string without a bound",
        ),
        pytest.param(Any, "needs one type", id="anything"),
        pytest.param(Text | bool, "needs one type", id="a union"),
        pytest.param(
            Annotated[Text, Field(json_schema_extra={"x-kubernetes-int-or-string": True})], "not `int", id="no union"
        ),
        pytest.param(Annotated[dict[str, Any], Field(max_length=1)], "cannot be judged", id="a map of anything"),
        pytest.param(
            Annotated[
                dict[str, Text],
                Field(max_length=1, json_schema_extra={"x-kubernetes-preserve-unknown-fields": True}),
            ],
            "has no x-kubernetes-preserve-unknown-fields",
            id="an opaque object",
        ),
        pytest.param(Annotated[int, Field(gt=1)], "has no exclusiveMinimum", id="an exclusive bound"),
        pytest.param(tuple[int, int], "has no prefixItems", id="a tuple of fixed length"),
        pytest.param(Loop, "Loop contains itself", id="recursion"),
        pytest.param(
            Annotated[Text, Field(json_schema_extra={"pattern": "(?=a)"})], "syntax that the API", id="look-ahead"
        ),
        pytest.param(
            Annotated[tuple[Text, ...], Field(max_length=1, json_schema_extra={"x-kubernetes-list-type": "bag"})],
            "the list type bag is not one of",
            id="an unknown list type",
        ),
        pytest.param(
            Annotated[tuple[Inner, ...], Field(max_length=1, json_schema_extra={"x-kubernetes-list-type": "map"})],
            "needs x-kubernetes-list-map-keys",
            id="a map list without keys",
        ),
        pytest.param(
            Annotated[
                tuple[OneEntry, ...],
                Field(
                    max_length=1,
                    json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["key"]},
                ),
            ],
            "must be required",
            id="a map list with an optional key",
        ),
        pytest.param(
            Annotated[Text, Field(json_schema_extra={"x-kubernetes-validations": [{"rule": "true"}]})],
            "needs a rule and a message",
            id="a rule without a message",
        ),
    ],
)
def test_what_the_schema_cannot_say_is_refused_by_name(annotation: Any, message: str) -> None:
    with pytest.raises(InternalError, match=message):
        schema_of(annotation)


def test_the_generator_takes_any_two_models() -> None:
    made = crd_from_models(Inner, Status)
    assert list(made["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]["properties"]) == [
        "key",
        "title",
    ]
