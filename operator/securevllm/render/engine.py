"""The engines: vLLM's command line, environment and pod, for one pod per model replica."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securevllm import catalogue
from securevllm.api.guard import arguments as guarded
from securevllm.api.units import seconds
from securevllm.render import envoy, fetch, gate, pods
from securevllm.render.meta import ENGINE_KEY_ANNOTATION, RESTART_ANNOTATION, Object, Owner
from securevllm.topology import Role, Topology

if TYPE_CHECKING:
    from collections.abc import Mapping

    from securevllm.api import types as api
    from securevllm.context import Context

ROLE = Role.ENGINE.value

KEY_SECRET = "engine-key"  # noqa: S105 - the suffix of a Secret's name
KEY = "api-key"
SEAL = "seal-key"

HEALTH_PATH = "/health"
_PROBE_SECONDS = 10
_ENDPOINT_SECONDS = 15
"""Time for the gateway to notice that a pod is going: DNS refresh plus the DNS server's cache."""

_NOT_PROXIED = "localhost,127.0.0.1,::1,.svc,.local"
_UNREACHABLE_DOMAIN = "none.invalid"
"""vLLM reads an empty list of media domains as "any"; .invalid never resolves (RFC 6761)."""


@dataclass(frozen=True)
class StartedWith:
    """What a running engine cannot take in later: a change restarts it.

    Attributes:
        restart_at: the user's annotation.
        key: fingerprint of the engine's API key.
    """

    restart_at: str
    key: str


def key_secret(owner: Owner) -> str:
    """Name of the Secret that holds the engines' own API key."""
    return owner.child(KEY_SECRET)


def service(owner: Owner, topology: Topology) -> Object:
    """Headless: the gateway sees each ready pod and balances itself."""
    port = topology.socket(Role.ENGINE, "api").port
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


