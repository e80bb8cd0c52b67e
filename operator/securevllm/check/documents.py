"""From text to Kubernetes objects. What is wrong is said with file and line, and everything else is read all the same.

Each YAML document is parsed by itself, so that a syntax error in one hides no other. Aliases are counted before
anything is built from them: a few lines can stand for billions of values.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

MAX_BYTES = 64 * 1024 * 1024
MAX_DOCUMENTS = 5000
MAX_VALUES = 200_000
"""Values of one document, aliases written out."""
MAX_DEPTH = 64

_MARK = re.compile(r"^(---|\.\.\.)(?=\s|$)", re.MULTILINE)
_LISTS = ("List", "DeploymentList", "PodList", "StatefulSetList", "ServiceList", "NetworkPolicyList")
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass(frozen=True)
class Source:
    """Where an object was read."""

    name: str
    line: int = 0

    def __str__(self) -> str:
        return f"{self.name}:{self.line}" if self.line else self.name


@dataclass(frozen=True)
class Document:
    """An object with ``apiVersion``, ``kind`` and ``metadata``."""

    source: Source
    object: Mapping[str, Any]


@dataclass(frozen=True)
class Wrong:
    """Something that could not be read."""

    source: Source
    message: str

    def __str__(self) -> str:
        return f"{self.source}: {self.message}"


def read(name: str, text: str) -> Iterator[Document | Wrong]:
    """Read YAML or JSON with any number of documents, and the items of lists.

    Args:
        name: of the file, for messages.
        text: its content.
    """
    if len(text.encode()) > MAX_BYTES:
        yield Wrong(Source(name), f"has more than {MAX_BYTES // 1024 // 1024} MiB")
        return
    count = 0
    for line, part in _parts(text):
        source = Source(name, line)
        try:
            value = _value(part)
        except _UnreadableError as error:
            yield Wrong(Source(name, line + error.line), str(error))
            count += 1
            continue
        if value is None:
            continue
        count += 1
        if count > MAX_DOCUMENTS:
            yield Wrong(source, f"holds more than {MAX_DOCUMENTS} documents: the rest is not looked at; split the file")
            return
        yield from objects(source, value)
    if not count:
        yield Wrong(Source(name), "holds no object")


def objects(source: Source, value: Any) -> Iterator[Document | Wrong]:
    """The object, or the items of a list of objects."""
    if not isinstance(value, Mapping):
        yield Wrong(source, f"holds {_told(value)}, not a Kubernetes object")
        return
    kind, api_version = value.get("kind"), value.get("apiVersion")
    if not isinstance(kind, str) or not isinstance(api_version, str):
        yield Wrong(source, "is no Kubernetes object: apiVersion and kind are required")
    elif kind.endswith("List") and (kind in _LISTS or "items" in value):
        items = value.get("items") or []
        if not isinstance(items, list):
            yield Wrong(source, f"items is {_told(items)}, not a list")
            return
        for item in items:
            # The API server leaves these out of the items of a typed list.
            whole = {"apiVersion": api_version, "kind": kind.removesuffix("List"), **item} if _is_bare(item) else item
            yield from objects(source, whole)
    else:
        yield _object(source, value)


def _is_bare(item: Any) -> bool:
    return isinstance(item, Mapping) and "kind" not in item


def _object(source: Source, value: Mapping[str, Any]) -> Document | Wrong:
    for part in ("metadata", "spec"):
        if not isinstance(value.get(part) or {}, Mapping):
            return Wrong(source, f"{value['kind']}: {part} is {_told(value[part])}, not a mapping")
    metadata = value.get("metadata") or {}
    for part in ("name", "namespace"):
        if not isinstance(metadata.get(part) or "", str):
            return Wrong(source, f"{value['kind']}: metadata.{part} is {_told(metadata[part])}, not a text")
    return Document(source, value)


def _told(value: Any) -> str:
    return {"NoneType": "nothing", "str": "a text", "list": "a list", "dict": "a mapping"}.get(
        type(value).__name__, type(value).__name__
    )


class _UnreadableError(Exception):
    """``line`` counts from the beginning of the document."""

    def __init__(self, message: str, line: int = 0) -> None:
        self.line = line
        super().__init__(message)


def _parts(text: str) -> Iterator[tuple[int, str]]:
    """Documents with the number of their first line."""
    start, line = 0, 1
    for mark in _MARK.finditer(text):
        part = text[start : mark.start()]
        yield line, part
        line += part.count("\n")
        # A document may begin on the line of its mark; `...` only ends one.
        start = mark.end()
    yield line, text[start:]


def _value(text: str) -> Any:
    if not text.strip():
        return None
    try:
        _bounded(text)
        loader = _LOADER(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            _expanded(node, {})
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        what = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise _UnreadableError(f"is not YAML: {what}", mark.line if mark else 0) from None
    except (ValueError, OverflowError, RecursionError, TypeError) as error:
        # For example a timestamp of the 30th of February, or a key that is a list.
        raise _UnreadableError(f"is not YAML: {type(error).__name__}: {str(error)[:80]}") from None


def _bounded(text: str) -> None:
    """Refuse depth before a recursive parser sees it: each level needs a bracket, a dash or a further column."""
    if text.count("[") + text.count("{") + text.count("- ") < MAX_DEPTH and "\n" + " " * MAX_DEPTH not in text:
        return
    depth = 0
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise _UnreadableError(
                    f"is nested deeper than {MAX_DEPTH} levels", event.start_mark.line if event.start_mark else 0
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _line(node: yaml.Node) -> int:
    return node.start_mark.line if node.start_mark else 0


def _expanded(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Number of values below a node, each alias counted as what it stands for."""
    known = sizes.get(node)
    if known is not None:
        return known
    if isinstance(node, yaml.ScalarNode):
        return 1
    # Until it is done a node counts as too large: one that holds itself is refused.
    sizes[node] = MAX_VALUES + 1
    children = (
        [part for pair in node.value for part in pair] if isinstance(node, yaml.MappingNode) else list(node.value)
    )
    size = 1
    for child in children:
        size += _expanded(child, sizes)
        if size > MAX_VALUES:
            raise _UnreadableError(
                f"stands for more than {MAX_VALUES} values: aliases repeat them", node.start_mark.line
            )
    sizes[node] = size
    return size
