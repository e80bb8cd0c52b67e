"""Two candidates in processes of their own, a real API server, and `kill -9`."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from securevllm.api.kinds import LEASE, NAMESPACE, KubeObject, Ref
from securevllm.cluster import KubernetesClient, Login, connect
from tests.api.kube import PATIENCE

if TYPE_CHECKING:
    from e2e.cluster import Cluster

pytestmark = pytest.mark.cluster

SCRIPT = Path(__file__).with_name("elector.py")
DURATION = 4.0


@pytest.fixture
async def kubernetes(cluster: Cluster) -> AsyncIterator[KubernetesClient]:
    async with connect(Login(cluster.kubeconfig), fence=lambda: True) as client:
        yield client


@pytest.fixture
async def namespace(kubernetes: KubernetesClient) -> AsyncIterator[str]:
    name = f"leader-{uuid.uuid4().hex[:8]}"
    await kubernetes.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    yield name
    await kubernetes.delete(Ref(NAMESPACE, None, name))


@asynccontextmanager
async def candidate(cluster: Cluster, namespace: str, identity: str) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        str(SCRIPT),
        str(cluster.kubeconfig),
        namespace,
        identity,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def line(process: asyncio.subprocess.Process, seconds: float = 20.0) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), seconds * PATIENCE)).decode().strip()


async def lease(kubernetes: KubernetesClient, namespace: str) -> KubeObject:
    return await kubernetes.get(Ref(LEASE, namespace, "test"))


async def test_a_killed_leader_is_replaced_after_the_lease_and_a_stopped_one_at_once(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    async with candidate(cluster, namespace, "a") as first, candidate_after(first, cluster, namespace, "b") as second:
        spec = (await lease(kubernetes, namespace))["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("a", 0)
        renewed = datetime.fromisoformat(spec["renewTime"])
        assert abs(datetime.now(renewed.tzinfo) - renewed).total_seconds() < DURATION

        # Longer than the lease: only renewing keeps the second one out.
        with pytest.raises(TimeoutError):
            await line(second, DURATION + 1.0)
        first.kill()
        killed = time.monotonic()
        assert await line(second) == "leader"
        took = time.monotonic() - killed
        assert DURATION - 0.5 <= took <= DURATION + 6.0
        spec = (await lease(kubernetes, namespace))["spec"]
        assert (spec["holderIdentity"], spec["leaseTransitions"]) == ("b", 1)

        async with candidate(cluster, namespace, "c") as third:
            with pytest.raises(TimeoutError):
                await line(third, 1.5)
            second.send_signal(signal.SIGTERM)
            stopped = time.monotonic()
            assert await second.wait() == 0
            assert await line(third) == "leader"
            handed_over = time.monotonic() - stopped
            assert handed_over < DURATION  # did not wait for the Lease to expire
    print(f"takeover after kill -9 {took:.1f} s with a lease of {DURATION:g} s; handed over in {handed_over:.1f} s")  # noqa: T201


@asynccontextmanager
async def candidate_after(
    leader: asyncio.subprocess.Process, cluster: Cluster, namespace: str, identity: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    assert await line(leader) == "leader"
    async with candidate(cluster, namespace, identity) as process:
        yield process


async def test_a_leader_that_was_frozen_gives_up_when_it_wakes(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    async with candidate(cluster, namespace, "a") as first, candidate_after(first, cluster, namespace, "b") as second:
        first.send_signal(signal.SIGSTOP)
        assert await line(second) == "leader"
        first.send_signal(signal.SIGCONT)

        assert (await line(first)).startswith(f"lost: Lease {namespace}/test ")
        assert await first.wait() == 1
        assert (await lease(kubernetes, namespace))["spec"]["holderIdentity"] == "b"


async def test_a_lease_that_somebody_else_writes_ends_the_leader(
    cluster: Cluster, kubernetes: KubernetesClient, namespace: str
) -> None:
    async with candidate(cluster, namespace, "a") as process:
        assert await line(process) == "leader"
        await kubernetes.patch(Ref(LEASE, namespace, "test"), {"spec": {"holderIdentity": "intruder"}})

        assert await line(process) == f"lost: Lease {namespace}/test is held by intruder"
        assert await process.wait() == 1
