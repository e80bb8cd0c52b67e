"""What was measured, against what was wanted, as a table for a terminal and as a page."""

from __future__ import annotations

import math
import os
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

BY_HAND = "<!-- not generated from here on -->"
"""Divides a page."""

HEADER = ("what", "n", "p50", "p99", "unit", "goal", "")


@dataclass(frozen=True)
class Measured:
    """One row.

    Attributes:
        what: in a few words.
        values: at least one.
        unit: of the values, for example ``ms``.
        p50_goal: the median should not be above; None: no goal.
        p99_goal: the 99th percentile should not be above; None: no goal.
    """

    what: str
    values: tuple[float, ...]
    unit: str
    p50_goal: float | None = None
    p99_goal: float | None = None

    def percentile(self, percent: float) -> float:
        """Nearest rank: a value that was measured, never one in between."""
        ordered = sorted(self.values)
        return ordered[max(0, math.ceil(percent / 100 * len(ordered)) - 1)]

    def met(self) -> bool:
        """Whether every goal is met."""
        goals = ((50, self.p50_goal), (99, self.p99_goal))
        return all(goal is None or self.percentile(percent) <= goal for percent, goal in goals)

    def cells(self) -> tuple[str, ...]:
        """Texts under ``HEADER``."""
        goals = [f"{goal:g}" if goal is not None else "-" for goal in (self.p50_goal, self.p99_goal)]
        wanted = (self.p50_goal, self.p99_goal) != (None, None)
        return (
            self.what,
            str(len(self.values)),
            f"{self.percentile(50):.3g}",
            f"{self.percentile(99):.3g}",
            self.unit,
            " / ".join(goals) if wanted else "",
            ("met" if self.met() else "MISSED") if wanted else "",
        )


def table(rows: Sequence[Measured]) -> str:
    """Aligned columns."""
    lines = [HEADER, *(row.cells() for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(HEADER))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def page(rows: Sequence[Measured], notes: Sequence[str], load: Sequence[float]) -> str:
    """A page in Markdown.

    Args:
        rows: in order.
        notes: how things were measured, one line each.
        load: load averages (1, 5, 15 minutes) before the first benchmark: what else the machine did.
    """
    lines = [HEADER, tuple("-" * 3 for _ in HEADER), *(row.cells() for row in rows)]
    told = "\n".join(f"* {note}" for note in notes)
    cells = "\n".join(f"| {' | '.join(line)} |" for line in lines)
    return f"""# Performance

Written by `python -m bench --write docs/performance.md` on {datetime.now(UTC):%Y-%m-%d %H:%M} UTC.

{machine()}; load average before it began: {", ".join(f"{value:.1f}" for value in load)}. API server, etcd, controllers,
operator and Envoy share these processors, so the figures are upper bounds of the operator's own.

{cells}

{told}
"""


def by_hand(page: str) -> str:
    """Return what somebody wrote below the generated part of a page; it is kept."""
    _, mark, below = page.partition(BY_HAND)
    return f"\n{mark}{below}" if mark else ""


def machine() -> str:
    """Processor, memory and Python of this machine, in a sentence."""
    info = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    models = [line.partition(":")[2].strip() for line in info.splitlines() if line.startswith("model name")]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    processor = models[0] if models else platform.machine()
    return f"{os.cpu_count()} processors ({processor}), {total:.0f} GiB, Python {platform.python_version()}"
