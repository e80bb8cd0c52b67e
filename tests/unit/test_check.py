"""`securevllm check` on likenesses of what vLLM, production-stack and llm-d publish, and on single questions."""

from __future__ import annotations

import ast
import copy
import json
import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm import catalogue
from securevllm.api.parse import parse
from securevllm.catalogue import conditions
from securevllm.check import ADMISSION_POLICIES, Report, Severity, as_json, examine, read, suggestions, text
from securevllm.check.findings import features
from securevllm.cli import main

if TYPE_CHECKING:
    from securevllm.check.findings import Finding
    from securevllm.check.report import Checked

ROOT = Path(__file__).parents[2]
PUBLISHED = Path(__file__).parent / "published"
SAMPLES = sorted((ROOT / "manifests/samples").glob("*.yaml"))
FILES = sorted(PUBLISHED.glob("*.yaml"))

Object = dict[str, Any]


def checked(*objects: Object, live: bool = False) -> Report:
    return examine(read("f.yaml", yaml.safe_dump_all(objects)), live=live)


def only(report: Report) -> Checked:
    assert report.wrong == ()
    (item,) = report.workloads
    return item


def codes(item: Checked) -> set[str]:
    return {finding.code for finding in item.findings}


def found(item: Checked, code: str) -> list[Finding]:
    return [finding for finding in item.findings if finding.code == code]


def deployment(*args: str, image: str = "vllm/vllm-openai:v0.33.0", name: str = "m", **pod: Any) -> Object:
    container = {"name": "c", "image": image, "args": ["owner/model", *args], **pod.pop("container", {})}
    return {
        "apiVersion": "apps/v1",
        "kind": "Deployment",
        "metadata": {"name": name},
        "spec": {"template": {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container], **pod}}},
    }


def policy(spec: Object, name: str = "p") -> Object:
    return {"apiVersion": "networking.k8s.io/v1", "kind": "NetworkPolicy", "metadata": {"name": name}, "spec": spec}


def service(kind: str = "ClusterIP", **spec: Any) -> Object:
    ports = [{"name": "http", "port": 80, "targetPort": 8000}]
    return {
        "apiVersion": "v1",
        "kind": "Service",
        "metadata": {"name": "s"},
        "spec": {"selector": {"app": "m"}, "ports": ports, "type": kind, **spec},
    }


CLOSED = policy({"podSelector": {}, "policyTypes": ["Ingress", "Egress"]})
KEY = {"env": [{"name": "VLLM_API_KEY", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}}]}


# ---------------------------------------------------------------------------------------------------- what is published

EXPECTED: dict[str, tuple[str, set[str]]] = {
    "k8s-gpu": (
        "Deployment models/mistral-7b",
        {"NoApiKey", "NotIsolated", "EgressOpen", "DangerousFlag", "VersionUnreadable", "MediaFromAnywhere"},
    ),
    "k8s-rocm": ("Deployment default/mistral-amd", {"NoApiKey", "HostNetwork", "HostNamespaces", "DangerousFlag"}),
    "lws-ray": ("LeaderWorkerSet models/llama-405b", {"NoApiKey", "InternalSocketOpen", "NotIsolated"}),
    "lws-mp": ("LeaderWorkerSet models/deepseek", {"KeylessRoutes"}),
    "helm-chart": (
        "Deployment default/release-deployment-vllm",
        {"ControlRoutes", "DangerousVariable", "RoutesPublished", "HiddenEnvironment", "KeylessRoutes", "Advisory"},
    ),
    "production-stack": (
        "Deployment default/stack-llama3-deployment-vllm",
        {"KeyInPlainText", "ControlRoutes", "DangerousVariable", "RoutesPublished"},
    ),
    "llm-d": ("Deployment llm-d/ms-decode", {"NoApiKey", "InternalSocketOpen", "RoutesPublished"}),
}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_published_is_read(path: Path) -> None:
    key, expected = EXPECTED[path.stem]
    item = only(examine(read(path.name, path.read_text(encoding="utf-8"))))
    assert item.key == key
    assert expected <= codes(item)


def test_every_likeness_has_an_expectation() -> None:
    assert {path.stem for path in FILES} == set(EXPECTED)


def test_what_a_group_policy_closes_is_closed() -> None:
    item = only(examine(read("f", (PUBLISHED / "lws-mp.yaml").read_text(encoding="utf-8"))))
    assert not {"InternalSocketOpen", "NotIsolated", "EgressOpen", "MediaFromAnywhere", "NoApiKey"} & codes(item)
    inner = [one for one in item.seen.listening if one.socket.inner]
    assert {one.socket.name for one in inner} == {"torch-distributed", "gloo", "nccl", "message-queue"}
    assert all(one.reach.nobody and one.reach.own for one in inner)
    (api,) = [one for one in item.seen.listening if not one.socket.inner]
    assert api.socket.first == 8080
    assert [peer for peer, _ in api.reach.peers] == ["all pods of namespaces kubernetes.io/metadata.name=gateways"]


