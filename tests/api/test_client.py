"""`KubernetesClient` against a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import uuid
from collections.abc import AsyncIterator
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api.kinds import (
    CONFIG_MAP,
    EVENT,
    KINDS,
    NAMESPACE,
    POD,
    SECRET,
    SECURE_VLLM_DEPLOYMENT,
    SERVICE,
    SERVICE_ACCOUNT,
    Kind,
    KubeObject,
    Ref,
)
from securevllm.cluster import JSON_PATCH, KubernetesClient, Login, connect
from securevllm.errors import AlreadyExists, ApiError, Conflict, Forbidden, Invalid, NotFound, Unavailable

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = pytest.mark.cluster


@pytest.fixture
async def kubernetes(cluster: Cluster) -> AsyncIterator[KubernetesClient]:
    async with connect(Login(cluster.kubeconfig), fence=lambda: True, instance="test") as client:
        yield client


@pytest.fixture
async def namespace(kubernetes: KubernetesClient) -> AsyncIterator[str]:
    name = f"client-{uuid.uuid4().hex[:8]}"
    await kubernetes.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    await kubernetes.delete(Ref(NAMESPACE, None, name))


def config_map(namespace: str, name: str = "a", data: dict[str, str] | None = None, **metadata: Any) -> KubeObject:
    metadata |= {"name": name, "namespace": namespace}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": data or {"k": "1"}}


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != SECURE_VLLM_DEPLOYMENT], ids=str)
async def test_the_table_of_kinds_is_what_the_api_server_serves(kubernetes: KubernetesClient, kind: Kind) -> None:
    root = Kind(kind.api_version, "APIResourceList", "")
    served = await kubernetes.get(Ref(Kind(root.api_version, root.kind, "", namespaced=False), None, ""))
    by_plural = {resource["name"]: resource for resource in served["resources"]}

    assert by_plural[kind.plural]["kind"] == kind.kind
    assert by_plural[kind.plural]["namespaced"] == kind.namespaced


async def test_create_get_replace_delete(kubernetes: KubernetesClient, namespace: str) -> None:
    ref = Ref(CONFIG_MAP, namespace, "a")
    created = await kubernetes.create(config_map(namespace))
    with pytest.raises(AlreadyExists):
        await kubernetes.create(config_map(namespace))
    replaced = await kubernetes.replace(created | {"data": {"k": "2"}})
    with pytest.raises(Conflict):
        await kubernetes.replace(created | {"data": {"k": "3"}})
    with pytest.raises(Conflict):
        await kubernetes.delete(ref, uid="00000000-0000-0000-0000-000000000000")
    with pytest.raises(Conflict):
        await kubernetes.delete(ref, resource_version=created["metadata"]["resourceVersion"])

    assert (await kubernetes.get(ref))["data"] == {"k": "2"}
    assert await kubernetes.delete(ref, uid=replaced["metadata"]["uid"])
    assert not await kubernetes.delete(ref)
    with pytest.raises(NotFound):
        await kubernetes.get(ref)


async def test_applying_the_same_writes_nothing_and_drift_is_repaired(
    kubernetes: KubernetesClient, namespace: str
) -> None:
    first = await kubernetes.apply(config_map(namespace))
    again = await kubernetes.apply(config_map(namespace))
    assert again["metadata"]["resourceVersion"] == first["metadata"]["resourceVersion"]

    await kubernetes.patch(Ref.of(first), {"data": {"k": "drift", "more": "by others"}})
    repaired = await kubernetes.apply(config_map(namespace))
    # `k` was ours and is forced back; `more` was added under the same manager name but by a merge patch.
    assert repaired["data"]["k"] == "1"
    assert {entry["manager"] for entry in repaired["metadata"]["managedFields"]} == {"securevllm-operator"}


async def test_apply_never_takes_over_another_uid_or_an_older_version(
    kubernetes: KubernetesClient, namespace: str
) -> None:
    await kubernetes.apply(config_map(namespace))
    for precondition in ({"uid": "00000000-0000-0000-0000-000000000000"}, {"resourceVersion": "1"}):
        with pytest.raises(Conflict):
            await kubernetes.apply(config_map(namespace, data={"k": "2"}, **precondition))
    with pytest.raises(Conflict):
        await kubernetes.apply(config_map(namespace, "gone", uid="00000000-0000-0000-0000-000000000000"))


async def test_refused_objects_name_the_field(kubernetes: KubernetesClient, namespace: str) -> None:
    service = {"apiVersion": "v1", "kind": "Service", "metadata": {"name": "s", "namespace": namespace}}
    with pytest.raises(Invalid, match=r"spec\.ports\[0\]\.port"):
        await kubernetes.apply(service | {"spec": {"ports": [{"port": 99999999}]}})
    with pytest.raises(Invalid, match=r"\.spec\.prots: field not declared"):
        await kubernetes.apply(service | {"spec": {"prots": []}})
    with pytest.raises(NotFound, match="namespaces"):
        await kubernetes.create(config_map("there-is-no-such-namespace"))
    assert SERVICE.kind == "Service"


async def test_values_of_a_refused_secret_are_not_repeated(kubernetes: KubernetesClient, namespace: str) -> None:
    metadata = {"name": "s", "namespace": namespace}
    bad = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"bad name": "dG9wLXNlY3JldA=="}}
    worse = {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "data": {"k": {"deep": "dG9wLXNlY3JldA=="}}}
    for secret in (bad, worse):
        for write in (kubernetes.create, kubernetes.apply):
            with pytest.raises(ApiError) as caught:
                await write(secret)
            assert "dG9w" not in f"{caught.value!r} {caught.value.__cause__!r}"


async def test_status_of_another_uid_is_not_touched(kubernetes: KubernetesClient, namespace: str) -> None:
    containers = [{"name": "c", "image": "example.invalid/none"}]
    pod: KubeObject = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "p", "namespace": namespace},
        "spec": {"containers": containers, "automountServiceAccountToken": False},
    }
    created = await eventually_create(kubernetes, pod)
    ref = Ref(POD, namespace, "p")
    patched = await kubernetes.patch_status(ref, {"message": "hello"}, uid=created["metadata"]["uid"])
    assert patched["status"]["message"] == "hello"
    with pytest.raises(Conflict):
        await kubernetes.patch_status(ref, {"message": "x"}, uid="00000000-0000-0000-0000-000000000000")
    await kubernetes.patch(
        ref, [{"op": "add", "path": "/metadata/annotations", "value": {"a": "b"}}], content_type=JSON_PATCH
    )

    assert (await kubernetes.get(ref))["metadata"]["annotations"] == {"a": "b"}


async def eventually_create(kubernetes: KubernetesClient, obj: KubeObject) -> KubeObject:
    """A pod needs the namespace's default ServiceAccount, which a controller makes."""
    async with asyncio.timeout(10.0):
        while True:
            with contextlib.suppress(Forbidden):
                return await kubernetes.create(obj)
            await asyncio.sleep(0.1)


