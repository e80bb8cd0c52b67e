"""The hollow node: volumes as kubelet writes them, status, restarts, probes, DNS, and a real Envoy as a pod."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from kubernetes import client, config

from e2e.cluster import Cluster, ClusterError, daemon, dns, environment, runners, running, volumes
from e2e.cluster.errors import TooLate
from e2e.cluster.hollow import HollowNode, hollow_node
from e2e.cluster.runners import ContainerStart, Launch, Outcome
from tests.api.kube import PATIENCE

ROOT = Path(__file__).parents[2]
SERVER = Path(__file__).parent / "hollow_server.py"


def eventually(check: Callable[[], Any], seconds: float = 20.0) -> Any:
    """Return the first true result of `check`; fail with its last error or value."""
    deadline = time.monotonic() + seconds * PATIENCE
    while True:
        last: Any
        try:
            if last := check():
                return last
        except (OSError, client.ApiException, AssertionError, LookupError) as error:
            last = error
        if time.monotonic() > deadline:
            raise TooLate(f"not within {seconds * PATIENCE} s: {last!r}")
        time.sleep(0.05)


# Volumes, environment and DNS: no cluster


def files(**content: str) -> volumes.Payload:
    return {name.replace("_", "."): volumes.File(value.encode()) for name, value in content.items()}


def test_a_volume_is_swapped_as_a_whole(tmp_path: Path) -> None:
    assert volumes.write(tmp_path, files(a_txt="1", b_txt="1"))
    first = (tmp_path / "..data").readlink()
    assert first.name.startswith("..20")
    assert (tmp_path / "a.txt").readlink() == Path("..data/a.txt")
    assert volumes.write(tmp_path, files(a_txt="2", c_txt="2"))
    assert (tmp_path / "..data").readlink() != first
    assert {path.name for path in tmp_path.iterdir() if not path.name.startswith("..")} == {"a.txt", "c.txt"}
    assert (tmp_path / "a.txt").read_text(encoding="ascii") == "2"
    assert not (tmp_path / first).exists(), "the old set is gone"


def test_unchanged_content_writes_nothing(tmp_path: Path) -> None:
    volumes.write(tmp_path, files(a_txt="1"))
    before = (tmp_path / "..data").readlink()
    assert not volumes.write(tmp_path, files(a_txt="1"))
    assert (tmp_path / "..data").readlink() == before


def test_an_empty_volume_is_a_volume(tmp_path: Path) -> None:
    assert volumes.write(tmp_path, {})
    assert (tmp_path / "..data").is_dir()


@pytest.mark.parametrize("path", ["/etc/passwd", "../up", "a/../../up", "..data", ""])
def test_a_volume_does_not_write_outside(tmp_path: Path, path: str) -> None:
    with pytest.raises(volumes.VolumeError, match="not a path inside"):
        volumes.write(tmp_path, {path: volumes.File(b"")})


def sources(config_map: dict[str, Any] | None = None, secret: dict[str, Any] | None = None) -> volumes.Sources:
    async def get_config_map(_name: str) -> dict[str, Any] | None:
        return config_map

    async def get_secret(_name: str) -> dict[str, Any] | None:
        return secret

    async def get_token(request: dict[str, Any]) -> str:
        return f"token for {request.get('audiences')}"

    return volumes.Sources(get_config_map, get_secret, get_token, {"metadata.name": "p", "metadata.labels": 'a="b"'})


async def test_items_choose_path_and_mode() -> None:
    item = {"key": "tls.key", "path": "keys/server.key", "mode": 0o400}
    volume = {"name": "v", "secret": {"secretName": "s", "items": [item], "defaultMode": 0o440}}
    found = await volumes.payload(volume, sources(secret={"data": {"tls.key": "aGk=", "tls.crt": "aGk="}}))
    assert found == {"keys/server.key": volumes.File(b"hi", 0o400)}


async def test_a_projected_volume_unites_its_sources(tmp_path: Path) -> None:
    projected = {
        "defaultMode": 0o400,
        "sources": [
            {"configMap": {"name": "c"}},
            {"secret": {"name": "s", "items": [{"key": "k", "path": "secret"}]}},
            {"downwardAPI": {"items": [{"path": "labels", "fieldRef": {"fieldPath": "metadata.labels"}}]}},
            {"serviceAccountToken": {"path": "token", "audience": "vault"}},
        ],
    }
    origin = sources({"data": {"text": "t"}, "binaryData": {"bytes": "/w=="}}, {"data": {"k": "cw=="}})
    found = await volumes.payload({"name": "v", "projected": projected}, origin)
    assert found is not None
    volumes.write(tmp_path, found)
    written = volumes.read(tmp_path) or {}
    content = {path: file.content for path, file in written.items()}
    assert content == {
        "text": b"t",
        "bytes": b"\xff",
        "secret": b"s",
        "labels": b'a="b"',
        "token": b"token for ['vault']",
    }
    assert {file.mode for file in written.values()} == {0o400}


@pytest.mark.parametrize(
    ("volume", "match"),
    [
        ({"configMap": {"name": "absent"}}, "ConfigMap absent not found"),
        ({"secret": {"secretName": "absent"}}, "Secret absent not found"),
        ({"hostPath": {"path": "/"}}, "no hostPath volumes"),
        (
            {"downwardAPI": {"items": [{"path": "x", "resourceFieldRef": {"resource": "limits.cpu"}}]}},
            "resourceFieldRef",
        ),
    ],
)
async def test_what_cannot_be_mounted_is_named(volume: dict[str, Any], match: str) -> None:
    with pytest.raises(volumes.VolumeError, match=match):
        await volumes.payload({"name": "v", **volume}, sources())


async def test_optional_sources_may_be_absent() -> None:
    volume = {"name": "v", "configMap": {"name": "absent", "optional": True}}
    assert await volumes.payload(volume, sources()) == {}


async def test_a_missing_key_is_named() -> None:
    volume = {"name": "v", "configMap": {"name": "c", "items": [{"key": "k", "path": "k"}]}}
    with pytest.raises(volumes.VolumeError, match="ConfigMap c has no key k"):
        await volumes.payload(volume, sources({"data": {}}))


@pytest.mark.parametrize(
    ("text", "expanded"),
    [
        ("--host=$(IP)", "--host=1.2.3.4"),
        ("$$(IP)", "$(IP)"),
        ("$(OTHER)", "$(OTHER)"),
        ("$IP", "$IP"),
        ("a$$b", "a$b"),
    ],
)
def test_references_in_arguments(text: str, expanded: str) -> None:
    assert environment.expand(text, {"IP": "1.2.3.4"}) == expanded


async def test_variables_may_refer_to_earlier_ones() -> None:
    container = {
        "envFrom": [{"prefix": "P_", "configMapRef": {"name": "c"}}, {"secretRef": {"name": "s", "optional": True}}],
        "env": [
            {"name": "NAME", "valueFrom": {"fieldRef": {"fieldPath": "metadata.name"}}},
            {"name": "BOTH", "value": "$(NAME)-$(P_a)-$(LATER)"},
            {"name": "LATER", "value": "x"},
            {"name": "NONE", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k", "optional": True}}},
        ],
    }
    env = await environment.resolve(container, sources({"data": {"a": "1"}}), {"BASE": "b"})
    assert env == {"BASE": "b", "P_a": "1", "NAME": "p", "BOTH": "p-1-$(LATER)", "LATER": "x"}


def query(name: str, kind: int = 1) -> bytes:
    labels = b"".join(bytes([len(label)]) + label.encode() for label in name.split("."))
    return b"\x12\x34\x01\x00\x00\x01\x00\x00\x00\x00\x00\x00" + labels + b"\x00" + bytes([0, kind, 0, 1])


def test_dns_answers_with_addresses() -> None:
    reply = dns.answer(query("A.b"), {"a.b": ["127.64.0.2", "127.64.0.3"]}.get)
    assert reply is not None
    assert reply[:2] == b"\x12\x34"
    assert reply[3] & 0x0F == 0
    assert reply[6:8] == b"\x00\x02"
    assert reply.endswith(bytes([127, 64, 0, 3]))


@pytest.mark.parametrize(
    ("name", "kind", "code"), [("unknown", 1, 3), ("a.b", 28, 0)], ids=["no such name", "no IPv6 address"]
)
def test_dns_answers_without_addresses(name: str, kind: int, code: int) -> None:
    reply = dns.answer(query(name, kind), {"a.b": ["127.64.0.2"]}.get)
    assert reply is not None
    assert reply[3] & 0x0F == code
    assert reply[6:8] == b"\x00\x00"


@pytest.mark.parametrize("data", [b"", b"\x00" * 11, query("a.b")[:20], b"\xff" * 40])
def test_dns_ignores_what_is_no_query(data: bytes) -> None:
    assert dns.answer(data, lambda _name: []) is None


def started(**fields: Any) -> ContainerStart:
    values: dict[str, Any] = {
        "pod": {},
        "container": {"name": "envoy"},
        "mounts": {"/etc/envoy/xds": Path("/f/xds"), "/etc/envoy/xds2": Path("/f/two")},
        "ip": "127.64.0.9",
        "env": {},
        "command": [],
        "args": ["-c", "/etc/envoy/xds/a.yaml"],
        "dns": ("127.64.0.1", 10053),
    }
    return ContainerStart(**(values | fields))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ('"/etc/envoy/xds/lds.yaml"', '"/f/xds/lds.yaml"'),
        ('"/etc/envoy/xds"', '"/f/xds"'),
        ('"/etc/envoy/xds2/x"', '"/f/two/x"'),
        ('"/etc/envoy/xds-other"', '"/etc/envoy/xds-other"'),
        ('"0.0.0.0"', '"127.64.0.9"'),
        ('"::"', '"127.64.0.9"'),
        ("{address: 127.0.0.1, port_value: 9901}", "{address: 127.64.0.9, port_value: 9901}"),
        ("127.0.0.1/32 0.0.0.0/0 10.0.0.0.0", "127.0.0.1/32 0.0.0.0/0 10.0.0.0.0"),
    ],
)
def test_what_envoy_is_told_in_other_words(before: str, after: str) -> None:
    launch = runners.envoy_runner("envoy")(started())
    assert isinstance(launch, Launch)
    assert list(launch.argv[:3]) == ["envoy", "-c", "/f/xds/a.yaml"]
    assert launch.rewrite is not None
    assert launch.rewrite(before) == after


def test_runners_are_asked_in_turn() -> None:
    runner = runners.first_of(
        runners.succeed_jobs, runners.envoy_runner("e"), runners.engine_runner(["v"], with_args=False)
    )
    job = {"metadata": {"ownerReferences": [{"kind": "Job"}]}}
    alone: dict[str, Any] = {"metadata": {}}
    assert runner(started(pod=job)) is Outcome.SUCCEED
    assert isinstance(runner(started(pod=alone)), Launch)
    assert runner(started(pod=alone, container={"name": "vllm"}, env={"A": "1"})) == Launch(["v"], {"A": "1"})
    assert runner(started(pod=alone, container={"name": "other"})) is None


# On a real API server


class Namespace:
    """A namespace of its own with a hollow node for it, and shortcuts for what these tests ask."""

    def __init__(self, api: Any, name: str) -> None:
        self.api, self.name = api, name
        self.core: Any = client.CoreV1Api(api)
        self.apps: Any = client.AppsV1Api(api)
        self.batch: Any = client.BatchV1Api(api)
        self.node: HollowNode

    def pods(self) -> list[dict[str, Any]]:
        listed = self.core.list_namespaced_pod(self.name).items
        found: list[dict[str, Any]] = self.api.sanitize_for_serialization(listed)
        return found

    def pod(self, name: str) -> dict[str, Any]:
        found: dict[str, Any] = self.api.sanitize_for_serialization(self.core.read_namespaced_pod(name, self.name))
        return found

    def create_pod(self, name: str, container: dict[str, Any], **spec: Any) -> None:
        body = {
            "metadata": {"name": name, "labels": {"app": name}},
            "spec": {
                "containers": [{"name": "main", "image": "example.com/none:1", **container}],
                "automountServiceAccountToken": False,
                "terminationGracePeriodSeconds": 5,
                **spec,
            },
        }
        self.core.create_namespaced_pod(self.name, body)

    def write(self, name: str, **data: str) -> None:
        """Create or replace a ConfigMap."""
        body = {"metadata": {"name": name}, "data": {key.replace("_", "."): value for key, value in data.items()}}
        try:
            self.core.replace_namespaced_config_map(name, self.name, body)
        except client.ApiException:
            self.core.create_namespaced_config_map(self.name, body)

    def nudge(self, pod: str) -> None:
        self.core.patch_namespaced_pod(pod, self.name, {"metadata": {"annotations": {"nudge": uuid.uuid4().hex}}})


def ready(pod: dict[str, Any]) -> bool:
    conditions = pod["status"].get("conditions", [])
    return any(item["type"] == "Ready" and item["status"] == "True" for item in conditions)


def run_server(start: ContainerStart) -> Launch | None:
    """Run the containers whose command is `server` as a small HTTP server at the pod's address."""
    if list(start.command) != ["server"]:
        return None
    return Launch([sys.executable, str(SERVER), start.ip, *start.args], {**start.env, "PYTHONUNBUFFERED": "1"})


