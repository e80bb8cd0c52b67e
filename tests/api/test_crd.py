"""The CRD on a real API server: accepted, explained and printed; and the API server and the parser agree on specs.

Where they disagree, the parser may be stricter, for a reason that `STRICTER` names; never looser. Whoever adds a rule
to the parser adds a line there, or puts the rule into the schema.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kubernetes import client, config

from securevllm.api.crd import PLURAL, crd
from securevllm.api.parse import parse
from securevllm.api.types import API_VERSION, GROUP, KIND
from securevllm.errors import Problem, SpecError
from tests.api.kube import PATIENCE
from tests.schema_fuzz import mutations, nodes, with_value

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = pytest.mark.cluster

FILE = Path(__file__).parents[2] / "crds" / f"{GROUP}_{PLURAL}.yaml"
NAMESPACE = "test-crd"
ROOT_SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]
SPEC_SCHEMA: dict[str, Any] = ROOT_SCHEMA["properties"]["spec"]
SPEC: dict[str, Any] = {
    "model": {"name": "owner/model", "source": {"huggingFace": {}}},
    "image": "vllm/vllm-openai:v0.33.0",
    "replicas": 1,
}
WHY = "because this test needs it"
MUTATIONS = list(mutations(SPEC_SCHEMA))


@dataclass(frozen=True)
class Answer:
    """What the API server says to a dry-run create: the object as it would be stored, or why not."""

    stored: dict[str, Any] | None
    message: str = ""


class Server:
    """The API server with our CRD installed."""

    def __init__(self, cluster: Cluster, api: Any, cache: Path) -> None:
        self._cluster, self._cache = cluster, cache
        self.objects: Any = client.CustomObjectsApi(api)
        self.definitions = client.ApiextensionsV1Api(api)

    def kubectl(self, *arguments: str) -> str:
        done = self.run(*arguments)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(  # noqa: S603
            [
                Path(sys.executable).with_name("kubectl"),
                f"--kubeconfig={self._cluster.kubeconfig}",
                f"--cache-dir={self._cache}",
                f"--namespace={NAMESPACE}",
                *arguments,
            ],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
            env={"PATH": os.environ["PATH"]},
        )

    def definition(self) -> Any:
        return self.definitions.read_custom_resource_definition(f"{PLURAL}.{GROUP}")

    def create(self, spec: object, *, name: str = "x", dry_run: bool = True) -> Answer:
        body = {"apiVersion": API_VERSION, "kind": KIND, "metadata": {"name": name}, "spec": spec}
        more = {"dry_run": "All"} if dry_run else {}
        try:
            stored = self.objects.create_namespaced_custom_object(
                GROUP, API_VERSION.partition("/")[2], NAMESPACE, PLURAL, body, field_validation="Strict", **more
            )
        except client.ApiException as error:
            if error.status not in {400, 422}:
                raise
            return Answer(None, json.loads(error.body or "")["message"])
        return Answer(stored)


@pytest.fixture(scope="module")
def server(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as api:  # type: ignore[no-untyped-call]
        installed = Server(cluster, api, tmp_path_factory.mktemp("kubectl"))
        installed.kubectl("apply", "--server-side", "--force-conflicts", "--field-manager=test", "-f", str(FILE))
        core: Any = client.CoreV1Api(api)
        if NAMESPACE not in {item.metadata.name for item in core.list_namespace().items}:
            core.create_namespace({"metadata": {"name": NAMESPACE}})
        # Not `kubectl wait`: it ends with an error while a new definition has no conditions at all. Established comes
        # before discovery and OpenAPI know the kind.
        deadline = time.monotonic() + 30 * PATIENCE
        while installed.run("explain", "svllm.spec").returncode:
            assert time.monotonic() < deadline, "the API server does not serve the kind"
            time.sleep(0.2)
        yield installed


def judge(spec: dict[str, Any], name: str = "x") -> tuple[Problem, ...]:
    try:
        parse(name, spec)
    except SpecError as error:
        return error.problems
    return ()


# ------------------------------------------------------------------------------------------------ accepted, explained


def test_the_definition_is_accepted_without_a_complaint(server: Server) -> None:
    conditions = {condition.type: condition.status for condition in server.definition().status.conditions}
    assert (conditions["Established"], conditions["NamesAccepted"]) == ("True", "True")
    assert "NonStructuralSchema" not in conditions


def test_applying_it_again_changes_nothing(server: Server) -> None:
    """What we send is what the API server keeps, defaults included: GitOps tools would show every difference."""
    before = server.definition().metadata.resource_version
    server.kubectl("apply", "--server-side", "--field-manager=test", "-f", str(FILE))
    assert server.definition().metadata.resource_version == before


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("svllm", "A vLLM service"),
        ("svllm.spec.gateway.routes", "Which routes of vLLM clients may use"),
        ("svllm.spec.gateway.routes.profiles", "Sets of routes by use"),
        ("svllm.spec.engine.args", "exact names of the allowlist"),
        ("svllm.spec.engine.affinity.nodeAffinity", "Nodes on which the pods may run"),
        ("svllm.spec.engine.startupTimeout", "1s to 24h. Default: 60m."),
        ("svllm.spec.gateway.authentication.jwt.audiences", "a token must have one"),
        ("svllm.status.conditions", "meta/v1 Condition"),
    ],
)
def test_kubectl_explains(server: Server, path: str, expected: str) -> None:
    assert expected in " ".join(server.kubectl("explain", path).split())


def test_columns_names_and_scale_work_for_a_person(server: Server) -> None:
    created = server.create(SPEC, name="llama", dry_run=False)
    assert created.stored, created.message
    assert created.stored["spec"]["replicas"] == 1
    condition = {"status": "True", "reason": "Test", "message": "", "lastTransitionTime": "2026-01-01T00:00:00Z"}
    status = {
        "replicas": 2,
        "selector": "a=b",
        "url": "https://llama-gateway:8443",
        "conditions": [{"type": "Ready", **condition}, {"type": "Isolated", **condition, "status": "Unknown"}],
    }
    try:
        patch = json.dumps({"status": status})
        server.kubectl("patch", "svllm", "llama", "--subresource=status", "--type=merge", f"-p={patch}")
        header, row = server.kubectl("get", "svllm").splitlines()
        assert header.split() == ["NAME", "READY", "ISOLATED", "REPLICAS", "MODEL", "URL", "AGE"]
        assert row.split()[:-1] == ["llama", "True", "Unknown", "2", "owner/model", "https://llama-gateway:8443"]
        assert "llama" in server.kubectl("get", "vllm", "-o", "name")
        assert "llama" not in server.kubectl("get", "all", "-o", "name")
        server.kubectl("scale", "svllm/llama", "--replicas=3")
        scale = json.loads(server.kubectl("get", "svllm", "llama", "--subresource=scale", "-o", "json"))
        assert scale["spec"]["replicas"] == 3
        assert scale["status"] == {"replicas": 2, "selector": "a=b"}
    finally:
        server.kubectl("delete", "svllm", "llama")


def test_the_status_of_a_create_is_dropped(server: Server) -> None:
    """A user cannot claim `Isolated=True`: the status subresource takes it out of everything but status updates."""
    body = {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": "claims"},
        "spec": SPEC,
        "status": {"url": "https://elsewhere"},
    }
    stored = server.objects.create_namespaced_custom_object(
        GROUP, "v1alpha1", NAMESPACE, PLURAL, body, dry_run="All", field_validation="Strict"
    )
    assert stored["status"] == {"observedGeneration": -1}


# ------------------------------------------------------------------------------------------------------------- CEL


def merged(base: Mapping[str, Any], patch: Mapping[str, Any]) -> dict[str, Any]:
    """Give RFC 7386 JSON merge patch of two objects."""
    out = dict(base)
    for key, value in patch.items():
        if value is None:
            out.pop(key, None)
        elif isinstance(value, Mapping) and isinstance(out.get(key), Mapping):
            out[key] = merged(out[key], value)
        else:
            out[key] = value
    return out


KEYS = "a key has at most 253 characters"
JWT = {"issuer": "https://issuer.example", "audiences": ["vllm"], "remoteJwks": {"uri": "https://issuer.example/keys"}}


def tolerated(**fields: Any) -> dict[str, Any]:
    return {"engine": {"tolerations": [fields]}}


def spread(**fields: Any) -> dict[str, Any]:
    constraint = {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule", **fields}
    return {"engine": {"topologySpreadConstraints": [constraint]}}


def beside(**fields: Any) -> dict[str, Any]:
    required = [{"topologyKey": "zone", "labelSelector": {"matchLabels": {"app": "x"}}, **fields}]
    return {"engine": {"affinity": {"podAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": required}}}}


def on_nodes(**fields: Any) -> dict[str, Any]:
    terms = {"nodeSelectorTerms": [{"matchExpressions": [{"key": "cores", **fields}]}]}
    return {"engine": {"affinity": {"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}}}}


def stored(**fields: Any) -> dict[str, Any]:
    return {"model": {"source": {"huggingFace": {"storage": fields}}}}


# beginning of the rule's message -> (a patch that is accepted, a patch that is refused); rules about names: the names
LOCAL: dict[str, Any] = {"model": {"name": "/models/a", "source": None}}
SPLIT: dict[str, Any] = {
    **LOCAL,
    "disaggregation": {"connector": "nixl", "router": {"image": "vllm/vllm-router:v0.1.17"}},
}
NODES = {"parallelism": {"nodes": 2, "tensor": 2}}
HYBRID: dict[str, Any] = {"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}}
EVENTS = {"from": {"podSelector": {}}, "why": "the router asks"}
WRONG_SHAPES: tuple[dict[str, Any], ...] = (
    {"nodes": 2},
    {"expert": True},
    {"data": {"size": 4, "sizeLocal": 3}},
    {"nodes": 4, "data": {"size": 4, "sizeLocal": 2}},
    {"data": {"size": 2, "sizeLocal": 1, "loadBalancing": "external"}},
    {"expert": True, "data": {"size": 4, "sizeLocal": 2, "loadBalancing": "external"}},
    {"data": {"size": 2, "loadBalancing": "hybrid"}},
)

RULES: dict[str, tuple[Any, Any]] = {
    "metadata.name is at most 40 characters": ("n" * 40, "n" * 41),
    "metadata.name begins with a letter and has no dots": ("a-1", "a.b"),
    "replicas is not used beside disaggregation": (
        {**SPLIT, "replicas": 1},
        {**SPLIT, "replicas": 2},
    ),
    "security.metrics.from names nobody": (
        {"security": {"metrics": {"from": {"podSelector": {}}}}},
        {"security": {"metrics": {"from": {}}}},
    ),
    "model.source is required unless model.name is an absolute path": (
        {"model": {"name": "/models/a", "source": None}},
        {"model": {"source": None}},
    ),
    "gateway.service.type LoadBalancer and NodePort need gateway.clients.cidrs": (
        {"gateway": {"service": {"type": "LoadBalancer"}, "clients": {"cidrs": ["203.0.113.0/24"]}}},
        {"gateway": {"service": {"type": "NodePort"}}},
    ),
    "exactly one of huggingFace, persistentVolumeClaim and image": (
        {"model": {"source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "weights"}}}},
        {"model": {"source": {"persistentVolumeClaim": {"claimName": "weights"}}}},
    ),
    "at most one of apiKeys, jwt, mtls and none": (
        {"gateway": {"authentication": {"none": f"I accept this, {WHY}"}}},
        {"gateway": {"authentication": {"none": f"I accept this, {WHY}", "jwt": JWT}}},
    ),
    "at most one of secretName and disabled": (
        {"gateway": {"tls": {"disabled": WHY}}},
        {"gateway": {"tls": {"disabled": WHY, "secretName": "a"}}},
    ),
    KEYS: ({"engine": {"nodeSelector": {"example.com/a": "b"}}}, {"engine": {"nodeSelector": {"a/b/c": "d"}}}),
    "exactly one of remoteJwks and localJwks": (
        {"gateway": {"authentication": {"jwt": JWT}}},
        {"gateway": {"authentication": {"jwt": JWT | {"localJwks": {"name": "a", "key": "b"}}}}},
    ),
    "exactly one of configMap, secret, persistentVolumeClaim and emptyDir": (
        {"engine": {"volumes": [{"name": "a", "mountPath": "/mnt/a", "configMap": {"name": "a"}}]}},
        {"engine": {"volumes": [{"name": "a", "mountPath": "/mnt/a"}]}},
    ),
    "volumes are mounted below /data or /mnt": (
        {"engine": {"volumes": [{"name": "a", "mountPath": "/data/a", "emptyDir": {}}]}},
        {"engine": {"volumes": [{"name": "a", "mountPath": "/usr/lib", "emptyDir": {}}]}},
    ),
    "exactly one of value and valueFrom": (
        {"engine": {"env": [{"name": "TZ", "value": "UTC"}]}},
        {"engine": {"env": [{"name": "TZ"}]}},
    ),
    "exactly one of secretKeyRef and configMapKeyRef": (
        {"engine": {"env": [{"name": "TZ", "valueFrom": {"configMapKeyRef": {"name": "a", "key": "b"}}}]}},
        {"engine": {"env": [{"name": "TZ", "valueFrom": {}}]}},
    ),
    "minReplicas is at most maxReplicas": (
        {"gateway": {"autoscaling": {"maxReplicas": 2}}},
        {"gateway": {"autoscaling": {"maxReplicas": 1}}},
    ),
    "a request is at most the limit": (
        {"engine": {"resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": 1073741824, "cpu": "1.5"}}}},
        {"engine": {"resources": {"requests": {"memory": "1Gi"}, "limits": {"memory": 1073741823}}}},
    ),
    "the gateway needs a memory limit of at least 64Mi": (
        {"gateway": {"resources": {"limits": {"memory": "64Mi"}}}},
        {"gateway": {"resources": {"limits": {"memory": "63Mi"}}}},
    ),
    "from 1s to 24h": (
        {"engine": {"startupTimeout": "86400s", "terminationGracePeriod": "1s"}},
        {"engine": {"startupTimeout": "0s"}},
    ),
    "from 10s to 24h": (
        {"security": {"verification": {"interval": "10s"}}},
        {"security": {"verification": {"interval": "25h"}}},
    ),
    "from 1Ki to 2047Mi": (
        {"gateway": {"limits": {"requestBody": 1024}}},
        {"gateway": {"limits": {"requestBody": "2Gi"}}},
    ),
    "more than 0": (stored(size="1m"), stored(size=0)),
    "ReadWriteOncePod stands beside no other mode": (
        stored(accessModes=["ReadWriteOncePod"]),
        stored(accessModes=["ReadWriteOncePod", "ReadWriteMany"]),
    ),
    "a toleration without key": (tolerated(operator="Exists"), tolerated(effect="NoExecute")),
    "operator Exists takes no value": (
        tolerated(key="a", operator="Equal", value="b"),
        tolerated(key="a", operator="Exists", value="b"),
    ),
    "tolerationSeconds needs effect NoExecute": (
        tolerated(key="a", effect="NoExecute", tolerationSeconds=60),
        tolerated(key="a", tolerationSeconds=60),
    ),
    "operators other than Exists and DoesNotExist need values": (
        on_nodes(operator="Exists"),
        on_nodes(operator="NotIn"),
    ),
    "Gt and Lt compare with one number": (
        on_nodes(operator="Gt", values=["8"]),
        on_nodes(operator="Lt", values=["8", "9"]),
    ),
    "minDomains needs whenUnsatisfiable DoNotSchedule": (
        spread(minDomains=2),
        spread(minDomains=2, whenUnsatisfiable="ScheduleAnyway"),
    ),
    "matchLabelKeys needs a labelSelector": (
        spread(labelSelector={"matchLabels": {"a": "b"}}, matchLabelKeys=["pod-template-hash"]),
        spread(matchLabelKeys=["pod-template-hash"]),
    ),
    "mismatchLabelKeys needs a labelSelector": (
        beside(mismatchLabelKeys=["pod-template-hash"]),
        beside(mismatchLabelKeys=["app"]),
    ),
    "a key stands in one of matchLabelKeys and mismatchLabelKeys only": (
        beside(matchLabelKeys=["a"], mismatchLabelKeys=["b"]),
        beside(matchLabelKeys=["a"], mismatchLabelKeys=["a"]),
    ),
}


LOOSER = "the parser is looser"


def all_rules() -> set[str]:
    return {entry["message"] for _, node in nodes(ROOT_SCHEMA) for entry in node.get("x-kubernetes-validations", ())}


def test_every_rule_of_the_schema_has_its_two_objects() -> None:
    rules = all_rules()
    assert not [rule for rule in rules if not any(rule.startswith(begin) for begin in RULES)], "add it to RULES"
    assert not [begin for begin in RULES if not any(rule.startswith(begin) for rule in rules)], "gone from the schema"


@pytest.mark.parametrize("message", RULES)
def test_a_rule_accepts_and_refuses(server: Server, message: str) -> None:
    right, wrong = RULES[message]
    if isinstance(right, str):
        accepted, refused = server.create(SPEC, name=right), server.create(SPEC, name=wrong)
        assert judge(SPEC, name=wrong), LOOSER
    else:
        accepted, refused = server.create(merged(SPEC, right)), server.create(merged(SPEC, wrong))
        assert not [problem for problem in judge(merged(SPEC, right)) if problem.reason != "NotSupportedYet"]
        assert judge(merged(SPEC, wrong)), LOOSER
    assert accepted.stored, accepted.message
    assert message in refused.message


# ------------------------------------------------------------------------------------- the API server and the parser

# (reason, pattern of the rule) -> why the schema does not say it
STRICTER: dict[tuple[str, str], str] = {
    ("NotSupportedYet", "this release does not support it"): "the schema is that of the API version, not of a release",
    ("ResourceRefused", "this extended resource may bring a network"): "the list of GPUs grows without a new CRD",
    ("VariableRefused", "only names of the allowlist"): "catalogue",
    ("VariableRefused", "the operator always sets"): "catalogue",
    ("VariableRefused", "this variable is refused"): "catalogue",
    ("VariableRefused", "not one of the values"): "catalogue",
    ("VariableRefused", "it needs a value of kind"): "catalogue",
    ("SecretRefused", "Secrets of this name are the operator's own"): "names of the operator's objects",
    ("VolumeRefused", "Secrets of this name are the operator's own"): "names of the operator's objects",
    ("VolumeRefused", "is within the mount of"): "compares items of a list with each other",
    ("VolumeRefused", "this claim holds the weights"): "depends on the source",
    ("RevisionNotPinned", ""): "depends on the arguments",
    ("OutOfBounds", ""): "bounds of the platform",
    ("EgressRefused", "the rule does not open the proxy's own port"): "reads a number in a URL",
    ("EgressRefused", "engines send everything through one proxy"): "compares items of a list with each other",
    ("ArgumentRefused", "only exact names of the allowlist"): "catalogue",
    ("ArgumentRefused", "the operator sets this flag"): "catalogue",
    ("ArgumentRefused", "this flag is a risk"): "catalogue",
    ("ArgumentRefused", "this flag imports or runs code"): "catalogue",
    ("ArgumentRefused", "only vLLM .* has this flag"): "catalogue of the image's version",
    ("ArgumentRefused", "needs a value of kind"): "catalogue",
    ("ArgumentRefused", "this flag takes no value"): "catalogue",
    ("ArgumentRefused", "this flag takes no JSON"): "catalogue",
    ("ArgumentRefused", "a value without a flag before it"): "reads several items of a list together",
    ("ArgumentRefused", "it needs a JSON object"): "JSON in a text",
    ("ArgumentRefused", "not a key that it may have"): "catalogue",
    ("ArgumentRefused", "key .*: it needs"): "catalogue",
    ("ArgumentRefused", "not one of the values"): "catalogue",
    ("ArgumentRefused", "only a path below a volume"): "depends on the volumes",
    ("ArgumentRefused", "an adapter is written as"): "catalogue",
    ("ArgumentRefused", "needs a declared egress"): "depends on the egress",
    ("ArgumentRefused", "-O is another flag"): "catalogue",
    ("ArgumentRefused", "a flag may stand only once"): "the list is atomic: one flag has many spellings of its value",
    ("AnnotationRefused", "annotations can add interfaces and sidecars"): "allowlist that grows without a new CRD",
    ("AnnotationRefused", "an annotation can publish the Service elsewhere"): "allowlist that grows without a new CRD",
    ("LabelRefused", "labels of Kubernetes, of meshes and of this operator"): "list that grows without a new CRD",
    ("LabelRefused", "a label with a prefix"): "bounds of the platform",
    ("RouteUnknown", r"vLLM \S+ has no such route"): "catalogue of the image's version",
    ("RouteForbidden", r"this is or could be read as .*, which is never opened"): "catalogue of every version",
    ("RouteUnknown", "an unknown route is one literal path"): "templates are right where the catalogue has them",
    ("InvalidSpec", r"vLLM \S+ has this route"): "catalogue of the image's version",
    ("VersionUnreadable", "the tag does not say which vLLM version"): "vllmVersion may say it; needs the catalogue",
    ("VersionUnknown", "the catalogue ends at"): "catalogue",
    ("VersionUnknown", "the catalogue begins at"): "catalogue",
    ("VersionBelowFloor", r"vLLM before \S+ has known holes"): "catalogue",
    ("VersionBelowMinimum", "the spec itself asks for at least"): "the version stands in the image's tag",
    ("EgressRefused", "nobody is named"): "an empty Peers is right for clients, where it means the own namespace",
    ("EgressRefused", "private, link-local and shared ranges"): "address arithmetic",
    ("InvalidSpec", "does not appear to be an IPv4 or IPv6 network"): "address arithmetic",
    ("InvalidSpec", "has host bits set"): "address arithmetic",
    ("InvalidSpec", "no packet carries an IPv4 address in IPv6 notation"): "address arithmetic",
    ("InvalidSpec", "not a quantity"): "more decimals or digits than Kubernetes keeps: arithmetic",
    ("InvalidSpec", "the fetch Job has to write into the volume"): "ReadOnlyMany is right beside another mode",
    ("InvalidSpec", r"the parallelism needs \d+ GPUs"): "arithmetic over two fields and the list of GPUs",
    ("InvalidSpec", "with disaggregation each side has its own"): "whether parallelism was said at all",
    ("NotSupportedYet", "its store is a service"): "a later release may support it without a new CRD",
    ("NotSupportedYet", "it reads the addresses"): "a later release may support it without a new CRD",
    ("NotSupportedYet", "its servers take pickle"): "a later release may support it without a new CRD",
    ("NotSupportedYet", "vLLM 0.24 removed it"): "a later release may support it without a new CRD",
    ("NotSupportedYet", "the router knows one address"): "the same type without disaggregation may say it",
    ("WorldMismatch", "GPUs cannot be spread evenly"): "arithmetic over several fields with defaults",
    ("WorldMismatch", "ranks cannot be spread evenly"): "arithmetic over several fields with defaults",
    ("WorldMismatch", r"in each pod, are \d+ pods"): "arithmetic over several fields with defaults",
    ("WorldMismatch", "experts are spread over"): "arithmetic over several fields with defaults",
    ("WorldMismatch", "need different numbers of GPUs"): "arithmetic over two sides and the list of GPUs",
    ("LoadBalancingRefused", "ranks of a dense model"): "depends on expert, beside data",
    ("LoadBalancingRefused", "every rank is a pod of its own"): "arithmetic over several fields with defaults",
    ("LoadBalancingRefused", "nothing between pods to balance"): "arithmetic over several fields with defaults",
    ("VersionLacks", r"vLLM \S+ does not have it"): "catalogue of the image's version",
    ("PortUnused", ""): "depends on parallelism, disaggregation and security",
    ("PortConflict", "numbered by data-parallel rank"): "arithmetic over several fields with defaults",
    ("InvalidSpec", "one kind of GPU per pod"): "the list of GPUs grows without a new CRD",
    ("InvalidSpec", r"'\.\.' and '//' are not allowed"): "RE2 has no look-around",
    ("InvalidSpec", r"'\.\.' is not allowed"): "RE2 has no look-around",
    ("InvalidSpec", "a hub knows models as owner/name"): "depends on the source",
    ("StorageNotShared", "pods on several nodes cannot mount"): "depends on source, storage and replicas",
    ("InvalidSpec", "it has no effect beside"): "depends on the source, and on what was said at all",
    ("PortConflict", "would listen on the same port"): "absent ports have defaults of the catalogue",
}

WRONG_ARGUMENTS: list[list[str]] = [
    ["--enable-log-requests"], ["--middleware=a.b"], ["--override-pooler-config={}"], ["--dtype.x=1"], ["stray"],
    ["--hf-overrides=3"], ["--hf-overrides.auto_map=x"], ["--speculative-config.method=x"], ["--load-format=pt"],
    ["--chat-template=/etc/x"], ["--lora-modules=x"], ["--otlp-traces-endpoint=http://a:4317"], ["-O3"],
    ["--seed=1", "--seed=1"],
]  # fmt: skip
WRONG_VARIABLES: list[dict[str, Any]] = [
    {"name": "VLLM_PLUGINS", "value": "a"},
    {"name": "LD_LIBRARY_PATH", "value": "a"},
    {"name": "NCCL_DEBUG", "value": "a"},
    {"name": "OMP_NUM_THREADS", "value": "a"},
    {"name": "TZ", "valueFrom": {"secretKeyRef": {"name": "a-engine-key", "key": "b"}}},
]
PROXY: dict[str, Any] = {
    "to": {"podSelector": {}},
    "ports": [{"port": 3128}],
    "proxy": "http://squid:3128",
    "why": WHY,
}

# What the systematic mutations below do not reach.
BEYOND: list[dict[str, Any]] = [
    {"image": "vllm/vllm-openai:v99.0.0"},
    {"image": "vllm/vllm-openai:v0.1.0"},
    {"engine": {"args": ["--port=1"]}},
    {"engine": {"args": ["--enforce-eager=1"]}},
    {"engine": {"args": ["--max-model-len=many"]}},
    *({"engine": {"args": args}} for args in WRONG_ARGUMENTS),
    *({"engine": {"env": [variable]}} for variable in WRONG_VARIABLES),
    {"engine": {"volumes": [{"name": "a", "mountPath": "/mnt/a", "secret": {"secretName": "b-gateway-ca"}}]}},
    {"engine": {"volumes": [{"name": n, "mountPath": "/mnt/a", "emptyDir": {}} for n in "ab"]}},
    {
        "model": {"source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "w"}}},
        "engine": {
            "volumes": [
                {"name": "a", "mountPath": "/mnt/a", "persistentVolumeClaim": {"claimName": "w", "readOnly": False}}
            ]
        },
    },
    {
        "engine": {"args": ["--trust-remote-code"]},
        "security": {"accept": [{"risk": "trustRemoteCode", "why": WHY}]},
    },
    {"security": {"accept": [{"risk": "networkDevices", "why": WHY}]}},
    {"engine": {"labels": {"example.com/a": "b"}}},
    {"security": {"egress": [PROXY, PROXY]}},
    {"security": {"egress": [{**PROXY, "ports": [{"port": 443}]}]}},
    {"engine": {"resources": {"limits": {"nvidia.com/gpu": 3}}}},
    {"engine": {"resources": {"limits": {"nvidia.com/gpu": 1, "amd.com/gpu": 1}}}},
    {"gateway": {"routes": {"allow": [{"method": "POST", "path": "/pause"}]}}},
    *(
        {"gateway": {"routes": {"allow": [{"method": "POST", "path": path, "unknownRoute": WHY}]}}}
        for path in ("/metrics/x", "/v1/{x}", "/classify", "/v1/custom")
    ),
    {"vllmVersion": {"minimum": "99.0"}},
    {"model": {"source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "a", "path": "a/../b"}}}},
    {"ports": {"api": 29501, "torchDistributed": 29501}, **NODES},
    {"ports": {"torchDistributed": 29501}},
    *({**LOCAL, "parallelism": parallelism} for parallelism in WRONG_SHAPES),
    {**SPLIT, "parallelism": {"tensor": 2}},
    *(
        {**LOCAL, "disaggregation": SPLIT["disaggregation"] | {"connector": connector}}
        for connector in ("mooncakeStore", "moriio", "lmcache", "p2pNccl")
    ),
    {**LOCAL, "disaggregation": SPLIT["disaggregation"] | {"prefill": {"parallelism": HYBRID}}},
    {
        **LOCAL,
        "disaggregation": SPLIT["disaggregation"] | {"prefill": {"parallelism": {"tensor": 2}}},
        "engine": {"resources": {"limits": {"nvidia.com/gpu": 2}}},
    },
    {**SPLIT, "image": "vllm/vllm-openai:v0.11.0"},
    {
        "parallelism": {"data": {"size": 1000, "sizeLocal": 8}},
        "ports": {"kvEvents": 65000},
        "security": {"kvEvents": EVENTS},
    },
    {"model": {"revision": "main", "source": {"huggingFace": None, "persistentVolumeClaim": {"claimName": "a"}}}},
    {"gateway": {"clients": {"cidrs": ["::ffff:1.2.3.0/120"]}}},
    *({"engine": {"sharedMemory": size}} for size in ("99E", "0.5n")),
    *(patch for pair in RULES.values() for patch in pair if isinstance(patch, dict)),
]


def disagreements(server: Server, spec: Any) -> Iterator[tuple[str, str]]:
    """Give (`looser` or `unknown`, what to read) or (`stricter`, line of STRICTER)."""
    answer = server.create(spec)
    if answer.stored is None:
        if isinstance(spec, dict) and not judge(spec):
            yield "looser", answer.message
        return
    # The parser judges what is stored: nulls are gone by then, and defaults are set.
    for problem in judge(answer.stored["spec"]):
        named = [key for key in STRICTER if key[0] == problem.reason and re.search(key[1], problem.rule)]
        yield ("stricter", str(named[0])) if named else ("unknown", f"{problem.reason}: {problem.rule}")


HINT = "looser: add the rule to the parser; unknown: name it in STRICTER, or put the rule into the schema"


def test_the_parser_is_never_looser_than_the_api_server_and_stricter_only_as_named(server: Server) -> None:
    """Every field of the schema with some twenty values each, one at a time, and pairs of fields: 6000 specs."""
    specs = [with_value(SPEC, SPEC_SCHEMA, path, value) for path, value in MUTATIONS]
    specs += [merged(SPEC, patch) for patch in BEYOND]
    found = {disagreement for spec in specs for disagreement in disagreements(server, spec)}
    wrong = sorted(f"{kind}: {text}" for kind, text in found if kind != "stricter")
    assert not wrong, "\n".join([*wrong, HINT])
    unused = set(map(str, STRICTER)) - {text for _, text in found}
    assert not unused, "nothing shows these rules: remove them from STRICTER, or add a spec to BEYOND"


@settings(
    max_examples=300, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.lists(st.sampled_from(MUTATIONS), min_size=2, max_size=4))
def test_they_agree_on_combinations(server: Server, chosen: list[tuple[tuple[str, ...], Any]]) -> None:
    spec: Any = SPEC
    for path, value in chosen:
        if path and isinstance(spec, dict):
            try:
                spec = with_value(spec, SPEC_SCHEMA, path, value)
            except (AttributeError, TypeError):
                continue  # an earlier mutation put something else where this one needs a parent
    assert not [text for kind, text in disagreements(server, spec) if kind != "stricter"], HINT


def test_what_is_accepted_is_stored_as_it_was_written(server: Server) -> None:
    """Nothing is pruned, nothing but the two replica counts is added: GitOps tools see no drift."""
    zone = {"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}
    preferred = [{"weight": 1, "preference": zone}]
    affinity = {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": preferred}, "podAffinity": {}}
    written = merged(SPEC, {"gateway": {"routes": {"profiles": ["chat"]}}, "engine": {"affinity": affinity}})
    answer = server.create(written)
    assert answer.stored, answer.message
    assert answer.stored["spec"] == merged(written, {"gateway": {"replicas": 2}})
