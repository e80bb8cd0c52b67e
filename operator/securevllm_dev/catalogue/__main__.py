"""The commands. Exit codes: 0 done, 1 something is not in the catalogue, 2 wrong or partly broken input."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import click

from securevllm_dev.catalogue.extract import extract as read_source
from securevllm_dev.catalogue.findings import Findings, table
from securevllm_dev.catalogue.review import differences, review
from securevllm_dev.catalogue.source import SourceError

_WRONG_INPUT = 2
_SOURCE = click.Path(exists=True, path_type=Path)
_WITH = click.option(
    "--with",
    "dependencies",
    type=_SOURCE,
    multiple=True,
    help="Sdist or folder of model-hosting-container-standards: its routes are those of the same server.",
)
_OUTPUT = click.option("-o", "--output", type=click.Choice(["table", "json"]), default="table", show_default=True)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
def main() -> None:
    """What a vLLM release exposes, read from its source; nothing of it is run."""
    gc.disable()  # millions of syntax nodes that all live to the end: collecting costs a third of the time


@main.command()
@click.argument("source", type=_SOURCE)
@_WITH
@_OUTPUT
def extract(source: Path, dependencies: tuple[Path, ...], output: str) -> None:
    """Print routes, flags, variables, ports, and what could not be read."""
    found = _read(source, dependencies)
    click.echo(json.dumps(found.to_json(), indent=1) if output == "json" else table(found))
    _end(found, failed=False)


@main.command()
@click.argument("source", type=_SOURCE)
@_WITH
def check(source: Path, dependencies: tuple[Path, ...]) -> None:
    """Compare with the catalogue: every route, dangerous flag, variable and unreadable place must be classified."""
    found = _read(source, dependencies)
    complaints = review(found, complete=bool(dependencies))
    for complaint in complaints:
        click.echo(complaint)
    click.echo(f"vLLM {found.version}: {len(complaints)} not classified, {len(found.routes)} routes read")
    _end(found, failed=bool(complaints))


@main.command()
@click.argument("old", type=_SOURCE)
@click.argument("new", type=_SOURCE)
def diff(old: Path, new: Path) -> None:
    """Print what NEW added, removed and moved."""
    before, after = _read(old, ()), _read(new, ())
    for line in differences(before, after):
        click.echo(line)
    _end(after if after.problems else before, failed=False)


def _read(source: Path, dependencies: tuple[Path, ...]) -> Findings:
    try:
        return read_source(source, dependencies)
    except SourceError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(_WRONG_INPUT)


def _end(found: Findings, *, failed: bool) -> None:
    for problem in found.problems:
        click.echo(f"error: {problem}", err=True)
    sys.exit(_WRONG_INPUT if found.problems else int(failed))


if __name__ == "__main__":
    main(prog_name="python -m securevllm_dev.catalogue")
