"""What is wrong with a spec is told: the field, the value, the rule and what to write instead."""

from __future__ import annotations

import datetime as dt
from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api.parse import Accepted, parse, parse_accepted
from securevllm.errors import Problem, SpecError

HUB = {"name": "meta-llama/Llama-3.1-8B", "source": {"huggingFace": {}}}
FINE: dict[str, Any] = {"model": HUB, "image": "vllm/vllm-openai:v0.33.0"}
NEWER = f"0.{catalogue.newest().minor + 1}.0"
WHY = "because of the test"


def problems(name: str = "llama", **spec: Any) -> tuple[Problem, ...]:
    """Everything that is wrong with the fine spec with other fields; a field that is None is left out."""
    raw = {key: value for key, value in {**FINE, **spec}.items() if value is not None}
    with pytest.raises(SpecError) as caught:
        parse(name, raw)
    return caught.value.problems


def accepted(**spec: Any) -> Accepted:
    return parse("llama", {**FINE, **spec})


def test_a_fine_spec_is_accepted() -> None:
    found = accepted()
    assert (str(found.version), found.risks, found.raw) == ("0.33.0", (), FINE)


def test_a_field_that_is_null_is_one_that_is_absent() -> None:
    found = accepted(disaggregation=None, security={"egress": [], "gate": None})
    assert found.raw == {**FINE, "security": {"egress": []}}
    again = parse_accepted({**FINE, "disaggregation": None})
    assert again is not None
    assert again.raw == FINE


def hub(**fields: Any) -> dict[str, Any]:
    return {"model": {**HUB, "source": {"huggingFace": fields}}}


def gateway(**fields: Any) -> dict[str, Any]:
    return {"gateway": fields}


def engine(**fields: Any) -> dict[str, Any]:
    return {"engine": fields}


def egress(to: dict[str, Any], port: int = 443) -> dict[str, Any]:
    return {"security": {"egress": [{"to": to, "ports": [{"port": port}], "why": WHY}]}}


LOCAL = {"model": {"name": "/models/llama"}}
SPLIT = {"connector": "nixl", "router": {"image": "vllm/vllm-router:v0.1.17"}}

