"""The router of prefill and decode: vllm-router, between the gateway and the two sides.

It forwards a POST to *any* path and adds the engines' key, so it is as dangerous as an engine: only the gateway reaches
it, and the gateway's allowlist is the only control. It gets one name for each group, that of its head, and knows of no
others: scaling a side is a new template, which rolls the routers. Measured with 0.1.17: names may end with a dot; it
serves when every worker has answered once, and gives up after ``--worker-startup-timeout-secs``; it asks Mooncake's
bootstrap server of each prefill group; it takes the engines' key from OPENAI_API_KEY.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from securevllm.api.units import quantity, seconds
from securevllm.errors import InternalError
from securevllm.render import engine, gate, pods, vllm
from securevllm.render.meta import ENGINE_KEY_ANNOTATION, Object, Owner
from securevllm.topology import Group, Role, Topology

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from securevllm.api import types as api
    from securevllm.context import Context

ROLE = Role.ROUTER.value
USER = GROUP = 65532  # a number of nobody: the image needs no user of its own

LIVE_PATH, READY_PATH = "/liveness", "/readiness"
"""The second one is 200 only with a healthy worker on each side; ``/health`` always is."""

_METRICS_PORT = 29000
_PROBE_SECONDS = 5
_ENDPOINT_SECONDS = 15


def _split(spec: api.Spec) -> api.Disaggregation:
    if spec.disaggregation is None:
        raise InternalError("a router without prefill and decode")
    return spec.disaggregation


def service(owner: Owner, topology: Topology) -> Object:
    """Headless: the gateway sees each ready router, and balances itself."""
    port = topology.socket(Role.ROUTER, "api").port
    return owner.object(
        "v1",
        "Service",
        ROLE,
        ROLE,
        spec={
            "clusterIP": "None",
            "publishNotReadyAddresses": False,
            "selector": owner.selector(ROLE),
            "ports": [{"name": "http", "port": port, "targetPort": port, "protocol": "TCP"}],
        },
    )


def deployment(owner: Owner, spec: api.Spec, template: Object) -> Object:
    """N routers, none while a side has no replica: they would wait for it, and end."""
    split = _split(spec)
    wanted = split.router.replicas if split.prefill.replicas and split.decode.replicas else 0
    return owner.object(
        "apps/v1",
        "Deployment",
        ROLE,
        ROLE,
        spec={
            "replicas": 0 if spec.suspend else wanted,
            "revisionHistoryLimit": 3,
            # A new one is ready when every engine is; the old one serves until then.
            "progressDeadlineSeconds": seconds(spec.engine.startup_timeout) + 600,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": owner.selector(ROLE)},
            "template": template,
        },
    )


def template(owner: Owner, spec: api.Spec, topology: Topology, context: Context, key: str) -> Object:
    """The router's pod template.

    Args:
        owner: the resource.
        spec: its judged spec.
        topology: of the resource.
        context: the cluster.
        key: fingerprint of the engines' API key; the router reads the key at its start.
    """
    split, port = _split(spec), topology.socket(Role.ROUTER, "api").port
    startup = seconds(spec.engine.startup_timeout)
    live = {"httpGet": {"path": LIVE_PATH, "port": port, "scheme": "HTTP"}, "periodSeconds": _PROBE_SECONDS}
    ready = {"httpGet": {"path": READY_PATH, "port": port, "scheme": "HTTP"}, "periodSeconds": _PROBE_SECONDS}
    container: dict[str, Any] = {
        "name": ROLE,
        "image": split.router.image,
        "command": ["vllm-router"],
        "args": arguments(owner, spec, topology, context),
        "env": [
            pods.field_env("POD_IP", "status.podIP"),
            pods.secret_env("OPENAI_API_KEY", engine.key_secret(owner), engine.KEY),
            {"name": "HOME", "value": "/tmp"},  # noqa: S108 - a mount of the pod
        ],
        "ports": [{"name": engine.API_PORT, "containerPort": port, "protocol": "TCP"}],
        "resources": engine.quantities(split.router.resources)
        if split.router.resources
        else {"requests": {"cpu": "500m", "memory": "512Mi"}, "limits": {"memory": "4Gi"}},
        "securityContext": pods.CONTAINER_SECURITY,
        # Its own time-out comes first and says which engine it waits for.
        "startupProbe": {**live, "timeoutSeconds": 3, "failureThreshold": startup // _PROBE_SECONDS + 12},
        "readinessProbe": {**ready, "timeoutSeconds": 3, "failureThreshold": 2},
        "livenessProbe": {**live, "timeoutSeconds": 10, "failureThreshold": 6},
        "lifecycle": {"preStop": {"sleep": {"seconds": _ENDPOINT_SECONDS}}},
        "volumeMounts": [{"name": "tmp", "mountPath": "/tmp"}],  # noqa: S108 - a mount of the pod
    }
    held_back = gate.init_containers(spec, topology, Role.ROUTER, context, image=split.router.image)
    return pods.template(
        owner,
        ROLE,
        user=USER,
        group=GROUP,
        annotations={ENGINE_KEY_ANNOTATION: key} if key else {},
        pod={
            "terminationGracePeriodSeconds": _ENDPOINT_SECONDS + seconds(spec.engine.termination_grace_period),
            **({"initContainers": held_back} if held_back else {}),
            "containers": [container],
            "volumes": [pods.empty_dir("tmp")],
            **pods.pull_secrets(spec),
        },
    )


def arguments(owner: Owner, spec: api.Spec, topology: Topology, context: Context) -> list[str]:
    """The router's arguments; the operator's come last: on a repeat the last one wins."""
    split, limits = _split(spec), spec.gateway.limits
    return [
        *split.router.args,
        "--vllm-pd-disaggregation",
        *_workers(owner, topology, context),
        f"--kv-connector={split.connector}",
        "--host=$(POD_IP)",
        f"--port={topology.socket(Role.ROUTER, 'api').port}",
        "--prometheus-host=127.0.0.1",
        f"--prometheus-port={_METRICS_PORT}",
        f"--worker-startup-timeout-secs={seconds(spec.engine.startup_timeout)}",
        f"--worker-startup-check-interval={_PROBE_SECONDS}",
        f"--request-timeout-secs={limits.stream_seconds}",
        f"--max-payload-size={int(quantity(limits.request_body))}",
    ]


def _workers(owner: Owner, topology: Topology, context: Context) -> Iterator[str]:
    """One address for each group: its head's. With Mooncake, the port of prefill's bootstrap server beside it."""
    bootstraps = [socket.port for socket in topology.sockets if socket.name == "mooncake-bootstrap"]
    for group in topology.groups:
        url = _url(owner, topology, group, context)
        if group.role is Role.PREFILL:
            yield from ("--prefill", url, *map(str, bootstraps))
        else:
            yield f"--decode={url}"


def _url(owner: Owner, topology: Topology, group: Group, context: Context) -> str:
    return f"http://{vllm.member_host(owner, group.name, 0, context)}.:{topology.socket(group.role, 'api').port}"


def inputs(raw: Mapping[str, Any], topology: Topology, key: str, gates: Mapping[str, Any]) -> Any:
    """What the template depends on.

    Args:
        raw: ``spec`` as the user wrote it.
        topology: of the resource; which groups there are counts.
        key: fingerprint of the engines' API key.
        gates: what the gate depends on.
    """
    split = raw.get("disaggregation", {})
    router = split.get("router", {})
    return {
        "router": {name: router[name] for name in ("image", "args", "resources") if name in router},
        "connector": split.get("connector"),
        "groups": [group.name for group in topology.groups],
        "ports": raw.get("ports", {}),
        "limits": raw.get("gateway", {}).get("limits", {}),
        "engine": {name: raw.get("engine", {}).get(name) for name in ("startupTimeout", "terminationGracePeriod")},
        "imagePullSecrets": raw.get("imagePullSecrets", []),
        "engineKey": key,
        **gates,
    }