def test_ray_on_a_leader_and_its_workers() -> None:
    item = only(examine(read("f", (PUBLISHED / "lws-ray.yaml").read_text(encoding="utf-8"))))
    by_role: dict[str, set[str]] = {}
    for one in item.seen.listening:
        by_role.setdefault(one.socket.role, set()).add(one.socket.name)
    assert {"api", "ray-gcs", "ray-client", "ray-workers"} <= by_role["leader"]
    assert "ray-dashboard" not in by_role["leader"], "it listens on the loopback address"
    assert "ray-gcs" not in by_role["worker"]


def test_published_paths_are_judged_one_by_one() -> None:
    item = only(examine(read("f", (PUBLISHED / "helm-chart.yaml").read_text(encoding="utf-8"))))
    told = " ".join(finding.message for finding in found(item, "RoutesPublished"))
    assert "path /metrics) leads to what no client needs: /metrics" in told
    assert "path /v1 and below) leads to" in told


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_what_is_suggested_is_accepted(path: Path) -> None:
    ((workload, suggestion),) = suggestions(examine(read("f", path.read_text(encoding="utf-8"))))
    assert suggestion is not None
    made = suggestion.object
    assert parse(made["metadata"]["name"], made["spec"]).version == catalogue.newest()
    assert made["metadata"]["namespace"] == workload.namespace


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_all_that_is_suggested_can_be_rendered(path: Path) -> None:
    result = run("check", "-f", str(path), "--suggest", "--fail-on", "never")
    rendered = run("render", "-f", "-", "-o", "json", stdin=result.stdout)
    assert rendered.exit_code == 0, rendered.output


def test_what_is_suggested_can_be_rendered() -> None:
    result = run("check", "-f", str(PUBLISHED / "k8s-gpu.yaml"), "--suggest", "--fail-on", "never")
    assert result.exit_code == 0, result.output
    rendered = run("render", "-f", "-", stdin=result.stdout)
    assert rendered.exit_code == 0, rendered.output
    (made,) = yaml.safe_load_all(result.stdout)
    assert made["spec"]["model"]["source"]["huggingFace"]["tokenSecretRef"] == {"name": "hub", "key": "token"}
    assert made["spec"]["engine"]["sharedMemory"] == "2Gi"
    assert made["spec"]["engine"]["args"] == ["--enable-chunked-prefill", "--max-num-batched-tokens=1024"]
    assert "# Not carried over: --trust-remote-code:" in result.stdout
    again = run("check", "-f", "-", "--fail-on", "medium", stdin=result.stdout)
    assert again.exit_code == 0, again.output


# ---------------------------------------------------------------------------------------------------------- suggestions


def suggested(obj: Object) -> tuple[Object, tuple[str, ...]]:
    ((_, suggestion),) = suggestions(checked(obj))
    assert suggestion is not None
    return suggestion.object["spec"], suggestion.notes


def test_a_model_in_a_claim_is_carried_over() -> None:
    pod = {
        "containers": [
            {
                "name": "c",
                "image": "vllm/vllm-openai:v0.33.0",
                "args": ["/data/llama/8b", "--served-model-name", "a", "b"],
                "volumeMounts": [{"name": "v", "mountPath": "/data/", "subPath": "all"}],
            }
        ],
        "volumes": [{"name": "v", "persistentVolumeClaim": {"claimName": "models"}}],
    }
    obj = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "8b_Pod"}, "spec": pod}
    spec, notes = suggested(obj)
    assert spec["model"] == {
        "name": "8b",
        "servedName": "a",
        "source": {"persistentVolumeClaim": {"claimName": "models", "path": "all/llama/8b"}},
    }
    assert notes == ("--served-model-name: only the first of 2 names",)


def test_what_the_parser_refuses_is_left_out_and_said() -> None:
    obj = deployment(
        "--max-model-len=many", "--dtype=bfloat16", "--middleware=x", "--runner=pooling",
        nodeSelector={"a": "b"},
        tolerations=[{"operator": "Sometimes"}],
        container={"resources": {"limits": {"rdma/hca": 1, "cpu": 1}}, "env": [{"name": "TZ", "value": "UTC"}]},
    )  # fmt: skip
    spec, notes = suggested(obj)
    assert spec["engine"]["args"] == ["--dtype=bfloat16", "--runner=pooling"]
    assert spec["engine"]["env"] == [{"name": "TZ", "value": "UTC"}]
    assert spec["engine"]["nodeSelector"] == {"a": "b"}
    assert spec["engine"]["resources"]["limits"] == {"cpu": 1}
    assert spec["gateway"]["routes"]["profiles"] == ["embeddings"]
    assert {"--middleware=x", "--max-model-len=many"} <= {note.partition(":")[0] for note in notes}
    assert [note for note in notes if "rdma/hca" in note]


