"""The image that `operator/Dockerfile` makes: what is in it, and that the chart installs it and it does its work.

The other tests run the operator from an image that is packed from the same files in seconds. These have a cluster of
their own, as two operators for all namespaces do not go together.
"""

from __future__ import annotations

import json
import re
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from email.parser import HeaderParser
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import IO, TYPE_CHECKING, Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from e2e import build_image, images
from e2e.cluster import running
from e2e.conftest import ARTEFACTS
from e2e.helm import find_or_install
from e2e.workload import OPERATOR, advertise_gpus, condition, new_namespace, until, until_resource_ready, workers
from securevllm import __version__
from tests.chart.programs import CHART, Helm

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl

USER = 65532
TOOLS = {"pip", "setuptools", "wheel", "ensurepip"}
# Run beside the operator in its own container: there an API server that never answers (RFC 5737) takes the real one's
# place, and nobody can be asked for anything.
STARTS = 3
PROGRAM = f"""
import json, os, pathlib, subprocess, sys, time, urllib.request

def write(folder):
    try:
        pathlib.Path(folder, "x").write_text("x")
    except OSError as error:
        return error.strerror
    return "written"

def start():
    command = [sys.executable, "-m", "securevllm", "run", "--http-port=18080", "--no-canary-listener"]
    environment = os.environ | {{"KUBERNETES_SERVICE_HOST": "192.0.2.1"}}
    began, health = time.monotonic(), None
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as operator:
        while health is None and operator.poll() is None and time.monotonic() < began + 60:
            try:
                health = urllib.request.urlopen("http://127.0.0.1:18080/healthz", timeout=1).status
            except OSError:
                time.sleep(0.01)
        seconds = time.monotonic() - began
        stat = pathlib.Path("/proc", str(operator.pid), "stat")
        spent = stat.read_text().rpartition(")")[2].split()[11:13] if health else []
        operator.kill()
        return {{
            "health": health,
            "seconds": seconds,
            "processor": sum(map(int, spent)) / os.sysconf("SC_CLK_TCK"),
            "log": operator.stdout.read().decode() if health != 200 else "",
        }}

status = pathlib.Path("/proc/self/status").read_text().splitlines()
print(json.dumps({{
    "ids": [os.getuid(), os.geteuid(), os.getgid(), os.getegid()],
    "status": dict(line.split(":\\t", 1) for line in status if line.startswith(("Cap", "NoNewPrivs", "Seccomp:"))),
    "writes": {{folder: write(folder) for folder in ("/", "/app", "/packages", "/usr/local/bin", "/tmp")}},
    "starts": [start() for _ in range({STARTS})],
}}))
"""