RUNNER = runners.first_of(
    runners.succeed_jobs, run_server, runners.envoy_runner(Path(sys.executable).parent / "envoy", container="envoy")
)


@pytest.fixture
def namespace(cluster: Cluster) -> Iterator[Namespace]:
    name = f"hollow-{uuid.uuid4().hex[:8]}"
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as api:  # type: ignore[no-untyped-call]
        core: Any = client.CoreV1Api(api)
        core.create_namespace({"metadata": {"name": name}})
        found = Namespace(api, name)
        with hollow_node(cluster, RUNNER, namespace=name) as found.node:
            yield found
        core.delete_namespace(name)


def fetch(url: str) -> str:
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=2) as response:
        return str(response.read().decode())


@pytest.mark.cluster
def test_a_deployment_becomes_available_and_goes(namespace: Namespace) -> None:
    template = {
        "metadata": {"labels": {"app": "idle"}},
        "spec": {
            "initContainers": [{"name": "gate", "image": "example.com/gate:1"}],
            "containers": [{"name": "main", "image": "example.com/none:1"}],
        },
    }
    spec = {"replicas": 3, "selector": {"matchLabels": {"app": "idle"}}, "template": template}
    body: Any = {"metadata": {"name": "idle"}, "spec": spec}
    namespace.apps.create_namespaced_deployment(namespace.name, body)
    eventually(lambda: namespace.apps.read_namespaced_deployment("idle", namespace.name).status.available_replicas == 3)
    pods = namespace.pods()
    addresses = {pod["status"]["podIP"] for pod in pods}
    assert len(addresses) == 3
    assert all(address.startswith("127.") for address in addresses)
    for pod in pods:
        status = pod["status"]
        assert pod["spec"]["nodeName"] == namespace.node.name
        assert status["phase"] == "Running"
        assert {item["type"] for item in status["conditions"] if item["status"] == "True"} >= {
            "PodScheduled",
            "Initialized",
            "ContainersReady",
            "Ready",
        }
        [container] = status["containerStatuses"]
        assert container["started"]
        assert container["restartCount"] == 0
        assert status["initContainerStatuses"][0]["state"]["terminated"]["exitCode"] == 0
        assert status["startTime"]
    namespace.apps.delete_namespaced_deployment("idle", namespace.name)
    eventually(lambda: not namespace.pods())


