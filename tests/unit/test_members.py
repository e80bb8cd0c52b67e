"""What a pod's status says of a member of a group."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.render.meta import Owner
from securevllm.rollout import read_member


def seen(*, engine: bool = True, sidecar: bool = True, status: str = "False", reason: str = "") -> bool:
    """Whether a member with a metrics sidecar counts as ready."""
    pod: dict[str, Any] = {
        "metadata": {"name": "llama-e0-1-0", "uid": "u", "labels": Owner("llama", "apps", "1").pod_labels("engine")},
        "spec": {"nodeName": "n1"},
        "status": {
            "containerStatuses": [{"name": "vllm", "ready": engine}, {"name": "metrics", "ready": sidecar}],
            "conditions": [
                {"type": "ContainersReady", "status": str(engine and sidecar)},
                {"type": "Ready", "status": status, "reason": reason},
            ],
        },
    }
    return read_member(pod).ready


@pytest.mark.parametrize(
    ("status", "ready"),
    [
        ({"status": "True"}, True),
        ({"reason": "ReadinessGatesNotReady"}, True),
        ({"reason": "ContainersNotReady", "sidecar": False}, True),
        ({"reason": "ContainersNotReady", "engine": False}, False),
        ({"reason": "ContainersNotReady", "engine": False, "sidecar": False}, False),
        ({"reason": "NodeNotReady"}, False),
        ({}, False),
    ],
)
def test_a_member_is_as_ready_as_its_engine(status: dict[str, Any], ready: bool) -> None:
    assert seen(**status) == ready
