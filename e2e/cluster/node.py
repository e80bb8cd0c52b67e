"""One real node: containerd, runc, kubelet, kube-proxy and, with Cilium, its agent, in namespaces of their own.

A node has its own network, mount, pid, host name and IPC namespaces; its first process is `node_init`. Its folder is
`nodes/<name>` in the cluster's; there are its configuration, logs, images and pods. Inside, the cluster's folder is
/run/cluster and the cache is /run/cache, wherever they are on this machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from e2e.cluster import binaries, daemon, network
from e2e.cluster.daemon import ProcessIdentity
from e2e.cluster.errors import ClusterError
from e2e.cluster.packages import CLANG_FOLDER, CNI_PLUGINS, SYSTEM_PATH
from e2e.cluster.paths import cache_folder

Cni = Literal["cilium", "bridge"]

INIT = "init"
SWITCH = "switch"
CONTAINERD = "containerd"
PAUSE_IMAGE = "registry.local/pause:1"

_SOCKET = "/run/containerd/containerd.sock"
_START_SECONDS = 20.0
# In the node's view.
_CLUSTER = Path("/run/cluster")
_CNI_CONFIGURATION = "/run/cni/net.d"
_CNI_PROGRAMS = "/run/cni/bin"


@dataclass(frozen=True)
class Node:
    """A node of a cluster, started or not.

    Attributes:
        name: Name of the Node object.
        plan: Addresses.
        cluster: Folder of the cluster.
        cni: Which network plugin: `cilium` enforces NetworkPolicies, `bridge` does not.
    """

    name: str
    plan: network.Plan
    cluster: Path
    cni: Cni

    @property
    def folder(self) -> Path:
        """Where its files are on this machine."""
        return self.cluster / "nodes" / self.name

    @property
    def ip(self) -> str:
        """Its address, where one is asked for."""
        return self.plan.node_ips(self.name)[0]

    @property
    def daemons(self) -> tuple[str, ...]:
        """Its processes, by name of pid file and log; without the first one."""
        agent = (binaries.CILIUM_AGENT,) if self.cni == "cilium" else ()
        return (CONTAINERD, binaries.KUBELET, *agent, binaries.KUBE_PROXY)

    @property
    def cgroup(self) -> str:
        """Name of its cgroup in each hierarchy of this machine."""
        return f"svllm-{self.cluster.name}-{self.name}"

    def command(self, *arguments: str) -> list[str]:
        """Return what runs a program in the node's namespaces."""
        pid = first_process(self.folder).pid
        return ["nsenter", f"--target={pid}", "--mount", "--net", "--uts", "--ipc", "--pid", *arguments]

    def boot(self, switch: int) -> None:
        """Start the first process, connect the node and start the container runtime; needs no API server.

        Raises:
            ClusterError: The kernel or the machine refused; with the reason.
        """
        self.folder.mkdir(parents=True)
        _make_cgroups(self.cgroup)
        start_init(self.folder, "node", self.name, str(self.cluster), str(self.folder), str(cache_folder()))
        network.connect_node(self.plan, self.name, switch, first_process(self.folder).pid)
        etc = self.folder / "etc"
        etc.mkdir()
        (etc / "resolv.conf").touch()
        (etc / "containerd.toml").write_text(_containerd(), encoding="utf-8")
        for name, content in (("kubelet", self._kubelet()), ("kube-proxy", self._kube_proxy())):
            (etc / f"{name}.yaml").write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        self._link_cni_programs()
        self.start(CONTAINERD)

    def start_rest(self) -> None:
        """Start what needs the API server: all of `daemons` but the container runtime."""
        for name in self.daemons:
            if name != CONTAINERD:
                self.start(name)

    def start(self, name: str, *options: str) -> None:
        """Start one of `daemons`, with further options of its own."""
        daemon.start(name, self.command(*_in_path([*self._arguments(name), *options])), self.folder)
        # What runs in the node is the child; its parent only waits for it, and ends with it.
        daemon.record(self.folder, name, _child(daemon.recorded(self.folder, name)).pid)

    def stop(self, name: str, grace: float = 5.0) -> None:
        """End one of `daemons`; pods go on."""
        daemon.stop(self.folder, name, grace)

    def runs(self, name: str) -> bool:
        """Tell whether one of `daemons` was started and still runs."""
        found = daemon.recorded(self.folder, name)
        return found is not None and found.alive()

    def unplug(self) -> None:
        """Cut it off from all others, this machine included; what runs on it goes on."""
        network.unplug(self._switch(), self.name)

    def plug(self) -> None:
        """Undo `unplug`."""
        network.plug(self._switch(), self.name)

    def _switch(self) -> int:
        return first_process(self.cluster / SWITCH).pid

    def wait_for_runtime(self) -> None:
        """Return when the container runtime answers.

        Raises:
            ClusterError: It ended, or does not answer in time.
        """
        deadline = time.monotonic() + _START_SECONDS
        while subprocess.run(self.ctr("version"), capture_output=True, check=False).returncode != 0:
            self.check()
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"containerd of {self.name} does not answer: {daemon.log_tail(self.folder, CONTAINERD)}"
                )
            time.sleep(0.05)

    def ctr(self, *arguments: str) -> list[str]:
        """Return a command of containerd's own client, in the namespace of kubelet's images."""
        return self.command(*_in_path(["ctr", f"--address={_SOCKET}", "--namespace=k8s.io", *arguments]))

    def check(self) -> None:
        """Make sure that every process that was started still runs.

        Raises:
            ClusterError: One ended; with the end of its log.
        """
        for name in (INIT, *self.daemons):
            identity = daemon.recorded(self.folder, name)
            if identity and not identity.alive():
                raise ClusterError(
                    f"{name} of node {self.name} ended; the end of {self.folder / name}.log:\n"
                    f"{daemon.log_tail(self.folder, name)}"
                )

    def write_bridge_network(self, pods: Iterable[str]) -> None:
        """Configure the bridge plugin for pod ranges, one of each family: the node is Ready once this exists."""
        ranges = [[{"subnet": subnet}] for subnet in pods]
        routes = [{"dst": default} for default in ("0.0.0.0/0", "::/0")[: len(ranges)]]
        ipam = {"type": "host-local", "ranges": ranges, "routes": routes}
        bridge = {"type": "bridge", "bridge": "cni0", "isGateway": True, "hairpinMode": True, "ipam": ipam}
        portmap = {"type": "portmap", "capabilities": {"portMappings": True}}
        content = {"cniVersion": "1.0.0", "name": "pods", "plugins": [bridge, portmap]}
        source = self.folder / "etc" / "10-bridge.conflist"
        source.write_text(json.dumps(content), encoding="utf-8")
        target = f"{_CNI_CONFIGURATION}/10-bridge.conflist"
        network.run(self.command("cp", f"{_CLUSTER}/nodes/{self.name}/etc/10-bridge.conflist", target))

    def _link_cni_programs(self) -> None:
        programs = [str(path) for path in sorted(CNI_PLUGINS.iterdir())]
        if self.cni == "cilium":
            programs.append(_in_node(binaries.program(binaries.CILIUM_CNI)))
        network.run(self.command("mkdir", "-p", _CNI_CONFIGURATION, _CNI_PROGRAMS))
        network.run(self.command("ln", "-s", *programs, _CNI_PROGRAMS))

    def _arguments(self, name: str) -> list[str]:
        own = _CLUSTER / "nodes" / self.name / "etc"
        if name == CONTAINERD:
            return ["containerd", f"--config={own}/containerd.toml"]
        program = _in_node(binaries.program(name))
        if name == binaries.KUBELET:
            return [
                program,
                f"--config={own}/kubelet.yaml",
                f"--kubeconfig={_CLUSTER}/{self.name}.kubeconfig",
                f"--hostname-override={self.name}",
                f"--node-ip={','.join(self.plan.node_ips(self.name))}",
                "--root-dir=/var/lib/kubelet",
            ]
        if name == binaries.KUBE_PROXY:
            return [program, f"--config={own}/kube-proxy.yaml"]
        return [
            "env",
            f"K8S_NODE_NAME={self.name}",
            "CILIUM_K8S_NAMESPACE=kube-system",
            "GOMAXPROCS=2",
            program,
            *self._cilium(),
        ]

    def _kubelet(self) -> dict[str, Any]:
        pki = _CLUSTER / "pki"
        return {
            "apiVersion": "kubelet.config.k8s.io/v1beta1",
            "kind": "KubeletConfiguration",
            "address": self.ip,
            "authentication": {
                "anonymous": {"enabled": False},
                "webhook": {"enabled": True},
                "x509": {"clientCAFile": str(pki / "ca.crt")},
            },
            "authorization": {"mode": "Webhook"},
            "tlsCertFile": str(pki / f"{self.name}.crt"),
            "tlsPrivateKeyFile": str(pki / f"{self.name}.key"),
            "cgroupDriver": "cgroupfs",
            "cgroupRoot": f"/{self.cgroup}",
            "failCgroupV1": False,
            "failSwapOn": False,
            "enforceNodeAllocatable": ["pods"],
            "containerRuntimeEndpoint": f"unix://{_SOCKET}",
            "clusterDNS": [network.DNS_SERVICE_IP],
            "clusterDomain": network.CLUSTER_DOMAIN,
            "resolvConf": f"{_CLUSTER}/nodes/{self.name}/etc/resolv.conf",
            "volumePluginDir": "/var/lib/kubelet/volume-plugins",  # the default is a folder of this machine
            "nodeStatusUpdateFrequency": "4s",
            # A test machine is full long before a node in production would be.
            "evictionHard": {
                "memory.available": "100Mi",
                "nodefs.available": "1%",
                "imagefs.available": "1%",
                "nodefs.inodesFree": "1%",
            },
            "imageGCHighThresholdPercent": 100,  # there is no registry to get an image from again
            "maxPods": 110,
            "serializeImagePulls": False,
        }

    def _kube_proxy(self) -> dict[str, Any]:
        return {
            "apiVersion": "kubeproxy.config.k8s.io/v1alpha1",
            "kind": "KubeProxyConfiguration",
            "clientConnection": {"kubeconfig": f"{_CLUSTER}/{binaries.KUBE_PROXY}.kubeconfig"},
            "mode": "nftables",
            "clusterCIDR": ",".join(self.plan.pod_ranges),
            "hostnameOverride": self.name,
            "bindAddress": self.ip,
            "healthzBindAddress": "127.0.0.1:10256",
            "metricsBindAddress": "127.0.0.1:10249",
            "oomScoreAdj": 0,  # lowering it needs CAP_SYS_RESOURCE
            # Conntrack's limits are the machine's.
            "conntrack": {"maxPerCore": 0, "min": 0, "tcpEstablishedTimeout": "0s", "tcpCloseWaitTimeout": "0s"},
        }

    def _cilium(self) -> list[str]:
        """Cilium as pod network and policy engine; kube-proxy keeps the Services."""
        second = [f"--ipv6-native-routing-cidr={pods}" for pods in self.plan.pod_ranges[1:]]
        return [
            f"--k8s-kubeconfig-path={_CLUSTER}/{binaries.CILIUM_AGENT}.kubeconfig",
            "--state-dir=/run/cilium",
            f"--lib-dir={_in_node(binaries.CILIUM.folder)}",
            "--bpf-root=/sys/fs/bpf",
            "--cgroup-root=/run/cilium/cgroupv2",
            "--enable-ipv4=true",
            f"--enable-ipv6={'true' if self.plan.dual else 'false'}",
            "--ipam=kubernetes",
            "--routing-mode=native",
            f"--ipv4-native-routing-cidr={self.plan.pod_ranges[0]}",
            *second,
            "--auto-direct-node-routes=true",
            "--enable-ipv4-masquerade=false",
            "--enable-ipv6-masquerade=false",
            "--devices=eth0",
            "--kube-proxy-replacement=false",
            "--enable-l7-proxy=false",
            "--identity-allocation-mode=crd",
            "--enable-hubble=false",
            "--enable-health-checking=false",
            "--enable-endpoint-health-checking=false",
            "--enable-gops=false",
            f"--write-cni-conf-when-ready={_CNI_CONFIGURATION}/05-cilium.conflist",
            "--cni-log-file=/run/cilium/cilium-cni.log",
            # The defaults are sized for a large machine and take seconds to allocate.
            "--bpf-ct-global-tcp-max=32768",
            "--bpf-ct-global-any-max=16384",
            "--bpf-nat-global-max=32768",
            "--bpf-neigh-global-max=32768",
            "--bpf-lb-map-max=8192",
            "--bpf-policy-map-max=4096",
        ]