def holds(path: Path, content: str) -> bool:
    return path.exists() and path.read_text(encoding="ascii") == content


@pytest.mark.cluster
def test_a_nudge_syncs_a_volume_at_once_and_nothing_else_does(namespace: Namespace) -> None:
    namespace.write("files", a_txt="1")
    mount = {"volumeMounts": [{"name": "files", "mountPath": "/etc/files"}]}
    namespace.create_pod("p", mount, volumes=[{"name": "files", "configMap": {"name": "files"}}])
    eventually(lambda: ready(namespace.pod("p")))
    folder = namespace.node.volume(namespace.pod("p")["metadata"]["uid"], "main", "files")
    assert (folder / "a.txt").read_text(encoding="ascii") == "1"
    namespace.write("files", a_txt="2", b_txt="2")
    time.sleep(1.5)
    assert (folder / "a.txt").read_text(encoding="ascii") == "1", "kubelet would not look for up to 80 s either"
    seconds = []
    for content in ("2", "3", "4"):
        namespace.write("files", a_txt=content, b_txt=content)
        began = time.monotonic()
        namespace.nudge("p")
        eventually(partial(holds, folder / "b.txt", content))
        assert holds(folder / "a.txt", content), "all files of a volume change together"
        seconds.append(time.monotonic() - began)
    assert min(seconds) < 1.0