async def test_lists_are_complete_over_pages_and_filtered_by_the_server(
    kubernetes: KubernetesClient, namespace: str
) -> None:
    limit = asyncio.Semaphore(20)

    async def make(number: int) -> None:
        async with limit:
            labels = {"parity": "even" if number % 2 == 0 else "odd"}
            await kubernetes.create(config_map(namespace, f"a{number:04}", labels=labels))

    await asyncio.gather(*(make(number) for number in range(620)))
    listing = await kubernetes.list(CONFIG_MAP, namespace, "parity")
    odd = await kubernetes.list(CONFIG_MAP, None, "parity=odd")

    assert len(listing.items) == 620
    assert {(item["apiVersion"], item["kind"]) for item in listing.items} == {("v1", "ConfigMap")}
    assert len([item for item in odd.items if item["metadata"]["namespace"] == namespace]) == 310
    assert listing.resource_version >= max(int(item["metadata"]["resourceVersion"]) for item in listing.items)


async def test_events_are_accepted_and_those_that_are_refused_are_no_error(
    kubernetes: KubernetesClient, namespace: str
) -> None:
    about = await kubernetes.create(config_map(namespace))
    await kubernetes.post_event(about, reason="DriftRepaired", note="ä" * 2000, action="Reconcile", warning=True)
    nowhere = about | {"metadata": about["metadata"] | {"namespace": "there-is-no-such-namespace"}}
    await kubernetes.post_event(nowhere, reason="DriftRepaired", note="n", action="Reconcile")

    (event,) = (await kubernetes.list(EVENT, namespace)).items
    assert event["regarding"]["uid"] == about["metadata"]["uid"]
    assert (event["type"], event["reason"], len(event["note"])) == ("Warning", "DriftRepaired", 512)