def start_init(folder: Path, role: str, *arguments: str) -> None:
    """Start the first process of new namespaces and return when it is set up.

    Raises:
        ClusterError: The kernel refused, with the reason.
    """
    ready = folder / "ready"
    # --kill-child: the kernel ends the node when `unshare` ends, whatever ends it.
    unshare = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--mount-proc", "--kill-child=KILL"]
    script = [sys.executable, "-I", str(Path(__file__).with_name("node_init.py")), role, *arguments, str(ready)]
    identity = daemon.start(INIT, [*unshare, *script], folder)
    deadline = time.monotonic() + _START_SECONDS
    while not ready.exists():
        if not identity.alive() or time.monotonic() > deadline:
            raise ClusterError(f"namespaces of a {role} ({folder.name}): {daemon.log_tail(folder, INIT)}")
        time.sleep(0.01)


def first_process(folder: Path) -> ProcessIdentity:
    """Return process 1 of the namespaces that `start_init` made for this folder.

    Raises:
        ClusterError: It does not run.
    """
    return _child(daemon.recorded(folder, INIT))


def power_off(folder: Path) -> None:
    """End everything in the namespaces of this folder at once, and wait for it; nothing happens when they are gone."""
    with suppress(ClusterError):
        # The kernel lets process 1 go only after all others in its pid namespace.
        first_process(folder).stop(grace=0.0)
    daemon.stop(folder, INIT, grace=0.0)


