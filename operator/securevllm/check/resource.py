"""A SecureVLLMDeployment in the input: what its spec gives up, which holes hit it, and whose policies open more."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from securevllm import catalogue
from securevllm.api import routes
from securevllm.check.exposure import EPHEMERAL, Socket, World, reach
from securevllm.check.findings import Finding, Listening, Severity
from securevllm.netpol import PROTOCOLS, Pod, Policies, Policy
from securevllm.netpol import parse as parse_policy
from securevllm.render import policies
from securevllm.topology import plan

if TYPE_CHECKING:
    from securevllm.api.parse import Accepted
    from securevllm.check.documents import Source
    from securevllm.context import Context
    from securevllm.render.meta import Owner


@dataclass(frozen=True)
class Resource:
    """One resource with what was found."""

    source: Source
    owner: Owner
    accepted: Accepted
    routes: tuple[catalogue.Route, ...]
    listening: tuple[Listening, ...]
    findings: tuple[Finding, ...]

    @property
    def key(self) -> str:
        """``Kind namespace/name``."""
        return f"SecureVLLMDeployment {self.owner.namespace}/{self.owner.name}"


def examine(
    source: Source, owner: Owner, accepted: Accepted, context: Context, foreign: Mapping[str, tuple[Policy, ...]]
) -> Resource:
    """Judge an accepted resource.

    Args:
        source: where it stands.
        owner: of the pods that would be made.
        accepted: its spec.
        context: the cluster.
        foreign: policies that are not the operator's, by namespace.
    """
    others = foreign.get(owner.namespace, ())
    found = [*_risks(accepted), *_advisories(accepted), *_foreign(owner, accepted, context, others)]
    ordered = tuple(sorted(found, key=lambda item: (-item.severity, item.code, item.message)))
    allowed = routes.allowed(accepted.spec, accepted.version)
    return Resource(source, owner, accepted, allowed, tuple(_listening(owner, accepted, context, others)), ordered)


def _listening(owner: Owner, accepted: Accepted, context: Context, foreign: tuple[Policy, ...]) -> Iterator[Listening]:
    """Every socket with who reaches it, by the policies that would be rendered and those of others together."""
    topology = plan(accepted.spec, context)
    rendered = [policies.default_deny(owner.namespace), *policies.policies(owner, topology)]
    world = World(Policies([*map(parse_policy, rendered), *foreign]))
    groups = {role: owner.group_selector(group.name) for group in topology.groups for role in group.members}
    for socket in topology.sockets:
        labels = owner.pod_labels(socket.role.value) | groups.get(socket.role, {})
        pod = Pod(owner.namespace, f"{owner.name}-{socket.role}", labels)
        protocol = next(item for item in PROTOCOLS if item == socket.protocol)
        first, last = (socket.port, socket.last or socket.port) if socket.port else EPHEMERAL
        one = Socket(socket.name, first, last, socket.purpose, inner=True, role=socket.role, protocol=protocol)
        yield Listening(one, reach(pod, one, world))


def _risks(accepted: Accepted) -> Iterator[Finding]:
    for risk in accepted.risks:
        yield Finding(Severity.MEDIUM, "RiskAccepted", risk, "leave it out when its reason is gone")


def _advisories(accepted: Accepted) -> Iterator[Finding]:
    for hit in accepted.advisories:
        advisory = hit.advisory
        fixed = f"use vLLM {advisory.fixed} or newer" if advisory.fixed else "no fixed vLLM is known"
        if hit.control:
            told, severity = f"; kept away by {hit.control}: {catalogue.CONTROLS[hit.control]}", Severity.INFO
        else:
            told, severity = "", Severity[advisory.severity.upper()]
        yield Finding(severity, "Advisory", f"{advisory.id}: {advisory.summary}{told}", fixed)


def _foreign(owner: Owner, accepted: Accepted, context: Context, policies: tuple[Policy, ...]) -> Iterator[Finding]:
    for item in plan(accepted.spec, context).pods:
        pod = Pod(owner.namespace, f"{owner.name}-{item.role}", owner.pod_labels(item.role.value))
        for policy in policies:
            opened = [rule for rules in policy.rules.values() for rule in rules]
            if opened and policy.selects(pod):
                peers = [str(peer) for rule in opened for peer in rule.peers or ("everybody",)]
                yield Finding(
                    Severity.HIGH,
                    "ForeignPolicy",
                    f"NetworkPolicy {policy.key} opens pods of the role {item.role}, for"
                    f" {'; '.join(dict.fromkeys(peers))}: policies add up",
                    "select its pods by labels that those of this resource do not have",
                )


def spec_of(obj: Mapping[str, Any]) -> dict[str, Any]:
    """``spec`` of an object."""
    return dict(obj.get("spec") or {})