# spec, field, reason, what the message must hold
REFUSED: list[tuple[str, dict[str, Any], str, str, tuple[str, ...]]] = [
    ("no image", {"image": None}, "spec.image", "InvalidSpec", ("it is required", "kubectl explain")),
    ("no model", {"model": None}, "spec.model", "InvalidSpec", ("it is required",)),
    ("unknown field", {"modle": {}}, "spec.modle", "InvalidSpec", ("no such field", "Did you mean model?")),
    ("wrong type", {"replicas": "2"}, "spec.replicas", "InvalidSpec", ("'2'", "valid integer")),
    ("wrong quantity type", engine(sharedMemory=1.5), "spec.engine.sharedMemory", "InvalidSpec", ("'1.5'",)),
    ("quantity", engine(sharedMemory="8 GiB"), "spec.engine.sharedMemory", "InvalidSpec", ("'8 GiB'", "8Gi")),
    ("label key", engine(labels={"a b": "x"}), "spec.engine.labels.a b", "InvalidSpec", ("pattern", "engine.labels")),
    (
        "snake case",
        engine(shared_memory="1Gi"),
        "spec.engine.shared_memory",
        "InvalidSpec",
        ("no such field", "Did you mean sharedMemory?"),
    ),
    (
        "twice in a set",
        gateway(routes={"profiles": ["chat", "chat"]}),
        "spec.gateway.routes.profiles[1]",
        "InvalidSpec",
        ("twice",),
    ),
    (
        "no source",
        {"model": {"name": "a/b"}},
        "spec.model.source",
        "ModelSourceMissing",
        ("source: {huggingFace: {}}", "egress"),
    ),
    (
        "two sources",
        {"model": {**HUB, "source": {"huggingFace": {}, "persistentVolumeClaim": {"claimName": "a"}}}},
        "spec.model.source",
        "InvalidSpec",
        ("exactly one",),
    ),
    ("empty source", {"model": {**HUB, "source": {}}}, "spec.model.source", "InvalidSpec", ("exactly one",)),
    ("path at a hub", {"model": {**HUB, "name": "/a/b"}}, "spec.model.name", "InvalidSpec", ("owner/name", "'/a/b'")),
    ("deep hub name", {"model": {**HUB, "name": "a/b/c"}}, "spec.model.name", "InvalidSpec", ("owner/name",)),
    ("climbing", {"model": {"name": "/a/../b"}}, "spec.model.name", "InvalidSpec", ("'..'",)),
    (
        "climbing in a claim",
        {"model": {"name": "a", "source": {"persistentVolumeClaim": {"claimName": "a", "path": "a/../../b"}}}},
        "spec.model.source.persistentVolumeClaim.path",
        "InvalidSpec",
        ("'..'",),
    ),
    (
        "hub address",
        hub(endpoint="https://hub:99999"),
        "spec.model.source.huggingFace.endpoint",
        "InvalidSpec",
        ("hub:99999", "https://hub.example.com"),
    ),
    (
        "storage not shared",
        {**hub(), "replicas": 2},
        "spec.model.source.huggingFace.storage.accessModes",
        "StorageNotShared",
        ("2 pods", "ReadWriteMany", "ReadWriteOnce"),
    ),
    (
        "storage not writable",
        hub(storage={"accessModes": ["ReadOnlyMany"]}),
        "spec.model.source.huggingFace.storage.accessModes",
        "InvalidSpec",
        ("write",),
    ),
    (
        "nodes",
        {**LOCAL, "parallelism": {"nodes": 2}},
        "spec.parallelism.nodes",
        "WorldMismatch",
        ("tensor x pipeline = 1", "divides 1"),
    ),
    (
        "ranks over nodes",
        {**LOCAL, "parallelism": {"nodes": 3, "data": {"size": 4}}},
        "spec.parallelism.nodes",
        "WorldMismatch",
        ("4 data-parallel ranks",),
    ),
    (
        "ranks in a pod",
        {**LOCAL, "parallelism": {"data": {"size": 4, "sizeLocal": 3}}},
        "spec.parallelism.data.sizeLocal",
        "WorldMismatch",
        ("4 data-parallel ranks",),
    ),
    (
        "nodes and ranks in a pod",
        {**LOCAL, "parallelism": {"nodes": 4, "data": {"size": 4, "sizeLocal": 2}}},
        "spec.parallelism.nodes",
        "WorldMismatch",
        ("are 2 pods", "nodes: 2"),
    ),
    (
        "a dense model balanced outside",
        {**LOCAL, "parallelism": {"data": {"size": 2, "sizeLocal": 1, "loadBalancing": "external"}}},
        "spec.parallelism.data.loadBalancing",
        "LoadBalancingRefused",
        ("dense", "replicas"),
    ),
    (
        "ranks that share a pod, balanced outside",
        {**LOCAL, "parallelism": {"expert": True, "data": {"size": 4, "sizeLocal": 2, "loadBalancing": "external"}}},
        "spec.parallelism.data.loadBalancing",
        "LoadBalancingRefused",
        ("sizeLocal: 1",),
    ),
    (
        "hybrid within one pod",
        {**LOCAL, "parallelism": {"data": {"size": 2, "loadBalancing": "hybrid"}}},
        "spec.parallelism.data.loadBalancing",
        "LoadBalancingRefused",
        ("internal",),
    ),
    (
        "expert of one",
        {**LOCAL, "parallelism": {"expert": True}},
        "spec.parallelism.expert",
        "WorldMismatch",
        ("tensor",),
    ),
    (
        "parallelism beside disaggregation",
        {**LOCAL, "disaggregation": SPLIT, "parallelism": {"tensor": 2}},
        "spec.parallelism",
        "InvalidSpec",
        ("disaggregation.prefill",),
    ),
    (
        "replicas beside disaggregation",
        {"disaggregation": SPLIT, "replicas": 2, **LOCAL},
        "spec.replicas",
        "InvalidSpec",
        ("prefill.replicas",),
    ),
    (
        "a router without an image",
        {"disaggregation": {"connector": "nixl"}},
        "spec.disaggregation.router",
        "InvalidSpec",
        ("required",),
    ),
    (
        "one side balanced outside",
        {
            **LOCAL,
            "disaggregation": {
                **SPLIT,
                "prefill": {"parallelism": {"data": {"size": 2, "sizeLocal": 1, "loadBalancing": "hybrid"}}},
            },
        },
        "spec.disaggregation.prefill.parallelism.data.loadBalancing",
        "NotSupportedYet",
        ("internal",),
    ),
    (
        "GPUs of two sides that differ",
        {
            **LOCAL,
            "disaggregation": {**SPLIT, "prefill": {"parallelism": {"tensor": 2}}},
            "engine": {"resources": {"limits": {"nvidia.com/gpu": 2}}},
        },
        "spec.engine.resources.limits.nvidia.com/gpu",
        "WorldMismatch",
        ("different numbers",),
    ),
    (
        "a connector that the version lacks",
        {
            **LOCAL,
            "disaggregation": {**SPLIT, "connector": "mooncake"},
            "image": "vllm/vllm-openai:v0.12.0",
            "security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": "a test of the past"}]},
        },
        "spec.disaggregation.connector",
        "VersionLacks",
        ("0.13.0",),
    ),
    (
        "readers at no network",
        {"security": {"kvEvents": {"from": {"cidrs": ["10.0.0.0/81"]}, "why": "the router asks"}}},
        "spec.security.kvEvents.from.cidrs[0]",
        "InvalidSpec",
        ("IPv4 or IPv6",),
    ),
    *(
        (
            f"connector {connector}",
            {"disaggregation": {**SPLIT, "connector": connector}, **LOCAL},
            "spec.disaggregation.connector",
            "NotSupportedYet",
            ("use nixl", told),
        )
        for connector, told in (
            ("mooncakeStore", "store"),
            ("moriio", "header"),
            ("lmcache", "pickle"),
            ("p2pNccl", "0.24 removed"),
        )
    ),
    (
        "a port of the past",
        {"ports": {"kvTransfer": 14579}},
        "spec.ports.kvTransfer",
        "PortUnused",
        ("nixlSideChannel",),
    ),
    (
        "a port that is drawn",
        {"ports": {"dataParallelMaster": 29500}},
        "spec.ports.dataParallelMaster",
        "PortUnused",
        ("random",),
    ),
    (
        "ports of ranks that meet",
        {
            **LOCAL,
            "parallelism": {"data": {"size": 64, "sizeLocal": 8}},
            "ports": {"kvEvents": 29540},
            "security": {"kvEvents": {"from": {"podSelector": {}}, "why": "the router asks"}},
        },
        "spec.ports.kvEvents",
        "PortConflict",
        ("29540-29603", "29550"),
    ),
    (
        "ports of ranks beyond the last",
        {
            **LOCAL,
            "parallelism": {"data": {"size": 64, "sizeLocal": 8}},
            "ports": {"kvEvents": 65500},
            "security": {"kvEvents": {"from": {"podSelector": {}}, "why": "the router asks"}},
        },
        "spec.ports.kvEvents",
        "PortConflict",
        ("65472",),
    ),
    (
        "model image",
        {"model": {"name": "a/b", "source": {"image": {"reference": "a/b:c"}}}},
        "spec.model.source.image",
        "NotSupportedYet",
        ("persistentVolumeClaim",),
    ),
    (
        "volumes",
        engine(volumes=[{"name": "a", "mountPath": "/mnt/a", "secret": {"secretName": "a-gateway-ca"}}]),
        "spec.engine.volumes[0].secret.secretName",
        "VolumeRefused",
        ("operator's own", "a Secret of yours"),
    ),
    (
        "realtime",
        gateway(routes={"profiles": ["realtime"]}),
        "spec.gateway.routes.profiles",
        "NotSupportedYet",
        ("WebSockets",),
    ),
    (
        "jwt",
        gateway(authentication={"jwt": {"issuer": "a", "audiences": ["b"], "localJwks": {"name": "a", "key": "b"}}}),
        "spec.gateway.authentication.jwt",
        "NotSupportedYet",
        ("apiKeys",),
    ),
    (
        "mtls",
        gateway(authentication={"mtls": {"caSecretRef": {"name": "a"}}}),
        "spec.gateway.authentication.mtls",
        "NotSupportedYet",
        ("apiKeys",),
    ),
    (
        "autoscaling",
        gateway(autoscaling={"maxReplicas": 3}),
        "spec.gateway.autoscaling",
        "NotSupportedYet",
        ("replicas",),
    ),
    (
        "metrics for nobody",
        {"security": {"metrics": {"from": {}}}},
        "spec.security.metrics.from",
        "InvalidSpec",
        ("nobody is named", "kubernetes.io/metadata.name: monitoring"),
    ),
    (
        "metrics for no network",
        {"security": {"metrics": {"from": {"cidrs": ["10.0.0.0/81"]}}}},
        "spec.security.metrics.from.cidrs[0]",
        "InvalidSpec",
        ("203.0.113.0/24",),
    ),
    ("port of metrics without metrics", {"ports": {"metrics": 7000}}, "spec.ports.metrics", "PortUnused", ("metrics",)),
    (
        "metrics on the port of the API",
        {"ports": {"metrics": 8000}, "security": {"metrics": {"from": {"podSelector": {}}}}},
        "spec.ports.metrics",
        "PortConflict",
        ("api (8000) and metrics (8000)",),
    ),
    (
        "no tag",
        {"image": "vllm/vllm-openai"},
        "spec.image",
        "VersionUnreadable",
        ("'vllm/vllm-openai'", "vllmVersion: {assume:"),
    ),
    ("latest", {"image": "vllm/vllm-openai:latest"}, "spec.image", "VersionUnreadable", ("release tag",)),
    ("port of a registry", {"image": "reg:5000/vllm"}, "spec.image", "VersionUnreadable", ("release tag",)),
    ("digest only", {"image": "reg/vllm@sha256:" + "1" * 64}, "spec.image", "VersionUnreadable", ("release tag",)),
    ("newer", {"image": f"v:v{NEWER}"}, "spec.image", "VersionUnknown", (f"'v:v{NEWER}'", "catalogue ends at")),
    ("newer, assumed", {"vllmVersion": {"assume": NEWER}}, "spec.vllmVersion.assume", "VersionUnknown", (NEWER,)),
    (
        "older",
        {"image": "v:v0.20.0"},
        "spec.image",
        "VersionBelowFloor",
        ("0.20.0", "accept: [{risk: vllmVersionBelowFloor"),
    ),
    (
        "below its own minimum",
        {"vllmVersion": {"minimum": "0.33.1"}},
        "spec.image",
        "VersionBelowMinimum",
        ("0.33.0", "at least 0.33.1"),
    ),
    ("long name", {"name": "a" * 41}, "metadata.name", "NameTooLong", ("40", "shorter")),
    ("digit first", {"name": "1a"}, "metadata.name", "InvalidSpec", ("'1a'", "letter")),
    ("dotted name", {"name": "a.b"}, "metadata.name", "InvalidSpec", ("'a.b'",)),
    (
        "revision of a claim",
        {"model": {"name": "a", "revision": "main", "source": {"persistentVolumeClaim": {"claimName": "a"}}}},
        "spec.model.revision",
        "InvalidSpec",
        ("no effect beside this source",),
    ),
    (
        "size of another's claim",
        {"model": {"name": "a/b", "source": {"huggingFace": {"storage": {"claimName": "x", "size": "1Gi"}}}}},
        "spec.model.source.huggingFace.storage.size",
        "InvalidSpec",
        ("no effect beside claimName",),
    ),
    (
        "names for another's certificate",
        gateway(tls={"secretName": "x", "hostnames": ["a.example"]}),
        "spec.gateway.tls.hostnames",
        "InvalidSpec",
        ("no effect beside secretName",),
    ),
    ("pre-release", {"image": "vllm/vllm-openai:v0.33.0-rc1"}, "spec.image", "VersionUnreadable", ("release tag",)),
    (
        "assumption over an old tag",
        {"image": "vllm/vllm-openai:v0.19.0", "vllmVersion": {"assume": "0.33.0"}},
        "spec.image",
        "VersionBelowFloor",
        ("spec.image 'vllm/vllm-openai:v0.19.0':",),
    ),
    (
        "older than the catalogue",
        {
            "image": "vllm/vllm-openai:v0.9.0",
            "security": {"accept": [{"risk": "vllmVersionBelowFloor", "why": "a laboratory of ours"}]},
        },
        "spec.image",
        "VersionUnknown",
        ("spec.image 'vllm/vllm-openai:v0.9.0':", "begins at 0.11.0"),
    ),
    ("port that nobody opens", {"ports": {"kvEvents": 7000}}, "spec.ports.kvEvents", "PortUnused", ("kvEvents",)),
    ("privileged port", {"ports": {"api": 80}}, "spec.ports.api", "InvalidSpec", ("1024",)),
    (
        "unknown route",
        gateway(routes={"allow": [{"method": "POST", "path": "/v1/nothing"}]}),
        "spec.gateway.routes.allow[0]",
        "RouteUnknown",
        ("POST /v1/nothing", "securevllm routes"),
    ),
    (
        "other method",
        gateway(routes={"allow": [{"method": "DELETE", "path": "/v1/models"}]}),
        "spec.gateway.routes.allow[0]",
        "RouteUnknown",
        ("DELETE /v1/models",),
    ),
    (
        "forbidden route",
        gateway(routes={"allow": [{"method": "POST", "path": "/collective_rpc"}]}),
        "spec.gateway.routes.allow[0]",
        "RouteForbidden",
        ("never", "Leave it out"),
    ),
    (
        "argument",
        engine(args=["--enable-log-requests"]),
        "spec.engine.args[0]",
        "ArgumentRefused",
        ("'--enable-log-requests'", "promptsInLogs"),
    ),
    (
        "variable",
        engine(env=[{"name": "LD_PRELOAD", "value": "x"}]),
        "spec.engine.env[0].name",
        "VariableRefused",
        ("'LD_PRELOAD'", "NCCL_DEBUG"),
    ),
    (
        "label",
        engine(labels={"securevllm.io/role": "gateway"}),
        "spec.engine.labels",
        "LabelRefused",
        ("securevllm.io/role", "without a prefix"),
    ),
    (
        "unpinned code",
        {
            **engine(args=["--trust-remote-code"]),
            "model": {"name": "a/b", "source": {"huggingFace": {}}},
            "security": {"accept": [{"risk": "trustRemoteCode", "why": "its code was reviewed"}]},
        },
        "spec.model.revision",
        "RevisionNotPinned",
        ("40 hexadecimal digits",),
    ),
    (
        "secret of the operator",
        engine(env=[{"name": "TZ", "valueFrom": {"secretKeyRef": {"name": "a-engine-key", "key": "seal-key"}}}]),
        "spec.engine.env[0].valueFrom.secretKeyRef.name",
        "SecretRefused",
        ("operator's own", "a Secret of yours"),
    ),
    (
        "risk out of bounds",
        {"security": {"accept": [{"risk": "networkDevices", "why": "it needs InfiniBand"}]}},
        "spec.security.accept[0].risk",
        "OutOfBounds",
        ("'networkDevices'", "trustRemoteCode"),
    ),
    (
        "annotation",
        engine(annotations={"k8s.v1.cni.cncf.io/networks": "x"}),
        "spec.engine.annotations",
        "AnnotationRefused",
        ("k8s.v1.cni.cncf.io/networks", "safe-to-evict"),
    ),
    (
        "service annotation",
        gateway(service={"annotations": {"external-dns.alpha.kubernetes.io/hostname": "x"}}),
        "spec.gateway.service.annotations",
        "AnnotationRefused",
        ("external-dns", "metallb.io/"),
    ),
    (
        "rdma",
        engine(resources={"limits": {"rdma/hca": 1}}),
        "spec.engine.resources.limits",
        "ResourceRefused",
        ("rdma/hca", "NetworkPolicy"),
    ),
    (
        "gpu of a gateway",
        gateway(resources={"limits": {"nvidia.com/gpu": 1}}),
        "spec.gateway.resources.limits",
        "ResourceRefused",
        ("nvidia.com/gpu",),
    ),
    (
        "too few gpus",
        {"parallelism": {"tensor": 4}, **engine(resources={"limits": {"nvidia.com/gpu": 1}})},
        "spec.engine.resources.limits.nvidia.com/gpu",
        "InvalidSpec",
        ("4 GPUs", "'1'"),
    ),
    (
        "gpu request only",
        engine(resources={"requests": {"nvidia.com/gpu": 1}}),
        "spec.engine.resources.limits.nvidia.com/gpu",
        "InvalidSpec",
        ("1 GPUs",),
    ),
    (
        "gpu request differs",
        engine(resources={"requests": {"nvidia.com/gpu": 2}, "limits": {"nvidia.com/gpu": 1}}),
        "spec.engine.resources.requests.nvidia.com/gpu",
        "InvalidSpec",
        ("'2'",),
    ),
    (
        "load balancer",
        gateway(service={"type": "LoadBalancer"}),
        "spec.gateway.clients.cidrs",
        "ClientsRequired",
        ("LoadBalancer", "cidrs: ["),
    ),
    (
        "node port",
        gateway(service={"type": "NodePort"}, clients={"podSelector": {}}),
        "spec.gateway.clients.cidrs",
        "ClientsRequired",
        ("NodePort",),
    ),
    (
        "host bits",
        gateway(clients={"cidrs": ["10.0.0.1/8"]}),
        "spec.gateway.clients.cidrs[0]",
        "InvalidSpec",
        ("host bits", "203.0.113.0/24"),
    ),
    ("no network", egress({"cidrs": ["1.1.1/99"]}), "spec.security.egress[0].to.cidrs", "InvalidSpec", ("1.1.1/99",)),
    ("egress to nobody", egress({}), "spec.security.egress[0].to", "EgressRefused", ("nobody is named",)),
    (
        "metadata",
        egress({"cidrs": ["169.254.169.254/32"]}),
        "spec.security.egress[0].to.cidrs",
        "EgressRefused",
        ("169.254.169.254/32", "podSelector"),
    ),
    ("private", egress({"cidrs": ["10.1.0.0/16"]}), "spec.security.egress[0].to.cidrs", "EgressRefused", ("private",)),
    (
        "translation prefix",
        egress({"cidrs": ["64:ff9b::a00:0/104"]}),
        "spec.security.egress[0].to.cidrs",
        "EgressRefused",
        ("64:ff9b",),
    ),
    (
        "multicast",
        egress({"cidrs": ["224.0.0.0/24"]}),
        "spec.security.egress[0].to.cidrs",
        "EgressRefused",
        ("224.0.0.0/24",),
    ),
    (
        "values of a selector",
        egress({"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}),
        "spec.security.egress[0].to.podSelector.matchExpressions[0].values",
        "InvalidSpec",
        ("'In'",),
    ),
    (
        "none beside keys",
        gateway(authentication={"none": "I accept it", "apiKeys": {"secretRefs": [{"name": "a"}]}}),
        "spec.gateway.authentication",
        "InvalidSpec",
        ("at most one",),
    ),
    (
        "plain beside a certificate",
        gateway(tls={"secretName": "a", "disabled": WHY}),
        "spec.gateway.tls",
        "InvalidSpec",
        ("at most one",),
    ),
    (
        "none without words",
        gateway(authentication={"none": "yes, please"}),
        "spec.gateway.authentication.none",
        "InvalidSpec",
        ("I accept",),
    ),
    ("no body", gateway(limits={"requestBody": "64 Mi"}), "spec.gateway.limits.requestBody", "InvalidSpec", ("64 Mi",)),
    ("large body", gateway(limits={"requestBody": "3Gi"}), "spec.gateway.limits.requestBody", "InvalidSpec", ("3Gi",)),
    (
        "no memory",
        gateway(resources={"limits": {"memory": "1Mi"}}),
        "spec.gateway.resources.limits.memory",
        "InvalidSpec",
        ("64Mi",),
    ),
]


def test_a_port_used_twice_is_told_beside_the_rest() -> None:
    events = {"from": {"podSelector": {}}, "why": "the router asks"}
    found = {str(problem) for problem in problems(ports={"kvEvents": 7000, "api": 7000}, security={"kvEvents": events})}
    assert any("api (7000) and kvEvents (7000) would listen on the same port" in text for text in found)


@pytest.mark.parametrize(
    ("spec", "told"),
    [
        ({"vllmVersion": {"assume": "0.33.0"}}, "vllmVersion.assume"),
        ({"security": {"media": {"allowRedirects": True}}}, "allowRedirects"),
        (gateway(clients={"cidrs": ["0.0.0.0/0"]}), "every address"),
        (gateway(clients={"namespaceSelector": {}}), "every namespace"),
    ],
)
def test_what_is_given_up_without_words_is_said_for_the_user(spec: dict[str, Any], told: str) -> None:
    assert told in " ".join(accepted(**spec).risks)


def test_a_date_of_yaml_is_wrong_and_no_crash() -> None:
    assert problems(image=dt.date(2026, 1, 1))[0].reason == "VersionUnreadable"


@pytest.mark.parametrize(
    ("spec", "field", "reason", "told"), [row[1:] for row in REFUSED], ids=[row[0] for row in REFUSED]
)
def test_refused(spec: dict[str, Any], field: str, reason: str, told: tuple[str, ...]) -> None:
    found = problems(**spec)
    assert {(problem.field, problem.reason) for problem in found} == {(field, reason)}
    text = " ".join(map(str, found))
    assert text.startswith(field)
    assert [fragment for fragment in told if fragment not in text] == []


def test_every_reason_is_tried() -> None:
    reasons = {row[3] for row in REFUSED}
    assert reasons == {
        "AnnotationRefused", "ArgumentRefused", "ClientsRequired", "EgressRefused", "InvalidSpec",
        "LabelRefused", "LoadBalancingRefused", "ModelSourceMissing", "NameTooLong", "NotSupportedYet",
        "OutOfBounds", "PortConflict", "PortUnused", "ResourceRefused", "RevisionNotPinned", "RouteForbidden",
        "RouteUnknown", "SecretRefused",
        "StorageNotShared", "VariableRefused", "VersionBelowFloor", "VersionBelowMinimum",
        "VersionLacks", "VersionUnknown", "VersionUnreadable", "VolumeRefused", "WorldMismatch",
    }  # fmt: skip


def test_everything_that_is_wrong_is_told_at_once() -> None:
    found = problems(
        name="Llama",
        model={"name": "a/b"},
        image="vllm:latest",
        engine={"args": ["--middleware=x", "--max-model-len=many"], "env": [{"name": "PATH", "value": "x"}]},
    )
    assert {problem.reason for problem in found} == {
        "InvalidSpec", "ModelSourceMissing", "VersionUnreadable", "ArgumentRefused", "VariableRefused"
    }  # fmt: skip
    assert len(found) == 6
    assert found == tuple(sorted(found))


def test_the_error_tells_all_and_has_the_first_reason() -> None:
    with pytest.raises(SpecError) as caught:
        parse("llama", {**FINE, "ports": {"api": 29501}, "parallelism": {"expert": True}})
    assert caught.value.reason == "WorldMismatch"
    assert all(str(problem) in str(caught.value) for problem in caught.value.problems)


def test_a_forbidden_route_is_forbidden_in_every_version_that_has_it() -> None:
    forbidden = [route for route in catalogue.routes_of(catalogue.newest()).values() if route.never]
    allow = [{"method": route.method, "path": route.path} for route in forbidden]
    for part in (allow[:60], allow[60:]):
        if part:
            assert {problem.reason for problem in problems(gateway={"routes": {"allow": part}})} == {"RouteForbidden"}


def test_risks_are_kept_in_the_users_words() -> None:
    found = accepted(
        image="vllm/vllm-openai:v0.20.0",
        gateway={"authentication": {"none": "I accept open doors"}, "tls": {"disabled": "a mesh does it"}},
        security={
            "accept": [{"risk": "vllmVersionBelowFloor", "why": "fixed next week"}],
            "egress": [{"to": {"cidrs": ["0.0.0.0/0"]}, "ports": [{"port": 443}], "why": "images of users"}],
        },
    )
    assert found.risks == (
        "gateway.authentication.none: I accept open doors",
        "gateway.tls.disabled: a mesh does it",
        "vllmVersionBelowFloor: fixed next week",
        "security.egress: images of users",
    )


@pytest.mark.parametrize(
    "spec",
    [
        {"image": "reg:5000/vllm/vllm-openai:v0.33.0-cu130@sha256:" + "1" * 64},
        {"image": "own/build:main", "vllmVersion": {"assume": "v0.33"}},
        {"model": {"name": "gpt2", "source": {"huggingFace": {"endpoint": "https://hub.example.com:8443/api"}}}},
        {"model": {"name": "/models/llama"}, "replicas": 3},
        {"model": HUB, "replicas": 0},
        {**hub(storage={"claimName": "shared"}), "replicas": 2},
        {**hub(storage={"accessModes": ["ReadWriteMany"]}), "replicas": 2},
        {"parallelism": {"tensor": 4, "pipeline": 2}, **engine(resources={"limits": {"nvidia.com/gpu": "8"}})},
        gateway(clients={}),
        gateway(service={"type": "NodePort"}, clients={"cidrs": ["203.0.113.0/24", "2001:db8::/32"]}),
        egress({"cidrs": ["0.0.0.0/0", "::/0", "8.8.8.0/24"]}),
        egress({"namespaceSelector": {}}),
    ],
    ids=str,
)
def test_accepted(spec: dict[str, Any]) -> None:
    assert accepted(**spec).risks is not None


@pytest.mark.parametrize(
    ("spec", "field", "told"),
    [
        ({"imag": "a:v0.33.0"}, "spec.imag", "Did you mean image? kubectl explain securevllmdeployment.spec lists"),
        (
            {"gateway": {"route": {}}},
            "spec.gateway.route",
            "Did you mean routes? kubectl explain securevllmdeployment.spec.gateway lists",
        ),
        (
            {"gateway": {"routes": {"allow": [{"method": "GET", "pth": "/x"}]}}},
            "spec.gateway.routes.allow[0].pth",
            "Did you mean path? kubectl explain securevllmdeployment.spec.gateway.routes.allow lists",
        ),
        ({"zzzzzz": 1}, "spec.zzzzzz", "Leave it out: kubectl explain securevllmdeployment.spec lists"),
    ],
)
def test_an_unknown_field_is_answered_with_the_one_that_was_meant(spec: dict[str, Any], field: str, told: str) -> None:
    with pytest.raises(SpecError) as refused:
        parse("llama", {**FINE, **spec})
    problem = next(item for item in refused.value.problems if item.field == field)
    assert told in str(problem)
