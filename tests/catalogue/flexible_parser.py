"""vLLM's real `FlexibleArgumentParser`, taken out of a release, with the flags that the extraction found.

One file of the release is run, its parser; of what it imports, the logger is replaced, and `regex` by `re`, whose
syntax it uses. Values are texts here: the release's own types would refuse more, never set something else.
"""

from __future__ import annotations

import argparse
import re
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn
from unittest.mock import patch

from securevllm_dev.catalogue.extract import extract
from securevllm_dev.catalogue.source import read
from tests.catalogue.releases import sdist

if TYPE_CHECKING:
    from securevllm_dev.catalogue.findings import Findings, Flag

_FILE = "vllm/utils/argparse_utils.py"


class _Refused(Exception):  # noqa: N818 - says what happened
    """The parser's error message."""


@dataclass(frozen=True)
class Release:
    """A release: what it has, and its parser."""

    version: str
    found: Findings
    parser: argparse.ArgumentParser

    def parse(self, args: Sequence[str]) -> dict[str, Any] | None:
        """What `vllm serve` would take from its arguments; None when it ends with an error."""
        try:
            return vars(self.parser.parse_args(["serve", *args]))
        except (_Refused, SystemExit, ValueError, AssertionError, OSError, IndexError, TypeError, AttributeError):
            return None


@cache
def release(version: str) -> Release:
    """Load one; skips the test when the sdist cannot be had."""
    path = sdist("vllm", version)
    module = _run(read(path).files[_FILE].decode())
    found = extract(path)
    return Release(version, found, _parser(module.FlexibleArgumentParser, found.flags))


def _run(source: str) -> Any:
    logger = types.SimpleNamespace(
        **dict.fromkeys(("warning", "warning_once", "error", "info", "debug"), lambda *_, **__: None)
    )
    stand_ins = {"vllm": types.ModuleType("vllm"), "vllm.logger": types.ModuleType("vllm.logger"), "regex": re}
    stand_ins["vllm.logger"].__dict__["init_logger"] = lambda _: logger
    module = types.ModuleType("argparse_utils")
    with patch.dict(sys.modules, stand_ins):
        exec(compile(source, _FILE, "exec"), module.__dict__)  # noqa: S102 - the file under test
    return module


def _parser(kind: Any, flags: Sequence[Flag]) -> argparse.ArgumentParser:
    """As vllm/entrypoints/cli/main.py builds it: a parser of the same class for the command."""

    class Quiet(kind):  # type: ignore[misc]  # the class is only known now
        def error(self, message: str) -> NoReturn:
            raise _Refused(message)  # the usage of 400 flags takes 20 ms to write

        def print_help(self, _file: Any = None) -> NoReturn:
            raise _Refused("help")

    parser: argparse.ArgumentParser = Quiet(prog="vllm")
    serve = parser.add_subparsers(dest="subparser").add_parser("serve")
    serve.add_argument("model_tag", type=str, nargs="?")
    names = {flag.name for flag in flags}
    for flag in flags:
        if flag.name.startswith("--no-") and f"--{flag.name[5:]}" in names:
            continue  # made by its positive form
        short = [flag.short] if flag.short else []
        serve.add_argument(*short, flag.name, **_described(flag, names))
    return parser


def _described(flag: Flag, names: set[str]) -> dict[str, Any]:
    if f"--no-{flag.name[2:]}" in names:
        return {"action": argparse.BooleanOptionalAction, "default": None}
    if flag.type == "flag":
        return {"action": "store_true", "default": None}
    if "list[" in flag.type or "set[" in flag.type:
        return {"nargs": "+", "type": str, "default": None}
    return {"type": str, "default": None}
