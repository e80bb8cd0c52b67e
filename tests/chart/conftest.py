"""The real helm and the real kustomize, without a cluster."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from e2e.cluster.errors import ClusterError
from e2e.helm import find_or_install
from tests.chart.programs import Helm


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Give helm 4; says why there is none."""
    try:
        return Helm(find_or_install(lambda line: print(line, file=sys.__stderr__, flush=True)))
    except ClusterError as error:
        pytest.skip(f"no helm 4: {error}")


@pytest.fixture
def values_file(tmp_path: Path) -> Path:
    """Give a path for values of a test."""
    return tmp_path / "values.yaml"
