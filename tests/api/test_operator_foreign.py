"""What belongs to somebody else is never touched and is named; a recreated resource does not meet its own past."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    NETWORK_POLICY,
    POD,
    SECRET,
    SERVICE,
    SERVICE_ACCOUNT,
    KubeObject,
    Ref,
)
from tests.api.children import DENY, OURS, bare, children
from tests.api.kube import Kube, consistently, eventually
from tests.api.operator_process import await_condition, condition, resource, settled

if TYPE_CHECKING:
    from tests.api.operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]

LABELS = {"app": "other"}
POD_SPEC = {"containers": [{"name": "web", "image": "other:1"}]}
FOREIGN: dict[str, tuple[KubeObject, str]] = {
    "engine-deployment": (
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "llama-engine"},
            "spec": {
                "replicas": 0,
                "selector": {"matchLabels": LABELS},
                "template": {"metadata": {"labels": LABELS}, "spec": POD_SPEC},
            },
        },
        "EnginesReady",
    ),
    "gateway-service": (
        {
            "apiVersion": "v1",
            "kind": "Service",
            "metadata": {"name": "llama-gateway"},
            "spec": {"selector": LABELS, "ports": [{"port": 1}]},
        },
        "GatewayReady",
    ),
    "gateway-files": (
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "llama-gateway-xds"}, "data": {"a": "b"}},
        "GatewayReady",
    ),
    "accepted": (
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "llama-accepted"}, "data": {"a": "b"}},
        "EnginesReady",
    ),
    "engine-key": (
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "llama-engine-key"},
            "data": {"api-key": "a25vd24=", "seal-key": "a25vd24="},
        },
        "EnginesReady",
    ),
    "client-keys": (
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "llama-client-keys"},
            "stringData": {"mallory": "mallory-key-0123456789"},
        },
        "GatewayReady",
    ),
    "gateway-auth": (
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "llama-gateway-auth"}, "data": {"a": "Yg=="}},
        "GatewayReady",
    ),
    "engine-policy": (
        {
            "apiVersion": "networking.k8s.io/v1",
            "kind": "NetworkPolicy",
            "metadata": {"name": "llama-engine"},
            "spec": {"podSelector": {}, "ingress": [{}]},
        },
        "EnginesReady",
    ),
    "service-account": (
        {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "llama-engine"}},
        "EnginesReady",
    ),
}


def put(kube: Kube, namespace: str, obj: KubeObject, **metadata: Any) -> KubeObject:
    """Create somebody's object."""
    return kube.create(obj | {"metadata": {**obj["metadata"], "namespace": namespace, **metadata}}, "helm")


def untouched(kube: Kube, before: KubeObject) -> bool:
    """Whether nobody but controllers wrote to an object since it was made."""
    after = kube.get(Ref.of(before))
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert bare(after) == bare(before)
    assert {entry["manager"] for entry in after["metadata"].get("managedFields", [])} <= {
        "helm",
        "kube-controller-manager",
    }
    return True


@pytest.mark.parametrize(("obj", "kind"), FOREIGN.values(), ids=FOREIGN)
@pytest.mark.parametrize("owned", [False, True], ids=["unowned", "owned"])
def test_somebody_elses_object_is_left_alone_and_named(
    kube: Kube, namespace: str, obj: KubeObject, kind: str, *, owned: bool
) -> None:
    # A copied manifest may even carry our label.
    metadata: dict[str, Any] = {"labels": dict([OURS.split("=")])}
    if owned:
        release = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "release", "namespace": namespace}}
        owner = kube.create(release)["metadata"]
        reference = {"apiVersion": "v1", "kind": "ConfigMap", "name": owner["name"], "uid": owner["uid"]}
        metadata = {"ownerReferences": [{**reference, "controller": True}]}
    before = put(kube, namespace, obj, **metadata)

    ref = Ref.of(kube.create(resource(namespace)))
    found = await_condition(kube, ref, kind, "False", reason="ForeignObject")
    assert f"{before['kind']} {namespace}/{before['metadata']['name']} exists and belongs to" in found["message"]
    assert ("ConfigMap release" if owned else "nobody known to this operator") in found["message"]
    assert condition(kube, ref, "Accepted")["status"] == "True"
    assert condition(kube, ref, "Stalled")["status"] == "False"
    consistently(lambda: untouched(kube, before), 0.5)
    if before["kind"] == "NetworkPolicy":
        assert condition(kube, ref, "Isolated")["reason"] == "ForeignObject"
        assert kube.list(DEPLOYMENT, namespace) == []


def test_a_policy_of_the_default_denys_name_becomes_it(kube: Kube, namespace: str) -> None:
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": DENY},
        "spec": {"podSelector": {}, "ingress": [{}]},
    }
    put(kube, namespace, policy)
    settled(kube, Ref.of(kube.create(resource(namespace))))
    spec = kube.get(Ref(NETWORK_POLICY, namespace, DENY))["spec"]
    assert spec == {
        "podSelector": {"matchExpressions": [{"key": "securevllm.io/resource", "operator": "Exists"}]},
        "policyTypes": ["Ingress", "Egress"],
    }


