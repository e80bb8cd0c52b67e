"""Deny outlives pods: the default-deny is there before the first pod and goes after the last one."""

from __future__ import annotations

import os
import secrets
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster import daemon
from e2e.cluster.binaries import KUBE_CONTROLLER_MANAGER
from securevllm.api.kinds import DEPLOYMENT, NETWORK_POLICY, NODE, POD, REPLICA_SET, KubeObject, Ref
from securevllm.context import FIELD_MANAGER
from securevllm.render.meta import MANAGED_BY
from tests.api.audit import Audit, Request, named, now
from tests.api.children import DENY, children, everything
from tests.api.kube import Kube, Refused, consistently, eventually
from tests.api.operator_process import USER, await_condition, condition, resource, settled

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]

GC_SECONDS = 60
"""The garbage collector learns a new CRD every 30 s only."""

LAST_LOOK = 25
"""Two looks 10 s apart have to see nothing before the default-deny goes."""

POLICIES = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicies"
BINDINGS = "/apis/admissionregistration.k8s.io/v1/validatingadmissionpolicybindings"


@pytest.fixture(scope="module")
def node(kube: Kube) -> Iterator[str]:
    """A node whose kubelet does not answer: its pods go only by force."""
    name = f"silent-{secrets.token_hex(3)}"
    kube.create({"apiVersion": "v1", "kind": "Node", "metadata": {"name": name}})
    yield name
    kube.delete(Ref(NODE, None, name))


def bind(kube: Kube, namespace: str, node: str, count: int) -> list[Ref]:
    """Wait for so many pods, and put them on the node."""

    def all_there() -> list[KubeObject]:
        pods = kube.list(POD, namespace)
        assert len(pods) == count, len(pods)
        return pods

    pods = eventually(all_there)
    for pod in pods:
        target = {"apiVersion": "v1", "kind": "Node", "name": node}
        body = {"apiVersion": "v1", "kind": "Binding", "metadata": {"name": pod["metadata"]["name"]}, "target": target}
        kube.request("POST", Ref.of(pod).path("binding"), body)
    return [Ref.of(pod) for pod in pods]


def force_away(kube: Kube, pods: list[Ref]) -> None:
    """What a kubelet does when all containers have ended."""
    for ref in pods:
        kube.delete(ref, gracePeriodSeconds=0)


def all_terminating(kube: Kube, pods: list[Ref]) -> bool:
    """Whether every pod was told to end; none is gone."""
    return all(kube.get(ref)["metadata"].get("deletionTimestamp") for ref in pods)


def deny(namespace: str) -> Ref:
    """The default-deny of a namespace."""
    return Ref(NETWORK_POLICY, namespace, DENY)


def last(requests: list[Request], resource_name: str, verb: str) -> Request:
    """The last such request that succeeded."""
    return [request for request in requests if (request.resource, request.verb) == (resource_name, verb)][-1]


def test_policies_are_there_before_the_first_pod_template(cluster: Cluster, kube: Kube, namespace: str) -> None:
    since = now()
    for name in ("llama", "mistral"):
        kube.create(resource(namespace, name))
    for name in ("llama", "mistral"):
        settled(kube, Ref.of(resource(namespace, name)))
    eventually(lambda: len(kube.list(POD, namespace)) == 6)

    written = Audit(cluster).writes(since, namespace=namespace)
    for name in ("llama", "mistral"):
        isolating = [DENY, f"{name}-engine", f"{name}-gateway"]
        there = max(next(named(written, "networkpolicies", policy)).ended for policy in isolating)
        for workload in ("engine", "gateway"):
            deployment = next(named(written, "deployments", f"{name}-{workload}"))
            assert there < deployment.began, (there, deployment)


