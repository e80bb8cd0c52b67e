"""From what was seen to ``.status``. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from securevllm.status.conditions import Transition, merge, transitions
from securevllm.status.facts import Facts, Failure, Fetch, Figures, Gateway, Workload, fetch, trouble, workload

if TYPE_CHECKING:
    from securevllm.api.advisories import Hit

__all__ = [
    "Facts",
    "Failure",
    "Fetch",
    "Figures",
    "Gateway",
    "Transition",
    "Workload",
    "fetch",
    "status",
    "transitions",
    "trouble",
    "workload",
]


_ADVISORIES = 64
"""As many as the CRD takes; they are sorted, worst first."""


def status(facts: Facts, previous: Mapping[str, Any], now: str) -> dict[str, Any]:
    """The whole ``.status``; equal to the previous one when nothing changed.

    Args:
        facts: what was seen.
        previous: ``.status`` as it is.
        now: RFC 3339, seconds, UTC; used for conditions that flip.
    """
    engine = facts.engine or Workload(desired=0)
    return {
        "observedGeneration": facts.generation,
        "replicas": engine.replicas,
        "readyReplicas": engine.ready,
        "selector": facts.selector,
        "url": facts.url,
        "vllmVersion": facts.version,
        "advisories": [_advisory(hit) for hit in facts.advisories[:_ADVISORIES]],
        "outdated": list(facts.outdated),
        "acceptedRisks": list(facts.risks),
        "conditions": merge(facts, previous.get("conditions", ()), now),
        **({"lastVerified": facts.verified} if facts.verified else {}),
    }


def _advisory(hit: Hit) -> dict[str, Any]:
    told = {
        "id": hit.advisory.id,
        "severity": hit.advisory.severity,
        "control": hit.control,
        "fixedIn": str(hit.advisory.fixed or ""),
    }
    return {name: value for name, value in told.items() if value}
