"""What the chart takes from elsewhere is what is there; every value has a text and a type."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from securevllm import __version__
from tests.chart.programs import CHART
from tools import chart, reference


@pytest.mark.parametrize("path", sorted(chart.generated()), ids=lambda path: path.name)
def test_generated_files_are_of_today(path: Path) -> None:
    wanted = chart.generated()[path]
    assert path.read_text(encoding="utf-8") == wanted, "make chart"


def test_nothing_else_is_in_files() -> None:
    made = {path for path in chart.generated() if path.parent.name == "files"}
    assert {path for path in (CHART / "files").rglob("*") if path.is_file()} == made


def test_the_chart_is_of_this_version() -> None:
    told = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert (told["version"], told["appVersion"]) == (__version__, __version__)


def test_every_default_is_what_the_schema_takes_and_every_object_is_closed_or_said_to_be_open() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))

    def walk(node: dict[str, Any], path: str) -> None:
        if node.get("type") == "object" and path != "global":
            assert "additionalProperties" in node, f"{path}: say what keys it takes"
        for name, inner in node.get("properties", {}).items():
            walk(inner, f"{path}.{name}".lstrip("."))

    walk(schema, "")


def test_every_key_of_the_schema_has_a_description() -> None:
    schema = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    without: list[str] = []

    def walk(node: Any, path: str) -> None:
        if isinstance(node, list):
            for inner in node:
                walk(inner, path)
        if not isinstance(node, dict):
            return
        for name, inner in node.get("properties", {}).items():
            if not inner.get("description"):
                without.append(f"{path}.{name}")
        for name, inner in node.items():
            walk(inner, f"{path}.{name}")

    walk(schema, "")
    assert without == []


@pytest.mark.parametrize(
    "text",
    [
        "replicas: 2\n",
        "# not marked as a value's\nreplicas: 2\n",
        "# -- of another\n\nreplicas: 2\n",
        "replicas:\n  # -- inside\n  a: 2\n",
    ],
)
def test_a_value_or_a_group_without_a_text_is_an_error(text: str) -> None:
    with pytest.raises(ValueError, match="replicas has no text"):
        list(chart.read_values(text))


def test_the_api_reference_is_of_today() -> None:
    assert reference.PAGE.read_text(encoding="utf-8") == reference.page(), "make crd"
