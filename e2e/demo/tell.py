"""What the person in front of the demo sees: steps, lines with the time since the start, tables."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from e2e.workload import until

T = TypeVar("T")

_WAIT = 240.0
_AGAIN = 5.0


class DemoError(Exception):
    """The demo cannot go on, or something was not as it has to be; the text says what."""


class Teller:
    """Prints steps and progress, with the time since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tty = sys.stdout.isatty()

    def step(self, text: str) -> None:
        """A new part of the demo."""
        print(f"\n{self._bold(f'== {text}')}", flush=True)

    def line(self, text: str = "") -> None:
        """Something that happened."""
        print(f"  {time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def text(self, text: str) -> None:
        """A block as it is."""
        print("\n".join(f"  {line}" for line in text.rstrip().splitlines()), flush=True)

    def plain(self, text: str) -> None:
        """A remark outside of any step."""
        print(text, flush=True)

    def until(self, look: Callable[[], T | None], what: str) -> T:
        """Wait until something is there, with a progress line every 5 s.

        Raises:
            DemoError: Not within four minutes.
        """
        began = told = time.monotonic()

        def looked() -> T | None:
            nonlocal told
            now = time.monotonic()
            if now - told > _AGAIN:
                told = now
                self.line(f"... waiting until {what} ({now - began:.0f} s)")
            return look()

        try:
            return until(looked, what, _WAIT)
        except AssertionError as error:
            raise DemoError(str(error)) from error

    def _bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self._tty else text


@dataclass
class Table:
    """Rows whose last column is what came of it; each has to be as expected.

    Attributes:
        header: Titles of the columns.
    """

    header: Sequence[str]
    _rows: list[tuple[str, ...]] = field(default_factory=list)
    _wrong: list[str] = field(default_factory=list)

    def add(self, cells: Sequence[str], *, found: object, expected: object) -> None:
        """Add a row; `found` and `expected` are compared, and shown only where they differ."""
        self._rows.append(tuple(cells))
        if found != expected:
            self._wrong.append(f"{' '.join(cells[:-1])}: {found} instead of {expected}")

    def show(self, tell: Teller) -> None:
        """Print it.

        Raises:
            DemoError: A row is not as expected; with all of these.
        """
        lines = [tuple(self.header), *self._rows]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        tell.text("\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines))
        if self._wrong:
            raise DemoError("; ".join(self._wrong))