def test_a_model_that_cannot_be_read_is_named() -> None:
    spec, notes = suggested(deployment(container={"args": ["$(MODEL)"]}))
    assert spec["model"]["name"] == "owner/model"
    assert notes[0].startswith("model.name: '$(MODEL)' cannot be carried over")


def test_nothing_is_suggested_for_a_worker() -> None:
    ((_, suggestion),) = suggestions(checked(deployment("--headless")))
    assert suggestion is None
    result = run("check", "-f", "-", "--suggest", stdin=yaml.safe_dump(deployment("--headless")))
    assert "no SecureVLLMDeployment can be made of it" in result.stderr


# ----------------------------------------------------------------------------------------------------- single questions


def answering(item: Checked, *, sure: bool = True) -> set[str]:
    return {f"{one.route.method} {one.route.path}" for one in item.seen.answers if not one.key and one.sure is sure}


def test_without_a_key_everything_answers_and_with_one_the_rest() -> None:
    assert "GET /v1/models" in answering(only(checked(deployment())))
    item = only(checked(deployment(container=KEY)))
    assert "GET /v1/models" not in answering(item)
    assert {"POST /tokenize", "POST /invocations", "GET /metrics"} <= answering(item)
    assert item.seen.key is True


def test_a_root_path_of_a_slash_turns_the_key_off() -> None:
    item = only(checked(deployment("--root-path=/", container=KEY)))
    assert item.seen.key is False
    assert found(item, "NoApiKey")


def test_a_key_from_a_hidden_place_is_not_known() -> None:
    item = only(checked(deployment(container={"envFrom": [{"secretRef": {"name": "s"}}]})))
    assert item.seen.key is None
    assert "HiddenEnvironment" in codes(item)


def test_a_file_of_flags_hides_what_it_says() -> None:
    item = only(checked(deployment("--config=/etc/vllm.yaml")))
    assert item.seen.key is None
    assert "file /etc/vllm.yaml of --config" in found(item, "HiddenEnvironment")[0].message
    assert "POST /sleep" in answering(item, sure=False)


def test_a_port_of_the_node_is_a_way_in() -> None:
    item = only(checked(deployment(container={"ports": [{"containerPort": 8000, "hostPort": 80}]})))
    (way,) = item.seen.published
    assert (way.by, way.how, way.outside) == ("Pod default/m", "hostPort 80 of its node", True)
    assert found(item, "RoutesPublished")


def test_what_routes_depend_on() -> None:
    dev = {"env": [{"name": "VLLM_SERVER_DEV_MODE", "value": "1"}]}
    off = {"env": [{"name": "VLLM_SERVER_DEV_MODE", "value": "0"}]}
    assert "POST /sleep" in answering(only(checked(deployment(container=dev))))
    assert "POST /sleep" not in answering(only(checked(deployment(container=off))))
    assert "GET /docs" not in answering(only(checked(deployment("--disable-fastapi-docs"))))
    assert "POST /pooling" in answering(only(checked(deployment("--runner=pooling"))))
    assert "POST /scale_elastic_ep" not in answering(only(checked(deployment("--runner=pooling"))), sure=False)
    old = only(checked(deployment(image="vllm/vllm-openai:v0.21.0", container=KEY)))
    assert {"POST /inference/v1/generate", "POST /v2/rerank"} <= answering(old) | answering(old, sure=False)


def test_policies_decide_who_reaches_the_port() -> None:
    item = only(checked(deployment(container=KEY), CLOSED))
    assert not {"NotIsolated", "EgressOpen", "ControlRoutes"} & codes(item)
    assert max(one.severity for one in item.findings) <= Severity.LOW
    by_name = policy({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "web"}}}]}]})
    item = only(checked(deployment(), CLOSED | {"metadata": {"name": "q"}}, by_name))
    (finding,) = found(item, "NoApiKey")
    assert finding.severity is Severity.HIGH
    assert "pods app=web of the namespace" in finding.message
    everybody = policy({"podSelector": {}, "ingress": [{"ports": [{"port": 8000}]}]})
    (finding,) = found(only(checked(deployment(), everybody)), "NoApiKey")
    assert finding.severity is Severity.CRITICAL


