"""The frame of the project agrees with itself: lock files, version, manifests."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from e2e.cluster.daemon import ProcessIdentity
from securevllm import __version__
from tests.api.kube import eventually

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
RUNTIME = PROJECT["project"]["dependencies"]
DEVELOPMENT = PROJECT["dependency-groups"]["dev"]


def _pins(name: str) -> dict[str, str]:
    """Name to version; every pin must have a hash."""
    text = (ROOT / "requirements" / name).read_text(encoding="utf-8")
    entries = re.split(r"\n(?=\S)", re.sub(r"^#.*\n", "", text, flags=re.MULTILINE).strip())
    found: dict[str, str] = {}
    for entry in entries:
        match = re.match(r"([A-Za-z0-9._-]+)==([^\s;]+)", entry)
        assert match is not None, f"{name}: not a pin: {entry.splitlines()[0]}"
        assert "--hash=sha256:" in entry, f"{name}: {match[1]} has no hash"
        found[canonicalize_name(match[1])] = match[2]
    return found


@pytest.mark.parametrize(("lock", "wanted"), [("operator.lock", RUNTIME), ("dev.lock", RUNTIME + DEVELOPMENT)])
def test_lock_files_are_those_of_pyproject(lock: str, wanted: list[str]) -> None:
    pins = _pins(lock)
    for text in wanted:
        requirement = Requirement(text)
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is not in {lock}: make lock"
        assert requirement.specifier.contains(version, prereleases=True), f"{lock} has {version}, wanted {text}"


def test_what_is_tested_is_what_the_image_holds() -> None:
    assert _pins("operator.lock").items() <= _pins("dev.lock").items()


def test_manifests_and_pages_are_of_this_version() -> None:
    base = yaml.safe_load((ROOT / "manifests" / "base" / "kustomization.yaml").read_text(encoding="utf-8"))
    assert [image["newTag"] for image in base["images"]] == [__version__]
    example = ROOT / "manifests" / "argocd" / "examples" / "operator.yaml"
    source = yaml.safe_load(example.read_text(encoding="utf-8"))["spec"]["source"]
    assert source["targetRevision"] == f"v{__version__}", "a tag of the repository, which has the v"
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), ROOT / "operator" / "Dockerfile"]
    told = {
        path.name: set(
            re.findall(r"secure-vllm-operator(?::| --version )(v?\d[\w.]*)", path.read_text(encoding="utf-8"))
        )
        for path in pages
    }
    assert {"getting-started.md", "install.md", "Dockerfile"} <= {name for name, found in told.items() if found}
    assert set().union(*told.values()) == {__version__}
    short = __version__.rpartition(".")[0]
    assert f"\nVersion {short}, alpha" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_what_is_not_released_has_a_version_of_its_own() -> None:
    """A node that has an image of that name already would keep it: `imagePullPolicy: IfNotPresent`."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    news, last = re.split(r"^## \[(\d[^\]]*)\]", text, flags=re.MULTILINE)[:2]
    waiting = news.partition("## [Unreleased]")[2].strip()
    assert Version(__version__) > Version(last) if waiting else __version__ == last


def test_both_installations_have_the_same_parts() -> None:
    parts = [
        yaml.safe_load((ROOT / "manifests" / folder / "kustomization.yaml").read_text(encoding="utf-8"))["resources"]
        for folder in ("install", "install-namespaced")
    ]
    assert parts[0] == parts[1]


@pytest.mark.parametrize("beside", [True, False], ids=["beside the build of nodes", "alone"])
def test_a_ci_run_that_is_ended_ends_its_build_of_argo_cd(tmp_path: Path, beside: bool) -> None:
    """The part of .ci/run, with programs that do nothing: what it waits for, as it does for minutes, ends with it."""
    [part] = re.findall(
        r"^  (\{\n.*?^  \} >build/argocd.log 2>&1 &)$", (ROOT / ".ci" / "run").read_text(), re.DOTALL | re.MULTILINE
    )
    (tmp_path / "build").mkdir()
    waited = tmp_path / "waited"
    for name in (".venv/bin/python", "tail"):
        program = tmp_path / name
        program.parent.mkdir(parents=True, exist_ok=True)
        program.write_text(f"#!/bin/sh\necho $$ >{waited}.new\nmv {waited}.new {waited}\nexec sleep 600\n")
        program.chmod(0o755)
    command = ["bash", "-c", f"set -euo pipefail\nbuilder={os.getpid() if beside else ''}\n{part}\necho $!"]
    environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    bash = subprocess.run(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, check=True)  # noqa: S603 - ours
    eventually(waited.exists)
    identity = ProcessIdentity.of(int(waited.read_text()))
    try:
        os.kill(int(bash.stdout), signal.SIGTERM)
        eventually(lambda: not identity.alive())
    finally:
        identity.stop(grace=0)
