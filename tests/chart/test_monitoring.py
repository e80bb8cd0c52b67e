"""Alerts fire when they should, and every query is about metrics that are exported.

Alerts are run by promtool; names and labels are compared with what `Metrics` really writes, and with what a real Envoy
shows to a scraper.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from e2e.cluster.errors import ClusterError
from e2e.promtool import find_or_unpack
from securevllm import __version__
from securevllm.metrics import Metrics
from securevllm.render import gateway, sidecar
from securevllm.render.envoy import SCRAPE_PATH
from securevllm.status import Figures
from tests.chart.programs import MANIFESTS, ROOT, Helm
from tests.gateway import wire
from tests.gateway.gateway import MODEL, make_certificate, started

HERE = Path(__file__).parent
RULE = yaml.safe_load((MANIFESTS / "monitoring" / "prometheus-rule.yaml").read_text(encoding="utf-8"))
RULES = [rule for group in RULE["spec"]["groups"] for rule in group["rules"]]
DASHBOARD = json.loads((MANIFESTS / "monitoring" / "dashboard.json").read_text(encoding="utf-8"))
QUERIES = {rule["alert"]: rule["expr"] for rule in RULES} | {
    f"{panel['title']} {target['refId']}": target["expr"]
    for panel in DASHBOARD["panels"]
    for target in panel["targets"]
}
SCRAPED = {"namespace", "pod", "instance", "job", "service", "endpoint", "container", "le"}
"""Labels that Prometheus adds to what it scrapes, and the one of buckets."""
GATEWAYS = yaml.safe_load((MANIFESTS / "monitoring" / "pod-monitor-gateways.yaml").read_text(encoding="utf-8"))
RELABELED = {rule["targetLabel"] for end in GATEWAYS["spec"]["podMetricsEndpoints"] for rule in end["relabelings"]}
"""Labels that the monitor of the gateways adds."""


@pytest.fixture(scope="session")
def promtool() -> Path:
    try:
        return find_or_unpack(lambda line: print(line, file=sys.__stderr__, flush=True))
    except ClusterError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def of_a_gateway(tmp_path_factory: pytest.TempPathFactory) -> dict[str, set[str]]:
    """Name of each sample that a scraper gets of a real gateway, and its labels."""
    with started(MODEL, tmp_path_factory.mktemp("gateway"), make_certificate()) as running:
        wire.exchange(running.port, wire.request("GET", "/v1/models", "connection: close"))
        asked, answer = wire.request("GET", SCRAPE_PATH, "connection: close", key=None), ""
        deadline = time.monotonic() + 30
        # Buckets are there from the first flush after the first request; Envoy's are five seconds apart.
        while "_bucket{" not in answer and time.monotonic() < deadline:
            time.sleep(0.5)
            answer = wire.exchange(running.envoy.model.metrics_port, asked, tls=False).decode()
    samples = re.findall(r"^(envoy_\w+)\{([^}]*)\} ", answer, re.MULTILINE)
    return {name: set(re.findall(r'(\w+)="', labels)) for name, labels in samples}


@pytest.fixture(scope="session")
def exported() -> dict[str, set[str]]:
    """Name of each sample that an operator exports, and its labels: every metric of it used once."""
    metrics = Metrics(__version__)
    metrics.added()
    metrics.retried()
    metrics.finished("error", 0.1, "Conflict")
    metrics.api_request("list", "Pod", "200", 0.1)
    metrics.watch_event("Pod", 1.0)
    metrics.watch_missed("Pod", 1)
    metrics.set_conditions("llm", "llama", {"Ready": "True"})
    metrics.set_figures("llm", "llama", Figures(1, 1.0, 1.0, 1))
    metrics.probed("cheap", 0.1)
    metrics.connected("silent")
    metrics.verified("llm", "llama", 1.0)
    families = text_string_to_metric_families(generate_latest(metrics.registry).decode())
    return {sample.name: set(sample.labels) for family in families for sample in family.samples}


def test_alerts_fire_when_they_should_and_not_before(promtool: Path, tmp_path: Path) -> None:
    # promtool compares all annotations; the address of the runbooks is a setting and has a test of its own.
    spec = json.loads(json.dumps(RULE["spec"]))
    for group in spec["groups"]:
        for rule in group["rules"]:
            del rule["annotations"]["runbook_url"]
    (tmp_path / "alerts.yaml").write_text(yaml.safe_dump(spec), encoding="utf-8")
    tests = (HERE / "alerts_test.yaml").read_text(encoding="utf-8")
    (tmp_path / "alerts_test.yaml").write_text(tests, encoding="utf-8")
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(  # noqa: S603 - fixed arguments
            [promtool, *command], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60
        )
        assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("alert", [rule["alert"] for rule in RULES])
def test_every_alert_has_a_test_of_both_sides_and_a_runbook(alert: str) -> None:
    tests = yaml.safe_load((HERE / "alerts_test.yaml").read_text(encoding="utf-8"))["tests"]
    mine = [case for test in tests for case in test["alert_rule_test"] if case["alertname"] == alert]
    assert {bool(case.get("exp_alerts")) for case in mine} == {True, False}
    rule = next(rule for rule in RULES if rule["alert"] == alert)
    assert rule["annotations"]["runbook_url"] == f"docs/alerts.md#{alert.lower()}"
    headings = re.findall(r"^## (\w+)$", (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert headings.count(alert) == 1
    assert rule["labels"]["severity"] in {"critical", "warning"}
    assert {"summary", "description"} <= set(rule["annotations"])


@pytest.mark.parametrize(
    ("settings", "page"),
    [
        ([], "docs/alerts.md"),
        (["docsUrl=https://docs.example.com/svllm/"], "https://docs.example.com/svllm/alerts.md"),
        (
            [
                "docsUrl=https://docs.example.com",
                "monitoring.prometheusRule.runbookUrl=https://wiki.example.com/alerts",
            ],
            "https://wiki.example.com/alerts",
        ),
    ],
)
def test_runbooks_are_where_the_platform_says(helm: Helm, settings: list[str], page: str) -> None:
    options = [word for setting in ("monitoring.prometheusRule.enabled=true", *settings) for word in ("--set", setting)]
    (made,) = [obj for obj in helm.template(*options) if obj["kind"] == "PrometheusRule"]
    links = {
        rule["alert"]: rule["annotations"]["runbook_url"] for group in made["spec"]["groups"] for rule in group["rules"]
    }
    assert links == {rule["alert"]: f"{page}#{rule['alert'].lower()}" for rule in RULES}


def test_no_runbook_is_left_of_an_alert_that_is_gone() -> None:
    headings = re.findall(
        r"^## (SecureVLLM\w+)$", (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(headings) == sorted(rule["alert"] for rule in RULES)


@pytest.mark.parametrize("name", QUERIES)
def test_queries_ask_for_what_is_exported(name: str, request: pytest.FixtureRequest) -> None:
    query = QUERIES[name]
    gateways = "envoy_" in query
    exported: dict[str, set[str]] = request.getfixturevalue("of_a_gateway" if gateways else "exported")
    added = SCRAPED | (RELABELED if gateways else set())
    plain = re.sub(r'"[^"]*"', '""', query)
    ungrouped = re.sub(r"\b(?:by|on) \([^)]*\)", "", plain)
    selectors = re.findall(r"\b((?:securevllm|process|envoy)_\w+)(?:\{([^}]*)\})?", ungrouped)
    assert selectors
    labels: set[str] = set()
    for metric, matchers in selectors:
        assert metric in exported, f"{metric} is not exported"
        labels |= exported[metric]
        asked = set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers))
        assert asked <= exported[metric] | added, f"{metric} has no label {asked - exported[metric] - added}"
    grouped = {label.strip() for names in re.findall(r"\b(?:by|on) \(([^)]*)\)", plain) for label in names.split(",")}
    assert grouped <= labels | added, f"no label {grouped - labels - added}"


def test_monitors_ask_the_ports_that_pods_have_and_no_pod_twice() -> None:
    engines = yaml.safe_load((MANIFESTS / "monitoring" / "pod-monitor-engines.yaml").read_text(encoding="utf-8"))
    ports = [[end["port"] for end in monitor["spec"]["podMetricsEndpoints"]] for monitor in (engines, GATEWAYS)]
    assert ports == [[sidecar.NAME], [gateway.METRICS_PORT]]
    # Prometheus asks for /metrics unless it is told otherwise.
    assert not any("path" in end for monitor in (engines, GATEWAYS) for end in monitor["spec"]["podMetricsEndpoints"])


@pytest.mark.parametrize("name", QUERIES)
def test_queries_are_promql(name: str, promtool: Path, tmp_path: Path) -> None:
    # Grafana's variables are not PromQL; a rule file is how promtool reads an expression.
    query = QUERIES[name].replace("$namespace", "llm")
    rules: dict[str, Any] = {"groups": [{"name": "query", "rules": [{"record": "query", "expr": query}]}]}
    path = tmp_path / "query.yaml"
    path.write_text(yaml.safe_dump(rules), encoding="utf-8")
    done = subprocess.run(  # noqa: S603 - fixed arguments
        [promtool, "check", "rules", str(path)], capture_output=True, text=True, check=False, timeout=60
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_metric_of_the_operator_is_shown_or_alerted_on(exported: dict[str, set[str]]) -> None:
    own = {
        re.sub(r"_(bucket|sum|count|created|total)$", "", name) for name in exported if name.startswith("securevllm_")
    }
    text = " ".join(QUERIES.values())
    assert sorted(name for name in own if not re.search(rf"\b{name}(_total|_bucket)?\b", text)) == [
        "securevllm_workqueue_adds"  # it only gives the queue's depth a rate
    ]
