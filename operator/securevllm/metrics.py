"""The operator's metrics, in a registry of their own.

Names and labels are an interface: alerts and dashboards read them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.gc_collector import GCCollector
from prometheus_client.process_collector import ProcessCollector
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from securevllm.status import Figures

STATUSES = ("True", "False", "Unknown")

_API_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_RECONCILE_BUCKETS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class _Conditions(Collector):
    """``securevllm_resource_condition``: of one condition type exactly one status is 1, the others are 0."""

    def __init__(self) -> None:
        self.statuses: dict[tuple[str, str], dict[str, str]] = {}

    def collect(self) -> Iterable[GaugeMetricFamily]:
        """Give the family; read at every scrape, so that nothing of a deleted resource can stay behind."""
        family = GaugeMetricFamily(
            "securevllm_resource_condition",
            "Condition of a SecureVLLMDeployment: 1 for the status that it has, 0 for the others.",
            labels=("namespace", "name", "type", "status"),
        )
        for (namespace, name), conditions in self.statuses.items():
            for condition, actual in conditions.items():
                for status in STATUSES:
                    family.add_metric((namespace, name, condition, status), float(status == actual))
        yield family


class Metrics:
    """All metrics of one operator process.

    It is the `workqueue.Observer`, and `api_request` is the `cluster.RequestObserver`.

    Args:
        version: of the operator.
    """

    def __init__(self, version: str) -> None:
        self.registry = CollectorRegistry()
        self._reconciles = Counter(
            "securevllm_reconcile", "Reconciles that ended, by result.", ("result",), registry=self.registry
        )
        self._durations = Histogram(
            "securevllm_reconcile_duration_seconds",
            "Duration of a reconcile.",
            buckets=_RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self._errors = Counter(
            "securevllm_reconcile_errors", "Reconciles that failed, by reason.", ("reason",), registry=self.registry
        )
        self._adds = Counter("securevllm_workqueue_adds", "Keys added to the work queue.", registry=self.registry)
        self._retries = Counter("securevllm_workqueue_retries", "Failed keys scheduled again.", registry=self.registry)
        self._depth = Gauge(
            "securevllm_workqueue_depth", "Keys that are due and wait for a worker.", registry=self.registry
        )
        self._age = Gauge(
            "securevllm_workqueue_oldest_age_seconds",
            "How long the longest waiting key has been due.",
            registry=self.registry,
        )
        self._requests = Counter(
            "securevllm_api_requests",
            "Requests to the Kubernetes API, by HTTP status; <error> is no answer.",
            ("verb", "kind", "code"),
            registry=self.registry,
        )
        self._latency = Histogram(
            "securevllm_api_request_duration_seconds",
            "Duration of a request to the Kubernetes API.",
            ("verb",),
            buckets=_API_BUCKETS,
            registry=self.registry,
        )
        self._leader = Gauge("securevllm_leader", "Whether this process is the leader.", registry=self.registry)
        self._watched = Gauge(
            "securevllm_watch_last_event_timestamp_seconds",
            "Unix time of the last event or list of a kind.",
            ("kind",),
            registry=self.registry,
        )
        self._missed = Counter(
            "securevllm_watch_missed",
            "Changes of objects that a resync found and the watch had not reported.",
            ("kind",),
            registry=self.registry,
        )
        self._rounds = Histogram(
            "securevllm_probe_round_duration_seconds",
            "Duration of a round that measures the isolation of one resource.",
            ("tier",),
            buckets=_RECONCILE_BUCKETS,
            registry=self.registry,
        )
        self._connections = Counter(
            "securevllm_probe_connections", "Connections that the operator tried, by how they ended.", ("reach",),
            registry=self.registry,
        )  # fmt: skip
        self._verified = Gauge(
            "securevllm_isolation_verified_timestamp_seconds",
            "Unix time of the last measurement of a SecureVLLMDeployment that had a result.",
            ("namespace", "name"),
            registry=self.registry,
        )
        self._wider = Gauge(
            "securevllm_foreign_policies_wider",
            "NetworkPolicies of others that open what the topology of a SecureVLLMDeployment closes.",
            ("namespace", "name"),
            registry=self.registry,
        )
        self._key = Gauge(
            "securevllm_engine_key_created_timestamp_seconds",
            "Unix time at which the API key of the engines of a SecureVLLMDeployment was made.",
            ("namespace", "name"),
            registry=self.registry,
        )
        self._ends = Gauge(
            "securevllm_gateway_certificate_expiration_timestamp_seconds",
            "Unix time at which the certificate of the gateways of a SecureVLLMDeployment expires.",
            ("namespace", "name"),
            registry=self.registry,
        )
        self._behind = Gauge(
            "securevllm_gateway_pods_behind",
            "Gateway pods of a SecureVLLMDeployment that answer and do not serve the current files.",
            ("namespace", "name"),
            registry=self.registry,
        )
        Gauge(
            "securevllm_build_info", "Version of the operator; always 1.", ("version",), registry=self.registry
        ).labels(version).set(1)
        self._conditions = _Conditions()
        self.registry.register(self._conditions)
        ProcessCollector(registry=self.registry)
        GCCollector(registry=self.registry)

    def added(self) -> None:
        """A key was added to the work queue."""
        self._adds.inc()

    def retried(self) -> None:
        """A failed key was scheduled again."""
        self._retries.inc()

    def finished(self, result: str, seconds: float, reason: str) -> None:
        """A reconcile ended with ``success`` or ``error``; `reason` is the error's, empty on success."""
        self._reconciles.labels(result).inc()
        self._durations.observe(seconds)
        if reason:
            self._errors.labels(reason).inc()

    def api_request(self, verb: str, kind: str, code: str, seconds: float) -> None:
        """A request to the Kubernetes API ended."""
        self._requests.labels(verb, kind, code).inc()
        self._latency.labels(verb).observe(seconds)

    def watch_event(self, kind: str, unix_time: float) -> None:
        """An event or a list of a kind came in."""
        self._watched.labels(kind).set(unix_time)

    def watch_missed(self, kind: str, changes: int) -> None:
        """A resync found changes that the watch had not reported."""
        self._missed.labels(kind).inc(changes)

    def probed(self, tier: str, seconds: float) -> None:
        """A round of the prober ended: ``cheap``, ``full`` or ``complete``."""
        self._rounds.labels(tier).observe(seconds)

    def connected(self, reach: str) -> None:
        """The prober tried a connection."""
        self._connections.labels(reach).inc()

    def verified(self, namespace: str, name: str, unix_time: float) -> None:
        """The isolation of a resource was measured."""
        self._verified.labels(namespace, name).set(unix_time)

    def follow(self, *, depth: Callable[[], int], oldest_age: Callable[[], float], leader: Callable[[], bool]) -> None:
        """Read these at every scrape."""
        self._depth.set_function(depth)
        self._age.set_function(oldest_age)
        self._leader.set_function(leader)

    def set_conditions(self, namespace: str, name: str, statuses: Mapping[str, str]) -> None:
        """Set all conditions of a resource: condition type to ``True``, ``False`` or ``Unknown``."""
        self._conditions.statuses[namespace, name] = dict(statuses)

    def set_figures(self, namespace: str, name: str, figures: Figures) -> None:
        """Set what is told of a resource in numbers; what is not known is not shown."""
        told = (
            (self._wider, figures.wider),
            (self._key, figures.key_made),
            (self._ends, figures.certificate_ends),
            (self._behind, figures.behind),
        )
        for gauge, value in told:
            if value is not None:
                gauge.labels(namespace, name).set(value)
            else:
                _remove(gauge, namespace, name)

    def forget(self, namespace: str, name: str) -> None:
        """Remove what was told of a resource that is gone."""
        self._conditions.statuses.pop((namespace, name), None)
        for gauge in (self._verified, self._wider, self._key, self._ends, self._behind):
            _remove(gauge, namespace, name)


def _remove(gauge: Gauge, namespace: str, name: str) -> None:
    with contextlib.suppress(KeyError):
        gauge.remove(namespace, name)
