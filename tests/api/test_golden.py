"""Every object of every golden case is one that the API server takes as it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.golden.cases import NAMES, load

if TYPE_CHECKING:
    from tests.api.kube import Kube

pytestmark = pytest.mark.cluster


@pytest.mark.parametrize("name", NAMES)
def test_the_api_server_takes_every_object(kube: Kube, namespace: str, name: str) -> None:
    made = load(name).rendered
    objects = list(made.objects())
    assert len(objects) > 10
    for obj in objects:
        asked = obj | {"metadata": obj["metadata"] | {"namespace": namespace}}
        stored = kube.apply(asked, "securevllm-operator", dry_run=True)
        # What the schema does not know, the API server would drop in silence.
        assert stored["kind"] == obj["kind"]
        assert stored["metadata"]["annotations"] == obj["metadata"]["annotations"]
