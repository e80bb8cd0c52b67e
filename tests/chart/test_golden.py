"""What the chart renders for a matrix of values is what a person has looked at: `make golden` after a change."""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from securevllm.render.pods import CONTAINER_SECURITY
from securevllm.settings import read_bounds
from tests import pod_security
from tests.chart.programs import CHART, Helm, by_key
from tools.chart import read_values

HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").glob("*.yaml"))
NAMES = [path.stem for path in CASES]


def rendered(helm: Helm, case: Path) -> dict[str, Any]:
    """Objects by name, without the definition's schema: crds/ has it."""
    objects = by_key(helm.template("--values", str(case)))
    for obj in objects.values():
        if obj["kind"] == "CustomResourceDefinition":
            obj["spec"] = "as in crds/"
    return {" ".join(filter(None, name)): obj for name, obj in objects.items()}


@pytest.mark.parametrize("case", CASES, ids=NAMES)
def test_case(helm: Helm, case: Path, accept: bool) -> None:
    path = HERE / "expected" / case.name
    made = yaml.safe_dump(rendered(helm, case), width=120)
    if accept:
        path.write_text(made, encoding="utf-8")
        return
    kept = path.read_text(encoding="utf-8") if path.exists() else ""
    if kept != made:
        lines = difflib.unified_diff(kept.splitlines(keepends=True), made.splitlines(keepends=True), "expected", "made")
        pytest.fail(f"{''.join(lines)}\nIf this is what you want: make golden", pytrace=False)


def test_no_expectation_is_left_of_a_case_that_is_gone() -> None:
    assert sorted(path.stem for path in (HERE / "expected").iterdir()) == NAMES


@pytest.mark.parametrize("case", [path for path in CASES if path.stem != "nothing"], ids=lambda path: path.stem)
def test_the_operator_meets_the_restricted_standard(helm: Helm, case: Path) -> None:
    (deployment,) = [obj for obj in rendered(helm, case).values() if obj["kind"] == "Deployment"]
    template = deployment["spec"]["template"]
    assert pod_security.violations(template) == []
    assert template["spec"]["containers"][0]["securityContext"] == CONTAINER_SECURITY


HOOKED = [path for path in CASES if path.stem != "nothing"]


@pytest.mark.parametrize("case", HOOKED, ids=lambda path: path.stem)
def test_what_helm_test_brings_is_a_hook_and_passes_for_no_operator(helm: Helm, case: Path) -> None:
    objects = rendered(helm, case)
    hooks = {name: obj for name, obj in objects.items() if "helm.sh/hook" in obj["metadata"].get("annotations", {})}
    without = by_key(helm.template("--values", str(case), "--skip-tests"))
    assert {" ".join(filter(None, name)) for name in without} == {*objects} - {*hooks}
    assert {obj["kind"].removeprefix("Cluster") for obj in hooks.values()} == {
        "ServiceAccount", "Role", "RoleBinding", "Pod"
    }  # fmt: skip
    for obj in hooks.values():
        policies = obj["metadata"]["annotations"]["helm.sh/hook-delete-policy"].split(",")
        # Rights go also when the test fails.
        assert ("hook-failed" in policies) == (obj["kind"] != "Pod")
        assert {"before-hook-creation", "hook-succeeded"} <= {*policies}
        # Gateways let pods with the operator's labels read what they serve.
        assert obj["metadata"]["labels"]["app.kubernetes.io/name"] == "secure-vllm-operator-test"
    (pod,) = [obj for obj in hooks.values() if obj["kind"] == "Pod"]
    assert pod_security.violations(pod) == []
    (rules,) = [obj["rules"] for obj in hooks.values() if obj["kind"].endswith("Role")]
    verbs = {(name, verb) for rule in rules for name in rule["resources"] for verb in rule["verbs"]}
    measures = "--status" not in pod["spec"]["containers"][0]["args"]
    assert (("pods", "create") in verbs) == measures
    assert {(name, verb) for name, verb in verbs if name in {"secrets", "configmaps"}} == (
        {("configmaps", "get")} if measures else set()
    )
    # Helm takes the rights when its patience of 5 minutes ends: before that the canary pods have to be removed.
    assert pod["spec"]["activeDeadlineSeconds"] == 240


def test_a_long_patience_of_the_test_makes_its_life_longer(helm: Helm) -> None:
    objects = by_key(helm.template("--set", "helmTest.waitSeconds=600"))
    (pod,) = [obj for obj in objects.values() if obj["kind"] == "Pod"]
    assert "--wait=600" in pod["spec"]["containers"][0]["args"]
    assert pod["spec"]["activeDeadlineSeconds"] == 720


def test_every_value_is_read() -> None:
    """A value that no template reads is a promise that is not kept."""
    texts = "".join(path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").rglob("*.*")))
    values = read_values((CHART / "values.yaml").read_text(encoding="utf-8"))
    unread = [value.name for value in values if not value.group and not re.search(rf"\.{value.path[-1]}\b", texts)]
    assert unread == []


def test_bounds_are_what_the_operator_reads(helm: Helm, tmp_path: Path) -> None:
    case = next(path for path in CASES if path.stem == "everything")
    objects = rendered(helm, case)
    config = next(obj for name, obj in objects.items() if name.endswith("-bounds"))
    (tmp_path / "bounds.yaml").write_text(config["data"]["bounds.yaml"], encoding="utf-8")
    assert read_bounds(tmp_path / "bounds.yaml").image_digests
    pod = next(obj for obj in objects.values() if obj["kind"] == "Deployment")["spec"]["template"]["spec"]
    (argument,) = [item for item in pod["containers"][0]["args"] if item.startswith("--bounds=")]
    folder, _, name = argument.partition("=")[2].rpartition("/")
    assert name in config["data"]
    (mount,) = [item for item in pod["containers"][0]["volumeMounts"] if item["mountPath"] == folder]
    assert {"name": mount["name"], "configMap": {"name": config["metadata"]["name"]}} in pod["volumes"]
