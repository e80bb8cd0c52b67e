"""Drift, told from objects and managedFields as a kube-apiserver 1.36 returns them."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from securevllm.drift import Action, additions, covers, footprint, judge, replacement
from securevllm.render.meta import HASH_ANNOTATION, Object, stamp

OURS = "securevllm-operator"


def rendered(**spec: Any) -> Object:
    template = {
        "metadata": {"labels": {"app": "a"}, "annotations": {"linkerd.io/inject": "disabled"}},
        "spec": {
            "containers": [
                {
                    "name": "vllm",
                    "image": "a:b",
                    "args": ["--port=8000"],
                    "env": [{"name": "A", "value": "1000m"}],
                    "ports": [{"containerPort": 8000, "protocol": "TCP", "name": "http"}],
                    "resources": {"limits": {"cpu": "1000m", "memory": "1024Mi"}},
                }
            ],
            "volumes": [{"name": "home", "emptyDir": {}}],
        },
    }
    return stamp(
        {
            "apiVersion": "apps/v1",
            "kind": "Deployment",
            "metadata": {"name": "llama-engine", "namespace": "apps", "labels": {"a": "b"}},
            "spec": {"replicas": 1, "selector": {"matchLabels": {"app": "a"}}, "template": template, **spec},
        }
    )


def live(obj: Object | None = None, **metadata: Any) -> Object:
    """What comes back after an apply: normalised, with defaults and the server's metadata."""
    found = copy.deepcopy(obj if obj is not None else rendered())
    if found["kind"] == "Deployment":
        container = found["spec"]["template"]["spec"]["containers"][0]
        container["resources"]["limits"] = {"cpu": "1", "memory": "1Gi"}
        container["terminationMessagePath"] = "/dev/termination-log"
        found["spec"]["template"]["spec"]["restartPolicy"] = "Always"
        found["spec"]["revisionHistoryLimit"] = 10
    found["metadata"] |= {"uid": "u", "resourceVersion": "7", "generation": 1, **metadata}
    found["metadata"].setdefault("managedFields", [entry(OURS, "Apply", {"f:spec": {}})])
    return found


def entry(manager: str, operation: str, fields: dict[str, Any], subresource: str = "") -> dict[str, Any]:
    named = {"subresource": subresource} if subresource else {}
    return {"manager": manager, "operation": operation, "fieldsType": "FieldsV1", "fieldsV1": fields, **named}


def edited(fields: dict[str, Any], manager: str = "kubectl-edit", subresource: str = "") -> Object:
    return live(managedFields=[entry(manager, "Update", fields, subresource)])


def in_pod(fields: dict[str, Any]) -> dict[str, Any]:
    return {"f:spec": {"f:template": {"f:spec": fields}}}


ADDED: dict[str, tuple[dict[str, Any], str]] = {
    "container": (in_pod({"f:containers": {'k:{"name":"extra"}': {".": {}, "f:image": {}}}}), "containers"),
    "env": (
        in_pod(
            {
                "f:containers": {
                    'k:{"name":"vllm"}': {"f:env": {'k:{"name":"VLLM_SERVER_DEV_MODE"}': {".": {}, "f:value": {}}}}
                }
            }
        ),
        "VLLM_SERVER_DEV_MODE",
    ),
    "label of the pods": ({"f:spec": {"f:template": {"f:metadata": {"f:labels": {"f:team": {}}}}}}, "f:labels.team"),
    "label": ({"f:metadata": {"f:labels": {"f:team": {}}}}, ".metadata.labels.team"),
    "annotation": ({"f:metadata": {"f:annotations": {"f:note": {}}}}, ".metadata.annotations.note"),
    "volume": (in_pod({"f:volumes": {'k:{"name":"host"}': {".": {}, "f:hostPath": {"f:path": {}}}}}), "host"),
    "host network": (in_pod({"f:hostNetwork": {}}), ".spec.template.spec.hostNetwork"),
    "port": (
        in_pod({"f:containers": {'k:{"name":"vllm"}': {"f:ports": {'k:{"containerPort":22,"protocol":"TCP"}': {}}}}}),
        "containerPort",
    ),
    "owner": ({"f:metadata": {"f:ownerReferences": {'k:{"uid":"x"}': {}}}}, "ownerReferences"),
    "capability": (
        in_pod({"f:containers": {'k:{"name":"vllm"}': {"f:securityContext": {"f:privileged": {}}}}}),
        "securityContext",
    ),
}


