"""Health for every reason that the operator can give; actions; the manifests of the examples."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from securevllm.api.types import API_VERSION, KIND
from securevllm.errors import Problem
from securevllm.render.meta import RESTART_ANNOTATION
from securevllm.status import conditions, facts
from tests.argo import ACTIONS, ARGOCD, act, argocd, health, kstatus, run, tool
from tests.chart.programs import CHART, kustomize

NOW = "2026-11-24T12:00:00Z"
ENGINE = facts.Workload(desired=2, updated=2, ready=2, replicas=2)
SERVING = facts.Facts(
    generation=3,
    engine=ENGINE,
    gateway=ENGINE,
    served=facts.Gateway(stale={"a": (), "b": ()}),
    url="https://llama-gateway.llm.svc.cluster.local",
)
BROKEN = facts.Failure("isolation", "NetworkPolicy llama-engine", "PolicyNotApplied", "admission webhook said no")


def resource(seen: facts.Facts, **spec: Any) -> dict[str, Any]:
    """A live resource with the status that the operator would write for what it saw."""
    status = {"observedGeneration": seen.generation, "conditions": conditions.merge(seen, (), NOW)}
    return {"metadata": {"name": "llama", "generation": 3}, "spec": spec, "status": status}


CASES: dict[str, tuple[dict[str, Any], str, str]] = {
    "new": ({"metadata": {"generation": 1}, "spec": {}}, "Progressing", "Current"),
    "changed": (resource(replace(SERVING, generation=2)), "Progressing", "InProgress"),
    "nothing is there yet": (resource(facts.Facts(generation=3)), "Progressing", "InProgress"),
    "serving": (resource(SERVING), "Healthy", "Current"),
    "loading": (resource(replace(SERVING, engine=replace(ENGINE, ready=0))), "Progressing", "InProgress"),
    "fetching": (resource(replace(SERVING, fetch=facts.Fetch(done=False))), "Progressing", "InProgress"),
    "fetch failed": (
        resource(replace(SERVING, fetch=facts.Fetch(done=False, failure="403"))),
        "Degraded",
        "InProgress",
    ),
    "stuck": (
        resource(replace(SERVING, engine=replace(ENGINE, ready=0, failure="no GPU"))),
        "Degraded",
        "InProgress",
    ),
    "a group is broken": (
        resource(replace(SERVING, engine=replace(ENGINE, ready=1, broken=True, trouble="e0 is broken: it was lost."))),
        "Degraded",
        "InProgress",
    ),
    "a group starts anew": (
        resource(replace(SERVING, engine=replace(ENGINE, ready=1, restarting=True))),
        "Progressing",
        "InProgress",
    ),
    "suspended": (resource(replace(SERVING, suspended=True), suspend=True), "Suspended", "InProgress"),
    "scaled to zero": (resource(replace(SERVING, engine=facts.Workload(desired=0))), "Suspended", "InProgress"),
    "spec refused": (
        resource(replace(SERVING, problems=(Problem("spec.image", "InvalidSpec", "wrong", "another"),), fallback=True)),
        "Degraded",
        "Failed",
    ),
    "isolation broken while it serves": (resource(replace(SERVING, failures=(BROKEN,))), "Degraded", "InProgress"),
    "secret missing": (resource(replace(SERVING, missing=("Secret keys: not there",))), "Degraded", "InProgress"),
    "old revision": (
        resource(replace(SERVING, served=facts.Gateway(stale={"a": ("rds.yaml",), "b": ()}))),
        "Progressing",
        "InProgress",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_health(name: str) -> None:
    obj, wanted, flux = CASES[name]
    status, message = health(obj)
    assert (status, kstatus(obj)) == (wanted, flux)
    assert message.endswith(".") or status == "Degraded", message


def test_a_message_says_what_the_condition_says() -> None:
    told = health(CASES["isolation broken while it serves"][0])[1]
    assert told.endswith("admission webhook said no. See docs/status.md#policynotapplied.")
    assert "spec.image" in health(CASES["spec refused"][0])[1]
    assert health(CASES["a group is broken"][0])[1].endswith(
        "e0 is broken: it was lost. See docs/status.md#groupbroken."
    )
    assert "https://llama-gateway" in health(CASES["serving"][0])[1]


def test_isolation_that_was_not_measured_is_said_beside_healthy() -> None:
    status, message = health(resource(SERVING))
    assert status == "Healthy"
    assert "Isolated is Unknown" in message


def test_what_passes_by_itself_is_what_the_operator_calls_calm() -> None:
    text = (ARGOCD / "health.lua").read_text(encoding="utf-8")
    passing = set(re.findall(r"^  (\w+) = true,$", text, re.MULTILINE))
    assert passing == (conditions._CALM - {"Suspended"}) | {"WaitingForGarbageCollection"}


def test_being_deleted_is_progressing() -> None:
    obj = resource(SERVING)
    obj["metadata"]["deletionTimestamp"] = NOW
    assert (health(obj)[0], kstatus(obj)) == ("Progressing", "Terminating")


@pytest.mark.parametrize(
    ("action", "annotation"), [("restart", RESTART_ANNOTATION), ("verify", "securevllm.io/verify-at")]
)
@pytest.mark.parametrize("annotations", [None, {"kept": "yes"}])
def test_an_action_writes_its_annotation_and_nothing_else(
    action: str, annotation: str, annotations: dict[str, str] | None
) -> None:
    obj = resource(SERVING, model={"name": "x"}, replicas=2)
    if annotations is not None:
        obj["metadata"]["annotations"] = dict(annotations)
    changed = act(action, obj)
    written = changed["metadata"].pop("annotations")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", written.pop(annotation))
    assert written == (annotations or {})
    obj["metadata"].pop("annotations", None)
    assert (changed["metadata"], changed["spec"]) == (obj["metadata"], obj["spec"])


def test_actions_are_discovered_and_a_suspended_one_has_nothing_to_restart() -> None:
    found = run(ACTIONS["discovery.lua"], resource(SERVING))
    assert set(found) == {item["name"] for item in ACTIONS["definitions"]}
    assert run(ACTIONS["discovery.lua"], resource(SERVING, suspend=True))["restart"]["disabled"] is True


def test_the_config_map_has_the_keys_that_argo_cd_reads() -> None:
    (config,) = kustomize(ARGOCD)
    assert (config["metadata"]["namespace"], config["metadata"]["name"]) == ("argocd", "argocd-cm")
    assert config["metadata"]["labels"] == {"app.kubernetes.io/part-of": "argocd"}
    kind = "securevllm.io_SecureVLLMDeployment"
    assert set(config["data"]) == {f"resource.customizations.{part}.{kind}" for part in ("health", "actions")}
    assert yaml.safe_load(config["data"][f"resource.customizations.actions.{kind}"]) == ACTIONS


def test_examples_name_what_is_in_the_repository_and_come_in_order() -> None:
    application, models = (
        yaml.safe_load((ARGOCD / "examples" / name).read_text(encoding="utf-8"))
        for name in ("operator.yaml", "models.yaml")
    )
    assert application["spec"]["source"]["path"] == f"charts/{CHART.name}"
    wave = "argocd.argoproj.io/sync-wave"
    first, then = (
        application["metadata"]["annotations"][wave],
        models["spec"]["template"]["metadata"]["annotations"][wave],
    )
    assert int(first) < int(then)
    for policy in (application["spec"]["syncPolicy"], models["spec"]["template"]["spec"]["syncPolicy"]):
        assert "ServerSideApply=true" in policy["syncOptions"]


@pytest.fixture
def overrides(tmp_path: Path) -> Callable[..., str]:
    """Argo CD's own tool for what its ConfigMap says of a kind; skips the test where it was not built."""
    argocd()
    config, file = tmp_path / "argocd-cm.yaml", tmp_path / "resource.yaml"
    config.write_text(yaml.safe_dump(kustomize(ARGOCD)[0]), encoding="utf-8")

    def asked(command: str, obj: dict[str, Any], *arguments: str) -> str:
        file.write_text(yaml.safe_dump({"apiVersion": API_VERSION, "kind": KIND} | obj), encoding="utf-8")
        settings = ["admin", "settings", "resource-overrides", command, str(file), *arguments]
        return tool(tmp_path, *settings, "--argocd-cm-path", str(config))

    return asked


def test_argo_cd_itself_says_the_same_of_health(overrides: Callable[..., str]) -> None:
    for name, (obj, _, _) in CASES.items():
        status, message = health(obj)
        assert overrides("health", obj) == f"STATUS: {status}\nMESSAGE: {message}\n", name


def test_argo_cd_itself_finds_and_runs_the_actions(overrides: Callable[..., str]) -> None:
    listed = [line.split() for line in overrides("list-actions", resource(SERVING)).splitlines()]
    assert listed == [["NAME", "DISABLED"], ["restart", "false"], ["verify", "false"]]
    assert ["restart", "true"] in [
        line.split() for line in overrides("list-actions", resource(SERVING, suspend=True)).splitlines()
    ]
    for action in ("restart", "verify"):
        printed = overrides("run-action", resource(SERVING), action)
        changed = [line for line in printed.splitlines() if line.startswith((">", "<"))]
        assert [line.split()[:2] for line in changed] == [
            [">", "annotations:"],
            [">", f"securevllm.io/{action}-at:"],
        ], printed
