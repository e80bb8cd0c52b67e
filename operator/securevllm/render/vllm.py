"""One vLLM process: its command line and its environment, for every topology. Nothing is computed in the pod.

A group's pods differ by their group, their number and their first data-parallel rank only, so a template holds marks
in these places (`GROUP`, `MEMBER`, `RANK`), which ``fill`` replaces. The head of a group is written apart: it *binds*
the addresses that the others connect to, and a name that DNS does not know yet cannot be bound (vLLM 0.33.0:
v1/engine/utils.py, v1/engine/coordinator.py). Flags and their meaning: vLLM 0.33.0, engine/arg_utils.py and
entrypoints/cli/serve.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securevllm import catalogue
from securevllm.api.guard import arguments as guarded
from securevllm.api.units import seconds
from securevllm.render import envoy, fetch, pods
from securevllm.topology import WORKER_OF, Role, Side, Topology

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.api.parse import Accepted
    from securevllm.context import Context
    from securevllm.render.meta import Owner

GROUP, MEMBER, RANK = "$[group]", "$[member]", "$[rank]"
"""Marks of a template: name of the group, number of the pod in it, and its first data-parallel rank.

No argument, variable or label of a user can hold a ``$``.
"""

INTERFACE = "eth0"
"""The pod's interface that policies govern; further ones are refused."""

_NOT_PROXIED = "localhost,127.0.0.1,::1,.svc"
_UNREACHABLE_DOMAIN = "none.invalid"
"""vLLM reads an empty list of media domains as "any"; .invalid never resolves (RFC 6761)."""

_API_SERVERS = 8
"""Most API server processes of one pod: vLLM's default, one for each rank of the whole replica, knows no bound."""


@dataclass(frozen=True)
class Process:
    """What the command line of a pod depends on.

    Attributes:
        owner: the resource.
        accepted: its judged spec.
        context: the cluster.
        topology: of the resource.
        side: which kind of model replica.
        head: whether this is the first pod of a replica; the others share one template.
    """

    owner: Owner
    accepted: Accepted
    context: Context
    topology: Topology
    side: Side
    head: bool = True

    @property
    def spec(self) -> api.Spec:
        """The judged spec."""
        return self.accepted.spec

    @property
    def headless(self) -> bool:
        """Whether the pod has no HTTP server."""
        return not self.head and not self.side.shape.everywhere

    @property
    def role(self) -> Role:
        """The role of the pod."""
        return WORKER_OF[self.side.role] if self.headless else self.side.role

    def port(self, name: str) -> int:
        """The first port of a socket that the head of a replica has."""
        return self.topology.socket(self.side.role, name).port

    @property
    def head_address(self) -> str:
        """Where the head listens, as this pod has to name it.

        The dot at the end keeps the resolver from trying every search domain first.
        """
        return "$(POD_IP)" if self.head else f"{member_host(self.owner, GROUP, 0, self.context)}."


def member_host(owner: Owner, group: str, member: int, context: Context) -> str:
    """DNS name of a group's pod, without a dot at the end: it has one before it is ready."""
    service = owner.child(group)
    return f"{service}-{member}-0.{service}.{owner.namespace}.svc.{context.cluster_domain}"


def arguments(process: Process) -> list[str]:
    """VLLM's arguments: the model first, the user's flags, then the operator's: on a repeat the last one wins."""
    spec = process.spec
    return [
        fetch.path(process.owner, spec) or spec.model.name,
        *guarded.canonical(spec.engine.args),
        f"--served-model-name={spec.model.served_name or spec.model.name}",
        *(["--headless"] if process.headless else ["--host=$(POD_IP)", f"--port={process.port('api')}"]),
        f"--tensor-parallel-size={process.side.parallelism.tensor}",
        f"--pipeline-parallel-size={process.side.parallelism.pipeline}",
        *_parallel(process),
        *_transfer(process),
        # A list ends only at the next flag, so one of ours follows it.
        "--allowed-media-domains",
        *(spec.security.media.allowed_domains or (_UNREACHABLE_DOMAIN,)),
        "--disable-fastapi-docs",
    ]


def _parallel(process: Process) -> Iterator[str]:
    """How the pods of a replica find each other, and what each of them holds."""
    parallelism, shape = process.side.parallelism, process.side.shape
    if parallelism.expert:
        yield "--enable-expert-parallel"
    if parallelism.data is not None:
        yield from _data_parallel(process, parallelism.data)
    elif shape.pods > 1:
        yield f"--nnodes={shape.pods}"
        yield f"--node-rank={MEMBER}"
        yield f"--master-addr={process.head_address}"
        yield f"--master-port={process.port('torch-distributed')}"
    if shape.pods > 1:
        yield "--distributed-executor-backend=mp"
        if process.accepted.version in catalogue.flags().since["--distributed-timeout-seconds"]:
            # PyTorch waits 10 minutes for the other pods; loading a model may take longer.
            yield f"--distributed-timeout-seconds={seconds(process.spec.engine.startup_timeout)}"