@pytest.mark.cluster
def test_volumes_are_synced_without_a_reason_too(cluster: Cluster, namespace: Namespace) -> None:
    name = f"{namespace.name}-quick"
    namespace.core.create_namespace({"metadata": {"name": name}})
    quick = Namespace(namespace.api, name)
    with hollow_node(cluster, namespace=name, resync=0.3) as quick.node:
        quick.write("files", a_txt="1")
        mount = {"volumeMounts": [{"name": "files", "mountPath": "/etc/files"}]}
        quick.create_pod("p", mount, volumes=[{"name": "files", "configMap": {"name": "files"}}])
        eventually(lambda: ready(quick.pod("p")))
        folder = quick.node.volume(quick.pod("p")["metadata"]["uid"], "main", "files")
        quick.write("files", a_txt="2")
        eventually(lambda: (folder / "a.txt").read_text(encoding="ascii") == "2", 5)
    namespace.core.delete_namespace(name)


@pytest.mark.cluster
def test_a_pod_waits_for_its_secret_and_gets_its_environment(namespace: Namespace) -> None:
    env = [
        {"name": "POD_IP", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
        {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "key", "key": "api-key"}}},
    ]
    probe = {"httpGet": {"path": "/", "port": 8000}, "periodSeconds": 1}
    namespace.create_pod(
        "p", {"command": ["server"], "args": ["8000", "--host=$(POD_IP)"], "env": env, "readinessProbe": probe}
    )

    def waiting() -> str:
        [status] = namespace.pod("p")["status"]["containerStatuses"]
        return str(status["state"]["waiting"]["message"])

    assert eventually(waiting) == "Secret key not found"
    assert not ready(namespace.pod("p"))
    namespace.core.create_namespaced_secret(
        namespace.name, {"metadata": {"name": "key"}, "stringData": {"api-key": "s"}}
    )
    eventually(lambda: ready(namespace.pod("p")))
    ip = namespace.pod("p")["status"]["podIP"]
    told = json.loads(fetch(f"http://{ip}:8000/"))
    assert told["argv"] == ["8000", f"--host={ip}"]
    assert told["env"]["POD_IP"] == ip
    assert told["env"]["KEY"] == "s"
    assert "HOME" not in told["env"], "nothing of this machine's environment"


