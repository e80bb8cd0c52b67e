"""`--accept` (`make golden`) writes what is rendered now as the golden files; without it, a difference fails."""

from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the golden files instead of comparing with them")


@pytest.fixture
def accept(request: pytest.FixtureRequest) -> bool:
    # Absent when this file was loaded too late to add the option: a run of all tests never accepts.
    return bool(request.config.getoption("--accept", default=False))
