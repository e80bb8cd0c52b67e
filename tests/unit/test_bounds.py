"""Platform bounds: each limits what it says, the default opens nothing, and a wrong file is an error."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

from securevllm.api import bounds
from securevllm.api import types as api
from securevllm.api.bounds import PlatformBounds, Reference, SecretLabel, image_matches
from securevllm.api.guard.pod import network_devices
from securevllm.api.parse import parse, parse_accepted
from securevllm.cli import main
from securevllm.errors import OperatorError, SpecError
from securevllm.settings import read_bounds

WHY = "because this test says so"
FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
HUB: dict[str, Any] = {"name": "a/b", "source": {"huggingFace": {"tokenSecretRef": {"name": "hub", "key": "token"}}}}


def refused(limits: dict[str, Any], **spec: Any) -> set[tuple[str, str]]:
    """Fields and reasons of what is refused under these bounds."""
    try:
        parse("llama", {**FINE, **spec}, bounds.read(limits))
    except SpecError as error:
        return {(problem.field, problem.reason) for problem in error.problems}
    return set()


def egress(**to: Any) -> dict[str, Any]:
    return {"egress": [{"to": to, "ports": [{"port": 443}], "why": WHY}]}


SPECS: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    ("image", {"images": ["vllm/vllm-openai:v0.32.*"]}, {}, "spec.image"),
    ("digest", {"imageDigests": True}, {}, "spec.image"),
    (
        "router image",
        {"images": ["vllm/vllm-openai"]},
        {"disaggregation": {"connector": "nixl", "router": {"image": "evil/router:1"}}},
        "spec.disaggregation.router.image",
    ),
    (
        "acceptance",
        {"acceptances": []},
        {"security": {"accept": [{"risk": "promptsInLogs", "why": WHY}]}},
        "spec.security.accept[0].risk",
    ),
    (
        "egress range",
        {"egress": {"cidrs": ["1.1.1.0/24"]}},
        {"security": egress(cidrs=["1.1.0.0/16"])},
        "spec.security.egress[0].to.cidrs",
    ),
    (
        "egress family",
        {"egress": {"cidrs": ["0.0.0.0/0"]}},
        {"security": egress(cidrs=["2606:4700::/32"])},
        "spec.security.egress[0].to.cidrs",
    ),
    (
        "egress port",
        {"egress": {"ports": [80]}},
        {"security": egress(cidrs=["1.1.1.1/32"])},
        "spec.security.egress[0].ports",
    ),
    (
        "egress namespace",
        {"egress": {"otherNamespaces": False}},
        {"security": egress(namespaceSelector={"matchLabels": {"a": "b"}})},
        "spec.security.egress[0].to.namespaceSelector",
    ),
    ("download", {"egress": {"downloads": False}}, {"model": HUB}, "spec.model.source.huggingFace"),
    (
        "service",
        {"serviceTypes": ["ClusterIP"]},
        {"gateway": {"service": {"type": "NodePort"}, "clients": {"cidrs": ["1.1.1.0/24"]}}},
        "spec.gateway.service.type",
    ),
]  # fmt: skip


@pytest.mark.parametrize(("limits", "spec", "field"), [row[1:] for row in SPECS], ids=[row[0] for row in SPECS])
def test_a_bound_refuses_what_is_beyond_it_and_the_default_does_not(
    limits: dict[str, Any], spec: dict[str, Any], field: str
) -> None:
    assert refused(limits, **spec) == {(field, "OutOfBounds")}
    assert refused({}, **spec) == set()


@pytest.mark.parametrize(
    ("limits", "spec"),
    [
        ({"images": ["evil/*", "vllm/vllm-openai:v0.33.*"]}, {}),
        ({"egress": {"cidrs": ["1.0.0.0/8"], "ports": [443]}}, {"security": egress(cidrs=["1.1.1.0/24"])}),
        ({"egress": {"otherNamespaces": False}}, {"security": egress(podSelector={"matchLabels": {"a": "b"}})}),
        ({"acceptances": ["promptsInLogs"]}, {"security": {"accept": [{"risk": "promptsInLogs", "why": WHY}]}}),
    ],
)
def test_what_is_within_the_bounds_is_accepted(limits: dict[str, Any], spec: dict[str, Any]) -> None:
    assert refused(limits, **spec) == set()


@pytest.mark.parametrize(
    ("limits", "engine", "gateway"),
    [
        ({"labels": ["example.com/team"]}, {"labels": {"example.com/team": "a"}}, {}),
        ({"annotations": ["example.com/owner"]}, {"annotations": {"example.com/owner": "a"}}, {}),
        ({"serviceAnnotations": ["example.com/dns"]}, {}, {"service": {"annotations": {"example.com/dns": "a"}}}),
        ({"extendedResources": ["habana.ai/gaudi"]}, {"resources": {"limits": {"habana.ai/gaudi": 1}}}, {}),
    ],
)
def test_a_platform_may_allow_more(limits: dict[str, Any], engine: dict[str, Any], gateway: dict[str, Any]) -> None:
    assert refused(limits, engine=engine, gateway=gateway) == set()
    assert len(refused({}, engine=engine, gateway=gateway)) == 1


def test_a_network_device_needs_the_word_of_both() -> None:
    engine = {"resources": {"limits": {"rdma/hca_shared": 1}}}
    accepted = {"accept": [{"risk": "networkDevices", "why": WHY}]}
    device, risk = {"networkDevices": ["rdma/hca_shared"]}, {"acceptances": ["networkDevices"]}
    field = ("spec.engine.resources.limits", "ResourceRefused")
    assert refused(device | risk, engine=engine, security=accepted) == set()
    assert refused(device | risk, engine=engine) == {field}
    assert refused(risk, engine=engine, security=accepted) == {field}
    assert refused(device, engine=engine, security=accepted) == {("spec.security.accept[0].risk", "OutOfBounds")}
    gateway = {"resources": {"limits": {"rdma/hca_shared": 1, "memory": "1Gi"}}}
    assert refused(device | risk, gateway=gateway, security=accepted) == {
        ("spec.gateway.resources.limits", "ResourceRefused")
    }


def test_devices_that_may_be_networks_are_told_from_those_that_are_none() -> None:
    limits = bounds.read({"extendedResources": ["habana.ai/gaudi"], "networkDevices": ["rdma/hca"]})
    amounts = {"cpu": 1, "nvidia.com/gpu": 1, "habana.ai/gaudi": 1, "rdma/hca": 1, "x.example/unknown": 1}
    resources = api.Resources.model_validate({"limits": amounts, "requests": {"y.example/unknown": 1}})
    assert network_devices(resources, limits) == ("rdma/hca", "x.example/unknown", "y.example/unknown")
    assert network_devices(None, limits) == ()


def test_an_accepted_spec_is_not_judged_by_narrower_bounds() -> None:
    judged = parse("llama", FINE)
    assert refused({"images": ["other/*"]})
    assert parse_accepted(judged.raw) is not None


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("vllm", ("docker.io/library/vllm", "", "")),
        ("vllm/vllm-openai", ("docker.io/vllm/vllm-openai", "", "")),
        ("vllm/vllm-openai:v0.33.0", ("docker.io/vllm/vllm-openai", "v0.33.0", "")),
        ("index.docker.io/vllm/x:1", ("docker.io/vllm/x", "1", "")),
        ("localhost/x", ("localhost/x", "", "")),
        ("reg:5000/x", ("reg:5000/x", "", "")),
        ("reg.example.com/a/b:t@sha256:" + "0" * 64, ("reg.example.com/a/b", "t", "sha256:" + "0" * 64)),
    ],
)
def test_an_image_is_read_as_a_registry_reads_it(text: str, parts: tuple[str, str, str]) -> None:
    found = Reference.parse(text)
    assert (found.repository, found.tag, found.digest) == parts


DIGEST = "@sha256:" + "1" * 64


@pytest.mark.parametrize(
    ("pattern", "image", "matches"),
    [
        ("vllm/vllm-openai", "docker.io/vllm/vllm-openai:v0.33.0", True),
        ("docker.io/vllm/vllm-openai", "vllm/vllm-openai" + DIGEST, True),
        ("vllm/*", "vllm/vllm-openai:v0.33.0", True),
        ("vllm/*", "vllm/a/b:v1", False),
        ("vllm/*", "evil.example.com/vllm/x", False),
        ("reg.example.com/*", "reg.example.com.evil.com/x", False),
        ("reg.example.com/*", "reg.example.com/a", True),
        ("reg.example.com/ml*", "reg.example.com/ml/x", False),
        ("vllm/x:v1.*", "vllm/x:v1.2", True),
        ("vllm/x:v1.*", "vllm/x", False),
        ("vllm/x:v1.*", "vllm/x:v2", False),
        ("vllm/x:v1", "vllm/x:v1" + DIGEST, True),
        ("vllm/x" + DIGEST, "vllm/x:v1" + DIGEST, True),
        ("vllm/x" + DIGEST, "vllm/x:v1", False),
        ("vllm/x" + DIGEST, "vllm/x@sha256:" + "2" * 64, False),
        ("reg:5000/x", "reg/x", False),
        ("vllm/x", "vllm/y", False),
    ],
)
def test_a_pattern_matches_what_it_says(pattern: str, image: str, matches: bool) -> None:
    assert image_matches(pattern, image) is matches


# ------------------------------------------------------------------------------------------------------------ the file

WRONG: list[tuple[str, str, str]] = [
    ("misspelt", "image: [a]", "bounds.image"),
    ("not a list", "images: a", "bounds.images"),
    ("not a mapping", "[a]", "bounds"),
    ("number as text", "imageDigests: 'true'", "bounds.imageDigests"),
    ("snake case", "image_digests: true", "bounds.image_digests"),
    ("unknown risk", "acceptances: [anything]", "bounds.acceptances[0]"),
    ("unknown type", "serviceTypes: [ExternalName]", "bounds.serviceTypes[0]"),
    ("host bits", "egress: {cidrs: [10.0.0.1/8]}", "bounds.egress.cidrs"),
    ("no network", "egress: {cidrs: [everywhere]}", "bounds.egress.cidrs[0]"),
    ("port", "egress: {ports: [0]}", "bounds.egress.ports[0]"),
    ("reserved label", "labels: [securevllm.io/resource]", "bounds.labels"),
    ("reserved name", "labels: [job-name]", "bounds.labels"),
    ("mesh", "annotations: [sidecar.istio.io/inject]", "bounds.annotations"),
    ("interface", "annotations: [k8s.v1.cni.cncf.io/networks]", "bounds.annotations"),
    ("pattern", "images: ['a b']", "bounds.images[0]"),
    ("any registry", "images: ['*/vllm/vllm-openai']", "bounds.images[0]"),
    ("any image", "images: ['*']", "bounds.images[0]"),
    ("secret label", "secretLabel: {value: a}", "bounds.secretLabel.key"),
]


@pytest.mark.parametrize(("text", "field"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_a_wrong_file_is_refused_with_the_field(text: str, field: str, tmp_path: Path) -> None:
    file = tmp_path / "bounds.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(SpecError) as caught:
        read_bounds(file)
    assert [problem.field for problem in caught.value.problems] == [field]
    shown = CliRunner().invoke(main, ["render", "-f", "-", "--bounds", str(file)], input="")
    assert shown.exit_code == 2
    assert field in shown.output


@pytest.mark.parametrize(
    ("text", "meant"),
    [("imagess: [a]", "images"), ("image_digests: true", "imageDigests"), ("egress: {port: [1]}", "ports")],
)
def test_a_misspelt_bound_is_answered_with_the_one_that_was_meant(text: str, meant: str) -> None:
    with pytest.raises(SpecError) as caught:
        bounds.read(yaml.safe_load(text))
    (problem,) = caught.value.problems
    assert (problem.rule, problem.fix) == (
        "there is no such field",
        f"Did you mean {meant}? docs/guard.md lists the fields.",
    )


@pytest.mark.parametrize("text", ["images: [a]\nimages: [b]", "{", "\x00", "a: !!python/object/apply:os.system [id]"])
def test_what_is_no_yaml_or_says_something_twice_is_refused(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bounds.yaml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(OperatorError, match="cannot be read"):
        read_bounds(file)


@pytest.mark.parametrize("text", ["", "{}", "# nothing\n"])
def test_an_empty_file_is_the_default(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bounds.yaml"
    file.write_text(text, encoding="utf-8")
    assert read_bounds(file) == PlatformBounds()


@pytest.mark.parametrize("command", ["render", "explain"])
def test_commands_judge_within_the_bounds(command: str, tmp_path: Path) -> None:
    file = tmp_path / "bounds.yaml"
    file.write_text("imageDigests: true", encoding="utf-8")
    manifest = {"apiVersion": "securevllm.io/v1alpha1", "kind": "SecureVLLMDeployment", "metadata": {"name": "a"}}
    text = yaml.safe_dump({**manifest, "spec": FINE})
    assert CliRunner().invoke(main, [command, "-f", "-"], input=text).exit_code == 0
    told = CliRunner().invoke(main, [command, "-f", "-", "--bounds", str(file)], input=text)
    assert told.exit_code == 2
    assert "OutOfBounds" in told.output


# -------------------------------------------------------------------------------------------------------------- Secrets


def test_every_secret_of_a_spec_is_looked_at() -> None:
    spec = {
        **FINE,
        "model": HUB,
        "imagePullSecrets": [{"name": "pull"}],
        "engine": {
            "env": [{"name": "OTEL_SERVICE_NAME", "valueFrom": {"secretKeyRef": {"name": "env", "key": "a"}}}],
            "volumes": [{"name": "a", "mountPath": "/mnt/a", "secret": {"secretName": "volume"}}],
        },
        "gateway": {
            "authentication": {"apiKeys": {"secretRefs": [{"name": "keys"}]}},
            "tls": {"secretName": "tls"},
        },
    }
    judged = parse("llama", spec)
    found = dict(bounds.secrets(judged.spec))
    assert set(found.values()) == {"hub", "pull", "env", "volume", "keys", "tls"}
    text = str(judged.raw)
    assert all(name in text for name in found.values())


@pytest.mark.parametrize(
    ("labels", "fine"),
    [({"a": "true"}, True), ({"a": "true", "b": "c"}, True), ({"a": "false"}, False), ({}, False), (None, False)],
)
def test_a_secret_without_the_label_is_refused_and_so_is_none(labels: dict[str, str] | None, fine: bool) -> None:
    problem = bounds.secret_problem("spec.x", "name", labels, SecretLabel(key="a", value="true"))
    assert (problem is None) is fine
    assert problem is None or (problem.field, problem.reason) == ("spec.x", "SecretNotAllowed")
