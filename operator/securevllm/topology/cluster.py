"""What a spec asks for and this cluster cannot do."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterator
from typing import TYPE_CHECKING

from securevllm.errors import Problem, SpecError
from securevllm.topology.model import Mesh
from securevllm.topology.plan import plan

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.context import Context

_IPV6 = 6


def check(spec: api.Spec, context: Context) -> None:
    """Refuse what this cluster cannot do.

    Raises:
        SpecError: with everything that is wrong.
    """
    if found := [*problems(spec, context)]:
        raise SpecError(*found)


def problems(spec: api.Spec, context: Context) -> Iterator[Problem]:
    """Give what is wrong with a spec in this cluster; nothing is known of one without ``cluster_ranges``."""
    families = {ipaddress.ip_network(cidr).version for cidr in context.cluster_ranges}
    if families == {_IPV6} and any(isinstance(flow, Mesh) for flow in plan(spec, context).flows):
        split = spec.disaggregation is not None
        yield Problem(
            "spec.disaggregation" if split else "spec.parallelism",
            "NotSupportedYet",
            "this cluster has IPv6 only, and ZMQ delivers nothing to a peer that is named and listens on IPv6 only",
            "For now: keep each model replica in one pod, and use replicas.",
        )
