"""`make test`: run the tiers of tests, quick ones first, and sum up what ran, what failed and what could not run.

    python tools/test_tiers.py [TIER ...]

Without names, all but those on nodes (`make e2e`, `make e2e-vllm`), which need root on Linux and half an hour of
building, once. Every tier runs, also after a failed one. Output of a tier is in build/test/<tier>.log and is shown when
it failed.
The last line is `N passed, N failed, N skipped` over all tiers; a check (the linter, one coverage limit) counts as one.
Tests on a real cluster wait for processes that share this machine with others: a few that only waited too long are
tried once more, by themselves, and what passes only then is named in the summary. Nothing else gets a second try: a
connection that should not have been is one too many.
A tier that could not run, or of nodes that skipped every test, is never a pass: it fails under CI=true or when it was
named, and is one skip with a warning elsewhere.
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
SECOND_TRIES = 12
"""More failed tests than this are no accident. The tests of a file share an operator, and may fail together."""
LATE = re.compile(r"\b(TooLate|TimeoutExpired)\b")
"""Errors of a test that waited in vain, and saw nothing wrong."""

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
        dist: what a worker takes at once: a test (`load`) or a file (`loadfile`).
        seconds: after this it hangs and is ended.
        coverage: counts for the coverage of the pure core.
        cluster: needs a real kube-apiserver.
        nodes: needs real nodes, or gigabytes of packages; runs only when it is named.
        folder: of its tests; `tests/<name>` when empty.
    """

    name: str
    what: str
    workers: int = 2
    dist: str = "load"
    seconds: int = 1800
    coverage: bool = False
    cluster: bool = False
    nodes: bool = False
    folder: str = ""


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
    Tier("api", "a real kube-apiserver", dist="loadfile", seconds=3600, cluster=True),
    Tier("rights", "the operator's: none without a test that uses it"),
    Tier("e2e", "real nodes and a policy engine", workers=0, seconds=2700, cluster=True, nodes=True, folder="e2e"),
    Tier("vllm", "the real vLLM, no GPU", workers=0, seconds=2700, cluster=True, nodes=True, folder="e2e/real_vllm"),
)

CHECKS: dict[str, Sequence[str]] = {
    "ruff format": ("ruff", "format", "--check", "."),
    "ruff check": ("ruff", "check", "--output-format", "concise", "."),
    "mypy": ("mypy",),
    "import-linter": ("lint-imports", "--no-cache"),
}


