"""Fixtures of the end-to-end tests: one cluster with real nodes and a policy engine for the whole run."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from e2e import images
from e2e.cluster import Cluster, lifecycle, load, running
from e2e.workload import Cells, advertise_gpus, install_operator, new_namespace, workers

if TYPE_CHECKING:
    from e2e.cluster.kubectl import Kubectl

ARTEFACTS = Path(__file__).resolve().parents[1] / "build" / "e2e"


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Run a cluster with two nodes that know the project's images, or use the one that SVLLM_KUBECONFIG names."""
    if ours := _started_by_hand():
        images.load(ours, _tell)
        yield ours
        return
    with running(progress=_tell, node_count=2) as own:
        if own.provider != "kubeconfig":  # there, images are where its owner has put them
            images.load(own, _tell)
        yield own


@pytest.fixture(scope="session")
def kubectl(cluster: Cluster) -> Kubectl:
    """Give kubectl with an administrator's rights."""
    return cluster.kubectl


@pytest.fixture(scope="session")
def nodes(kubectl: Kubectl) -> list[str]:
    """Name two nodes that run pods."""
    found = workers(kubectl)
    assert len(found) >= 2, f"needs two nodes that run pods, found {found}"
    return found[:2]


@pytest.fixture(scope="session")
def operator(kubectl: Kubectl, nodes: list[str]) -> None:
    """Run the operator as its manifests install it, on nodes that say they have GPUs."""
    advertise_gpus(kubectl, nodes)
    install_operator(kubectl)


@pytest.fixture
def namespace(kubectl: Kubectl) -> Iterator[str]:
    """Give a namespace with a fresh name."""
    with new_namespace(kubectl) as name:
        yield name


@pytest.fixture
def other_namespace(kubectl: Kubectl) -> Iterator[str]:
    """Give a second one."""
    with new_namespace(kubectl, "other") as name:
        yield name


@pytest.fixture
def cells(request: pytest.FixtureRequest) -> Iterator[Cells]:
    """Collect what was tried; at the end every cell must be as expected, and the table is in build/e2e."""
    table = Cells(ARTEFACTS / f"{request.node.name}.txt")
    failed = request.session.testsfailed
    yield table
    table.write()
    if request.session.testsfailed == failed:  # otherwise there is a better reason already
        table.check_all()


def _started_by_hand() -> Cluster | None:
    """Find the cluster of `python -m e2e.cluster up` that SVLLM_KUBECONFIG names."""
    given = os.environ.get("SVLLM_KUBECONFIG")
    found = (load(name) for name in lifecycle.names()) if given else ()
    return next((cluster for cluster in found if cluster and str(cluster.kubeconfig) == given), None)


def _tell(line: str) -> None:
    # Past pytest's capture: a silent start of minutes looks like a hang.
    print(line, file=sys.__stderr__, flush=True)
