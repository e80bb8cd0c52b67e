"""A process that takes a Lease and says so: `python elector.py KUBECONFIG NAMESPACE IDENTITY`.

Prints `leader` when it has the Lease, and `lost` when it lost it (exit code 1). SIGTERM releases (exit code 0).
"""

from __future__ import annotations

import asyncio
import signal
import sys
from pathlib import Path

from securevllm import log
from securevllm.cluster import Login, connect
from securevllm.errors import LeadershipLost
from securevllm.leader import Elector, LeaseSettings


async def main(kubeconfig: str, namespace: str, identity: str) -> int:
    """Lead until told to stop."""
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    settings = LeaseSettings(
        namespace, "test", identity, lease_duration=4, renew_deadline=2.5, retry_period=0.4, request_timeout=1
    )
    async with connect(Login(Path(kubeconfig)), fence=lambda: True, timeout=1.0) as client:
        elector = Elector(client, settings)
        await elector.acquire()
        print("leader", flush=True)  # noqa: T201
        renewing = asyncio.create_task(elector.renew())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait([renewing, stopping], return_when=asyncio.FIRST_COMPLETED)
        if renewing.done():
            try:
                renewing.result()
            except LeadershipLost as error:
                print(f"lost: {error}", flush=True)  # noqa: T201
            return 1
        renewing.cancel()
        await elector.release()
        return 0


if __name__ == "__main__":
    log.configure("json")
    sys.exit(asyncio.run(main(*sys.argv[1:])))
