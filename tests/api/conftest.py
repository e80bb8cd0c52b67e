"""Fixtures of the API tests: one real control plane for each xdist worker, which runs whole files."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import closing

import pytest

from e2e.cluster import Cluster, running
from tests.api import rights
from tests.api.kube import Kube
from tests.api.lab import Lab, started
from tests.api.operator_process import OperatorProcess, install, new_namespace


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Run a cluster for the session. Tests take namespaces of their own, and never stop its API server.

    Operators see every namespace, and some tests change what is there once for a cluster: workers do not share one.
    """
    with running(progress=_tell) as own:
        yield own
        if own.provider != "kubeconfig":  # somebody's own: its audit log is not ours to read
            asked = rights.by_operators(own)
            rights.remember(own.name, asked)
            found = rights.forbidden(asked)
            assert not found, "\n".join(found)


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


def _tell(line: str) -> None:
    # Past pytest's capture: a first build takes minutes, and a silent one looks like a hang.
    print(line, file=sys.__stderr__, flush=True)


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    """A cluster for tests that stop its API server or read all of its audit log; one of its own for each worker."""
    with started(tmp_path_factory.mktemp("lab")) as own:
        yield own