def remove_cgroups(name: str) -> None:
    """Remove the cgroup of this name from every hierarchy, once the processes in it have ended."""
    deadline = time.monotonic() + _START_SECONDS
    for root in hierarchies():
        while (root / name).exists():
            for path, _, _ in os.walk(root / name, topdown=False):
                try:
                    Path(path).rmdir()
                except OSError:  # not empty yet: a killed process is still ending
                    time.sleep(0.02)
            if time.monotonic() > deadline:
                raise ClusterError(
                    f"{root / name} cannot be removed: processes are still in it (see cgroup.procs there)"
                )


def _make_cgroups(name: str) -> None:
    for root in hierarchies():
        (root / name).mkdir(exist_ok=True)
        for file in ("cpuset.cpus", "cpuset.mems"):  # cgroup v1: empty in a new one, and then no process fits in
            if (root / name / file).exists() and (root / file).exists():
                (root / name / file).write_text((root / file).read_text(encoding="ascii"), encoding="ascii")


def hierarchies() -> list[Path]:
    """Return the roots of this machine's cgroup hierarchies: one with cgroup v2, one for each controller with v1."""
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        return [root]
    return [path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink()]


def _child(parent: ProcessIdentity | None) -> ProcessIdentity:
    deadline = time.monotonic() + 5.0
    while parent and parent.alive():
        children = Path(f"/proc/{parent.pid}/task/{parent.pid}/children").read_text(encoding="ascii").split()
        if children:
            return ProcessIdentity.of(int(children[0]))
        if time.monotonic() > deadline:
            break
        time.sleep(0.005)
    raise ClusterError("a process that should run in a node has ended; see the logs in the node's folder")


def _in_node(path: Path) -> str:
    """Translate a path in the cache to the node's view."""
    return str(Path("/run/cache") / path.relative_to(cache_folder()))


def _in_path(command: list[str]) -> list[str]:
    # A newer shim of somebody's own in PATH would break Debian's containerd.
    return ["env", "-i", f"PATH={CLANG_FOLDER}:{SYSTEM_PATH}", *command]


def _containerd() -> str:
    return f"""\
version = 2
root = "/var/lib/containerd"
state = "/run/containerd"
# The first would make a folder on this machine.
disabled_plugins = ["io.containerd.internal.v1.opt", "io.containerd.tracing.processor.v1.otlp"]
[grpc]
  address = "{_SOCKET}"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{PAUSE_IMAGE}"
  # Lowering it needs CAP_SYS_RESOURCE, and fails as "can't get final child's PID from pipe: EOF".
  restrict_oom_score_adj = true
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "{_CNI_PROGRAMS}"
    conf_dir = "{_CNI_CONFIGURATION}"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        BinaryName = "runc"
        SystemdCgroup = false
"""
