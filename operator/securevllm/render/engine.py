"""The pods that run vLLM: the Deployment of single-pod replicas, the StatefulSets and the Service of each group.

A group has one StatefulSet of one replica for each member, with everything rendered: the controller makes a lost pod
again while the operator is down, and no pod works out who it is. ``OnDelete``: pods are replaced by group, by the edge.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from securevllm.api.units import seconds
from securevllm.render import fetch, gate, pods, sidecar, vllm
from securevllm.render.meta import (
    COMPONENT,
    ENGINE_KEY_ANNOTATION,
    EPOCH_LABEL,
    GROUP_LABEL,
    MEMBER_LABEL,
    RESOURCE_LABEL,
    RESTART_ANNOTATION,
    TEMPLATE_LABEL,
    WHOLE_CONDITION,
    Object,
    Owner,
    digest,
)
from securevllm.topology import Group, Role, Side, Topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from securevllm.api import types as api
    from securevllm.proof.wire import Barrier
    from securevllm.render.vllm import Process

ROLE = Role.ENGINE.value

CONTAINER = "vllm"
"""Of the pods that run vLLM."""
API_PORT = "http"
"""Name of the container port of the socket ``api``; the router's has it, too."""

KEY_SECRET = "engine-key"  # noqa: S105 - the suffix of a Secret's name
KEY = "api-key"
SEAL = "seal-key"
PROBER = "prober-key"
MADE = "made"
"""Keys of that Secret: what engines demand, what seals the accepted spec, the prober's own client key, and when the
first was made (RFC 3339)."""

HEALTH_PATH = "/health"
VERSION_PATH = "/version"
_PROBE_SECONDS = 10
_ENDPOINT_SECONDS = 15
"""Time for the gateway to notice that a pod is going: DNS refresh plus the DNS server's cache."""


@dataclass(frozen=True)
class StartedWith:
    """What a running engine cannot take in later: a change restarts it.

    Attributes:
        restart_at: the user's annotation.
        key: fingerprint of the engine's API key.
    """

    restart_at: str
    key: str


@dataclass(frozen=True)
class RenderedGroup:
    """One model replica of several pods, or with a name of its own: applied, restarted and removed as one.

    Attributes:
        group: name and roles.
        template: hash of the templates of all members, without the epoch; value of ``TEMPLATE_LABEL``.
        epoch: value of ``EPOCH_LABEL``.
        workloads: its StatefulSets, by member.
    """

    group: Group
    template: str
    epoch: int
    workloads: tuple[Object, ...]


def key_secret(owner: Owner) -> str:
    """Name of the Secret that holds the engines' own API key."""
    return owner.child(KEY_SECRET)


def service(owner: Owner, topology: Topology) -> Object:
    """Headless: the gateway sees each ready pod that has HTTP, and balances itself."""
    port = topology.socket(Role.ENGINE, "api").port
    return _service(owner, ROLE, owner.selector(ROLE), port, unready=False)


def group_service(owner: Owner, topology: Topology, group: Group) -> Object:
    """Gives the pods of a group their names, also before they are ready: they need each other to become so."""
    port = topology.socket(group.role, "api").port
    return _service(owner, group.name, owner.group_selector(group.name), port, unready=True)


def _service(owner: Owner, suffix: str, selector: dict[str, str], port: int, *, unready: bool) -> Object:
    return owner.object(
        "v1",
        "Service",
        suffix,
        ROLE,
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": unready,
            "selector": selector,
            "ports": [{"name": "http", "port": port, "targetPort": port, "protocol": "TCP"}],
        },
    )


def deployment(owner: Owner, spec: api.Spec, template: Object) -> Object:
    """N pods are N model replicas. Surge 0: a spare GPU is rarely there."""
    startup = seconds(spec.engine.startup_timeout)
    return owner.object(
        "apps/v1",
        "Deployment",
        ROLE,
        ROLE,
        spec={
            "replicas": 0 if spec.suspend else spec.replicas,
            "revisionHistoryLimit": 3,
            "progressDeadlineSeconds": startup + 600,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 0, "maxUnavailable": 1}},
            "selector": {"matchLabels": owner.selector(ROLE)},
            "template": template,
        },
    )


