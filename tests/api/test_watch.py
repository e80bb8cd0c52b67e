"""`Watcher`: kopf's streams and our lists against a real API server."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
import time
import uuid
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster import running
from securevllm.api.kinds import CONFIG_MAP, NAMESPACE, POD, SECRET, Kind, KubeObject, Ref
from securevllm.cluster import KubernetesClient, Login, connect
from securevllm.errors import OperatorError, Unavailable
from securevllm.store import Store, Watched
from securevllm.watch import Watcher
from tests.api.kube import PATIENCE

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.cluster import Cluster

pytestmark = [
    pytest.mark.cluster,
    # kopf closes its connections without waiting for it; what the garbage collector finds of them is not ours.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

OURS = "app.kubernetes.io/managed-by=securevllm-operator"
LABELS = {"app.kubernetes.io/managed-by": "securevllm-operator"}


@dataclass
class Seen:
    """Observer and sink: what the watcher reported."""

    keys: list[str] = field(default_factory=list)
    events: Counter[str] = field(default_factory=Counter)
    missed: Counter[str] = field(default_factory=Counter)

    def watch_event(self, kind: str, unix_time: float) -> None:
        assert abs(time.time() - unix_time) < 5.0
        self.events[kind] += 1

    def watch_missed(self, kind: str, changes: int) -> None:
        self.missed[kind] += changes


@pytest.fixture
async def kubernetes(cluster: Cluster) -> AsyncIterator[KubernetesClient]:
    async with connect(Login(cluster.kubeconfig), fence=lambda: True) as client:
        yield client


@pytest.fixture
async def namespace(kubernetes: KubernetesClient) -> AsyncIterator[str]:
    name = f"watch-{uuid.uuid4().hex[:8]}"
    await kubernetes.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    await kubernetes.delete(Ref(NAMESPACE, None, name))


def owners(obj: KubeObject) -> Iterator[str]:
    if owner := obj["metadata"].get("labels", {}).get("owner"):
        yield owner


@asynccontextmanager
async def watching(
    cluster: Cluster, client: KubernetesClient, store: Store, seen: Seen, resync: float = 600.0
) -> AsyncIterator[Watcher[str]]:
    watcher = Watcher(
        client,
        Login(cluster.kubeconfig),
        store,
        keys_of=owners,
        sink=seen.keys.append,
        observer=seen,
        resync=resync,
        jitter=lambda: 1.0,
    )
    task = asyncio.create_task(watcher.run())
    try:
        yield watcher
        assert not task.done(), task
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
    assert "kopf" not in {thread.name for thread in threading.enumerate()}


async def until(condition: Callable[[], Any], seconds: float = 15.0) -> None:
    deadline = time.monotonic() + seconds * PATIENCE
    while not condition():
        assert time.monotonic() < deadline, "not in time"
        await asyncio.sleep(0.02)


def config_map(namespace: str, name: str, owner: str, labels: dict[str, str] | None = None) -> KubeObject:
    metadata = {
        "name": name,
        "namespace": namespace,
        "labels": (LABELS if labels is None else labels) | {"owner": owner},
    }
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"k": "1"}}


async def test_events_reach_the_store_and_the_owners_keys(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    await kubernetes.create(config_map(namespace, "before", "first"))
    store, seen = Store([Watched(CONFIG_MAP, OURS), Watched(SECRET, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, kubernetes, store, seen) as watcher:
        await until(lambda: store.unsynced() is None)
        assert seen.keys == ["first"]
        assert [obj["metadata"]["name"] for obj in store.all(CONFIG_MAP)] == ["before"]
        seen.keys.clear()
        await streaming(kubernetes, store, namespace)
        seen.keys.clear()

        await kubernetes.create(config_map(namespace, "a", "second"))
        await kubernetes.create(config_map(namespace, "foreign", "other", labels={}))
        await until(lambda: "second" in seen.keys)
        # From one owner to another: both must look.
        await kubernetes.patch(Ref(CONFIG_MAP, namespace, "a"), {"metadata": {"labels": {"owner": "third"}}})
        await until(lambda: "third" in seen.keys)
        assert seen.keys == ["second", "second", "third"]
        await kubernetes.delete(Ref(CONFIG_MAP, namespace, "a"))
        await until(lambda: store.get(Ref(CONFIG_MAP, namespace, "a")) is None)

        assert seen.keys == ["second", "second", "third", "third"]
        assert "foreign" not in {obj["metadata"]["name"] for obj in store.all(CONFIG_MAP)}
        assert watcher.unhealthy() is None
    assert seen.missed == {}


async def streaming(kubernetes: KubernetesClient, store: Store, namespace: str) -> None:
    """Wait until the watch streams deliver."""
    await kubernetes.apply(config_map(namespace, "probe", "probe"))
    await until(lambda: store.get(Ref(CONFIG_MAP, namespace, "probe")) is not None)
    await kubernetes.delete(Ref(CONFIG_MAP, namespace, "probe"))
    await until(lambda: store.get(Ref(CONFIG_MAP, namespace, "probe")) is None)


async def test_what_was_deleted_before_a_stream_lists_is_found_without_waiting_for_the_resync(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    await kubernetes.create(config_map(namespace, "stays", "other"))
    store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, kubernetes, store, seen, resync=600.0):
        await until(lambda: store.unsynced() is None)
        # As if it had been there in our list, and deleted before kopf's.
        deleted = config_map(namespace, "deleted", "owner")
        store.hear(deleted | {"metadata": deleted["metadata"] | {"resourceVersion": "1"}})
        await until(lambda: store.get(Ref(CONFIG_MAP, namespace, "deleted")) is None)
        assert seen.keys.count("owner") == 1
        assert seen.missed == {"ConfigMap": 1}


async def test_what_is_known_already_wakes_nobody(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, kubernetes, store, seen, resync=0.5):
        await until(lambda: store.unsynced() is None)
        await streaming(kubernetes, store, namespace)
        for number in range(10):
            store.wrote(await kubernetes.apply(config_map(namespace, f"a{number}", "me")))
        await until(lambda: len(store.all(CONFIG_MAP)) == 10)
        lists = seen.events["ConfigMap"]
        await until(lambda: seen.events["ConfigMap"] >= lists + 12)
        seen.keys.clear()
        for number in range(10):
            store.wrote(await kubernetes.apply(config_map(namespace, f"a{number}", "me")))
        await until(lambda: seen.events["ConfigMap"] >= lists + 15)

        assert seen.keys == []


async def test_a_label_that_is_taken_away_looks_like_a_deletion(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, kubernetes, store, seen):
        await until(lambda: store.unsynced() is None)
        await streaming(kubernetes, store, namespace)
        await kubernetes.create(config_map(namespace, "a", "me"))
        await until(lambda: store.all(CONFIG_MAP))
        seen.keys.clear()
        label = {"app.kubernetes.io/managed-by": None}
        await kubernetes.patch(Ref(CONFIG_MAP, namespace, "a"), {"metadata": {"labels": label}})
        await until(lambda: not store.all(CONFIG_MAP))

        assert seen.keys == ["me"]
        repaired = await kubernetes.apply(config_map(namespace, "a", "me"))
        await until(lambda: store.all(CONFIG_MAP))
        assert store.all(CONFIG_MAP)[0]["metadata"]["resourceVersion"] == repaired["metadata"]["resourceVersion"]


async def test_a_resync_finds_what_the_watch_did_not_report(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    await kubernetes.create(config_map(namespace, "a", "me"))
    store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, kubernetes, store, seen, resync=1.0):
        await until(lambda: store.unsynced() is None)
        # An object that the cache believes in and the cluster does not have: a deletion that fell into a gap.
        ghost = config_map(namespace, "ghost", "ghost-owner")
        ghost["metadata"]["resourceVersion"] = "2"
        store.hear(ghost)
        await until(lambda: store.get(Ref(CONFIG_MAP, namespace, "ghost")) is None)

    assert seen.keys == ["me", "ghost-owner"]
    assert seen.missed == {"ConfigMap": 1}


async def test_cluster_wide_it_sees_all_namespaces_and_strips_pods(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    store, seen = Store([Watched(CONFIG_MAP, OURS), Watched(POD, OURS, managed_fields=False)]), Seen()
    async with watching(cluster, kubernetes, store, seen):
        await until(lambda: store.unsynced() is None)
        await streaming(kubernetes, store, namespace)
        created = await kubernetes.create(config_map(namespace, "a", namespace))
        await until(lambda: namespace in seen.keys)

        assert store.get(Ref.of(created)) is not None
        assert store.all(CONFIG_MAP, namespace)[0]["metadata"]["managedFields"]


async def test_a_thousand_objects_are_read_quickly(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    limit = asyncio.Semaphore(20)

    async def make(number: int) -> None:
        async with limit:
            await kubernetes.create(config_map(namespace, f"a{number:04}", f"o{number}"))

    await asyncio.gather(*(make(number) for number in range(1000)))
    store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace]), Seen()
    started = time.monotonic()
    async with watching(cluster, kubernetes, store, seen):
        await until(lambda: store.unsynced() is None)
        listed = time.monotonic() - started
        await until(lambda: seen.events["ConfigMap"] >= 1000)
        streamed = time.monotonic() - started

    print(f"1000 objects: known after {listed:.2f} s, streamed by kopf after {streamed:.2f} s")  # noqa: T201
    assert len(seen.keys) == 1000, "what kopf lists again is no change"
    assert listed < 10.0


async def test_a_kind_that_is_not_served_says_what_to_install(cluster: Cluster, kubernetes: KubernetesClient) -> None:
    missing = Kind("nothing.securevllm.io/v1", "Nothing", "nothings")
    watcher = Watcher(
        kubernetes,
        Login(cluster.kubeconfig),
        Store([Watched(CONFIG_MAP, OURS), Watched(missing)]),
        keys_of=owners,
        sink=lambda _: None,
        observer=Seen(),
    )

    with pytest.raises(
        OperatorError, match=r"nothings\.nothing\.securevllm\.io is not served .* kubectl apply --server-side -k crds"
    ):
        await watcher.run()


async def test_missing_rights_say_which_rule_to_add(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str, tmp_path: Path
) -> None:
    login = Login(cluster.kubeconfig_for_token("not-a-token", tmp_path / "unknown"))
    async with connect(login, fence=lambda: True) as stranger:
        watcher = Watcher(
            stranger,
            login,
            Store([Watched(SECRET, OURS)], namespaces=[namespace]),
            keys_of=owners,
            sink=lambda _: None,
            observer=Seen(),
        )
        with pytest.raises(OperatorError, match="401"):
            await watcher.run()

    token = await service_account_token(kubernetes, namespace)
    login = Login(cluster.kubeconfig_for_token(token, tmp_path / "weak"))
    async with connect(login, fence=lambda: True) as weak:
        watcher = Watcher(
            weak,
            login,
            Store([Watched(SECRET, OURS)], namespaces=[namespace]),
            keys_of=owners,
            sink=lambda _: None,
            observer=Seen(),
        )
        with pytest.raises(OperatorError, match=r'resources: \["secrets"\], verbs: \["get", "list", "watch"\]'):
            await watcher.run()


async def service_account_token(kubernetes: KubernetesClient, namespace: str) -> str:
    account = {"apiVersion": "v1", "kind": "ServiceAccount", "metadata": {"name": "weak", "namespace": namespace}}
    await kubernetes.create(account)
    response = await kubernetes._api.call_api(
        "POST",
        f"{kubernetes._server}/api/v1/namespaces/{namespace}/serviceaccounts/weak/token",
        header_params={"Content-Type": "application/json"},
        body={"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": 600}},
    )
    token: str = json.loads(await response.read())["status"]["token"]  # type: ignore[no-untyped-call]
    return token


async def test_an_api_server_that_comes_late_is_waited_for(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    class Late:
        """The client, but the first list gets no answer."""

        failures = 1

        def __getattr__(self, name: str) -> Any:
            return getattr(kubernetes, name)

        async def list(self, *arguments: Any) -> Any:
            if self.failures:
                self.failures -= 1
                raise Unavailable("connection refused")
            return await kubernetes.list(*arguments)

    store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, Late(), store, seen):  # type: ignore[arg-type]
        await until(lambda: store.unsynced() is None)


async def test_an_event_that_cannot_be_taken_ends_the_watcher(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    def broken(obj: KubeObject) -> Iterator[str]:
        raise RuntimeError(f"cannot take {obj['metadata']['name']}")

    store = Store([Watched(CONFIG_MAP, OURS)], namespaces=[namespace])
    watcher = Watcher(
        kubernetes, Login(cluster.kubeconfig), store, keys_of=broken, sink=lambda _: None, observer=Seen()
    )
    running = asyncio.create_task(watcher.run())
    await until(lambda: store.unsynced() is None)
    await kubernetes.create(config_map(namespace, "a", "me"))

    with pytest.raises(OperatorError, match="cannot take a"):
        async with asyncio.timeout(20.0):
            await running


async def test_watching_writes_nothing(cluster: Cluster, kubernetes: KubernetesClient, namespace: str) -> None:
    if cluster.audit_log is None:
        pytest.skip(f"provider {cluster.provider}: no audit log to read")
    store, seen = Store([Watched(CONFIG_MAP, OURS), Watched(SECRET, OURS)], namespaces=[namespace]), Seen()
    async with watching(cluster, kubernetes, store, seen):
        await until(lambda: store.unsynced() is None)
        await streaming(kubernetes, store, namespace)

    verbs = {event["verb"] for event in cluster.audit_events() if event.get("userAgent", "").startswith("kopf")}
    assert verbs == {"get", "list", "watch"}


@pytest.fixture(scope="module")
def own_cluster(cluster: Cluster) -> Iterator[Cluster]:
    """A second cluster, because its API server is stopped."""
    if cluster.provider != "local":
        pytest.skip(f"provider {cluster.provider}: its API server is not ours to stop")
    with running() as own:
        yield own


@pytest.mark.parametrize("pause", [0.0, 5.0])
async def test_watching_goes_on_after_the_api_server_was_away(own_cluster: Cluster, pause: float) -> None:
    async with connect(Login(own_cluster.kubeconfig), fence=lambda: True, timeout=30.0) as client:
        name = f"away-{uuid.uuid4().hex[:8]}"
        await client.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
        store, seen = Store([Watched(CONFIG_MAP, OURS)], namespaces=[name]), Seen()
        async with watching(own_cluster, client, store, seen):
            await until(lambda: store.unsynced() is None)
            await streaming(client, store, name)
            await client.create(config_map(name, "kept", "me"))
            await asyncio.to_thread(own_cluster.stop_apiserver)
            await asyncio.sleep(pause)
            await asyncio.to_thread(own_cluster.start_apiserver)
            seen.keys.clear()
            away = time.monotonic()
            await client.apply(config_map(name, "after", "you"))
            await until(lambda: "you" in seen.keys, 30.0)
            print(f"API server away for {pause:g} s: events again after {time.monotonic() - away:.1f} s")  # noqa: T201

            assert {obj["metadata"]["name"] for obj in store.all(CONFIG_MAP)} == {"kept", "after"}
