"""Asks every gateway which files it serves. A rejected update keeps the last good one: it has to be seen."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import aiohttp

from securevllm.render import envoy, readback

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


class HttpGateways:
    """Over the ops port of each gateway pod."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def served(self, pods: Sequence[Pod], port: int) -> Mapping[str, Served | None]:
        """See ``Gateways.served``."""
        answers = await asyncio.gather(*(self._ask(pod, port) for pod in pods))
        return {pod.name: answer for pod, answer in zip(pods, answers, strict=True)}

    async def _ask(self, pod: Pod, port: int) -> Served | None:
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        timeout = aiohttp.ClientTimeout(total=_TIMEOUT)
        try:
            async with (
                self._slots,
                self._session.get(f"http://{host}:{port}{envoy.VERSIONS_PATH}", timeout=timeout) as answer,
            ):
                if answer.status != 200:  # noqa: PLR2004 - HTTP
                    return None
                # A pod is not to be trusted with the operator's memory.
                text = (await answer.content.read(_LIMIT)).decode(errors="replace")
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None
        return Served(readback.parse_versions(text), readback.parse_healthy(text))
