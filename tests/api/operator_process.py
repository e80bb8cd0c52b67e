"""The operator as a process with the rights of its own service account, and what its tests need around it.

The rights are those of ``manifests/install``; no test gives it more. Its token comes from a TokenRequest and is read
from a file, as in a pod.
"""

from __future__ import annotations

import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from time import sleep
from typing import TYPE_CHECKING, Any, Self

import httpx
import yaml

from securevllm.api.kinds import NAMESPACE, SECURE_VLLM_DEPLOYMENT, KubeObject, Ref
from securevllm.api.types import API_VERSION, KIND
from tests.api.kube import PATIENCE, Kube, Refused, eventually

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.audit import Audit

ROOT = Path(__file__).parents[2]
INSTALL = ROOT / "manifests" / "install"
CRD = ROOT / "crds" / "securevllm.io_securevllmdeployments.yaml"
OPERATOR_NAMESPACE = "secure-vllm-operator"
SERVICE_ACCOUNT = "secure-vllm-operator"
USER = f"system:serviceaccount:{OPERATOR_NAMESPACE}:{SERVICE_ACCOUNT}"

PATHS = {
    "ServiceAccount": "/api/v1/namespaces/{namespace}/serviceaccounts/{name}",
    "ClusterRole": "/apis/rbac.authorization.k8s.io/v1/clusterroles/{name}",
    "ClusterRoleBinding": "/apis/rbac.authorization.k8s.io/v1/clusterrolebindings/{name}",
    "Role": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/roles/{name}",
    "RoleBinding": "/apis/rbac.authorization.k8s.io/v1/namespaces/{namespace}/rolebindings/{name}",
    "CustomResourceDefinition": "/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}",
    "Namespace": "/api/v1/namespaces/{name}",
}


def install(kube: Kube, folder: Path = INSTALL) -> list[KubeObject]:
    """Apply the CRD and the rights of an installation; its Deployment, Service and policies stay out.

    Args:
        kube: an administrator.
        folder: with a ``kustomization.yaml``.

    Returns:
        What was applied.
    """
    command = [str(Path(sys.executable).parent / "kubectl"), "kustomize", str(folder)]
    built = subprocess.run(command, check=True, capture_output=True, text=True)  # noqa: S603 - fixed arguments
    objects = [obj for obj in yaml.safe_load_all(built.stdout) if obj["kind"] in PATHS]
    objects.sort(key=lambda obj: obj["kind"] not in {"Namespace", "CustomResourceDefinition"})
    for obj in objects:
        path = PATHS[obj["kind"]].format_map({"namespace": "", **obj["metadata"]})
        query = {"fieldManager": "install", "force": "true"}
        kube.request("PATCH", path, obj, query=query, content_type="application/apply-patch+yaml")
    eventually(lambda: kube.list(SECURE_VLLM_DEPLOYMENT, "default") == [])
    return objects


def token(
    kube: Kube, *, account: str = SERVICE_ACCOUNT, namespace: str = OPERATOR_NAMESPACE, seconds: int = 3600
) -> str:
    """A token of a service account (TokenRequest)."""
    body = {"apiVersion": "authentication.k8s.io/v1", "kind": "TokenRequest", "spec": {"expirationSeconds": seconds}}
    path = f"/api/v1/namespaces/{namespace}/serviceaccounts/{account}/token"
    return str(kube.request("POST", path, body)["status"]["token"])


