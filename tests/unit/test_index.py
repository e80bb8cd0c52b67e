"""Under which words the operator's cache finds an object, and which resources an object concerns."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.kinds import SECURE_VLLM_DEPLOYMENT, KubeObject, Ref
from securevllm.operator import controllers, keys_of
from securevllm.reconcile import Key
from securevllm.render import canary
from securevllm.render.meta import Owner
from securevllm.store import Store, Watched

OWNER = Owner("llama", "apps", "uid-1")
OURS = OWNER.reference()
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


def test_a_pod_concerns_its_resource_and_a_canary_pod_nobody() -> None:
    keys = keys_of(Store([Watched(SECURE_VLLM_DEPLOYMENT)]))

    def concerned(labels: dict[str, str]) -> list[Key]:
        references = [OURS | {"controller": False}]
        metadata = {"name": "p", "namespace": "apps", "labels": labels, "ownerReferences": references}
        return [*keys({"kind": "Pod", "metadata": metadata})]

    assert concerned(OWNER.pod_labels("engine")) == [Key("apps", "llama")]
    assert concerned(canary.labels(OWNER)) == []