def test_somebody_elses_object_outlives_the_resource_and_its_changes(kube: Kube, namespace: str) -> None:
    before = [
        put(kube, namespace, FOREIGN[name][0]) for name in ("gateway-service", "gateway-files", "service-account")
    ]
    ref = Ref.of(kube.create(resource(namespace)))
    await_condition(kube, ref, "GatewayReady", "False", reason="ForeignObject")
    kube.patch(ref, {"spec": {"gateway": {"replicas": 1}, "suspend": True}})
    await_condition(kube, ref, "GatewayReady", "False", reason="ForeignObject")
    kube.delete(ref)

    eventually(lambda: children(kube, namespace) == {}, 60)
    assert all(untouched(kube, obj) for obj in before)


def test_it_goes_on_when_the_foreign_object_is_gone(kube: Kube, namespace: str) -> None:
    before = put(kube, namespace, FOREIGN["gateway-service"][0])
    ref = Ref.of(kube.create(resource(namespace)))
    await_condition(kube, ref, "GatewayReady", "False", reason="ForeignObject")

    kube.delete(Ref.of(before))
    kube.patch(ref, {"metadata": {"labels": {"poked": "true"}}})  # nobody tells the operator of what is not its own
    settled(kube, ref)
    assert kube.get(Ref(SERVICE, namespace, "llama-gateway"))["spec"]["ports"][0]["port"] == 443


def test_a_child_that_lost_its_owner_is_no_longer_ours(kube: Kube, namespace: str) -> None:
    ref = Ref.of(settled(kube, Ref.of(kube.create(resource(namespace)))))
    service = Ref(SERVICE, namespace, "llama-engine")
    kube.patch(service, {"metadata": {"ownerReferences": None}})
    await_condition(kube, ref, "EnginesReady", "False", reason="ForeignObject")
    assert "ownerReferences" not in kube.get(service)["metadata"]


@pytest.mark.parametrize("propagation", ["Background", "Foreground"])
def test_a_recreated_resource_does_not_meet_its_past(kube: Kube, namespace: str, propagation: str) -> None:
    first = settled(kube, Ref.of(kube.create(resource(namespace))))
    ref = Ref.of(first)
    old = children(kube, namespace)
    old_label = kube.get(Ref(DEPLOYMENT, namespace, "llama-engine"))["spec"]["selector"]["matchLabels"]

    kube.delete(ref, propagationPolicy=propagation)
    eventually(lambda: kube.find(ref) is None, 60)
    second = kube.create(resource(namespace))
    uid = second["metadata"]["uid"]

    def all_new() -> bool:
        found = children(kube, namespace)
        owned = {
            child: [reference["uid"] for reference in obj["metadata"].get("ownerReferences", [])]
            for child, obj in found.items()
            if child.name != DENY
        }
        assert set(found) == set(old)
        assert set(map(tuple, owned.values())) == {(uid,)}, owned
        return True

    eventually(all_new, 60)
    settled(kube, ref)
    # Pods of the old one, if any still runs, match no policy and no Service of the new one.
    label = kube.get(Ref(DEPLOYMENT, namespace, "llama-engine"))["spec"]["selector"]["matchLabels"]
    assert label["securevllm.io/resource"] != old_label["securevllm.io/resource"]
    for kind, name in ((NETWORK_POLICY, "llama-engine"), (SERVICE, "llama-gateway")):
        text = str(kube.get(Ref(kind, namespace, name))["spec"])
        assert label["securevllm.io/resource"] in text
        assert old_label["securevllm.io/resource"] not in text
    eventually(lambda: len(kube.list(POD, namespace, f"securevllm.io/resource={label['securevllm.io/resource']}")) == 3)
    assert [event for event in kube.list(EVENT, namespace) if event["reason"] == "ForeignObject"] == []
    # Keys of the old one are gone with it.
    key = Ref(SECRET, namespace, "llama-engine-key")
    assert kube.get(key)["data"] != old[key]["data"]


def test_a_resource_that_is_recreated_while_the_operator_is_down_gets_objects_of_its_own(
    kube: Kube, namespace: str, operator: OperatorProcess
) -> None:
    ref = Ref.of(settled(kube, Ref.of(kube.create(resource(namespace)))))
    with operator.down():
        kube.delete(ref)
        uid = kube.create(resource(namespace))["metadata"]["uid"]

    def owned() -> bool:
        names = ((DEPLOYMENT, "llama-engine"), (CONFIG_MAP, "llama-accepted"), (SERVICE_ACCOUNT, "llama-gateway"))
        found = [kube.get(Ref(kind, namespace, name))["metadata"] for kind, name in names]
        assert {metadata["ownerReferences"][0]["uid"] for metadata in found} == {uid}
        return True

    eventually(owned, 60)
    settled(kube, ref)
