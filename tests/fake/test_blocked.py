"""A missing flow keeps a group from its work, as with the real vLLM: two network namespaces and nftables.

Every test lifts the block at the end, and then the group becomes whole: what was measured is the block.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import pytest

from securevllm import catalogue

if TYPE_CHECKING:
    from tests.fake.service import Service, Vllm

HEAD, OTHER = "10.251.1.1", "10.251.1.2"
_QUIET = 3.0
"""Seconds in which an unhindered group becomes whole ten times."""


def _missing() -> str:
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    absent = [tool for tool in ("ip", "nft") if shutil.which(tool) is None]
    return f"not installed: {', '.join(absent)}" if absent else ""


pytestmark = pytest.mark.skipif(bool(_missing()), reason=_missing())


def _run(*command: str) -> str:
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=20)  # noqa: S603 - fixed commands
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
    return done.stdout


class Pair:
    """Two namespaces with an eth0 each, joined."""

    def __init__(self, head: str, other: str) -> None:
        self.head = head
        self.other = other

    def block(self, rule: str) -> None:
        """Drop what reaches the head and matches."""
        table = f"table inet svllm {{ chain input {{ type filter hook input priority 0; {rule} drop; }}; }}"
        _run("ip", "netns", "exec", self.head, "nft", table)

    def open(self) -> None:
        """Drop nothing any more."""
        _run("ip", "netns", "exec", self.head, "nft", "delete table inet svllm")


@pytest.fixture
def pair() -> Iterator[Pair]:
    tag = secrets.token_hex(3)
    names = (f"svllm-fake-{tag}-a", f"svllm-fake-{tag}-b")
    with contextlib.ExitStack() as stack:
        for name in names:
            _run("ip", "netns", "add", name)
            stack.callback(_run, "ip", "netns", "delete", name)
            _run("ip", "netns", "exec", name, "ip", "link", "set", "lo", "up")
        veth = ("link", "add", "eth0", "type", "veth", "peer", "name", "eth0", "netns", names[1])
        _run("ip", "netns", "exec", names[0], "ip", *veth)
        for name, address in zip(names, (HEAD, OTHER), strict=True):
            _run("ip", "netns", "exec", name, "ip", "address", "add", f"{address}/24", "dev", "eth0")
            _run("ip", "netns", "exec", name, "ip", "link", "set", "eth0", "up")
        yield Pair(*names)


def members(service: Service, pair: Pair, shared: Sequence[str], own: Sequence[Sequence[str]]) -> list[Vllm]:
    """A head and another member, each in its namespace, with every port at its default."""
    found = []
    env = {"GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    for name, address, flags in zip((pair.head, pair.other), (HEAD, OTHER), own, strict=True):
        prefix = ("ip", "netns", "exec", name)
        found.append(service.vllm(*shared, *flags, address=address, port=8000, env=env, prefix=prefix))
    return found


def listens(name: str, one: Vllm) -> bool:
    """Whether the API of a namespace listens."""
    return ":8000" in _run("ip", "netns", "exec", name, "ss", "-Hltn") and one.process.poll() is None


NODES = ("--tensor-parallel-size=2", "--nnodes=2", f"--master-addr={HEAD}")
NODES_OWN = (("--node-rank=0",), ("--node-rank=1", "--headless"))
DATA = ("--data-parallel-size=2", "--data-parallel-size-local=1", f"--data-parallel-address={HEAD}")
DATA_OWN = ((), ("--data-parallel-start-rank=1", "--headless"))


def port(name: str) -> int:
    """A fixed port of the catalogue."""
    return catalogue.sockets()[name].port


STORE, RPC = (f"tcp dport {port(name)}" for name in ("torch-distributed", "data-parallel-rpc"))
# A policy with the fixed ports alone, as one would write it who reads the documentation.
RANDOM = "ct state new tcp dport 30000-65535"


@pytest.mark.parametrize(
    ("commands", "rule", "missed"),
    [
        pytest.param((NODES, NODES_OWN), STORE, "the head's torch-distributed", id="store"),
        pytest.param((NODES, NODES_OWN), RANDOM, "rank 0's (message-queue|gloo|nccl)", id="mesh"),
        pytest.param((DATA, DATA_OWN), RPC, "the head's data-parallel-rpc", id="rpc"),
        pytest.param((DATA, DATA_OWN), RANDOM, "the head's data-parallel-(io|coordinator|store)", id="io"),
    ],
)
def test_without_a_flow_the_group_is_never_whole(
    service: Service, pair: Pair, commands: tuple[Sequence[str], Sequence[Sequence[str]]], rule: str, missed: str
) -> None:
    pair.block(rule)
    head, other = members(service, pair, *commands)
    other.says(f"waiting for {missed} at .*no answer")
    time.sleep(_QUIET)
    assert not listens(pair.head, head)
    pair.open()
    other.says("headless")
    head.says("Starting vLLM server")


def test_without_the_side_channel_a_request_fails_and_the_servers_live(service: Service, pair: Pair) -> None:
    config = {"kv_connector": "NixlConnector", "kv_load_failure_policy": "fail"}
    started = []
    for name, address, role in ((pair.head, HEAD, "kv_producer"), (pair.other, OTHER, "kv_consumer")):
        env = {"VLLM_NIXL_SIDE_CHANNEL_HOST": address, "UCX_NET_DEVICES": "eth0"}
        flag = f"--kv-transfer-config={json.dumps(config | {'kv_role': role})}"
        started.append(service.vllm(flag, address=address, port=8000, env=env, prefix=("ip", "netns", "exec", name)))
    prefill, decode = started
    for one in started:
        one.says("Starting vLLM server")
    pair.block(f"tcp dport {port('nixl-side-channel')}")
    assert _split(pair) == "500"
    assert "waiting for prefill's side channel" in decode.log
    pair.open()
    pair.block(RANDOM)
    assert _split(pair) == "500"
    assert "the other side's nixl-data" in decode.log
    pair.open()
    assert _split(pair) == "200"
    assert prefill.process.poll() is None


_SPLIT = f"""
import json, urllib.request, urllib.error
def ask(host, params):
    body = json.dumps({{"prompt": "hi", "kv_transfer_params": params}}).encode()
    headers = {{"Authorization": "Bearer the-engine-key"}}
    sent = urllib.request.Request(f"http://{{host}}:8000/v1/completions", body, headers)
    try:
        with urllib.request.urlopen(sent, timeout=40) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, {{}}
offered = ask("{HEAD}", {{"do_remote_decode": True}})[1]["kv_transfer_params"]
print(ask("{OTHER}", offered)[0])
"""


def _split(pair: Pair) -> str:
    """One request as a router splits it, asked from decode's namespace; the status of decode."""
    done = subprocess.run(  # noqa: S603 - our own program
        ["ip", "netns", "exec", pair.other, sys.executable, "-c", _SPLIT],  # noqa: S607 - the machine's ip
        check=True, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    return done.stdout.strip()
