"""Which published holes concern a spec, and what of this operator keeps an attacker away from each."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securevllm import catalogue
from securevllm.api import routes
from securevllm.api.guard import arguments

if TYPE_CHECKING:
    from securevllm.api import types as api

FEATURE_FLAGS = {
    "--enable-prompt-embeds": "prompt-embeds",
    "--trust-remote-code": "trust-remote-code",
    "--grpc": "grpc",
    "--grpc-port": "grpc",
}
"""Flags that are a feature of `catalogue.FEATURES` by themselves."""


@dataclass(frozen=True)
class Hit:
    """An advisory that concerns a spec. ``control``: of `catalogue.CONTROLS`; empty: only a newer version helps."""

    advisory: catalogue.Advisory
    control: str


def hits(spec: api.Spec, version: catalogue.Version) -> tuple[Hit, ...]:
    """The advisories of a spec, worst first, those that nothing covers before the others of their severity.

    Args:
        spec: an accepted one.
        version: the oldest that the image may hold.
    """
    open_routes = {(route.method, route.path) for route in routes.allowed(spec, version)}
    found = [
        Hit(advisory, _control(advisory, spec, open_routes))
        for advisory in catalogue.advisories_of(version, _features(spec))
    ]
    return tuple(sorted(found, key=lambda hit: (catalogue.SEVERITIES.index(hit.advisory.severity), bool(hit.control))))


def _features(spec: api.Spec) -> frozenset[str]:
    parallelism = spec.parallelism
    used = {FEATURE_FLAGS[name] for name in arguments.names(spec.engine.args) if name in FEATURE_FLAGS}
    if parallelism.nodes > 1 or parallelism.data is not None:
        used.add("nodes")
    if parallelism.pipeline > 1:
        used.add("pipeline")
    if spec.disaggregation is not None:
        used |= {"nodes", spec.disaggregation.connector}
    return frozenset(used)


def _control(advisory: catalogue.Advisory, spec: api.Spec, open_routes: Collection[tuple[str, str]]) -> str:
    holds = {
        "route-allowlist": bool(advisory.routes) and not any(route in open_routes for route in advisory.routes),
        "egress-policy": not any(rule.to.cidrs for rule in spec.security.egress),
        "gateway-authentication": spec.gateway.authentication.none is None,
        "guard": False,  # what it refuses is no feature of an accepted spec; where it is one, the risk was accepted
    }
    return next((name for name in advisory.controls if holds.get(name, True)), "")
