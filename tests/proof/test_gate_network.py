"""The gate in a network namespace with policies that come late, reject, or never come."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from securevllm.proof.wire import Forbidden, GateConfig
from tests.proof import network as net
from tests.proof.gate_process import GateProcess, gates

pytestmark = pytest.mark.skipif(bool(net.missing()), reason=net.missing() or "-")

CONFIG = GateConfig(
    dns="kubernetes.default.svc.cluster.local.",
    forbidden=(
        Forbidden("the Kubernetes API", "$KUBERNETES_SERVICE_HOST", "$KUBERNETES_SERVICE_PORT", (6443,)),
        Forbidden("the operator's canary listener", net.CANARY, str(net.CANARY_PORT)),
    ),
)


@pytest.fixture
def network(tmp_path: Path) -> Iterator[net.Network]:
    with net.network(tmp_path) as found:
        yield found


def gate(network: net.Network, folder: Path) -> GateProcess:
    environment = {
        "KUBERNETES_SERVICE_HOST": net.WORLD,
        "KUBERNETES_SERVICE_PORT": str(net.API_PORT),
        "POD_IP": net.POD,
        "NODE_IP": "10.250.1.1",
    }
    return GateProcess(CONFIG, folder / "log", environment, network.in_pod(folder / "resolv.conf"))


def test_policies_that_come_five_seconds_late_are_waited_for(network: net.Network, tmp_path: Path) -> None:
    with gates() as started:
        started.append(gate(network, tmp_path))
        started[0].says("the operator's canary listener (10.250.2.2:9094) can be reached")
        assert "the Kubernetes API (10.250.2.2:443)" in started[0].log
        started[0].holds(max(0.0, started[0].began + 5 - time.monotonic()))
        network.policies(net.DROP)
        enforced = time.monotonic()
        started[0].passed(20)
        assert 0.5 <= time.monotonic() - enforced < 8  # about 1 s; the rest is for a machine under load


def test_without_policies_no_engine_ever_starts(network: net.Network, tmp_path: Path) -> None:
    with gates() as started:
        started.append(gate(network, tmp_path))
        started[0].holds(10)
        assert "install a network plugin that enforces them" in started[0].log


def test_a_plugin_that_rejects_isolates_as_well(network: net.Network, tmp_path: Path) -> None:
    network.policies(net.REJECT)
    with gates() as started:
        started.append(gate(network, tmp_path))
        assert started[0].passed(20) >= CONFIG.stable_seconds


def test_a_dead_network_is_no_isolation(network: net.Network, tmp_path: Path) -> None:
    network.policies(net.DROP_ALL)
    with gates() as started:
        started.append(gate(network, tmp_path))
        started[0].says("DNS does not answer for kubernetes.default.svc.cluster.local.", 20)
        started[0].holds(3)
