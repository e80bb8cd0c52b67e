"""Two replicas and one Lease: who acts when the other is killed, stopped or frozen, and when the API server is away."""

from __future__ import annotations

import signal
import subprocess
import time
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api.audit import now
from tests.api.kube import eventually
from tests.api.lab import as_rendered
from tests.api.operator_process import OPERATOR_NAMESPACE, USER, OperatorProcess, new_namespace, resource

if TYPE_CHECKING:
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

LEASE = Ref(kinds.LEASE, OPERATOR_NAMESPACE, "secure-vllm-operator")
RENEW_DEADLINE = 10.0


def leads(operator: OperatorProcess) -> bool:
    return operator.get("/leadz")[0] == 200


def holder(lab: Lab) -> str:
    return str(lab.kube.get(LEASE)["spec"]["holderIdentity"])


def seconds_until_lead(operator: OperatorProcess, limit: float) -> float:
    began = time.monotonic()
    eventually(lambda: leads(operator), limit + 10)
    took = time.monotonic() - began
    assert took < limit, f"{operator.identity} leads after {took:.1f} s"
    return took


@pytest.mark.slow
def test_the_standby_is_ready_and_takes_over_from_a_killed_a_stopped_and_a_frozen_leader(lab: Lab) -> None:
    kube = lab.kube
    users = {"first": USER, "second": lab.twin("second")}
    first = lab.operator("first", identity="first")
    second = lab.operator("second", identity="second", account="second")
    with new_namespace(kube, "replicas") as namespace, ExitStack() as processes:
        processes.enter_context(first)
        processes.push(second)
        second.start(lead=False)
        service = Ref(kinds.SERVICE, namespace, "llama-engine")
        kube.create(resource(namespace))
        eventually(lambda: as_rendered(kube, namespace), 30)
        assert (leads(first), leads(second)) == (True, False)
        assert second.get("/readyz") == (200, "[+]ready ok\n")

        # Killed: nobody hands the Lease over.
        first.kill()
        kube.delete(service)
        killed = seconds_until_lead(second, 20)
        eventually(lambda: as_rendered(kube, namespace))
        assert holder(lab) == "second"

        # Stopped: what it holds, it gives back.
        first.start(lead=False)
        began = time.monotonic()
        assert second.stop() == 0
        ended = time.monotonic() - began
        assert ended < 5
        stopped = ended + seconds_until_lead(first, 4)
        kube.delete(service)
        eventually(lambda: as_rendered(kube, namespace))

        # Frozen: it wakes with a queue of changes and must not act on them.
        second.start(lead=False)
        first.send(signal.SIGSTOP)
        deadline = (datetime.now(UTC) + timedelta(seconds=RENEW_DEADLINE)).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        kube.delete(service)
        frozen = seconds_until_lead(second, 20)
        eventually(lambda: as_rendered(kube, namespace))
        kube.delete(service)
        time.sleep(max(0.0, 20.0 - frozen))
        first.send(signal.SIGCONT)
        assert first.ended(10) != 0
        assert second.get("/leadz")[0] == 200
        eventually(lambda: as_rendered(kube, namespace))
        assert second.stop() == 0

        written = lab.audit.requests(deadline, user=users["first"])
        assert [request for request in written if request.verb not in {"get", "list"}] == []
        assert lab.audit.writes(deadline, user=users["second"], namespace=namespace) != []
    print(f"leads after kill -9: {killed:.1f} s, after SIGTERM: {stopped:.1f} s, after SIGSTOP: {frozen:.1f} s")  # noqa: T201
    assert "Traceback" not in first.log + second.log


def supervised(operator: OperatorProcess) -> bool:
    """Start it again when it has ended, as kubelet does; whether it leads."""
    try:
        code = operator.ended(0.01)
    except subprocess.TimeoutExpired:
        return leads(operator)
    assert code == 1, operator.log[-3000:]
    operator.start()
    return True


@pytest.mark.slow
def test_it_gets_over_a_restart_and_an_outage_of_the_api_server(lab: Lab) -> None:
    if lab.cluster.provider != "local":
        pytest.skip(f"only a local API server can be stopped; this one is {lab.cluster.provider}")
    kube = lab.kube
    with new_namespace(kube, "outage") as namespace, lab.operator("outage") as operator:
        kube.create(resource(namespace))
        eventually(lambda: as_rendered(kube, namespace), 30)
        told = []
        for outage in (0.0, 20.0):
            pid = operator.pid
            lab.take_apiserver_away(outage)
            since = now()
            eventually(lambda: supervised(operator), 60, pause=0.2)
            # Whoever goes on must hear of changes again.
            kube.patch(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama"), {"spec": {"replicas": 2 + int(outage)}})
            kube.delete(Ref(kinds.NETWORK_POLICY, namespace, "llama-engine"))
            # It may have led until just now, and give up by an outage that is over.
            eventually(lambda: supervised(operator) and as_rendered(kube, namespace), 60)
            told.append(f"{outage:g} s: {'the same process' if operator.pid == pid else 'restarted'}")
            assert lab.audit.writes(since, user=USER, namespace=namespace) != []
        assert operator.get("/readyz")[0] == 200
        assert operator.stop() == 0
    print(f"outage of the API server of {', '.join(told)}")  # noqa: T201
