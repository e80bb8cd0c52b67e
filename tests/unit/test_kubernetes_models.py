"""The strict check of rendered objects finds what the API server would drop or refuse."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from tests.kubernetes_models import MODELS, NotAKubernetesObjectError, validate_strict

DEPLOYMENT: dict[str, Any] = {
    "apiVersion": "apps/v1",
    "kind": "Deployment",
    "metadata": {
        "name": "llama-gateway",
        "namespace": "team",
        "labels": {"app.kubernetes.io/name": "llama", "empty": ""},
        "annotations": {"prometheus.io/port": "9902"},
        "creationTimestamp": "2026-01-01T00:00:00Z",
    },
    "spec": {
        "replicas": 2,
        "selector": {"matchLabels": {"app": "x"}},
        "template": {
            "metadata": {"labels": {"app": "x"}},
            "spec": {
                "containers": [
                    {
                        "name": "envoy",
                        "image": "envoy",
                        "readinessProbe": {"httpGet": {"path": "/ready", "port": "ops"}},
                        "resources": {"limits": {"memory": "1Gi"}},
                    }
                ]
            },
        },
    },
}
SECRET = {
    "apiVersion": "v1",
    "kind": "Secret",
    "metadata": {"name": "key"},
    "data": {"key": "c2VjcmV0"},
    "type": "Opaque",
}


def changed(path: tuple[str | int, ...], value: Any) -> dict[str, Any]:
    obj = copy.deepcopy(DEPLOYMENT)
    node: Any = obj
    for part in path[:-1]:
        node = node[part]
    node[path[-1]] = value
    return obj


@pytest.mark.parametrize(
    "obj", [DEPLOYMENT, SECRET, changed(("spec", "replicas"), None)], ids=["deep", "bytes", "null"]
)
def test_a_right_object_passes(obj: dict[str, Any]) -> None:
    validate_strict(obj)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        pytest.param(("spec", "replica"), 1, "spec.replica", id="an unknown field"),
        pytest.param(
            ("spec", "min_ready_seconds"), 1, "spec.min_ready_seconds: not the name of a field", id="snake case"
        ),
        pytest.param(("spec", "replicas"), "2", "spec.replicas: Input should be a valid integer", id="a wrong type"),
        pytest.param(("spec", "selector"), None, "spec.selector", id="a required field"),
        pytest.param(
            ("spec", "template", "spec", "containers", 0, "ports"),
            [{"port": 1}],
            r"spec.template.spec.containers.0.ports.0.containerPort: Field required",
            id="deep within lists",
        ),
        pytest.param(
            ("spec", "template", "spec", "containers", 0, "env"), [{"name": "A", "value": 1}], "env.0.value", id="env"
        ),
        pytest.param(("metadata", "name"), "Llama", "'Llama' is not a DNS subdomain name", id="name"),
        pytest.param(("metadata", "labels"), {"a b": "x"}, "'a b' is not a qualified name", id="label key"),
        pytest.param(("metadata", "labels"), {"a": "-x"}, "'-x' is not a label value", id="label value"),
        pytest.param(("metadata", "labels"), {"a": "x" * 64}, "is not a label value", id="label length"),
        pytest.param(("metadata", "annotations"), {"a/b/c": "x"}, "'a/b/c' is not a qualified name", id="annotation"),
    ],
)
def test_a_wrong_object_is_refused_with_its_path(path: tuple[str | int, ...], value: Any, message: str) -> None:
    with pytest.raises(NotAKubernetesObjectError, match=message) as caught:
        validate_strict(changed(path, value))
    assert "apps/v1 Deployment" in str(caught.value)


def test_every_finding_is_reported() -> None:
    obj = changed(("metadata", "name"), "UPPER")
    obj["spec"]["replicas"] = "2"
    with pytest.raises(NotAKubernetesObjectError) as caught:
        validate_strict(obj)
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("kind", [("v1", "Deployment"), ("apps/v1beta1", "Deployment"), ("None", "None")])
def test_a_kind_of_another_group_is_refused(kind: tuple[str, str]) -> None:
    with pytest.raises(NotAKubernetesObjectError, match="no model for this kind"):
        validate_strict({"apiVersion": kind[0], "kind": kind[1], "metadata": {"name": "x"}})


def test_no_secret_value_is_in_the_message() -> None:
    with pytest.raises(NotAKubernetesObjectError) as caught:
        validate_strict({**SECRET, "stringData": {"key": {"nested": "hunter2"}}})
    assert "hunter2" not in str(caught.value)


def test_every_model_is_of_its_kind() -> None:
    assert not [kind for (_, kind), model in MODELS.items() if not model.__name__.endswith(kind)]
