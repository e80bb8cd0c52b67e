"""How many examples: 250 in `make test`, always the same ones; 10 000 new ones with `--hypothesis-profile=nightly`.

Reachability has twice as many, half of them for each way in which network engines read an ipBlock.
"""

from __future__ import annotations

import pytest  # noqa: TC002 - pytest reads the annotations of its hooks
from hypothesis import HealthCheck, settings

_SLOW = [HealthCheck.too_slow, HealthCheck.data_too_large]

settings.register_profile("test", max_examples=250, deadline=None, derandomize=True, suppress_health_check=_SLOW)
settings.register_profile("nightly", max_examples=10_000, deadline=None, suppress_health_check=_SLOW, print_blob=True)


def pytest_configure(config: pytest.Config) -> None:
    # This file may be loaded after the plugin has read its option: a profile that was asked for must stay.
    if not config.getoption("--hypothesis-profile"):
        settings.load_profile("test")
