"""Mode Enforce: what changes when isolation is known to be broken, and what does not."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import Observed, Rendered, render
from securevllm.render.closing import CLOSED_LABEL, closed
from securevllm.render.meta import HASH_ANNOTATION, Owner

OWNER = Owner("llama", "apps", "uid-1")
PLAIN: dict[str, Any] = {"model": {"name": "/m"}, "image": "vllm/vllm-openai:v0.33.0"}
ROUTED = PLAIN | {"disaggregation": {"connector": "nixl", "prefill": {}, "decode": {}, "router": {"image": "router:1"}}}


def rendered(spec: dict[str, Any]) -> Rendered:
    return render(OWNER, parse("llama", spec), Context(), Observed())


@pytest.mark.parametrize(("spec", "service"), [(PLAIN, "llama-engine"), (ROUTED, "llama-router")])
def test_only_the_service_that_envoy_follows_changes_and_selects_nothing(spec: dict[str, Any], service: str) -> None:
    before = rendered(spec)
    after = closed(OWNER, before)
    changed = [(old, new) for old, new in zip(before.configuration, after.configuration, strict=True) if old != new]
    ((old, new),) = changed
    assert (new["kind"], new["metadata"]["name"]) == ("Service", service)
    assert new["spec"]["selector"] == old["spec"]["selector"] | {CLOSED_LABEL: "isolation"}
    assert new["metadata"]["annotations"][HASH_ANNOTATION] != old["metadata"]["annotations"][HASH_ANNOTATION]
    # Pods and policies stay: a breach must not restart an engine, nor open anything.
    assert (after.workloads, after.isolation, after.deny) == (before.workloads, before.isolation, before.deny)
    labels = [obj["spec"]["template"]["metadata"]["labels"] for obj in before.workloads]
    assert labels
    assert all(CLOSED_LABEL not in found for found in labels)


def test_closing_twice_is_closing_once_and_opening_is_rendering() -> None:
    once = closed(OWNER, rendered(PLAIN))
    assert closed(OWNER, once) == once
    assert rendered(PLAIN) != once
