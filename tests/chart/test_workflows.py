"""`.github/` as far as a program can tell without the forge: pinned, few rights, and about files that exist.

The workflows themselves run only there; nothing here shows that they pass.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.actionlint import find_or_build
from e2e.cluster.errors import ClusterError
from tests.chart.programs import CHART, ROOT

FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yaml"))
NAMES = [path.stem for path in WORKFLOWS]


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job["steps"]]


def test_zizmor_finds_nothing() -> None:
    program = Path(sys.executable).parent / "zizmor"
    command = [str(program), "--offline", "--persona=pedantic", "--no-progress", str(FORGE)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - fixed
    assert done.returncode == 0, done.stdout
    assert "No findings" in done.stdout, done.stdout


def test_actionlint_finds_nothing() -> None:
    try:
        program = find_or_build()
    except ClusterError as error:
        pytest.skip(str(error))
    command = [str(program), "-no-color", *map(str, WORKFLOWS)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)  # noqa: S603 - fixed
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_actions_are_pinned_by_commit_and_say_their_release(path: Path) -> None:
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    assert uses
    for action in uses:
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_an_action_is_pinned_to_one_commit_everywhere() -> None:
    pins = {use for path in WORKFLOWS for use in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))}
    assert len({pin.partition("@")[0] for pin in pins}) == len(pins)


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_no_right_is_given_to_a_whole_workflow_and_only_a_release_may_write(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {}
    for job in content["jobs"].values():
        written = {name for name, right in job["permissions"].items() if right == "write"}
        assert (written != set()) is (path.stem == "release")


def test_the_release_finds_in_values_what_it_replaces() -> None:
    """`sed` says nothing when a pattern is not there any more."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    scripts = [step.get("run", "") for step in steps(FORGE / "workflows" / "release.yaml")]
    (script,) = [run for run in scripts if "helm package" in run]
    patterns = [pattern.replace('\\"', '"') for pattern in re.findall(r"s\|(.*?)\|", script)]
    assert len(patterns) == 2
    for pattern in patterns:
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1, pattern
