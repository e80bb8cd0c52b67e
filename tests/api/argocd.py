"""Argo CD itself: its processes, with the rights of its own installation, and a Git repository that it syncs from.

What is installed is the ``install.yaml`` of its release without what runs pods: definitions, rights, ConfigMaps. Its
processes are those of its one program, each with the token of its own service account. Not there: dex, notifications,
network policies. The cache is a Redis in memory.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from e2e.cluster import daemon
from e2e.cluster.binaries import ARGO_CD, ARGOCD, ARGOCD_REDIS, program
from e2e.cluster.lifecycle import processes_folder
from securevllm.api.kinds import Kind, KubeObject, Ref
from tests.api.kube import Kube, eventually
from tests.api.operator_process import token
from tests.argo import argocd, environment, tool
from tests.chart.programs import KUBECTL, Helm

if TYPE_CHECKING:
    from e2e.cluster import Cluster

NAMESPACE = "argocd"
APPLICATION = Kind("argoproj.io/v1alpha1", "Application", "applications")
APPLICATION_SET = Kind("argoproj.io/v1alpha1", "ApplicationSet", "applicationsets")
CONTROLLER = f"system:serviceaccount:{NAMESPACE}:argocd-application-controller"
"""User that syncs."""
TRACKING = "argocd.argoproj.io/tracking-id"
"""Annotation of everything that an Application syncs."""
MARKS = (TRACKING, "argocd.argoproj.io/sync-options")
"""All that it writes beside what is in Git; the second on a namespace that it makes."""

_RUNS_PODS = re.compile(r"^kind: (Deployment|StatefulSet|NetworkPolicy)$", re.MULTILINE)


class ArgoCD:
    """Argo CD in namespace ``argocd`` of a cluster.

    Args:
        cluster: its processes.
        kube: an administrator.
        helm: what it renders charts with.
        folder: for everything that it writes.
    """

    def __init__(self, cluster: Cluster, kube: Kube, helm: Helm, folder: Path) -> None:
        self.kube = kube
        self._program, self._cluster, self._helm, self._folder = argocd(), cluster, helm, folder
        self._stack = ExitStack()
        self._server = ""

    def __enter__(self) -> Self:
        self._install()
        redis, repositories, server, metrics = ports(4)
        at = "127.0.0.1"
        common = ["--loglevel", "info", "--redis", f"{at}:{redis}"]
        to_repositories = f"{at}:{repositories}"
        with ExitStack() as stack:
            stack.enter_context(self._running(ARGOCD_REDIS, [f"{at}:{redis}"], redis))
            # First, because it writes what the others read: the key in argocd-secret, and the project `default`.
            arguments = [*common, "--repo-server", to_repositories, "--insecure", "--disable-auth", "--address", at]
            arguments += ["--port", str(server), "--metrics-address", at, "--metrics-port", str(metrics)]
            stack.enter_context(self._running("argocd-server", arguments, server))
            (metrics,) = ports(1)
            arguments = [*common, "--address", at, "--port", str(repositories)]
            arguments += ["--metrics-address", at, "--metrics-port", str(metrics)]
            stack.enter_context(self._running("argocd-repo-server", arguments, repositories))
            (metrics,) = ports(1)
            arguments = [*common, "--repo-server", to_repositories, "--metrics-port", str(metrics)]
            stack.enter_context(self._running("argocd-application-controller", arguments, metrics))
            metrics, probe, webhook = ports(3)
            arguments = ["--argocd-repo-server", to_repositories, "--metrics-addr", f"{at}:{metrics}"]
            arguments += ["--probe-addr", f"{at}:{probe}", "--webhook-addr", f"{at}:{webhook}"]
            stack.enter_context(self._running("argocd-applicationset-controller", arguments, probe))
            self._stack = stack.pop_all()
        self._server = f"{at}:{server}"
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def cli(self, *arguments: str) -> str:
        """Run ``argocd`` as a person who is logged in; gives what it prints."""
        return tool(self._folder, "--server", self._server, "--plaintext", *arguments)

    def refresh(self, name: str) -> KubeObject:
        """Let it look at an Application and its repository; gives what it says then, with the health of each object."""
        found: KubeObject = json.loads(self.cli("app", "get", name, "--refresh", "--output", "json"))
        return found

    def regenerate(self, name: str) -> None:
        """Ask an ApplicationSet to look at its repository."""
        annotation = {"argocd.argoproj.io/application-set-refresh": "true"}
        self.kube.patch(Ref(APPLICATION_SET, NAMESPACE, name), {"metadata": {"annotations": annotation}})

    def synced(self, name: str, revision: str = "", health: str = "", seconds: float = 60.0) -> KubeObject:
        """Wait until an Application is synced to a revision, with this health; gives it.

        Raises:
            AssertionError: with what it says of itself.
        """

        def there() -> KubeObject:
            found = self.refresh(name)
            status = found["status"]
            told = {key: status.get(key) for key in ("resources", "conditions", "health", "sync", "operationState")}
            assert status["sync"]["status"] == "Synced", told
            assert revision in {"", status["sync"]["revision"]}, told
            assert status.get("operationState", {}).get("phase") == "Succeeded", told
            assert health in {"", status["health"]["status"]}, told
            return found

        return eventually(there, seconds, pause=0.5)

    def _install(self) -> None:
        text = (ARGO_CD.folder / "install.yaml").read_text(encoding="utf-8")
        kept = [part for part in text.split("\n---\n") if not _RUNS_PODS.search(part)]
        where = ["--kubeconfig", str(self._cluster.kubeconfig)]
        subprocess.run([str(KUBECTL), *where, "create", "namespace", NAMESPACE], check=True, capture_output=True)  # noqa: S603
        command = [str(KUBECTL), *where, "apply", "-n", NAMESPACE, "--server-side", "--force-conflicts", "-f", "-"]
        done = subprocess.run(command, check=False, capture_output=True, text=True, input="\n---\n".join(kept))  # noqa: S603
        assert done.returncode == 0, done.stderr
        eventually(self._served, 30)

    def _served(self) -> bool:
        """Whether the API server knows the new kinds; until then it says 404."""
        kinds = ("applications", "applicationsets", "appprojects")
        return all(self.kube.request("GET", f"/apis/argoproj.io/v1alpha1/{kind}") for kind in kinds)

    @contextmanager
    def _running(self, name: str, arguments: list[str], port: int) -> Iterator[None]:
        """One process, until it listens; it is ended with its children."""
        folder = self._folder / name
        folder.mkdir(parents=True)
        command = [str(program(ARGOCD_REDIS if name == ARGOCD_REDIS else ARGOCD)), *arguments]
        settings = environment(folder) | {"PATH": f"{self._programs()}:{os.environ['PATH']}"}
        if name not in {ARGOCD_REDIS, "argocd-repo-server"}:
            where = self._cluster.kubeconfig_for_token(
                token(self.kube, account=name, namespace=NAMESPACE), folder / "kubeconfig"
            )
            settings |= {"KUBECONFIG": str(where), "ARGOCD_BINARY_NAME": name}
            command += ["--namespace", NAMESPACE]
        else:
            settings |= {"ARGOCD_BINARY_NAME": name}
        log = folder / "log"
        with in_session(name, command, settings, log, processes_folder(self._cluster.folder)) as process:
            eventually(lambda: _listens(process, port, log), 60)
            yield
            assert process.poll() is None, f"{name} ended: {log.read_text(encoding='utf-8')[-3000:]}"

    def _programs(self) -> Path:
        folder = self._folder / "bin"
        folder.mkdir(parents=True, exist_ok=True)
        for name, target in (("helm", self._helm.program), (ARGOCD, self._program)):
            if not (folder / name).exists():
                (folder / name).symlink_to(target)
        script = folder / "git-verify-wrapper.sh"
        script.write_bytes((ARGO_CD.folder / script.name).read_bytes())
        script.chmod(0o755)
        return folder


class Repository:
    """A Git repository with one branch, ``main``.

    Args:
        folder: that does not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.folder = folder
        self._git("init", "--quiet", "--initial-branch=main")

    @property
    def url(self) -> str:
        """For Argo CD."""
        return f"file://{self.folder}"

    def commit(self, files: Mapping[str, str | None], tag: str = "") -> str:
        """Write files, or delete those without content; gives the revision."""
        for name, content in files.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if content is None:
                path.unlink()
            else:
                path.write_text(content, encoding="utf-8")
        self._git("add", "--all")
        self._git("commit", "--quiet", "--message", "a change")
        if tag:
            self._git("tag", tag)
        return self._git("rev-parse", "HEAD")

    def _git(self, *arguments: str) -> str:
        who = {f"GIT_{role}_{part}": "test" for role in ("AUTHOR", "COMMITTER") for part in ("NAME", "EMAIL")}
        environment = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1"} | who
        done = subprocess.run(  # noqa: S603 - fixed arguments
            ["git", "-C", str(self.folder), *arguments],  # noqa: S607 - the one on PATH
            env=environment,
            check=True,
            capture_output=True,
            text=True,
        )
        return done.stdout.strip()