@dataclass
class Result:
    """What came of a tier.

    `names` are the tests that passed, if they are known; `late` those that failed because they waited in vain; `skips`
    are reasons with their counts; `flaky` are tests that passed at the second try only; `missing` says why the tier
    could not run; without `whole` it was cut off, and nothing is known of the tests that are not there.
    """

    passed: int = 0
    names: set[str] = field(default_factory=set)
    failures: list[str] = field(default_factory=list)
    late: set[str] = field(default_factory=set)
    skips: Counter[str] = field(default_factory=Counter)
    flaky: list[str] = field(default_factory=list)
    seconds: float = 0.0
    missing: str = ""
    whole: bool = True
    log: Path | None = None

    @property
    def failed(self) -> int:
        """Number of failed tests."""
        return len(self.failures)

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
    tiers = [tier for tier in TIERS if tier.name in names or not (names or tier.nodes)]
    MEASURED.mkdir(parents=True, exist_ok=True)
    for tier in tiers:  # what other tiers left stays: `make e2e` comes after `make test`
        for path in OUTPUT.glob(f"{tier.name}.*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    # A cold build of Kubernetes takes minutes on both cores: it gets what the quick tiers leave over.
    what = "deps" if any(tier.nodes for tier in tiers) else "build"
    builder = _start_build(what) if any(tier.cluster for tier in tiers) else None
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
    return _summary(results, missing_fails=bool(names) or os.environ.get("CI") == "true")


# -------------------------------------------------------------------------------------------------------------- tiers


def _run(tier: Tier, before: dict[str, Result], builder: subprocess.Popen[bytes] | None) -> Result:
    started = time.monotonic()
    if tier.name == "check":
        result = _commands(tier, CHECKS)
    elif tier.name == "coverage":
        result = _coverage(tier, before)
    elif tier.name == "rights":
        result = _rights(tier, before)
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
            result.failures.append(name)
            _append(log, f"{name}: exit code {code}, by hand: .venv/bin/{program} {' '.join(arguments)}\n")
    return result


def _pytest(tier: Tier) -> Result:
    command = [str(BIN / "python"), "-m", "pytest", tier.folder or f"tests/{tier.name}", "--quiet", "--no-header"]
    command += ["--durations=5", "-o", f"cache_dir={OUTPUT / tier.name}.cache"]
    # Workers would share somebody's own cluster, and each of them thinks that it is alone there.
    workers = 0 if tier.cluster and os.environ.get("SVLLM_KUBECONFIG") else tier.workers
    several = [f"--numprocesses={workers}", *((f"--dist={tier.dist}",) if workers else ())]
    result = _pytest_once(tier, [*command, *several, *(("--cov", "--cov-report=") if tier.coverage else ())])
    if tier.cluster and result.whole and 0 < result.failed <= SECOND_TRIES and result.late == {*result.failures}:
        _append(OUTPUT / f"{tier.name}.log", f"\n{tier.name}: second try of what failed\n")
        second = _pytest_once(tier, [*command, "--numprocesses=0", "--last-failed", "--last-failed-no-failures=none"])
        if second.whole:
            result.flaky = [name for name in result.failures if name in second.names]
            result.failures = [name for name in result.failures if name not in second.names]
            result.passed += len(result.flaky)
    if tier.nodes and result.skips and not (result.passed or result.failures):
        result = Result(missing=next(iter(result.skips)))
    return result


def _pytest_once(tier: Tier, command: list[str]) -> Result:
    report, log = OUTPUT / f"{tier.name}.xml", OUTPUT / f"{tier.name}.log"
    report.unlink(missing_ok=True)
    env = {"COVERAGE_FILE": str(MEASURED / tier.name), "SVLLM_RIGHTS": str(OUTPUT / f"{tier.name}.rights")}
    code = _watch(tier, [*command, f"--junit-xml={report}"], env=env)
    result = _read_junit(report) if report.exists() else Result()
    result.log = log
    if code not in {0, 1} or (code == 1 and not result.failed):
        # Nothing collected, a crash, interrupted: the report calls a test that was cut off passed, so none is believed.
        result.passed, result.whole = 0, False
        result.failures = result.failures or [f"pytest ended with exit code {code}"]
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
        return Result(failures=["coverage combine"], log=OUTPUT / f"{tier.name}.log")
    include = ",".join(f"*/securevllm/{path if path.endswith('.py') else path + '/*'}" for path in PURE_CORE)
    return _commands(tier, {"coverage report": ("coverage", "report", f"--data-file={MEASURED / 'all'}",
        f"--include={include}", f"--fail-under={COVERAGE_LIMIT}")})  # fmt: skip


def _rights(tier: Tier, before: dict[str, Result]) -> Result:
    used = OUTPUT / "api.rights"
    if "api" not in before or before["api"].failed or before["api"].missing:
        return Result(missing="what is used is seen in the api tier, which did not run through")
    if not used.exists():
        return Result(missing="the cluster of the api tier keeps no audit log that is ours to read")
    return _commands(tier, {"rights": ("python", "-m", "tests.api.rights", str(used))})


def _read_junit(report: Path) -> Result:
    result, wrong = Result(), set()
    for case in ET.parse(report).iter("testcase"):  # noqa: S314 - our own pytest wrote it a moment ago
        name = f"{case.get('classname')}::{case.get('name')}"
        problems = [*case.iter("failure"), *case.iter("error")]
        if problems:
            if name not in result.failures:
                result.failures.append(name)
            if not all(LATE.search(problem.get("message") or "") for problem in problems):
                wrong.add(name)
        elif (skipped := case.find("skipped")) is not None:
            result.skips[skipped.get("message") or "no reason given"] += 1
        else:
            result.names.add(name)
    result.names -= {*result.failures}  # a test whose clean-up failed stands there twice
    result.passed = len(result.names)
    result.late = {*result.failures} - wrong
    return result


# ---------------------------------------------------------------------------------------------------------- processes


def _start_build(what: str) -> subprocess.Popen[bytes]:
    with (OUTPUT / "build.log").open("wb") as log:
        command = [str(BIN / "python"), "-m", "e2e.cluster", what, "--background"]
        return subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)


def _await_build(builder: subprocess.Popen[bytes]) -> str:
    """Wait for the programs of clusters; returns why there are none, or nothing."""
    progress = Progress("building the programs of Kubernetes, once")
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
    if result.flaky:
        counts += f", {_paint('yellow', f'{len(result.flaky)} of them at the second try')}"
    if result.failed:
        counts += ", " + _paint("red", f"{result.failed} failed")
    print(f"{told} {counts}, {result.seconds:.1f} s", flush=True)
    if (result.failed or result.flaky) and result.log is not None and result.log.exists():
        print(result.log.read_text(encoding="utf-8", errors="replace").rstrip(), flush=True)


def _summary(results: dict[str, Result], *, missing_fails: bool) -> int:
    not_run = {name: result.missing for name, result in results.items() if result.missing}
    total = Result(failures=list(not_run) if missing_fails else [])
    for result in results.values():
        total.passed += result.passed
        total.failures += result.failures
        total.seconds += result.seconds
        total.skips += result.skips
        total.flaky += result.flaky
    _list(_paint("bold", "Skipped"), [f"{count} x {reason}" for reason, count in total.skips.most_common()])
    flaky = "WARNING: PASSED ONLY AT THE SECOND TRY, a defect of the test or of what it tests"
    _list(_paint("yellow", flaky), total.flaky)
    warning = "WARNING: NOT RUN, so nothing is known about it"
    _list(_paint("yellow", warning), [f"{name}: {why}" for name, why in not_run.items()])
    if not missing_fails:
        total.skips.update(not_run.values())
    _list(f"{_paint('red', 'FAILED')}; logs: build/test/<tier>.log", total.failures)
    print(f"\n{len(results)} tiers, {total.seconds:.0f} s")
    print(f"{total.passed} passed, {total.failed} failed, {total.skipped} skipped", flush=True)
    return 1 if total.failed else 0


def _list(title: str, lines: Sequence[str]) -> None:
    if lines:
        print("\n  ".join([f"\n{title}", *lines]))


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
