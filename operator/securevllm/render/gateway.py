"""The gateway: Envoy's Deployment, its files in a ConfigMap and a Secret, its Service, its disruption budget.

Files that change often (routes, keys, certificates) are read again by Envoy without a restart; only the bootstrap is
part of the pod template.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

from securevllm.api import routes
from securevllm.api import types as api
from securevllm.api.units import quantity
from securevllm.render import engine, envoy, pods, router, sidecar
from securevllm.render.meta import Object, Owner, digest
from securevllm.topology import GATEWAY_ADMIN, GATEWAY_HTTP, Role, Topology

if TYPE_CHECKING:
    from securevllm import catalogue
    from securevllm.context import Context

ROLE = Role.GATEWAY.value
USER = GROUP = 65532  # "nonroot" of the distroless image

XDS_SUFFIX, AUTH_SUFFIX = "gateway-xds", "gateway-auth"
CLIENT_KEYS_SUFFIX, CA_SUFFIX, TLS_SUFFIX = "client-keys", "gateway-ca", "gateway-tls"

CONTAINER = "envoy"
METRICS_PORT = "envoy-metrics"
"""Name of the container's port; monitors ask for it."""

_BOOTSTRAP_ANNOTATION = f"{api.GROUP}/bootstrap"
_GENERATED_CLIENT_LIMIT = 10000
_MEMORY_MIB = 512
_HEAP_SHARE = 0.8
"""Envoy sheds load at this share of its memory limit, before the kernel kills it."""

_DRAIN_SECONDS = 15
_CACHE_SECONDS = 60
_THREADS = 2


def allowed_routes(spec: api.Spec, version: catalogue.Version) -> tuple[envoy.AllowedRoute, ...]:
    """The effective allowlist, as Envoy is told it."""
    return tuple(
        envoy.AllowedRoute(route.method, route.path, streaming=route.streaming)
        for route in routes.allowed(spec, version)
    )


def model(
    owner: Owner, spec: api.Spec, version: catalogue.Version, topology: Topology, context: Context
) -> envoy.GatewayModel:
    """What Envoy is told."""
    limits = spec.gateway.limits
    tls = spec.gateway.tls
    entry, upstream = _entry(topology, tls), topology.entry
    return envoy.GatewayModel(
        name=owner.child(ROLE),
        listen_address=context.listen_address,
        listen_port=entry,
        ops_port=topology.socket(Role.GATEWAY, "ops").port,
        admin_port=GATEWAY_ADMIN,
        metrics_port=topology.socket(Role.GATEWAY, sidecar.SOCKET).port if sidecar.has(topology, Role.GATEWAY) else 0,
        routes=allowed_routes(spec, version),
        upstream_host=f"{owner.child(upstream.value)}.{owner.namespace}.svc.{context.cluster_domain}",
        upstream_port=topology.socket(upstream, "api").port,
        health_path=router.READY_PATH if upstream is Role.ROUTER else engine.HEALTH_PATH,
        # The router would answer for itself.
        version_path="" if upstream is Role.ROUTER else engine.VERSION_PATH,
        tls=tls.disabled is None,
        hostnames=(),
        authentication=spec.gateway.authentication.none is None,
        request_body_bytes=int(quantity(limits.request_body)),
        requests_per_second_per_client=limits.requests_per_second_per_client,
        stream_seconds=limits.stream_seconds,
        stream_idle_seconds=limits.idle_seconds,
        max_clients=_GENERATED_CLIENT_LIMIT,
        heap_bytes=int(_memory(spec) * _HEAP_SHARE),
        connections=limits.connections,
    )


def generated_names(owner: Owner) -> tuple[str, ...]:
    """Secrets that may have been generated, with this spec or with an earlier one."""
    return tuple(owner.child(suffix) for suffix in (CLIENT_KEYS_SUFFIX, CA_SUFFIX, TLS_SUFFIX))


def _entry(topology: Topology, tls: api.Tls) -> int:
    return topology.socket(Role.GATEWAY, "http" if tls.disabled is not None else "https").port


