"""Asks every gateway which files it serves, and nudges those that lag behind.

A rejected update keeps the last good file, revoked keys included: it has to be seen. ``HttpGateways`` asks;
``ReadBack`` compares the answers with what was rendered.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

import aiohttp
import structlog

from securevllm.api.kinds import Ref
from securevllm.children import pods_of
from securevllm.errors import Conflict, Forbidden, NotFound
from securevllm.render import envoy, readback
from securevllm.render.meta import REVISION_ANNOTATION, ROLE_LABEL
from securevllm.status import Gateway as Facts
from securevllm.topology import Role

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject
    from securevllm.children import Cache
    from securevllm.cluster import Kubernetes
    from securevllm.render import Rendered
    from securevllm.render.meta import Owner

log = structlog.stdlib.get_logger(__name__)

_TIMEOUT = 2.0
_LIMIT = 256 * 1024
_AT_ONCE = 16


@dataclass(frozen=True)
class Pod:
    """A gateway pod that may be asked."""

    name: str
    address: str


@dataclass(frozen=True)
class Served:
    """What a gateway says of itself.

    Attributes:
        versions: file name to the version that it enforces.
        engines: engines that it may send requests to.
    """

    versions: Mapping[str, str]
    engines: int


class Gateways(Protocol):
    """Reads back what gateways serve."""

    async def served(self, pods: Sequence[Pod], port: int) -> Mapping[str, Served | None]:
        """Per pod name what it serves; None when it did not answer."""

    async def engine_versions(self, pods: Sequence[Pod], port: int) -> frozenset[str]:
        """What an engine behind each of them says of its version; without those that did not answer."""


class HttpGateways:
    """Over the ops port of each gateway pod."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def served(self, pods: Sequence[Pod], port: int) -> Mapping[str, Served | None]:
        """See ``Gateways.served``."""
        answers = await asyncio.gather(*(self._ask_twice(pod, port) for pod in pods))
        return {pod.name: answer for pod, answer in zip(pods, answers, strict=True)}

    async def engine_versions(self, pods: Sequence[Pod], port: int) -> frozenset[str]:
        """See ``Gateways.engine_versions``."""
        texts = await asyncio.gather(*(self._get(pod, port, envoy.ENGINE_VERSION_PATH) for pod in pods))
        return frozenset(filter(None, (readback.parse_engine_version(text or "") for text in texts)))

    async def _ask_twice(self, pod: Pod, port: int) -> Served | None:
        """One lost packet is no news."""
        return await self._ask(pod, port) or await self._ask(pod, port)

    async def _ask(self, pod: Pod, port: int) -> Served | None:
        text = await self._get(pod, port, envoy.VERSIONS_PATH)
        return None if text is None else Served(readback.parse_versions(text), readback.parse_healthy(text))

    async def _get(self, pod: Pod, port: int, path: str) -> str | None:
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
        try:
            async with (
                self._slots,
                self._session.get(f"http://{host}:{port}{path}", timeout=timeout, allow_redirects=False) as answer,
            ):
                if answer.status != 200:  # noqa: PLR2004 - HTTP
                    return None
                # A pod is not to be trusted with the operator's memory.
                return (await answer.content.read(_LIMIT)).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None


@dataclass
class _Poll:
    """What is not served everywhere yet; the pause grows until something else is awaited."""

    awaited: str
    pause: float = 0.2

    def next(self) -> float:
        pause, self.pause = self.pause, min(self.pause * 1.5, 10.0)
        return pause


@dataclass(frozen=True)
class _Heard:
    """Versions that these engines have said they are: a gateway's answer is that of any one of them."""

    engines: frozenset[tuple[str, ...]]
    versions: frozenset[str]


