"""`.github/` as far as a program can tell without the forge: pinned, few rights, and about files that exist.

The workflows themselves run only there; nothing here shows that they pass.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.actionlint import find_or_build
from e2e.cluster.errors import ClusterError
from securevllm import __version__
from tests.chart.programs import CHART, KUBERNETES, NAME, ROOT, Helm

FORGE = ROOT / ".github"
WORKFLOWS = sorted((FORGE / "workflows").glob("*.yaml"))
NAMES = [path.stem for path in WORKFLOWS]
RELEASE = FORGE / "workflows" / "release.yaml"


def steps(path: Path) -> list[dict[str, Any]]:
    jobs = yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"]
    return [step for job in jobs.values() for step in job.get("steps", ())]


def actions(path: Path) -> list[str]:
    """What a workflow takes from elsewhere."""
    uses = re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    return [action for action in uses if not action.startswith("./.github/workflows/")]


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
    assert actions(path)
    for action in actions(path):
        assert re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action), action


def test_an_action_is_pinned_to_one_commit_everywhere() -> None:
    pins = {action for path in WORKFLOWS for action in actions(path)}
    assert len({pin.partition("@")[0] for pin in pins}) == len(pins)


@pytest.mark.parametrize("path", WORKFLOWS, ids=NAMES)
def test_no_right_is_given_to_a_whole_workflow_and_only_a_release_may_write(path: Path) -> None:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert content["permissions"] == {}
    for name, job in content["jobs"].items():
        written = {right for right, given in job["permissions"].items() if given == "write"}
        assert (written != set()) is (name == "release" and path.stem == "release")


def test_a_release_waits_for_all_tests_on_its_own_commit() -> None:
    jobs = yaml.safe_load(RELEASE.read_text(encoding="utf-8"))["jobs"]
    called = {job.get("uses", "").rpartition("/")[2]: name for name, job in jobs.items()}
    others = {path.name for path in WORKFLOWS} - {RELEASE.name}
    assert others <= called.keys()
    # `needs` lets a job begin when those before it have passed, unless `if` says otherwise.
    assert {called[name] for name in others} == {*jobs["release"]["needs"]}
    assert not any("if" in job or "continue-on-error" in job for job in jobs.values())
    for name in others:
        workflow = yaml.load((FORGE / "workflows" / name).read_text(encoding="utf-8"), Loader=yaml.BaseLoader)  # noqa: S506 - strings only, so that `on` is no truth value
        assert "workflow_call" in workflow["on"]
        ends = [line for job in workflow["jobs"].values() for line in ("if", "continue-on-error") if line in job]
        assert ends == [], "a job that was left out counts as passed"


def script(words: str) -> str:
    """The one script of the release in which these words are."""
    scripts = [step.get("run", "") for step in steps(RELEASE)]
    (found,) = [run for run in scripts if words in run]
    return str(found)


def run(text: str, folder: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a script as the forge does."""
    command = ["/bin/bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", text]
    env = {"PATH": os.environ["PATH"]} | env
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False, timeout=120)  # noqa: S603 - ours


@pytest.mark.parametrize(
    "tag", ["v9.9.9", f"v{__version__}0", f"v{__version__.rpartition('.')[0]}", f"{__version__}-rc1", "v.*", "v"]
)
def test_a_tag_that_is_not_the_version_is_no_release(tag: str, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / CHART.relative_to(ROOT))
    (tmp_path / "CHANGELOG.md").write_text(f"## [{__version__}]\n", encoding="utf-8")
    assert run(script("CHANGELOG.md"), tmp_path, TAG=f"v{__version__}").returncode == 0
    assert run(script("CHANGELOG.md"), tmp_path, TAG=tag).returncode != 0


def test_the_image_is_pushed_under_the_name_that_chart_and_manifests_ask_for(tmp_path: Path) -> None:
    outputs = tmp_path / "outputs"
    text = script("GITHUB_OUTPUT")
    assert run(text, tmp_path, OWNER="Us", TAG=f"v{__version__}", GITHUB_OUTPUT=str(outputs)).returncode == 0
    assert outputs.read_text(encoding="utf-8").splitlines() == ["owner=us", f"version={__version__}"]
    (pushed,) = [step["with"]["tags"] for step in steps(RELEASE) if "tags" in step.get("with", {})]
    name, tag = pushed.rsplit(":", 1)
    assert name.endswith("/secure-vllm-operator")
    assert tag == "${{ steps.names.outputs.version }}"


def test_a_version_without_an_entry_in_the_changelog_is_no_release(tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / CHART.relative_to(ROOT))
    (tmp_path / "CHANGELOG.md").write_text("## [Unreleased]\n", encoding="utf-8")
    assert run(script("CHANGELOG.md"), tmp_path, TAG=f"v{__version__}").returncode != 0


def test_the_packed_chart_has_the_image_by_its_digest(helm: Helm, tmp_path: Path) -> None:
    shutil.copytree(CHART, tmp_path / CHART.relative_to(ROOT))
    pack = script("helm package").partition("helm registry login")[0]
    digest = f"sha256:{'0123456789abcdef' * 4}"
    path = f"{helm.program.parent}:{os.environ['PATH']}"
    env = {"PATH": path, "HOME": str(tmp_path), "REGISTRY": "registry.example.com", "OWNER": "us", "DIGEST": digest}
    done = run(pack, tmp_path, **env)
    assert done.returncode == 0, done.stderr
    (packed,) = (tmp_path / "build").iterdir()
    objects = [*filter(None, yaml.safe_load_all(helm("template", NAME, str(packed), "--kube-version", KUBERNETES)))]
    (deployment,) = [obj for obj in objects if obj["kind"] == "Deployment"]
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    image = f"registry.example.com/us/secure-vllm-operator@{digest}"
    assert container["image"] == image
    assert {"name": "SECUREVLLM_OPERATOR_IMAGE", "value": image} in container["env"]
    # A chart whose values have another form is not packed without the digest.
    assert run(pack, tmp_path, **env).returncode == 0
    (tmp_path / CHART.relative_to(ROOT) / "values.yaml").write_text("image: {}\n", encoding="utf-8")
    assert run(pack, tmp_path, **env).returncode != 0


def test_the_release_finds_in_values_what_it_replaces() -> None:
    """`sed` says nothing when a pattern is not there any more."""
    text = (CHART / "values.yaml").read_text(encoding="utf-8")
    patterns = [pattern.replace('\\"', '"') for pattern in re.findall(r"s\|(.*?)\|", script("helm package"))]
    assert len(patterns) == 2
    for pattern in patterns:
        assert len(re.findall(pattern, text, re.MULTILINE)) == 1, pattern
