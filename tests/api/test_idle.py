"""I7: with nothing to do the operator writes nothing, and GitOps tools see no drift."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import pytest

from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import Outcome
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.context import FIELD_MANAGER
from securevllm.render.meta import SECRET_LABEL
from tests.api.audit import now
from tests.api.lab import as_rendered, real_gateways
from tests.api.operator_process import USER, OperatorProcess, await_condition, new_namespace, resource

if TYPE_CHECKING:
    from e2e.cluster.runners import ContainerStart, Launch
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

GITOPS = "argocd-controller"
SERVED = ("served-0", "served-1")
"""Their gateways are real Envoys; those of the others run and never answer, so that the operator goes on asking."""
SILENT = tuple(f"silent-{number}" for number in range(8))
RESYNC = 5.0
IDLE = 60.0


def run(start: ContainerStart) -> Launch | Outcome | None:
    instance = start.pod["metadata"]["labels"]["app.kubernetes.io/instance"]
    return real_gateways()(start) if instance in SERVED else Outcome.HOLD


@pytest.mark.slow
def test_ten_settled_resources_cause_no_write_in_a_minute_of_resyncs_and_no_drift_for_gitops(lab: Lab) -> None:
    kube = lab.kube
    operator = lab.operator("idle", arguments=("--resync", f"{RESYNC:g}"))
    with new_namespace(kube, "idle") as namespace, hollow_node(lab.cluster, run, namespace=namespace), operator:
        manifests = [resource(namespace, name, gateway={"replicas": 1}) for name in (*SERVED, *SILENT)]
        for manifest in manifests:
            kube.apply(manifest, manager=GITOPS)
        refs = {name: Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, name) for name in (*SERVED, *SILENT)}
        for name in SERVED:
            await_condition(kube, refs[name], "Ready", "True", seconds=90)
        for name in SILENT:
            await_condition(kube, refs[name], "EnginesReady", "True", seconds=60)
            await_condition(kube, refs[name], "GatewayReady", "False", reason="RevisionUnknown", seconds=60)
        as_rendered(kube, namespace)
        time.sleep(RESYNC)  # what was still under way has arrived

        since, reconciled = now(), reconciles(operator)
        poke: KubeObject = {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "poke", "namespace": namespace, "labels": {SECRET_LABEL: ""}},
        }
        kube.create(poke)
        began = time.monotonic()
        while (elapsed := time.monotonic() - began) < IDLE:
            # A Secret that it watches makes it look at every resource of the namespace.
            kube.patch(Ref.of(poke), {"metadata": {"annotations": {"at": f"{elapsed:.0f}"}}})
            time.sleep(RESYNC)
        written = lab.audit.writes(since, user=USER)
        assert written == []
        lists = [request for request in lab.audit.requests(since, user=USER) if request.verb == "list"]
        assert len([request for request in lists if request.resource == "networkpolicies"]) >= 0.6 * IDLE / RESYNC
        looked = reconciles(operator) - reconciled
        assert looked >= len(manifests) * 0.6 * IDLE / RESYNC

        for manifest in manifests:
            live = kube.get(Ref.of(manifest))
            assert said(kube.apply(manifest, manager=GITOPS, dry_run=True)) == said(live)
            metadata = live["metadata"]
            assert {"annotations", "labels", "finalizers", "ownerReferences"} & set(metadata) == set()
            owned = {(entry["manager"], entry.get("subresource", "")) for entry in metadata["managedFields"]}
            assert owned == {(GITOPS, ""), (FIELD_MANAGER, "status")}
        asked = len([request for request in lab.audit.requests(since, user=USER) if request.resource != "leases"])
        assert operator.stop() == 0
    print(f"{looked:.0f} reconciles and {asked} reads in {IDLE:g} s, resync every {RESYNC:g} s: no write")  # noqa: T201


def reconciles(operator: OperatorProcess) -> float:
    """How many have succeeded."""
    sample = 'securevllm_reconcile_total{result="success"}'
    lines = operator.get("/metrics")[1].splitlines()
    return next(float(line.rpartition(" ")[2]) for line in lines if line.startswith(sample))


def said(live: KubeObject) -> KubeObject:
    """The object without the book-keeping of applies."""
    return live | {"metadata": {key: value for key, value in live["metadata"].items() if key != "managedFields"}}
