"""The demo where there are no nodes: Envoy and the engine run as processes of this machine.

The gateway's rendered files are served by a real Envoy. A hollow node stands in for kubelet
(``e2e/cluster/hollow.py`` says what of it is real); nothing enforces NetworkPolicies.
"""

from __future__ import annotations

import http.client
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from e2e.cluster import running
from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import envoy_runner, fake_vllm_runner, first_of, succeed_jobs
from e2e.demo import scenes
from e2e.demo.tell import DemoError
from e2e.images import ROOT
from e2e.workload import OPERATOR, install_operator

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.demo.tell import Teller

_ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join((str(ROOT / "operator"), str(ROOT)))}


def show(stack: ExitStack, tell: Teller, *, keep: bool) -> None:
    """Run it; what was started ends with `stack`.

    Raises:
        DemoError: Something was not as it has to be.
        ClusterError: No cluster.
    """
    tell.step("A Kubernetes control plane, for this demo alone")
    cluster = stack.enter_context(running(f"demo-{os.getpid()}", progress=tell.line))
    kubectl = cluster.kubectl
    runner = first_of(envoy_runner(_program("envoy")), fake_vllm_runner(), succeed_jobs)
    stack.enter_context(hollow_node(cluster, runner))
    tell.line("a hollow node stands in for kubelet: Envoy and the engine run as processes of this machine")

    tell.step("CRD, RBAC and the operator, with its own service account")
    install_operator(kubectl, tell.until, as_pods=False)
    tell.line("applied manifests/install, but for the Deployment: the operator runs as a process, too")
    folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secure-vllm-demo-")))
    log = stack.enter_context(_operator(cluster, folder, tell))

    kubectl("create", "namespace", scenes.NAMESPACE)
    service = scenes.apply_sample(kubectl, tell)
    try:
        scenes.Conditions(service, tell).until("Ready", "True")
    except DemoError as error:
        raise DemoError(f"{error}\nlast lines of the operator's log:\n{_tail(log)}") from error
    scenes.tree(service, tell)
    tell.line("Isolated is not True here: nothing enforces the policies, and the operator measures what there is")
    gateway = Gateway(service.address("gateway"), service.host, service.authority())
    scenes.requests(service, tell, gateway.ask, "from this machine")
    scenes.policy_deleted(service, tell)
    _next(tell, cluster, service.name, keep=keep)


class Gateway:
    """A client of the gateway.

    Args:
        address: Of its pod.
        host: The Service's name, for which the certificate is checked, as a client in the cluster would.
        authority: In PEM.
    """

    def __init__(self, address: str, host: str, authority: str) -> None:
        self._address, self._host = address, host
        self._trust = ssl.create_default_context(cadata=authority)

    def ask(self, attempt: scenes.Attempt) -> tuple[int, str]:
        """Send one request; status and body."""
        connection = http.client.HTTPSConnection(self._host, timeout=10)
        raw = socket.create_connection((self._address, 8443), timeout=10)
        connection.sock = self._trust.wrap_socket(raw, server_hostname=self._host)
        body = None if attempt.body is None else json.dumps(attempt.body)
        try:
            headers = {"Content-Type": "application/json", **attempt.headers}
            connection.request(attempt.method, attempt.path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, answer.read().decode(errors="replace")
        finally:
            connection.close()


def _program(name: str) -> str:
    """Find a program of the project's own environment."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise DemoError(f"{name} is not in the project's environment; run: make setup")
    return found


@contextmanager
def _operator(cluster: Cluster, folder: Path, tell: Teller) -> Iterator[Path]:
    """Run the operator as a process, logged in as its service account and as nothing else; gives its log."""
    token = cluster.kubectl("-n", OPERATOR, "create", "token", OPERATOR, "--duration=1h").strip()
    kubeconfig = cluster.kubeconfig_for_token(token, folder / "operator.kubeconfig")
    log = folder / "operator.log"
    command = [
        *(sys.executable, "-m", "securevllm", "run", "--kubeconfig", str(kubeconfig)),
        *("--operator-namespace", OPERATOR, "--http-host", "127.0.0.1", "--http-port", "0"),
        *("--log-format", "console", "--no-canary-listener"),
    ]
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, stdout=out, stderr=out, stdin=subprocess.DEVNULL, env=_ENVIRONMENT, start_new_session=True
        )
    try:

        def leads() -> bool | None:
            if process.poll() is not None:
                raise DemoError(f"the operator ended with code {process.returncode}:\n{_tail(log)}")
            return "became the leader" in log.read_text(encoding="utf-8") or None

        tell.until(leads, "the operator leads")
        tell.line(f"the operator runs as system:serviceaccount:{OPERATOR}:{OPERATOR} and holds the Lease")
        yield log
    finally:
        process.terminate()
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            process.kill()


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])


def _next(tell: Teller, cluster: Cluster, name: str, *, keep: bool) -> None:
    tell.step("What to try next")
    if keep:
        lines = [
            f"export KUBECONFIG={cluster.kubeconfig}",
            f"kubectl -n {scenes.NAMESPACE} describe svllm {name}",
            f"kubectl -n {scenes.NAMESPACE} delete deployment {name}-gateway        # and look again: it is back",
            "Ctrl-C ends everything",
        ]
    else:
        lines = [
            f".venv/bin/securevllm render -f {scenes.SAMPLE}   every object, without a cluster",
            "docs/getting-started.md                                 on a cluster of yours",
            "make demo KEEP=1                                        the same, and it stays up for you to look at",
        ]
    tell.text("\n".join(lines))
