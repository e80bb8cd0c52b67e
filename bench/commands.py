"""The commands for people: processor time from the start of the process to its end."""

from __future__ import annotations

import resource
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import yaml

from bench.report import Measured
from tests.catalogue.releases import cache

MANIFESTS = 1000
STARTS = 5
RUNS = 10
_PATIENCE = 60.0
RELEASE = "0.33.0"

NOTES = (
    "check, routes, extraction: seconds of a processor, which other programs do not lengthen; they have one thread",
    (
        f"check: {MANIFESTS} manifests, of which two in five run vLLM, one in five is a Service and two in five are"
        " NetworkPolicies"
    ),
    f"extraction: the sdist of vLLM {RELEASE}, where a test has downloaded it before",
    "start to /healthz: from the start of the process to its first 200, with an API server that does not answer",
)


def measure(folder: Path) -> Iterator[Measured]:
    """Run the commands; less than a minute.

    Args:
        folder: an empty one for manifests.
    """
    file = folder / "manifests.yaml"
    file.write_text("---\n".join(_manifests()), encoding="utf-8")
    program = str(Path(sys.executable).parent / "securevllm")
    checks = tuple(_seconds([program, "check", "-f", str(file), "--fail-on", "never"]) for _ in range(RUNS // 3))
    yield Measured(f"check of {MANIFESTS} manifests", checks, "s", 5)
    yield Measured("routes, from process start", tuple(_seconds([program, "routes"]) for _ in range(RUNS)), "s", 0.5)
    yield Measured("start to /healthz", tuple(_until_healthy(program, folder) for _ in range(STARTS)), "s", 1)
    sdist = cache() / f"vllm-{RELEASE}.tar.gz"
    if sdist.exists():
        extract = [sys.executable, "-m", "securevllm_dev.catalogue", "extract", str(sdist)]
        yield Measured("extraction of one sdist", (_seconds(extract),), "s", 10)
    else:
        print(f"extraction is not measured: {sdist.name} is not cached; the catalogue tests download it")


def _seconds(command: Sequence[str]) -> float:
    """Seconds of a processor: what a command with one thread takes where nothing else runs."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def _until_healthy(program: str, folder: Path) -> float:
    """Seconds from the start of the operator to its first 200 of /healthz, which needs no API server."""
    kubeconfig = folder / "kubeconfig"
    cluster = {"name": "none", "cluster": {"server": "http://127.0.0.1:9"}}
    context = {"name": "none", "context": {"cluster": "none", "user": "none"}}
    users = [{"name": "none", "user": {"token": "none"}}]
    content = {"clusters": [cluster], "contexts": [context], "users": users, "current-context": "none"}
    kubeconfig.write_text(yaml.safe_dump({"apiVersion": "v1", "kind": "Config", **content}), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [program, "run", f"--kubeconfig={kubeconfig}", "--http-host=127.0.0.1", f"--http-port={port}"]
    # Made before: a client of its own for each look would take the processor from what is measured.
    with httpx.Client(trust_env=False) as client:
        began = time.monotonic()
        process = subprocess.Popen(
            [*command, "--no-canary-listener"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            while True:
                took = time.monotonic() - began
                if process.poll() is not None or took > _PATIENCE:
                    code = process.returncode
                    raise RuntimeError(f"{program} run gave no /healthz within {took:.1f} s (exit code {code})")
                try:
                    if client.get(f"http://127.0.0.1:{port}/healthz").is_success:
                        return time.monotonic() - began
                except httpx.TransportError:
                    time.sleep(0.005)
        finally:
            process.kill()
            process.wait()


def _manifests() -> Iterator[str]:
    for number in range(MANIFESTS // 5):
        for part in ("a", "b"):
            name = f"model-{number:03}-{part}"
            args = ["owner/model", "--tensor-parallel-size=2", "--max-model-len", "8192", "--enable_prefix_caching"]
            container = {"name": "vllm", "image": "vllm/vllm-openai:v0.33.0", "args": args}
            template = {"metadata": {"labels": {"app": name}}, "spec": {"containers": [container]}}
            yield yaml.safe_dump(_object("apps/v1", "Deployment", name, {"template": template}))
            peer = {"podSelector": {"matchLabels": {"app": "gateway"}}}
            policy = {"podSelector": {"matchLabels": {"app": name}}, "ingress": [{"from": [peer]}]}
            yield yaml.safe_dump(_object("networking.k8s.io/v1", "NetworkPolicy", name, policy))
        name = f"model-{number:03}"
        yield yaml.safe_dump(
            _object(
                "v1", "Service", name, {"selector": {"app": f"{name}-a"}, "ports": [{"port": 80, "targetPort": 8000}]}
            )
        )


def _object(api_version: str, kind: str, name: str, spec: Mapping[str, object]) -> dict[str, object]:
    metadata = {"name": name, "namespace": f"team-{name[-1]}"}
    return {"apiVersion": api_version, "kind": kind, "metadata": metadata, "spec": spec}
