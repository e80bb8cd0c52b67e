"""`status.advisories` on a real API server: those of the version that runs, gone with a newer image."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api.kube import Kube, eventually
from tests.api.operator_process import OperatorProcess, resource

pytestmark = pytest.mark.cluster


def test_holes_are_listed_and_go_with_the_version(kube: Kube, operator: OperatorProcess, namespace: str) -> None:
    accept = [{"risk": "vllmVersionBelowFloor", "why": "the model needs this version"}]
    ref = Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "old")

    def told() -> dict[str, dict[str, Any]]:
        return {row["id"]: row for row in kube.get(ref).get("status", {}).get("advisories", ())}

    kube.apply(resource(namespace, "old", image="vllm/vllm-openai:v0.21.0", security={"accept": accept}))
    eventually(lambda: "CVE-2026-48746" in told(), 30)
    assert told()["CVE-2026-48746"] == {
        "id": "CVE-2026-48746", "severity": "critical", "control": "gateway-headers", "fixedIn": "0.22.0"
    }  # fmt: skip
    assert "control" not in told()["CVE-2026-130686"]
    kube.apply(resource(namespace, "old"))
    eventually(lambda: kube.get(ref)["status"].get("vllmVersion") == "0.33.0", 30)
    eventually(lambda: told() == {}, 30)
