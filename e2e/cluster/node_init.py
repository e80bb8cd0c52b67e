"""Process 1 of a node (or of the switch): makes its mounts, says so, and then lives until it is killed.

Started by `unshare` in new namespaces, as a script: it imports nothing but the standard library. With it the kernel
ends every process of the node, and the mounts go with the mount namespace. It reaps the orphans of the node.

    node_init.py node HOSTNAME CLUSTER_FOLDER NODE_FOLDER CACHE_FOLDER READY_FILE
    node_init.py switch READY_FILE
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import sys
from collections.abc import Iterable
from pathlib import Path

_LIBC = ctypes.CDLL(None, use_errno=True)
_MS_BIND, _MS_REC, _MS_SHARED = 0x1000, 0x4000, 0x100000
_MNT_DETACH = 2

_ENOUGH_MEMORY = 8 * 2**30
"""Bytes that must be available for a node to keep images and root file systems of containers in memory: the project's
own take 0.9 GB on each node."""

# Sysctls of the whole machine that kubelet and the Cilium agent write. A node gets a file of its own over each: it
# reads back what it wrote, and the machine keeps its values.
MACHINE_WIDE = (
    "vm/overcommit_memory",
    "vm/panic_on_oom",
    "kernel/panic",
    "kernel/panic_on_oops",
    "kernel/keys/root_maxkeys",
    "kernel/keys/root_maxbytes",
    "kernel/unprivileged_bpf_disabled",
    "kernel/timer_migration",
)


def main(arguments: list[str]) -> None:
    """Set up and stay."""
    ready = Path(arguments[-1])
    if arguments[0] == "node":
        hostname, cluster, node, cache = arguments[1:5]
        socket.sethostname(hostname)
        _mount_node(Path(cluster), Path(node), Path(cache))
    # Children that nobody waits for (containerd's shims hand theirs over) leave no zombies.
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    # Process 1 ignores signals without a handler, those of its own namespace; from outside SIGKILL always ends it.
    ready.touch()
    while True:
        signal.pause()


def _mount_node(cluster: Path, node: Path, cache: Path) -> None:
    binds = [(cluster, "/run/cluster"), (cache, "/run/cache"), (node / "log", "/var/log")]
    binds += [(node / name, f"/var/lib/{name}") for name in ("kubelet", "containerd", "cilium", "cni")]
    # Opened now: the folders may be below one that is covered next. /proc/self/fd leads to them all the same.
    opened = [(_open_folder(source), target) for source, target in binds]
    opened += [(_open_copy(name, node / "sysctl"), f"/proc/sys/{name}") for name in _existing(MACHINE_WIDE)]

    _mount("tmpfs", "/run", "tmpfs")
    # sysfs shows the network devices of the namespace that mounts it; the cgroups stay the machine's.
    Path("/run/cgroup").mkdir()
    _mount("/sys/fs/cgroup", "/run/cgroup", flags=_MS_BIND | _MS_REC)
    _mount("sysfs", "/sys", "sysfs")
    _mount("/run/cgroup", "/sys/fs/cgroup", flags=_MS_BIND | _MS_REC)
    # Before anything is shared: the umount would take the cgroups along.
    _check(_LIBC.umount2(b"/run/cgroup", _MNT_DETACH), "umount /run/cgroup")
    Path("/run/cgroup").rmdir()
    _mount("bpf", "/sys/fs/bpf", "bpf")
    # Kubelet and the network plugins have fixed paths there that this machine must not see.
    _mount("tmpfs", "/var/lib", "tmpfs")
    for descriptor, target in opened:
        if not Path(target).exists():
            Path(target).mkdir()
        _mount(f"/proc/self/fd/{descriptor}", target, flags=_MS_BIND)
        os.close(descriptor)
    if _available_memory() >= _ENOUGH_MEMORY:
        # A gigabyte of small files that nobody wants afterwards: memory is given back at once, a disk takes 20 s.
        _mount("tmpfs", "/var/lib/containerd", "tmpfs")
    # Kubelet's volumes must reach the containers' mount namespaces.
    _mount("none", "/", flags=_MS_SHARED | _MS_REC)
    for path in ("/run/lock", "/run/netns", "/run/cilium/cgroupv2"):
        Path(path).mkdir(parents=True)
    for switch in (Path("/proc/sys/net/ipv4/ip_forward"), Path("/proc/sys/net/ipv6/conf/all/forwarding")):
        if switch.exists():  # not where the kernel has no IPv6
            switch.write_text("1", encoding="ascii")


def _available_memory() -> int:
    [line] = [line for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines() if "MemAvailable" in line]
    return int(line.split()[1]) * 1024


def _open_folder(path: Path) -> int:
    path.mkdir(parents=True, exist_ok=True)
    return os.open(path, os.O_PATH | os.O_DIRECTORY)


def _open_copy(name: str, folder: Path) -> int:
    folder.mkdir(exist_ok=True)
    copy = folder / name.replace("/", ".")
    copy.write_bytes((Path("/proc/sys") / name).read_bytes())
    return os.open(copy, os.O_PATH)


def _existing(names: Iterable[str]) -> list[str]:
    return [name for name in names if (Path("/proc/sys") / name).exists()]


def _mount(source: str, target: str, kind: str = "", flags: int = 0) -> None:
    result = _LIBC.mount(source.encode(), target.encode(), kind.encode() or None, ctypes.c_ulong(flags), None)
    _check(result, f"mount {kind or 'bind'} {source} {target}")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


if __name__ == "__main__":
    main(sys.argv[1:])
