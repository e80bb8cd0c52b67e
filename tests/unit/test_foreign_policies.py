"""Which policies of others open what the topology closes, and which do not."""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any

import pytest
import yaml

from securevllm import netpol
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.proof.foreign import holding, told, wider
from securevllm.render import Observed, Rendered, canary, render
from securevllm.render.meta import Owner

OWNER = Owner("llama", "apps", "uid-1")
SPEC: dict[str, Any] = {
    "model": {"name": "/models/llama"},
    "image": "vllm/vllm-openai:v0.33.0",
    "gateway": {"clients": {"namespaceSelector": {"matchLabels": {"team": "a"}}, "cidrs": ["203.0.113.0/24"]}},
    "security": {"egress": [{"to": {"cidrs": ["0.0.0.0/0"]}, "ports": [{"port": 443}], "why": "because of the test"}]},
}
RENDERED: Rendered = render(OWNER, parse("llama", SPEC), Context(), Observed())
ENGINES = {"matchLabels": {"securevllm.io/role": "engine"}}
GATEWAYS = {"matchLabels": {"securevllm.io/role": "gateway"}}
DNS = {
    "namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "kube-system"}},
    "podSelector": {"matchLabels": {"k8s-app": "kube-dns"}},
}


def found(selector: Any, **spec: Any) -> str:
    types = [name for name, part in (("Ingress", "ingress"), ("Egress", "egress")) if part in spec]
    policy = {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": "theirs", "namespace": "apps"},
        "spec": {"podSelector": selector, "policyTypes": types, **spec},
    }
    templates = [obj["spec"]["template"] for obj in RENDERED.workloads]
    ours = (RENDERED.deny, *RENDERED.isolation)
    return told(wider("apps", OWNER.label, ours, [*ours, policy], templates))


WIDER: dict[str, tuple[Any, dict[str, Any], str]] = {
    "allow all": ({}, {"ingress": [{}]}, "opens ingress: everybody, every port"),
    "allow all egress": ({}, {"egress": [{}]}, "opens egress: everybody, every port"),
    "the engine's port for the namespace": (
        ENGINES,
        {"ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": 8000}]}]},
        "ingress: all pods of the namespace, 8000",
    ),
    "by the port's name": (
        ENGINES,
        {"ingress": [{"from": [{"podSelector": {}}], "ports": [{"port": "http"}]}]},
        "8000",
    ),
    "an end port": (ENGINES, {"ingress": [{"ports": [{"port": 29000, "endPort": 30000}]}]}, "29000"),
    "another team at the gateway": (
        GATEWAYS,
        {"ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "b"}}}], "ports": [{"port": 8443}]}]},
        "namespaces team=b",
    ),
    "every namespace at the gateway": (
        GATEWAYS,
        {"ingress": [{"from": [{"namespaceSelector": {}}], "ports": [{"port": 8443}]}]},
        "all namespaces",
    ),
    "the metadata address": (
        ENGINES,
        {"egress": [{"to": [{"ipBlock": {"cidr": "169.254.0.0/16"}}], "ports": [{"port": 443}]}]},
        "addresses 169.254.0.0/16",
    ),
    "carved out and opened again": (
        ENGINES,
        {"egress": [{"to": [{"ipBlock": {"cidr": "0.0.0.0/0"}}], "ports": [{"port": 443}]}]},
        "addresses 0.0.0.0/0",
    ),
    "DNS over another port": (ENGINES, {"egress": [{"to": [DNS], "ports": [{"port": 54, "protocol": "UDP"}]}]}, "54"),
    "a field of a later Kubernetes": (ENGINES, {"ingress": [{"later": 1}]}, "cannot be judged"),
}
NOT_WIDER: dict[str, tuple[Any, dict[str, Any]]] = {
    "isolates only": ({}, {"ingress": [], "egress": []}),
    "selects other pods": ({"matchLabels": {"app": "web"}}, {"ingress": [{}]}),
    "selects only pods that are not ours": (
        {"matchExpressions": [{"key": "securevllm.io/resource", "operator": "DoesNotExist"}]},
        {"ingress": [{}], "egress": [{}]},
    ),
    "DNS for everybody": ({}, {"egress": [{"to": [DNS], "ports": [{"port": 53, "protocol": "UDP"}]}]}),
    "the declared range, narrower": (
        ENGINES,
        {"egress": [{"to": [{"ipBlock": {"cidr": "8.8.8.0/24"}}], "ports": [{"port": 443}]}]},
    ),
    "the same team at the gateway": (
        GATEWAYS,
        {"ingress": [{"from": [{"namespaceSelector": {"matchLabels": {"team": "a"}}}], "ports": [{"port": 8443}]}]},
    ),
    "a part of the clients' range": (
        GATEWAYS,
        {"ingress": [{"from": [{"ipBlock": {"cidr": "203.0.113.8/29"}}], "ports": [{"port": 8443}]}]},
    ),
    "a named port that no pod has": (ENGINES, {"ingress": [{"ports": [{"port": "metrics"}]}]}),
}