@dataclass(frozen=True)
class Archive:
    """An image as a docker-archive.

    Attributes:
        file: The archive.
    """

    file: Path

    @cached_property
    def tags(self) -> list[str]:
        """Return its names."""
        return [str(tag) for tag in self._manifest["RepoTags"]]

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return what it says of itself."""
        with tarfile.open(self.file) as archive:
            config: dict[str, Any] = json.load(_member(archive, self._manifest["Config"]))["config"]
        return config

    @cached_property
    def entries(self) -> dict[str, tarfile.TarInfo]:
        """Return path -> what is there."""
        found: dict[str, tarfile.TarInfo] = {}
        for layer in self._layers():
            for entry in layer:
                assert not PurePosixPath(entry.name).name.startswith(".wh."), "a layer hides what another one has"
                found["/" + entry.name.strip("./")] = entry
        return found

    def read(self, path: str) -> bytes:
        """Read a file."""
        for layer in self._layers():
            for entry in layer:
                if "/" + entry.name.strip("./") == path:
                    return _member(layer, entry).read()
        raise FileNotFoundError(path)

    def matching(self, pattern: str) -> Iterator[bytes]:
        """Read all files that match."""
        for layer in self._layers():
            for entry in layer:
                if PurePosixPath("/", entry.name).match(pattern):
                    yield _member(layer, entry).read()

    @cached_property
    def _manifest(self) -> dict[str, Any]:
        with tarfile.open(self.file) as archive:
            [manifest] = json.load(_member(archive, "manifest.json"))
        return dict(manifest)

    def _layers(self) -> Iterator[tarfile.TarFile]:
        with tarfile.open(self.file) as archive:
            for name in self._manifest["Layers"]:
                with tarfile.open(fileobj=_member(archive, name)) as layer:
                    yield layer


def _member(archive: tarfile.TarFile, name: str | tarfile.TarInfo) -> IO[bytes]:
    file = archive.extractfile(name)
    assert file is not None
    return file


@pytest.fixture(scope="module")
def built() -> Archive:
    """Build it, unless it is there, or skip with what is missing."""
    if reason := build_image.missing():
        pytest.skip(reason)
    build_image.build()
    return Archive(build_image.ARCHIVE)


@pytest.fixture(scope="module")
def sbom(built: Archive) -> dict[str, Any]:
    """Read what the label names."""
    document: dict[str, Any] = json.loads(built.read(built.config["Labels"]["io.securevllm.sbom"]))
    return document


# --------------------------------------------------------------------------------------------------- what is in it


def test_it_says_who_it_runs_as_and_what_it_runs(built: Archive) -> None:
    assert images.operator_name() in {tag.rpartition("/")[2] for tag in built.tags}
    config = built.config
    assert (config["User"], config["Entrypoint"], config["Cmd"]) == (
        f"{USER}:{USER}",
        ["python", "-m", "securevllm"],
        ["run"],
    )
    assert config["Env"] == images.dockerfile_config(images.DOCKERFILE)["Env"]


def offences(entries: Mapping[str, tarfile.TarInfo]) -> dict[str, set[str]]:
    """What an image that only runs has no use for: kind -> paths."""
    programs = {path for path in entries if PurePosixPath(path).parent.name in {"bin", "sbin"}}
    return {
        "programs": {path for path in programs if not PurePosixPath(path).name.startswith("python")},
        "tools": {path for path in entries if TOOLS & {*PurePosixPath(path).parts}},
        "setuid": {path for path, entry in entries.items() if entry.mode & 0o6000},
        "writable": {path for path, entry in entries.items() if path != "/tmp" and _writable(entry)},  # noqa: S108
    }


def _writable(entry: tarfile.TarInfo) -> bool:
    """Whether the operator's user may write to it."""
    by_others = bool(entry.mode & 0o002) and not entry.issym()
    by_group = entry.gid == USER and bool(entry.mode & 0o020)
    return by_others or by_group or entry.uid == USER


def test_there_is_nothing_to_start_but_python_and_nothing_to_write_to(built: Archive) -> None:
    assert offences(built.entries) == {"programs": set(), "tools": set(), "setuid": set(), "writable": set()}


def test_the_base_image_has_what_is_not_in_it() -> None:
    """The control of the test before: all of that would have been found."""
    if reason := build_image.missing_for_base():
        pytest.skip(reason)
    [name] = build_image.base_names()
    base = build_image.base(name)
    base.prepare(lambda _line: None)
    with tarfile.open(base.layers[0].file) as layer:
        found = offences({"/" + entry.name.strip("./"): entry for entry in layer})
    assert {"/usr/bin/bash", "/usr/bin/dpkg", "/usr/local/bin/pip"} <= found["programs"]
    assert any(path.endswith("/site-packages/pip/__init__.py") for path in found["tools"])
    assert "/usr/bin/su" in found["setuid"]
    assert found["writable"]


