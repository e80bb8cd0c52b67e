"""A group that waits for its turn is what it was, to the last field; its templates are kept as long as it is there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import Observed, Rendered, render
from securevllm.render.accepted import GroupMemory, Kept, read
from securevllm.render.meta import EPOCH_LABEL, TEMPLATE_LABEL, Owner

OWNER = Owner("llama", "apps", "uid-1")
SPEC: dict[str, Any] = {
    "model": {"name": "/models/llama"},
    "image": "vllm/vllm-openai:v0.33.0",
    "replicas": 2,
    "parallelism": {"tensor": 2, "nodes": 2},
}
NEWER = {**SPEC, "engine": {"args": ["--max-model-len=4096"]}}
DATA = {"data": {"size": 4, "sizeLocal": 2}}
SPLIT: dict[str, Any] = {
    "model": SPEC["model"],
    "image": SPEC["image"],
    "disaggregation": {
        "connector": "nixl",
        "router": {"image": "vllm/vllm-router:v0.1.17"},
        "prefill": {"parallelism": {"tensor": 2, "nodes": 2}},
    },
}
CHANGES = {
    "arguments": (SPEC, NEWER),
    "a larger group": (SPEC, {**SPEC, "parallelism": {"tensor": 4, "nodes": 4}}),
    "a smaller group": ({**SPEC, "parallelism": {"tensor": 4, "nodes": 4}}, SPEC),
    "data parallelism": (SPEC, {**SPEC, "parallelism": DATA}),
    "other ranks": ({**SPEC, "parallelism": DATA}, {**SPEC, "parallelism": {"data": {"size": 8, "sizeLocal": 4}}}),
    "prefill and decode": (SPLIT, {**SPLIT, "engine": {"args": ["--max-model-len=4096"]}}),
}
MEMORY = {name: GroupMemory(epoch) for epoch, name in enumerate(("e0", "e1", "p0", "d0"))}


def rendered(spec: dict[str, Any], observed: Observed) -> Rendered:
    return render(OWNER, parse(OWNER.name, spec), Context(), observed)


def kept(of: Rendered) -> Kept:
    found = read(OWNER, of.configuration[0]["data"], b"")
    assert found is not None
    return found


def running(of: Rendered) -> Observed:
    """What is seen of a resource whose groups all run as rendered."""
    carried = {item.group.name: (item.template,) for item in of.groups}
    return Observed(pins=kept(of).pins, groups=MEMORY, carried=carried)


@pytest.mark.parametrize("change", CHANGES)
def test_an_old_group_is_rendered_as_it_was_rolled_out(change: str) -> None:
    old, new = CHANGES[change]
    before = rendered(old, Observed(groups=MEMORY))
    after = rendered(new, running(before))
    assert {item.group.name: item.workloads for item in after.former} == {
        item.group.name: item.workloads for item in before.groups
    }
    # What is wanted is not changed by what is remembered.
    assert after.groups == rendered(new, Observed(groups=MEMORY)).groups


@pytest.mark.parametrize("change", CHANGES)
def test_it_is_remembered_over_a_restart_and_further_changes(change: str) -> None:
    old, new = CHANGES[change]
    before = rendered(old, Observed(groups=MEMORY))
    after = rendered(new, running(before))
    seen = replace(running(before), pins=kept(after).pins)
    assert rendered(new, seen).former == after.former
    # The first group has been rolled, and the spec moves on once more: now there are two old kinds.
    rolled = {**seen.carried, after.groups[0].group.name: (after.groups[0].template,)}
    third = {**new, "engine": {"args": ["--max-model-len=2048"]}}
    final = rendered(third, replace(seen, carried=rolled))
    assert final.former[0].workloads == after.groups[0].workloads
    assert final.former[1:] == after.former[1:]
    assert rendered(third, replace(seen, carried=rolled, pins=kept(final).pins)).former == final.former


def test_what_nobody_carries_any_more_is_forgotten() -> None:
    before = rendered(SPEC, Observed(groups=MEMORY))
    after = rendered(NEWER, running(before))
    assert [name for name in kept(after).pins if name.startswith("was/")]
    done = running(after)
    assert rendered(NEWER, done).former == ()
    assert set(kept(rendered(NEWER, done)).pins) == {"engine/2x1/head", "engine/2x1/others", "gateway"}


def test_back_at_the_old_spec_nothing_is_old() -> None:
    before = rendered(SPEC, Observed(groups=MEMORY))
    after = rendered(NEWER, running(before))
    back = rendered(SPEC, replace(running(before), pins=kept(after).pins))
    assert back.former == ()
    assert back.groups == before.groups
    assert kept(back).pins == kept(before).pins


def test_a_hash_that_nobody_rolled_out_says_nothing() -> None:
    before = rendered(SPEC, Observed(groups=MEMORY))
    seen = running(before)
    # Somebody has written another hash into the StatefulSet; the pod still has the true one.
    forged = replace(seen, carried={"e0": ("0123456789abcdef", before.groups[0].template), "e1": ("feed",)})
    after = rendered(NEWER, forged)
    assert [item.group.name for item in after.former] == ["e0"]
    labels = after.former[0].workloads[0]["spec"]["template"]["metadata"]["labels"]
    assert (labels[TEMPLATE_LABEL], labels[EPOCH_LABEL]) == (before.groups[0].template, "0")


def test_one_half_of_the_templates_is_none() -> None:
    before = rendered(SPEC, Observed(groups=MEMORY))
    seen = running(before)
    half = {name: pin for name, pin in seen.pins.items() if not name.endswith("/others")}
    assert rendered(NEWER, replace(seen, pins=half)).former == ()
