"""The rights of an installation are enough, and none is for nothing; with a Role alone one namespace is served.

One scenario makes the operator use every right that it has but a few; the audit log says which it used. `make test`
asks for the few as well, over all tests of this tier (rights.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.render.meta import DENY_NAME
from tests.api.audit import now
from tests.api.children import OURS as LABEL
from tests.api.children import children
from tests.api.kube import eventually
from tests.api.lab import as_rendered, real_gateways
from tests.api.operator_process import INSTALL, USER, await_condition, install, new_namespace, resource
from tests.api.rights import NEVER_ASKED, by_operators, granted, used

if TYPE_CHECKING:
    from tests.api.kube import Kube
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

NOT_ALWAYS_ASKED = {
    ("", "pods", "create"): "canary pods: the operator of this scenario makes none",
    ("", "pods", "delete"): "canary pods, and pods of broken groups",
    # Kinds that this API server does not know, or that belong to no namespace, are not always asked for in time.
    **{
        (group, name, "list"): "policies of other kinds, whose presence is told with a verdict"
        for group, name in (
            ("cilium.io", "ciliumnetworkpolicies"),
            ("cilium.io", "ciliumclusterwidenetworkpolicies"),
            ("crd.projectcalico.org", "networkpolicies"),
            ("crd.projectcalico.org", "globalnetworkpolicies"),
            ("policy.networking.k8s.io", "adminnetworkpolicies"),
            ("policy.networking.k8s.io", "baselineadminnetworkpolicies"),
        )
    },
}
"""Rights whose requests depend on moments, or on other tests; over all of them they count like any other."""

LEASE = Ref(kinds.LEASE, "secure-vllm-operator", "secure-vllm-operator")


@pytest.fixture(params=["install", "install-namespaced"])
def installation(
    request: pytest.FixtureRequest, lab: Lab
) -> Iterator[tuple[str, Sequence[KubeObject], str, list[str]]]:
    """Namespace, installed objects, service account and arguments of an operator."""
    if request.param == "install":
        with new_namespace(lab.kube, "rights") as namespace:
            yield namespace, lab.installed, "secure-vllm-operator", []
        return
    namespace = "llm"  # as the manifests name it
    body: KubeObject = {"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": namespace}}
    lab.kube.create(body)
    installed = install(lab.kube, INSTALL.parent / "install-namespaced")
    lab.twin("one-namespace", installed)
    yield namespace, installed, "one-namespace", ["--namespace", namespace]
    lab.kube.delete(Ref(kinds.NAMESPACE, None, namespace))


@pytest.mark.slow
def test_every_right_is_used_and_none_is_missing(
    lab: Lab, installation: tuple[str, Sequence[KubeObject], str, list[str]]
) -> None:
    namespace, installed, account, arguments = installation
    kube = lab.kube
    user = USER.replace(":secure-vllm-operator:secure-vllm-operator", f":secure-vllm-operator:{account}")
    kube.delete(LEASE)
    since = now()
    operator = lab.operator(f"rights-{account}", identity=account, account=account, arguments=arguments)
    with new_namespace(kube, "elsewhere") as elsewhere, operator:
        kube.create(resource(elsewhere))
        # Members without HTTP have no stand-in: here every container counts as running.
        with hollow_node(lab.cluster, namespace=namespace):
            live_through_groups(kube, namespace)
        with hollow_node(lab.cluster, real_gateways(), namespace=namespace):
            live_through_everything(kube, namespace)
        assert operator.stop() == 0  # a watch is in the audit log when it ends
        asked = lab.audit.requests(since, user=user, namespace=elsewhere)
        assert (asked == []) is bool(arguments)
        assert bool(children(kube, elsewhere)) is not bool(arguments)

    rights = granted(installed)
    events = [
        event
        for event in by_operators(lab.cluster)
        if event["user"]["username"] == user and event["requestReceivedTimestamp"] >= since
    ]
    needed = used(events)
    assert needed - rights == set()
    assert needed & NEVER_ASKED.keys() == set()
    assert rights - needed - NOT_ALWAYS_ASKED.keys() == NEVER_ASKED.keys()
    assert NOT_ALWAYS_ASKED.keys() <= rights
    assert lab.forbidden() == []


def live_through_groups(kube: Kube, namespace: str) -> None:
    """Engines over two nodes that are made, damaged, rolled as one, reduced and deleted."""
    wide = {"parallelism": {"tensor": 2, "nodes": 2}, "engine": {"terminationGracePeriod": "1s"}}
    ref = Ref.of(kube.create(resource(namespace, "wide", replicas=2, **wide)))
    await_condition(kube, ref, "EnginesReady", "True", seconds=120)
    for obj in kube.list(kinds.STATEFUL_SET, namespace):
        kube.patch(Ref.of(obj), {"spec": {"template": {"metadata": {"annotations": {"added": "yes"}}}}})
    kube.patch(ref, {"spec": {"engine": {"args": ["--max-model-len=4096"]}}})
    await_condition(kube, ref, "EnginesReady", "True", seconds=180)
    kube.patch(ref, {"spec": {"replicas": 1}})
    eventually(lambda: len(kube.list(kinds.STATEFUL_SET, namespace)) == 2, 60)  # one for each member
    await_condition(kube, ref, "EnginesReady", "True", seconds=60)
    kube.delete(ref)
    eventually(lambda: children(kube, namespace).keys() <= {Ref(kinds.NETWORK_POLICY, namespace, DENY_NAME)}, 120)
    # The next hollow node gives addresses of its own: it must not find a pod of this one.
    eventually(lambda: kube.list(kinds.POD, namespace) == [], 120)


def live_through_everything(kube: Kube, namespace: str) -> None:
    """A resource that is made, damaged, changed and deleted so that every request of the operator comes up."""
    llama = Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama")
    name = "meta-llama/Llama-3.1-8B-Instruct"
    fetched = {"name": name, "source": {"huggingFace": {"storage": {"size": "20Gi"}}}}
    kube.create(resource(namespace, model=fetched, gateway={"replicas": 2}))
    eventually(lambda: as_rendered(kube, namespace), 30)
    secret = kube.get(Ref(kinds.SECRET, namespace, "llama-client-keys"))

    # Somebody adds to every child, and takes some away.
    for ref in children(kube, namespace):
        if ref.kind not in {kinds.JOB, kinds.PERSISTENT_VOLUME_CLAIM}:
            kube.patch(ref, {"metadata": {"labels": {"added": "yes"}}})
    kube.patch(Ref(kinds.SECRET, namespace, "llama-engine-key"), {"data": {"seal-key": None}})
    eventually(lambda: as_rendered(kube, namespace), 30)

    # An older release left objects that this one does not render.
    owner = kube.get(Ref(kinds.DEPLOYMENT, namespace, "llama-gateway"))["metadata"]["ownerReferences"]
    key, _, value = LABEL.partition("=")
    metadata = {"name": "llama-old", "namespace": namespace, "labels": {key: value}, "ownerReferences": owner}
    template = kube.get(Ref(kinds.DEPLOYMENT, namespace, "llama-gateway"))["spec"]
    old: list[KubeObject] = [
        {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata},
        {"apiVersion": "v1", "kind": "Service", "metadata": metadata, "spec": {"clusterIP": "None"}},
        {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": metadata, "spec": template | {"replicas": 0}},
    ]
    for obj in old:
        kube.create(obj)
    # The next change prunes them, and with them what the new spec does not need any more.
    claim = {"name": name, "source": {"persistentVolumeClaim": {"claimName": "weights"}, "huggingFace": None}}
    kube.patch(llama, {"spec": {"model": claim, "gateway": {"replicas": 1}}})
    # What old pods refer to goes when no old pod is left, which takes the time that engines have to end.
    eventually(lambda: as_rendered(kube, namespace), 120, pause=0.5)
    await_condition(kube, llama, "GatewayReady", "True", seconds=60)

    # Another key: the pods of the gateway are nudged.
    kube.patch(Ref.of(secret), {"stringData": {"second": "a-key-of-another-client"}})
    eventually(lambda: nudged(kube, namespace), 30)
    await_condition(kube, llama, "GatewayReady", "True", seconds=60)
    reason = "I accept requests without a key in this test."
    kube.patch(llama, {"spec": {"gateway": {"authentication": {"none": reason}}}})
    eventually(lambda: kube.find(Ref(kinds.SECRET, namespace, "llama-gateway-auth")) is None, 120)
    eventually(lambda: as_rendered(kube, namespace), 120, pause=0.5)

    kube.delete(llama)
    eventually(lambda: kube.find(Ref(kinds.NETWORK_POLICY, namespace, DENY_NAME)) is None, 60)


def nudged(kube: Kube, namespace: str) -> list[Any]:
    pods = kube.list(kinds.POD, namespace, "securevllm.io/role=gateway")
    return [pod for pod in pods if "securevllm.io/revision" in pod["metadata"].get("annotations", {})]
