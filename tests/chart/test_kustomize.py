"""`manifests/` and the chart end in the same objects."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from securevllm import __version__
from securevllm.settings import Settings
from tests.chart.programs import MANIFESTS, Helm, Object, by_key, kustomize, without_labels

HELM_ONLY = ("helm.sh/chart", "helm.sh/resource-policy", "app.kubernetes.io/managed-by", "app.kubernetes.io/version")
"""What tells helm which objects are its own."""
EVERY_MONITOR = [
    f"monitoring.{part}.enabled=true"
    for part in ("serviceMonitor", "enginePodMonitor", "gatewayPodMonitor", "prometheusRule", "dashboard")
]
BINDING = "ValidatingAdmissionPolicyBinding"
NAMESPACE = ("Namespace", "", "secure-vllm-operator")
"""`helm install --create-namespace` makes it; the labels of Pod Security are in the manifests."""


def build(
    tmp_path: Path, base: str, *components: str, beside: tuple[str, ...] = ()
) -> dict[tuple[str, str, str], Object]:
    """Objects of a kustomization of a user: an installation and components."""
    content = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(Path("manifests") / base), *beside],
        "components": [str(Path("manifests") / name) for name in components],
    }
    for part in ("manifests", "crds"):
        _copy(MANIFESTS.parent / part, tmp_path / part)
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
    return by_key(without_labels(obj, HELM_ONLY) for obj in kustomize(tmp_path))


def _copy(source: Path, target: Path) -> None:
    for path in source.rglob("*"):
        if path.is_file():
            copy = target / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())


VARIANTS = {
    "cluster-wide": ("install", (), ["admission.enabled=false"]),
    "one namespace": ("install-namespaced", (), ["admission.enabled=false", "watchNamespace=llm"]),
    "with admission": ("install", ("admission",), []),
    "one namespace with admission": ("install-namespaced", ("admission-namespaced",), ["watchNamespace=llm"]),
    "with everything": ("install", ("admission", "monitoring"), EVERY_MONITOR),
    "one namespace with everything": (
        "install-namespaced",
        ("admission-namespaced", "monitoring-namespaced"),
        ["watchNamespace=llm", *EVERY_MONITOR],
    ),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_kustomize_and_helm_make_the_same_objects(helm: Helm, tmp_path: Path, variant: str) -> None:
    base, components, settings = VARIANTS[variant]
    built = build(tmp_path, base, *components)
    assert built.pop(NAMESPACE)["metadata"]["labels"]["pod-security.kubernetes.io/enforce"] == "restricted"
    options = [word for setting in settings for word in ("--set", setting)]
    charted = by_key(without_labels(obj, HELM_ONLY) for obj in helm.template("--skip-tests", *options))
    assert sorted(built) == sorted(charted)
    for name, obj in built.items():
        assert charted[name] == obj, name


def test_the_component_for_one_namespace_narrows_its_own_bindings_and_nobody_elses(tmp_path: Path) -> None:
    theirs = {
        "apiVersion": "admissionregistration.k8s.io/v1",
        "kind": "ValidatingAdmissionPolicyBinding",
        "metadata": {"name": "of-the-platform"},
        "spec": {"policyName": "of-the-platform", "validationActions": ["Deny"]},
    }
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs), encoding="utf-8")
    built = build(tmp_path, "install-namespaced", "admission-namespaced", beside=("theirs.yaml",))
    bindings = {name: obj["spec"].get("matchResources") for (kind, _, name), obj in built.items() if kind == BINDING}
    narrow = {"namespaceSelector": {"matchLabels": {"kubernetes.io/metadata.name": "llm"}}}
    assert bindings.pop("of-the-platform") is None
    assert len(bindings) == 3
    assert all(scope == narrow for scope in bindings.values())


def test_the_monitoring_for_one_namespace_narrows_its_own_monitors_and_nobody_elses(tmp_path: Path) -> None:
    theirs = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PodMonitor",
        "metadata": {"name": "of-the-platform", "namespace": "monitoring"},
        "spec": {"namespaceSelector": {"any": True}, "selector": {}, "podMetricsEndpoints": [{"port": "metrics"}]},
    }
    (tmp_path / "theirs.yaml").write_text(yaml.safe_dump(theirs), encoding="utf-8")
    built = build(tmp_path, "install-namespaced", "monitoring-namespaced", beside=("theirs.yaml",))
    scopes = {name: obj["spec"].get("namespaceSelector") for (kind, _, name), obj in built.items() if "Monitor" in kind}
    assert scopes == {
        "of-the-platform": {"any": True},
        "secure-vllm-operator-engines": {"matchNames": ["llm"]},
        "secure-vllm-operator-gateways": {"matchNames": ["llm"]},
        "secure-vllm-operator": None,  # the ServiceMonitor: the operator's own namespace
    }


def documented(folder: Path) -> list[Object]:
    """Objects of the kustomization that docs/install.md shows, word by word, without what needs prometheus-operator."""
    page = (MANIFESTS.parent / "docs" / "install.md").read_text(encoding="utf-8")
    text = page.partition("## kustomize")[2].partition("```yaml\n")[2].partition("```")[0]
    for part in ("manifests", "crds"):
        _copy(MANIFESTS.parent / part, folder / "secure-vllm-operator" / part)
    lines = [line for line in text.splitlines() if "/manifests/monitoring" not in line]
    (folder / "kustomization.yaml").write_text("\n".join(lines), encoding="utf-8")
    return kustomize(folder)


def test_the_kustomization_of_the_page_is_the_chart_with_its_image(helm: Helm, tmp_path: Path) -> None:
    built = by_key(without_labels(obj, HELM_ONLY) for obj in documented(tmp_path))
    del built[NAMESPACE]
    options = ["--set", "image.repository=registry.example.com/secure-vllm-operator"]
    charted = by_key(without_labels(obj, HELM_ONLY) for obj in helm.template("--skip-tests", *options))
    assert built == charted
    deployment = built["Deployment", "secure-vllm-operator", "secure-vllm-operator"]
    operator = deployment["spec"]["template"]["spec"]["containers"][0]
    images = {
        operator["image"],
        *(item["value"] for item in operator["env"] if item["name"].endswith("OPERATOR_IMAGE")),
    }
    assert images == {f"registry.example.com/secure-vllm-operator:{__version__}"}


@pytest.mark.parametrize(("variant", "namespace"), [("install", None), ("install-namespaced", "llm")])
def test_the_lease_is_the_one_that_is_held(variant: str, namespace: str | None) -> None:
    built = by_key(kustomize(MANIFESTS / variant))
    name = Settings(namespace="", identity="", watch_namespace=namespace).lease
    assert ("Lease", "secure-vllm-operator", name) in built
    # Another scope in the same namespace must not overwrite it.
    rules = built["Role", "secure-vllm-operator", f"{name}-lease"]["rules"]
    assert built["RoleBinding", "secure-vllm-operator", f"{name}-lease"]["roleRef"]["name"] == f"{name}-lease"
    assert rules[1]["resourceNames"] == [name]
