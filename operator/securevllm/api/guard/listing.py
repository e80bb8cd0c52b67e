"""What a user may set, as rows for people: `securevllm guard` and docs/guard.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from securevllm import catalogue


@dataclass(frozen=True)
class Row:
    """One thing that a user may set.

    Attributes:
        where: ``args`` or ``env``.
        name: the flag with its JSON key behind a dot, or the variable.
        value: kind of value, or all values.
        needs: risk that must be accepted; empty: none.
        versions: releases that have it; empty: all.
    """

    where: str
    name: str
    value: str
    needs: str
    versions: str


def rows(version: catalogue.Version | None = None) -> Iterator[Row]:
    """All rows, or those of one release."""
    flags = catalogue.flags()
    for name, setting in sorted(flags.allowed.items()):
        yield from _row("args", setting, version)
        if version is None or version in setting.versions:
            for key, inner in sorted(flags.json.get(name, {}).items()):
                value = "true or false" if inner.kind == "bool" else _value(inner)
                yield Row("args", f"{name}.{key}", value, "", "")
    for name, risk in sorted(catalogue.risky_flags().items()):
        yield from _row("args", risk.flags[name], version, risk.name)
    for _, setting in sorted(catalogue.environment().allowed.items()):
        yield from _row("env", setting, version)


def _row(where: str, setting: catalogue.Setting, version: catalogue.Version | None, needs: str = "") -> Iterator[Row]:
    if version is None or version in setting.versions:
        yield Row(where, setting.name, _value(setting), needs, _versions(setting.versions))


def _value(setting: catalogue.Setting) -> str:
    values = ", ".join(setting.choices) or _KINDS.get(setting.kind, setting.kind)
    return f"{values}, or a path in a volume" if setting.path else values


_KINDS = {
    "none": "(switch)",
    "bool": "(switch, also --no-)",
    "path": "a path in a volume",
    "loras": "name=path in a volume, several",
    "json": "JSON with the keys below",
    "words": "list of words",
    "ints": "list of numbers",
    "floats": "list of numbers",
    "ops": "list of words, each perhaps with + or -",
    "count": "number, not negative",
    "int": "number",
    "float": "number, perhaps with decimals",
    "size": "number, perhaps with k, M or G",
    "endpoint": "URL, with a declared egress",
    "text": "text",
    "word": "word",
}


def _versions(versions: catalogue.Range) -> str:
    ends = (("since", versions.since), ("until", versions.until))
    return " ".join(f"{word} {end}" for word, end in ends if end is not None)