@pytest.mark.parametrize("what", ADDED)
def test_an_addition_is_found_and_the_object_replaced(what: str) -> None:
    fields, path = ADDED[what]
    found = list(additions(rendered(), edited(fields)))
    assert len(found) == 1
    assert path.removeprefix("f:labels").lstrip(".") in found[0]
    assert judge(rendered(), edited(fields), None) is Action.REPLACE


NOT_DRIFT: dict[str, tuple[dict[str, Any], str, str]] = {
    "restart": (
        {
            "f:spec": {
                "f:template": {"f:metadata": {"f:annotations": {".": {}, "f:kubectl.kubernetes.io/restartedAt": {}}}}
            }
        },
        "kubectl-rollout",
        "",
    ),
    "scale": ({"f:spec": {"f:replicas": {}}}, "kubectl", "scale"),
    "status": ({"f:status": {"f:replicas": {}}}, "kube-controller-manager", "status"),
    "status without subresource": ({"f:status": {"f:replicas": {}}}, "kube-controller-manager", ""),
    "revision": (
        {"f:metadata": {"f:annotations": {".": {}, "f:deployment.kubernetes.io/revision": {}}}},
        "kube-controller-manager",
        "",
    ),
    "finalizer": ({"f:metadata": {"f:finalizers": {".": {}, 'v:"x/y"': {}}}}, "service-controller", ""),
    "the same field": (in_pod({"f:containers": {'k:{"name":"vllm"}': {".": {}, "f:image": {}}}}), "kubectl-set", ""),
}


@pytest.mark.parametrize("what", NOT_DRIFT)
def test_what_is_no_addition(what: str) -> None:
    fields, manager, subresource = NOT_DRIFT[what]
    assert list(additions(rendered(), edited(fields, manager, subresource))) == []


def test_additions_under_our_name_are_additions() -> None:
    fields: dict[str, Any] = in_pod({"f:hostNetwork": {}})
    assert len(list(additions(rendered(), live(managedFields=[entry(OURS, "Apply", fields)])))) == 1
    assert len(list(additions(rendered(), live(managedFields=[entry(OURS, "Update", fields)])))) == 1


def test_set_values_are_looked_up() -> None:
    policy = stamp({"kind": "X", "metadata": {"name": "a"}, "spec": {"policyTypes": ["Ingress"]}})
    found = live(
        policy,
        managedFields=[
            entry("kubectl", "Update", {"f:spec": {"f:policyTypes": {'v:"Ingress"': {}, 'v:"Egress"': {}}}})
        ],
    )
    assert list(additions(policy, found)) == ['.spec.policyTypes."Egress"']


def test_an_index_is_never_ours() -> None:
    found = live(managedFields=[entry("x", "Update", in_pod({"f:containers": {"i:1": {}}}))])
    assert list(additions(rendered(), found)) == [".spec.template.spec.containers.1"]


def test_defaults_and_normal_forms_are_no_drift() -> None:
    assert covers(rendered(), live())
    assert judge(rendered(), live(), None) is Action.KEEP


def test_what_is_dropped_when_empty_is_covered() -> None:
    assert covers({"a": {}, "b": [], "c": False, "d": 0, "e": ""}, {})
    assert not covers({"a": {"b": 1}}, {"a": {}})


@pytest.mark.parametrize(
    ("ours", "theirs", "same"),
    [
        ("1000m", "1", True),
        ("700m", "0.7", True),
        ("1024Mi", "1Gi", True),
        ("1", "2", False),
        ("x", "x", True),
        ("x", "1", False),
    ],
)
def test_quantities_are_compared_as_numbers_where_they_are_quantities(ours: str, theirs: str, same: bool) -> None:
    for key in ("limits", "requests"):
        assert covers({key: {"cpu": ours}}, {key: {"cpu": theirs}}) is same
    assert covers({"sizeLimit": ours}, {"sizeLimit": theirs}) is same
    assert covers({"value": ours}, {"value": theirs}) is (ours == theirs)


def test_lists_have_no_surplus() -> None:
    assert not covers([1], [1, 2])
    assert not covers([1], {"0": 1})
    assert not covers({"a": 1}, [])


def test_added_keys_of_a_secret_are_additions() -> None:
    secret = stamp({"kind": "Secret", "metadata": {"name": "a"}, "data": {"key": "dGV4dA=="}})
    fields: dict[str, Any] = {"f:data": {".": {}, "f:key": {}, "f:more": {}}}
    assert list(additions(secret, live(secret, managedFields=[entry("x", "Update", fields)]))) == [".data.more"]


def changed(path: tuple[Any, ...], value: Any, found: Object | None = None) -> Object:
    obj = copy.deepcopy(found or live())
    node = obj
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return obj


