"""`make test` itself: it runs on after a failure, counts right, and never takes a tier without a result for a pass."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tools import test_tiers as runner

Run = Callable[..., tuple[int, list[str]]]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Run tiers whose only test file is given as text; gives exit code and printed lines."""
    monkeypatch.setattr(runner, "ROOT", tmp_path)
    monkeypatch.setattr(runner, "OUTPUT", tmp_path / "build")
    monkeypatch.setattr(runner, "MEASURED", tmp_path / "build" / "coverage")
    monkeypatch.delenv("CI", raising=False)
    # Half of the time of so small a run is plugins that it does not need.
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_ADDOPTS", "-p xdist")

    def running(
        names: list[str] | None = None, *, cluster: str = "", nodes: str = "", seconds: int = 60, **tiers: str
    ) -> tuple[int, list[str]]:
        for name, text in tiers.items():
            folder = tmp_path / "tests" / name
            folder.mkdir(parents=True)
            (folder / f"test_{name}.py").write_text(text, encoding="utf-8")
        monkeypatch.setattr(
            runner,
            "TIERS",
            tuple(
                runner.Tier(name, name, workers=0, seconds=seconds, cluster=name == cluster, nodes=name == nodes)
                for name in tiers
            ),
        )
        code = runner.main(names or [])
        return code, capfd.readouterr().out.splitlines()

    return running


PASSES = "def test_a(): pass\ndef test_b(): pass\n"
FAILS = "def test_a(): assert 1 == 2\n"
SKIPS = "import pytest\ndef test_a(): pytest.skip('no envoy')\n"


def test_all_tiers_run_and_are_summed_up(run: Run) -> None:
    code, lines = run(first=FAILS, second=PASSES, third=SKIPS)
    assert code == 1
    assert lines[-1] == "2 passed, 1 failed, 1 skipped"
    assert any("assert 1 == 2" in line for line in lines), "the output of a failed tier is shown"
    assert any("1 x" in line and "no envoy" in line for line in lines), "a skip is told with its reason"


def test_only_the_named_tiers_run(run: Run) -> None:
    code, lines = run(["second"], first=FAILS, second=PASSES)
    assert (code, lines[-1]) == (0, "2 passed, 0 failed, 0 skipped")


def test_a_name_that_is_no_tier_is_wrong_usage(run: Run) -> None:
    code, lines = run(["scond"], second=PASSES)
    assert code == 2
    assert "there are: second" in lines[-1]


