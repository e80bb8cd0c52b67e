"""What is remembered of the engines' versions: a gateway tells that of any one engine."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any, cast

from securevllm.api.kinds import POD
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.gateways import Pod, ReadBack, Served
from securevllm.operator import words
from securevllm.render import Observed, readback, render
from securevllm.render.meta import Owner
from securevllm.store import Store, Watched

OWNER = Owner("llama", "apps", "uid-1")
RENDERED = render(
    OWNER,
    parse("llama", {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}),
    Context(),
    Observed(),
)


class Gateways:
    """One that serves what it should, in front of an engine that says what the test wants."""

    said = "0.33.0"

    async def served(self, pods: Sequence[Pod], port: int) -> Mapping[str, Served | None]:
        assert port
        return {pod.name: Served(readback.versions_of(RENDERED.served_files()), 1) for pod in pods}

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
