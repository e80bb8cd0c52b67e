"""Canary pods, from creation to removal: a listener on each node that is measured, and one prober. Edge.

They are gone when a measurement ends, however it ends; what an operator leaves behind that died in between ends by
itself (``activeDeadlineSeconds``), goes with the resource, and is removed before the next measurement. A quota or an
admission policy that refuses them is no error: what it costs is told.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self

import structlog

from securevllm.api.kinds import POD, Ref
from securevllm.errors import ApiError
from securevllm.proof.targets import is_ready
from securevllm.proof.wire import Reach, Target, load_answers
from securevllm.render import canary
from securevllm.status.facts import trouble

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject
    from securevllm.children import Cache
    from securevllm.cluster import Kubernetes
    from securevllm.render.canary import Maker
    from securevllm.render.meta import Object

log = structlog.stdlib.get_logger(__name__)

_START_SECONDS = 45.0
_PROBE_SECONDS = 60.0
_LOOK = 0.1


@dataclass(frozen=True)
class Listener:
    """A pod of ours that accepts connections on a node, on all its addresses: one of each family."""

    pod: str
    node: str
    addresses: tuple[str, ...]


@dataclass(frozen=True)
class Refused:
    """What could not be measured, and why, for a person."""

    why: str


class Canaries:
    """Makes and removes the canary pods of one measurement; an asynchronous context manager.

    Args:
        kubernetes: the API.
        cache: knows the pods that are made, while they are there.
        maker: for what and where they are made.
        left: which pods are left over from an earlier measurement, and are removed first.
    """

    def __init__(self, kubernetes: Kubernetes, cache: Cache, maker: Maker, left: Callable[[KubeObject], bool]) -> None:
        self._kubernetes, self._cache, self.maker, self._left = kubernetes, cache, maker, left
        self._made: dict[str, str] = {}
        self._creating: set[asyncio.Task[KubeObject]] = set()

    async def __aenter__(self) -> Self:
        await self._remove(
            (pod["metadata"]["name"], pod["metadata"]["uid"])
            for pod in self._cache.all(POD, self.maker.namespace)
            if canary.is_canary(pod, self.maker.manager) and self._left(pod)
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        # Shielded: a stop, or Ctrl-C, must not leave pods behind.
        await asyncio.shield(self._end())

    async def listeners(self, ports: Mapping[str, tuple[int, ...]]) -> tuple[list[Listener], list[str]]:
        """A listener on each node.

        Args:
            ports: by node.

        Returns:
            Those that accept, and what is lacking.
        """
        found = await asyncio.gather(*(self._listener(node, numbers) for node, numbers in sorted(ports.items())))
        return [item for item in found if isinstance(item, Listener)], _unique(found)

    async def _listener(self, node: str, ports: tuple[int, ...]) -> Listener | Refused:
        pod = canary.listener(self.maker, self._name(), node=node, ports=ports)
        live = await self._run(pod, is_ready, _START_SECONDS)
        if isinstance(live, Refused):
            return live
        addresses = tuple(item["ip"] for item in live["status"]["podIPs"])
        return Listener(live["metadata"]["name"], node, addresses)

    async def probe(self, targets: Sequence[Target]) -> dict[str, Reach] | Refused:
        """What a prober in the namespace reaches, by the targets' keys."""
        pod = canary.prober(self.maker, self._name(), targets=tuple(targets))
        live = await self._run(pod, _ended, _PROBE_SECONDS)
        if isinstance(live, Refused):
            return live
        ended = live["status"]["containerStatuses"][0]["state"].get("terminated", {})
        try:
            return load_answers(ended.get("message", ""))
        except ValueError:
            return Refused(f"the canary pod ended without an answer (exit code {ended.get('exitCode')}).")

    def _name(self) -> str:
        return f"{self.maker.owner.name}-canary-{secrets.token_hex(4)}"

    async def _run(self, pod: Object, there: Callable[[KubeObject], bool], seconds: float) -> KubeObject | Refused:
        """Create a pod and wait for it."""
        ref = Ref.of(pod)
        creating = asyncio.create_task(self._create(pod))
        self._creating.add(creating)
        creating.add_done_callback(self._creating.discard)
        try:
            # Shielded: a request that is on its way makes a pod, also when nobody waits for the answer any more.
            made = await asyncio.shield(creating)
        except ApiError as error:
            return Refused(f"canary pods cannot be made: {error}.")
        try:
            async with asyncio.timeout(seconds):
                while True:
                    live = self._cache.get(ref)
                    if live is None:
                        return Refused("a canary pod was removed by somebody else.")
                    if there(live):
                        return live
                    if live.get("status", {}).get("phase") == "Failed":
                        return Refused(f"a canary pod failed: {trouble([live]) or live['status'].get('reason', '')}.")
                    await asyncio.sleep(_LOOK)
        except TimeoutError:
            why = trouble([self._cache.get(ref) or made]).removeprefix(f"{ref.name}: ")
            return Refused(f"a canary pod did not get ready within {seconds:.0f} s{f' ({why})' if why else ''}.")

    async def _create(self, pod: Object) -> KubeObject:
        made = await self._kubernetes.create(pod)
        self._made[made["metadata"]["name"]] = made["metadata"]["uid"]
        self._cache.wrote(made)
        return made

    async def _end(self) -> None:
        await asyncio.gather(*self._creating, return_exceptions=True)
        await self._remove(self._made.items())

    async def _remove(self, pods: Iterable[tuple[str, str]]) -> None:
        await asyncio.gather(*(self._delete(name, uid) for name, uid in [*pods]))

    async def _delete(self, name: str, uid: str) -> None:
        ref = Ref(POD, self.maker.namespace, name)
        try:
            await self._kubernetes.delete(ref, uid=uid)
        except ApiError as error:
            log.warning("canary pod not removed, it ends by itself", pod=name, error=str(error))
        self._made.pop(name, None)


def _ended(pod: KubeObject) -> bool:
    statuses = pod.get("status", {}).get("containerStatuses", ())
    return bool(statuses) and "terminated" in statuses[0].get("state", {})


def _unique(found: Iterable[Listener | Refused]) -> list[str]:
    return sorted({f"{item.why[0].upper()}{item.why[1:]}" for item in found if isinstance(item, Refused)})