@pytest.mark.cluster
def test_a_container_that_ends_is_restarted_and_probed_again(namespace: Namespace) -> None:
    probe = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
    namespace.create_pod("p", {"command": ["server"], "args": ["8000"], "startupProbe": probe, "readinessProbe": probe})
    eventually(lambda: ready(namespace.pod("p")))
    ip = namespace.pod("p")["status"]["podIP"]
    with pytest.raises(OSError, match=r"closed|reset|refused"):
        fetch(f"http://{ip}:8000/exit")

    def restarted() -> bool:
        pod = namespace.pod("p")
        [status] = pod["status"]["containerStatuses"]
        return status["restartCount"] == 1 and status["lastState"]["terminated"]["exitCode"] == 7 and ready(pod)

    eventually(restarted)
    assert json.loads(fetch(f"http://{ip}:8000/"))["argv"] == ["8000"]


@pytest.mark.cluster
def test_not_ready_as_long_as_the_probe_fails(namespace: Namespace) -> None:
    probe = {"httpGet": {"path": "/absent", "port": "http"}, "periodSeconds": 1}
    ports = [{"name": "http", "containerPort": 8000}]
    namespace.create_pod("p", {"command": ["server"], "args": ["8000"], "ports": ports, "readinessProbe": probe})
    ip = eventually(lambda: namespace.pod("p")["status"].get("podIP"))
    eventually(lambda: fetch(f"http://{ip}:8000/"))
    time.sleep(1.0)
    pod = namespace.pod("p")
    assert not ready(pod)
    assert pod["status"]["containerStatuses"][0]["started"]
    assert "absent" in namespace.node.log(namespace.name, "p", "main").read_text(encoding="utf-8")


@pytest.mark.cluster
def test_probes_that_cannot_be_performed_are_not_passed(namespace: Namespace) -> None:
    namespace.create_pod("p", {"readinessProbe": {"exec": {"command": ["true"]}}})

    def message() -> str:
        return str(namespace.pod("p")["status"]["containerStatuses"][0]["state"]["waiting"].get("message", ""))

    assert "httpGet and tcpSocket only" in eventually(message)