class ReadBack:
    """Which gateways serve the current files."""

    def __init__(self, kubernetes: Kubernetes, cache: Cache, gateways: Gateways) -> None:
        self._kubernetes, self._cache, self._gateways = kubernetes, cache, gateways
        self._polls: dict[tuple[str, str], _Poll] = {}
        self._heard: dict[tuple[str, str], _Heard] = {}

    def forget(self, namespace: str, name: str) -> None:
        """The resource is gone."""
        self._polls.pop((namespace, name), None)
        self._heard.pop((namespace, name), None)

    async def look(self, owner: Owner, rendered: Rendered, engines: int) -> tuple[Facts, float | None]:
        """Ask, and nudge.

        Args:
            owner: the resource.
            rendered: what its gateways should serve; it was written to the cluster.
            engines: engines that are ready, and that every gateway should know.

        Returns:
            What was found, and the seconds until the next look; None: all is as it should be.
        """
        pods = [pod for pod in pods_of(self._cache, owner) if _running(pod, Role.GATEWAY)]
        if not pods:
            self._polls.pop((owner.namespace, owner.name), None)
            return Facts(), None
        expected = readback.versions_of(rendered.served_files())
        addresses = [Pod(pod["metadata"]["name"], pod["status"]["podIP"]) for pod in pods]
        port = rendered.topology.socket(Role.GATEWAY, "ops").port
        answers = await self._gateways.served(addresses, port)
        stale = {
            name: tuple(sorted(file for file, version in expected.items() if served.versions.get(file) != version))
            for name, served in answers.items()
            if served is not None
        }
        found = Facts(
            stale,
            silent=tuple(sorted(name for name, served in answers.items() if served is None)),
            unconnected=tuple(sorted(name for name, served in answers.items() if served and not served.engines)),
        )
        key = owner.namespace, owner.name
        if not found.silent and not any(stale.values()) and not (engines and found.unconnected):
            self._polls.pop(key, None)
            if engines and rendered.topology.entry is Role.ENGINE:
                said = await self._gateways.engine_versions(addresses, port)
                found = replace(found, reported=tuple(sorted(self._all_said(owner, said))))
            return found, None
        revision = rendered.revision()
        await asyncio.gather(*(self._nudge(pod, revision) for pod in pods if stale.get(pod["metadata"]["name"])))
        awaited = f"{revision} {engines}"
        poll = self._polls.get(key)
        if poll is None or poll.awaited != awaited:
            poll = self._polls[key] = _Poll(awaited)
        return found, poll.next()

    def _all_said(self, owner: Owner, said: frozenset[str]) -> frozenset[str]:
        """What the engines have said since the last of them started."""
        engines = frozenset(
            (pod["metadata"]["uid"], one["name"], str(one.get("containerID")))
            for pod in pods_of(self._cache, owner)
            if _running(pod, Role.ENGINE)
            for one in pod["status"].get("containerStatuses", ())
        )
        key = owner.namespace, owner.name
        before = self._heard.get(key)
        if before is not None and before.engines == engines:
            said |= before.versions
        self._heard[key] = _Heard(engines, said)
        return said

    async def _nudge(self, pod: KubeObject, revision: str) -> None:
        if pod["metadata"].get("annotations", {}).get(REVISION_ANNOTATION) == revision:
            return
        body = {"metadata": {"annotations": {REVISION_ANNOTATION: revision}, "uid": pod["metadata"]["uid"]}}
        try:
            self._cache.wrote(await self._kubernetes.patch(Ref.of(pod), body))
        except (NotFound, Conflict):
            self._cache.forget(pod)
        except Forbidden as error:
            name = pod["metadata"]["name"]
            log.warning("gateway pod not nudged, kubelet takes up to 80 s", pod=name, error=str(error))


def _running(pod: KubeObject, role: Role) -> bool:
    status, metadata = pod.get("status", {}), pod["metadata"]
    return bool(
        metadata["labels"].get(ROLE_LABEL) == role
        and status.get("podIP")
        and status.get("phase") == "Running"
        and not metadata.get("deletionTimestamp")
    )
