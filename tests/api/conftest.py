"""Fixtures of the API tests: one real control plane for the whole run, shared by all xdist workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest

from e2e.cluster import Cluster, load, running, start, stop
from e2e.cluster.paths import locked
from tests.api.kube import Kube
from tests.api.lab import Lab, started
from tests.api.operator_process import OperatorProcess, install, new_namespace


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Run a cluster for the session. Tests take namespaces of their own, and never stop its API server."""
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID")
    if run is None:
        with running(progress=_tell) as own:
            yield own
        return
    # 0.5 GB each: workers share one. The last that leaves stops it; if they are killed, it belongs to the controller
    # process and the next start of any cluster removes it.
    name, folder = f"pytest-{run[:16]}", tmp_path_factory.getbasetemp().parent
    with locked(folder / "cluster.lock"):
        shared = load(name) or start(name, owner=os.getppid(), progress=_tell)
        _count(folder, +1)
    yield shared
    with locked(folder / "cluster.lock"):
        if _count(folder, -1) == 0:
            stop(name)


@pytest.fixture(scope="session")
def kube(cluster: Cluster) -> Iterator[Kube]:
    """Give an administrator's client of a cluster in which CRD and RBAC are installed."""
    with closing(Kube(cluster.kubeconfig)) as client:
        install(client)
        yield client


@pytest.fixture(scope="module")
def operator(cluster: Cluster, kube: Kube, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OperatorProcess]:
    """Run one operator for a module. At its end it stops in order and has met nothing that it did not expect."""
    with OperatorProcess(cluster, kube, tmp_path_factory.mktemp("operator")) as process:
        yield process
        assert process.stop() == 0
        assert '"level": "error"' not in process.log
        assert "Traceback" not in process.log


@pytest.fixture
def namespace(kube: Kube) -> Iterator[str]:
    """Give a namespace with a fresh name."""
    with new_namespace(kube) as name:
        yield name


def _count(folder: Path, change: int) -> int:
    path = folder / "cluster.users"
    users = (int(path.read_text(encoding="ascii")) if path.exists() else 0) + change
    path.write_text(str(users), encoding="ascii")
    return users


def _tell(line: str) -> None:
    # Past pytest's capture: a first build takes minutes, and a silent one looks like a hang.
    print(line, file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A cluster for tests that stop its API server or read all of its audit log; one of its own for each worker."""
    with started(tmp_path_factory.mktemp("lab")) as own:
        yield own
