"""Policies of other kinds: whether there are any. They are not evaluated; a verdict says that they are there. Edge."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import TYPE_CHECKING

from securevllm.api.kinds import Kind
from securevllm.errors import ApiError, NotFound

if TYPE_CHECKING:
    from securevllm.cluster import Kubernetes

NAMESPACED = (
    Kind("cilium.io/v2", "CiliumNetworkPolicy", "ciliumnetworkpolicies"),
    Kind("crd.projectcalico.org/v1", "NetworkPolicy", "networkpolicies"),
)
CLUSTER = (
    Kind("cilium.io/v2", "CiliumClusterwideNetworkPolicy", "ciliumclusterwidenetworkpolicies", namespaced=False),
    Kind("crd.projectcalico.org/v1", "GlobalNetworkPolicy", "globalnetworkpolicies", namespaced=False),
    Kind("policy.networking.k8s.io/v1alpha1", "AdminNetworkPolicy", "adminnetworkpolicies", namespaced=False),
    Kind(
        "policy.networking.k8s.io/v1alpha1",
        "BaselineAdminNetworkPolicy",
        "baselineadminnetworkpolicies",
        namespaced=False,
    ),
)
_FRESH_SECONDS = 60.0


class Others:
    """Looks for them, at most once a minute for each place.

    Args:
        kubernetes: the API.
        monotonic: clock, seconds.
        everywhere: whether the operator may look at what belongs to no namespace.
    """

    def __init__(self, kubernetes: Kubernetes, monotonic: Callable[[], float], *, everywhere: bool) -> None:
        self._kubernetes, self._monotonic = kubernetes, monotonic
        self._everywhere = everywhere
        self._known: dict[tuple[Kind, str | None], tuple[float, str]] = {}

    async def __call__(self, namespace: str) -> tuple[str, ...]:
        """What there is beside NetworkPolicies, for a person."""
        places: list[tuple[Kind, str | None]] = [(kind, namespace) for kind in NAMESPACED]
        if self._everywhere:
            places += [(kind, None) for kind in CLUSTER]
        told = await asyncio.gather(*(self._look(*place) for place in places))
        found = [name for name in told if name]
        return (*found, *(() if self._everywhere else ("policies of the whole cluster (not allowed to look)",)))

    async def _look(self, kind: Kind, namespace: str | None) -> str:
        at, told = self._known.get((kind, namespace), (float("-inf"), ""))
        now = self._monotonic()
        if now - at < _FRESH_SECONDS:
            return told
        name = f"{kind.kind} of {kind.group.removeprefix('crd.')}"
        try:
            told = f"{name} (present)" if (await self._kubernetes.list(kind, namespace)).items else ""
        except NotFound:
            told = ""  # the cluster does not know the kind
        except ApiError:
            told = f"{name} (cannot be looked for)"
        self._known[kind, namespace] = (now, told)
        return told
