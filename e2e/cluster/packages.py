"""What nodes need from the distribution: container runtime, network plugins, firewall, and the compiler of Cilium.

Debian's own versions are used: containerd 1.6, runc 1.1 and the network plugins 1.1 work with kubelet 1.36 (measured).
Where root may install Debian packages, what is missing is installed; elsewhere the error has the command.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster.errors import ClusterError

if TYPE_CHECKING:
    from e2e.cluster.binaries import Progress

CNI_PLUGINS = Path("/usr/lib/cni")
CLANG_FOLDER = Path("/usr/lib/llvm-19/bin")
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

# What is looked for (a program on SYSTEM_PATH, or a path) -> the Debian package that has it.
NEEDED = {
    "containerd": "containerd",
    "containerd-shim-runc-v2": "containerd",
    "ctr": "containerd",
    "runc": "runc",
    str(CNI_PLUGINS / "bridge"): "containernetworking-plugins",
    str(CNI_PLUGINS / "host-local"): "containernetworking-plugins",
    "nft": "nftables",
    "iptables": "iptables",
    "ip": "iproute2",
    "unshare": "util-linux",
    "nsenter": "util-linux",
}
NEEDED_BY_CILIUM = {str(CLANG_FOLDER / "clang"): "clang-19"}


def missing(*, cilium: bool) -> list[str]:
    """Name the packages that are not there, in the order of the tables."""
    needed = NEEDED | (NEEDED_BY_CILIUM if cilium else {})
    return list(dict.fromkeys(package for item, package in needed.items() if not shutil.which(item, path=SYSTEM_PATH)))


def ensure(progress: Progress, *, cilium: bool) -> None:
    """Install what is missing, or say how.

    Raises:
        ClusterError: Not root, no apt-get, or apt-get failed.
    """
    packages = missing(cilium=cilium)
    if not packages:
        return
    install = f"apt-get install --no-install-recommends {' '.join(packages)}"
    if os.geteuid() != 0 or not shutil.which("apt-get", path=SYSTEM_PATH):
        raise ClusterError(
            f"nodes need programs that are not on this machine; on Debian: {install} (as root; elsewhere: the packages"
            " of these names)"
        )
    for command in (
        "apt-get update --quiet",
        install.replace("install", "-o DPkg::Lock::Timeout=300 install --quiet --yes", 1),
    ):
        progress(command)
        result = subprocess.run(
            command.split(),
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
            stdin=subprocess.DEVNULL,
            # Another apt-get may be at work; and no service is to be started: a node runs its own containerd.
            env=os.environ | {"DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"},
        )
        if result.returncode != 0:
            raise ClusterError(f"`{command}` failed: {result.stderr.strip() or result.stdout.strip()}")
    if still := missing(cilium=cilium):
        raise ClusterError(
            f"apt-get installed {', '.join(packages)}, and of these is still missing: {', '.join(still)}"
        )
