"""How one model replica is spread over pods: plain arithmetic on ``spec.parallelism``, used by every later layer.

Words as in vLLM: a *world* is tensor x pipeline GPUs and serves one data-parallel rank. Without data parallelism one
world may be spread over several pods (``--nnodes``); with it, each pod holds whole ranks.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm.api import types as api


@dataclass(frozen=True)
class Shape:
    """One model replica.

    Attributes:
        pods: how many.
        gpus: GPUs of each pod.
        ranks: data-parallel ranks in each pod; 1 without data parallelism.
        everywhere: every pod has an HTTP server; otherwise only the first, and the others are ``--headless``.
    """

    pods: int
    gpus: int
    ranks: int
    everywhere: bool

    def headless(self, member: int) -> bool:
        """Whether the pod with this index has no HTTP server."""
        return member > 0 and not self.everywhere


def shape(parallelism: api.Parallelism) -> Shape:
    """The shape of an accepted spec; for one that has ``problems`` it means nothing, and does not fail."""
    world = parallelism.tensor * parallelism.pipeline
    data = parallelism.data
    if data is None:
        return Shape(parallelism.nodes, max(1, world // parallelism.nodes), 1, everywhere=False)
    ranks = data.size_local or max(1, data.size // parallelism.nodes)
    pods = max(1, data.size // ranks)
    return Shape(pods, ranks * world, ranks, everywhere=data.load_balancing != "internal")


def problems(parallelism: api.Parallelism, field: str) -> Iterator[Problem]:
    """What does not add up.

    Args:
        parallelism: to judge.
        field: where it stands, for example ``spec.parallelism``.
    """
    world = parallelism.tensor * parallelism.pipeline
    if parallelism.data is not None:
        yield from _data_problems(parallelism, parallelism.data, field)
        return
    if world % parallelism.nodes:
        yield Problem(
            f"{field}.nodes",
            "WorldMismatch",
            f"tensor x pipeline = {world} GPUs cannot be spread evenly over the pods",
            f"Choose a number that divides {world}.",
            str(parallelism.nodes),
        )
    if parallelism.expert and parallelism.tensor == 1:
        yield Problem(
            f"{field}.expert",
            "WorldMismatch",
            "experts are spread over tensor and data-parallel ranks, and there is one of each",
            "Set tensor or data.size to 2 or more, or leave expert out.",
            "true",
        )


def _data_problems(parallelism: api.Parallelism, data: api.DataParallel, field: str) -> Iterator[Problem]:
    local, nodes = data.size_local, parallelism.nodes
    if data.size % (local or nodes):
        where, value = (f"{field}.data.sizeLocal", local) if local else (f"{field}.nodes", nodes)
        yield Problem(
            where,
            "WorldMismatch",
            f"{data.size} data-parallel ranks cannot be spread evenly: every pod holds whole ranks",
            f"Choose a number that divides {data.size}; for a rank that needs more GPUs than a pod has, use replicas"
            " with nodes instead of data.",
            str(value),
        )
    elif local and nodes not in {1, data.size // local}:
        yield Problem(
            f"{field}.nodes",
            "WorldMismatch",
            f"{data.size} ranks, {local} in each pod, are {data.size // local} pods",
            f"Write nodes: {data.size // local}, or leave nodes or sizeLocal out.",
            str(nodes),
        )
    if data.load_balancing == "external":
        # vLLM 0.33.0 (config/parallel.py): a dense model with external load balancing is a ValueError.
        if not parallelism.expert:
            yield Problem(
                f"{field}.data.loadBalancing",
                "LoadBalancingRefused",
                "ranks of a dense model have nothing to say to each other: with external load balancing vLLM refuses",
                "Use replicas instead of data, or expert: true for a mixture of experts.",
                "external",
            )
        if shape(parallelism).ranks != 1:
            yield Problem(
                f"{field}.data.loadBalancing",
                "LoadBalancingRefused",
                "with external load balancing every rank is a pod of its own",
                "Write sizeLocal: 1, or loadBalancing: hybrid.",
                "external",
            )
    if data.load_balancing == "hybrid" and shape(parallelism).pods == 1:
        yield Problem(
            f"{field}.data.loadBalancing",
            "LoadBalancingRefused",
            "with all ranks in one pod there is nothing between pods to balance",
            "Use loadBalancing: internal, or set sizeLocal or nodes.",
            "hybrid",
        )
