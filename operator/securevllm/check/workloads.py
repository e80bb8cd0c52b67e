"""Which objects run vLLM, and what each pod template of them starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from securevllm.check.command import Launch, Variable, environment, is_vllm_image, launch
from securevllm.netpol import PROTOCOLS, NamedPort, Pod

if TYPE_CHECKING:
    from securevllm.check.documents import Source

KINDS: Mapping[str, tuple[tuple[str, tuple[str, ...]], ...]] = {
    "Deployment": (("", ("spec", "template")),),
    "StatefulSet": (("", ("spec", "template")),),
    "DaemonSet": (("", ("spec", "template")),),
    "ReplicaSet": (("", ("spec", "template")),),
    "Job": (("", ("spec", "template")),),
    "CronJob": (("", ("spec", "jobTemplate", "spec", "template")),),
    "Pod": (("", ()),),
    "LeaderWorkerSet": (
        ("leader", ("spec", "leaderWorkerTemplate", "leaderTemplate")),
        ("worker", ("spec", "leaderWorkerTemplate", "workerTemplate")),
    ),
}
"""Where the pod templates of a kind are, with the role of each."""


@dataclass(frozen=True)
class Part:
    """One pod template of a workload.

    Attributes:
        role: ``leader`` or ``worker``; empty when there is one template only.
        pod: for policies; without addresses.
        spec: core/v1 PodSpec.
        container: the one that runs vLLM, or Ray for it.
        launch: what it starts.
    """

    role: str
    pod: Pod
    spec: Mapping[str, Any]
    container: Mapping[str, Any]
    launch: Launch

    @property
    def image(self) -> str:
        """Image of the container."""
        return str(self.container.get("image") or "")


@dataclass(frozen=True)
class Workload:
    """An object that runs vLLM."""

    source: Source
    kind: str
    namespace: str
    name: str
    replicas: int
    parts: tuple[Part, ...]
    object: Mapping[str, Any] = field(repr=False)

    @property
    def key(self) -> str:
        """``Kind namespace/name``."""
        return f"{self.kind} {self.namespace}/{self.name}"

    @property
    def server(self) -> Part | None:
        """The part whose HTTP server answers: the first that serves and is not headless."""
        return next((part for part in self.parts if part.launch.serves and not part.launch.on("--headless")), None)


def workload(
    source: Source, obj: Mapping[str, Any], namespace: str, config: Mapping[str, Mapping[str, str]]
) -> Workload | None:
    """Read an object; None: it runs no vLLM.

    Args:
        source: where it stands.
        obj: an object of `KINDS`.
        namespace: its namespace.
        config: data of the namespace's ConfigMaps, by name.
    """
    metadata = _mapping(obj.get("metadata"))
    name = str(metadata.get("name") or metadata.get("generateName") or "(no name)")
    # What the LeaderWorkerSet controller sets, and command lines refer to.
    size = _at(obj, ("spec", "leaderWorkerTemplate")).get("size")
    given = {"LWS_GROUP_SIZE": Variable(str(size))} if isinstance(size, int) else {}
    parts = [
        part
        for role, path in KINDS[str(obj["kind"])]
        if (template := _at(obj, path))
        for part in _parts(role, template, namespace=namespace, name=name, config=config, given=given)
    ]
    if not parts:
        return None
    replicas = _mapping(obj.get("spec")).get("replicas", 1)
    return Workload(
        source,
        str(obj["kind"]),
        namespace,
        name,
        replicas if isinstance(replicas, int) and not isinstance(replicas, bool) else 1,
        tuple(parts),
        obj,
    )


def _parts(
    role: str,
    template: Mapping[str, Any],
    *,
    namespace: str,
    name: str,
    config: Mapping[str, Mapping[str, str]],
    given: Mapping[str, Variable],
) -> Iterator[Part]:
    spec = _mapping(template.get("spec"))
    containers = [*mappings(spec.get("containers"))]
    containers += [item for item in mappings(spec.get("initContainers")) if item.get("restartPolicy") == "Always"]
    pod = Pod(
        namespace=namespace,
        name=f"{name}/{role}" if role else name,
        labels={str(key): str(value) for key, value in _mapping(_at(template, ("metadata", "labels"))).items()},
        ports=tuple(_ports(containers)),
        host_network=spec.get("hostNetwork") is True,
    )
    for container in containers:
        variables, hidden = environment(container, config)
        found = launch(container, {**given, **variables}, hidden)
        if found is not None:
            yield Part(role, pod, spec, container, found)


def _ports(containers: Iterable[Mapping[str, Any]]) -> Iterator[NamedPort]:
    for container in containers:
        for entry in mappings(container.get("ports")):
            name, port = entry.get("name"), entry.get("containerPort")
            protocol = next((item for item in PROTOCOLS if item == (entry.get("protocol") or "TCP")), None)
            if isinstance(name, str) and isinstance(port, int) and protocol is not None:
                yield NamedPort(name, port, protocol)


def _mapping(given: Any) -> Mapping[str, Any]:
    return given if isinstance(given, Mapping) else {}


def mappings(given: Any) -> list[Mapping[str, Any]]:
    """The entries of a list that are mappings; what the API server would refuse is not looked at."""
    return [item for item in given if isinstance(item, Mapping)] if isinstance(given, list) else []


def _at(obj: Mapping[str, Any], path: Iterable[str]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = obj
    for part in path:
        found = _mapping(found.get(part))
    return found


__all__ = ["KINDS", "Part", "Workload", "is_vllm_image", "mappings", "workload"]
