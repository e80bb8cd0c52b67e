"""From what was seen to ``.status``. Pure: the time is an argument."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from securevllm.status.conditions import DOCS, Transition, merge, transitions
from securevllm.status.facts import Facts, Failure, Fetch, Figures, Gateway, Workload, fetch, trouble, workload

if TYPE_CHECKING:
    from securevllm.api.advisories import Hit

__all__ = [
    "DOCS",
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


def status(facts: Facts, previous: Mapping[str, Any], now: str, docs: str = DOCS) -> dict[str, Any]:
    """The whole ``.status``; equal to the previous one when nothing changed.

    Args:
        facts: what was seen.
        previous: ``.status`` as it is.
        now: RFC 3339, seconds, UTC; used for conditions that flip.
        docs: where people find the pages that messages name.
    """
    engine = facts.engine or Workload(desired=0)
    facts = replace(facts, running=_running(facts, previous))
    return {
        "observedGeneration": facts.generation,
        "replicas": engine.replicas,
        "readyReplicas": engine.ready,
        "selector": facts.selector,
        "url": facts.url,
        "vllmVersion": facts.version,
        "runningVersion": facts.running or None,
        "advisories": [_advisory(hit) for hit in facts.advisories[:_ADVISORIES]],
        "outdated": list(facts.outdated),
        "acceptedRisks": list(facts.risks),
        "conditions": merge(facts, previous.get("conditions", ()), now, docs),
        **({"lastVerified": facts.verified} if facts.verified else {}),
    }


_VERSION_LIMIT = 64


def _running(facts: Facts, previous: Mapping[str, Any]) -> str:
    """What engines say that they are; what they said stays while nobody can be asked and nothing else is claimed."""
    if facts.served.reported:
        return textwrap.shorten(", ".join(facts.served.reported), _VERSION_LIMIT, placeholder=" ...")
    same = previous.get("vllmVersion") == facts.version and facts.engine is not None and facts.engine.ready
    return str(previous.get("runningVersion") or "") if same else ""


def _advisory(hit: Hit) -> dict[str, Any]:
    told = {
        "id": hit.advisory.id,
        "severity": hit.advisory.severity,
        "control": hit.control,
        "fixedIn": str(hit.advisory.fixed or ""),
    }
    return {name: value for name, value in told.items() if value}