def test_every_module_is_compiled(built: Archive) -> None:
    """Nothing can be written at run time, so what is not compiled is compiled at each start anew."""
    sources = {PurePosixPath(path) for path in built.entries if path.endswith(".py")}
    tag = f"cpython-{sys.version_info.major}{sys.version_info.minor}"
    if not any(path.endswith(f".{tag}.pyc") for path in built.entries):
        tag = next(path for path in built.entries if path.endswith(".pyc")).split(".")[-2]
    missing = [path for path in sources if f"{path.parent}/__pycache__/{path.stem}.{tag}.pyc" not in built.entries]
    assert len(sources) > 1000
    assert missing == []


def test_the_sbom_lists_what_is_installed(built: Archive, sbom: dict[str, Any]) -> None:
    assert (sbom["spdxVersion"], sbom["dataLicense"], sbom["SPDXID"]) == ("SPDX-2.3", "CC0-1.0", "SPDXRef-DOCUMENT")
    ids = [one["SPDXID"] for one in sbom["packages"]]
    assert len({*ids}) == len(ids)
    assert all(re.fullmatch(r"SPDXRef-[A-Za-z0-9.-]+", one) for one in ids)
    related = {(one["spdxElementId"], one["relatedSpdxElement"]) for one in sbom["relationships"]}
    assert related == {("SPDXRef-DOCUMENT", ids[0]), *((ids[0], one) for one in ids[1:])}

    listed = {kind: dict(_versions(sbom, kind)) for kind in ("generic", "pypi", "deb")}
    assert listed["generic"]["secure-vllm-operator"] == __version__
    assert "python" in listed["generic"]
    installed = [HeaderParser().parsestr(text.decode()) for text in built.matching("/packages/*.dist-info/METADATA")]
    assert listed["pypi"] == {canonicalize_name(one["Name"]): one["Version"] for one in installed}
    assert listed["pypi"] == dict(_locked())
    debian = [HeaderParser().parsestr(text.decode()) for text in built.matching("/var/lib/dpkg/status.d/*")]
    assert listed["deb"] == {one["Package"]: one["Version"] for one in debian}
    # What extension modules of the packages load, and Python itself.
    assert {"libc6", "libgcc-s1", "zlib1g"} <= listed["deb"].keys()


def _versions(sbom: dict[str, Any], kind: str) -> Iterator[tuple[str, str]]:
    for one in sbom["packages"]:
        [reference] = one["externalRefs"]
        if reference["referenceLocator"].startswith(f"pkg:{kind}/"):
            yield one["name"], one["versionInfo"]


def _locked() -> Iterator[tuple[str, str]]:
    """Name and version of what the lock file has for this platform."""
    for line in (images.ROOT / "requirements" / "operator.lock").read_text(encoding="utf-8").splitlines():
        if line and not line.startswith(("#", " ")):
            requirement = Requirement(line.removesuffix("\\").strip())
            if requirement.marker is None or requirement.marker.evaluate():
                [version] = requirement.specifier
                yield canonicalize_name(requirement.name), version.version


# ------------------------------------------------------------------------------------- installed as a person does it


@dataclass(frozen=True)
class Installation:
    """A cluster with the operator that the chart has installed.

    Attributes:
        cluster: The cluster.
        helm: The program.
    """

    cluster: Cluster
    helm: Helm

    @property
    def kubectl(self) -> Kubectl:
        """Kubectl with an administrator's rights."""
        return self.cluster.kubectl

    def run_helm(self, *arguments: str) -> str:
        """Run helm in the operator's namespace."""
        return self.helm(*arguments, "--namespace", OPERATOR, kubeconfig=self.cluster.kubeconfig)

    def pods(self) -> list[dict[str, Any]]:
        """Return the operator's pods."""
        selector = f"--selector=app.kubernetes.io/name={OPERATOR}"
        found: list[dict[str, Any]] = self.kubectl.get(f"--namespace={OPERATOR}", "pods", selector)["items"]
        return found


