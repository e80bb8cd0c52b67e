"""The command line of ``vllm serve``, from the catalogue: a flag that it does not list is an error, as argparse says.

Spellings as vLLM's own parser takes them: unambiguous prefixes, underscores, ``--a=b`` and ``--a b``, dotted keys of
JSON flags (``--kv-transfer-config.kv_role=...``); on a repeat the last one wins.
"""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING, Any, NoReturn

from securevllm import catalogue
from securevllm.catalogue import Range, Setting

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from securevllm.catalogue import Version

_MODEL = "model_tag"


class ArgumentError(Exception):
    """A command line that vLLM would refuse; the text says why."""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ArgumentError(message)


def flags(version: Version) -> dict[str, Setting]:
    """Every flag of a release that the catalogue knows, whoever may set it."""
    known = catalogue.flags()
    owned = (
        Setting(name, kind, versions=known.since.get(name, Range())) for name, kind in catalogue.server().flags.items()
    )
    risky = (setting for risk in catalogue.risks().values() for setting in risk.flags.values())
    return {flag.name: flag for flag in (*owned, *known.allowed.values(), *risky) if version in flag.versions}


def parse(argv: Sequence[str], version: Version) -> argparse.Namespace:
    """Read what follows ``vllm serve``.

    Returns:
        One attribute for each flag of the release, None where it is not given, and ``model_tag``.

    Raises:
        ArgumentError: an unknown or ambiguous flag, or a value of the wrong kind.
    """
    known = flags(version)
    parser = _Parser(prog="vllm serve", add_help=False)
    parser.add_argument(_MODEL, nargs="?")
    short = {long: name for name, long in catalogue.flags().short.items()}
    for name, flag in known.items():
        _add(parser, [name, *([short[name]] if name in short else [])], flag)
    return parser.parse_args(list(_normalised(argv, {name for name, flag in known.items() if flag.kind == "json"})))


def _add(parser: argparse.ArgumentParser, names: Sequence[str], flag: Setting) -> None:
    if flag.kind == "none":
        parser.add_argument(*names, action="store_true", default=None)
    elif flag.kind == "bool":
        parser.add_argument(*names, action=argparse.BooleanOptionalAction)
    elif flag.kind in {"list", "loras"}:
        parser.add_argument(*names, nargs="+")
    else:
        kinds: dict[str, Any] = {"int": int, "count": int, "float": float, "json": json.loads}
        parser.add_argument(*names, type=kinds.get(flag.kind, str), choices=flag.choices or None)


def _normalised(argv: Iterable[str], json_flags: set[str]) -> Iterator[str]:
    """Dashes for underscores in names, and dotted keys gathered into the one JSON value that they describe."""
    gathered: dict[str, dict[str, Any]] = {}
    waiting: str | None = None
    for argument in argv:
        if waiting is not None:
            _put(gathered, waiting, argument)
            waiting = None
            continue
        if not argument.startswith("--"):
            yield argument
            continue
        name, separator, value = argument.partition("=")
        stem, dot, keys = name.partition(".")
        stem = stem.replace("_", "-")
        if dot and stem in json_flags:
            waiting = None if separator else f"{stem}.{keys}"
            if separator:
                _put(gathered, f"{stem}.{keys}", value)
        else:
            yield stem + dot + keys + separator + value
    if waiting is not None:
        raise ArgumentError(f"argument {waiting}: expected one argument")
    for stem, described in gathered.items():
        yield f"{stem}={json.dumps(described)}"


def _put(gathered: dict[str, dict[str, Any]], dotted: str, text: str) -> None:
    stem, *keys, last = dotted.split(".")
    where = gathered.setdefault(stem, {})
    for key in keys:
        where = where.setdefault(key, {})
    try:
        where[last] = json.loads(text)
    except ValueError:
        where[last] = text
