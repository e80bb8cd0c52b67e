"""What the reconciler asks about the isolation of one resource, and what it tells the prober. Edge: reads the cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Protocol

from securevllm.api import kinds
from securevllm.api.units import seconds
from securevllm.children import labelled, pods_of
from securevllm.proof.foreign import told, wider
from securevllm.proof.held import held
from securevllm.proof.prober import Gateways, Subject, Who
from securevllm.proof.report import age
from securevllm.proof.targets import requests
from securevllm.proof.verdict import REACHABLE, Proof
from securevllm.render import gateway
from securevllm.render.meta import VERIFY_ANNOTATION, digest
from securevllm.topology import Role

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject
    from securevllm.api.parse import Accepted
    from securevllm.children import Cache
    from securevllm.context import Context
    from securevllm.render import Rendered
    from securevllm.render.meta import Owner
    from securevllm.status import Facts

_TELL_AGAIN = timedelta(hours=1)
"""``lastVerified`` moves with the verdict, and that often without one: a status that moves with every round would be a
write for nothing. The fresh time is a metric."""
_KEPT = timedelta(hours=2)
"""How long the verdict of an earlier leader holds for one that has not measured yet."""
_MEASURED = REACHABLE | {"Measured", "ForbiddenRouteOpen"}


class Follows(Protocol):
    """The prober, as far as the reconciler knows it."""

    def follow(self, subject: Subject, before: Proof | None = None) -> None:
        """Measure a resource from now on."""

    def forget(self, who: Who) -> None:
        """Measure it no more."""

    def proof(self, who: Who, uid: str) -> Proof | None:
        """The verdict so far."""


@dataclass(frozen=True)
class Evidence:
    """What is known when a reconcile begins.

    Attributes:
        proof: the last verdict.
        held: pods that their gates hold back.
        foreign: what policies of others open.
        wider: how many of them.
        again: seconds until another look makes sense; None: no need.
    """

    proof: Proof | None = None
    held: tuple[str, ...] = ()
    foreign: str = ""
    wider: int = 0
    again: float | None = None


class Evidences:
    """Gathers evidence.

    Args:
        cache: what the watches told: all NetworkPolicies, and the pods of resources.
        prober: measures.
        context: where the operator runs.
        now: wall clock, UTC.
        canary_pods: whether they may be made.
    """

    def __init__(
        self, cache: Cache, prober: Follows, context: Context, now: Callable[[], datetime], *, canary_pods: bool
    ) -> None:
        self._cache, self._prober, self._context, self._now = cache, prober, context, now
        self._canary_pods = canary_pods

    def gather(self, owner: Owner, rendered: Rendered, status: Mapping[str, Any]) -> Evidence:
        """What is known of a resource.

        Args:
            owner: the resource.
            rendered: what it should have.
            status: its status as it is.
        """
        pods = pods_of(self._cache, owner)
        templates = [obj["spec"]["template"] for obj in (*rendered.workloads, *rendered.withheld)]
        opened = wider(
            owner.namespace,
            owner.label,
            (rendered.deny, *rendered.isolation),
            self._policies(owner),
            (*templates, *pods),
        )
        waiting = held(pods, self._now())
        proof = self._prober.proof(Who(owner.namespace, owner.name), owner.uid) or self._left(status)
        return Evidence(proof, waiting.pods, told(opened), len({item.policy for item in opened}), waiting.again)

    def _policies(self, owner: Owner) -> Iterator[KubeObject]:
        """Without those that ask for the label of another resource: of a hundred resources, most."""
        for label in ("", owner.label):
            yield from self._cache.indexed(labelled(kinds.NETWORK_POLICY, owner.namespace, label))

    def add(self, facts: Facts, evidence: Evidence, wanted: Accepted, status: Mapping[str, Any]) -> Facts:
        """The facts with the evidence."""
        return replace(
            facts,
            proof=evidence.proof,
            held=evidence.held,
            foreign=evidence.foreign,
            gate_disabled=wanted.spec.security.gate.disabled or "",
            verified=self._verified(evidence.proof, status),
        )

    def follow(
        self,
        resource: KubeObject,
        owner: Owner,
        wanted: Accepted,
        rendered: Rendered,
        prober_key: bytes,
        *,
        evidence: Evidence,
    ) -> None:
        """Tell the prober what to measure; nothing in mode Disabled.

        What others' policies open counts as a change, also when they are gone: what was measured before is old then.
        """
        spec, who = wanted.spec, Who(owner.namespace, owner.name)
        if spec.security.verification.mode == "Disabled":
            self._prober.forget(who)
            return
        verify_at = resource["metadata"].get("annotations", {}).get(VERIFY_ANNOTATION, "")
        authenticated = spec.gateway.authentication.none is None
        allowed = [(route.method, route.path) for route in gateway.allowed_routes(spec, wanted.version)]
        plain = spec.gateway.tls.disabled is not None
        subject = Subject(
            owner,
            spec,
            rendered.topology,
            Gateways(
                rendered.topology.socket(Role.GATEWAY, "http" if plain else "https").port,
                "" if plain else spec.gateway.tls.secret_name or owner.child(gateway.TLS_SUFFIX),
                prober_key.decode("ascii", "replace") if authenticated else "",
                tuple(requests(wanted.version, allowed, authenticated=authenticated)),
            ),
            interval=float(seconds(spec.security.verification.interval)),
            canaries=self._no_canaries(spec.security.verification.canary_pods),
            revision=digest([resource["metadata"].get("generation"), verify_at, evidence.foreign]),
            limits=self._limits(owner),
        )
        self._prober.follow(subject, self._left(resource.get("status", {})))

    def forget(self, namespace: str, name: str) -> None:
        """The resource is gone."""
        self._prober.forget(Who(namespace, name))

    def _no_canaries(self, wanted: str) -> str:
        if not self._canary_pods:
            return "Canary pods are turned off for this operator (--no-canary-pods)."
        return "Canary pods are turned off by spec.security.verification.canaryPods." if wanted == "Disabled" else ""

    def _limits(self, owner: Owner) -> tuple[str, ...]:
        """The vantage point that an operator in the resource's own namespace lacks."""
        if self._context.canary_service[0] == owner.namespace:
            return ("other namespaces (the operator runs in this one)",)
        return ()

    def _left(self, status: Mapping[str, Any]) -> Proof | None:
        """The verdict that an earlier leader left in the status, while it is young."""
        told_at = status.get("lastVerified", "")
        for item in status.get("conditions", ()):
            if item["type"] == "Isolated" and item["reason"] in _MEASURED and self._age(told_at) < _KEPT:
                return Proof(item["status"], item["reason"], item["message"], told_at)
        return None

    def _verified(self, proof: Proof | None, status: Mapping[str, Any]) -> str:
        """What to show as ``lastVerified``; empty: what is there stays."""
        if proof is None or not proof.verified_at:
            return ""
        before = {item["type"]: (item["status"], item["reason"]) for item in status.get("conditions", ())}
        shown = str(status.get("lastVerified", ""))
        same = before.get("Isolated") == (proof.status, proof.reason)
        return shown if same and self._age(shown) < _TELL_AGAIN else proof.verified_at

    def _age(self, moment: str) -> timedelta:
        return age(moment, self._now())