@pytest.mark.cluster
def test_a_deleted_pod_gets_its_grace(namespace: Namespace) -> None:
    lifecycle = {"preStop": {"sleep": {"seconds": 1}}}
    namespace.create_pod("p", {"command": ["server"], "args": ["8000"], "lifecycle": lifecycle})
    ip = eventually(lambda: namespace.pod("p")["status"].get("podIP"))
    eventually(lambda: fetch(f"http://{ip}:8000/"))
    uid = namespace.pod("p")["metadata"]["uid"]
    began = time.monotonic()
    namespace.core.delete_namespaced_pod("p", namespace.name)
    assert fetch(f"http://{ip}:8000/"), "preStop: still serving"
    eventually(lambda: not namespace.pods())
    assert 1.0 <= time.monotonic() - began < 4.0
    assert "terminated gracefully" in namespace.node.log(namespace.name, "p", "main").read_text(encoding="utf-8")
    eventually(lambda: not (namespace.node.folder / "pods" / uid).exists())


@pytest.mark.cluster
def test_a_job_completes(namespace: Namespace) -> None:
    container = {"name": "fetch", "image": "example.com/none:1"}
    body: Any = {
        "metadata": {"name": "fetch"},
        "spec": {"template": {"spec": {"restartPolicy": "Never", "containers": [container]}}},
    }
    namespace.batch.create_namespaced_job(namespace.name, body)
    eventually(lambda: namespace.batch.read_namespaced_job("fetch", namespace.name).status.succeeded == 1)
    [pod] = namespace.pods()
    assert pod["status"]["phase"] == "Succeeded"


LISTENER = """
resources:
- "@type": type.googleapis.com/envoy.config.listener.v3.Listener
  name: main
  address: {socket_address: {address: 0.0.0.0, port_value: 8080}}
  filter_chains:
  - filters:
    - name: envoy.filters.network.http_connection_manager
      typed_config:
        "@type": type.googleapis.com/envoy.extensions.filters.network.http_connection_manager.v3.HttpConnectionManager
        stat_prefix: main
        http_filters:
        - name: envoy.filters.http.router
          typed_config: {"@type": type.googleapis.com/envoy.extensions.filters.http.router.v3.Router}
        route_config:
          virtual_hosts:
          - name: all
            domains: ["*"]
            routes:
            - match: {path: /version}
              direct_response: {status: 200, body: {inline_string: "VERSION"}}
            - match: {prefix: /}
              route: {cluster: engine}
"""

BOOTSTRAP = """
node: {id: test, cluster: test}
admin: {address: {socket_address: {address: 127.0.0.1, port_value: 9901}}}
dynamic_resources:
  lds_config:
    resource_api_version: V3
    path_config_source: {path: /etc/envoy/xds/lds.yaml, watched_directory: {path: /etc/envoy/xds}}
static_resources:
  clusters:
  - name: engine
    connect_timeout: 1s
    type: STRICT_DNS
    dns_refresh_rate: 0.5s
    load_assignment:
      cluster_name: engine
      endpoints:
      - lb_endpoints:
        - endpoint: {address: {socket_address: {address: engine.NAMESPACE.svc.cluster.local., port_value: 8000}}}
"""


def says(ip: str, version: str) -> bool:
    return fetch(f"http://{ip}:8080/version") == version


def reaches_the_engine(ip: str) -> bool:
    return bool(json.loads(fetch(f"http://{ip}:8080/"))["argv"] == ["8000"])


