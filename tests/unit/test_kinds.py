from __future__ import annotations

import pytest

from securevllm.api.kinds import (
    CONFIG_MAP,
    KINDS,
    NAMESPACE,
    NETWORK_POLICY,
    POD,
    SECURE_VLLM_DEPLOYMENT,
    Kind,
    Ref,
    kind_of,
)
from securevllm.errors import InternalError


def test_paths_of_collections_objects_and_subresources() -> None:
    assert POD.path() == "/api/v1/pods"
    assert POD.path("default") == "/api/v1/namespaces/default/pods"
    assert POD.path("default", "a", "log") == "/api/v1/namespaces/default/pods/a/log"
    assert NETWORK_POLICY.path("x", "y") == "/apis/networking.k8s.io/v1/namespaces/x/networkpolicies/y"
    assert NAMESPACE.path(None, "x") == "/api/v1/namespaces/x"


def test_names_cannot_leave_their_place_in_the_path() -> None:
    assert CONFIG_MAP.path("a/../b", "x?force=true") == "/api/v1/namespaces/a%2F..%2Fb/configmaps/x%3Fforce%3Dtrue"


@pytest.mark.parametrize(("kind", "namespace", "name"), [(NAMESPACE, "x", "y"), (POD, None, "y")])
def test_scope_mistakes_are_refused(kind: Kind, namespace: str | None, name: str) -> None:
    with pytest.raises(InternalError, match="must"):
        kind.path(namespace, name)


def test_group_version_and_resource_names() -> None:
    assert (POD.group, POD.version, POD.resource) == ("", "v1", "pods")
    assert (NETWORK_POLICY.group, NETWORK_POLICY.version) == ("networking.k8s.io", "v1")
    assert SECURE_VLLM_DEPLOYMENT.resource == "securevllmdeployments.securevllm.io"


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_the_address_of_an_object_is_read_from_it(kind: Kind) -> None:
    obj = {"apiVersion": kind.api_version, "kind": kind.kind, "metadata": {"name": "a", "namespace": "b"}}

    assert kind_of(obj) is kind
    assert Ref.of(obj) == Ref(kind, "b" if kind.namespaced else None, "a")


def test_unknown_kinds_and_nameless_objects_are_refused() -> None:
    with pytest.raises(InternalError, match="'v1', kind 'Foo'"):
        kind_of({"apiVersion": "v1", "kind": "Foo"})
    with pytest.raises(InternalError, match=r"Pod without metadata\.name"):
        Ref.of({"apiVersion": "v1", "kind": "Pod", "metadata": {"namespace": "x"}})
