"""Which installation of the operator cares for a resource, so that two over one namespace never act on one resource.

    status.operator: <namespace>/<name of the Lease>

The mark is in the status because a tenant's roles, ``admin`` included, hold no right to that: it cannot be forged to
keep an operator away. Whoever comes first writes it, with the resourceVersion that it has seen, so that of two one is
refused; the other leaves the resource alone, and says so by a log line and an Event. No time makes a mark void: an
installation that does not answer may only be slow. ``--take-over`` names those that are gone.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING

import structlog

from securevllm.api.kinds import KubeObject, Ref
from securevllm.errors import Conflict

if TYPE_CHECKING:
    from securevllm.cluster import Kubernetes

log = structlog.stdlib.get_logger(__name__)

_CONFLICTS = 4

REASON = "OtherOperator"
"""Reason of the Event on a resource of another installation."""


def operator_of(resource: KubeObject) -> str:
    """The installation that cares for a resource; empty when none does yet."""
    return str(resource.get("status", {}).get("operator", ""))


class Claims:
    """Claims resources for one installation.

    Args:
        kubernetes: the API.
        installation: this one, ``<namespace>/<name of its Lease>``.
        take_over: installations that are gone, whose resources become this one's.
    """

    def __init__(self, kubernetes: Kubernetes, installation: str, take_over: Collection[str] = ()) -> None:
        self._kubernetes, self._installation = kubernetes, installation
        self._free = frozenset({"", *take_over})
        self._told: dict[Ref, tuple[str, str]] = {}

    def is_foreign(self, resource: KubeObject) -> bool:
        """Whether another installation cares for it."""
        return operator_of(resource) not in {self._installation, *self._free}

    async def claim(self, resource: KubeObject) -> KubeObject | None:
        """The resource, marked as this installation's; None when it is another's.

        Raises:
            NotFound: it is gone.
            Conflict: it changes faster than it can be marked, or was recreated.
            ApiError: it could not be marked.
        """
        ref, uid = Ref.of(resource), resource["metadata"]["uid"]
        for _ in range(_CONFLICTS):
            if operator_of(resource) == self._installation:
                self._told.pop(ref, None)
                return resource
            if self.is_foreign(resource):
                await self._tell(ref, resource)
                return None
            try:
                return await self._kubernetes.patch_status(
                    ref,
                    {"operator": self._installation},
                    uid=uid,
                    resource_version=resource["metadata"]["resourceVersion"],
                )
            except Conflict:
                resource = await self._kubernetes.get(ref)
        raise Conflict(f"{ref} changes faster than it can be claimed")

    def forget(self, ref: Ref) -> None:
        """The resource is gone."""
        self._told.pop(ref, None)

    async def _tell(self, ref: Ref, resource: KubeObject) -> None:
        """Once for each resource and owner."""
        now = resource["metadata"]["uid"], operator_of(resource)
        if self._told.get(ref) == now:
            return
        self._told[ref] = now
        note = (
            f"The operator {self._installation} leaves it alone: status.operator says that {now[1]} cares for it. "
            f"If that installation is gone, run this one with --take-over={now[1]}."
        )
        log.warning("resource of another operator", resource=str(ref), operator=now[1], fix=f"--take-over={now[1]}")
        await self._kubernetes.post_event(resource, reason=REASON, note=note, action="Reconcile", warning=True)