def test_the_default_deny_goes_after_the_last_pod(cluster: Cluster, kube: Kube, namespace: str, node: str) -> None:
    obj = settled(kube, Ref.of(kube.create(resource(namespace))))
    pods = bind(kube, namespace, node, 3)
    since = now()

    kube.delete(Ref.of(obj))
    eventually(lambda: all_terminating(kube, pods), GC_SECONDS)
    force_away(kube, pods[:-1])
    consistently(lambda: kube.find(deny(namespace)), 3)
    force_away(kube, pods[-1:])
    eventually(lambda: kube.find(deny(namespace)) is None, LAST_LOOK)

    written = Audit(cluster).writes(since, namespace=namespace)
    gone = next(named(written, "networkpolicies", DENY, verb="delete"))
    assert gone.user == USER
    assert last(written, "pods", "delete").ended < gone.began
    eventually(lambda: everything(kube, namespace) == set(), GC_SECONDS)


def test_the_default_deny_stays_for_the_other_resource_of_the_namespace(kube: Kube, namespace: str) -> None:
    llama = settled(kube, Ref.of(kube.create(resource(namespace))))
    mistral = settled(kube, Ref.of(kube.create(resource(namespace, "mistral"))))
    uid = kube.get(deny(namespace))["metadata"]["uid"]
    others = {ref for ref in everything(kube, namespace) if ref.name.startswith("mistral")}

    kube.delete(Ref.of(llama))
    eventually(lambda: not [ref for ref in everything(kube, namespace) if ref.name.startswith("llama")], GC_SECONDS)
    consistently(lambda: kube.get(deny(namespace))["metadata"]["uid"] == uid, 2.5)
    assert {ref for ref in everything(kube, namespace) if ref.name.startswith("mistral")} == others

    kube.delete(Ref.of(mistral))
    eventually(lambda: everything(kube, namespace) == set(), GC_SECONDS)


def test_a_resource_that_was_deleted_while_the_operator_was_down_is_tidied_up_after(
    cluster: Cluster, kube: Kube, namespace: str, node: str, operator: OperatorProcess
) -> None:
    obj = settled(kube, Ref.of(kube.create(resource(namespace))))
    pods = bind(kube, namespace, node, 3)
    with operator.down():
        kube.delete(Ref.of(obj))
        eventually(lambda: all_terminating(kube, pods), GC_SECONDS)
        since = now()
    consistently(lambda: kube.find(deny(namespace)), 3)
    force_away(kube, pods)
    eventually(lambda: kube.find(deny(namespace)) is None, LAST_LOOK)

    written = Audit(cluster).writes(since, namespace=namespace)
    assert last(written, "pods", "delete").ended < next(named(written, "networkpolicies", DENY, verb="delete")).began


def test_a_default_deny_that_is_deleted_by_hand_is_back_at_once(kube: Kube, namespace: str, node: str) -> None:
    obj = settled(kube, Ref.of(kube.create(resource(namespace))))
    pods = bind(kube, namespace, node, 3)

    kube.delete(deny(namespace))
    eventually(lambda: kube.find(deny(namespace)), 2)

    # Also when only pods are left, which still run for as long as their grace lasts.
    kube.delete(Ref.of(obj))
    eventually(lambda: all_terminating(kube, pods), GC_SECONDS)
    kube.delete(deny(namespace))
    eventually(lambda: kube.find(deny(namespace)), 2)
    kube.patch(deny(namespace), {"spec": {"ingress": [{}]}})
    eventually(lambda: "ingress" not in kube.get(deny(namespace))["spec"], 2)

    force_away(kube, pods)
    eventually(lambda: kube.find(deny(namespace)) is None, LAST_LOOK)


