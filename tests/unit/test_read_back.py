"""How many gateways lag behind, and what is remembered of the engines' versions: a gateway tells that of any one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, cast

import pytest

from securevllm.api.kinds import POD
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.gateways import Pod, ReadBack, Served
from securevllm.operator import words
from securevllm.render import Observed, readback, render
from securevllm.render.meta import REVISION_ANNOTATION, Owner
from securevllm.store import Store, Watched

OWNER = Owner("llama", "apps", "uid-1")
RENDERED = render(
    OWNER,
    parse("llama", {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}),
    Context(),
    Observed(),
)


CURRENT = Served(readback.versions_of(RENDERED.served_files()), 1)
OLD = Served({**CURRENT.versions, "api_keys.yaml": "one before"}, 1)


class Gateways:
    """One that serves what it should, in front of an engine that says what the test wants."""

    said = "0.33.0"
    served_by: Mapping[str, Served | None] = MappingProxyType({})

    async def served(self, pods: Sequence[Pod], port: int) -> Mapping[str, Served | None]:
        assert port
        return {pod.name: self.served_by.get(pod.name, CURRENT) for pod in pods}

    async def engine_versions(self, pods: Sequence[Pod], port: int) -> frozenset[str]:
        assert pods
        assert port
        return frozenset({self.said})


def pod(name: str, role: str, container: str = "c1", version: int = 1) -> dict[str, Any]:
    metadata: dict[str, Any] = {"name": name, "namespace": "apps", "uid": name, "resourceVersion": str(version)}
    metadata["labels"] = OWNER.pod_labels(role)
    containers = [{"name": role, "containerID": container}]
    status = {"podIP": "10.0.0.1", "phase": "Running", "containerStatuses": containers}
    return {
        "kind": "Pod",
        "apiVersion": "v1",
        "metadata": metadata | {"resourceVersion": str(version)},
        "status": status,
    }


@pytest.mark.parametrize(
    ("served", "behind"),
    [
        ({}, 0),
        ({"g": OLD}, 1),
        ({"g": OLD, "h": OLD}, 2),
        # Nobody knows what a gateway serves that does not answer: the condition says so, and no number does.
        ({"g": OLD, "h": None}, 1),
        ({"g": None, "h": None}, None),
    ],
)
def test_gateways_that_have_not_taken_a_file_are_counted(served: dict[str, Served | None], behind: int | None) -> None:
    store, gateways = Store([Watched(POD)], index=words), Gateways()
    gateways.served_by = served
    for name in ("g", "h"):
        # Annotated with the revision already, so that there is nobody to nudge.
        one = pod(name, "gateway")
        one["metadata"]["annotations"] = {REVISION_ANNOTATION: RENDERED.revision()}
        store.put(one)
    found, _ = asyncio.run(ReadBack(cast("Any", None), store, gateways).look(OWNER, RENDERED, 0))
    assert found.behind == behind


def test_before_a_gateway_is_there_nothing_is_counted() -> None:
    found, _ = asyncio.run(
        ReadBack(cast("Any", None), Store([Watched(POD)], index=words), Gateways()).look(OWNER, RENDERED, 0)
    )
    assert found.behind is None


def test_what_engines_said_counts_until_one_of_them_starts_anew() -> None:
    store, gateways = Store([Watched(POD)], index=words), Gateways()
    look_at = ReadBack(cast("Any", None), store, gateways)

    def reported(said: str) -> tuple[str, ...]:
        gateways.said = said
        found, again = asyncio.run(look_at.look(OWNER, RENDERED, 2))
        assert again is None
        return found.reported

    for one in (pod("g", "gateway"), pod("a", "engine"), pod("b", "engine")):
        store.put(one)
    assert reported("0.33.0") == ("0.33.0",)
    assert reported("0.34.0") == ("0.33.0", "0.34.0")
    assert reported("0.33.0") == ("0.33.0", "0.34.0"), "one good answer does not speak for all engines"
    store.put(pod("b", "engine", "c2", version=2))
    assert reported("0.33.0") == ("0.33.0",)
    look_at.forget("apps", "llama")
    assert reported("0.35.0") == ("0.35.0",)