@pytest.mark.parametrize(
    ("rule", "everybody"),
    [
        ({"from": [{"ipBlock": {"cidr": "0.0.0.0/0"}}]}, True),
        ({"from": [{"namespaceSelector": {}}]}, True),
        ({"from": [{"podSelector": {}}]}, False),
        ({"from": [{"ipBlock": {"cidr": "10.0.0.0/8"}}]}, False),
        ({"from": [{"namespaceSelector": {}}], "ports": [{"port": 9}]}, False),
    ],
)
def test_who_is_everybody(rule: Object, everybody: bool) -> None:
    one, _ = only(checked(deployment(), policy({"podSelector": {}, "ingress": [rule]}))).seen.listening
    assert one.reach.everybody is everybody


def test_own_pods_are_told_from_others() -> None:
    group = policy(
        {"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "m"}}}]}]},
    )
    args = ("--nnodes=2", "--master-addr=x")
    alone = only(checked(deployment(*args), group))
    assert "InternalSocketOpen" not in codes(alone)
    other = deployment(name="other")
    other["spec"]["template"]["metadata"]["labels"] = {"app": "m"}
    both = checked(deployment(*args), group, other).workloads
    assert "InternalSocketOpen" in codes(both[0])


@pytest.mark.parametrize(
    ("args", "env", "sockets"),
    [
        ((), {}, {"gloo"}),
        (("--headless",), {}, {"gloo"}),
        (("-tp=2",), {}, {"gloo", "nccl"}),
        (("--nnodes=2",), {}, {"torch-distributed", "message-queue", "gloo", "nccl"}),
        (("--data-parallel-size=4", "--data-parallel-address=x"), {}, {"data-parallel-rpc", "gloo"}),
        (('--kv-transfer-config={"kv_connector":"NixlConnector"}',), {}, {"nixl-side-channel", "nixl-data"}),
        (("--kv-transfer-config.kv_connector=MooncakeConnector",), {}, {"mooncake-bootstrap", "mooncake-transfer"}),
        (("--distributed-executor-backend=ray",), {}, {"ray-gcs", "ray-workers"}),
        (("--kv-events-config={}",), {}, {"kv-events"}),
    ],
)  # fmt: skip
def test_flags_open_sockets(args: tuple[str, ...], env: dict[str, str], sockets: set[str]) -> None:
    inner = {one.socket.name for one in only(checked(deployment(*args))).seen.listening if one.socket.inner}
    assert sockets <= inner
    assert ("nccl" in inner) == bool(inner & {"nccl", "torch-distributed", "data-parallel-rpc", "ray-gcs"})


def test_gloo_alone_is_not_as_bad_as_what_takes_pickle() -> None:
    alone, several = (
        next(one for one in only(checked(deployment(*args))).findings if one.code == "InternalSocketOpen")
        for args in ((), ("--nnodes=2",))
    )
    assert (alone.severity, several.severity) == (Severity.HIGH, Severity.CRITICAL)


def test_ports_follow_flags_and_variables() -> None:
    env = {"env": [{"name": "VLLM_NIXL_SIDE_CHANNEL_PORT", "value": "6000"}]}
    args = ("--port=9000", "--nnodes=2", "--master-port=7000", "--kv-transfer-config=nixl")
    ports = {
        one.socket.name: one.socket.first for one in only(checked(deployment(*args, container=env))).seen.listening
    }
    assert (ports["api"], ports["torch-distributed"], ports["nixl-side-channel"]) == (9000, 7000, 6000)


@pytest.mark.parametrize(
    ("args", "env", "used"),
    [
        (('--speculative-config={"method": "extract_hidden_states"}',), {}, "speculative"),
        (("--mm-processor-cache-type=shm",), {}, "shm-cache"),
        (("--enable-prompt-embeds",), {}, "prompt-embeds"),
        (('--kv-transfer-config={"kv_connector": "LMCacheConnectorV1"}',), {}, "lmcache"),
        (("--pipeline-parallel-size=2",), {}, "pipeline"),
        (("--grpc",), {}, "grpc"),
        ((), {"VLLM_USE_RUST_FRONTEND": "1"}, "rust-frontend"),
    ],
)
def test_what_holes_need_is_read(args: tuple[str, ...], env: dict[str, str], used: str) -> None:
    variables = [{"name": name, "value": value} for name, value in env.items()]
    item = only(checked(deployment(*args, container={"env": variables})))
    assert used in catalogue.FEATURES
    assert features(part.launch for part in item.seen.workload.parts) == {used}
    assert features(part.launch for part in only(checked(deployment())).seen.workload.parts) == frozenset()


def test_dangerous_flags_are_told_by_every_spelling() -> None:
    for spelling in ("--trust-remote-code", "--trust_remote_code", "--trust-rem"):
        assert [one.severity for one in found(only(checked(deployment(spelling))), "DangerousFlag")] == [Severity.HIGH]
    assert not found(only(checked(deployment("--trust-remote-code=false", "--dtype=auto"))), "DangerousFlag")
    assert found(only(checked(deployment("--api-key=x"))), "KeyInArguments")


def test_the_safe_value_of_a_variable_is_no_danger() -> None:
    fixed = catalogue.environment().fixed
    env = [{"name": name, "value": value} for name, value in fixed.items()]
    assert not found(only(checked(deployment(container={"env": env}))), "DangerousVariable")


@pytest.mark.parametrize("kind", ["Ingress", "HTTPRoute"])
def test_an_exact_path_that_clients_need_is_fine(kind: str) -> None:
    way: Object = {"apiVersion": "x/v1", "kind": kind, "metadata": {"name": "w"}}
    if kind == "Ingress":
        backend = {"service": {"name": "s", "port": {"number": 80}}}
        way["spec"] = {
            "rules": [{"http": {"paths": [{"path": "/v1/models", "pathType": "Exact", "backend": backend}]}}]
        }
    else:
        match = {"path": {"type": "Exact", "value": "/v1/models"}}
        way["spec"] = {"rules": [{"matches": [match], "backendRefs": [{"name": "s", "port": 80}]}]}
    item = only(checked(deployment(), service(), way))
    assert [one.by for one in item.seen.published] == ["Service default/s", f"{kind} default/w"]
    assert not found(item, "RoutesPublished")
    wide = copy.deepcopy(way)
    wide["spec"] = yaml.safe_load(yaml.safe_dump(way["spec"]).replace("/v1/models", "/").replace("Exact", "Prefix"))
    assert found(only(checked(deployment(), service(), wide)), "RoutesPublished")


@pytest.mark.parametrize(
    ("more", "outside"),
    [
        ({}, False),
        ({"kind": "NodePort"}, True),
        ({"kind": "LoadBalancer"}, True),
        ({"externalIPs": ["192.0.2.1"]}, True),
    ],
)
def test_services_that_lead_outside(more: Object, outside: bool) -> None:
    (way,) = only(checked(deployment(), service(**more))).seen.published
    assert way.outside is outside
    assert only(checked(deployment(), service(selector={"app": "other"}))).seen.published == ()


def test_what_is_owned_by_another_object_is_told_once() -> None:
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": "m-x", "ownerReferences": [{"kind": "ReplicaSet", "name": "m-1"}]},
        "spec": deployment()["spec"]["template"]["spec"],
    }
    replicas = copy.deepcopy(deployment()) | {
        "kind": "ReplicaSet",
        "metadata": {"name": "m-1", "ownerReferences": [{"kind": "Deployment", "name": "m"}]},
    }
    assert [item.key for item in checked(pod, replicas, deployment()).workloads] == ["Deployment default/m"]
    assert [item.key for item in checked(pod).workloads] == ["Pod default/m-x"]