class OperatorProcess:
    """``python -m securevllm run`` in a process of its own.

    Args:
        cluster: with the rights of ``install``.
        kube: an administrator, for the token.
        folder: for kubeconfig, token and log; one for each process.
        identity: among the candidates for the Lease.
        account: its service account, in ``namespace``.
        namespace: of the operator itself: its service account and its Lease.
        arguments: further ones of ``securevllm run``.
        canary_pods: whether it may make some; most tests look at every pod and every write.
        source: source root of the package.
        measures: whether this release measures isolation; the first one does not, and lacks the options.
        program: what the interpreter runs, instead of the package itself.
    """

    def __init__(
        self,
        cluster: Cluster,
        kube: Kube,
        folder: Path,
        *,
        identity: str = "operator-0",
        account: str = SERVICE_ACCOUNT,
        namespace: str = OPERATOR_NAMESPACE,
        arguments: Sequence[str] = (),
        canary_pods: bool = False,
        source: Path = ROOT / "operator",
        measures: bool = True,
        program: Sequence[str] = ("-m", "securevllm"),
    ) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.identity = identity
        self.namespace = namespace
        self.token_file = folder / "token"
        self.log_file = folder / "operator.log"
        self._kubeconfig = cluster.kubeconfig_for_token(
            token(kube, account=account, namespace=namespace), folder / "kubeconfig", token_file=self.token_file
        )
        self._arguments, self._source, self._program = tuple(arguments), source, tuple(program)
        # One port on one machine: several operators run side by side.
        canaries = ["--no-canary-listener", *([] if canary_pods else ["--no-canary-pods"])]
        self._canaries = tuple(canaries if measures else [])
        self._port = 0
        self._process: subprocess.Popen[bytes] | None = None
        # One client for all looks, without connections that stay: each new one loads certificates for 30 ms, which is
        # most of a processor while somebody waits for a start.
        self._http = httpx.Client(trust_env=False, timeout=5, limits=httpx.Limits(max_keepalive_connections=0))

    @property
    def pid(self) -> int:
        """Process id."""
        return self._running().pid

    @property
    def log(self) -> str:
        """Everything that it logged, over all its starts."""
        return self.log_file.read_text(encoding="utf-8")

    def start(self, *, lead: bool = True) -> Self:
        """Start it, and wait until it leads and its caches are there (``lead``), or until it is ready."""
        self.launch()
        self.wait(leading=lead)
        return self

    def launch(self) -> None:
        """Start it; wait for nothing."""
        assert self._process is None, f"{self.identity} runs already"
        self._port = _free_port()
        command = [
            *(sys.executable, *self._program, "run", "--kubeconfig", str(self._kubeconfig)),
            *("--http-host", "127.0.0.1", "--http-port", str(self._port), "--identity", self.identity),
            *("--operator-namespace", self.namespace, *self._canaries, *self._arguments),
        ]
        # Nothing of this process's environment: settings come from arguments only.
        environment = {"PYTHONPATH": str(self._source), "PATH": os.environ["PATH"], "PYTHONUNBUFFERED": "1"}
        with self.log_file.open("ab") as log:
            self._process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)  # noqa: S603 - fixed

    def wait(self, *, leading: bool = True, seconds: float = 30.0) -> None:
        """Wait until it leads and its caches are there, or until it is ready."""

        def there() -> bool:
            code = self._running().poll()
            if code is not None:
                raise RuntimeError(f"{self.identity} ended with {code}:\n{self.log[-3000:]}")
            return self.get("/leadz" if leading else "/readyz")[0] == httpx.codes.OK

        eventually(there, seconds)

    def get(self, path: str) -> tuple[int, str]:
        """Ask it: HTTP status and body; status 0 when it does not answer."""
        try:
            answer = self._http.get(f"http://127.0.0.1:{self._port}{path}")
        except httpx.TransportError:
            return 0, ""
        return answer.status_code, answer.text

    def stop(self, seconds: float = 15.0) -> int:
        """SIGTERM; gives the exit code."""
        process = self._running()
        process.terminate()
        code = process.wait(seconds * PATIENCE)
        self._process = None
        return code

    def kill(self) -> None:
        """SIGKILL: the Lease stays as it is until it expires."""
        process = self._running()
        process.kill()
        process.wait()
        self._process = None

    def revive(self) -> None:
        """Start it, unless it runs."""
        if self._process is None:
            self.launch()

    def over(self) -> int | None:
        """The exit code of one that has ended by itself, once; None while it runs, and when none was started."""
        code = self._process.poll() if self._process else None
        if code is not None:
            self._process = None
        return code

    def send(self, number: signal.Signals) -> None:
        """Send a signal, for example SIGSTOP."""
        self._running().send_signal(number)

    def ended(self, seconds: float) -> int:
        """Wait until it ends by itself; gives the exit code."""
        code = self._running().wait(seconds)
        self._process = None
        return code

    @contextmanager
    def down(self) -> Iterator[None]:
        """Stopped for the length of a ``with`` block."""
        assert self.stop() == 0
        try:
            yield
        finally:
            self.start()

    def __enter__(self) -> Self:
        try:
            return self.start()
        except BaseException:
            self.end()
            raise

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if error is not None:
            alive = self._process is not None and self._process.poll() is None
            end = "\n".join(self.log.splitlines()[-40:])
            error.add_note(f"{self.identity} {'runs' if alive else 'does not run'}; the end of its log:\n{end}")
        self.end()

    def end(self) -> None:
        """End it, if it runs, whatever it does."""
        if self._process is not None:
            self._process.send_signal(signal.SIGCONT)
            self.kill()

    def _running(self) -> subprocess.Popen[bytes]:
        assert self._process is not None, f"{self.identity} does not run"
        return self._process


