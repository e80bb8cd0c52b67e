"""The gateway's objects: which routes, which volumes, which Service; and what a revision is made of."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import Made, Observed, Rendered, render
from securevllm.render.envoy import ClientKey
from securevllm.render.gateway import allowed_routes
from securevllm.render.meta import Object, Owner

OWNER = Owner("llama", "apps", "uid-1")
FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
KEY = ClientKey("max", "a-key-of-twenty-characters")


def made(spec: dict[str, Any] | None = None, keys: tuple[ClientKey, ...] = (), **gateway: Any) -> Rendered:
    judged = parse("llama", {**FINE, **(spec or {}), "gateway": gateway})
    return render(OWNER, judged, Context(), Observed(client_keys=keys))


def one(found: Rendered, kind: str, name: str) -> Object:
    return next(obj for obj in found.objects() if (obj["kind"], obj["metadata"]["name"]) == (kind, name))


def pod(found: Rendered) -> dict[str, Any]:
    spec: dict[str, Any] = one(found, "Deployment", "llama-gateway")["spec"]["template"]["spec"]
    return spec


def volumes(found: Rendered) -> dict[str, Any]:
    return {item["name"]: item for item in pod(found)["volumes"]}


def routes(**given: Any) -> set[str]:
    judged = parse("llama", {**FINE, "gateway": {"routes": given}})
    return {route.name for route in allowed_routes(judged.spec, judged.version)}


def test_routes_of_a_profile_and_single_ones() -> None:
    chat = {"GET /v1/models", "POST /v1/chat/completions", "POST /v1/completions"}
    assert routes() == chat
    assert routes(profiles=[]) == set()
    assert routes(profiles=[], allow=[{"method": "POST", "path": "/v2/embed"}]) == {"POST /v2/embed"}
    assert routes(profiles=["chat", "score"]) == chat | {"POST /v1/score"}


def test_all_profiles_open_nothing_that_is_never_open() -> None:
    every = [name for name in catalogue.profiles() if name != "realtime"]
    never = {
        f"{route.method} {route.path}" for route in catalogue.routes_of(catalogue.newest()).values() if route.never
    }
    assert not routes(profiles=every) & never


def test_routes_that_a_version_lacks_are_not_rendered() -> None:
    old = {"image": "v:v0.16.0", "security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": "for this test"}]}}
    judged = parse("llama", {**FINE, **old, "gateway": {"routes": {"profiles": ["messages"]}}})
    assert "POST /v1/messages/count_tokens" not in {r.name for r in allowed_routes(judged.spec, judged.version)}
    assert "POST /v1/messages/count_tokens" in routes(profiles=["messages"])


def generated(found: Rendered) -> list[Made]:
    return [item.made for item in found.generated]


def test_generated_secrets() -> None:
    assert generated(made()) == [Made.ENGINE_KEY, Made.CLIENT_KEYS, Made.CA, Made.TLS]
    assert generated(made(authentication={"apiKeys": {"secretRefs": [{"name": "a"}]}})) == [
        Made.ENGINE_KEY,
        Made.CA,
        Made.TLS,
    ]
    assert generated(made(authentication={"none": "I accept that"}, tls={"secretName": "a"})) == [Made.ENGINE_KEY]
    assert generated(made(tls={"disabled": "a mesh does it"})) == [Made.ENGINE_KEY, Made.CLIENT_KEYS]


def test_the_certificate_is_for_every_name_of_the_service() -> None:
    names = made(tls={"hostnames": ["llm.example.com"]}).generated[-1].names
    assert names == (
        "llama-gateway.apps.svc.cluster.local", "llama-gateway.apps.svc", "llama-gateway.apps", "llama-gateway",
        "llm.example.com",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("gateway", "expected"),
    [
        ({}, {"bootstrap", "xds", "engine", "auth", "tls"}),
        ({"authentication": {"none": "I accept that"}}, {"bootstrap", "xds", "engine", "tls"}),
        ({"tls": {"disabled": "a mesh does it"}}, {"bootstrap", "xds", "engine", "auth"}),
    ],
)
def test_volumes_hold_what_exists(gateway: dict[str, Any], expected: set[str]) -> None:
    found = made(keys=(KEY,), **gateway)
    assert volumes(found).keys() == expected
    files = one(found, "ConfigMap", "llama-gateway-xds")["data"]
    for name in ("bootstrap", "xds"):
        # kubelet does not start a pod whose ConfigMap lacks an item.
        assert {item["key"] for item in volumes(found)[name]["configMap"]["items"]} <= files.keys()
    assert found.served_files().keys() - {"api_keys.yaml"} == files.keys()
    assert found.revision()


def test_the_pod_mounts_no_key_that_it_does_not_need() -> None:
    found = volumes(made())
    assert [item["key"] for item in found["engine"]["secret"]["items"]] == ["api-key"]
    assert [item["key"] for item in found["tls"]["secret"]["items"]] == ["tls.crt", "tls.key"]
    assert "gateway-ca" not in str(found)


def test_a_certificate_of_the_user_is_mounted() -> None:
    assert volumes(made(tls={"secretName": "web"}))["tls"]["secret"]["secretName"] == "web"


def decoded(obj: dict[str, Any]) -> list[bytes]:
    return [base64.b64decode(value) for value in obj.get("data", {}).values()] if obj["kind"] == "Secret" else []


def test_client_keys_are_in_the_secret_and_nowhere_else() -> None:
    found = made(keys=(KEY,))
    holders = [obj["metadata"]["name"] for obj in found.objects() if KEY.key in str(obj) + str(decoded(obj))]
    assert holders == ["llama-gateway-auth"]
    assert KEY.key not in repr(found.gateway_files)
    assert KEY.key not in repr(found).replace(repr(found.configuration), "")


def test_another_key_is_another_revision_and_no_rollout() -> None:
    before, after = made(keys=(KEY,)), made(keys=(KEY, ClientKey("eva", "another-key-of-that-length")))
    assert before.revision() != after.revision()
    assert pod(before) == pod(after)


def test_other_routes_are_another_revision_and_no_rollout() -> None:
    before, after = made(), made(routes={"profiles": ["embeddings"]})
    assert before.revision() != after.revision()
    assert pod(before) == pod(after)


@pytest.mark.parametrize("kind", ["ClusterIP", "NodePort", "LoadBalancer"])
def test_the_service(kind: str) -> None:
    clients: dict[str, Any] = {} if kind == "ClusterIP" else {"clients": {"cidrs": ["203.0.113.0/24"]}}
    annotations = {"metallb.io/ip-allocated-from-pool": "public"}
    found = one(made(service={"type": kind, "annotations": annotations}, **clients), "Service", "llama-gateway")
    assert found["spec"]["type"] == kind
    assert found["spec"].get("externalTrafficPolicy") == (None if kind == "ClusterIP" else "Local")
    assert annotations.items() <= found["metadata"]["annotations"].items()
    assert found["spec"]["ports"] == [{"name": "https", "port": 443, "targetPort": 8443, "protocol": "TCP"}]


def test_without_tls() -> None:
    found = made(tls={"disabled": "a mesh does it"})
    assert found.url == "http://llama-gateway.apps.svc.cluster.local"
    ports = one(found, "Service", "llama-gateway")["spec"]["ports"]
    assert ports == [{"name": "http", "port": 80, "targetPort": 8080, "protocol": "TCP"}]


@pytest.mark.parametrize(("replicas", "suspend", "budget"), [(0, False, 0), (1, False, 0), (2, False, 1), (3, True, 0)])
def test_a_budget_needs_two_gateways(replicas: int, suspend: bool, budget: int) -> None:
    found = made({"suspend": suspend}, replicas=replicas)
    assert len([obj for obj in found.configuration if obj["kind"] == "PodDisruptionBudget"]) == budget
    assert one(found, "Deployment", "llama-gateway")["spec"]["replicas"] == (0 if suspend else replicas)


def test_envoy_sheds_load_below_its_memory_limit() -> None:
    default = made().gateway_files["bootstrap.yaml"]
    larger = made(resources={"limits": {"memory": "1Gi"}}).gateway_files["bootstrap.yaml"]
    assert str(int(512 * 2**20 * 0.8)) in default
    assert str(int(2**30 * 0.8)) in larger


def test_the_selector_of_the_status_matches_engines() -> None:
    found = made()
    labels = one(found, "Deployment", "llama-engine")["spec"]["template"]["metadata"]["labels"]
    assert all(labels[key] == value for key, value in (pair.split("=") for pair in found.selector.split(",")))