def test_several_containers_and_sidecars() -> None:
    sidecar = {"name": "s", "image": "vllm/vllm-openai:v0.33.0", "args": ["m"], "restartPolicy": "Always"}
    pod = deployment(initContainers=[sidecar, {"name": "i", "image": "vllm/vllm-openai:v0.33.0", "args": ["x"]}])
    assert len(only(checked(pod)).seen.workload.parts) == 2


@pytest.mark.parametrize("kind", ["StatefulSet", "DaemonSet", "ReplicaSet", "Job"])
def test_other_kinds(kind: str) -> None:
    assert only(checked(deployment() | {"kind": kind})).key == f"{kind} default/m"


def test_a_cron_job() -> None:
    template = deployment()["spec"]
    obj = {
        "apiVersion": "batch/v1",
        "kind": "CronJob",
        "metadata": {"name": "c"},
        "spec": {"jobTemplate": {"spec": template}},
    }
    assert only(checked(obj)).key == "CronJob default/c"


@pytest.mark.parametrize(
    "broken",
    [
        {"spec": {"template": {"spec": {"containers": "x"}}}},
        {"spec": {"template": {"spec": {"containers": [None, 1, {"image": ["x"]}, {"env": {"a": 1}}]}}}},
        {"spec": {"template": {"metadata": {"labels": [1]}, "spec": {"containers": [{"image": "vllm/vllm-openai"}]}}}},
        {"spec": {"template": {"spec": {"containers": [{"image": "vllm/vllm-openai", "args": [None, {"a": 1}, 7]}]}}}},
        {"spec": {"replicas": "many", "template": {"spec": {"volumes": 1, "containers": [{"image": "vllm/vllm"}]}}}},
        {"spec": {"template": None}},
        {"metadata": {"name": "m", "labels": 7, "ownerReferences": [1]}},
    ],
    ids=str,
)
def test_nonsense_in_an_object_ends_nothing(broken: Object) -> None:
    report = checked(deployment() | broken, deployment(name="good"), service(ports="x", selector=[1]))
    assert "Deployment default/good" in {item.key for item in report.workloads}
    assert text(report)
    assert as_json(report)
    assert list(suggestions(report))


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
VALID = [obj for path in FILES for obj in yaml.safe_load_all(path.read_text(encoding="utf-8"))] + [
    CLOSED, service(), policy({"podSelector": {}, "ingress": [{"from": [{"podSelector": {}}], "ports": [{}]}]}),
]  # fmt: skip