def test_a_changed_value_is_applied_again() -> None:
    assert judge(rendered(), changed(("spec", "replicas"), 5), None) is Action.APPLY


def test_another_rendering_is_applied() -> None:
    assert judge(rendered(paused=True), live(), None) is Action.APPLY
    bare = live()
    del bare["metadata"]["annotations"]
    assert judge(rendered(), bare, None) is Action.APPLY


def test_after_our_own_write_any_move_is_drift() -> None:
    settled = footprint(rendered(), live())
    assert judge(rendered(), live(), settled) is Action.KEEP
    moved = changed(("spec", "template", "spec", "hostNetwork"), True)
    assert judge(rendered(), moved, settled) is Action.REPLACE


@pytest.mark.parametrize(
    ("kind", "status", "action"),
    [
        ("Job", {}, Action.RECREATE),
        ("Job", {"conditions": [{"type": "Failed", "status": "True"}]}, Action.RECREATE),
        ("Job", {"conditions": [{"type": "Complete", "status": "True"}]}, Action.KEEP),
        ("PersistentVolumeClaim", {}, Action.APPLY),
    ],
)
def test_what_is_made_once_is_never_replaced(kind: str, status: dict[str, Any], action: Action) -> None:
    obj = stamp({"kind": kind, "metadata": {"name": "a"}, "spec": {"a": 1}})
    other = live(stamp({"kind": kind, "metadata": {"name": "a"}, "spec": {"a": 2}})) | {"status": status}
    assert judge(obj, other, None) is action
    assert judge(obj, live(obj), None) is Action.KEEP


def test_a_footprint_is_blind_to_what_servers_and_controllers_note() -> None:
    before = footprint(rendered(), live())
    noted = live(resourceVersion="8", generation=9, managedFields=[], finalizers=["x"])
    noted["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "4"
    noted["metadata"] |= {"deletionTimestamp": "2026-12-01T09:00:00Z", "deletionGracePeriodSeconds": 0}
    noted["status"] = {"replicas": 1}
    restarted = changed(("spec", "template", "metadata", "annotations", "kubectl.kubernetes.io/restartedAt"), "now")
    assert {footprint(rendered(), noted), footprint(rendered(), restarted)} == {before}
    assert footprint(rendered(), changed(("metadata", "annotations", "other"), "x")) != before
    assert footprint(rendered(), changed(("metadata", "labels", "other"), "x")) != before


def test_a_replacement_is_what_was_rendered_and_what_can_only_be_as_it_is() -> None:
    found = live(finalizers=["x"])
    found["metadata"]["annotations"]["deployment.kubernetes.io/revision"] = "4"
    found["metadata"]["labels"]["team"] = "red"
    found["spec"]["template"]["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"] = "now"
    found["spec"]["template"]["spec"]["hostNetwork"] = True
    body = replacement(rendered(), found)
    assert body["metadata"]["resourceVersion"] == "7"
    assert body["metadata"]["uid"] == "u"
    assert body["metadata"]["finalizers"] == ["x"]
    assert body["metadata"]["labels"] == {"a": "b"}
    assert body["metadata"]["annotations"] == {
        HASH_ANNOTATION: rendered()["metadata"]["annotations"][HASH_ANNOTATION],
        "deployment.kubernetes.io/revision": "4",
    }
    pod = body["spec"]["template"]
    assert pod["metadata"]["annotations"]["kubectl.kubernetes.io/restartedAt"] == "now"
    assert "hostNetwork" not in pod["spec"]


def service(kind: str) -> Object:
    spec = {"type": kind, "selector": {"a": "b"}, "ports": [{"port": 443, "targetPort": 8443}]}
    return stamp({"apiVersion": "v1", "kind": "Service", "metadata": {"name": "a", "namespace": "b"}, "spec": spec})


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_a_replaced_service_keeps_its_addresses_and_node_ports(kind: str) -> None:
    found = live(service("NodePort"))
    found["spec"] |= {"clusterIP": "10.96.0.9", "clusterIPs": ["10.96.0.9"], "externalIPs": ["192.0.2.1"]}
    found["spec"]["ports"] = [{"port": 443, "targetPort": 8443, "nodePort": 30443}, {"port": 80, "nodePort": 30080}]
    spec = replacement(service(kind), found)["spec"]
    assert (spec["clusterIP"], spec["clusterIPs"]) == ("10.96.0.9", ["10.96.0.9"])
    assert "externalIPs" not in spec
    kept = {} if kind == "ClusterIP" else {"nodePort": 30443}
    assert spec["ports"] == [{"port": 443, "targetPort": 8443, **kept}]
