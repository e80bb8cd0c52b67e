"""Under which words the operator's cache finds an object: by these children are pruned, and cleared."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.kinds import SECURE_VLLM_DEPLOYMENT, KubeObject, Ref
from securevllm.operator import controllers
from securevllm.render.meta import Owner

OURS = Owner("llama", "apps", "uid-1").reference()
NAMED = str(Ref(SECURE_VLLM_DEPLOYMENT, "apps", "llama"))


def child(**changed: Any) -> KubeObject:
    return {"metadata": {"name": "c", "namespace": "apps", "ownerReferences": [OURS | changed]}}


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({}, ["uid-1", NAMED]),
        ({"apiVersion": "securevllm.io/v1"}, ["uid-1", NAMED]),
        ({"controller": False}, []),
        # Somebody else's kind of the same name: what names it is nobody's that we may delete.
        ({"apiVersion": "example.com/v1alpha1"}, ["uid-1"]),
        ({"apiVersion": "v1"}, ["uid-1"]),
        ({"kind": "Deployment"}, ["uid-1"]),
    ],
)
def test_only_what_our_resource_controls_is_found_by_its_name(changed: dict[str, Any], words: list[str]) -> None:
    assert [*controllers(child(**changed))] == words


def test_what_nobody_owns_is_found_by_nothing() -> None:
    assert [*controllers({"metadata": {"name": "c", "namespace": "apps"}})] == []