@contextmanager
def in_session(
    name: str, command: list[str], settings: Mapping[str, str], log: Path, processes: Path
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own, ended with its children; also by what stops the cluster after a crash of this.

    Args:
        name: of the process.
        command: program and arguments.
        settings: its environment.
        log: for what it prints; its working directory is beside it.
        processes: where the cluster's processes are recorded.
    """
    processes.mkdir(exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(  # noqa: S603 - fixed arguments
            command, env=settings, cwd=log.parent, stdout=output, stderr=output, start_new_session=True
        )
    try:
        with suppress(ProcessLookupError):  # it has ended: who waits for it says so
            daemon.record(processes, name, process.pid)
        yield process
    finally:
        _signal(process, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(10)
        _signal(process, signal.SIGKILL)
        process.wait()
        daemon.pid_file(processes, name).unlink(missing_ok=True)


def _signal(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Tell it and its children, git and helm; they may be there when it is not."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)


def ports(count: int) -> list[int]:
    """Free ports of the loopback interface."""
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in found:
            one.bind(("127.0.0.1", 0))
        return [int(one.getsockname()[1]) for one in found]


def _listens(process: subprocess.Popen[bytes], port: int, log: Path) -> bool:
    if process.poll() is not None:
        raise RuntimeError(f"it ended with {process.returncode}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


def managed(application: KubeObject, kind: str) -> list[dict[str, Any]]:
    """What an Application says of the objects of a kind that it syncs."""
    return [item for item in application["status"].get("resources", []) if item["kind"] == kind]
