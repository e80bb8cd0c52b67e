"""Each topology of the samples, applied to a real API server: its objects exist, its pods are those of the plan."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e.cluster.hollow import hollow_node
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import Observed, render
from securevllm.render.meta import GROUP_LABEL, ROLE_LABEL, Owner
from tests.api.children import children
from tests.api.kube import eventually
from tests.api.operator_process import await_condition, resource

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from securevllm.render import Rendered
    from tests.api.kube import Kube
    from tests.api.operator_process import OperatorProcess

pytestmark = pytest.mark.cluster

SAMPLES = Path(__file__).parents[2] / "manifests" / "samples"
SHAPES = ("parallelism", "disaggregation", "security", "ports", "replicas")
"""What a topology is made of; weights and images of the samples do not matter here."""
TOPOLOGIES = (
    "multi-node",
    "data-parallel",
    "data-parallel-hybrid",
    "expert-parallel",
    "expert-parallel-external",
    "kv-events",
    "prefill-decode-nixl",
    "prefill-decode-mooncake",
)


def shape(sample: str) -> dict[str, Any]:
    spec = yaml.safe_load((SAMPLES / f"{sample}.yaml").read_text(encoding="utf-8"))["spec"]
    return {name: spec[name] for name in SHAPES if name in spec}


def rendered(obj: KubeObject) -> Rendered:
    owner = Owner(obj["metadata"]["name"], obj["metadata"]["namespace"], obj["metadata"]["uid"])
    return render(owner, parse(owner.name, obj["spec"]), Context(), Observed())


@pytest.mark.parametrize("sample", TOPOLOGIES)
def test_a_topology_becomes_ready_with_the_objects_and_pods_of_its_plan(
    cluster: Cluster, kube: Kube, operator: OperatorProcess, namespace: str, sample: str
) -> None:
    del operator
    with hollow_node(cluster, namespace=namespace):
        made = kube.create(resource(namespace, **shape(sample)))
        ref = Ref.of(made)
        await_condition(kube, ref, "EnginesReady", "True", seconds=90)
        wanted = rendered(made)

        def there() -> bool:
            assert {Ref.of(obj) for obj in wanted.objects()} - children(kube, namespace).keys() == set()
            return True

        eventually(there, 30)
        pods = kube.list(kinds.POD, namespace)
        roles = Counter(pod["metadata"]["labels"][ROLE_LABEL] for pod in pods)
        assert roles == {item.role.value: item.replicas for item in wanted.topology.pods}
        # No pod of one group carries the label of another, and pods that are no group carry none.
        groups = Counter(pod["metadata"]["labels"].get(GROUP_LABEL) for pod in pods)
        del groups[None]
        assert groups == {group.name: len(group.members) for group in wanted.topology.groups}
        status = kube.get(ref)["status"]
        sides = [item for item in wanted.topology.pods if item.role.value in {"engine", "prefill", "decode"}]
        replicas = len(wanted.topology.groups) or sum(item.replicas for item in sides)
        assert (status["replicas"], status["readyReplicas"]) == (replicas, replicas)
        kube.delete(ref)
        eventually(lambda: kube.list(kinds.POD, namespace) == [], 90)
