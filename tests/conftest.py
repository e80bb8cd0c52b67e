"""`--accept` (`make golden`) writes what is rendered now as the golden files; without it, a difference fails.

Generated examples are the same in every run, and may take as long as they take: a slow machine is no mistake.
`--hypothesis-profile=nightly` looks for new ones (tests/property).
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, settings

settings.register_profile("same", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("same")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the golden files instead of comparing with them")


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    # Absent when this file was loaded too late to add the option: a run of all tests never accepts.
    return bool(request.config.getoption("--accept", default=False))
