"""Write what the chart takes from elsewhere: `make chart`, or `python tools/chart.py --check` to see what would change.

    files/                from crds/ and manifests/: definition, rights, admission policies, alerts, dashboard
    values.schema.json    from values.yaml: types of the defaults, texts after `# --` (of a group of values: right above
                          it), constraints after `# @schema`
    README.md             from values.yaml: one table of all values

So everything that the chart says is said once, and helm refuses a key that values.yaml does not have.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter

from securevllm.api.bounds import PlatformBounds

ROOT = Path(__file__).resolve().parent.parent
CHART = ROOT / "charts" / "secure-vllm-operator"
MANIFESTS = ROOT / "manifests"
TYPES = {str: "string", bool: "boolean", int: "integer", float: "number", list: "array", dict: "object"}


@dataclass(frozen=True)
class Value:
    """One value of the chart.

    Attributes:
        path: keys from the top.
        default: what values.yaml says.
        text: for people.
        schema: constraints beside the type of the default.
        group: of values, which follow; it is no value by itself.
    """

    path: tuple[str, ...]
    default: Any
    text: str
    schema: dict[str, Any]
    group: bool = False

    @property
    def name(self) -> str:
        """As ``--set`` takes it."""
        return ".".join(self.path)


def main(arguments: list[str]) -> int:
    """Write the files, or tell which differ; returns the exit code."""
    stale = []
    for path, text in generated().items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(str(path.relative_to(ROOT)))
            if arguments != ["--check"]:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if arguments == ["--check"] and stale:
        print(f"not as their sources say: {', '.join(stale)}: make chart")
        return 1
    return 0


def generated() -> dict[Path, str]:
    """Path and content of every generated file."""
    values = list(read_values((CHART / "values.yaml").read_text(encoding="utf-8")))
    files = {CHART / "files" / name: text for name, text in _files().items()}
    schema = json.dumps(_schema(values), indent=2) + "\n"
    return files | {CHART / "values.schema.json": schema, CHART / "README.md": _readme(values)}


# --------------------------------------------------------------------------------------------------------------- files


def _files() -> dict[str, str]:
    rbac = {(obj["kind"], obj["metadata"]["name"]): obj for obj in _documents(MANIFESTS / "rbac")}
    files = {
        "crd.yaml": (ROOT / "crds" / "securevllm.io_securevllmdeployments.yaml").read_text(encoding="utf-8"),
        "rules.yaml": _dump({"rules": rbac["ClusterRole", "secure-vllm-operator"]["rules"]}),
        "prometheus-rule.yaml": (MANIFESTS / "monitoring" / "prometheus-rule.yaml").read_text(encoding="utf-8"),
        "dashboard.json": (MANIFESTS / "monitoring" / "dashboard.json").read_text(encoding="utf-8"),
        "admission-policies.yaml": (MANIFESTS / "admission" / "policies.yaml").read_text(encoding="utf-8"),
    }
    for role in ("view", "edit"):
        files[f"{role}-role.yaml"] = _dump(rbac["ClusterRole", f"secure-vllm-operator-{role}"])
    return files


def _documents(folder: Path) -> Iterator[dict[str, Any]]:
    for path in sorted(folder.glob("*.yaml")):
        if path.name != "kustomization.yaml":
            yield from yaml.safe_load_all(path.read_text(encoding="utf-8"))


def _dump(value: Any) -> str:
    return yaml.safe_dump(value, sort_keys=False, width=120)


# -------------------------------------------------------------------------------------------------------------- values


def read_values(text: str) -> Iterator[Value]:
    """The values of a values.yaml, in its order.

    Raises:
        ValueError: a value without a text, or a constraint that is no JSON object.
    """
    node = yaml.compose(text, Loader=yaml.SafeLoader)
    yield from _values(node, yaml.safe_load(text), text.splitlines(), ())


def _values(node: Any, data: Any, lines: list[str], path: tuple[str, ...]) -> Iterator[Value]:
    for key, value in node.value:
        here = (*path, key.value)
        text, schema, marked = _comment(lines, key.start_mark.line)
        inner = data[key.value]
        group = isinstance(inner, dict) and bool(inner) and not marked
        if not text or not (marked or group):
            wanted = "# ..." if group else "# -- ..."
            raise ValueError(f"values.yaml: {'.'.join(here)} has no text: put `{wanted}` above it")
        yield Value(here, inner, text, schema, group)
        if group:
            yield from _values(value, inner, lines, here)


def _comment(lines: list[str], line: int) -> tuple[str, dict[str, Any], bool]:
    """Text and constraints in the comment right above a key, and whether the text is marked as that of a value."""
    text: list[str] = []
    schema: dict[str, Any] = {}
    for above in reversed(lines[:line]):
        stripped = above.strip()
        if not stripped.startswith("#"):
            break
        if match := re.fullmatch(r"# @schema (\{.*\})", stripped):
            schema = json.loads(match[1])
        elif stripped.startswith("# -- "):
            return " ".join([stripped[5:], *text]), schema, True
        else:
            text.insert(0, stripped[2:])
    return " ".join(text), schema, False


def _schema(values: list[Value]) -> dict[str, Any]:
    top: dict[str, Any] = {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Values of the chart secure-vllm-operator",
        "type": "object",
        "additionalProperties": False,
        "properties": {
            # Helm adds it when the chart is a dependency of another one.
            "global": {"type": "object", "description": "Values of a parent chart; not used."},
        },
    }
    for value in values:
        node = top
        for key in value.path[:-1]:
            node = node["properties"][key]
        entry: dict[str, Any] = {"type": TYPES[type(value.default)], "description": value.text}
        if value.group:
            entry |= {"additionalProperties": False, "properties": {}}
        node["properties"][value.path[-1]] = entry | value.schema
    # The operator's own type says what bounds there are.
    bounds = TypeAdapter(PlatformBounds).json_schema(by_alias=True)
    top["$defs"] = bounds.pop("$defs")
    top["properties"]["bounds"] = bounds | {"description": top["properties"]["bounds"]["description"]}
    return top


# -------------------------------------------------------------------------------------------------------------- readme


def _readme(values: list[Value]) -> str:
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    rows = [
        f"| `{value.name}` | {_default(value.default)} | {_cell(value.text)} |" for value in values if not value.group
    ]
    return README.format(version=chart["version"], kube=chart["kubeVersion"], rows="\n".join(rows))


def _default(value: Any) -> str:
    return f"`{_cell(json.dumps(value))}`"


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


README = """\
# Chart secure-vllm-operator

Version {version}, for Kubernetes `{kube}`. Made by `make chart` from `values.yaml`; do not edit.

<!-- not run: no registry; tests/api/test_chart.py installs it -->

```sh
helm install secure-vllm-operator charts/secure-vllm-operator --namespace secure-vllm-operator --create-namespace \\
  --set image.repository=registry.example.com/secure-vllm-operator
```

[Installation](../../docs/install.md) has the word-by-word path, also for kustomize and Argo CD, and how to upgrade. An
unknown or malformed value is refused with its path before anything is applied.

## Values

| value | default | what it is |
| --- | --- | --- |
{rows}
"""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