def test_the_default_deny_stays_with_pods_that_were_orphaned(kube: Kube, namespace: str) -> None:
    obj = settled(kube, Ref.of(kube.create(resource(namespace))))
    eventually(lambda: len(kube.list(POD, namespace)) == 3)

    kube.delete(Ref.of(obj), propagationPolicy="Orphan")
    eventually(lambda: kube.find(Ref.of(obj)) is None, GC_SECONDS)
    consistently(lambda: kube.find(deny(namespace)) and len(kube.list(POD, namespace)) == 3, 3)

    for kind in (DEPLOYMENT, REPLICA_SET):
        for left in kube.list(kind, namespace):
            kube.delete(Ref.of(left), propagationPolicy="Background")
    eventually(lambda: kube.find(deny(namespace)) is None, LAST_LOOK)


@contextmanager
def frozen_controllers(cluster: Cluster) -> Iterator[None]:
    """No garbage collection; also how a collector behaves that took a resource made anew for the one before."""
    identity = daemon.recorded(cluster.folder, KUBE_CONTROLLER_MANAGER)
    if identity is None:
        pytest.skip("somebody's own cluster: its controllers cannot be stopped")
    os.kill(identity.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(identity.pid, signal.SIGCONT)


def owned_by(kube: Kube, namespace: str, uid: str) -> set[Ref]:
    """The children that have this owner and no other."""
    owners = {ref: obj["metadata"].get("ownerReferences", ()) for ref, obj in children(kube, namespace).items()}
    return {ref for ref, references in owners.items() if [one["uid"] for one in references] == [uid]}


def test_what_a_deleted_resource_left_does_not_hold_up_the_next_of_its_name(
    cluster: Cluster, kube: Kube, namespace: str
) -> None:
    old = settled(kube, Ref.of(kube.create(resource(namespace))))
    before = set(children(kube, namespace))
    owner = {"apiVersion": old["apiVersion"], "kind": old["kind"], "controller": True}
    owner |= {field: old["metadata"][field] for field in ("name", "uid")}
    metadata = {"name": "llama-router", "namespace": namespace, "labels": {MANAGED_BY: FIELD_MANAGER}}
    no_longer_rendered = {"apiVersion": "v1", "kind": "Service", "spec": {"ports": [{"port": 80}]}}
    with frozen_controllers(cluster):
        kube.delete(Ref.of(old))
        kube.create({**no_longer_rendered, "metadata": {**metadata, "ownerReferences": [owner]}})
        uid = kube.create(resource(namespace))["metadata"]["uid"]
        assert uid != old["metadata"]["uid"]
        # Where there are pods, the collector has to be back first; else it could lose those in the same way.
        makes_pods = {ref for ref in before if ref.kind == DEPLOYMENT}
        eventually(lambda: owned_by(kube, namespace, uid) == before - {deny(namespace)} - makes_pods)
        assert all(kube.get(ref)["metadata"]["deletionTimestamp"] for ref in makes_pods)
    eventually(lambda: owned_by(kube, namespace, uid) == before - {deny(namespace)}, GC_SECONDS)
    settled(kube, Ref.of(old))
    assert set(children(kube, namespace)) == before


# --------------------------------------------------------------------------------------- policies that cannot be made


@contextmanager
def refused_by_admission(kube: Kube, namespace: str, name: str) -> Iterator[str]:
    """A ValidatingAdmissionPolicy that refuses writes of one NetworkPolicy; gives what its refusal says."""
    unique = f"refuse-{namespace}"
    match = {"apiGroups": ["networking.k8s.io"], "apiVersions": ["v1"], "resources": ["networkpolicies"]}
    rules = {"resourceRules": [{**match, "operations": ["CREATE", "UPDATE"]}]}
    rules |= {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": namespace}}}  # type: ignore[dict-item]
    validation = {"expression": f"object.metadata.name != '{name}'", "message": "not this policy"}
    kind = {"apiVersion": "admissionregistration.k8s.io/v1", "metadata": {"name": unique}}
    policy = {"failurePolicy": "Fail", "matchConstraints": rules, "validations": [validation]}
    binding = {"policyName": unique, "validationActions": ["Deny"]}
    kube.request("POST", POLICIES, {**kind, "kind": "ValidatingAdmissionPolicy", "spec": policy})
    kube.request("POST", BINDINGS, {**kind, "kind": "ValidatingAdmissionPolicyBinding", "spec": binding})
    probe = {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "spec": {"podSelector": {}}}
    probe["metadata"] = {"name": name, "namespace": namespace}

    def refuses() -> bool:
        try:
            kube.apply(probe, dry_run=True, force=True)
        except Refused as refused:
            return "not this policy" in refused.message
        return False

    eventually(refuses, 30)
    try:
        yield "not this policy"
    finally:
        for collection in (BINDINGS, POLICIES):
            kube.request("DELETE", f"{collection}/{unique}")
        eventually(lambda: not refuses(), 30)


@contextmanager
def refused_by_quota(kube: Kube, namespace: str, _name: str) -> Iterator[str]:
    """A ResourceQuota that has no room for a NetworkPolicy; gives what its refusal says."""
    path = f"/api/v1/namespaces/{namespace}/resourcequotas"
    hard = {"count/networkpolicies.networking.k8s.io": "0"}
    quota = {"apiVersion": "v1", "kind": "ResourceQuota", "metadata": {"name": "none"}, "spec": {"hard": hard}}
    kube.request("POST", path, quota)
    eventually(lambda: kube.request("GET", f"{path}/none").get("status", {}).get("used"))
    try:
        yield "exceeded quota: none"
    finally:
        kube.request("DELETE", f"{path}/none")


def poke(kube: Kube, ref: Ref) -> None:
    """Have the resource looked at now: a refusal is tried again after 30 s only."""
    kube.patch(ref, {"metadata": {"labels": {"poked": "true"}}})


@pytest.mark.parametrize(
    ("refusing", "name"),
    [(refused_by_admission, DENY), (refused_by_admission, "llama-engine"), (refused_by_quota, DENY)],
    ids=["default-deny", "engine-policy", "quota"],
)
def test_nothing_runs_when_a_policy_cannot_be_made(kube: Kube, namespace: str, refusing: Any, name: str) -> None:
    ref = Ref.of(resource(namespace))
    with refusing(kube, namespace, name) as told:
        kube.create(resource(namespace))
        isolated = await_condition(kube, ref, "Isolated", "False", reason="ApplyFailed")
        assert name in isolated["message"]
        assert told in isolated["message"]
        for kind in ("EnginesReady", "GatewayReady"):
            assert condition(kube, ref, kind)["status"] == "False"
            assert told in condition(kube, ref, kind)["message"]
        consistently(lambda: kube.list(DEPLOYMENT, namespace) == kube.list(POD, namespace) == [], 3)

    poke(kube, ref)
    settled(kube, ref)
    assert len(kube.list(DEPLOYMENT, namespace)) == 2


def test_what_runs_stays_as_it_is_while_a_policy_cannot_be_made(kube: Kube, namespace: str) -> None:
    ref = Ref.of(settled(kube, Ref.of(kube.create(resource(namespace)))))
    engine = Ref(DEPLOYMENT, namespace, "llama-engine")
    before = kube.get(engine)
    with refused_by_admission(kube, namespace, "llama-engine"):
        kube.delete(Ref(NETWORK_POLICY, namespace, "llama-engine"))
        kube.patch(ref, {"spec": {"engine": {"args": ["--max-model-len=2048"]}}})
        await_condition(kube, ref, "Isolated", "False", reason="ApplyFailed")
        consistently(lambda: kube.get(engine)["spec"] == before["spec"], 1)
        # Allowing less is no reason to stop: the default-deny is there.
        assert kube.find(deny(namespace))

    poke(kube, ref)
    settled(kube, ref)
    assert "--max-model-len=2048" in kube.get(engine)["spec"]["template"]["spec"]["containers"][0]["args"]
    assert Ref(NETWORK_POLICY, namespace, "llama-engine") in children(kube, namespace)
