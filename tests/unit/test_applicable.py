"""What Kubernetes would refuse is refused in the spec: which field, which value, which rule.

That these are Kubernetes' rules is shown by tests/api/test_accepted.py on a real API server.
"""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.errors import SpecError

SPEC: dict[str, Any] = {"model": {"name": "/models/x"}, "image": "vllm/vllm-openai:v0.33.0"}
HUB: dict[str, Any] = {"name": "owner/model", "source": {"huggingFace": {}}}
TEAM = {"matchLabels": {"team": "a"}}
ONE = "spec.engine.affinity.podAntiAffinity.requiredDuringSchedulingIgnoredDuringExecution[0]"

NODE = "spec.engine.affinity.nodeAffinity.requiredDuringSchedulingIgnoredDuringExecution.nodeSelectorTerms[0]"


def told(**parts: Any) -> list[str]:
    try:
        parse("x", SPEC | parts)
    except SpecError as error:
        return [str(problem) for problem in error.problems]
    return []


def engine(**fields: Any) -> dict[str, Any]:
    return {"engine": fields}


def nodes(**fields: Any) -> dict[str, Any]:
    terms = {"nodeSelectorTerms": [fields]}
    return engine(affinity={"nodeAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})


def apart(**fields: Any) -> dict[str, Any]:
    terms = [{"topologyKey": "kubernetes.io/hostname", **fields}]
    return engine(affinity={"podAntiAffinity": {"requiredDuringSchedulingIgnoredDuringExecution": terms}})


def spread(**fields: Any) -> dict[str, Any]:
    return engine(
        topologySpreadConstraints=[{"maxSkew": 1, "topologyKey": "zone", "whenUnsatisfiable": "DoNotSchedule"} | fields]
    )


def hub(**fields: Any) -> dict[str, Any]:
    return {"model": HUB | {"source": {"huggingFace": {"storage": fields}}}}


@pytest.mark.parametrize(
    "parts",
    [
        engine(tolerations=[{"operator": "Exists"}, {"key": "a", "value": "b"}, {"key": "a", "effect": "NoExecute"}]),
        engine(tolerations=[{"key": "a", "effect": "NoExecute", "tolerationSeconds": 0}]),
        engine(nodeSelector={"topology.kubernetes.io/zone": "", "x" * 63: "y" * 63}),
        engine(startupTimeout="24h", terminationGracePeriod="1s", sharedMemory=1),
        nodes(matchExpressions=[{"key": "a", "operator": "Exists"}, {"key": "a", "operator": "Gt", "values": ["8"]}]),
        nodes(matchFields=[{"key": "metadata.name", "operator": "In", "values": ["node-1.example"]}]),
        nodes(),
        apart(),
        apart(labelSelector=TEAM, matchLabelKeys=["pod-template-hash"], mismatchLabelKeys=["tenant"]),
        spread(minDomains=1, labelSelector={}, matchLabelKeys=["pod-template-hash"], nodeTaintsPolicy="Honor"),
        hub(size="1Ki", accessModes=["ReadWriteOncePod"]),
        {"gateway": {"resources": {"requests": {"cpu": "1000m"}, "limits": {"cpu": 1, "memory": "64Mi"}}}},
        {"security": {"verification": {"mode": "Disabled"}}},
    ],
)
def test_taken(parts: dict[str, Any]) -> None:
    assert told(**parts) == []


@pytest.mark.parametrize(
    ("parts", "begin"),
    [
        (engine(tolerations=[{}]), "spec.engine.tolerations[0]: a toleration without key"),
        (
            engine(tolerations=[{"key": "a", "operator": "Exists", "value": "b"}]),
            "spec.engine.tolerations[0].value 'b': operator Exists takes no value",
        ),
        (
            engine(tolerations=[{"key": "a", "tolerationSeconds": 5}]),
            "spec.engine.tolerations[0].tolerationSeconds '5': tolerationSeconds needs effect NoExecute",
        ),
        (engine(tolerations=[{"key": "a", "value": "a b"}]), "spec.engine.tolerations[0].value 'a b': "),
        (engine(startupTimeout="0s"), "spec.engine.startupTimeout '0s': from 1s to 24h"),
        (engine(startupTimeout="999999h"), "spec.engine.startupTimeout '999999h': from 1s to 24h"),
        (engine(terminationGracePeriod="0s"), "spec.engine.terminationGracePeriod '0s': from 1s to 24h"),
        (engine(sharedMemory=0), "spec.engine.sharedMemory '0': more than 0"),
        (engine(priorityClassName="a..b"), "spec.engine.priorityClassName 'a..b': "),
        (engine(runtimeClassName="a.-b"), "spec.engine.runtimeClassName 'a.-b': "),
        (engine(nodeSelector={"x" * 64: "a"}), "spec.engine.nodeSelector"),
        (engine(nodeSelector={"a..b/c": "a"}), "spec.engine.nodeSelector"),
        (engine(nodeSelector={"-a/c": "a"}), "spec.engine.nodeSelector"),
        (
            engine(resources={"requests": {"cpu": "1001m"}, "limits": {"cpu": 1}}),
            "spec.engine.resources.requests.cpu '1001m': a request is at most the limit. Write 1 or less",
        ),
        (
            nodes(matchExpressions=[{"key": "a", "operator": "In"}]),
            f"{NODE}.matchExpressions[0].values 'In': operators other than",
        ),
        (
            nodes(matchExpressions=[{"key": "a", "operator": "Gt", "values": ["b"]}]),
            f"{NODE}.matchExpressions[0].values 'b': Gt and Lt compare with one number",
        ),
        (apart(matchLabelKeys=["a"]), f"{ONE}.matchLabelKeys 'a': matchLabelKeys needs a labelSelector"),
        (
            apart(labelSelector=TEAM, mismatchLabelKeys=["team"]),
            f"{ONE}.mismatchLabelKeys 'team': mismatchLabelKeys needs a labelSelector",
        ),
        (
            apart(labelSelector=TEAM, matchLabelKeys=["a"], mismatchLabelKeys=["a"]),
            f"{ONE}.mismatchLabelKeys 'a': a key stands in one of",
        ),
        (apart(namespaceSelector={"matchExpressions": [{"key": "a", "operator": "Exists", "values": ["b"]}]}), ONE),
        (apart(unknown=1), f"{ONE}.unknown '1': "),
        (
            spread(minDomains=2, whenUnsatisfiable="ScheduleAnyway"),
            "spec.engine.topologySpreadConstraints[0].minDomains '2': minDomains needs",
        ),
        (
            engine(topologySpreadConstraints=spread()["engine"]["topologySpreadConstraints"] * 2),
            "spec.engine.topologySpreadConstraints[1]",
        ),
        (hub(size="0"), "spec.model.source.huggingFace.storage.size '0': more than 0"),
        (
            hub(accessModes=["ReadWriteMany", "ReadWriteOncePod"]),
            "spec.model.source.huggingFace.storage.accessModes 'ReadWriteMany, ReadWriteOncePod': ReadWriteOncePod",
        ),
        (
            {"gateway": {"clients": {"cidrs": ["::ffff:1.2.3.0/120"]}}},
            "spec.gateway.clients.cidrs[0] '::ffff:1.2.3.0/120': no packet carries",
        ),
        ({"security": {"verification": {"mode": "Off"}}}, "spec.security.verification.mode 'Off': "),
        (
            {"gateway": {"clients": {"podSelector": {"matchExpressions": [{"key": "a", "operator": "In"}]}}}},
            "spec.gateway.clients.podSelector.matchExpressions[0].values 'In': operators other than",
        ),
    ],
)
def test_refused(parts: dict[str, Any], begin: str) -> None:
    (problem,) = told(**parts)
    assert problem.startswith(begin)


def test_an_interval_has_bounds() -> None:
    found = told(security={"verification": {"interval": "9s"}})
    assert any(problem.startswith("spec.security.verification.interval '9s': from 10s to 24h") for problem in found)


def test_a_quantity_that_is_none_is_told_once() -> None:
    parts = engine(sharedMemory="1K", resources={"requests": {"cpu": "1ki"}, "limits": {"cpu": "1"}})
    assert [problem.split(" ")[0] for problem in told(**parts)] == [
        "spec.engine.resources.requests.cpu",
        "spec.engine.sharedMemory",
    ]
