"""`--accept` (`make golden`) writes what is rendered now as the golden files; without it, a difference fails.

Generated examples are the same in every run, and may take as long as they take: a slow machine is no mistake.
`--hypothesis-profile=nightly` looks for new ones (tests/property).
"""

from __future__ import annotations

import sys

import pytest
from hypothesis import HealthCheck, settings

from e2e.cluster.errors import ClusterError
from e2e.helm import find_or_install
from tests.chart.programs import Helm

settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the golden files instead of comparing with them")


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    # Absent when this file was loaded too late to add the option: a run of all tests never accepts.
    return bool(request.config.getoption("--accept", default=False))


@pytest.fixture(scope="session")
def helm() -> Helm:
    """Give helm 4; says why there is none."""
    try:
        return Helm(find_or_install(lambda line: print(line, file=sys.__stderr__, flush=True)))
    except ClusterError as error:
        pytest.skip(f"no helm 4: {error}")
