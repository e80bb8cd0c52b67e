"""Start, find and stop clusters: which kind of cluster, who owns it, and what is left after a crash.

The first that applies:

1. `SVLLM_KUBECONFIG` names a kubeconfig: that cluster is used and never stopped. The ambient KUBECONFIG and its
   current context are never looked at, so that nobody runs a demo on production by accident.
2. Docker runs and `kind` is on PATH: `kind` (`SVLLM_CLUSTER=local` skips this).
3. A local control plane (`local`) from `KUBEBUILDER_ASSETS`, the cache, or built once (`binaries`), with real nodes in
   namespaces of this machine where they are asked for (`nodes`: Linux and root).

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
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from e2e.cluster import binaries, daemon, kind, kubeconfig, local, machine, network, nodes
from e2e.cluster.daemon import ProcessIdentity, current_realm
from e2e.cluster.errors import ClusterError
from e2e.cluster.kubectl import Kubectl
from e2e.cluster.paths import clusters_folder, locked
from e2e.cluster.pki import write_private

if TYPE_CHECKING:
    from e2e.cluster.binaries import Binaries, Progress
    from e2e.cluster.images import Image
    from e2e.cluster.node import Cni, Node

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
        nodes: The nodes that are ours to enter (`local`); elsewhere, and without nodes, none.
    """

    name: str
    provider: Provider
    version: str
    server: str
    kubeconfig: Path
    ca_file: Path
    folder: Path
    audit_log: Path | None
    nodes: tuple[Node, ...] = ()

    @property
    def kubectl(self) -> Kubectl:
        """Kubectl with the rights of `kubeconfig`."""
        return Kubectl(self.kubeconfig)

    def load_images(self, images: Sequence[Image]) -> None:
        """Make images known to every node, packing what the cache does not have.

        Raises:
            ClusterError: A runtime refused one, or the cluster is of provider `kubeconfig`.
        """
        self._takes_images()
        for image in images:
            if self.provider == "kind":
                kind.load(self.name, image)
            else:
                nodes.load_image(self.nodes, image)

    def load_archive(self, file: Path) -> None:
        """Make the images of a docker-archive file known to every node.

        Raises:
            ClusterError: No such file, a runtime refused it, or the cluster is of provider `kubeconfig`.
        """
        self._takes_images()
        if not file.is_file():
            raise ClusterError(f"{file}: no such file")
        if self.provider == "kind":
            kind.load_archive(self.name, file)
        else:
            nodes.load_archive(self.nodes, file)

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
        program, port, plan = self._local()
        local.start_apiserver(self.folder, program, port, plan)

    def restart_apiserver(self) -> None:
        """Stop and start the API server: open watches break, the objects stay."""
        self.stop_apiserver()
        self.start_apiserver()

    def restart_controllers(self) -> None:
        """Stop and start kube-controller-manager: it forgets what it believed and looks at everything again."""
        self._local()
        local.restart_controllers(self.folder)

    def _takes_images(self) -> None:
        if self.provider == "kubeconfig":
            raise ClusterError(
                f"cluster {self.name} was given by SVLLM_KUBECONFIG: its nodes get images from a registry, or from you"
            )
        if self.provider == "local" and not self.nodes:
            raise ClusterError(f"cluster {self.name} has no nodes: start it with --nodes 2")

    def _local(self) -> tuple[Path, int, network.Plan | None]:
        if self.provider != "local":
            raise ClusterError(
                f"cluster {self.name} is of provider {self.provider}: only a local API server can be stopped"
            )
        state = _read_state(self.folder)
        return Path(state["kube_apiserver"]), int(state["port"]), _plan(state)


def silent(_line: str) -> None:
    """Report nothing."""


@contextmanager
def running(
    name: str | None = None, *, progress: Progress = silent, node_count: int = 0, cni: Cni = "cilium"
) -> Iterator[Cluster]:
    """Run a cluster for the length of a `with` block; it ends also on Ctrl-C, SIGTERM and SIGHUP.

    Args:
        name: A name of its own makes the cluster easy to find; without one it gets a unique one.
        progress: Called with lines for a person who waits.
        node_count: See `start`.
        cni: See `start`.

    Raises:
        ClusterError: See `start`.
    """
    name = name or f"svllm-{os.getpid()}-{secrets.token_hex(3)}"
    backstop = partial(stop, name)
    with signals_raise():
        cluster = start(name, owner=os.getpid(), progress=progress, node_count=node_count, cni=cni)
        atexit.register(backstop)  # for a block that is never left: a generator that nobody closes, a second Ctrl-C
        try:
            yield cluster
        finally:
            stop(name)
            atexit.unregister(backstop)