@pytest.mark.parametrize("text", ["", "import no_such_module\n"], ids=["no test", "not importable"])
def test_a_tier_without_a_test_fails(run: Run, text: str) -> None:
    code, lines = run(empty=text)
    assert (code, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")


ONCE = """
from pathlib import Path
class TooLate(AssertionError): pass
def first():
    seen = Path(__file__).with_name("seen")
    again = seen.exists()
    seen.touch()
    return not again
def test_a(): pass
def test_b():
    if first():
        raise TooLate("the first time")
"""
SKIPPED_LATER = """
    import pytest
    if not first():
        pytest.skip("gone")
    else:"""
LATE = "class TooLate(AssertionError): pass\ndef test_late(): raise TooLate('never')\n"


def test_what_fails_on_a_cluster_is_tried_once_more_and_told(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "_start_build", lambda _what: None)
    code, lines = run(cluster="api", api=ONCE)
    assert (code, lines[-1]) == (0, "2 passed, 0 failed, 0 skipped")
    assert any("SECOND TRY" in line for line in lines)
    assert "  tests.api.test_api::test_b" in lines
    assert any("the first time" in line for line in lines), "what it failed with is shown"


@pytest.mark.parametrize(
    ("text", "last"),
    [
        (LATE, "0 passed, 1 failed, 0 skipped"),
        (
            "".join(LATE.replace("_late", f"_{i}") for i in range(runner.SECOND_TRIES + 1)) + PASSES,
            f"2 passed, {runner.SECOND_TRIES + 1} failed, 0 skipped",
        ),
        (ONCE.replace("raise TooLate(", "raise AssertionError("), "1 passed, 1 failed, 0 skipped"),
        (ONCE + FAILS.replace("_a", "_c"), "1 passed, 2 failed, 0 skipped"),
        (ONCE.replace("    if first():", SKIPPED_LATER), "1 passed, 1 failed, 0 skipped"),
    ],
    ids=["again", "too many", "not late: something was wrong", "one of them was wrong", "skipped at the second try"],
)
def test_the_second_try_does_not_hide_a_failure(
    run: Run, monkeypatch: pytest.MonkeyPatch, text: str, last: str
) -> None:
    monkeypatch.setattr(runner, "_start_build", lambda _what: None)
    code, lines = run(cluster="api", api=text)
    assert (code, lines[-1]) == (1, last)
    assert not any("SECOND TRY" in line for line in lines)


def test_real_nodes_that_skip_every_test_could_not_run(run: Run) -> None:
    code, lines = run(["e2e"], nodes="e2e", e2e=SKIPS)
    assert (code, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")
    assert any("could not run" in line and "no envoy" in line for line in lines)


def test_a_test_without_a_cluster_has_one_try(run: Run) -> None:
    code, lines = run(unit=ONCE)
    assert (code, lines[-1]) == (1, "1 passed, 1 failed, 0 skipped")


def test_a_tier_that_hangs_is_ended_and_fails(run: Run) -> None:
    code, lines = run(seconds=3, hangs="import time\ndef test_a(): time.sleep(60)\n")
    assert (code, lines[-1]) == (1, "0 passed, 1 failed, 0 skipped")
    assert any("ended after 3 s, it hangs" in line for line in lines)


@pytest.mark.parametrize(
    ("ci", "code", "last"), [("true", 1, "2 passed, 1 failed, 0 skipped"), ("", 0, "2 passed, 0 failed, 1 skipped")]
)
def test_a_tier_that_cannot_run_is_never_a_pass(
    run: Run, monkeypatch: pytest.MonkeyPatch, ci: str, code: int, last: str
) -> None:
    def no_go(_what: str) -> subprocess.Popen[bytes]:
        with (runner.OUTPUT / "build.log").open("wb") as log:
            return subprocess.Popen(
                ["/bin/sh", "-c", "echo error: no usable Go; exit 1"], stdout=log, start_new_session=True
            )

    monkeypatch.setattr(runner, "_start_build", no_go)
    monkeypatch.setenv("CI", ci)
    got, lines = run(cluster="api", unit=PASSES, api=PASSES)
    assert (got, lines[-1]) == (code, last)
    assert any("could not run" in line and "no usable Go" in line for line in lines)
    assert any("NOT RUN" in line for line in lines)


def test_coverage_is_not_measured_over_half_of_the_tests(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tiers = (runner.Tier("unit", "", workers=0, coverage=True), runner.Tier("coverage", ""))
    monkeypatch.setattr(runner, "TIERS", tiers)
    result = runner._coverage(tiers[1], {"unit": runner.Result(passed=1, failures=["test_a"])})
    assert "did not" in result.missing
    assert (result.passed, result.failed) == (0, 0)


@pytest.mark.parametrize(
    "before", [{}, {"api": runner.Result(passed=1, failures=["test_a"])}], ids=["not run", "failed"]
)
def test_rights_are_not_judged_by_half_of_the_tests(before: dict[str, runner.Result]) -> None:
    result = runner._rights(runner.Tier("rights", ""), before)
    assert "did not run through" in result.missing


def test_rights_without_an_audit_log_are_not_judged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "OUTPUT", tmp_path)
    result = runner._rights(runner.Tier("rights", ""), {"api": runner.Result(passed=1)})
    assert "no audit log" in result.missing