def places(value: Any, path: tuple[str | int, ...] = ()) -> list[tuple[str | int, ...]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, item in inner for place in places(item, (*path, key)))]


@settings(deadline=None)  # the first of the examples pays for what is cached
@given(data=st.data())
def test_no_value_in_any_place_ends_it(data: st.DataObject) -> None:
    objects = copy.deepcopy(VALID)
    number = data.draw(st.integers(0, len(objects) - 1))
    path = data.draw(st.sampled_from([place for place in places(objects[number]) if place]))
    holder = objects[number]
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = data.draw(ANYTHING)
    report = examine(read("f.json", "\n---\n".join(json.dumps(obj) for obj in objects)))
    assert len(report.workloads) >= len(FILES) - 1
    assert text(report)
    assert as_json(report)
    for _, suggestion in suggestions(report):
        if suggestion is not None:
            parse(suggestion.object["metadata"]["name"], suggestion.object["spec"])


# --------------------------------------------------------------------------------------------- resources and the whole

FINE: Object = {
    "apiVersion": "securevllm.io/v1alpha1",
    "kind": "SecureVLLMDeployment",
    "metadata": {"name": "llama"},
    "spec": {"model": {"name": "/models/m"}, "image": "vllm/vllm-openai:v0.33.0"},
}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_have_no_finding_but_what_they_say_themselves(path: Path) -> None:
    report = examine(read(path.name, path.read_text(encoding="utf-8")))
    assert report.wrong == ()
    # Mooncake's is an advisory that no release has a fix for: only a policy helps.
    known = {"RiskAccepted", "Advisory"} if path.stem == "prefill-decode-mooncake" else {"RiskAccepted"}
    assert {finding.code for finding in report.every()} <= known
    assert report.resources


def test_a_resource_tells_its_risks_its_holes_and_its_routes() -> None:
    spec = FINE["spec"] | {
        "image": "vllm/vllm-openai:v0.32.0",
        "security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": "the model needs it"}]},
    }
    (item,) = checked(FINE | {"spec": spec}).resources
    severities = {(one.code, one.message.partition(":")[0]): one.severity for one in item.findings}
    assert severities["RiskAccepted", "vllmVersionBelowFloor"] is Severity.MEDIUM
    assert severities["Advisory", "CVE-2026-130686"] is Severity.HIGH
    assert ("POST", "/v1/chat/completions") in {(route.method, route.path) for route in item.routes}


def test_who_reaches_the_sockets_of_a_resource() -> None:
    spec = FINE["spec"] | {"gateway": {"authentication": {"none": "I accept that everybody may ask"}}}
    report = checked(FINE | {"spec": spec})
    (item,) = report.resources
    who_may = {(one.socket.role, one.socket.name): one.reach for one in item.listening}
    (engine,) = [one for (role, name), one in who_may.items() if (role, name) == ("engine", "api")]
    assert not engine.everybody
    assert all("securevllm.io/role=gateway" in peer for peer, _ in engine.peers)
    assert engine.peers
    assert "routes pass the gateway, without any key" in text(report)
    told = json.loads(as_json(report))["resources"][0]
    assert told["clientKey"] is False
    assert {socket["name"] for socket in told["sockets"]} >= {"api"}
    opened = policy({"podSelector": {}, "ingress": [{"from": [{"namespaceSelector": {}}]}]})
    (item,) = checked(FINE, opened).resources
    assert all(one.reach.everybody for one in item.listening)


def test_random_ports_of_a_group_are_open_to_its_own_pods_only() -> None:
    (item,) = checked(FINE | {"spec": FINE["spec"] | {"parallelism": {"tensor": 8, "nodes": 2}}}).resources
    inner = [one for one in item.listening if one.socket.ports == "random ports"]
    assert {one.socket.name for one in inner} >= {"gloo", "nccl", "message-queue"}
    assert all(one.reach.own and one.reach.nobody for one in inner)


