"""Whatever the parser accepts, the API server takes: a spec that is accepted and cannot be applied breaks I6."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from kubernetes import client, config
from kubernetes.dynamic import DynamicClient

from securevllm.api.crd import crd
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.errors import SpecError
from securevllm.render import Observed, render
from securevllm.render.meta import Owner
from tests.kubernetes_models import NotAKubernetesObjectError, validate_strict
from tests.pod_security import violations
from tests.schema_fuzz import mutations, with_value

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

SCHEMA: dict[str, Any] = crd()["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["spec"]
BASES: dict[str, dict[str, Any]] = {
    "fetched": {
        "model": {"name": "owner/model", "source": {"huggingFace": {}}},
        "image": "vllm/vllm-openai:v0.33.0",
        "replicas": 1,
    },
    "claim, open": {
        "model": {"name": "/models/x", "source": {"persistentVolumeClaim": {"claimName": "c", "path": "a"}}},
        "image": "vllm/vllm-openai:v0.33.0",
        "replicas": 1,
        "gateway": {
            "tls": {"disabled": "because of the test"},
            "authentication": {"none": "I accept this for the test"},
        },
    },
}
TEAM: dict[str, Any] = {
    "matchLabels": {"example.com/team": "a"},
    "matchExpressions": [
        {"key": "tier", "operator": "NotIn", "values": ["b", ""]},
        {"key": "k" * 63, "operator": "DoesNotExist"},
    ],
}
NEAR: dict[str, Any] = {
    "topologyKey": "topology.kubernetes.io/zone",
    "labelSelector": TEAM,
    "namespaces": ["a", "b-1"],
    "namespaceSelector": {},
    "matchLabelKeys": ["pod-template-hash"],
    "mismatchLabelKeys": ["tenant"],
}
NODES: dict[str, Any] = {
    "matchExpressions": [
        {"key": "gpu", "operator": "In", "values": ["h100", "h200"]},
        {"key": "cores", "operator": "Gt", "values": ["7"]},
    ],
    "matchFields": [{"key": "metadata.name", "operator": "NotIn", "values": ["node-1.example.com"]}],
}
REQUIRED, PREFERRED = (f"{word}DuringSchedulingIgnoredDuringExecution" for word in ("required", "preferred"))
PODS: dict[str, Any] = {REQUIRED: [NEAR], PREFERRED: [{"weight": 100, "podAffinityTerm": NEAR}]}
PLACEMENT: dict[str, Any] = {
    "affinity": {
        "nodeAffinity": {
            REQUIRED: {"nodeSelectorTerms": [NODES, {}]},
            PREFERRED: [{"weight": 1, "preference": NODES}, {"weight": 2, "preference": {}}],
        },
        "podAffinity": PODS,
        "podAntiAffinity": PODS,
    },
    "topologySpreadConstraints": [
        {
            "maxSkew": 2,
            "topologyKey": "zone",
            "whenUnsatisfiable": "DoNotSchedule",
            "labelSelector": TEAM,
            "minDomains": 3,
            "nodeAffinityPolicy": "Ignore",
            "nodeTaintsPolicy": "Honor",
            "matchLabelKeys": ["pod-template-hash"],
        },
        {"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "ScheduleAnyway"},
    ],
    "tolerations": [
        {"operator": "Exists"},
        {"key": "a", "operator": "Equal", "value": "b", "effect": "NoSchedule"},
        {"key": "a", "effect": "NoExecute", "tolerationSeconds": 60},
    ],
    "labels": {"team": "a"},
    "startupTimeout": "24h",
    "terminationGracePeriod": "1s",
}
# What the mutations of single fields do not reach.
BEYOND: list[tuple[tuple[str, ...], Any]] = [
    (("engine", "resources"), {"requests": {"cpu": "2"}, "limits": {"cpu": "1"}}),
    (("engine", "resources"), {"requests": {"nvidia.com/gpu": 1}}),
    (("engine", "resources"), {"limits": {"memory": "1K"}}),
    (("engine", "resources"), {"limits": {"memory": "1ki"}}),
    (("gateway", "resources"), {"requests": {"cpu": 2}, "limits": {"cpu": 1}}),
    (("model", "source", "huggingFace", "storage", "size"), "0"),
    (("engine", "startupTimeout"), "999999h"),
    (("engine", "nodeSelector"), {"a..b/c": "x"}),
    (("engine",), PLACEMENT),
    (("engine", "tolerations"), [{"key": "a", "tolerationSeconds": 60}, {}, {"key": "a", "operator": "Exists"}]),
    *(
        (("gateway", "clients", "cidrs"), [cidr])
        for cidr in (
            "1.1.1.0/024",
            "2606:4700::/032",
            "2606:4700:0::/32",
            "FD00::/8",
            "::ffff:1.2.3.0/120",
            "::1.2.3.4/128",
        )
    ),
    *((("security", "egress", "[]", "to", "cidrs"), [cidr]) for cidr in ("1.1.1.0/024", "2606:4700:0::/32")),
]


@pytest.mark.parametrize("base", BASES)
def test_what_the_parser_accepts_can_be_applied(cluster: Cluster, base: str) -> None:
    found: dict[str, str] = {}
    asked: set[str] = set()
    with config.new_client_from_config(config_file=str(cluster.kubeconfig)) as api:  # type: ignore[no-untyped-call]
        dynamic: Any = DynamicClient(api)  # type: ignore[no-untyped-call]
        for path, value in [*mutations(SCHEMA), *BEYOND]:
            spec = with_value(BASES[base], SCHEMA, path, value)
            if not isinstance(spec, dict):
                continue
            try:
                accepted = parse("x", spec)
            except SpecError:
                continue
            rendered = render(Owner("x", "default", "u-1"), accepted, Context(), Observed())
            for obj in (*rendered.objects(), *rendered.withheld):
                text = json.dumps(obj, sort_keys=True)
                if text not in asked:
                    asked.add(text)
                    for problem in problems(dynamic, obj):
                        found.setdefault(problem[:120], f"{'.'.join(path)} = {str(value)[:100]}")
    parse("x", BASES[base] | {"engine": PLACEMENT})
    assert not found, "\n".join(f"{where}: {problem}" for problem, where in found.items())
    assert len(asked) > 100


def problems(dynamic: Any, obj: dict[str, Any]) -> list[str]:
    found = violations(obj["spec"]["template"]) if "template" in obj.get("spec", {}) else []
    try:
        validate_strict(obj)
    except NotAKubernetesObjectError as error:
        return [*found, str(error)]
    kind = dynamic.resources.get(api_version=obj["apiVersion"], kind=obj["kind"])
    try:
        dynamic.server_side_apply(
            kind, body=obj, namespace="default", field_manager="test", force_conflicts=True, dry_run="All"
        )
    except client.ApiException as error:
        return [*found, json.loads(error.body or "{}").get("message", str(error))]
    return found
