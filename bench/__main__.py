"""`python -m bench [NAME ...] [--write FILE]`: measure, print a table; exit code 1 when a goal is missed."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from bench import commands, control_plane, gateway, on_nodes, report
from e2e.cluster import ClusterError

if TYPE_CHECKING:
    from bench.report import Measured

BENCHMARKS: dict[str, tuple[Callable[[Path], Iterator[Measured]], tuple[str, ...]]] = {
    "operator": (control_plane.measure, control_plane.NOTES),
    "gateway": (gateway.measure, gateway.NOTES),
    "commands": (commands.measure, commands.NOTES),
    "nodes": (on_nodes.measure, on_nodes.NOTES),
}


def main(arguments: list[str]) -> int:
    """Run the named benchmarks, all when none is named."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Measure the operator and the gateway.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of: {', '.join(BENCHMARKS)}; default: all")
    parser.add_argument("--write", type=Path, metavar="FILE", help="also write a page, for example docs/performance.md")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(BENCHMARKS):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are: {', '.join(BENCHMARKS)}")
    names = list(options.names or BENCHMARKS)
    if lacking := on_nodes.lacking():
        if "nodes" in options.names:
            parser.error(f"nodes cannot be measured here: {lacking}")
        print(f"nodes are not measured: {lacking}")
        names = [name for name in names if name != "nodes"]
    load = os.getloadavg()
    began = time.monotonic()
    rows: list[Measured] = []
    notes: list[str] = []
    for name in names:
        measure, told = BENCHMARKS[name]
        notes += told
        with tempfile.TemporaryDirectory(prefix="bench-") as folder:
            for row in measure(Path(folder)):
                rows.append(row)
                print(f"{time.monotonic() - began:5.0f} s  {'  '.join(filter(None, row.cells()))}", flush=True)
    print(f"\n{report.table(rows)}\n\n{report.machine()}; load average {load[0]:.1f}")
    if options.write:
        before = options.write.read_text(encoding="utf-8") if options.write.exists() else ""
        options.write.write_text(report.page(rows, notes, load) + report.by_hand(before), encoding="utf-8")
        print(f"written: {options.write}")
    return 0 if all(row.met() for row in rows) else 1


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
