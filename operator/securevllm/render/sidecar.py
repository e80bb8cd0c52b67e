"""The Envoy beside an engine that lets the declared peers scrape its metrics: ``GET /metrics``, and nothing else.

The engine's own port stays closed to them: it has every other route behind it. Pods without an HTTP server have no
sidecar, because vLLM counts at the head of a replica.

It is an ordinary container, so it starts when the gate has let the pod go on, and no sooner. The engine listens on the
pod's address, which no file can know before there is a pod: the whole configuration is an argument, in which kubelet
puts ``$(POD_IP)``. So it is pinned with the pod template, and an operator upgrade changes none that runs.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securevllm.errors import InternalError
from securevllm.render import envoy, pods

if TYPE_CHECKING:
    from securevllm.context import Context
    from securevllm.render.meta import Object, Owner
    from securevllm.topology import Role, Topology

NAME = SOCKET = "metrics"
"""Of the container, of its port (monitors ask for it) and of the socket in the topology."""

PATH = envoy.SCRAPE_PATH
USER = GROUP = 65532  # "nonroot" of the distroless image: another user than the engine's

_MEMORY_MIB = 128
_HEAP_SHARE = 0.75
_STARTS_WITHIN_SECONDS = 120
_UPSTREAM_IDLE_SECONDS = 3
_VARIABLE = "$("


@dataclass(frozen=True)
class SidecarModel:
    """All that the configuration depends on.

    Attributes:
        name: node id.
        listen_port: where peers scrape.
        engine_port: vLLM's HTTP API.
        address: of the pod; kubelet replaces the variable.
        heap_bytes: below the container's memory limit.
        connections: from peers; more are refused.
        scrapes: in ``per_seconds``, of all peers together; more get 429.
        per_seconds: see there.
        answer_seconds: longest time until vLLM has answered.
    """

    name: str
    listen_port: int
    engine_port: int
    address: str = "$(POD_IP)"
    heap_bytes: int = int(_MEMORY_MIB * 2**20 * _HEAP_SHARE)
    connections: int = 64
    scrapes: int = 20
    per_seconds: float = 1
    answer_seconds: float = 30


@functools.lru_cache(maxsize=256)
def config(model: SidecarModel) -> str:
    """Envoy's bootstrap as JSON in one line; equal models give equal text.

    Raises:
        InternalError: kubelet would put more into it than the pod's address.
    """
    values = {
        "model": model,
        "path": PATH,
        "stripped_headers": envoy.STRIPPED_HEADERS,
        "stripped_prefixes": (*envoy.STRIPPED_PREFIXES, envoy.WEBSOCKET_PREFIX),
    }
    text = json.dumps(envoy.filled(envoy.SIDECAR_FILE, values), separators=(",", ":"))
    if text.replace(model.address, "").count(_VARIABLE):
        raise InternalError(f"{envoy.SIDECAR_FILE} holds a variable other than {model.address}")
    return text


def arguments(model: SidecarModel) -> list[str]:
    """Command line of the container."""
    return [
        "--config-yaml",
        config(model),
        "--concurrency",
        "1",
        "--log-level",
        "warning",
        "--disable-hot-restart",
    ]


def has(topology: Topology, role: Role) -> bool:
    """Whether the pods of a role have the sidecar."""
    return any((socket.role, socket.name) == (role, SOCKET) for socket in topology.sockets)


def container(owner: Owner, topology: Topology, role: Role, context: Context) -> Object:
    """The container of a role that has one."""
    port = topology.socket(role, SOCKET).port
    model = SidecarModel(owner.child(NAME), port, topology.socket(role, "api").port)
    found: dict[str, Any] = {
        "name": NAME,
        "image": context.gateway_image,
        "args": arguments(model),
        "env": [pods.field_env("POD_IP", "status.podIP")],
        "ports": [{"name": NAME, "containerPort": port, "protocol": "TCP"}],
        "resources": {"requests": {"cpu": "10m", "memory": "64Mi"}, "limits": {"memory": f"{_MEMORY_MIB}Mi"}},
        "securityContext": pods.CONTAINER_SECURITY | {"runAsUser": USER, "runAsGroup": GROUP},
        # A pod that is Ready listens here, which the prober relies on. No other probe: an engine must not lose its
        # requests because nobody can count them.
        "startupProbe": {"tcpSocket": {"port": port}, "periodSeconds": 1, "failureThreshold": _STARTS_WITHIN_SECONDS},
    }
    return found
