"""Pods that their gate holds back. Kubelet says since when a container runs; what it waits for only its log says."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from securevllm.render.gate import GATE
from securevllm.render.meta import GROUP_LABEL

PATIENCE_SECONDS = 30.0
"""A gate needs about a second where policies are enforced."""


@dataclass(frozen=True)
class Held:
    """Pods whose gate has run for longer than that.

    Attributes:
        pods: names.
        again: seconds until another one may have; None: no gate runs.
    """

    pods: tuple[str, ...] = ()
    again: float | None = None


def held(pods: Iterable[Mapping[str, Any]], now: datetime) -> Held:
    """Who is held back.

    A group whose members are not all in their gates waits for the others, which is no matter of policies.

    Args:
        pods: of one resource.
        now: UTC.
    """
    groups: dict[str, list[tuple[str, float | None]]] = {}
    for pod in pods:
        if pod["metadata"].get("deletionTimestamp"):
            continue
        name = str(pod["metadata"]["name"])
        groups.setdefault(pod["metadata"]["labels"].get(GROUP_LABEL, name), []).append((name, _seconds(pod, now)))
    whole = [(name, age) for members in groups.values() if all(age is not None for _, age in members)
             for name, age in members if age is not None]  # fmt: skip
    waiting = [PATIENCE_SECONDS - age for _, age in whole if age < PATIENCE_SECONDS]
    return Held(
        tuple(sorted(name for name, age in whole if age >= PATIENCE_SECONDS)),
        max(1.0, min(waiting)) if waiting else None,
    )


def _seconds(pod: Mapping[str, Any], now: datetime) -> float | None:
    """How long its gate has run; None: it does not."""
    for container in pod.get("status", {}).get("initContainerStatuses", ()):
        running = container.get("state", {}).get("running")
        if container["name"] == GATE and running:
            return (now - datetime.fromisoformat(running["startedAt"])).total_seconds()
    return None