@pytest.mark.cluster
@pytest.mark.envoy
def test_two_real_envoys_follow_their_volume_and_find_engines(namespace: Namespace) -> None:
    namespace.write("bootstrap", bootstrap_yaml=BOOTSTRAP.replace("NAMESPACE", namespace.name))
    namespace.write("xds", lds_yaml=LISTENER.replace("VERSION", "one"))
    mounts = [{"name": name, "mountPath": f"/etc/envoy/{name}"} for name in ("bootstrap", "xds")]
    probe = {"httpGet": {"path": "/version", "port": 8080}, "periodSeconds": 1}
    container = {
        "name": "envoy",
        "image": "example.com/envoy:1",
        "args": ["-c", "/etc/envoy/bootstrap/bootstrap.yaml", "--disable-hot-restart", "--concurrency", "1"],
        "volumeMounts": mounts,
        "readinessProbe": probe,
    }
    volume_list = [{"name": name, "configMap": {"name": name}} for name in ("bootstrap", "xds")]
    template = {"metadata": {"labels": {"app": "envoy"}}, "spec": {"containers": [container], "volumes": volume_list}}
    body: Any = {
        "metadata": {"name": "envoy"},
        "spec": {"replicas": 2, "selector": {"matchLabels": {"app": "envoy"}}, "template": template},
    }
    namespace.apps.create_namespaced_deployment(namespace.name, body)
    service: Any = {
        "metadata": {"name": "engine"},
        "spec": {"clusterIP": "None", "selector": {"app": "engine"}, "ports": [{"port": 8000}]},
    }
    namespace.core.create_namespaced_service(namespace.name, service)
    namespace.create_pod(
        "engine", {"command": ["server"], "args": ["8000"], "readinessProbe": {"tcpSocket": {"port": 8000}}}
    )
    eventually(lambda: [ready(pod) for pod in namespace.pods()] == [True] * 3)
    envoys = {
        pod["metadata"]["name"]: pod["status"]["podIP"]
        for pod in namespace.pods()
        if "envoy" in pod["metadata"]["name"]
    }
    for ip in envoys.values():
        assert says(ip, "one")
        eventually(partial(reaches_the_engine, ip))
        assert "LIVE" in fetch(f"http://{ip}:9901/server_info"), "the admin interface of this very pod"
    namespace.write("xds", lds_yaml=LISTENER.replace("VERSION", "two"))
    for name, ip in envoys.items():
        namespace.nudge(name)
        eventually(partial(says, ip, "two"), 5)


@pytest.mark.cluster
def test_the_node_outlives_a_restart_of_the_api_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVLLM_KUBECONFIG", raising=False)
    monkeypatch.setenv("SVLLM_CLUSTER", "local")
    with running() as own, hollow_node(own):
        own.restart_apiserver()
        with config.new_client_from_config(config_file=str(own.kubeconfig)) as api:  # type: ignore[no-untyped-call]
            namespace = Namespace(api, "default")
            namespace.create_pod("p", {})
            eventually(lambda: ready(namespace.pod("p")))


@pytest.mark.cluster
def test_processes_of_a_killed_owner_end_with_its_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVLLM_KUBECONFIG", raising=False)
    monkeypatch.setenv("SVLLM_CLUSTER", "local")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    program = (
        "import time\nfrom e2e.cluster import running\nfrom e2e.cluster.hollow import hollow_node\n"
        "from e2e.cluster.runners import Launch\n"
        "run = lambda start: Launch(['/bin/sleep', '600'])\n"
        "with running() as cluster, hollow_node(cluster, run) as node:\n"
        "    print(cluster.folder, flush=True)\n    time.sleep(600)\n"
    )
    command = [sys.executable, "-c", program]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE) as owner, ExitStack() as end:  # noqa: S603
        end.callback(owner.kill)
        assert owner.stdout
        folder = Path(owner.stdout.readline().decode().strip())
        with config.new_client_from_config(config_file=str(folder / "admin.kubeconfig")) as api:  # type: ignore[no-untyped-call]
            namespace = Namespace(api, "default")
            namespace.create_pod("p", {})
            eventually(lambda: ready(namespace.pod("p")))
        [record] = (folder / "processes").glob("*.pid")
        process = daemon.ProcessIdentity.from_json(record.read_text(encoding="ascii"))
    assert process.alive()
    with running():
        assert not process.alive()


@pytest.mark.cluster
def test_a_broken_runner_is_not_silent(cluster: Cluster, namespace: Namespace) -> None:
    name = f"{namespace.name}-broken"
    namespace.core.create_namespace({"metadata": {"name": name}})
    broken = Namespace(namespace.api, name)

    def runner(_start: ContainerStart) -> Launch:
        raise ZeroDivisionError

    def one_pod() -> None:
        with hollow_node(cluster, runner, namespace=name):
            broken.create_pod("p", {})
            time.sleep(1.0)

    with pytest.raises(ClusterError, match="failed: ZeroDivisionError"):
        one_pod()
    namespace.core.delete_namespace(name)


@pytest.mark.cluster
def test_a_cluster_with_real_nodes_is_refused(cluster: Cluster) -> None:
    name = f"real-{uuid.uuid4().hex[:8]}"
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as api:  # type: ignore[no-untyped-call]
        core: Any = client.CoreV1Api(api)
        core.create_node({"metadata": {"name": name}})
        try:
            with pytest.raises(ClusterError, match=f"real nodes .{name}"), hollow_node(cluster):
                pass
        finally:
            core.delete_node(name)
