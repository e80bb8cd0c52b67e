"""`manifests/admission` on a real API server with real controllers: what may carry the operator's selector labels.

The attacker holds every right in the namespace, more than the cluster's own role `admin`, and no other.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from tests.api.kube import Kube, Refused, eventually
from tests.api.lab import Lab, started
from tests.api.operator_process import ROOT, await_condition, new_namespace, resource, token

pytestmark = pytest.mark.cluster

KEYS = ("securevllm.io/resource", "securevllm.io/role", "securevllm.io/group")
OURS = {KEYS[0]: "llama-00000000", KEYS[1]: "engine"}
PLAIN = {"app": "mine"}  # of workloads
ALONE = {"app": "alone"}  # of pods that no workload of the tenant may adopt
POLICIES = (
    "secure-vllm-operator-pods",
    "secure-vllm-operator-pod-templates",
    "secure-vllm-operator-controller-revisions",
)
REGISTRATION = "/apis/admissionregistration.k8s.io/v1"
FETCHED = {"name": "org/model", "source": {"huggingFace": {}}}


@dataclass(frozen=True)
class World:
    """A namespace with a running resource, and who is in it.

    Attributes:
        kube: an administrator of the cluster.
        tenant: may do everything in the namespace.
        other: name of a namespace account to its client: the tenant's own, or one of kube-system.
        namespace: where ``llama`` runs.
    """

    kube: Kube
    tenant: Kube
    other: dict[str, Kube]
    namespace: str

    def live(self, kind: kinds.Kind, role: str = "engine") -> KubeObject:
        """An object of the running resource."""
        if kind == kinds.DEPLOYMENT:
            return self.kube.get(Ref(kind, self.namespace, f"llama-{role}"))
        return self.kube.list(kind, self.namespace, f"{KEYS[1]}={role}")[0]


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Lab]:
    # One of its own: these policies are for the whole cluster, and other tests make labelled pods by hand.
    with started(tmp_path_factory.mktemp("admission")) as own:
        yield own


@pytest.fixture(scope="module")
def world(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    kube, folder = lab.kube, tmp_path_factory.mktemp("users")
    apply_component(lab)
    with new_namespace(kube, "tenant") as namespace, hollow_node(lab.cluster, namespace=namespace):
        for account in ("tenant", "secure-vllm-operator", "replicaset-controller"):
            kube.create(namespaced("v1", "ServiceAccount", account, namespace))
            own_everything(kube, account, namespace)
        clients = {
            f"{where}/{account}": Kube(
                lab.cluster.kubeconfig_for_token(
                    token(kube, account=account, namespace=where), folder / f"{where}-{account}"
                )
            )
            for where, account in (
                (namespace, "tenant"),
                (namespace, "secure-vllm-operator"),
                (namespace, "replicaset-controller"),
                ("kube-system", "cronjob-controller"),
            )
        }
        own_everything(kube, "cronjob-controller", namespace, account_namespace="kube-system")
        with lab.operator("operator") as operator:
            kube.create(resource(namespace, replicas=2, engine={"terminationGracePeriod": "2s"}))
            await_condition(
                kube, Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama"), "EnginesReady", "True", seconds=60
            )
            prepare(clients[f"{namespace}/tenant"], namespace)
            others = {name.replace(namespace, "tenant", 1): client for name, client in clients.items()}
            yield World(kube, clients[f"{namespace}/tenant"], others, namespace)
            assert operator.stop() == 0
        for client in clients.values():
            client.close()


def apply_component(lab: Lab) -> None:
    """Apply the component, and wait until the API server enforces it: a refusal is the proof."""
    kube = lab.kube
    for file in ("policies.yaml", "bindings.yaml"):
        for obj in yaml.safe_load_all((ROOT / "manifests" / "admission" / file).read_text(encoding="utf-8")):
            plural = {
                "ValidatingAdmissionPolicy": "validatingadmissionpolicies",
                "ValidatingAdmissionPolicyBinding": "validatingadmissionpolicybindings",
            }[obj["kind"]]
            kube.request(
                "PATCH",
                f"{REGISTRATION}/{plural}/{obj['metadata']['name']}",
                obj,
                query={"fieldManager": "install"},
                content_type="application/apply-patch+yaml",
            )

    def enforced() -> bool:
        # Each policy has a watch of its own in the API server.
        for attempt in (pod("probe", OURS), workload("Deployment", "probe", OURS), revision("probe", OURS)):
            try:
                kube.request("POST", collection(attempt, "default"), attempt, query={"dryRun": "All"})
            except Refused as refused:
                if "ValidatingAdmissionPolicy" not in refused.message:
                    raise
            else:
                return False
        return True

    eventually(enforced, 30)


def namespaced(api_version: str, kind: str, name: str, namespace: str, **body: Any) -> KubeObject:
    return {"apiVersion": api_version, "kind": kind, "metadata": {"name": name, "namespace": namespace}, **body}


def own_everything(kube: Kube, account: str, namespace: str, account_namespace: str = "") -> None:
    rbac = "/apis/rbac.authorization.k8s.io/v1/namespaces"
    rules = [{"apiGroups": ["*"], "resources": ["*"], "verbs": ["*"]}]
    role = namespaced("rbac.authorization.k8s.io/v1", "Role", account, namespace, rules=rules)
    kube.request("POST", f"{rbac}/{namespace}/roles", role)
    reference = {"apiGroup": "rbac.authorization.k8s.io", "kind": "Role", "name": account}
    subjects = [{"kind": "ServiceAccount", "name": account, "namespace": account_namespace or namespace}]
    binding = namespaced(
        "rbac.authorization.k8s.io/v1", "RoleBinding", account, namespace, roleRef=reference, subjects=subjects
    )
    kube.request("POST", f"{rbac}/{namespace}/rolebindings", binding)


# ------------------------------------------------------------------------------------------------------------- objects


def pod(name: str, labels: dict[str, str], **metadata: Any) -> KubeObject:
    return {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": name, "labels": labels, **metadata}, "spec": SPEC}


SPEC: dict[str, Any] = {"containers": [{"name": "main", "image": "attack:1"}]}
PLURALS = {
    "Pod": "pods",
    "Deployment": "deployments",
    "StatefulSet": "statefulsets",
    "DaemonSet": "daemonsets",
    "ReplicaSet": "replicasets",
    "Job": "jobs",
    "CronJob": "cronjobs",
    "ReplicationController": "replicationcontrollers",
    "ControllerRevision": "controllerrevisions",
}
VERSIONS = {"Job": "batch/v1", "CronJob": "batch/v1", "ReplicationController": "v1", "Pod": "v1"}


def workload(kind: str, name: str, labels: dict[str, str], **metadata: Any) -> KubeObject:
    """A workload of this kind whose pods have these labels beside ``app``."""
    template: dict[str, Any] = {"metadata": {"labels": PLAIN | labels}, "spec": copy.deepcopy(SPEC)}
    spec: dict[str, Any] = {"template": template}
    if kind == "Job":
        template["spec"]["restartPolicy"] = "Never"
        spec["suspend"] = True
    elif kind == "ReplicationController":
        spec |= {"selector": PLAIN, "replicas": 0}
    else:
        spec["selector"] = {"matchLabels": PLAIN}
        if kind != "DaemonSet":
            spec["replicas"] = 0
    if kind == "StatefulSet":
        spec["serviceName"] = "none"
    version = VERSIONS.get(kind, "apps/v1")
    return {"apiVersion": version, "kind": kind, "metadata": {"name": name, **metadata}, "spec": spec}


def revision(name: str, labels: dict[str, str]) -> KubeObject:
    metadata = {"name": name, "labels": labels}
    return {"apiVersion": "apps/v1", "kind": "ControllerRevision", "metadata": metadata, "revision": 1, "data": {}}


def collection(obj: KubeObject, namespace: str) -> str:
    version = obj["apiVersion"]
    prefix = f"/apis/{version}" if "/" in version else f"/api/{version}"
    return f"{prefix}/namespaces/{namespace}/{PLURALS[obj['kind']]}"


def prepare(tenant: Kube, namespace: str) -> None:
    """What the tenant has already: none of it carries labels of ours."""
    for obj in (
        pod("plain", ALONE),
        revision("plain", PLAIN),
        *(workload(kind, "plain", {}) for kind in ("Deployment", "StatefulSet", "ReplicaSet", "DaemonSet")),
    ):
        tenant.request("POST", collection(obj, namespace), obj)


# ------------------------------------------------------------------------------------------------------------ attempts

Attempt = Callable[[World], Any]


def create(obj: KubeObject, *, who: str = "tenant/tenant", dry_run: bool = False) -> Attempt:
    query = {"dryRun": "All"} if dry_run else {}
    return lambda w: w.other[who].request("POST", collection(obj, w.namespace), obj, query=query)


def apply(obj: KubeObject) -> Attempt:
    return lambda w: w.tenant.request(
        "PATCH",
        f"{collection(obj, w.namespace)}/{obj['metadata']['name']}",
        obj,
        query={"fieldManager": "tenant", "force": "true"},
        content_type="application/apply-patch+yaml",
    )


def patch(obj: KubeObject, body: Any, how: str = "merge-patch") -> Attempt:
    path = f"/{obj['metadata']['name']}"
    content_type = f"application/{how}+json"
    return lambda w: w.tenant.request("PATCH", collection(obj, w.namespace) + path, body, content_type=content_type)


def patch_live(kind: kinds.Kind, body: Any, how: str = "merge-patch", role: str = "engine", sub: str = "") -> Attempt:
    def attempt(w: World) -> Any:
        path = Ref.of(w.live(kind, role)).path(sub or None)
        return w.tenant.request("PATCH", path, body, content_type=f"application/{how}+json")

    return attempt


def put_live(kind: kinds.Kind, change: Callable[[KubeObject], Any]) -> Attempt:
    def attempt(w: World) -> Any:
        obj = copy.deepcopy(w.live(kind))
        change(obj)
        return w.tenant.request("PUT", Ref.of(obj).path(), obj)

    return attempt


def twin_of_our_replica_set(w: World) -> Any:
    """Named and owned as if the deployment controller had made it."""
    live = w.live(kinds.REPLICA_SET)
    metadata = {key: live["metadata"][key] for key in ("labels", "annotations", "ownerReferences")} | {"name": "twin"}
    obj = {"apiVersion": "apps/v1", "kind": "ReplicaSet", "metadata": metadata, "spec": live["spec"]}
    return w.tenant.request("POST", collection(obj, w.namespace), obj)


def twin_of_our_pod(w: World) -> Any:
    live = w.live(kinds.POD)
    metadata = {key: live["metadata"][key] for key in ("labels", "ownerReferences")} | {"name": "twin"}
    obj = {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": SPEC}
    return w.tenant.request("POST", collection(obj, w.namespace), obj)


def strategic(container: dict[str, Any]) -> dict[str, Any]:
    return {"spec": {"template": {"spec": {"containers": [container]}}}}


def pointer(key: str) -> str:
    return key.replace("/", "~1")


def label(key: str, value: str | None) -> dict[str, Any]:
    return {"metadata": {"labels": {key: value}}}


def template(labels: dict[str, Any] | None = None, annotations: dict[str, Any] | None = None) -> dict[str, Any]:
    return {"spec": {"template": {"metadata": {"labels": labels or {}, "annotations": annotations or {}}}}}


def in_place(obj: KubeObject) -> None:
    obj["spec"]["containers"][0]["image"] = "attack:1"


CONTAINER = {"ephemeralContainers": [{"name": "debug", "image": "attack:1"}]}
TEMPLATED = ("Deployment", "StatefulSet", "DaemonSet", "ReplicaSet", "Job", "ReplicationController")

ATTEMPTS: dict[str, Attempt] = {
    **{f"create a pod with {key}": create(pod("a", {key: "x"})) for key in KEYS},
    "create a pod with the labels of an engine": create(pod("a", OURS)),
    "create a pod with an empty label": create(pod("a", {KEYS[1]: ""})),
    "create a pod by generateName": create(pod("", OURS, generateName="a-")),
    "create a pod by dry run": create(pod("a", OURS), dry_run=True),
    "create a pod by apply": apply(pod("a", OURS)),
    "create a pod as an account that is called like a controller": create(
        pod("a", OURS), who="tenant/replicaset-controller"
    ),
    "create a pod as an account that is called like the operator": create(
        pod("a", OURS), who="tenant/secure-vllm-operator"
    ),
    "create a pod that says it is of our ReplicaSet": twin_of_our_pod,
    **{f"create a {kind}": create(workload(kind, "a", OURS)) for kind in TEMPLATED},
    "create a Deployment with one label": create(workload("Deployment", "a", {KEYS[2]: "x"})),
    "create a Deployment by apply": apply(workload("Deployment", "a", OURS)),
    "create a Deployment as an account that is called like the operator": create(
        workload("Deployment", "a", OURS), who="tenant/secure-vllm-operator"
    ),
    "create a Job by way of a CronJob": create(workload("Job", "a", OURS), who="kube-system/cronjob-controller"),
    "create a ReplicaSet that says it is of our Deployment": twin_of_our_replica_set,
    "create a ControllerRevision": create(revision("a", OURS)),
    "label a pod": patch(pod("plain", {}), label(KEYS[0], "x")),
    "label a pod by JSON patch": patch(
        pod("plain", {}),
        [{"op": "add", "path": f"/metadata/labels/{pointer(KEYS[1])}", "value": "engine"}],
        "json-patch",
    ),
    "label a pod by strategic patch": patch(pod("plain", {}), label(KEYS[2], "x"), "strategic-merge-patch"),
    "label a pod by apply": apply({"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "plain", "labels": OURS}}),
    "label a ControllerRevision": patch(revision("plain", {}), label(KEYS[0], "x")),
    **{
        f"label the template of a {kind}": patch(workload(kind, "plain", {}), template(OURS))
        for kind in ("Deployment", "StatefulSet", "ReplicaSet", "DaemonSet")
    },
    "label the template of a Deployment by apply": apply(workload("Deployment", "plain", OURS)),
    **{f"remove {key} from an engine": patch_live(kinds.POD, label(key, None)) for key in KEYS[:2]},
    "remove a label from an engine by JSON patch": patch_live(
        kinds.POD, [{"op": "remove", "path": f"/metadata/labels/{pointer(KEYS[0])}"}], "json-patch"
    ),
    "remove all labels from an engine": put_live(kinds.POD, lambda obj: obj["metadata"].pop("labels")),
    "make an engine a gateway": patch_live(kinds.POD, label(KEYS[1], "gateway")),
    "make a gateway an engine": patch_live(kinds.POD, label(KEYS[1], "engine"), role="gateway"),
    "give an engine to another resource": patch_live(kinds.POD, label(KEYS[0], "other-00000000")),
    "put an engine into a group": patch_live(kinds.POD, label(KEYS[2], "0")),
    "change the image of a running engine": put_live(kinds.POD, in_place),
    "debug an engine": patch_live(kinds.POD, {"spec": CONTAINER}, "strategic-merge-patch", sub="ephemeralcontainers"),
    "debug a gateway": patch_live(
        kinds.POD, {"spec": CONTAINER}, "strategic-merge-patch", role="gateway", sub="ephemeralcontainers"
    ),
    "change the image of our Deployment": patch_live(
        kinds.DEPLOYMENT, strategic({"name": "vllm", "image": "attack:1"}), "strategic-merge-patch"
    ),
    "add a container to our Deployment": patch_live(
        kinds.DEPLOYMENT, strategic({"name": "side", "image": "attack:1"}), "strategic-merge-patch"
    ),
    "add a variable to our Deployment": patch_live(
        kinds.DEPLOYMENT,
        strategic({"name": "vllm", "env": [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}]}),
        "strategic-merge-patch",
    ),
    "add a label to the template of our Deployment": patch_live(kinds.DEPLOYMENT, template({KEYS[2]: "0"})),
    "add a network to our Deployment": patch_live(
        kinds.DEPLOYMENT, template(annotations={"k8s.v1.cni.cncf.io/networks": "other"})
    ),
    "remove an annotation of our Deployment's template": patch_live(
        kinds.DEPLOYMENT, template(annotations={"linkerd.io/inject": None})
    ),
    "use the host's network in our Deployment": patch_live(
        kinds.DEPLOYMENT, {"spec": {"template": {"spec": {"hostNetwork": True}}}}
    ),
    "change the image of our ReplicaSet": patch_live(
        kinds.REPLICA_SET, strategic({"name": "vllm", "image": "attack:1"}), "strategic-merge-patch"
    ),
    "change the gateway's image": patch_live(
        kinds.DEPLOYMENT, strategic({"name": "envoy", "image": "attack:1"}), "strategic-merge-patch", role="gateway"
    ),
}


@pytest.mark.parametrize("name", ATTEMPTS)
def test_refused(world: World, name: str) -> None:
    with pytest.raises(Refused) as refused:
        ATTEMPTS[name](world)
    assert refused.value.code == httpx.codes.FORBIDDEN
    assert any(f"ValidatingAdmissionPolicy '{policy}'" in refused.value.message for policy in POLICIES), refused.value
    assert "Secure vLLM Operator" in refused.value.message


ALLOWED: dict[str, Attempt] = {
    "a pod of one's own": create(pod("own", ALONE)),
    "a pod with another label of this prefix": create(pod("prefix", {"securevllm.io/note": "x"})),
    "a Deployment of one's own": create(workload("Deployment", "own", {})),
    "another image in a Deployment of one's own": patch(
        workload("Deployment", "plain", {}), strategic({"name": "main", "image": "own:2"}), "strategic-merge-patch"
    ),
    "a label on a pod of one's own": patch(pod("plain", {}), label("tier", "web")),
    "an annotation on an engine": patch_live(kinds.POD, {"metadata": {"annotations": {"note": "x"}}}),
    "another label on an engine": patch_live(kinds.POD, label("tier", "web")),
    "kubectl rollout restart": patch_live(
        kinds.DEPLOYMENT, template(annotations={"kubectl.kubernetes.io/restartedAt": "2026-11-24T12:00:00Z"})
    ),
    "kubectl scale of our Deployment": patch_live(kinds.DEPLOYMENT, {"spec": {"replicas": 2}}, sub="scale"),
    "a Job that the CronJob controller makes of one's own": create(
        workload("Job", "own", {}), who="kube-system/cronjob-controller"
    ),
}


@pytest.mark.parametrize("name", ALLOWED)
def test_allowed(world: World, name: str) -> None:
    ALLOWED[name](world)


def test_pods_of_ours_are_made_again_and_templates_roll(world: World) -> None:
    """Deployments and Jobs of the operator, by the real controllers."""
    kube, namespace = world.kube, world.namespace
    engine = world.live(kinds.POD)
    world.tenant.delete(Ref.of(engine))
    ref = Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama")
    kube.patch(ref, {"spec": {"engine": {"args": ["--max-model-len=4096"]}}})

    def rolled() -> bool:
        pods = kube.list(kinds.POD, namespace, f"{KEYS[1]}=engine")
        return ["--max-model-len=4096" in item["spec"]["containers"][0]["args"] for item in pods] == [True] * 2

    eventually(rolled, 90)
    await_condition(kube, ref, "EnginesReady", "True", seconds=60)
    kube.create(resource(namespace, "fetched", model=FETCHED))
    eventually(lambda: kube.list(kinds.POD, namespace, f"{KEYS[1]}=fetch"), 30)


def test_a_stateful_set_of_the_operator_gets_its_pods(world: World, lab: Lab, tmp_path: Path) -> None:
    kubeconfig = lab.cluster.kubeconfig_for_token(token(world.kube), tmp_path / "operator")
    own_everything(world.kube, "secure-vllm-operator-sets", world.namespace)
    rbac = f"/apis/rbac.authorization.k8s.io/v1/namespaces/{world.namespace}/rolebindings/secure-vllm-operator-sets"
    subject = {"kind": "ServiceAccount", "name": "secure-vllm-operator", "namespace": "secure-vllm-operator"}
    world.kube.request("PATCH", rbac, {"subjects": [subject]}, content_type="application/merge-patch+json")
    obj = workload("StatefulSet", "group", {KEYS[2]: "0"})
    obj["spec"]["replicas"] = 2
    with closing(Kube(kubeconfig)) as operator:
        eventually(lambda: operator.request("POST", collection(obj, world.namespace), obj))
    made = eventually(lambda: world.kube.list(kinds.POD, world.namespace, f"{KEYS[2]}=0"), 30)
    assert made[0]["metadata"]["ownerReferences"][0]["kind"] == "StatefulSet"


def test_the_api_server_finds_no_type_errors_in_the_expressions(world: World) -> None:
    """The controller that checks types runs beside the API server; what it says is in the status."""

    def checked(name: str) -> bool:
        policy = world.kube.request("GET", f"{REGISTRATION}/validatingadmissionpolicies/{name}")
        status = policy.get("status", {})
        assert status.get("typeChecking", {}).get("expressionWarnings", []) == []
        return bool(status.get("observedGeneration") == policy["metadata"]["generation"])

    for name in POLICIES:
        eventually(lambda name=name: checked(name), 60)  # type: ignore[misc]
