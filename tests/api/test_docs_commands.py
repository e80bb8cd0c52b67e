"""The commands of the installation pages, word by word, on a real API server; a hollow node counts pods as ready."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from e2e.cluster import Cluster, running
from e2e.cluster.hollow import hollow_node
from tests.api.kube import Kube
from tests.api.operator_process import ROOT, OperatorProcess
from tests.chart.programs import KUBECTL, Helm
from tests.pages import SEQUENCES, blocks

pytestmark = pytest.mark.cluster

DOCS = ROOT / "docs"


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A checkout whose manifests a command may change."""
    for part in ("charts", "crds", "manifests"):
        shutil.copytree(ROOT / part, tmp_path / part)
    return tmp_path


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    with running() as own:
        yield own


def run(text: str, checkout: Path, cluster: Cluster, helm: Helm) -> None:
    programs = checkout / "bin"
    programs.mkdir(exist_ok=True)
    for name, program in (("helm", helm.program), ("kubectl", KUBECTL)):
        if not (programs / name).exists():
            (programs / name).symlink_to(program)
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "HOME": str(checkout / "home"),
        "KUBECONFIG": str(cluster.kubeconfig),
    }
    done = subprocess.run(  # noqa: S603 - the documentation's own text
        ["/bin/sh", "-eu", "-c", text], cwd=checkout, env=env, capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, f"{text}\n{done.stdout}{done.stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("pages", SEQUENCES, ids="-".join)
def test_commands_of_the_page_work_in_their_order(
    pages: tuple[str, ...], checkout: Path, cluster: Cluster, helm: Helm
) -> None:
    first, *rest = blocks(DOCS / pages[0])
    if len(pages) > 1:
        # Somebody who upgrades has installed and changed something once.
        rest = [
            first.replace("helm install", "helm upgrade").replace(" --create-namespace", ""),
            *blocks(DOCS / pages[1]),
        ]
    with ExitStack() as stack:
        kube = stack.enter_context(closing(Kube(cluster.kubeconfig)))
        stack.enter_context(hollow_node(cluster))
        run(first, checkout, cluster, helm)
        # The operator itself: with the rights of the installation, as its pod would run.
        stack.enter_context(OperatorProcess(cluster, kube, checkout / "operator"))
        for text in rest:
            run(text, checkout, cluster, helm)