def start(
    name: str, *, owner: int | None, progress: Progress = silent, node_count: int = 0, cni: Cni = "cilium"
) -> Cluster:
    """Start a cluster that ends with `stop`, or after its owner (a pid; None: never).

    Args:
        name: Of the cluster.
        owner: The process that must be alive for the cluster to be wanted.
        progress: Called with lines for a person who waits.
        node_count: Real nodes beside the control plane; with 0 a hollow node can stand in for them.
        cni: Network plugin of real nodes: `cilium` enforces NetworkPolicies, `bridge` does not.

    Raises:
        ClusterError: A bad name, a cluster of this name that runs, or the provider's reason; nothing is left running
            then.
    """
    if not NAME.fullmatch(name):
        raise ClusterError(f"cluster name {name!r}: at most 40 lower-case letters, digits and inner dashes")
    _stop_orphans()
    # Before the lock is taken: a build takes minutes, and `status` should not wait for it.
    provider = choose_provider()
    if provider == "local" and node_count:
        nodes.check_machine()
        nodes.prepare(cni, progress)
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
                admin = kind.start(name, folder, local.AUDIT_POLICY, node_count)
            else:
                admin = folder / "admin.kubeconfig"
                assert programs is not None  # noqa: S101 (tells the type checker what `provider == "local"` means)
                if node_count:
                    state |= _reserve_addresses(folder, state, node_count, cni)
                port = _start_local(folder, programs, state, progress)
                state |= {"kube_apiserver": str(programs.kube_apiserver), "port": port}
            endpoint = kubeconfig.endpoint(admin)
            (folder / "ca.crt").write_bytes(endpoint.ca)
            version = programs.version if programs else _server_version(endpoint)
            _write_state(folder, state | {"kubeconfig": str(admin), "server": endpoint.server, "version": version})
        except BaseException:
            _stop(name, folder)
            raise
        return _cluster(folder)


def _start_local(folder: Path, programs: Binaries, state: dict[str, Any], progress: Progress) -> int:
    plan = _plan(state)
    if plan is None:
        return local.start(folder, programs, progress)
    cni: Cni = state["cni"]
    nodes.connect(folder, plan)
    with ThreadPoolExecutor(max_workers=1) as pool:
        # Containers' runtimes and images take as long as the control plane: side by side.
        booting = pool.submit(nodes.boot, folder, plan, cni)
        port = local.start(folder, programs, progress, plan)
        booting.result()
    nodes.join(folder, plan, cni, Kubectl(folder / "admin.kubeconfig"), progress)
    return port


def _reserve_addresses(folder: Path, state: dict[str, Any], node_count: int, cni: Cni) -> dict[str, Any]:
    """Take addresses that no other cluster has, and write that down before anything is changed on the machine."""
    names_of_nodes = tuple(f"n{number}" for number in range(1, node_count + 1))
    with _machine_locked():
        taken = [plan.index for name in names() if (plan := _plan(_read_state(clusters_folder() / name)))]
        plan = network.free_plan(names_of_nodes, taken)
        reserved = {"network": plan.index, "nodes": names_of_nodes, "dual": plan.dual, "cni": cni}
        _write_state(folder, state | reserved)
    return reserved


def _plan(state: dict[str, Any]) -> network.Plan | None:
    if "network" not in state:
        return None
    return network.Plan(int(state["network"]), tuple(state["nodes"]), dual=bool(state.get("dual")))


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


def choose_provider() -> Provider:
    """Which kind of cluster `start` makes here.

    Raises:
        ClusterError: What SVLLM_KUBECONFIG or SVLLM_CLUSTER asks for cannot be had.
    """
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
        plan = _plan(state)
        if plan:
            nodes.stop(folder, plan)
        local.stop(folder)
        shutil.rmtree(folder)
        if plan:
            with _machine_locked():
                if not any(_plan(_read_state(clusters_folder() / name)) for name in names()):
                    machine.restore()


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
        nodes=tuple(nodes.members(folder, plan, state["cni"])) if (plan := _plan(state)) else (),
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


@contextmanager
def _machine_locked() -> Iterator[None]:
    """Hold what clusters with nodes share: the choice of addresses, and the machine's settings."""
    with locked(clusters_folder() / ".machine.lock"):
        yield


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
def signals_raise() -> Iterator[None]:
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
