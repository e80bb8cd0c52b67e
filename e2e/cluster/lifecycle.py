"""Start, find and stop clusters: which kind of cluster, who owns it, and what is left after a crash.

The first that applies:

1. `SVLLM_KUBECONFIG` names a kubeconfig: that cluster is used and never stopped. The ambient KUBECONFIG and its
   current context are never looked at, so that nobody runs a demo on production by accident.
2. Docker runs and `kind` is on PATH: `kind` (`SVLLM_CLUSTER=local` skips this).
3. A local control plane (`local`) from `KUBEBUILDER_ASSETS`, the cache, or built once (`binaries`).

Each cluster has a folder. It names its owner, the process that must be alive for the cluster to be wanted; clusters
whose owner died are stopped by the next start of any cluster. `python -m e2e.cluster up` starts one without an owner,
which stays until `down`.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import secrets
import shutil
import signal
import ssl
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from e2e.cluster import binaries, daemon, kind, kubeconfig, local
from e2e.cluster.daemon import ProcessIdentity, current_realm
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import clusters_folder, locked
from e2e.cluster.pki import write_private

if TYPE_CHECKING:
    from e2e.cluster.binaries import Progress

Provider = Literal["kubeconfig", "kind", "local"]

NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,38}[a-z0-9])?")


@dataclass(frozen=True)
class Cluster:
    """A running cluster.

    Attributes:
        name: Name of the folder, and of the kind cluster.
        provider: `kubeconfig` (somebody else's, from SVLLM_KUBECONFIG), `kind` or `local`.
        version: Kubernetes version without the leading `v`.
        server: URL of the API server.
        kubeconfig: File with cluster-admin rights (for `kubeconfig`: whatever rights it has).
        ca_file: Certificate bundle of the API server.
        folder: State of this cluster; gone when it is stopped.
        audit_log: The audit log where it is a file of this machine (`local`), otherwise None.
    """

    name: str
    provider: Provider
    version: str
    server: str
    kubeconfig: Path
    ca_file: Path
    folder: Path
    audit_log: Path | None

    def kubeconfig_for_token(self, token: str, path: Path, *, token_file: Path | None = None) -> Path:
        """Write a kubeconfig for a bearer token to `path` and return it.

        With `token_file` the token is written there and the kubeconfig refers to it (`tokenFile`), as a mounted,
        rotating service account token would be; otherwise the token is in the kubeconfig.
        """
        if token_file is None:
            return kubeconfig.write(path, self.server, self.ca_file, {"token": token})
        write_private(token_file, token.encode())
        return kubeconfig.write(path, self.server, self.ca_file, {"tokenFile": str(token_file)})

    def audit_events(self) -> Iterator[dict[str, Any]]:
        """Yield the audit.k8s.io/v1 Events so far, in the order in which requests ended.

        A watch appears when it ends, not when it begins. A half-written last line is left for the next call.

        Raises:
            ClusterError: The cluster keeps no audit log (provider `kubeconfig`).
        """
        if self.provider == "kind":
            lines: Iterator[str] = iter(kind.audit_lines(self.name))
        elif self.audit_log is not None:
            lines = _lines(self.audit_log)
        else:
            raise ClusterError(f"cluster {self.name} was given by SVLLM_KUBECONFIG: its audit log is not ours to read")
        for line in lines:
            if line.endswith("\n"):
                yield json.loads(line)

    def stop_apiserver(self) -> None:
        """End the API server; etcd and the controllers go on. Returns when it is gone."""
        self._local()
        local.stop_apiserver(self.folder)

    def start_apiserver(self) -> None:
        """Start a stopped API server at the same address and return when it is ready."""
        program, port = self._local()
        local.start_apiserver(self.folder, program, port)

    def restart_apiserver(self) -> None:
        """Stop and start the API server: open watches break, the objects stay."""
        self.stop_apiserver()
        self.start_apiserver()

    def _local(self) -> tuple[Path, int]:
        if self.provider != "local":
            raise ClusterError(
                f"cluster {self.name} is of provider {self.provider}: only a local API server can be stopped"
            )
        state = _read_state(self.folder)
        return Path(state["kube_apiserver"]), int(state["port"])


def silent(_line: str) -> None:
    """Report nothing."""


@contextmanager
def running(name: str | None = None, *, progress: Progress = silent) -> Iterator[Cluster]:
    """Run a cluster for the length of a `with` block; it ends also on Ctrl-C, SIGTERM and SIGHUP.

    Args:
        name: A name of its own makes the cluster easy to find; without one it gets a unique one.
        progress: Called with lines for a person who waits.

    Raises:
        ClusterError: See `start`.
    """
    name = name or f"svllm-{os.getpid()}-{secrets.token_hex(3)}"
    backstop = partial(stop, name)
    with _signals_raise():
        cluster = start(name, owner=os.getpid(), progress=progress)
        atexit.register(backstop)  # for a block that is never left: a generator that nobody closes, a second Ctrl-C
        try:
            yield cluster
        finally:
            stop(name)
            atexit.unregister(backstop)


def start(name: str, *, owner: int | None, progress: Progress = silent) -> Cluster:
    """Start a cluster that ends with `stop`, or after its owner (a pid; None: never).

    Raises:
        ClusterError: A bad name, a cluster of this name that runs, or the provider's reason; nothing is left running
            then.
    """
    if not NAME.fullmatch(name):
        raise ClusterError(f"cluster name {name!r}: at most 40 lower-case letters, digits and inner dashes")
    _stop_orphans()
    # Before the lock is taken: a build takes minutes, and `status` should not wait for it.
    provider = _choose_provider()
    programs = binaries.find_or_build(progress) if provider == "local" else None
    with _locked(name) as folder:
        if folder.exists() and _wanted(folder):
            raise ClusterError(
                f"cluster {name} runs already ({folder}): take another name,"
                f" or `python -m e2e.cluster down --name {name}`"
            )
        _stop(name, folder)
        folder.mkdir(parents=True, mode=0o700)
        state: dict[str, Any] = {
            "owner": ProcessIdentity.of(owner).to_json() if owner else None,
            "provider": provider,
            "realm": current_realm(),
        }
        _write_state(folder, state)
        try:
            if provider == "kubeconfig":
                admin = Path(os.environ["SVLLM_KUBECONFIG"]).resolve()
            elif provider == "kind":
                admin = kind.start(name, folder, local.AUDIT_POLICY)
            else:
                admin = folder / "admin.kubeconfig"
                assert programs is not None  # noqa: S101 (tells the type checker what `provider == "local"` means)
                port = local.start(folder, programs, progress)
                state |= {"kube_apiserver": str(programs.kube_apiserver), "port": port}
            endpoint = kubeconfig.endpoint(admin)
            (folder / "ca.crt").write_bytes(endpoint.ca)
            version = programs.version if programs else _server_version(endpoint)
            _write_state(folder, state | {"kubeconfig": str(admin), "server": endpoint.server, "version": version})
        except BaseException:
            _stop(name, folder)
            raise
        return _cluster(folder)


def stop(name: str) -> bool:
    """Stop a cluster and delete its folder; tell whether there was one."""
    with _locked(name) as folder:
        existed = folder.exists()
        _stop(name, folder)
        return existed


def load(name: str) -> Cluster | None:
    """Return a running cluster that another process may have started, or None."""
    folder = clusters_folder() / name
    return _cluster(folder) if _wanted(folder) and "server" in _read_state(folder) else None


def processes_folder(folder: Path) -> Path:
    """Return where a hollow node records its processes, so that they end with the cluster also after a crash."""
    return folder / "processes"


def names() -> list[str]:
    """Return the names of all clusters that have a folder, running or not."""
    folder = clusters_folder()
    return sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.exists() else []


def _choose_provider() -> Provider:
    if path := os.environ.get("SVLLM_KUBECONFIG"):
        if not Path(path).is_file():
            raise ClusterError(f"SVLLM_KUBECONFIG={path}: no such file; unset it to get a cluster of your own")
        return "kubeconfig"
    chosen = os.environ.get("SVLLM_CLUSTER")
    if chosen not in {None, "kind", "local"}:
        raise ClusterError(f"SVLLM_CLUSTER={chosen}: write kind or local, or unset it")
    if chosen == "kind" and not kind.available():
        raise ClusterError("SVLLM_CLUSTER=kind, but Docker does not answer or kind is not on PATH")
    return "kind" if chosen != "local" and kind.available() else "local"


def _wanted(folder: Path) -> bool:
    """Tell whether the cluster of this folder runs and has an owner that lives (or needs none)."""
    state = _read_state(folder)
    if not state:
        return False
    if state["owner"] and not ProcessIdentity.from_json(state["owner"]).alive():
        return False
    return local.alive(folder) if state["provider"] == "local" else True


def _stop_orphans() -> None:
    for name in names():
        state = _read_state(clusters_folder() / name)
        # Another boot or container that shares this home: its pids mean nothing here, so nothing can be said of its
        # owner.
        if not state or state["realm"] != current_realm() or not state["owner"]:
            continue
        if not ProcessIdentity.from_json(state["owner"]).alive():
            stop(name)


def _stop(name: str, folder: Path) -> None:
    state = _read_state(folder)
    if state.get("provider") == "kind":
        kind.stop(name, folder)
    if folder.exists():
        daemon.stop_all(processes_folder(folder))
        local.stop(folder)
        shutil.rmtree(folder)


def _cluster(folder: Path) -> Cluster:
    state = _read_state(folder)
    provider: Provider = state["provider"]
    return Cluster(
        name=folder.name,
        provider=provider,
        version=state["version"],
        server=state["server"],
        kubeconfig=Path(state["kubeconfig"]),
        ca_file=folder / "ca.crt",
        folder=folder,
        audit_log=folder / "audit.log" if provider == "local" else None,
    )


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads((folder / "cluster.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return state


def _write_state(folder: Path, state: dict[str, Any]) -> None:
    partial = folder / ".cluster.json"
    partial.write_text(json.dumps(state, indent=1), encoding="utf-8")
    partial.replace(folder / "cluster.json")


@contextmanager
def _locked(name: str) -> Iterator[Path]:
    folder = clusters_folder() / name
    with locked(clusters_folder() / f".{name}.lock"):
        yield folder


def _server_version(endpoint: kubeconfig.Endpoint) -> str:
    context = ssl.create_default_context(cadata=endpoint.ca.decode())
    opener = urllib.request.build_opener(urllib.request.HTTPSHandler(context=context))
    # /version is readable without credentials by default (ClusterRole system:public-info-viewer).
    with suppress(OSError), opener.open(f"{endpoint.server}/version", timeout=10) as response:
        return str(json.load(response)["gitVersion"]).removeprefix("v")
    return "unknown"


def _lines(path: Path) -> Iterator[str]:
    with path.open(encoding="utf-8") as file:
        yield from file


@contextmanager
def _signals_raise() -> Iterator[None]:
    """Let SIGTERM and SIGHUP unwind the stack as Ctrl-C does, where the program has no handlers of its own."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> NoReturn:
        # Not SystemExit: pytest takes that for a failed test and goes on.
        raise KeyboardInterrupt(signal.Signals(number).name)

    taken = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) == signal.SIG_DFL]
    for number in taken:
        signal.signal(number, leave)
    try:
        yield
    finally:
        for number in taken:
            signal.signal(number, signal.SIG_DFL)
