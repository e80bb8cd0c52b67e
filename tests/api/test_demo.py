"""`make demo` without nodes, as anybody would run it."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.api.operator_process import ROOT

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_the_demo_shows_what_it_promises_and_ends_well() -> None:
    command = [sys.executable, "-m", "e2e.demo", "--on", "hollow"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=600)  # noqa: S603
    assert done.returncode == 0, done.stdout + done.stderr
    for shown in (
        "GatewayReady  True",
        "Ready         True",
        "├─ NetworkPolicy/quickstart-engine",
        "allowed, with key     POST /v1/chat/completions  200",
        "events: Hello from behind the gateway.",
        "forbidden route       POST /invocations          403",
        "quickstart-engine is back",
        "everything that was started has been ended",
    ):
        assert shown in done.stdout