@pytest.mark.parametrize("case", WIDER)
def test_wider(case: str) -> None:
    selector, spec, says = WIDER[case]
    assert says in found(selector, **spec)
    assert found(selector, **spec).startswith("NetworkPolicy theirs opens ")


@pytest.mark.parametrize("case", NOT_WIDER)
def test_not_wider(case: str) -> None:
    selector, spec = NOT_WIDER[case]
    assert found(selector, **spec) == ""


def test_a_copy_of_our_own_under_another_name_is_not_wider() -> None:
    ours = (RENDERED.deny, *RENDERED.isolation)
    copies = [obj | {"metadata": obj["metadata"] | {"name": f"copy-{number}"}} for number, obj in enumerate(ours)]
    templates = [obj["spec"]["template"] for obj in RENDERED.workloads]
    assert wider("apps", OWNER.label, ours, [*ours, *copies], templates) == ()


def test_pods_of_another_resource_are_its_own_matter() -> None:
    other = Owner("mistral", "apps", "uid-2")
    theirs = render(other, parse("mistral", SPEC), Context(), Observed())
    templates = [obj["spec"]["template"] for rendered in (RENDERED, theirs) for obj in rendered.workloads]
    live = (RENDERED.deny, *RENDERED.isolation, *theirs.isolation)
    assert wider("apps", OWNER.label, (RENDERED.deny, *RENDERED.isolation), live, templates) == ()


CLOSED: dict[str, Any] = {
    "apiVersion": "networking.k8s.io/v1",
    "kind": "NetworkPolicy",
    "metadata": {"name": "closed", "namespace": "apps"},
    "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
}
NAMESPACES = {name: {"kubernetes.io/metadata.name": name} for name in ("apps", "secure-vllm-operator", "other")}


def end(namespace: str, name: str, address: str) -> netpol.Pod:
    labels = (
        canary.labels(Owner("llama", namespace, "1")) if name.startswith("canary") else {"app.kubernetes.io/name": name}
    )
    return netpol.Pod(namespace, name, labels, (ipaddress.ip_address(address),))


def test_who_may_hold_canary_pods_back_is_named() -> None:
    labels = canary.labels(Owner("llama", "apps", "1"))
    live = [CLOSED, RENDERED.deny, *RENDERED.isolation]
    assert holding("apps", labels, live) == ("closed",)
    unreadable = {**CLOSED, "metadata": {"name": "odd"}, "spec": {"podSelector": {"new": 1}}}
    assert holding("apps", labels, [*live, unreadable]) == ("closed", "odd")


def test_the_policy_of_the_page_lets_canary_pods_through_a_default_deny_and_nobody_else() -> None:
    page = (Path(__file__).parents[2] / "docs" / "status.md").read_text(encoding="utf-8")
    section = page.partition("### NoControl")[2].partition("\n### ")[0]
    told_policy = yaml.safe_load(section.partition("```yaml\n")[2].partition("```")[0])
    listener, prober = end("apps", "canary-l", "10.0.0.1"), end("apps", "canary-p", "10.0.0.2")
    engine = end("apps", "vllm", "10.0.0.3")
    operator, stranger = end("secure-vllm-operator", "secure-vllm-operator", "10.0.1.1"), end("other", "x", "10.0.2.1")

    def open_to(policies: list[dict[str, Any]], source: netpol.Pod, destination: netpol.Pod) -> bool:
        parsed = [netpol.parse(policy, "apps") for policy in policies]
        return bool(netpol.Policies(parsed, NAMESPACES).allowed(source, destination, "TCP", 8000))

    for source in (operator, prober):
        assert open_to([], source, listener)
        assert not open_to([CLOSED], source, listener)
        assert open_to([CLOSED, told_policy], source, listener)
    assert not open_to([CLOSED, told_policy], stranger, listener)
    assert not open_to([CLOSED, told_policy], prober, engine)
    assert open_to([told_policy], prober, engine)


@pytest.mark.parametrize(
    ("labels", "about_us"),
    [
        ({"securevllm.io/resource": OWNER.label}, True),
        ({"securevllm.io/resource": "another-12345678"}, False),
        ({"securevllm.io/role": "engine"}, True),
    ],
)
def test_only_what_may_be_about_our_pods_is_read(labels: dict[str, str], *, about_us: bool) -> None:
    assert bool(found({"matchLabels": labels}, ingress=[{}])) is about_us
    # Not even what cannot be judged, when it asks for the label of another resource.
    assert bool(found({"matchLabels": labels}, ingress=[{"later": 1}])) is about_us
