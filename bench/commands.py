"""The commands for people: processor time from the start of the process to its end."""

from __future__ import annotations

import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import yaml

from bench.report import Measured
from tests.catalogue.releases import cache

MANIFESTS = 1000
RUNS = 10
RELEASE = "0.33.0"

NOTES = (
    "check, routes, extraction: seconds of a processor, which other programs do not lengthen; they have one thread",
    (
        f"check: {MANIFESTS} manifests, of which two in five run vLLM, one in five is a Service and two in five are"
        " NetworkPolicies"
    ),
    f"extraction: the sdist of vLLM {RELEASE}, where a test has downloaded it before",
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