def template(owner: Owner, spec: api.Spec, topology: Topology, context: Context, started_with: StartedWith) -> Object:
    """The engine's pod template."""
    engine = spec.engine
    port = topology.socket(Role.ENGINE, "api").port
    grace = seconds(engine.termination_grace_period)
    health = {"httpGet": {"path": HEALTH_PATH, "port": port, "scheme": "HTTP"}}
    volume = fetch.volume(owner, spec)
    notes = {RESTART_ANNOTATION: started_with.restart_at, ENGINE_KEY_ANNOTATION: started_with.key}
    container: dict[str, Any] = {
        "name": "vllm",
        "image": spec.image,
        "command": ["vllm", "serve"],
        "args": arguments(owner, spec, topology),
        "env": environment(owner, spec),
        "ports": [{"name": "http", "containerPort": port, "protocol": "TCP"}],
        "resources": resources(spec),
        "securityContext": pods.CONTAINER_SECURITY,
        "startupProbe": {
            **health,
            "periodSeconds": _PROBE_SECONDS,
            "timeoutSeconds": 5,
            "failureThreshold": max(1, seconds(engine.startup_timeout) // _PROBE_SECONDS),
        },
        "readinessProbe": {**health, "periodSeconds": 5, "timeoutSeconds": 5, "failureThreshold": 3},
        "livenessProbe": {**health, "periodSeconds": 15, "timeoutSeconds": 10, "failureThreshold": 4},
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
    held_back = gate.init_containers(spec, topology, Role.ENGINE, context, image=spec.image)
    pod: dict[str, Any] = {
        "terminationGracePeriodSeconds": grace,
        **({"initContainers": held_back} if held_back else {}),
        "containers": [container],
        "volumes": [
            pods.empty_dir("home"),
            pods.empty_dir("tmp"),
            pods.empty_dir("shm", memory=engine.shared_memory),
            *([volume] if volume else []),
            *map(_volume, engine.volumes),
        ],
        **pods.placement(spec),
    }
    return pods.template(
        owner,
        ROLE,
        user=pods.VLLM_USER,
        group=pods.VLLM_GROUP,
        pod=pod,
        labels=engine.labels,
        annotations=engine.annotations | {name: value for name, value in notes.items() if value},
    )


def arguments(owner: Owner, spec: api.Spec, topology: Topology) -> list[str]:
    """VLLM's arguments: the model first, the user's flags, then the operator's: on a repeat the last one wins."""
    domains = spec.security.media.allowed_domains or (_UNREACHABLE_DOMAIN,)
    return [
        fetch.path(owner, spec) or spec.model.name,
        *guarded.canonical(spec.engine.args),
        f"--served-model-name={spec.model.served_name or spec.model.name}",
        "--host=$(POD_IP)",
        f"--port={topology.socket(Role.ENGINE, 'api').port}",
        f"--tensor-parallel-size={spec.parallelism.tensor}",
        f"--pipeline-parallel-size={spec.parallelism.pipeline}",
        # A list ends only at the next flag, so one of ours follows it.
        "--allowed-media-domains",
        *domains,
        "--disable-fastapi-docs",
    ]


def environment(owner: Owner, spec: api.Spec) -> list[dict[str, Any]]:
    """The container's variables; ours come last, and the guard refused their names."""
    fixed = catalogue.environment().fixed | {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(envoy.ENGINE_KEEP_ALIVE_SECONDS),
        **_media(spec.security.media),
        **_proxy(spec),
        "HOME": pods.HOME,
        "USER": "vllm",
        "LOGNAME": "vllm",
        "XDG_CACHE_HOME": f"{pods.HOME}/.cache",
        "XDG_CONFIG_HOME": f"{pods.HOME}/.config",
        "HF_HOME": f"{pods.HOME}/.cache/huggingface",
        "VLLM_CACHE_ROOT": f"{pods.HOME}/.cache/vllm",
        "TRITON_CACHE_DIR": f"{pods.HOME}/.cache/triton",
        "TORCHINDUCTOR_CACHE_DIR": f"{pods.HOME}/.cache/torchinductor",
        "FLASHINFER_WORKSPACE_BASE": f"{pods.HOME}/.cache/flashinfer",
        "CUDA_CACHE_PATH": f"{pods.HOME}/.cache/nv",
        # Only the interface that policies govern.
        "GLOO_SOCKET_IFNAME": "eth0",
        "NCCL_SOCKET_IFNAME": "eth0",
    }
    return [
        pods.field_env("POD_IP", "status.podIP"),
        # Unset, vLLM dials 8.8.8.8 to find its address and falls back to 0.0.0.0.
        pods.field_env("VLLM_HOST_IP", "status.podIP"),
        pods.secret_env("VLLM_API_KEY", key_secret(owner), KEY),
        *(variable.model_dump(mode="json", by_alias=True, exclude_none=True) for variable in spec.engine.env),
        *({"name": name, "value": value} for name, value in sorted(fixed.items())),
    ]


def _media(media: api.Media) -> dict[str, str]:
    """What the spec sets of the limits of media; the others are those of the catalogue."""
    limits = {
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": media.max_download_megabytes,
        "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB": media.max_request_download_megabytes,
        "VLLM_MAX_IMAGE_PIXELS": media.max_image_pixels,
    }
    redirects = {"VLLM_MEDIA_URL_ALLOW_REDIRECTS": "1" if media.allow_redirects else "0"}
    return redirects | {name: str(limit) for name, limit in limits.items() if limit is not None}


def proxy(spec: api.Spec) -> str | None:
    """The HTTP proxy that the spec declares."""
    return next((entry.proxy for entry in spec.security.egress if entry.proxy is not None), None)


def _proxy(spec: api.Spec) -> dict[str, str]:
    """Both spellings: libraries differ in which one they read. Nothing within the pod and the cluster goes through."""
    url = proxy(spec)
    if url is None:
        return {}
    names = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": _NOT_PROXIED}
    return names | {name.lower(): value for name, value in names.items()}


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


def resources(spec: api.Spec) -> dict[str, Any]:
    """What the spec says, or the GPUs of the parallelism."""
    if spec.engine.resources is None:
        world = str(spec.parallelism.tensor * spec.parallelism.pipeline)
        return {"limits": {"nvidia.com/gpu": world}}
    return quantities(spec.engine.resources)


def quantities(block: api.Resources) -> dict[str, Any]:
    """core/v1 ResourceRequirements; the API server wants quantities as strings."""
    parts = {"requests": block.requests, "limits": block.limits}
    return {part: {name: str(value) for name, value in amounts.items()} for part, amounts in parts.items() if amounts}


def inputs(raw: Mapping[str, Any], started_with: StartedWith, gates: Mapping[str, Any]) -> Any:
    """What the template depends on: a change here rolls the pods, an operator upgrade does not.

    Args:
        raw: ``spec`` as the user wrote it: a default that a later release changes is not a change of the spec.
        started_with: what a running engine cannot take in.
        gates: what the gate depends on.
    """
    chosen = ("model", "image", "imagePullSecrets", "parallelism", "ports", "engine")
    security = raw.get("security", {})
    proxies = [entry["proxy"] for entry in security.get("egress", ()) if "proxy" in entry]
    return {
        "spec": {name: raw[name] for name in chosen if name in raw},
        "media": security.get("media", {}),
        **({"proxy": proxies} if proxies else {}),
        "restartAt": started_with.restart_at,
        "engineKey": started_with.key,
        **gates,
    }
