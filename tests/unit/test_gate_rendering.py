"""What the gate of an engine is told, and where it stands in the pod."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.api.units import quantity
from securevllm.context import Context
from securevllm.proof.wire import GATE_VARIABLE, Barrier, GateConfig, load_gate
from securevllm.render import Observed, accepted, gate, render
from securevllm.render.meta import Owner
from securevllm.topology import Role, plan

OWNER = Owner("llama", "apps", "uid-1")
CONTEXT = Context(operator_image="registry.example.com/operator:1.2.3", cluster_domain="k8s.example")
FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
WHY = "measured by somebody else"


def egress(**to: Any) -> dict[str, Any]:
    ports = to.pop("ports", [{"port": 443}])
    return {"security": {"egress": [{"to": to, "ports": ports, "why": "because of the test"}]}}


def containers(barrier: Barrier | None = None, **spec: Any) -> list[dict[str, Any]]:
    judged = parse("llama", FINE | spec).spec
    return gate.init_containers(
        judged, plan(judged, CONTEXT), Role.ENGINE, CONTEXT, image=judged.image, barrier=barrier
    )


def told(**spec: Any) -> GateConfig:
    variables = {item["name"]: item.get("value", "") for item in containers(**spec)[-1]["env"]}
    return load_gate(variables[GATE_VARIABLE])


def engine(context: Context = CONTEXT, **spec: Any) -> dict[str, Any]:
    rendered = render(OWNER, parse("llama", FINE | spec), context, Observed())
    found = next(item for item in rendered.workloads if item["metadata"]["name"] == "llama-engine")
    pod: dict[str, Any] = found["spec"]["template"]["spec"]
    return pod


def test_a_group_pulls_the_engines_image_first_and_the_gate_comes_last() -> None:
    first, last = containers(Barrier(29499, "1", ("a.", "b."), "g0/1"))
    assert (first["name"], first["image"], first["command"]) == ("pull", FINE["image"], ["/bin/true"])
    assert (last["name"], last["image"], last["args"]) == ("gate", CONTEXT.operator_image, ["gate"])


def test_before_the_gate_of_a_single_pod_nothing_of_its_image_runs() -> None:
    [only] = engine()["initContainers"]
    assert (only["name"], only["image"], only["args"]) == ("gate", CONTEXT.operator_image, ["gate"])


def test_both_are_restricted_and_small() -> None:
    pod = engine()
    assert pod["automountServiceAccountToken"] is False
    for container in pod["initContainers"]:
        assert container["securityContext"]["allowPrivilegeEscalation"] is False
        assert container["securityContext"]["capabilities"] == {"drop": ["ALL"]}
        assert container["securityContext"]["readOnlyRootFilesystem"] is True
        assert quantity(container["resources"]["limits"]["memory"]) <= quantity("64Mi")
        assert "volumeMounts" not in container


def test_it_looks_for_what_listens_and_is_not_a_flow() -> None:
    config = told()
    assert config.dns == "kubernetes.default.svc.k8s.example."
    assert {(item.host, item.port) for item in config.forbidden} == {
        ("$KUBERNETES_SERVICE_HOST", "$KUBERNETES_SERVICE_PORT"),
        ("secure-vllm-operator-canary.secure-vllm-operator.svc.k8s.example.", "9094"),
    }
    assert config.isolation
    assert config.barrier is None


@pytest.mark.parametrize(
    ("spec", "left"),
    [
        (egress(cidrs=["0.0.0.0/0"]), {"9094"}),
        (
            egress(cidrs=["203.0.113.0/24"], ports=[{"port": 443, "protocol": "UDP"}]),
            {"9094", "$KUBERNETES_SERVICE_PORT"},
        ),
        (egress(podSelector={}), {"9094", "$KUBERNETES_SERVICE_PORT"}),
        (egress(namespaceSelector={}, ports=[{"port": 9094}]), {"$KUBERNETES_SERVICE_PORT"}),
    ],
    ids=["a-range", "udp-only", "pods", "the-canary-port"],
)
def test_what_a_declared_egress_may_reach_is_no_target(spec: dict[str, Any], left: set[str]) -> None:
    assert {item.port for item in told(**spec).forbidden} == left


def test_a_group_meets_in_its_gates() -> None:
    barrier = Barrier(29499, "1", ("a.", "b."), "g0/1")
    assert load_gate(containers(barrier)[-1]["env"][-1]["value"]).barrier == barrier


def test_given_up_in_words_there_is_no_gate_but_a_group_still_meets() -> None:
    off: dict[str, Any] = {"security": {"gate": {"disabled": WHY}}}
    assert containers(**off) == []
    assert "initContainers" not in engine(**off)
    config = load_gate(containers(Barrier(1, "0", ("a", "b")), **off)[-1]["env"][-1]["value"])
    assert (config.isolation, config.forbidden) == (False, ())
    assert parse("llama", FINE | off).risks == (f"security.gate.disabled: {WHY}",)


def test_a_new_image_of_the_operator_restarts_no_engine() -> None:
    """I11: the gate's image is part of the pinned template."""
    old = render(OWNER, parse("llama", FINE), CONTEXT, Observed())
    kept = accepted.read(
        OWNER, next(o for o in old.configuration if o["metadata"]["name"] == "llama-accepted")["data"], b""
    )
    assert kept is not None
    newer = replace(CONTEXT, operator_image="registry.example.com/operator:9")
    again = render(OWNER, parse("llama", FINE), newer, Observed(pins=kept.pins))
    assert [item["spec"]["template"] for item in again.workloads] == [
        item["spec"]["template"] for item in old.workloads
    ]
    assert again.outdated == ("engine",)


@pytest.mark.parametrize("spec", [{"security": {"gate": {"disabled": WHY}}}, egress(cidrs=["0.0.0.0/0"])])
def test_what_the_gate_depends_on_rolls_the_engines(spec: dict[str, Any]) -> None:
    def inputs(**more: Any) -> dict[str, Any]:
        judged = parse("llama", FINE | more)
        return gate.inputs(judged.raw, plan(judged.spec, CONTEXT), Role.ENGINE, CONTEXT)

    assert inputs() == {} == inputs(**egress(podSelector={}))
    assert inputs(**spec) != {}
