"""Kinds of values (``catalogue/data/flags.toml``): one pattern each, and for JSON an allowlist of keys.

JSON is read here once and written anew: what vLLM gets has each key once, no layout, and no character that Kubernetes
expands, however the user wrote it.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from securevllm import catalogue

ROOTS = ("/data", "/mnt")
"""Where volumes of ``spec.engine.volumes`` may be mounted: nothing is loaded from there unless a flag names it."""

_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,127}")
_PATH = re.compile(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+")
_KEY = re.compile(r"[A-Za-z0-9_]{1,64}")

# A number that Python's int() and float() read is not enough: they take "1_0", other alphabets' digits, nan and inf.
_PATTERNS: Mapping[str, tuple[re.Pattern[str], str]] = {
    "count": (re.compile(r"[0-9]{1,18}"), "8"),
    "int": (re.compile(r"-?[0-9]{1,18}"), "8192"),
    "float": (re.compile(r"-?[0-9]{1,9}(\.[0-9]{1,9})?"), "0.9"),
    "size": (re.compile(r"-1|auto|[0-9]{1,18}|[0-9]{1,9}[KMGT]|[0-9]{1,9}(\.[0-9]{1,3})?[kmgt]"), "32k"),
    "word": (_WORD, "bfloat16"),
    "text": (re.compile(r"[ -#%-~]{0,1024}"), "some text"),
    "endpoint": (
        re.compile(r"(https?|grpc)://[a-z0-9]([a-z0-9.-]{0,252}[a-z0-9])?(:[0-9]{1,5})?(/[A-Za-z0-9._/-]{0,128})?"),
        "http://collector.tracing.svc:4317",
    ),
}
_OP = re.compile(r"[+-]?[A-Za-z0-9_]{1,64}")
_LONGEST = 256
"""Entries of a list within JSON."""
_LARGEST = 10**18


class Refused(Exception):  # noqa: N818 - says what happened
    """A value that does not fit: the rule, one sentence, and what to write instead."""

    def __init__(self, rule: str, fix: str) -> None:
        self.rule, self.fix = rule, fix
        super().__init__(rule)


def is_path(text: str) -> bool:
    """Whether a text is an absolute path without ``..``, ``//`` and hidden files."""
    return _PATH.fullmatch(text) is not None


def is_below(path: str, mounts: tuple[str, ...]) -> bool:
    """Whether a path is one of the mounted folders, or in one."""
    return is_path(path) and any(path == mount or path.startswith(f"{mount}/") for mount in mounts)


def check(setting: catalogue.Setting, value: str, mounts: tuple[str, ...]) -> None:
    """Judge one value of a flag or variable that is no JSON.

    Args:
        setting: the row of the catalogue.
        value: the text.
        mounts: folders of the declared volumes.

    Raises:
        Refused: it does not fit.
    """
    if setting.path or setting.kind == "path":
        if value in setting.choices or is_below(value, mounts):
            return
        _refuse_path(setting, mounts)
    if setting.kind == "choice":
        if value not in setting.choices:
            raise Refused("not one of the values that it may have", f"Write one of: {', '.join(setting.choices)}.")
        return
    pattern, example = _PATTERNS[setting.kind]
    if pattern.fullmatch(value) is None:
        raise Refused(f"it needs a value of kind {setting.kind}", f"Write for example {setting.name}={example}.")


def _refuse_path(setting: catalogue.Setting, mounts: tuple[str, ...]) -> None:
    others = f"{', '.join(setting.choices)}, or " if setting.choices else ""
    raise Refused(
        "only a path below a volume of spec.engine.volumes",
        f"Write {others}a path below {' or '.join(mounts)}."
        if mounts
        else f"Write {others}mount a volume: engine: {{volumes: [{{name: files, mountPath: {ROOTS[-1]}/files,"
        " configMap: {name: ...}}]}.",
    )


def loras(text: str) -> dict[str, str]:
    """One entry of ``--lora-modules``: ``name=path``, or a JSON object with name, path and base_model_name.

    Raises:
        Refused: it is neither.
    """
    if not text.lstrip().startswith("{"):
        name, equals, path = text.partition("=")
        if not equals:
            raise Refused("an adapter is written as name=path", "Write for example sql=/mnt/adapters/sql.")
        return {"name": name, "path": path}
    entry = parse(text)
    if not {"name", "path"} <= entry.keys() <= {"name", "path", "base_model_name"}:
        raise Refused("an adapter has name and path, perhaps base_model_name", "Write name=path.")
    return {key: str(value) for key, value in entry.items()}


def check_lora(entry: Mapping[str, str], mounts: tuple[str, ...]) -> None:
    """Judge one adapter.

    Raises:
        Refused: a name is no word, or the path is not in a declared volume.
    """
    for key in ("name", "base_model_name"):
        if key in entry and re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._/-]{0,127}", entry[key]) is None:
            raise Refused("the name of an adapter is a word", "Write for example sql=/mnt/adapters/sql.")
    if not is_below(entry["path"], mounts):
        _refuse_path(catalogue.Setting("--lora-modules", "path"), mounts)


