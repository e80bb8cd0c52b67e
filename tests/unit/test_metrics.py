from __future__ import annotations

import pytest
from prometheus_client import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from securevllm.metrics import STATUSES, Metrics
from securevllm.status import Figures


def samples(metrics: Metrics) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = generate_latest(metrics.registry).decode()
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_of_each_condition_type_exactly_one_status_is_set() -> None:
    metrics = Metrics("1.2.3")
    metrics.set_conditions("default", "llama", {"Ready": "True", "Isolated": "Unknown"})
    metrics.set_conditions("default", "llama", {"Ready": "False", "Isolated": "Unknown"})

    shown = {
        (dict(labels)["type"], dict(labels)["status"]): value
        for (name, labels), value in samples(metrics).items()
        if name == "securevllm_resource_condition"
    }
    assert shown == {
        (condition, status): float((condition, status) in {("Ready", "False"), ("Isolated", "Unknown")})
        for condition in ("Ready", "Isolated")
        for status in STATUSES
    }


def test_nothing_of_a_deleted_resource_stays() -> None:
    metrics = Metrics("1.2.3")
    metrics.set_conditions("default", "llama", {"Ready": "True"})
    metrics.set_figures("default", "llama", Figures(2, 1.0, 2.0, 1))
    metrics.verified("default", "llama", 3.0)
    assert len([labels for _, labels in samples(metrics) if ("name", "llama") in labels]) == len(STATUSES) + 5
    metrics.forget("default", "llama")
    metrics.forget("default", "never-seen")

    assert not [labels for _, labels in samples(metrics) if ("name", "llama") in labels]


def test_what_is_not_known_any_more_is_not_shown() -> None:
    metrics = Metrics("1.2.3")
    metrics.set_figures("default", "llama", Figures(0, 1.0, 2.0, 1))
    metrics.set_figures("default", "llama", Figures(1, 1.0, None))

    labels = (("name", "llama"), ("namespace", "default"))
    shown = {name: value for (name, where), value in samples(metrics).items() if where == labels}
    assert shown == {
        "securevllm_foreign_policies_wider": 1.0,
        "securevllm_engine_key_created_timestamp_seconds": 1.0,
    }


def test_reconciles_requests_and_gauges_are_counted() -> None:
    metrics = Metrics("1.2.3")
    metrics.added()
    metrics.retried()
    metrics.finished("success", 0.2, "")
    metrics.finished("error", 0.3, "Forbidden")
    metrics.api_request("apply", "Service", "200", 0.01)
    metrics.watch_event("Pod", 1234.0)
    metrics.watch_missed("Pod", 2)
    metrics.follow(depth=lambda: 4, oldest_age=lambda: 1.5, leader=lambda: True)

    values = samples(metrics)
    assert values["securevllm_workqueue_adds_total", ()] == 1
    assert values["securevllm_workqueue_retries_total", ()] == 1
    assert values["securevllm_reconcile_total", (("result", "error"),)] == 1
    assert values["securevllm_reconcile_errors_total", (("reason", "Forbidden"),)] == 1
    assert values["securevllm_reconcile_duration_seconds_count", ()] == 2
    request = (("code", "200"), ("kind", "Service"), ("verb", "apply"))
    assert values["securevllm_api_requests_total", request] == 1
    assert values["securevllm_api_request_duration_seconds_sum", (("verb", "apply"),)] == pytest.approx(0.01)
    assert values["securevllm_watch_last_event_timestamp_seconds", (("kind", "Pod"),)] == 1234.0
    assert values["securevllm_watch_missed_total", (("kind", "Pod"),)] == 2
    assert values["securevllm_workqueue_depth", ()] == 4
    assert values["securevllm_workqueue_oldest_age_seconds", ()] == 1.5
    assert values["securevllm_leader", ()] == 1
    assert values["securevllm_build_info", (("version", "1.2.3"),)] == 1


def test_every_metric_says_what_it_is() -> None:
    text = generate_latest(Metrics("1.2.3").registry).decode()
    families = [family for family in text_string_to_metric_families(text) if family.name.startswith("securevllm_")]

    assert len(families) >= 12
    assert all(len(family.documentation) > 15 for family in families)


def test_two_processes_in_one_test_do_not_share_a_registry() -> None:
    first, second = Metrics("1"), Metrics("2")
    first.added()

    assert samples(second)["securevllm_workqueue_adds_total", ()] == 0
