"""What was seen of a resource: the input of the conditions. Plain data, filled by the edge."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from securevllm.api.advisories import Hit
    from securevllm.errors import Problem
    from securevllm.proof.verdict import Proof


@dataclass(frozen=True)
class Workload:
    """A Deployment as its controller reports it, or all groups of pods, each of which counts as one replica.

    Attributes:
        desired: replicas asked for.
        updated: replicas of the current template.
        ready: replicas that pass their readiness probe, of any template.
        replicas: replicas that exist.
        observed: whether the controller has seen the current generation.
        failure: why it makes no progress, in the controller's words; empty when it does.
        trouble: what keeps a pod of it from running, in kubelet's or the scheduler's words.
        broken: a group of it is not whole any more, as ``trouble`` says.
        restarting: a group of it starts anew after it broke.
    """

    desired: int
    updated: int = 0
    ready: int = 0
    replicas: int = 0
    observed: bool = True
    failure: str = ""
    trouble: str = ""
    broken: bool = False
    restarting: bool = False

    @property
    def complete(self) -> bool:
        """Everything that was asked for is there, and nothing else."""
        return self.observed and self.updated == self.ready == self.replicas == self.desired


@dataclass(frozen=True)
class Fetch:
    """The download of the model; ``trouble`` is what keeps its pod from running."""

    done: bool
    failure: str = ""
    trouble: str = ""


@dataclass(frozen=True)
class Gateway:
    """What the Envoys say of themselves.

    Attributes:
        stale: pod name to the files that are not the current ones; an empty tuple: all are.
        silent: pods that did not answer.
        unconnected: pods that know no healthy engine.
        reported: versions that engines behind them say they are; empty: none was asked, or none answered.
    """

    stale: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    silent: tuple[str, ...] = ()
    unconnected: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()

    @property
    def behind(self) -> int | None:
        """Pods that answered and do not serve the current files; None: none was asked, or none answered."""
        return sum(bool(files) for files in self.stale.values()) if self.stale else None


@dataclass(frozen=True, order=True)
class Failure:
    """A child that is not what it should be.

    Attributes:
        component: the part of the service that it belongs to; ``isolation`` for policies.
        child: kind and name.
        reason: CamelCase reason for conditions.
        message: why.
    """

    component: str
    child: str
    reason: str
    message: str


@dataclass(frozen=True)
class Figures:
    """What is told as metrics, because a time and an age would make a status that never rests.

    Attributes:
        wider: how many NetworkPolicies of others open what the topology closes.
        key_made: when the engines' key was made, unix seconds; None: it is not there.
        certificate_ends: when what the gateways serve expires, unix seconds; None: plain HTTP, or it cannot be read.
        behind: gateway pods that do not serve the current files; None: no gateway told.
    """

    wider: int = 0
    key_made: float | None = None
    certificate_ends: float | None = None
    behind: int | None = None


@dataclass(frozen=True)
class Facts:
    """Everything that the conditions are made of.

    Attributes:
        generation: ``metadata.generation`` of the resource.
        problems: what is wrong with the spec.
        fallback: an older accepted spec is reconciled instead of this one.
        lost: the spec is wrong and no accepted one can be read: objects stay as they are.
        suspended: scaled to nothing on purpose.
        engine: the engines; None when the Deployment does not exist.
        router: between gateway and engines; None when the spec asks for none.
        gateway: the gateways; None when the Deployment does not exist.
        fetch: the download; None when there is nothing to download.
        served: read back from the gateways.
        missing: Secrets that the gateway needs and that are not there, with what is missing.
        unfetched: Secrets that engines or the fetch Job need and that are not there, with what is missing.
        keys: what is wrong with the client keys.
        no_keys: not one client key is usable.
        failures: children that could not be brought to what they should be.
        outdated: workloads that a newer operator would render differently.
        risks: what the spec gives up.
        devices: extended resources of engines that are networks, or that nobody said are none.
        url: where clients find the gateway.
        selector: one pod per model replica.
        version: the vLLM version, as claimed by the image's tag or assumed by the spec.
        assumed: the spec says the version, whatever the image holds.
        old_accepted: the spec accepts a vLLM below the floor.
        running: what engines say they are; empty: not known.
        advisories: published holes that concern the spec.
        verification: mode of ``spec.security.verification``.
        proof: the verdict of what was measured; None before the first round.
        held: pods that their gates hold back.
        foreign: what policies of others open.
        gate_disabled: why engines start without having seen their isolation; empty: they see it.
        verified: RFC 3339 time to show as ``lastVerified``.
        figures: for metrics; no condition is made of them. None: nothing was looked at.
    """

    generation: int
    problems: tuple[Problem, ...] = ()
    fallback: bool = False
    lost: bool = False
    suspended: bool = False
    engine: Workload | None = None
    router: Workload | None = None
    gateway: Workload | None = None
    fetch: Fetch | None = None
    served: Gateway = Gateway()
    missing: tuple[str, ...] = ()
    unfetched: tuple[str, ...] = ()
    keys: tuple[str, ...] = ()
    no_keys: bool = False
    failures: tuple[Failure, ...] = ()
    outdated: tuple[str, ...] = ()
    risks: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    url: str = ""
    selector: str = ""
    version: str = ""
    assumed: bool = False
    old_accepted: bool = False
    running: str = ""
    advisories: tuple[Hit, ...] = ()
    verification: str = "Report"
    proof: Proof | None = None
    held: tuple[str, ...] = ()
    foreign: str = ""
    gate_disabled: str = ""
    verified: str = ""
    figures: Figures | None = None

    @property
    def breached(self) -> bool:
        """Whether isolation is known to be broken; what is only not measured is not."""
        return bool(self.foreign) or (self.proof is not None and self.proof.breached)


_STARTING = frozenset({"ContainerCreating", "PodInitializing"})


def trouble(pods: Iterable[Mapping[str, Any]]) -> str:
    """What keeps the first of these pods from running; empty when nothing is said."""
    for pod in sorted(pods, key=lambda pod: str(pod["metadata"]["name"])):
        status = pod.get("status", {})
        for condition in status.get("conditions", ()):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                return f"{pod['metadata']['name']}: {condition.get('reason', '')}: {condition.get('message', '')}"
        for container in (*status.get("initContainerStatuses", ()), *status.get("containerStatuses", ())):
            waiting = container.get("state", {}).get("waiting", {})
            if waiting.get("reason", "ContainerCreating") not in _STARTING:
                return f"{pod['metadata']['name']}: {waiting['reason']}: {waiting.get('message', '')}".removesuffix(
                    ": "
                )
    return ""


def workload(deployment: Mapping[str, Any], pods: Iterable[Mapping[str, Any]] = ()) -> Workload:
    """Read an apps/v1 Deployment and its pods."""
    status = deployment.get("status", {})
    failure = ""
    for condition in status.get("conditions", ()):
        broken = condition["type"] == "ReplicaFailure" and condition["status"] == "True"
        stuck = condition["type"] == "Progressing" and condition["status"] == "False"
        if broken or stuck:
            failure = condition.get("message") or condition.get("reason", "")
    return Workload(
        desired=deployment["spec"].get("replicas", 1),
        updated=status.get("updatedReplicas", 0),
        ready=status.get("readyReplicas", 0),
        replicas=status.get("replicas", 0),
        observed=status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0),
        failure=failure,
        trouble=trouble(pods),
    )


def fetch(job: Mapping[str, Any] | None, pods: Iterable[Mapping[str, Any]] = ()) -> Fetch:
    """Read a batch/v1 Job and its pods."""
    if job is None:
        return Fetch(done=False)
    held = {item["type"]: item for item in job.get("status", {}).get("conditions", ()) if item["status"] == "True"}
    failed = held.get("Failed")
    return Fetch(
        done="Complete" in held,
        failure=(failed.get("message") or failed.get("reason", "failed")) if failed else "",
        trouble=trouble(pods),
    )