@pytest.fixture(scope="module")
def installation(built: Archive) -> Iterator[Installation]:
    """Install the chart as docs/install.md does, in a namespace that allows restricted pods only."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("SVLLM_KUBECONFIG", raising=False)
        with running(progress=_tell, node_count=2) as cluster:
            cluster.load_archive(built.file)
            cluster.load_images([images.gateway(), images.engine()])
            kubectl = cluster.kubectl
            advertise_gpus(kubectl, workers(kubectl))
            kubectl("create", "namespace", OPERATOR)
            kubectl("label", "namespace", OPERATOR, "pod-security.kubernetes.io/enforce=restricted")
            made = Installation(cluster, Helm(find_or_install(_tell)))
            # There is no registry to ask, so what runs is what was loaded.
            made.run_helm("install", OPERATOR, str(CHART), "--set", "image.pullPolicy=Never")
            yield made


def _tell(line: str) -> None:
    print(line, file=sys.__stderr__, flush=True)


def test_the_chart_s_two_pods_are_ready_and_one_leads(installation: Installation) -> None:
    kubectl, where = installation.kubectl, f"--namespace={OPERATOR}"
    until(lambda: condition(kubectl.get(where, "deployment", OPERATOR), "Available"), "the operator is available", 180)
    pods = until(lambda: found if _ready(found := installation.pods()) else None, "both pods are ready", 120)
    assert {pod["spec"]["containers"][0]["image"] for pod in pods} == {images.operator_name()}
    assert {status["restartCount"] for pod in pods for status in pod["status"]["containerStatuses"]} == {0}
    leader = kubectl.get(where, "lease", OPERATOR)["spec"]["holderIdentity"]
    assert leader in {pod["metadata"]["name"] for pod in pods}


def _ready(pods: Iterable[dict[str, Any]]) -> bool:
    return [condition(pod, "Ready") for pod in pods] == [True, True]


def test_it_makes_a_resource_ready_and_isolated_and_helm_test_agrees(installation: Installation) -> None:
    kubectl = installation.kubectl
    sample = images.QUICKSTART.read_text(encoding="utf-8")
    name = yaml.safe_load(sample)["metadata"]["name"]
    with new_namespace(kubectl, "image") as namespace:
        kubectl("apply", f"--namespace={namespace}", "--filename=-", stdin=sample)
        until_resource_ready(kubectl, namespace, name)
        until_resource_ready(kubectl, namespace, name, kind="Isolated")
        told = installation.run_helm("test", OPERATOR, "--logs")
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / "image-helm-test.txt").write_text(told, encoding="utf-8")
    assert {*re.findall(r"^Phase: +(\S+)$", told, re.MULTILINE)} == {"Succeeded"}, told
    assert f"{namespace}/{name}: ISOLATED (Measured" in told


def test_it_starts_without_a_network_as_nobody_where_nothing_can_be_written(
    installation: Installation, built: Archive
) -> None:
    pod = installation.pods()[0]["metadata"]["name"]
    said = installation.kubectl("exec", f"--namespace={OPERATOR}", pod, "--", "python", "-c", PROGRAM)
    found = json.loads(said)
    _keep_numbers(built, found["starts"])
    assert [one["health"] for one in found["starts"]] == [200] * STARTS, found["starts"]
    assert found["ids"] == [USER] * 4
    assert {*found["writes"].values()} == {"Read-only file system"}, found["writes"]
    assert all(int(found["status"][f"Cap{kind}"], 16) == 0 for kind in ("Inh", "Prm", "Eff", "Bnd", "Amb"))
    assert (found["status"]["NoNewPrivs"], found["status"]["Seccomp"]) == ("1", "2")


def _keep_numbers(built: Archive, starts: Iterable[Mapping[str, float]]) -> None:
    """Size and start of the image, in build/e2e: a busy machine is no failure."""
    size = built.file.stat().st_size / 2**20
    lines = [f"image: {size:.0f} MiB"]
    lines += [
        f"start to /healthz in its pod: {one['seconds']:.2f} s, {one['processor']:.2f} s of processor time"
        for one in starts
    ]
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / "image.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    for line in lines:
        _tell(line)
