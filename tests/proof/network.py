"""A pod, its node and the rest of the world as three network namespaces; nftables on the node stands for policies.

Needs root on Linux with iproute2, util-linux and nftables. Everything is in namespaces that go with the block; nothing
of the machine's own network is touched.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.dns import Responder
from securevllm.proof.dial import Listener, accepting

ROOT = Path(__file__).parents[2]
POD, WORLD = "10.250.1.2", "10.250.2.2"
API_PORT, CANARY_PORT = 443, 9094
CANARY = "canary.operator.svc.cluster.local."
NAMES = {"kubernetes.default.svc.cluster.local": [WORLD], CANARY.removesuffix("."): [WORLD]}

DROP = "policy drop; ct state established,related accept; udp dport 53 accept;"
REJECT = "policy accept; ct state established,related accept; udp dport 53 accept; reject with icmpx port-unreachable;"
DROP_ALL = "policy drop;"


def missing() -> str:
    """Why it cannot be had here; empty: it can."""
    if not sys.platform.startswith("linux"):
        return "network namespaces exist on Linux only"
    if os.geteuid() != 0:
        return "network namespaces need root"
    absent = [tool for tool in ("ip", "nft", "nsenter", "unshare", "mount", "sysctl") if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


@dataclass(frozen=True)
class Network:
    """The namespaces, by their names."""

    pod: str
    node: str
    world: str

    def policies(self, rules: str) -> None:
        """Enforce something from now on, as a late policy engine does."""
        table = f"table inet svllm {{ chain forward {{ type filter hook forward priority 0; {rules} }}; }}"
        _run("ip", "netns", "exec", self.node, "nft", table)

    def in_pod(self, resolv_conf: Path) -> list[str]:
        """What a command is prefixed with, to run in the pod with its resolv.conf."""
        script = f'mount --bind {resolv_conf} /etc/resolv.conf && exec "$@"'
        return ["ip", "netns", "exec", self.pod, "unshare", "-m", "sh", "-c", script, "sh"]


@contextmanager
def network(folder: Path) -> Iterator[Network]:
    """The three of them, with DNS, an API server and a canary listener in the world."""
    tag = secrets.token_hex(3)
    net = Network(*(f"svllm-{tag}-{part}" for part in ("pod", "node", "world")))
    (folder / "resolv.conf").write_text(f"nameserver {WORLD}\n", encoding="ascii")
    with contextlib.ExitStack() as stack:
        for name in (net.pod, net.node, net.world):
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
            _in(name, "ip", "link", "set", "lo", "up")
        for name, number in ((net.pod, 1), (net.world, 2)):
            _in(net.node, "ip", "link", "add", f"to{number}", "type", "veth", "peer", "name", "eth0", "netns", name)
            _in(net.node, "ip", "address", "add", f"10.250.{number}.1/24", "dev", f"to{number}")
            _in(net.node, "ip", "link", "set", f"to{number}", "up")
            _in(name, "ip", "address", "add", f"10.250.{number}.2/24", "dev", "eth0")
            _in(name, "ip", "link", "set", "eth0", "up")
            _in(name, "ip", "route", "add", "default", "via", f"10.250.{number}.1")
        _in(net.node, "sysctl", "-qw", "net.ipv4.ip_forward=1")
        log = folder / "world.log"
        with log.open("ab") as out:
            world = subprocess.Popen(  # noqa: S603 - our own program
                ["ip", "netns", "exec", net.world, sys.executable, "-m", "tests.proof.network"],  # noqa: S607 - the machine's ip
                stdout=out, stderr=out, cwd=ROOT, env={**os.environ, "PYTHONPATH": f"{ROOT / 'operator'}:{ROOT}"},
            )  # fmt: skip
        stack.callback(world.wait)
        stack.callback(world.kill)
        until = time.monotonic() + 20
        while "listening" not in log.read_text(encoding="utf-8"):
            assert world.poll() is None and time.monotonic() < until, log.read_text(encoding="utf-8")  # noqa: PT018 - one wait
            time.sleep(0.05)
        yield net


def _in(namespace: str, *command: str) -> None:
    _run("ip", "netns", "exec", namespace, *command)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # noqa: S603 - fixed commands
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr}")


async def _serve(ports: Sequence[int]) -> None:
    await asyncio.get_running_loop().create_datagram_endpoint(lambda: Responder(NAMES.get), local_addr=(WORLD, 53))
    async with Listener([accepting(WORLD, port) for port in ports]):
        print("listening", flush=True)  # noqa: T201 - the parent waits for it
        await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(_serve((API_PORT, CANARY_PORT)))