def _data_parallel(process: Process, data: api.DataParallel) -> Iterator[str]:
    shape = process.side.shape
    yield f"--data-parallel-size={data.size}"
    servers = {"internal": data.size, "hybrid": shape.ranks, "external": 1}[data.load_balancing]
    if not process.headless:
        yield f"--api-server-count={min(servers, _API_SERVERS)}"
    if shape.pods == 1:
        return
    if data.load_balancing == "external":
        yield f"--data-parallel-rank={RANK}"
        yield "--data-parallel-external-lb"
    else:
        yield f"--data-parallel-size-local={shape.ranks}"
        # On a pod with HTTP this flag alone would switch to hybrid.
        if process.headless or data.load_balancing == "hybrid":
            yield f"--data-parallel-start-rank={RANK}"
        if data.load_balancing == "hybrid":
            yield "--data-parallel-hybrid-lb"
    yield f"--data-parallel-address={process.head_address}"
    yield f"--data-parallel-rpc-port={process.port('data-parallel-rpc')}"


def _transfer(process: Process) -> Iterator[str]:
    """What moves the KV cache, and who is told of it."""
    split, side = process.spec.disaggregation, process.side
    if split is not None:
        connector = catalogue.connectors()[split.connector]
        settings = {"kv_connector": connector.name, "kv_role": connector.roles[side.role.value]}
        yield f"--kv-transfer-config={_json(settings | connector.settings(process.accepted.version))}"
    if process.spec.security.kv_events is not None:
        # "*" makes vLLM listen; any other host would make it connect (distributed/kv_events.py).
        endpoint = f"tcp://*:{process.port('kv-events')}"
        yield f"--kv-events-config={_json({'enable_kv_cache_events': True, 'publisher': 'zmq', 'endpoint': endpoint})}"


def _json(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def environment(process: Process, key: dict[str, Any]) -> list[dict[str, Any]]:
    """The container's variables; ours come last, and the guard refused their names.

    Args:
        process: whose.
        key: the variable that holds the engines' own API key.
    """
    spec = process.spec
    fixed = catalogue.environment().fixed | {
        "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(envoy.ENGINE_KEEP_ALIVE_SECONDS),
        **_media(spec.security.media),
        **_proxy(spec, process.context.cluster_domain),
        # One clock for the start: vLLM's own would give up after 10 minutes.
        "VLLM_ENGINE_READY_TIMEOUT_S": str(seconds(spec.engine.startup_timeout)),
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
        "GLOO_SOCKET_IFNAME": INTERFACE,
        "NCCL_SOCKET_IFNAME": INTERFACE,
    }
    hosts = []
    match spec.disaggregation.connector if spec.disaggregation is not None else None:
        case "nixl":
            # vLLM's default is localhost: decode would look for prefill in its own pod.
            hosts.append(pods.field_env("VLLM_NIXL_SIDE_CHANNEL_HOST", "status.podIP"))
            fixed["VLLM_NIXL_SIDE_CHANNEL_PORT"] = str(process.port("nixl-side-channel"))
            fixed["UCX_NET_DEVICES"] = INTERFACE
        case "mooncake" if process.side.role is Role.PREFILL:
            fixed["VLLM_MOONCAKE_BOOTSTRAP_PORT"] = str(process.port("mooncake-bootstrap"))
    return [
        pods.field_env("POD_IP", "status.podIP"),
        # Unset, vLLM dials 8.8.8.8 to find its address and falls back to 0.0.0.0.
        pods.field_env("VLLM_HOST_IP", "status.podIP"),
        *hosts,
        key,
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


def _proxy(spec: api.Spec, domain: str) -> dict[str, str]:
    """Both spellings: libraries differ in which one they read. Nothing within the pod and the cluster goes through."""
    url = next((entry.proxy for entry in spec.security.egress if entry.proxy is not None), None)
    if url is None:
        return {}
    names = {"HTTP_PROXY": url, "HTTPS_PROXY": url, "NO_PROXY": f"{_NOT_PROXIED},.{domain},.{domain}."}
    return names | {name.lower(): value for name, value in names.items()}


def fill(template: Any, group: str, member: int, rank: int) -> Any:
    """The template of one pod: its marks replaced, everywhere in JSON data."""
    if isinstance(template, str):
        if "$[" not in template:
            return template
        return template.replace(GROUP, group).replace(MEMBER, str(member)).replace(RANK, str(rank))
    if isinstance(template, dict):
        return {name: fill(value, group, member, rank) for name, value in template.items()}
    if isinstance(template, list | tuple):
        return [fill(value, group, member, rank) for value in template]
    return template