def groups(process: Process, templates: tuple[Object, ...], epochs: Mapping[str, int]) -> list[RenderedGroup]:
    """The groups of one side.

    Args:
        process: of the side.
        templates: of the head, and of the others if there are any; with the marks of ``vllm.fill``.
        epochs: by name of the group; absent: 0.
    """
    side = process.side
    hashed = template_hash(side.shape.pods, templates)
    rendered = []
    for group in process.topology.groups:
        if group.role is not side.role:
            continue
        epoch = epochs.get(group.name, 0)
        shape = side.shape.pods, side.shape.ranks
        workloads = stateful_sets(process.owner, process.spec, group, shape, templates, pair=(hashed, epoch))
        rendered.append(RenderedGroup(group, hashed, epoch, workloads))
    return rendered


def template_hash(pods: int, templates: tuple[Object, ...]) -> str:
    """Value of ``TEMPLATE_LABEL``: what the pods of a group are, but for their place and epoch."""
    return digest([pods, *templates])


def stateful_sets(
    owner: Owner,
    spec: api.Spec,
    group: Group,
    shape: tuple[int, int],
    templates: tuple[Object, ...],
    *,
    pair: tuple[str, int],
) -> tuple[Object, ...]:
    """One StatefulSet for each member.

    Args:
        owner: the resource.
        spec: the accepted one; suspended, there are no pods.
        group: whose members.
        shape: pods of the group, and data-parallel ranks of each.
        templates: of the head, and of the others if there are any; with the marks of ``vllm.fill``.
        pair: hash of the templates, and epoch.
    """
    size, ranks = shape
    labels = {TEMPLATE_LABEL: pair[0], EPOCH_LABEL: str(pair[1])}
    return tuple(
        _stateful_set(owner, spec, group, member, _filled(templates, group, member, member * ranks, labels))
        for member in range(size)
    )


def _filled(templates: tuple[Object, ...], group: Group, member: int, rank: int, labels: dict[str, str]) -> Object:
    template: Object = vllm.fill(templates[min(member, 1)], group.name, member, rank)
    metadata = template["metadata"]
    return template | {"metadata": metadata | {"labels": metadata["labels"] | labels}}


def _stateful_set(owner: Owner, spec: api.Spec, group: Group, member: int, template: Object) -> Object:
    # At most 52 characters: the controller puts the name and a hash into a label. NAME_LIMIT sees to that.
    return owner.object(
        "apps/v1",
        "StatefulSet",
        f"{group.name}-{member}",
        template["metadata"]["labels"][COMPONENT],
        spec={
            "replicas": 0 if spec.suspend else 1,
            "revisionHistoryLimit": 1,
            "serviceName": owner.child(group.name),
            "podManagementPolicy": "Parallel",
            "updateStrategy": {"type": "OnDelete"},
            "selector": {"matchLabels": owner.group_selector(group.name) | {MEMBER_LABEL: str(member)}},
            "template": template,
        },
    )


def disruption_budget(owner: Owner, topology: Topology) -> Object | None:
    """A drain takes one group at a time. Budgets count pods, and one that goes takes its group along.

    The gates of the others close then, so that they count as disrupted until the group is whole again; what does not
    serve is no loss, and must not hold up the drain of a node.
    """
    if not topology.groups:
        return None
    return owner.object(
        "policy/v1",
        "PodDisruptionBudget",
        ROLE,
        ROLE,
        spec={
            "maxUnavailable": 1,
            "unhealthyPodEvictionPolicy": "AlwaysAllow",
            "selector": {
                "matchLabels": {RESOURCE_LABEL: owner.label},
                "matchExpressions": [{"key": GROUP_LABEL, "operator": "Exists"}],
            },
        },
    )


def heads(owner: Owner, topology: Topology) -> dict[str, str]:
    """Labels that exactly one pod of each model replica has."""
    if not topology.groups:
        return owner.selector(ROLE)
    return {RESOURCE_LABEL: owner.label, MEMBER_LABEL: "0"}


def pin_names(side: Side) -> tuple[str, ...]:
    """Names of the pinned templates. Those of another shape have other names: they do not fit these pods."""
    if not side.groups:
        return (side.role.value,)
    shape = f"{side.role.value}/{side.shape.pods}x{side.shape.ranks}"
    return (shape,) if side.shape.pods == 1 else (f"{shape}/head", f"{shape}/others")


