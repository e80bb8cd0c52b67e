"""What a container of the hollow node runs as: a process of this machine, nothing, or an immediate success.

There is no image, no mount namespace and no network namespace. A runner therefore translates: paths of volume mounts
to folders, and addresses that are a pod's own in a network namespace (`0.0.0.0`, `127.0.0.1`) to the pod's loopback
address.
"""

from __future__ import annotations

import json
import os
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum, auto
from pathlib import Path
from typing import Any

_FAKE_VLLM = Path(__file__).resolve().parents[1] / "fake_vllm" / "vllm"


class Outcome(Enum):
    """What a container does without a process."""

    HOLD = auto()
    """Nothing runs; it counts as running and ready until the pod is deleted. An init container counts as succeeded."""

    SUCCEED = auto()
    """It counts as ended with exit code 0: a Job's pod."""


@dataclass(frozen=True)
class ContainerStart:
    """A container that is about to start.

    Attributes:
        pod: The pod (core/v1).
        container: The container, or init container, of its spec.
        mounts: Mount path -> folder that stands in for it.
        ip: Address of the pod.
        env: Environment of the container, references resolved, nothing of this machine's.
        command: `command` with `$(VAR)` expanded.
        args: `args` with `$(VAR)` expanded.
        dns: Address and UDP port of a server that answers for the cluster's Services.
    """

    pod: Mapping[str, Any]
    container: Mapping[str, Any]
    mounts: Mapping[str, Path]
    ip: str
    env: Mapping[str, str]
    command: Sequence[str]
    args: Sequence[str]
    dns: tuple[str, int]


@dataclass(frozen=True)
class Launch:
    """A process to run.

    Attributes:
        argv: Program and arguments.
        env: All of its environment.
        rewrite: Applied to the text files of ConfigMap, Secret and projected volumes of this container as they are
            written.
    """

    argv: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    rewrite: Callable[[str], str] | None = None


Runner = Callable[[ContainerStart], Launch | Outcome | None]
"""None: not mine, ask the next one; if nobody wants it, `Outcome.HOLD`."""


def first_of(*runners: Runner) -> Runner:
    """Ask runners in turn; the first that does not return None decides."""

    def run(start: ContainerStart) -> Launch | Outcome | None:
        for runner in runners:
            if (decision := runner(start)) is not None:
                return decision
        return None

    return run


def succeed_jobs(start: ContainerStart) -> Outcome | None:
    """Let the containers of Jobs succeed without running anything."""
    owners = start.pod["metadata"].get("ownerReferences", [])
    return Outcome.SUCCEED if any(owner["kind"] == "Job" for owner in owners) else None


def envoy_runner(envoy: Path | str, *, container: str = "envoy") -> Runner:
    """Run containers of this name as a real Envoy.

    The configuration is the pod's own but for the paths of its mounts and the addresses 0.0.0.0, :: and 127.0.0.1,
    which become the pod's. Cluster DNS is added on the command line (`--config-yaml` is merged over the bootstrap),
    as resolv.conf would be in a pod.
    """

    def run(start: ContainerStart) -> Launch | None:
        if start.container["name"] != container:
            return None
        rewrite = _rewriter(start.mounts, start.ip)
        argv = [str(envoy), *(rewrite(argument) for argument in start.args), "--config-yaml", _resolver(*start.dns)]
        return Launch(argv, start.env, rewrite)

    return run


def engine_runner(
    argv: Sequence[str], *, container: str = "vllm", env: Mapping[str, str] | None = None, with_args: bool = True
) -> Runner:
    """Run `argv` for containers of this name.

    Args:
        argv: Program in place of the container's command.
        container: Name of the container.
        env: Wins over the container's environment (an interface name that this machine does not have, PATH, ...).
        with_args: Append the container's arguments, paths of mounts translated.
    """

    def run(start: ContainerStart) -> Launch | None:
        if start.container["name"] != container:
            return None
        paths = _rewriter(start.mounts)
        arguments = [paths(argument) for argument in start.args] if with_args else []
        environment = {name: paths(value) for name, value in start.env.items()} | dict(env or {})
        return Launch([*argv, *arguments], environment)

    return run


def fake_vllm_runner() -> Runner:
    """Run engines as fake-vllm. Pods share the interfaces of this machine, and none takes a port from the others."""
    shared = dict.fromkeys(("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME", "UCX_NET_DEVICES"), "lo")
    shared |= {"PATH": os.environ.get("PATH", ""), "FAKE_VLLM_CONFINED": "1"}

    def run(start: ContainerStart) -> Launch | Outcome | None:
        env = shared | {"FAKE_VLLM_DNS": f"{start.dns[0]}:{start.dns[1]}"}
        return engine_runner([sys.executable, str(_FAKE_VLLM), "serve"], env=env)(start)

    return run


def _rewriter(mounts: Mapping[str, Path], ip: str | None = None) -> Callable[[str], str]:
    # Whole path components only, the longest first: /etc/envoy/x must not match /etc/envoy/xds.
    paths = sorted(mounts, key=len, reverse=True)
    mount = re.compile("|".join(rf"{re.escape(path)}(?![\w.-])" for path in paths)) if paths else None
    # Not inside a longer number, and not in a CIDR range, which says who may connect.
    own = re.compile(r'(?<![\d.])(?:0\.0\.0\.0|127\.0\.0\.1)(?![\d./])|(?<=")::(?=")')

    def rewrite(text: str) -> str:
        if mount:
            text = mount.sub(lambda match: str(mounts[match.group()]), text)
        return own.sub(ip, text) if ip else text

    return rewrite


def _resolver(address: str, port: int) -> str:
    kind = "type.googleapis.com/envoy.extensions.network.dns_resolver.cares.v3.CaresDnsResolverConfig"
    config = {
        "@type": kind,
        "resolvers": [{"socket_address": {"address": address, "port_value": port}}],
        "dns_resolver_options": {"no_default_search_domain": True},
    }
    name = "envoy.network.dns_resolver.cares"
    return json.dumps({"typed_dns_resolver_config": {"name": name, "typed_config": config}})