async def test_a_service_account_token_that_is_replaced_on_disk(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str, tmp_path: Path
) -> None:
    """What kubelet does to a mounted token: the old one stops working, and the file has a new one."""
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "operator", "namespace": namespace}}
    await kubernetes.create(account)
    tokens = [await token(kubernetes, namespace, "operator") for _ in range(2)]
    file = tmp_path / "token"
    login = Login(cluster.kubeconfig_for_token(tokens[0], tmp_path / "config", token_file=file))
    async with connect(login, fence=lambda: True) as client:
        # No rights: "forbidden" proves who asks, "unauthorized" would be a bad token.
        with pytest.raises(Forbidden, match=f"system:serviceaccount:{namespace}:operator"):
            await client.list(SECRET, namespace)
        await kubernetes.delete(Ref(SECRET, namespace, "token-0"))
        # The API server remembers a good token for some seconds.
        codes = [await status_of(client, namespace)]
        for _ in range(60):
            if codes[-1] == HTTPStatus.UNAUTHORIZED:
                break
            await asyncio.sleep(0.5)
            codes.append(await status_of(client, namespace))
        assert codes[-1] == HTTPStatus.UNAUTHORIZED
        file.write_text(tokens[1], encoding="utf-8")
        with pytest.raises(Forbidden, match="cannot create"):
            await client.create(config_map(namespace))


async def token(kubernetes: KubernetesClient, namespace: str, account: str) -> str:
    """A token that is bound to a Secret of its own: deleting that revokes it."""
    name = f"token-{len((await kubernetes.list(SECRET, namespace)).items)}"
    secret = await kubernetes.create(
        {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": name, "namespace": namespace}}
    )
    bound = {"apiVersion": "v1", "kind": "Secret", "name": name, "uid": secret["metadata"]["uid"]}
    # A create on a subresource, which the port does not have: only this test needs it.
    path = Kind(SERVICE_ACCOUNT.api_version, "TokenRequest", f"serviceaccounts/{account}/token")
    request = {"spec": {"boundObjectRef": bound, "expirationSeconds": 600}}
    response = await kubernetes._api.call_api(
        "POST",
        f"{kubernetes._server}{path.path(namespace)}",
        header_params={"Content-Type": "application/json"},
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest"} | request,
    )
    value: str = json.loads(await response.read())["status"]["token"]  # type: ignore[no-untyped-call]
    return value


async def status_of(client: KubernetesClient, namespace: str) -> int:
    try:
        await client.list(SECRET, namespace)
    except ApiError as error:
        return error.status
    return 200


async def test_a_kind_that_is_not_served_is_not_found(kubernetes: KubernetesClient) -> None:
    with pytest.raises(NotFound):
        await kubernetes.list(Kind("nothing.securevllm.io/v1", "Nothing", "nothings"))


async def test_an_api_server_that_is_not_there_is_unavailable(cluster: Cluster, tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text(
        cluster.kubeconfig.read_text(encoding="utf-8").replace(cluster.server, "https://127.0.0.1:9"), encoding="utf-8"
    )
    async with connect(Login(path), fence=lambda: True, timeout=1.0) as client:
        with pytest.raises(Unavailable):
            await client.get(Ref(NAMESPACE, None, "default"))


async def test_what_a_login_may_do_is_asked(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str, tmp_path: Path
) -> None:
    assert await kubernetes.allowed("create", POD, namespace)
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "powerless", "namespace": namespace}}
    await kubernetes.create(account)
    login = cluster.kubeconfig_for_token(await token(kubernetes, namespace, "powerless"), tmp_path / "config")
    async with connect(Login(login), fence=lambda: True) as powerless:
        assert not await powerless.allowed("create", POD, namespace)
        assert not await powerless.allowed("list", SECURE_VLLM_DEPLOYMENT, None)
