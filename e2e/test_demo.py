"""What `make demo` shows on real nodes, on the cluster of these tests: every scene ends as it has to."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from e2e.demo import on_nodes, scenes
from e2e.demo.tell import Teller

if TYPE_CHECKING:
    from e2e.cluster.kubectl import Kubectl


@pytest.mark.usefixtures("operator")
def test_every_scene_of_the_demo_ends_as_it_has_to(
    kubectl: Kubectl, namespace: str, other_namespace: str, capsys: pytest.CaptureFixture[str]
) -> None:
    tell = Teller()
    on_nodes.play(scenes.apply_sample(kubectl, tell, namespace), tell, other_namespace)
    shown = capsys.readouterr().out
    assert "vLLM's API" in shown
    assert "control: another pod" in shown
