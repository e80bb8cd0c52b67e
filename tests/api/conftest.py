"""Fixtures of the API tests: one real control plane for the whole run, shared by all xdist workers."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from e2e.cluster import Cluster, load, running, start, stop
from e2e.cluster.paths import locked


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


def _count(folder: Path, change: int) -> int:
    path = folder / "cluster.users"
    users = (int(path.read_text(encoding="ascii")) if path.exists() else 0) + change
    path.write_text(str(users), encoding="ascii")
    return users


def _tell(line: str) -> None:
    # Past pytest's capture: a first build takes minutes, and a silent one looks like a hang.
    print(line, file=sys.__stderr__, flush=True)
