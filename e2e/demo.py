"""``make demo``: the whole main job once, on this machine, in front of your eyes.

A real kube-apiserver with its controllers, the operator with its own service account, a resource, and the gateway's
rendered files served by a real Envoy in front of an engine. There is no kubelet here: a hollow node stands in for it
(``e2e/cluster/hollow.py`` says what of it is real). The engine is fake-vllm, which has no model.
"""

from __future__ import annotations

import argparse
import base64
import http.client
import json
import os
import shutil
import signal
import ssl
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from e2e.cluster import Cluster, ClusterError, running
from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import envoy_runner, fake_vllm_runner, first_of, succeed_jobs

ROOT = Path(__file__).resolve().parent.parent
OPERATOR = "secure-vllm-operator"
NAMESPACE = "demo"
SAMPLE = "manifests/samples/quickstart.yaml"

_WAIT = 180.0
_ENVIRONMENT = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": os.pathsep.join((str(ROOT / "operator"), str(ROOT)))}


class DemoError(Exception):
    """The demo cannot go on; the text says why."""


class Teller:
    """Prints steps and progress, with the time since the start."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._tty = sys.stdout.isatty()

    def step(self, text: str) -> None:
        """A new part of the demo."""
        print(f"\n{self._bold(f'== {text}')}", flush=True)

    def line(self, text: str = "") -> None:
        """Something that happened."""
        print(f"  {time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def text(self, text: str) -> None:
        """A block as it is."""
        print("\n".join(f"  {line}" for line in text.rstrip().splitlines()), flush=True)

    def _bold(self, text: str) -> str:
        return f"\033[1m{text}\033[0m" if self._tty else text


@dataclass(frozen=True)
class Kubectl:
    """kubectl of the project's environment, for one kubeconfig; the ambient one is never used."""

    program: str
    kubeconfig: Path

    def __call__(self, *args: str, stdin: str | None = None) -> str:
        """Run it.

        Raises:
            DemoError: with what it printed.
        """
        command = [self.program, f"--kubeconfig={self.kubeconfig}", *args]
        done = subprocess.run(command, input=stdin, capture_output=True, text=True, check=False, timeout=60)
        if done.returncode != 0:
            raise DemoError(f"kubectl {' '.join(args)}: {done.stderr.strip()}")
        return done.stdout

    def json(self, *args: str) -> Any:
        """Run it with ``-o json``."""
        return json.loads(self(*args, "-o", "json"))


def main() -> None:
    """Run the demo; exit code 1 with a reason when it cannot."""
    parser = argparse.ArgumentParser(prog="make demo", description=__doc__)
    parser.add_argument("--keep", action="store_true", help="stay up at the end, until Ctrl-C")
    keep: bool = parser.parse_args().keep
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        _demo(Teller(), keep=keep)
    except (DemoError, ClusterError) as error:
        print(f"\nThe demo stopped: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("\nInterrupted; everything that was started has been ended.", file=sys.stderr)
        sys.exit(130)


def _demo(tell: Teller, *, keep: bool) -> None:
    with ExitStack() as stack:
        tell.step("A Kubernetes control plane, for this demo alone")
        cluster = stack.enter_context(running(f"demo-{os.getpid()}", progress=tell.line))
        kubectl = Kubectl(_program("kubectl"), cluster.kubeconfig)
        runner = first_of(
            envoy_runner(_program("envoy")),
            fake_vllm_runner(),
            succeed_jobs,
        )
        stack.enter_context(hollow_node(cluster, runner))
        tell.line("a hollow node stands in for kubelet: Envoy and the engine run as processes of this machine")

        tell.step("CRD, RBAC and the operator, with its own service account")
        _install(kubectl, tell)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="secure-vllm-demo-")))
        log = stack.enter_context(_operator(cluster, kubectl, folder, tell))

        tell.step(f"kubectl apply -f {SAMPLE}")
        manifest = (ROOT / SAMPLE).read_text(encoding="utf-8")
        name = yaml.safe_load(manifest)["metadata"]["name"]
        tell.text(manifest)
        kubectl("create", "namespace", NAMESPACE)
        kubectl("-n", NAMESPACE, "apply", "-f", str(ROOT / SAMPLE))
        _follow(kubectl, name, tell, log)
        tell.text(kubectl("-n", NAMESPACE, "get", "svllm"))

        tell.step("What the operator made of it")
        _tree(kubectl, name, tell)

        tell.step("Five requests to the gateway")
        _requests(kubectl, name, tell)
        _next(tell, cluster, name, keep=keep)
        if keep:
            signal.pause()
        tell.step("Cleaning up")
    tell.line("everything that was started has been ended")