def templates(process: Process, started_with: StartedWith) -> tuple[Object, ...]:
    """The pod templates of one side: of the head, and of the others if there are any."""
    alone = process.side.shape.pods == 1
    return tuple(template(replace(process, head=head), started_with) for head in ((True,) if alone else (True, False)))


def template(process: Process, started_with: StartedWith) -> Object:
    """A pod template; in a group, with the marks of ``vllm.fill``."""
    owner, spec = process.owner, process.spec
    engine = spec.engine
    grace = seconds(engine.termination_grace_period)
    volume = fetch.volume(owner, spec)
    notes = {RESTART_ANNOTATION: started_with.restart_at, ENGINE_KEY_ANNOTATION: started_with.key}
    container: dict[str, Any] = {
        "name": CONTAINER,
        "image": spec.image,
        "command": ["vllm", "serve"],
        "args": vllm.arguments(process),
        "env": vllm.environment(process, pods.secret_env("VLLM_API_KEY", key_secret(owner), KEY)),
        "resources": resources(spec, process.side),
        "securityContext": pods.CONTAINER_SECURITY,
        **({} if process.headless else _http(process)),
        # Requests still come for a moment after the endpoint is gone; vLLM refuses them once it has its signal.
        "lifecycle": {"preStop": {"sleep": {"seconds": min(_ENDPOINT_SECONDS, max(1, grace // 2))}}},
        "volumeMounts": [
            {"name": "home", "mountPath": pods.HOME},
            {"name": "tmp", "mountPath": "/tmp"},  # noqa: S108 - a mount of the pod
            {"name": "shm", "mountPath": "/dev/shm"},  # noqa: S108 - a mount of the pod
            *([{"name": "model", "mountPath": fetch.MOUNT, "readOnly": True}] if volume else []),
            *map(_mount, engine.volumes),
        ],
    }
    held_back = gate.init_containers(
        spec, process.topology, process.role, process.context, image=spec.image, barrier=_barrier(process)
    )
    beside = (owner, process.topology, process.role, process.context)
    scraped = [sidecar.container(*beside)] if sidecar.has(process.topology, process.role) else []
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": grace,
        **({"initContainers": held_back} if held_back else {}),
        "containers": [container, *scraped],
        "volumes": [
            pods.empty_dir("home"),
            pods.empty_dir("tmp"),
            pods.empty_dir("shm", memory=engine.shared_memory),
            *([volume] if volume else []),
            *map(_volume, engine.volumes),
        ],
        # A group serves as a whole or not at all; of a single pod kubelet knows all there is.
        **({"readinessGates": [{"conditionType": WHOLE_CONDITION}]} if process.side.shape.pods > 1 else {}),
        **pods.placement(spec),
    }
    place = {GROUP_LABEL: vllm.GROUP, MEMBER_LABEL: vllm.MEMBER} if process.side.groups else {}
    return pods.template(
        owner,
        process.role.value,
        user=pods.VLLM_USER,
        group=pods.VLLM_GROUP,
        pod=pod,
        labels=engine.labels | place,
        annotations=engine.annotations | {name: value for name, value in notes.items() if value},
    )


def _barrier(process: Process) -> Barrier | None:
    """Where the pods of a replica wait for each other; None: it has only one."""
    if process.side.shape.pods == 1:
        return None
    hosts = (
        vllm.member_host(process.owner, vllm.GROUP, member, process.context)
        for member in range(process.side.shape.pods)
    )
    return gate.barrier(process.port("barrier"), tuple(f"{host}." for host in hosts))


def _http(process: Process) -> dict[str, Any]:
    """Port and probes. A pod without HTTP has neither: its process ends when a peer is lost, and with it the pod."""
    port = process.port("api")
    health = {"httpGet": {"path": HEALTH_PATH, "port": port, "scheme": "HTTP"}}
    return {
        "ports": [{"name": API_PORT, "containerPort": port, "protocol": "TCP"}],
        "startupProbe": {
            **health,
            "periodSeconds": _PROBE_SECONDS,
            "timeoutSeconds": 5,
            "failureThreshold": max(1, seconds(process.spec.engine.startup_timeout) // _PROBE_SECONDS),
        },
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 15, "timeoutSeconds": 10, "failureThreshold": 4},
    }


_VOLUME_PREFIX = "user-"
"""In front of the names of a spec's volumes: the operator's own can never meet them."""


def _mount(volume: api.EngineVolume) -> dict[str, Any]:
    claim = volume.persistent_volume_claim
    writable = volume.empty_dir is not None or (claim is not None and not claim.read_only)
    mount = {"name": f"{_VOLUME_PREFIX}{volume.name}", "mountPath": volume.mount_path}
    return mount if writable else {**mount, "readOnly": True}


def _volume(volume: api.EngineVolume) -> dict[str, Any]:
    source: dict[str, Any] = {"emptyDir": {}}
    if volume.config_map is not None:
        source = {"configMap": {"name": volume.config_map.name}}
    elif volume.secret is not None:
        # Readable for the pod's group, which is that of the files.
        source = {"secret": {"secretName": volume.secret.secret_name, "defaultMode": 0o440}}
    elif volume.persistent_volume_claim is not None:
        claim = volume.persistent_volume_claim
        source = {"persistentVolumeClaim": {"claimName": claim.claim_name, "readOnly": claim.read_only}}
    elif volume.empty_dir is not None:
        source = {"emptyDir": {"sizeLimit": str(volume.empty_dir.size_limit)}}
    return {"name": f"{_VOLUME_PREFIX}{volume.name}", **source}


def resources(spec: api.Spec, side: Side) -> dict[str, Any]:
    """What the spec says, or the GPUs of the parallelism."""
    if spec.engine.resources is None:
        return {"limits": {"nvidia.com/gpu": str(side.shape.gpus)}}
    return quantities(spec.engine.resources)


def quantities(block: api.Resources) -> dict[str, Any]:
    """core/v1 ResourceRequirements; the API server wants quantities as strings."""
    parts = {"requests": block.requests, "limits": block.limits}
    return {part: {name: str(value) for name, value in amounts.items()} for part, amounts in parts.items() if amounts}


def inputs(raw: Mapping[str, Any], side: Side, started_with: StartedWith, gates: Mapping[str, Any]) -> Any:
    """What the template depends on: a change here rolls the pods, an operator upgrade does not.

    So nothing new may be in it that is there for a spec which does not ask for it: its hash is compared with one that
    an earlier release has kept.

    Args:
        raw: ``spec`` as the user wrote it: a default that a later release changes is not a change of the spec.
        side: whose template; how many replicas it has does not count.
        started_with: what a running engine cannot take in.
        gates: what the gate depends on.
    """
    chosen = ("model", "image", "imagePullSecrets", "parallelism", "ports", "engine")
    security = raw.get("security", {})
    place = _place(raw, side)
    asked = {
        "proxy": [entry["proxy"] for entry in security.get("egress", ()) if "proxy" in entry],
        "side": place if any(place.values()) else None,
        "kvEvents": "kvEvents" in security,
        # Who may scrape is a matter of policies; whether anybody may is one of the pods.
        "metrics": "metrics" in security,
    }
    return {
        "spec": {name: raw[name] for name in chosen if name in raw},
        "media": security.get("media", {}),
        "restartAt": started_with.restart_at,
        "engineKey": started_with.key,
        **{name: value for name, value in asked.items() if value},
        **gates,
    }


def inputs_before(raw: Mapping[str, Any], side: Side, inputs: Mapping[str, Any]) -> list[Any]:
    """The same inputs as earlier releases wrote them down.

    Args:
        raw: ``spec`` as the user wrote it.
        side: whose template.
        inputs: of this release.
    """
    # Between 0.1.0 and 0.2.0: there for every spec.
    return [{**inputs, "side": _place(raw, side), "kvEvents": inputs.get("kvEvents", False)}]


def _place(raw: Mapping[str, Any], side: Side) -> dict[str, Any]:
    split = raw.get("disaggregation", {})
    return {"connector": split.get("connector"), "parallelism": split.get(side.role.value, {}).get("parallelism")}
