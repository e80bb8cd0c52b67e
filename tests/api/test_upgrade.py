"""I11: a new release of the operator restarts no engine. The new release is a copy with other constants in it."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api.audit import now
from tests.api.kube import eventually
from tests.api.lab import as_rendered
from tests.api.operator_process import ROOT, USER, new_namespace, resource

if TYPE_CHECKING:
    from pathlib import Path

    from tests.api.kube import Kube
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

SECONDS = 90
"""Until a change has gone through everything: a limit for a machine that others load, not a measurement."""

CHANGES = {
    "engine.py": (
        '"readinessProbe": {**health, "periodSeconds": 5,',
        '"readinessProbe": {**health, "periodSeconds": 6,',
    ),
    "gateway.py": ('"periodSeconds": 3,', '"periodSeconds": 4,'),
}
"""File of render/: the text that the next release replaces, once, and by what."""


@pytest.fixture
def next_release(tmp_path: Path) -> Path:
    source = tmp_path / "source"
    shutil.copytree(
        ROOT / "operator" / "securevllm", source / "securevllm", ignore=shutil.ignore_patterns("__pycache__")
    )
    for name, (old, new) in CHANGES.items():
        path = source / "securevllm" / "render" / name
        text = path.read_text(encoding="utf-8")
        assert text.count(old) == 1, f"{name} has changed: choose another constant"
        path.write_text(text.replace(old, new), encoding="utf-8")
    return source


def period(deployment: KubeObject) -> int:
    return int(deployment["spec"]["template"]["spec"]["containers"][0]["readinessProbe"]["periodSeconds"])


def periods(kube: Kube, namespace: str, name: str) -> tuple[int, int]:
    roles = ("engine", "gateway")
    engine, gateway = (period(kube.get(Ref(kinds.DEPLOYMENT, namespace, f"{name}-{role}"))) for role in roles)
    return engine, gateway


def test_an_upgrade_restarts_nothing_says_so_and_rolls_with_the_next_change_or_when_it_may(
    lab: Lab, next_release: Path
) -> None:
    kube = lab.kube
    with new_namespace(kube, "upgrade") as namespace:
        for name, policy in (("calm", "WithSpec"), ("eager", "Always")):
            kube.create(resource(namespace, name, updatePolicy=policy))
        with lab.operator("old") as old:
            eventually(lambda: as_rendered(kube, namespace), SECONDS)
            assert [periods(kube, namespace, name) for name in ("calm", "eager")] == [(5, 3), (5, 3)]
            assert old.stop() == 0
        since = now()

        with lab.operator("new", source=next_release) as new:
            eventually(lambda: status(kube, namespace, "calm")["outdated"] == ["engine", "gateway"], SECONDS)
            eventually(lambda: periods(kube, namespace, "eager") == (6, 4), SECONDS)
            assert periods(kube, namespace, "calm") == (5, 3)
            assert status(kube, namespace, "eager")["outdated"] == []
            written = {
                request.name for request in lab.audit.writes(since, user=USER) if request.resource == "deployments"
            }
            assert written == {"eager-engine", "eager-gateway"}

            # The number of engines is not in their template.
            kube.patch(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "calm"), {"spec": {"replicas": 2}})
            eventually(
                lambda: kube.get(Ref(kinds.DEPLOYMENT, namespace, "calm-engine"))["spec"]["replicas"] == 2, SECONDS
            )
            assert periods(kube, namespace, "calm") == (5, 3)

            # Its arguments are. The gateway is not concerned.
            spec = {"engine": {"args": ["--max-model-len=4096"]}}
            kube.patch(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "calm"), {"spec": spec})
            eventually(lambda: periods(kube, namespace, "calm") == (6, 3), SECONDS)
            eventually(lambda: status(kube, namespace, "calm")["outdated"] == ["gateway"], SECONDS)

            kube.patch(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "calm"), {"spec": {"updatePolicy": "Always"}})
            eventually(lambda: periods(kube, namespace, "calm") == (6, 4), SECONDS)
            eventually(lambda: status(kube, namespace, "calm")["outdated"] == [], SECONDS)
            assert new.stop() == 0


def status(kube: Kube, namespace: str, name: str) -> dict[str, Any]:
    found: dict[str, Any] = kube.get(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, name)).get(
        "status", {"outdated": None}
    )
    return found
