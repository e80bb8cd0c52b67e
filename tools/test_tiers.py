"""`make test`: run the tiers of tests, quick ones first, and sum up what ran, what failed and what could not run.

    python tools/test_tiers.py [TIER ...]

Every tier runs, also after a failed one. Output of a tier is in build/test/<tier>.log and is shown when it failed.
The last line is `N passed, N failed, N skipped` over all tiers; a check (the linter, one coverage limit) counts as one.
A tier that could not run is never a pass: it fails under CI=true, and is one skip with a warning elsewhere.
Exit code: 0 nothing failed, 1 something did, 2 wrong usage, 130 interrupted.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OUTPUT = ROOT / "build" / "test"
MEASURED = OUTPUT / "coverage"
BIN = Path(sys.executable).parent

PURE_CORE = ("api", "catalogue", "check", "render", "status", "topology", "context.py", "drift.py", "netpol.py")
"""What needs no I/O has no excuse: it is what `COVERAGE_LIMIT` is about. Paths in operator/securevllm."""
COVERAGE_LIMIT = 95
"""Percent of lines and branches."""

TERMINAL = sys.stdout.isatty()
PROGRESS_SECONDS = 0.5 if TERMINAL else 30.0
COLOURS = {"red": 31, "green": 32, "yellow": 33, "bold": 1} if TERMINAL and not os.environ.get("NO_COLOR") else {}


@dataclass(frozen=True)
class Tier:
    """A set of tests that is run and counted as one.

    Attributes:
        name: folder below tests/, or the name of a tier of checks.
        what: for people.
        workers: processes of pytest-xdist; 0 runs in pytest's own.
        seconds: after this it hangs and is ended.
        coverage: counts for the coverage of the pure core.
        cluster: needs a real kube-apiserver.
    """

    name: str
    what: str
    workers: int = 2
    seconds: int = 900
    coverage: bool = False
    cluster: bool = False


TIERS = (
    Tier("check", "format, lint, types, layers"),
    Tier("unit", "small pieces, no I/O but loopback", coverage=True),
    Tier("golden", "what is rendered, against files", coverage=True),
    Tier("coverage", f"pure core, at least {COVERAGE_LIMIT} %"),
    Tier("property", "reachability and invariants, generated specs"),
    Tier("chart", "chart and kustomize, by the real helm"),
    Tier("catalogue", "vLLM's own releases, read against the tables"),
    Tier("proof", "the gate and the prober: real sockets and network namespaces"),
    Tier("browser", "the page of explain in a real Chromium", workers=0),
    Tier("fake", "the stand-in for vLLM: every topology as processes"),
    Tier("gateway", "a real Envoy", workers=0),
    Tier("api", "a real kube-apiserver", workers=0, seconds=3600, cluster=True),
)

CHECKS: dict[str, Sequence[str]] = {
    "ruff format": ("ruff", "format", "--check", "."),
    "ruff check": ("ruff", "check", "--output-format", "concise", "."),
    "mypy": ("mypy",),
    "import-linter": ("lint-imports", "--no-cache"),
}


@dataclass
class Result:
    """What came of a tier. `skips` are reasons with their counts; `missing` says why it could not run."""

    passed: int = 0
    failed: int = 0
    skips: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    missing: str = ""
    log: Path | None = None

    @property
    def skipped(self) -> int:
        """Number of skipped tests."""
        return self.skips.total()


def main(names: list[str]) -> int:
    """Run the named tiers, all when none is named; returns the exit code."""
    unknown = set(names) - {tier.name for tier in TIERS}
    if unknown:
        print(f"error: no tier {', '.join(sorted(unknown))}; there are: {' '.join(tier.name for tier in TIERS)}")
        return 2
    tiers = [tier for tier in TIERS if not names or tier.name in names]
    shutil.rmtree(OUTPUT, ignore_errors=True)
    MEASURED.mkdir(parents=True)
    # A cold build of Kubernetes takes minutes on both cores: it gets what the quick tiers leave over.
    builder = _start_build() if any(tier.cluster for tier in tiers) else None
    results: dict[str, Result] = {}
    try:
        for tier in tiers:
            results[tier.name] = result = _run(tier, results, builder)
            _report(tier, result)
    except KeyboardInterrupt:
        print("interrupted: no result")
        return 130
    finally:
        if builder is not None:
            _end(builder)
    return _summary(results)


# -------------------------------------------------------------------------------------------------------------- tiers


def _run(tier: Tier, before: dict[str, Result], builder: subprocess.Popen[bytes] | None) -> Result:
    started = time.monotonic()
    if tier.name == "check":
        result = _commands(tier, CHECKS)
    elif tier.name == "coverage":
        result = _coverage(tier, before)
    elif builder is not None and tier.cluster and (problem := _await_build(builder)):
        result = Result(missing=problem)
    else:
        result = _pytest(tier)
    result.seconds = time.monotonic() - started
    return result


def _commands(tier: Tier, commands: dict[str, Sequence[str]]) -> Result:
    log = OUTPUT / f"{tier.name}.log"
    result = Result(log=log)
    for name, (program, *arguments) in commands.items():
        size = log.stat().st_size if log.exists() else 0
        code = _watch(tier, [str(BIN / program), *arguments], doing=name)
        if code == 0:
            result.passed += 1
            os.truncate(log, size)  # only what is wrong is worth reading
        else:
            result.failed += 1
            _append(log, f"{name}: exit code {code}, by hand: .venv/bin/{program} {' '.join(arguments)}\n")
    return result


def _pytest(tier: Tier) -> Result:
    report = OUTPUT / f"{tier.name}.xml"
    command = [str(BIN / "python"), "-m", "pytest", f"tests/{tier.name}", "--quiet", "--no-header", "--durations=5"]
    command += [f"--junit-xml={report}", f"--numprocesses={tier.workers}"]
    if tier.coverage:
        command += ["--cov", "--cov-report="]
    code = _watch(tier, command, env={"COVERAGE_FILE": str(MEASURED / tier.name)})
    result = _read_junit(report) if report.exists() else Result()
    result.log = log = OUTPUT / f"{tier.name}.log"
    if code not in {0, 1} or (code == 1 and not result.failed):
        # Nothing collected, a crash, interrupted: the report calls a test that was cut off passed, so none is believed.
        result.passed, result.failed = 0, max(1, result.failed)
        _append(log, f"{tier.name}: no result, pytest ended with exit code {code}\n")
    return result


def _coverage(tier: Tier, before: dict[str, Result]) -> Result:
    wanted = [other.name for other in TIERS if other.coverage]
    if any(name not in before or before[name].failed for name in wanted):
        return Result(missing=f"it is measured over {' and '.join(wanted)}, which did not both run through")
    env = {"COVERAGE_FILE": str(MEASURED / "all")}
    files = [str(MEASURED / name) for name in wanted]
    combined = _watch(tier, [str(BIN / "coverage"), "combine", "--quiet", "--keep", *files], env=env)
    if combined != 0:
        return Result(failed=1, log=OUTPUT / f"{tier.name}.log")
    include = ",".join(f"*/securevllm/{path if path.endswith('.py') else path + '/*'}" for path in PURE_CORE)
    return _commands(tier, {"coverage report": ("coverage", "report", f"--data-file={MEASURED / 'all'}",
        f"--include={include}", f"--fail-under={COVERAGE_LIMIT}")})  # fmt: skip


def _read_junit(report: Path) -> Result:
    result = Result()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - our own pytest wrote it a moment ago
        if case.find("failure") is not None or case.find("error") is not None:
            result.failed += 1
        elif (skipped := case.find("skipped")) is not None:
            result.skips[skipped.get("message") or "no reason given"] += 1
        else:
            result.passed += 1
    return result


# ---------------------------------------------------------------------------------------------------------- processes


def _start_build() -> subprocess.Popen[bytes]:
    with (OUTPUT / "build.log").open("wb") as log:
        command = ["nice", "-n", "10", str(BIN / "python"), "-m", "e2e.cluster", "build"]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _await_build(builder: subprocess.Popen[bytes]) -> str:
    """Wait for the programs of the cluster; returns why there are none, or nothing."""
    progress = Progress("api: building kube-apiserver and kube-controller-manager, once")
    while builder.poll() is None:
        progress.tell(_last_line(OUTPUT / "build.log"))
        time.sleep(0.2)
    progress.clear()
    return "" if builder.returncode == 0 else _last_line(OUTPUT / "build.log") or f"exit code {builder.returncode}"


def _watch(tier: Tier, command: Sequence[str], *, doing: str = "", env: dict[str, str] | None = None) -> int:
    """Run a command into the tier's log with a progress line; returns its exit code, -1 when it hung."""
    path = OUTPUT / f"{tier.name}.log"
    progress = Progress(f"{tier.name}: {doing or tier.what}")
    started = time.monotonic()
    with path.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
            env=os.environ | (env or {}), start_new_session=True,
        )  # fmt: skip
    try:
        while process.poll() is None:
            if time.monotonic() - started > tier.seconds:
                _append(path, f"{tier.name}: ended after {tier.seconds} s, it hangs\n")
                return -1
            progress.tell(_percent(path))
            time.sleep(0.1)
        return process.returncode
    finally:
        progress.clear()
        _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process that leads its own group, and what it started; no harm when it has ended by itself."""
    if process.poll() is not None:
        return
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        os.killpg(process.pid, number)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            continue
        return


class Progress:
    """One line that says what is being waited for and how long: rewritten on a terminal, rare elsewhere."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._told = time.monotonic()

    def tell(self, detail: str) -> None:
        """Show the line when it is time to."""
        now = time.monotonic()
        if now - self._told < PROGRESS_SECONDS:
            return
        self._told = now
        line = f"  {self._what}, {now - self._started:.0f} s{f' ({detail})' if detail else ''}"
        if TERMINAL:
            print(f"\r\033[K{line[: shutil.get_terminal_size().columns - 1]}", end="", flush=True)
        else:
            print(line, flush=True)

    def clear(self) -> None:
        """Remove the line from a terminal."""
        if TERMINAL:
            print("\r\033[K", end="", flush=True)