def _memory(spec: api.Spec) -> Fraction:
    limits = spec.gateway.resources.limits if spec.gateway.resources else {}
    return quantity(limits.get("memory", f"{_MEMORY_MIB}Mi"))


def service(owner: Owner, spec: api.Spec, topology: Topology) -> Object:
    """What clients use."""
    wanted = spec.gateway.service
    entry = _entry(topology, spec.gateway.tls)
    plain = entry == GATEWAY_HTTP
    rendered = owner.object(
        "v1",
        "Service",
        ROLE,
        ROLE,
        spec={
            "type": wanted.type,
            "selector": owner.selector(ROLE),
            "ports": [
                {
                    "name": "http" if plain else "https",
                    "port": 80 if plain else 443,
                    "targetPort": entry,
                    "protocol": "TCP",
                }
            ],
            # Cluster would replace the client's address by a node's, which clients.cidrs cannot tell apart.
            **({"externalTrafficPolicy": "Local"} if wanted.type != "ClusterIP" else {}),
        },
    )
    if wanted.annotations:
        rendered["metadata"]["annotations"] = wanted.annotations
    return rendered


def url(owner: Owner, spec: api.Spec, context: Context) -> str:
    """Where clients of the cluster find the gateway."""
    scheme = "http" if spec.gateway.tls.disabled is not None else "https"
    return f"{scheme}://{owner.child(ROLE)}.{owner.namespace}.svc.{context.cluster_domain}"


def server_names(owner: Owner, spec: api.Spec, context: Context) -> tuple[str, ...]:
    """Names that the generated certificate is valid for."""
    short = owner.child(ROLE)
    return (
        f"{short}.{owner.namespace}.svc.{context.cluster_domain}",
        f"{short}.{owner.namespace}.svc",
        f"{short}.{owner.namespace}",
        short,
        *spec.gateway.tls.hostnames,
    )


def config_map(owner: Owner, files: Mapping[str, str]) -> Object:
    """Envoy's files; no secret is in them."""
    return owner.object("v1", "ConfigMap", XDS_SUFFIX, ROLE, data=dict(files))


def auth_secret(owner: Owner, keys_file: str) -> Object:
    """The client keys as Envoy reads them; without a key everything is refused."""
    data = {envoy.API_KEYS_FILE: base64.b64encode(keys_file.encode()).decode()}
    return owner.object("v1", "Secret", AUTH_SUFFIX, ROLE, type="Opaque", data=data)


def disruption_budget(owner: Owner, spec: api.Spec) -> Object | None:
    """A drain never takes all gateways at once; for a single one a budget would only block the drain."""
    if spec.gateway.replicas < 2 or spec.suspend:  # noqa: PLR2004 - the smallest plural
        return None
    return owner.object(
        "policy/v1",
        "PodDisruptionBudget",
        ROLE,
        ROLE,
        spec={
            "maxUnavailable": spec.gateway.pod_disruption_budget.max_unavailable,
            "selector": {"matchLabels": owner.selector(ROLE)},
        },
    )


def deployment(owner: Owner, spec: api.Spec, template: Object) -> Object:
    """N gateways; a new one is there before an old one goes."""
    return owner.object(
        "apps/v1",
        "Deployment",
        ROLE,
        ROLE,
        spec={
            "replicas": 0 if spec.suspend else spec.gateway.replicas,
            "revisionHistoryLimit": 3,
            "strategy": {"type": "RollingUpdate", "rollingUpdate": {"maxSurge": 1, "maxUnavailable": 0}},
            "selector": {"matchLabels": owner.selector(ROLE)},
            "template": template,
        },
    )