def write_lora(entry: Mapping[str, str]) -> str:
    """The one spelling of an adapter."""
    return f"{entry['name']}={entry['path']}" if len(entry) == 2 else write(entry)  # noqa: PLR2004 - name, path


# --------------------------------------------------------------------------------------------------------------- JSON


def parse(text: str) -> dict[str, Any]:
    """Read a JSON object; a key may stand in it once.

    Raises:
        Refused: it is none.
    """
    try:
        value = json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise Refused(
            "it needs a JSON object, with each key once", """Write for example '{"num_speculative_tokens": 3}'."""
        )
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    made = dict(pairs)
    if len(made) != len(pairs):
        raise ValueError("a key stands twice")
    return made


def _no_constant(text: str) -> None:
    raise ValueError(f"{text} is no JSON")


def write(value: Any) -> str:
    """The one spelling of a JSON value: no layout, ASCII only."""
    return json.dumps(value, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def merge(into: dict[str, Any], path: list[str], value: Any) -> None:
    """Add the value of a dotted key (``--flag.a.b value``).

    Raises:
        Refused: the key has a value already, or is no object.
    """
    inner: Any = into
    for key in path[:-1]:
        inner = inner.setdefault(key, {}) if isinstance(inner, dict) else None
    if not isinstance(inner, dict) or path[-1] in inner:
        raise Refused("a key may stand only once", "Remove one of the two.")
    inner[path[-1]] = value


def dotted(text: str, *, many: bool) -> Any:
    """The value of a dotted key as vLLM's parser reads it (vllm/utils/argparse_utils.py, 0.33.0).

    Args:
        text: as written.
        many: the key ended with ``+``: a list, separated by commas.
    """
    if many:
        return [dotted(part, many=False) for part in text.split(",")]
    try:
        return json.loads(text, object_pairs_hook=_once, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        pass
    match = re.fullmatch(r"([0-9]{1,9}(?:\.[0-9]{1,3})?)([kmgtKMGT])", text)
    if match is None:
        return text
    power = "kmgt".index(match[2].lower()) + 1
    return int(float(match[1]) * 1000**power) if match[2].islower() else _binary(match[1], power, text)


def _binary(number: str, power: int, text: str) -> Any:
    return int(number) * 1024**power if number.isdigit() else text


def check_json(
    keys: Mapping[str, catalogue.Setting], value: Mapping[str, Any], mounts: tuple[str, ...]
) -> Iterator[tuple[str, Refused]]:
    """Every key that may not be there, or whose value does not fit, with its dotted path."""
    yield from _members(keys, value, mounts, "")


def _members(
    keys: Mapping[str, catalogue.Setting], value: Mapping[str, Any], mounts: tuple[str, ...], prefix: str
) -> Iterator[tuple[str, Refused]]:
    for key, member in value.items():
        path = f"{prefix}{key}"
        if not _KEY.fullmatch(key):
            yield path, Refused("not a key that it may have", _told(keys))
        elif isinstance(member, dict) and any(name.startswith(f"{path}.") for name in keys):
            yield from _members(keys, member, mounts, f"{path}.")
        elif path not in keys:
            yield path, Refused("not a key that it may have", _told(keys))
        elif not _fits(keys[path], member, mounts):
            yield path, Refused(f"it needs {_needs(keys[path], mounts)}", "See docs/guard.md.")


def _told(keys: Mapping[str, catalogue.Setting]) -> str:
    return f"Use only: {', '.join(sorted(keys))}."


def _needs(setting: catalogue.Setting, mounts: tuple[str, ...]) -> str:
    if setting.kind == "choice":
        return f"one of {', '.join(setting.choices)}"
    if setting.kind == "path":
        return f"a path below {' or '.join(mounts)}" if mounts else "a path below a volume of spec.engine.volumes"
    return f"a value of kind {setting.kind}"


def _fits(setting: catalogue.Setting, value: Any, mounts: tuple[str, ...]) -> bool:
    if setting.kind == "path":
        return isinstance(value, str) and is_below(value, mounts)
    if setting.kind == "choice":
        return isinstance(value, str) and value in setting.choices
    if setting.kind in _LISTS:
        return (
            isinstance(value, list) and len(value) <= _LONGEST and all(_SCALARS[_LISTS[setting.kind]](v) for v in value)
        )
    return _SCALARS[setting.kind](value)


def _is_number(value: Any, *kinds: type) -> bool:
    # The exact type: bool is an int in Python.
    return isinstance(value, int | float) and type(value) in kinds and -_LARGEST < value < _LARGEST


_LISTS = {"words": "word", "ops": "op", "ints": "int", "floats": "float"}
_SCALARS: Mapping[str, Callable[[Any], bool]] = {
    "bool": lambda value: isinstance(value, bool),
    "count": lambda value: _is_number(value, int) and value >= 0,
    "float": lambda value: _is_number(value, int, float),
    "int": lambda value: _is_number(value, int),
    "op": lambda value: isinstance(value, str) and _OP.fullmatch(value) is not None,
    "word": lambda value: isinstance(value, str) and _WORD.fullmatch(value) is not None,
}
