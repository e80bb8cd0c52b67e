"""Write docs/api.md, the reference of the resource, from the CustomResourceDefinition: `make crd`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parent.parent
CRD = ROOT / "crds" / "securevllm.io_securevllmdeployments.yaml"
PAGE = ROOT / "docs" / "api.md"

HEAD = """\
# API reference

`{group}/{version}`, kind `{kind}`, short name {short}, namespaced. Made by `make crd` from the definition that the
API server gets; do not edit. A default that this page does not show is resolved by the operator, not written into your
object. [status.md](status.md) explains conditions and reasons, [guard.md](guard.md) which arguments and variables there
are.
"""


def main() -> int:
    """Write the page; returns the exit code."""
    PAGE.write_text(page(), encoding="utf-8")
    return 0


def page() -> str:
    """Markdown of the whole reference."""
    crd = yaml.safe_load(CRD.read_text(encoding="utf-8"))
    names, (version,) = crd["spec"]["names"], crd["spec"]["versions"]
    short = ", ".join(f"`{name}`" for name in names["shortNames"])
    text = HEAD.format(group=crd["spec"]["group"], version=version["name"], kind=names["kind"], short=short)
    schema = version["schema"]["openAPIV3Schema"]["properties"]
    for part in ("spec", "status"):
        for path, node in _objects(part, schema[part]):
            text += f"\n## {path}\n\n" + _section(node)
    return text


def _objects(path: str, node: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every object with fields of its own, depth first."""
    if node.get("properties"):
        yield path, node
    for name, inner in node.get("properties", {}).items():
        yield from _objects(f"{path}.{name}", inner)
    if "items" in node:
        yield from _objects(f"{path}[]", node["items"])
    if isinstance(node.get("additionalProperties"), dict):
        yield from _objects(f"{path}.*", node["additionalProperties"])


def _section(node: dict[str, Any]) -> str:
    text = f"{_sentence(node)}\n\n" if node.get("description") else ""
    text += "| field | type | what it is |\n| --- | --- | --- |\n"
    required = node.get("required", ())
    for name, inner in node["properties"].items():
        must = " **required**" if name in required else ""
        text += f"| `{name}` | {_type(inner)}{must} | {_cell(_sentence(inner))} |\n"
    rules = [rule.get("message", "") for rule in node.get("x-kubernetes-validations", ())]
    if rules:
        text += "\nRules:\n\n" + "".join(f"- {_plain(rule)}\n" for rule in rules if rule)
    return text


def _sentence(node: dict[str, Any]) -> str:
    """Description and what the schema limits."""
    parts = [_plain(node.get("description", ""))]
    if "enum" in node:
        parts.append("One of " + ", ".join(f"`{value}`" for value in node["enum"] if value is not None) + ".")
    limits = [
        f"{word} {node[key]}"
        for key, word in (
            ("minimum", "at least"),
            ("maximum", "at most"),
            ("maxLength", "at most this many characters:"),
            ("maxItems", "at most this many entries:"),
        )
        if key in node
    ]
    if limits:
        parts.append(", ".join(limits)[0].upper() + ", ".join(limits)[1:] + ".")
    if "default" in node:
        parts.append(f"Default `{node['default']}`.")
    return " ".join(filter(None, parts))


def _type(node: dict[str, Any]) -> str:
    if node.get("x-kubernetes-int-or-string"):
        return "int or string"
    kind = str(node.get("type", "any"))
    if kind == "array":
        return f"{_type(node.get('items', {}))}[]"
    if kind == "object" and isinstance(node.get("additionalProperties"), dict):
        return f"map of {_type(node['additionalProperties'])}"
    return kind


def _plain(text: str) -> str:
    return " ".join(text.split())


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;").replace("{", "&#123;")


if __name__ == "__main__":
    sys.exit(main())