def template(
    owner: Owner, spec: api.Spec, context: Context, model: envoy.GatewayModel, files: Mapping[str, str]
) -> Object:
    """The gateway's pod template."""
    tls = spec.gateway.tls
    volumes: list[tuple[str, dict[str, Any]]] = [
        ("bootstrap", _config_volume(owner, [envoy.BOOTSTRAP_FILE])),
        ("xds", _config_volume(owner, [name for name in envoy.XDS_FILES if name in files])),
        # Only the key that Envoy needs: the Secret also holds the seal's.
        ("engine", _secret_volume(engine.key_secret(owner), [engine.KEY])),
    ]
    if model.authentication:
        volumes.append(("auth", _secret_volume(owner.child(AUTH_SUFFIX), [envoy.API_KEYS_FILE])))
    if tls.disabled is None:
        name = tls.secret_name or owner.child(TLS_SUFFIX)
        volumes.append(("tls", _secret_volume(name, ["tls.crt", "tls.key"])))
    container = {
        "name": CONTAINER,
        "image": context.gateway_image,
        "args": list(envoy.arguments(model, concurrency=_THREADS)),
        "ports": [
            {"name": "clients", "containerPort": model.listen_port, "protocol": "TCP"},
            {"name": "ops", "containerPort": model.ops_port, "protocol": "TCP"},
            # Not the name that the engines' port has: a monitor of one kind finds no pods of the other.
            *(
                [{"name": METRICS_PORT, "containerPort": model.metrics_port, "protocol": "TCP"}]
                * bool(model.metrics_port)
            ),
        ],
        "resources": engine.quantities(spec.gateway.resources)
        if spec.gateway.resources
        else {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": f"{_MEMORY_MIB}Mi"}},
        "securityContext": pods.CONTAINER_SECURITY,
        "readinessProbe": {
            "httpGet": {"path": envoy.READY_PATH, "port": model.ops_port, "scheme": "HTTP"},
            "periodSeconds": 3,
            "timeoutSeconds": 2,
            "failureThreshold": 2,
        },
        # Envoy ends at once on SIGTERM, with every stream: endpoints have to be gone first.
        "lifecycle": {"preStop": {"sleep": {"seconds": _DRAIN_SECONDS}}},
        "volumeMounts": [{"name": name, "mountPath": envoy.DIRECTORIES[name], "readOnly": True} for name, _ in volumes],
    }
    return pods.template(
        owner,
        ROLE,
        user=USER,
        group=GROUP,
        annotations={_BOOTSTRAP_ANNOTATION: digest(files[envoy.BOOTSTRAP_FILE])},
        pod={
            "terminationGracePeriodSeconds": _DRAIN_SECONDS + _CACHE_SECONDS,
            "containers": [container],
            **pods.pull_secrets(spec),
            "volumes": [{"name": name, **source} for name, source in volumes],
            "topologySpreadConstraints": [
                {
                    "maxSkew": 1,
                    "topologyKey": "kubernetes.io/hostname",
                    "whenUnsatisfiable": "ScheduleAnyway",
                    "labelSelector": {"matchLabels": owner.selector(ROLE)},
                }
            ],
        },
    )


def _items(keys: Sequence[str]) -> list[dict[str, str]]:
    return [{"key": key, "path": key} for key in keys]


def _config_volume(owner: Owner, keys: Sequence[str]) -> dict[str, Any]:
    return {"configMap": {"name": owner.child(XDS_SUFFIX), "items": _items(keys)}}


def _secret_volume(name: str, keys: Sequence[str]) -> dict[str, Any]:
    return {"secret": {"secretName": name, "items": _items(keys), "defaultMode": 0o440}}


def inputs(raw: Mapping[str, Any]) -> Any:
    """What the template depends on; ``raw`` is ``spec`` as the user wrote it."""
    gateway = raw.get("gateway", {})
    tls = gateway.get("tls", {})
    return {
        "gateway": {name: gateway[name] for name in ("resources", "limits") if name in gateway},
        "tls": {"secretName": tls.get("secretName"), "disabled": "disabled" in tls},
        "authentication": "none" not in gateway.get("authentication", {}),
        "imagePullSecrets": raw.get("imagePullSecrets", []),
        # Only where there is a port for it: what is written here for all would roll the gateways of all.
        **({"metrics": True} if "metrics" in raw.get("security", {}) else {}),
    }