@contextmanager
def new_namespace(kube: Kube, prefix: str = "svllm", labels: Mapping[str, str] | None = None) -> Iterator[str]:
    """A namespace with a fresh name, deleted afterwards (nobody waits for that)."""
    name = f"{prefix}-{secrets.token_hex(4)}"
    kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name, "labels": dict(labels or {})}})
    try:
        yield name
    finally:
        kube.delete(Ref(NAMESPACE, None, name))


def resource(namespace: str, name: str = "llama", **spec: Any) -> KubeObject:
    """A SecureVLLMDeployment: a model that the image holds, one engine; ``spec`` is merged at its top level."""
    smallest = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
    return {
        "apiVersion": API_VERSION,
        "kind": KIND,
        "metadata": {"name": name, "namespace": namespace},
        "spec": {**smallest, **spec},
    }


def condition(kube: Kube, ref: Ref, kind: str) -> dict[str, Any]:
    """A condition of a resource as it is now.

    Raises:
        AssertionError: there is none yet.
    """
    conditions = kube.get(ref).get("status", {}).get("conditions", [])
    found: dict[str, Any] | None = next((item for item in conditions if item["type"] == kind), None)
    assert found is not None, f"{ref} has no condition {kind}"
    return found


def await_condition(
    kube: Kube, ref: Ref, kind: str, status: str, *, reason: str = "", seconds: float = 15.0
) -> dict[str, Any]:
    """Wait for a condition of the current generation; gives it."""

    def there() -> dict[str, Any]:
        obj = kube.get(ref)
        found = condition(kube, ref, kind)
        assert found["observedGeneration"] == obj["metadata"]["generation"], found
        assert found["status"] == status, found
        assert reason in {"", found["reason"]}, found
        return found

    return eventually(there, seconds)


def settled(kube: Kube, ref: Ref, seconds: float = 20.0) -> KubeObject:
    """Wait until the current generation was reconciled with all its objects applied; gives the resource."""

    def there() -> KubeObject:
        obj = kube.get(ref)
        status = obj.get("status", {})
        assert status.get("observedGeneration") == obj["metadata"]["generation"], status
        reasons = {item["type"]: item["reason"] for item in status["conditions"]}
        assert reasons["Accepted"] == "SpecAccepted", status["conditions"]
        assert not {"ApplyFailed", "ForeignObject", "PolicyNotApplied", "NotCreated"} & set(reasons.values()), reasons
        return obj

    return eventually(there, seconds)


def total(metrics: str, name: str, label: str = "") -> float:
    """Sum of a counter over all label sets that contain this label."""
    lines = [line for line in metrics.splitlines() if line.startswith(f"{name}{{") and label in line]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def caught_up(operator: OperatorProcess, audit: Audit, since: str, resources: int, seconds: float = 150.0) -> None:
    """Wait until a new leader has reconciled so many resources, and then writes nothing for a while."""

    def looked() -> bool:
        metrics = operator.get("/metrics")[1]
        return total(metrics, "securevllm_reconcile_total", 'result="success"') >= resources

    def writes_nothing() -> bool:
        before = len(audit.writes(since, user=USER))
        sleep(3)
        return len(audit.writes(since, user=USER)) == before

    eventually(looked, seconds, pause=0.5)
    eventually(writes_nothing, seconds)


def quiet(kube: Kube, ref: Ref, seconds: float = 1.0) -> KubeObject:
    """Wait until a resource has not changed for a while; gives it."""

    def unchanged() -> KubeObject:
        obj = kube.get(ref)
        sleep(seconds)
        assert kube.get(ref) == obj
        return obj

    return eventually(unchanged, 30)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


__all__ = ["Kube", "OperatorProcess", "Refused", "eventually", "install", "new_namespace", "resource", "token"]
