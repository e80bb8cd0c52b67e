"""What nodes change on this machine is undone: at the end, on Ctrl-C, and after a crash by the next start."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e import images
from e2e.cluster import Cluster, lifecycle, running
from e2e.cluster.network import run, run_ip
from e2e.cluster.node import hierarchies
from e2e.reach import OPEN
from e2e.workload import (
    PORT,
    advertise_gpus,
    apply,
    condition,
    engines_of,
    install_operator,
    new_namespace,
    policy,
    start_pods,
    started,
    until,
)

# Folders that kubelet, containerd, network plugins or the agent would make on a machine of their own.
FOREIGN = (
    *("/etc/cni", "/etc/kubernetes", "/opt/cni", "/opt/containerd", "/run/cilium", "/run/containerd", "/run/netns"),
    *("/usr/libexec/kubernetes", "/var/lib/cilium", "/var/lib/cni", "/var/lib/containerd", "/var/lib/kubelet"),
    *("/var/log/containers", "/var/log/pods"),
)
SYSCTLS = ("fs/inotify", "kernel/keys", "net/bridge", "net/core", "net/ipv4/conf/all", "net/netfilter", "vm")
# They count what happens on the machine.
COUNTERS = {"kernel/ns_last_pid", "net/netfilter/nf_conntrack_count"}


@pytest.fixture
def own_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep clusters of this test apart from all others, and make sure that they are local ones."""
    monkeypatch.delenv("SVLLM_KUBECONFIG", raising=False)
    monkeypatch.setenv("SVLLM_CLUSTER", "local")
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path / "secure-vllm-operator" / "clusters"


def machine() -> dict[str, Any]:
    """Everything that nodes could change, as it is now."""
    files = list(Path("/proc/sys/kernel").iterdir())
    files += [path for folder in SYSCTLS for path in (Path("/proc/sys") / folder).rglob("*")]
    found = {str(path): _read(path) for path in files if str(path.relative_to("/proc/sys")) not in COUNTERS}
    return {
        **{name: value for name, value in found.items() if value is not None},
        "links": sorted(link["ifname"] for link in json.loads(run_ip("-json", "link"))),
        "routes": run_ip("route"),
        "mounts": Path("/proc/self/mounts").read_text(encoding="utf-8"),
        "cgroups": sorted(str(path) for root in hierarchies() for path in root.iterdir() if path.is_dir()),
        "nftables": run(["nft", "list", "ruleset"]),
        "iptables": run(["sh", "-c", "iptables-save | grep -v '^#' || true"]),
        "foreign": [path for path in FOREIGN if Path(path).exists()],
    }


def _read(path: Path) -> bytes | None:
    try:
        return path.read_bytes() if path.is_file() else None
    except OSError:  # write-only, or not for this machine
        return None


def link_of(state: Path) -> str | None:
    """Name of the link that the cluster `owned` has written down, once it exists."""
    try:
        plan = json.loads((state / "owned" / "cluster.json").read_text(encoding="utf-8"))["network"]
    except (FileNotFoundError, KeyError, ValueError):
        return None
    name = f"svllm{plan}"
    return name if (Path("/sys/class/net") / name).exists() else None


def is_up(state: Path) -> bool:
    """Tell whether the cluster `owned` has started."""
    return lifecycle.load("owned") is not None and state.exists()


@pytest.mark.parametrize(
    ("moment", "number"),
    [
        pytest.param(is_up, signal.SIGTERM, id="terminated"),
        pytest.param(is_up, signal.SIGKILL, id="killed"),
        pytest.param(link_of, signal.SIGKILL, id="killed-while-it-starts"),
        pytest.param(link_of, signal.SIGINT, id="interrupted-while-it-starts"),
    ],
)
def test_nothing_is_left_on_the_machine(
    own_state: Path, moment: Callable[[Path], object], number: signal.Signals
) -> None:
    before = machine()
    program = (
        "import time\nfrom e2e.cluster import running\n"
        "with running('owned', node_count=1, cni='bridge'):\n    time.sleep(600)\n"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=images.ROOT, stderr=subprocess.DEVNULL) as owner:
        until(lambda: moment(own_state), "the cluster is where the test wants it", seconds=90)
        assert machine() != before, "there is something to undo"
        owner.send_signal(number)
        assert owner.wait(timeout=60) != 0
    if number == signal.SIGKILL:
        assert link_of(own_state), "nobody has undone it yet"
        with running("next"):
            assert lifecycle.names() == ["next"]
    assert lifecycle.names() == []
    assert machine() == before


@pytest.fixture
def without_engine(own_state: Path) -> Iterator[Cluster]:  # noqa: ARG001 (its effect is what is asked for)
    """A node whose network plugin enforces nothing."""
    with running(node_count=1, cni="bridge") as cluster:
        images.load(cluster, lambda _: None)
        yield cluster


def test_without_a_policy_engine_a_policy_stops_nobody(without_engine: Cluster) -> None:
    """The policy test's own control: what it takes for enforcement does not happen by itself."""
    kubectl = without_engine.kubectl
    [node] = [node.name for node in without_engine.nodes]
    server, client = start_pods(kubectl, [("default", "server", node), ("default", "client", node)])
    apply(kubectl, policy("deny", "default", {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}))
    time.sleep(3)  # twenty times what an engine needs
    target = f"{server.ip}:{PORT}"
    assert client.reach([target]) == {target: OPEN}


def test_without_a_policy_engine_no_engine_starts_and_the_status_says_what_to_install(without_engine: Cluster) -> None:
    """A plugin that knows no policies at all; `test_race.py` has one that enforces late."""
    kubectl = without_engine.kubectl
    advertise_gpus(kubectl, [node.name for node in without_engine.nodes])
    install_operator(kubectl)
    sample = yaml.safe_load(images.QUICKSTART.read_text(encoding="utf-8"))
    spec = {"model": {"name": "/models/any"}, "image": sample["spec"]["image"], "gateway": {"replicas": 1}}
    shapes: dict[str, dict[str, Any]] = {"alone": {}, "together": {"parallelism": {"tensor": 2, "nodes": 2}}}
    with new_namespace(kubectl, "unenforced") as namespace:
        for name, shape in shapes.items():
            apply(kubectl, sample | {"metadata": {"name": name, "namespace": namespace}, "spec": spec | shape})

        def told(name: str) -> str | None:
            item = kubectl.get(f"--namespace={namespace}", "securevllmdeployment", name)
            conditions = item.get("status", {}).get("conditions") or ()
            return next((one["message"] for one in conditions if one.get("reason") == "PolicyNotEnforced"), None)

        for name in shapes:
            message = until(partial(told, name), f"{name} says that nothing is enforced", seconds=300)
            assert "NetworkPolicies are not enforced: install a network plugin that does" in message
            item = kubectl.get(f"--namespace={namespace}", "securevllmdeployment", name)
            assert not condition(item, "Isolated")
            assert not condition(item, "Ready")
        time.sleep(60)  # it never gives in: no time makes "not enforced" into "open"
        pods = [pod for name in shapes for pod in engines_of(kubectl, namespace, name)]
        assert len(pods) == 3
        for pod in pods:
            assert not started(pod), pod["metadata"]["name"]
            log = kubectl("logs", f"--namespace={namespace}", pod["metadata"]["name"], "--container=gate")
            assert "can be reached, and no policy allows it: NetworkPolicies are not enforced" in log
