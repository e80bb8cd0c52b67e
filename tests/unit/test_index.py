"""Under which words the operator's cache finds an object, and which resources an object concerns."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.kinds import NETWORK_POLICY, POD, SECURE_VLLM_DEPLOYMENT, Kind, KubeObject, Ref
from securevllm.children import labelled, pods_of
from securevllm.operator import controllers, keys_of, words
from securevllm.reconcile import Key
from securevllm.render import canary
from securevllm.render.meta import ROLE_LABEL, Owner
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


def test_pods_are_found_by_the_label_that_they_carry_and_policies_by_the_one_that_they_ask_for() -> None:
    store = Store([Watched(POD), Watched(NETWORK_POLICY)], index=words)
    asking = {"podSelector": {"matchLabels": OWNER.selector("engine")}}
    versions = iter(range(1, 99))

    def put(kind: Kind, name: str, namespace: str = "apps", **fields: Any) -> None:
        metadata = {"name": name, "namespace": namespace, "resourceVersion": str(next(versions))}
        metadata |= fields.pop("metadata", {})
        store.put({"apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, **fields})

    def policies(label: str) -> list[str]:
        return [obj["metadata"]["name"] for obj in store.indexed(labelled(NETWORK_POLICY, "apps", label))]

    for name, namespace in (("b", "apps"), ("a", "apps"), ("c", "elsewhere")):
        put(POD, name, namespace, metadata={"labels": OWNER.pod_labels("engine")})
    put(POD, "d")
    put(POD, "e", metadata={"labels": Owner("mistral", "apps", "uid-2").pod_labels("engine")})
    assert [pod["metadata"]["name"] for pod in pods_of(store, OWNER)] == ["a", "b"]
    put(POD, "b")
    assert [pod["metadata"]["name"] for pod in pods_of(store, OWNER)] == ["a"]

    put(NETWORK_POLICY, "ours", spec=asking)
    for name, spec in (("all", {"podSelector": {}}), ("by-role", {"podSelector": {"matchLabels": {ROLE_LABEL: "x"}}})):
        put(NETWORK_POLICY, name, spec=spec)
    put(NETWORK_POLICY, "elsewhere", "elsewhere", spec=asking)
    assert (policies(OWNER.label), policies("")) == (["ours"], ["all", "by-role"])


def test_a_pod_concerns_its_resource_and_a_canary_pod_nobody() -> None:
    keys = keys_of(Store([Watched(SECURE_VLLM_DEPLOYMENT)]))

    def concerned(labels: dict[str, str]) -> list[Key]:
        references = [OURS | {"controller": False}]
        metadata = {"name": "p", "namespace": "apps", "labels": labels, "ownerReferences": references}
        return [*keys({"kind": "Pod", "metadata": metadata})]

    assert concerned(OWNER.pod_labels("engine")) == [Key("apps", "llama")]
    assert concerned(canary.labels(OWNER)) == []