def _program(name: str) -> str:
    """A program of the project's own environment."""
    found = shutil.which(name, path=sysconfig.get_path("scripts"))
    if found is None:
        raise DemoError(f"{name} is not in the project's environment; run: make setup")
    return found


def _install(kubectl: Kubectl, tell: Teller) -> None:
    """Everything of ``manifests/install`` but the Deployment: there is no image of the operator on this machine."""
    rendered = subprocess.run(
        [kubectl.program, "kustomize", str(ROOT / "manifests/install")],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    if rendered.returncode != 0:
        raise DemoError(f"kubectl kustomize manifests/install: {rendered.stderr.strip()}")
    objects = [item for item in yaml.safe_load_all(rendered.stdout) if item["kind"] != "Deployment"]
    first = [item for item in objects if item["kind"] in ("Namespace", "CustomResourceDefinition")]
    for part in (first, [item for item in objects if item not in first]):
        kubectl("apply", "--server-side", "-f", "-", stdin=yaml.safe_dump_all(part))

    def served() -> bool:
        # Not `kubectl wait`: it ends with an error while a new definition has no conditions at all.
        status = kubectl.json("get", "crd", "securevllmdeployments.securevllm.io").get("status", {})
        return any(
            item["type"] == "Established" and item["status"] == "True" for item in status.get("conditions") or ()
        )

    _until(served, "the API server serves the new kind", tell)
    tell.line(f"applied {', '.join(sorted({item['kind'] for item in objects}))}")


@contextmanager
def _operator(cluster: Cluster, kubectl: Kubectl, folder: Path, tell: Teller) -> Iterator[Path]:
    """The operator as a process, logged in as its service account and as nothing else."""
    token = kubectl("-n", OPERATOR, "create", "token", OPERATOR, "--duration=1h").strip()
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

        def leads() -> bool:
            if process.poll() is not None:
                raise DemoError(f"the operator ended with code {process.returncode}:\n{_tail(log)}")
            return "became the leader" in log.read_text(encoding="utf-8")

        _until(leads, "the operator leads", tell)
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


def _until(check: Callable[[], bool], what: str, tell: Teller) -> None:
    """Wait, with a progress line every 5 s."""
    began = told = time.monotonic()
    while not check():
        now = time.monotonic()
        if now - began > _WAIT:
            raise DemoError(f"not seen within {_WAIT:.0f} s: {what}")
        if now - told > 5:
            told = now
            tell.line(f"... waiting until {what} ({now - began:.0f} s)")
        time.sleep(0.1)


def _follow(kubectl: Kubectl, name: str, tell: Teller, log: Path) -> None:
    """Print every turn of a condition until the resource is Ready."""
    seen: dict[str, tuple[str, str]] = {}

    def ready() -> bool:
        status = kubectl.json("-n", NAMESPACE, "get", "svllm", name).get("status", {})
        for condition in status.get("conditions", ()):
            state = condition["status"], condition["reason"]
            if seen.get(condition["type"]) != state:
                seen[condition["type"]] = state
                tell.line(f"{condition['type']:<13} {state[0]:<8} {state[1]:<22} {condition['message'][:90]}")
        return seen.get("Ready", ("", ""))[0] == "True"

    try:
        _until(ready, f"{name} is Ready", tell)
    except DemoError as error:
        raise DemoError(f"{error}\nlast lines of the operator's log:\n{_tail(log)}") from error


_KINDS = "netpol,deploy,job,svc,cm,secret,sa,pdb,pvc"


def _tree(kubectl: Kubectl, name: str, tell: Teller) -> None:
    uid = kubectl.json("-n", NAMESPACE, "get", "svllm", name)["metadata"]["uid"]
    objects = kubectl.json("-n", NAMESPACE, "get", _KINDS)["items"]
    owned = [item for item in objects if any(r["uid"] == uid for r in item["metadata"].get("ownerReferences", ()))]
    shared = [item for item in objects if item["metadata"]["name"] == "securevllm-default-deny"]
    pods = kubectl.json("-n", NAMESPACE, "get", "pods", "-l", "securevllm.io/resource")["items"]
    lines = [f"SecureVLLMDeployment/{name}"]
    lines += [f"├─ {item['kind']}/{item['metadata']['name']}" for item in owned]
    lines += [
        f"│  └─ Pod/{pod['metadata']['name']} {pod['status'].get('phase')} {pod['status'].get('podIP', '')}"
        for pod in pods
    ]
    lines += [f"(namespace) {item['kind']}/{item['metadata']['name']}: outlives every pod" for item in shared]
    tell.text("\n".join(lines))


@dataclass(frozen=True)
class Attempt:
    """One request and what has to come of it."""

    what: str
    method: str
    path: str
    key: str | None
    expected: int


def _requests(kubectl: Kubectl, name: str, tell: Teller) -> None:
    secrets = {
        item["metadata"]["name"]: {k: base64.b64decode(v).decode() for k, v in item.get("data", {}).items()}
        for item in kubectl.json("-n", NAMESPACE, "get", "secrets")["items"]
    }
    key = next(iter(secrets[f"{name}-client-keys"].values()))
    trust = ssl.create_default_context(cadata=secrets[f"{name}-gateway-tls"]["ca.crt"])
    pods = kubectl.json("-n", NAMESPACE, "get", "pods", "-l", "securevllm.io/role=gateway")["items"]
    address = pods[0]["status"]["podIP"]
    host = f"{name}-gateway.{NAMESPACE}.svc"
    chat = "/v1/chat/completions"
    attempts = (
        Attempt("allowed, with key", "POST", chat, key, 200),
        Attempt("allowed, without key", "POST", chat, None, 401),
        Attempt("allowed, wrong key", "POST", chat, "not-the-key-that-was-made", 401),
        Attempt("forbidden route", "POST", "/invocations", key, 403),
        Attempt("forbidden method", "DELETE", "/v1/models", key, 403),
    )
    wrong = []
    tell.text(f"{'':<24}{'request':<34}{'answer'}")
    for attempt in attempts:
        status, body = _ask(address, host, trust, attempt)
        tell.text(f"{attempt.what:<24}{attempt.method + ' ' + attempt.path:<34}{status}  {body[:70]}")
        if status != attempt.expected:
            wrong.append(f"{attempt.what}: {status} instead of {attempt.expected}")
    if wrong:
        raise DemoError("; ".join(wrong))


class _Connection(http.client.HTTPSConnection):
    """Connects to an address, but checks the certificate for the Service's name, as a client in the cluster would."""

    def __init__(self, address: str, host: str, trust: ssl.SSLContext) -> None:
        super().__init__(host, 443, context=trust, timeout=10)
        self._address, self._trust = address, trust

    def connect(self) -> None:
        import socket  # noqa: PLC0415 - only here

        raw = socket.create_connection((self._address, 8443), timeout=10)
        self.sock = self._trust.wrap_socket(raw, server_hostname=self.host)


def _ask(address: str, host: str, trust: ssl.SSLContext, attempt: Attempt) -> tuple[int, str]:
    connection = _Connection(address, host, trust)
    headers = {"Content-Type": "application/json"}
    if attempt.key is not None:
        headers["Authorization"] = f"Bearer {attempt.key}"
    body = json.dumps({"messages": [{"role": "user", "content": "hi"}]}) if attempt.method == "POST" else None
    try:
        connection.request(attempt.method, attempt.path, body=body, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read().decode(errors="replace").replace("\n", " ")
    finally:
        connection.close()


def _next(tell: Teller, cluster: Cluster, name: str, *, keep: bool) -> None:
    tell.step("What to try next")
    lines: Sequence[str] = (
        f"securevllm render -f {SAMPLE}      every object, without a cluster",
        "kubectl apply -k manifests/install                   on a cluster of yours",
        "make demo KEEP=1                                     the same, and it stays up for you to look at",
    )
    if keep:
        lines = (
            f"export KUBECONFIG={cluster.kubeconfig}",
            f"kubectl -n {NAMESPACE} describe svllm {name}",
            f"kubectl -n {NAMESPACE} delete netpol {name}-engine        # and look again: it is back",
            "Ctrl-C ends everything",
        )
    tell.text("\n".join(lines))


if __name__ == "__main__":
    main()
