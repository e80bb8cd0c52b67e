"""The namespace's default-deny: there before the first pod, gone after the last one (I2).

It has no owner, because the garbage collector removes policies and pods side by side. So this decides when nobody
needs it any more, by two live looks with a pause: a ReplicaSet that the garbage collector has not reached yet could
still make a pod after the first.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import structlog

from securevllm.api.kinds import DEPLOYMENT, JOB, NETWORK_POLICY, POD, SECURE_VLLM_DEPLOYMENT, STATEFUL_SET, Ref
from securevllm.context import FIELD_MANAGER
from securevllm.errors import Conflict
from securevllm.render.meta import DENY_NAME, ISOLATION, MANAGED_BY, RESOURCE_LABEL, stamp
from securevllm.render.policies import default_deny

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject
    from securevllm.children import Cache, Children, Outcome
    from securevllm.cluster import Kubernetes

log = structlog.stdlib.get_logger(__name__)

_AGAIN = 2.0
_SETTLED = 10.0
_REFUSED = 30.0

_USERS = (
    (SECURE_VLLM_DEPLOYMENT, None),
    (DEPLOYMENT, f"{MANAGED_BY}={FIELD_MANAGER}"),
    (STATEFUL_SET, f"{MANAGED_BY}={FIELD_MANAGER}"),
    (JOB, f"{MANAGED_BY}={FIELD_MANAGER}"),
    (POD, RESOURCE_LABEL),
)
"""What must not be there, by kind and label: resources, what makes their pods, and their pods."""


class DefaultDeny:
    """Keeps and removes the default-deny of every namespace."""

    def __init__(
        self, kubernetes: Kubernetes, cache: Cache, children: Children, monotonic: Callable[[], float]
    ) -> None:
        self._kubernetes, self._cache, self._children, self._monotonic = kubernetes, cache, children, monotonic
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()
        self._empty_since: dict[str, float] = {}

    @asynccontextmanager
    async def used(self, namespace: str) -> AsyncIterator[Outcome]:
        """Have it, and keep it while pods may be made; gives what came of it.

        Any number of resources side by side, but none while it is being judged.
        """
        async with self._lock(namespace):
            self._users[namespace] += 1
        try:
            self._empty_since.pop(namespace, None)
            yield await self._bring(namespace)
        finally:
            self._users[namespace] -= 1

    async def tidy(self, namespace: str) -> float | None:
        """Keep it while anybody needs it, then remove it; gives the seconds until the next look."""
        async with self._lock(namespace):
            resources = bool(self._cache.all(SECURE_VLLM_DEPLOYMENT, namespace))
            if resources or self._users[namespace] or self._has_pods(namespace):
                self._empty_since.pop(namespace, None)
                outcome = await self._bring(namespace)
                if outcome.failures:
                    return outcome.again or _REFUSED  # refused, for example in a namespace that is being deleted
                return None if resources else _AGAIN
            deny = self._cache.get(Ref(NETWORK_POLICY, namespace, DENY_NAME))
            if deny is None:
                self._empty_since.pop(namespace, None)
                return None
            return await self._remove(namespace, deny)

    async def _remove(self, namespace: str, deny: KubeObject) -> float | None:
        """Only a live look counts: the cache may not have seen what was just made."""
        for kind, label in _USERS:
            if (await self._kubernetes.list(kind, namespace, label)).items:
                self._empty_since.pop(namespace, None)
                return _AGAIN
        now = self._monotonic()
        left = self._empty_since.setdefault(namespace, now) + _SETTLED - now
        if left > 0:
            return left
        ref, metadata = Ref.of(deny), deny["metadata"]
        try:
            await self._kubernetes.delete(ref, uid=metadata["uid"], resource_version=metadata["resourceVersion"])
        except Conflict:
            self._cache.forget(deny)
            return _AGAIN
        self._cache.forget(deny)
        del self._empty_since[namespace]
        log.info("default-deny removed: no resource and no pod is left", namespace=namespace)
        return None

    async def _bring(self, namespace: str) -> Outcome:
        return await self._children.bring([stamp(default_deny(namespace))], None, component=ISOLATION)

    def _has_pods(self, namespace: str) -> bool:
        return any(RESOURCE_LABEL in pod["metadata"].get("labels", {}) for pod in self._cache.all(POD, namespace))

    def _lock(self, namespace: str) -> asyncio.Lock:
        return self._locks.setdefault(namespace, asyncio.Lock())
