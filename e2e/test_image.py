"""The image of the Dockerfile, really built: what is in it, as whom it runs, that it starts where nothing is writable.

The other tests run the operator from an image that is packed from the same files in seconds.
"""

from __future__ import annotations

import json
import tarfile
from typing import TYPE_CHECKING, Any

import pytest

from e2e import build_image
from e2e.conftest import ARTEFACTS
from e2e.workload import apply, until
from securevllm import __version__

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl

NAME = "secure-vllm-operator:of-the-dockerfile"
PROGRAM = """
import importlib.util, json, os, pathlib, shutil, subprocess, sys, time, urllib.request

def refused(path):
    try:
        pathlib.Path(path).write_text("x")
    except OSError:
        return True

began = time.monotonic()
command = [sys.executable, "-m", "securevllm", "run", "--http-port=18080", "--no-canary-listener"]
operator = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
health = None
while health is None and time.monotonic() < began + 60:
    try:
        health = urllib.request.urlopen("http://127.0.0.1:18080/healthz", timeout=1).status
    except OSError:
        time.sleep(0.01)
seconds = time.monotonic() - began
operator.kill()
print(json.dumps({
    "version": subprocess.run(command[:3] + ["version"], capture_output=True, text=True).stdout.strip(),
    "health": health,
    "seconds": seconds,
    "user": os.getuid(),
    "pip": [name for name in ("pip", "setuptools", "ensurepip") if importlib.util.find_spec(name)],
    "programs": [name for name in ("pip", "pip3", "gcc", "curl", "wget") if shutil.which(name)],
    "written": [path for path in ("/x", "/app/x", "/packages/x", "/tmp/x") if not refused(path)],
}))
"""


@pytest.fixture(scope="module")
def built() -> str:
    """Build it, or skip with what is missing; `.ci/run` installs it."""
    if reason := build_image.missing():
        pytest.skip(reason)
    return build_image.build(NAME)


def test_what_the_image_says_of_itself(built: str) -> None:
    with tarfile.open(build_image.ARCHIVE) as archive:
        manifest = _read(archive, "manifest.json")
        config = _read(archive, manifest[0]["Config"])["config"]
    assert [tag.rpartition("/")[2] for tag in manifest[0]["RepoTags"]] == [built]
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == (
        "65532:65532",
        ["python", "-m", "securevllm"],
        ["run"],
    )
    assert config["Labels"]["io.securevllm.sbom"] == "/operator.lock"


def _read(archive: tarfile.TarFile, name: str) -> Any:
    file = archive.extractfile(name)
    assert file is not None
    return json.load(file)


def test_it_starts_as_nobody_where_nothing_can_be_written(
    built: str, cluster: Cluster, kubectl: Kubectl, namespace: str
) -> None:
    cluster.load_archive(build_image.ARCHIVE)
    container = {
        "name": "operator",
        "image": built,
        "imagePullPolicy": "Never",
        "command": ["python", "-c", PROGRAM],
        "env": [{"name": "POD_NAME", "value": "image"}, {"name": "POD_NAMESPACE", "value": namespace}],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "runAsNonRoot": True,
            "capabilities": {"drop": ["ALL"]},
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    where = f"--namespace={namespace}"
    apply(
        kubectl,
        {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {"name": "image", "namespace": namespace},
            "spec": {"restartPolicy": "Never", "containers": [container]},
        },
    )

    def ended() -> str | None:
        phase: str = kubectl.get(where, "pod", "image")["status"]["phase"]
        return phase if phase in {"Succeeded", "Failed"} else None

    assert until(ended, "the image has run", 180) == "Succeeded", kubectl("logs", where, "image")
    found = json.loads(kubectl("logs", where, "image"))
    size = build_image.ARCHIVE.stat().st_size / 2**20
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    told = f"{size:.0f} MiB; start to /healthz in a pod: {found['seconds']:.2f} s\n"
    (ARTEFACTS / "image.txt").write_text(told, encoding="utf-8")
    assert (found["health"], found["user"]) == (200, 65532)
    assert __version__ in found["version"]
    assert (found["pip"], found["programs"], found["written"]) == ([], [], [])