def test_a_policy_of_somebody_else_that_opens_a_resource_is_named() -> None:
    foreign = policy({"podSelector": {}, "ingress": [{"from": [{"podSelector": {"matchLabels": {"app": "x"}}}]}]})
    (item,) = checked(FINE, foreign).resources
    told = {one.message for one in item.findings if one.code == "ForeignPolicy"}
    assert any("opens pods of the role engine, for pods app=x of the namespace" in one for one in told)
    (item,) = checked(FINE, CLOSED).resources
    assert not item.findings
    own = foreign | {"metadata": {"name": "p", "labels": {"app.kubernetes.io/managed-by": "securevllm-operator"}}}
    (item,) = checked(FINE, own).resources
    assert not item.findings


def test_what_the_operator_would_refuse_is_bad_input() -> None:
    bad = FINE | {"spec": {"image": "vllm/vllm-openai:latest", "model": {"name": "a/b"}}}
    report = checked(bad, deployment())
    assert {str(item).partition(": ")[2].partition(":")[0] for item in report.wrong} == {"llama"}
    assert len(report.wrong) == 2
    assert len(report.workloads) == 1


@pytest.mark.parametrize(
    ("version", "kind"),
    [
        ("securevllm.io/v1beta1", "SecureVLLMDeployment"),
        ("securevllm.io/v1alpha1", "SecureVllmDeployment"),
        ("securevllm/v1alpha1", "SecureVLLMDeployment"),
    ],
)
def test_a_resource_of_another_version_or_a_misspelt_one_is_bad_input(version: str, kind: str) -> None:
    report = checked(FINE | {"apiVersion": version, "kind": kind})
    told = f"holds {version} {kind}; this command takes securevllm.io/v1alpha1 SecureVLLMDeployment"
    assert [item.message for item in report.wrong] == [told]
    assert report.resources == ()


def test_a_policy_that_cannot_be_read_is_bad_input() -> None:
    report = checked(deployment(), policy({"podSelector": {}, "policyTypes": ["ingress"]}))
    (wrong,) = report.wrong
    assert "NetworkPolicy p cannot be evaluated: spec.policyTypes" in wrong.message


def test_policies_of_other_kinds_are_named() -> None:
    other = {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": {"name": "c"}}
    (finding,) = checked(other).findings
    assert finding.code == "PolicyNotEvaluated"
    assert checked(other | {"apiVersion": "example.org/v1"}).findings == ()


def test_a_missing_admission_policy_is_told_of_a_cluster_only() -> None:
    assert checked(FINE).findings == ()
    (finding,) = checked(FINE, live=True).findings
    assert (finding.code, finding.severity) == ("AdmissionMissing", Severity.HIGH)
    assert all(name in finding.message for name in ADMISSION_POLICIES)
    (finding,) = checked(deployment(), live=True).findings
    assert finding.severity is Severity.INFO


def bindings() -> list[dict[str, Any]]:
    """Those that are installed."""
    shipped = yaml.safe_load_all((ROOT / "manifests/admission/bindings.yaml").read_text(encoding="utf-8"))
    return [item for item in shipped if item]


def in_namespace(name: str) -> dict[str, Any]:
    selector = {"matchLabels": {"kubernetes.io/metadata.name": name}}
    return {"matchResources": {"namespaceSelector": selector, "objectSelector": {}, "matchPolicy": "Equivalent"}}


@pytest.mark.parametrize(
    ("changed", "missing"),
    [
        ({}, False),
        ({"policyName": "my-release-secure-vllm-operator-pods"}, False),
        (in_namespace("apps"), False),
        (in_namespace("elsewhere"), True),
        ({"validationActions": ["Audit", "Warn"]}, True),
        ({"policyName": "somebody-elses"}, True),
        ({"matchResources": {"objectSelector": {"matchLabels": {"a": "b"}}}}, True),
        ({"matchResources": {"namespaceSelector": {"matchExpressions": [{"key": "a", "operator": "Exists"}]}}}, True),
    ],
)
def test_a_binding_counts_when_it_surely_denies_here(changed: dict[str, Any], *, missing: bool) -> None:
    first, *others = bindings()
    here = FINE | {"metadata": {"name": "llama", "namespace": "apps"}}
    assert len(others) == len(ADMISSION_POLICIES) - 1
    report = checked(here, first | {"spec": first["spec"] | changed}, *others, live=True)
    assert [finding.code for finding in report.findings] == ["AdmissionMissing"] * missing
    nobodys = first | {"metadata": {"name": first["metadata"]["name"]}}
    assert [finding.code for finding in checked(here, nobodys, *others, live=True).findings] == ["AdmissionMissing"]


def test_conditions_of_routes_know_the_tasks_that_flags_name() -> None:
    assert {"embed", "classify"} <= conditions.POOLING


# -------------------------------------------------------------------------------------------------------- command line


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, args, input=stdin)