# ------------------------------------------------------------------------------------------------------------- output


def _report(tier: Tier, result: Result) -> None:
    told = f"{tier.name:9} {tier.what:45}"
    if result.missing:
        print(f"{told} {_paint('yellow', 'could not run')}: {result.missing}", flush=True)
        return
    counts = f"{result.passed:5} passed" + (f", {result.skipped} skipped" if result.skipped else "")
    if result.failed:
        counts += ", " + _paint("red", f"{result.failed} failed")
    print(f"{told} {counts}, {result.seconds:.1f} s", flush=True)
    if result.failed and result.log is not None and result.log.exists():
        print(result.log.read_text(encoding="utf-8", errors="replace").rstrip(), flush=True)


def _summary(results: dict[str, Result]) -> int:
    in_ci = os.environ.get("CI") == "true"
    not_run = {name: result.missing for name, result in results.items() if result.missing}
    total = Result(
        passed=sum(result.passed for result in results.values()),
        failed=sum(result.failed for result in results.values()) + (len(not_run) if in_ci else 0),
        seconds=sum(result.seconds for result in results.values()),
    )
    for result in results.values():
        total.skips += result.skips
    if total.skips:
        print(f"\n{_paint('bold', 'Skipped')}")
        for reason, count in total.skips.most_common():
            print(f"  {count} x {reason}")
    if not_run:
        print(f"\n{_paint('yellow', 'WARNING: NOT RUN, so nothing is known about it')}")
        for name, why in not_run.items():
            print(f"  {name}: {why}")
        if not in_ci:
            total.skips.update(not_run.values())
    failed = [name for name, result in results.items() if result.failed]
    if failed:
        print(f"\n{_paint('red', 'FAILED')}: {', '.join(failed)}; logs: build/test/<tier>.log")
    print(f"\n{len(results)} tiers, {total.seconds:.0f} s")
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return 1 if total.failed else 0


def _paint(colour: str, text: str) -> str:
    return f"\033[{COLOURS[colour]}m{text}\033[0m" if colour in COLOURS else text


def _lines(path: Path) -> Iterable[str]:
    return reversed(path.read_text(encoding="utf-8", errors="replace").splitlines()) if path.exists() else ()


def _last_line(path: Path) -> str:
    return next((line.strip() for line in _lines(path) if line.strip()), "")


def _percent(path: Path) -> str:
    """How far pytest says it is."""
    return next((found[1] for line in _lines(path) if (found := re.search(r"\[ *(\d+%)\]$", line))), "")


def _append(path: Path, text: str) -> None:
    with path.open("a", encoding="utf-8") as log:
        log.write(text)


if __name__ == "__main__":
    # Tiers lead process groups of their own: a runner that just died would leave them running.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main(sys.argv[1:]))
