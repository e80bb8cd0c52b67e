"""The audit log as evidence: who wrote what, and in which order."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from e2e.cluster import Cluster

WRITES = frozenset({"create", "update", "patch", "delete", "deletecollection"})


@dataclass(frozen=True, order=True)
class Request:
    """One finished request (audit.k8s.io/v1 Event).

    Attributes:
        began: requestReceivedTimestamp, RFC 3339 with microseconds.
        ended: stageTimestamp.
        verb: as in RBAC.
        resource: plural, for example ``networkpolicies``.
        namespace: empty for cluster-scoped ones.
        name: empty for lists, and for a POST whose name the server knows from the body only.
        subresource: empty for the object itself.
        code: HTTP status.
        user: for example ``system:serviceaccount:ns:name``.
        agent: User-Agent.
        owner: uid of the controller that the body names: of policies and of what makes pods (e2e.cluster.local).
    """

    began: str
    ended: str
    verb: str
    resource: str
    namespace: str
    name: str
    subresource: str
    code: int
    user: str
    agent: str
    owner: str = ""

    @property
    def done(self) -> bool:
        """Whether it changed something."""
        return self.verb in WRITES and self.code < 400


class Audit:
    """Reads the audit log of a cluster."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster

    def requests(self, since: str = "", *, user: str = "", namespace: str = "") -> list[Request]:
        """Requests that began at ``since`` (``now()``) or later, ordered by their end; watches and dry runs aside.

        Args:
            since: a moment of this machine's clock, which is the API server's too.
            user: only of this user.
            namespace: only in this namespace.
        """
        found = [
            request
            for event in self._cluster.audit_events()
            if (request := _request(event)).began >= since
            and request.verb != "watch"
            and "dryRun=" not in event["requestURI"]
            and user in {"", request.user}
            and namespace in {"", request.namespace}
        ]
        return sorted(found, key=lambda request: request.ended)

    def writes(self, since: str = "", *, user: str = "", namespace: str = "") -> list[Request]:
        """Writes that succeeded, Leases aside: they are renewed all the time."""
        asked = self.requests(since, user=user, namespace=namespace)
        return [request for request in asked if request.done and request.resource != "leases"]


def now() -> str:
    """This moment, as the audit log writes it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def named(requests: list[Request], resource: str, name: str, *, verb: str = "") -> Iterator[Request]:
    """Requests for one object."""
    for request in requests:
        if (request.resource, request.name) == (resource, name) and verb in {"", request.verb}:
            yield request


def _request(event: dict[str, Any]) -> Request:
    reference = event.get("objectRef", {})
    owners = event.get("requestObject", {}).get("metadata", {}).get("ownerReferences", ())
    return Request(
        began=event["requestReceivedTimestamp"],
        ended=event["stageTimestamp"],
        verb=event["verb"],
        resource=reference.get("resource", ""),
        namespace=reference.get("namespace", ""),
        name=reference.get("name", ""),
        subresource=reference.get("subresource", ""),
        code=event.get("responseStatus", {}).get("code", 0),
        user=event["user"].get("username", ""),
        agent=event.get("userAgent", ""),
        owner=next((owner["uid"] for owner in owners if owner.get("controller")), ""),
    )