def test_the_exit_code_follows_the_severity() -> None:
    path = str(PUBLISHED / "lws-mp.yaml")  # its worst finding is high
    assert run("check", "-f", path).exit_code == 1
    assert run("check", "-f", path, "--fail-on", "critical").exit_code == 0
    assert run("check", "-f", path, "--fail-on", "never").exit_code == 0
    assert run("check", "-f", str(PUBLISHED), "--fail-on", "critical").exit_code == 1


def test_bad_input_ends_with_two_and_hides_nothing() -> None:
    result = run("check", "-f", "-", "--fail-on", "never", stdin=f"a: [\n---\n{yaml.safe_dump(deployment())}")
    assert result.exit_code == 2
    assert "<stdin>:" in result.stderr
    assert "is not YAML" in result.stderr
    assert "Deployment default/m" in result.stdout


def test_a_folder_is_read_and_an_empty_one_is_bad_input(tmp_path: Path) -> None:
    assert run("check", "-f", str(tmp_path)).exit_code == 2
    (tmp_path / "a.yml").write_text(yaml.safe_dump(deployment()), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps(deployment(name="n")), encoding="utf-8")
    (tmp_path / "c.txt").write_text("nothing", encoding="utf-8")
    result = run("check", "-f", str(tmp_path), "-n", "team", "-o", "json")
    assert result.exit_code == 1
    told = json.loads(result.stdout)
    assert [(item["namespace"], item["name"]) for item in told["workloads"]] == [("team", "m"), ("team", "n")]


def test_bytes_that_are_no_text_are_bad_input(tmp_path: Path) -> None:
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00kind: Pod")
    assert run("check", "-f", str(path)).exit_code == 2


def test_nothing_to_check_says_what_to_write() -> None:
    result = run("check")
    assert result.exit_code == 2
    assert "-f FILE" in result.stderr


def test_no_login_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config"
    path.write_text("{}", encoding="utf-8")
    result = run("check", "--namespace", "x", "--kubeconfig", str(path))
    assert result.exit_code == 2
    assert f"--kubeconfig {path} cannot be used: Expected key current-context" in result.stderr


def test_json_has_what_the_text_has() -> None:
    path = str(PUBLISHED / "llm-d.yaml")
    told = json.loads(run("check", "-f", path, "-o", "json").stdout)
    shown = run("check", "-f", path).stdout
    (item,) = told["workloads"]
    for finding in item["findings"]:
        assert finding["message"] in shown
    assert {way["by"] for way in item["published"]} == {"InferencePool llm-d/pool", "HTTPRoute llm-d/route"}
    assert told["worst"] == "critical"
    assert item["vllmVersion"] is None


def test_a_name_cannot_steer_a_terminal() -> None:
    obj = deployment(image="vllm/vllm-openai:v0.33.0\x1b[2J")
    assert "\x1b" not in run("check", "-f", "-", stdin=json.dumps(obj)).stdout
    assert "\x1b" not in run("check", "-f", "-", "--suggest", stdin=json.dumps(obj)).stdout


def test_every_code_is_explained() -> None:
    used = {"HostNamespaces"}  # its call takes the code from a table
    for path in (ROOT / "operator/securevllm/check").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Finding":
                code = node.args[1]
                used |= {str(code.value)} if isinstance(code, ast.Constant) else set()
    assert {"NoApiKey", "Advisory", "AdmissionMissing", "InternalSocketOpen"} <= used
    headings = set(re.findall(r"^### (\w+)$", (ROOT / "docs/check.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert used == headings


def test_time_grows_with_the_number_of_manifests_and_not_with_its_square() -> None:
    def seconds(workloads: int) -> float:
        base = [deployment(container=KEY), service(), policy({"podSelector": {"matchLabels": {"app": "m"}}}, "p")]
        texts = [
            yaml.safe_dump_all(base).replace("app: m", f"app: m{index}").replace("name: m\n", f"name: m{index}\n")
            for index in range(workloads)
        ]
        content = "---\n".join(texts)
        began = time.process_time()
        report = examine(read("f", content))
        assert text(report)
        assert report.objects == 3 * workloads
        assert len(report.workloads) == workloads
        return time.process_time() - began

    # Bench has the seconds. Twelve times as many: a hundred and forty-four times the time would be the square.
    assert seconds(336) < 24 * min(seconds(28) for _ in range(3))
