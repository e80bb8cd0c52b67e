"""The chart by the real helm on a real API server: every combination of values, and a life from install to uninstall.

The operator of a release is a process of this machine with the rights that the release gives it; its pods, and those of
engines, run on a hollow node, which counts them as ready.
"""

from __future__ import annotations

import copy
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from e2e.cluster import Cluster, ClusterError, binaries, running
from e2e.cluster.binaries import PROMETHEUS_OPERATOR, unpack
from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import ContainerStart, Launch, Outcome, Runner
from e2e.definitions import find_or_fetch
from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api import older
from tests.api.audit import Audit, now
from tests.api.kube import Kube, eventually
from tests.api.operator_process import (
    ROOT,
    OperatorProcess,
    await_condition,
    caught_up,
    new_namespace,
    resource,
    token,
)
from tests.chart.programs import CHART, KUBECTL, MANIFESTS, NAME, Helm, HelmError, Object
from tests.chart.test_kustomize import build

pytestmark = pytest.mark.cluster

CASES = sorted((Path(__file__).parents[1] / "chart" / "cases").glob("*.yaml"))
RESOURCES = 20


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    # One of its own: the chart's objects belong to the whole cluster.
    with running() as own:
        yield own


@pytest.fixture(scope="module")
def kube(cluster: Cluster) -> Iterator[Kube]:
    with closing(Kube(cluster.kubeconfig)) as client:
        yield client


@pytest.fixture(scope="module")
def others(cluster: Cluster) -> None:
    """Prometheus-operator's and Cilium's definitions, as these projects publish them."""
    try:
        definitions = find_or_fetch()
    except ClusterError as error:
        if "checksum mismatch" in str(error):  # they can be had, and are wrong
            raise
        pytest.skip(f"no definitions of other projects: {error}")
    # The API server warns about formats that it does not know; that is between it and them.
    done = asked(cluster, "create", *(f"--filename={path}" for path in definitions.values()))
    assert done.returncode == 0, done.stderr
    eventually(lambda: asked(cluster, "get", ",".join(definitions), "--all-namespaces").returncode == 0, 60)


def asked(cluster: Cluster, *arguments: str, stdin: str | None = None) -> subprocess.CompletedProcess[str]:
    command = [str(KUBECTL), "--kubeconfig", str(cluster.kubeconfig), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=120, input=stdin)  # noqa: S603 - fixed


def kubectl(cluster: Cluster, *arguments: str, stdin: str | None = None) -> str:
    done = asked(cluster, *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr, done.stderr
    return done.stdout


@contextmanager
def namespaces(kube: Kube, *names: str) -> Iterator[None]:
    for name in names:
        kube.create({"apiVersion": "v1", "kind": "Namespace", "metadata": {"name": name}})
    try:
        yield
    finally:
        for name in names:
            kube.delete(Ref(kinds.NAMESPACE, None, name))


# -------------------------------------------------------------------------------------------------------- every value


def judged(cluster: Cluster, objects: list[Object]) -> subprocess.CompletedProcess[str]:
    """What the API server says to objects that it does not keep, field by field."""
    apply = ["apply", "--server-side", "--dry-run=server", "--validate=strict", "-f", "-", "-o", "name"]
    return asked(cluster, *apply, stdin=yaml.safe_dump_all(objects))


@pytest.mark.parametrize("case", CASES, ids=lambda path: path.stem)
def test_the_api_server_takes_every_combination(
    cluster: Cluster, kube: Kube, helm: Helm, others: None, case: Path
) -> None:
    narrow = yaml.safe_load(case.read_text(encoding="utf-8")) or {}
    with new_namespace(kube, "chart") as namespace, new_namespace(kube, "models") as models:
        # A Role needs its namespace, and pods of `helm test` an account: a dry run makes neither.
        scope = models if narrow.get("watchNamespace") else ""
        options = ("--values", str(case), "--set", f"watchNamespace={scope}", "--skip-tests")
        objects = helm.template(*options, namespace=namespace)
        done = judged(cluster, objects)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == len(objects)


@pytest.mark.parametrize("variant", ["monitoring", "monitoring-namespaced"])
def test_the_api_server_takes_the_monitoring_of_the_manifests(
    cluster: Cluster, kube: Kube, others: None, tmp_path: Path, variant: str
) -> None:
    objects = [*build(tmp_path, variant.replace("monitoring", "install"), variant).values()]
    monitoring = [obj for obj in objects if obj["apiVersion"].startswith("monitoring.coreos.com/")]
    with namespaces(kube, NAME):
        done = judged(cluster, monitoring)
        assert (done.returncode, done.stderr) == (0, "")
        assert len(done.stdout.splitlines()) == 4
    # The next test makes one of the same name.
    kubectl(cluster, "wait", "--for=delete", f"namespace/{NAME}", "--timeout=120s")


WRONG: dict[str, list[tuple[tuple[str | int, ...], Any, str]]] = {
    "ServiceMonitor": [
        (("endpoints", 0, "intervall"), "30s", "field not declared in schema"),
        (("endpoints", 0, "interval"), "often", "Invalid value"),
    ],
    "PodMonitor": [
        (("namespaceSelektor",), {"any": True}, "field not declared in schema"),
        (("podMetricsEndpoints", 0, "port"), 9464, "expected string"),
    ],
    "PrometheusRule": [
        (("groups", 0, "rules", 0, "runbook"), "x", "field not declared in schema"),
        (("groups", 0, "rules", 0, "for"), "a while", "Invalid value"),
    ],
    "CiliumNetworkPolicy": [
        (("egress", 0, "toEntity"), ["kube-apiserver"], "field not declared in schema"),
        (("egress", 0, "toEntities"), ["kube-api-server"], "Unsupported value"),
    ],
}
"""By kind: a path in the spec, what is written there, and a part of the answer."""


def test_the_api_server_would_refuse_what_their_projects_do_not_take(
    cluster: Cluster, kube: Kube, helm: Helm, others: None
) -> None:
    """The control: the tests above mean something for kinds of other projects."""
    values = [word for name in ("everything", "cilium") for word in ("--values", str(CASES[0].with_stem(name)))]
    with new_namespace(kube, "chart") as namespace:
        made = helm.template(*values, namespace=namespace)
        foreign = [obj for obj in made if obj["apiVersion"].startswith(("monitoring.coreos.com/", "cilium.io/"))]
        assert {obj["kind"] for obj in foreign} == {*WRONG}
        for obj in foreign:
            assert judged(cluster, [obj]).returncode == 0
            for path, value, told in WRONG[obj["kind"]]:
                *parents, last = path
                wrong = copy.deepcopy(obj)
                node = wrong["spec"]
                for part in parents:
                    node = node[part]
                node[last] = value
                done = judged(cluster, [wrong])
                assert done.returncode, f"{obj['kind']} {path}: {value!r}"
                assert told in done.stderr, done.stderr


def test_definitions_that_are_not_the_pinned_ones_are_refused(
    tmp_path: Path, others: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pins = Path(binaries.__file__).parent / PROMETHEUS_OPERATOR.module
    for name in ("go.mod", "go.sum"):
        # Any other hash in the place of the first one.
        (tmp_path / name).write_text(re.sub(r" h1:\w{5}", " h1:AAAAA", (pins / name).read_text(), count=1))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(ClusterError, match="checksum mismatch"):
        unpack(replace(PROMETHEUS_OPERATOR, module=str(tmp_path)), print)
    assert list(tmp_path.rglob("*.yaml")) == []


# ----------------------------------------------------------------------------------------------------------- one life


@pytest.fixture(scope="module")
def previous(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Chart and operator of before, as they were."""
    return older.checkout(older.GROUPS, tmp_path_factory.mktemp("previous"))


def is_newest(kube: Kube) -> bool:
    """Whether the definition is that of today: ``status.operator`` came after the previous one."""
    name = "securevllmdeployments.securevllm.io"
    crd = kube.request("GET", f"/apis/apiextensions.k8s.io/v1/customresourcedefinitions/{name}")
    schema = crd["spec"]["versions"][0]["schema"]["openAPIV3Schema"]["properties"]["status"]
    return "operator" in schema["properties"]


def there(cluster: Cluster, objects: list[dict[str, Any]]) -> set[str]:
    """Which of these objects exist."""
    arguments = ["get", "--ignore-not-found", "-o", "name", "-f", "-"]
    return set(kubectl(cluster, *arguments, stdin=yaml.safe_dump_all(objects)).splitlines())


def pods(kube: Kube, namespace: str) -> dict[str, str]:
    """Pods of ours by uid, that are not on their way out."""
    found = [item["metadata"] for item in kube.list(kinds.POD, namespace, "securevllm.io/resource")]
    return {metadata["uid"]: metadata["name"] for metadata in found if "deletionTimestamp" not in metadata}


UNPROVED = {"verification": {"mode": "Disabled"}}
"""No canary pods beside those that must stay; nothing enforces policies on a hollow node."""

IMAGE = "registry.example.com/secure-vllm-operator"

SHAPES: list[dict[str, Any]] = [
    {"parallelism": {"tensor": 2, "nodes": 2}},
    {"parallelism": {"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "internal"}}},
    {"disaggregation": {"connector": "nixl", "router": {"image": "vllm/vllm-router:v0.1.17"}}},
]
"""Of the first resources; the others are one pod each."""


def models() -> list[dict[str, Any]]:
    shapes = [*SHAPES, *([{}] * (RESOURCES - len(SHAPES)))]
    engine = {"terminationGracePeriod": "2s"}
    return [
        resource("llm", f"model-{index}", engine=engine, security=UNPROVED, **shape)
        for index, shape in enumerate(shapes)
    ]


@pytest.mark.slow
def test_install_upgrade_rollback_uninstall_with_resources_that_run(
    cluster: Cluster, kube: Kube, helm: Helm, previous: Path, tmp_path: Path
) -> None:
    def run(*arguments: str) -> str:
        return helm(*arguments, "--namespace", NAME, kubeconfig=cluster.kubeconfig)

    def operator(term: str, source: Path = ROOT) -> OperatorProcess:
        # The rights and the service account are those that the release made.
        return OperatorProcess(cluster, kube, tmp_path / term, identity=term, source=source / "operator")

    wait = ["--wait", "--timeout", "120s"]
    with namespaces(kube, "llm"), hollow_node(cluster):
        mine = ["--set", f"image.repository={IMAGE}"]
        notes = run("install", NAME, str(previous / "charts" / NAME), "--create-namespace", *mine, *wait)
        assert "The next three commands" in notes
        assert "WARNING" not in notes
        assert not is_newest(kube)

        with operator("first", previous) as first:
            for obj in models():
                kube.create(obj)
            eventually(lambda: engines_ready(kube) == RESOURCES, 600, pause=0.5)
            eventually(lambda: len(pods(kube, "llm")) >= 2 * RESOURCES, 600, pause=0.5)
            assert first.stop() == 0
        before, secrets = pods(kube, "llm"), passwords(kube)

        since = now()
        # As docs/upgrade.md says it: what was set stays, what is new has the new chart's default.
        run("upgrade", NAME, str(CHART), "--reset-then-reuse-values", *wait)
        assert is_newest(kube)
        deployment = kube.get(Ref(kinds.DEPLOYMENT, NAME, NAME))
        assert deployment["spec"]["template"]["spec"]["containers"][0]["image"].startswith(f"{IMAGE}:")
        with operator("second") as second:
            caught_up(second, Audit(cluster), since, RESOURCES)
            assert pods(kube, "llm") == before
            assert passwords(kube) == secrets
            eventually(lambda: engines_ready(kube) == RESOURCES, 600)
            assert second.stop() == 0

        since = now()
        run("rollback", NAME, "1", *wait)
        assert not is_newest(kube)
        with operator("third", previous) as third:
            caught_up(third, Audit(cluster), since, RESOURCES)
            assert pods(kube, "llm") == before
            assert passwords(kube) == secrets
            eventually(lambda: engines_ready(kube) == RESOURCES, 600)
            assert third.stop() == 0

        # The definition is kept, and with it what runs.
        objects = helm.template("--skip-tests")
        assert len(there(cluster, objects)) == len(objects)
        run("uninstall", NAME, *wait)
        kept = eventually(lambda: (left := there(cluster, objects)) and len(left) == 1 and left, 60)
        assert kept == {"customresourcedefinition.apiextensions.k8s.io/securevllmdeployments.securevllm.io"}
        assert pods(kube, "llm") == before
        assert len(kube.list(kinds.SECURE_VLLM_DEPLOYMENT, "llm")) == RESOURCES

        # The same release takes the definition up again, and without `keep` everything goes with it.
        run("install", NAME, str(CHART), "--set", "crds.keep=false", *wait)
        assert pods(kube, "llm") == before
        # First the models, as the docs say: the garbage collector loses children whose owner's kind is gone.
        for index in range(RESOURCES):
            kube.delete(Ref(kinds.SECURE_VLLM_DEPLOYMENT, "llm", f"model-{index}"))
        eventually(lambda: pods(kube, "llm") == {}, 300, pause=0.5)
        run("uninstall", NAME, *wait)
        eventually(lambda: there(cluster, objects) == set(), 60)


def passwords(kube: Kube) -> dict[str, Any]:
    """Content of the Secrets, by name."""
    return {item["metadata"]["name"]: item["data"] for item in kube.list(kinds.SECRET, "llm")}


def engines_ready(kube: Kube) -> int:
    found = kube.list(kinds.SECURE_VLLM_DEPLOYMENT, "llm")
    conditions = [item for obj in found for item in obj.get("status", {}).get("conditions", ())]
    return sum(item["type"] == "EnginesReady" and item["status"] == "True" for item in conditions)


# -------------------------------------------------------------------------------------------------------- helm test

TEST = f"{NAME}-test"


def probing(cluster: Cluster, kube: Kube, folder: Path) -> Runner:
    """The test's pod, with the rights of its own account, and canary pods run; engines count as Ready and refuse."""

    def run(start: ContainerStart) -> Launch | Outcome | None:
        if start.container["name"] not in {"probe", "canary"}:
            return Outcome.HOLD
        env = {**start.env, "PATH": os.environ["PATH"], "PYTHONPATH": str(ROOT / "operator")}
        arguments = [*start.args]
        if start.container["name"] == "probe":
            account = start.pod["spec"]["serviceAccountName"]
            config = cluster.kubeconfig_for_token(token(kube, account=account, namespace=NAME), folder / "config")
            arguments += ["--kubeconfig", str(config)]
        return Launch([sys.executable, "-m", "securevllm", *arguments], env)

    return run


@pytest.mark.slow
def test_helm_test_measures_and_takes_its_rights_away(cluster: Cluster, kube: Kube, helm: Helm, tmp_path: Path) -> None:
    def run(*arguments: str) -> str:
        return helm(*arguments, "--namespace", NAME, kubeconfig=cluster.kubeconfig)

    def hooks() -> set[str]:
        """What is there of the test's objects, but for its pod."""
        listed = ["serviceaccount,clusterrole,clusterrolebinding", "--all-namespaces", "-o", "name"]
        return {name for name in kubectl(cluster, "get", *listed).split() if name.endswith(f"/{TEST}")}

    def left() -> list[str]:
        return [pod["metadata"]["name"] for pod in kube.list(kinds.POD, "measured") if "-canary-" in str(pod)]

    wait = ["--wait", "--timeout", "120s"]
    with namespaces(kube, "measured"), hollow_node(cluster, probing(cluster, kube, tmp_path)) as node:

        def outcome(wanted: int) -> None:
            """Test; on a slow machine a canary pod may come too late, and nothing is measured: then again."""
            for _ in range(5):
                try:
                    run("test", NAME)
                    code, told = 0, ""
                except HelmError as error:
                    state = kube.get(Ref(kinds.POD, NAME, TEST))["status"]["containerStatuses"][0]["state"]
                    log = node.log(NAME, TEST, "probe").read_text(encoding="utf-8")
                    code, told = state["terminated"]["exitCode"], f"{error}\n{log}"
                # Its pod stays for its log when it failed, and nothing that could do anything.
                assert (hooks(), left()) == (set(), [])
                if code == wanted:
                    return
                assert code == 2, told
                print(told)  # noqa: T201
            raise AssertionError(told)

        run("install", NAME, str(CHART), "--create-namespace", *wait)
        assert hooks() == set()
        # Nothing to measure is no failure.
        outcome(0)
        with OperatorProcess(cluster, kube, tmp_path / "operator") as operator:
            ref = Ref.of(kube.create(resource("measured", "llama", security=UNPROVED)))
            await_condition(kube, ref, "EnginesReady", "True", seconds=120)
            outcome(0)
            assert kube.find(Ref(kinds.POD, NAME, TEST)) is None

            engines = kube.list(kinds.POD, "measured", "securevllm.io/role=engine")
            with socket.create_server((engines[0]["status"]["podIP"], 8000)):
                outcome(1)
            outcome(0)

            # What the operator measured, with the right to read resources and no other: nothing, in mode Disabled.
            run("upgrade", NAME, str(CHART), "--set", "helmTest.measure=false,helmTest.waitSeconds=1", *wait)
            since = now()
            outcome(2)
            user = f"system:serviceaccount:{NAME}:{TEST}"
            assert {item.resource for item in Audit(cluster).requests(since, user=user)} == {"securevllmdeployments"}
            kube.delete(ref)
            eventually(lambda: pods(kube, "measured") == {}, 120)
            assert operator.stop() == 0
        run("uninstall", NAME, *wait)
    kubectl(cluster, "delete", "crd", "securevllmdeployments.securevllm.io")


# ------------------------------------------------------------------------------------------------------- wrong turns


def test_a_second_release_and_somebody_else_s_definition_are_refused(cluster: Cluster, kube: Kube, helm: Helm) -> None:
    def install(release: str, namespace: str, *options: str) -> str:
        return helm(
            *("install", release, str(CHART), "--namespace", namespace, "--create-namespace", *options),
            kubeconfig=cluster.kubeconfig,
        )

    kubectl(cluster, "apply", "--server-side", "-k", str(MANIFESTS.parent / "crds"))
    with pytest.raises(HelmError, match="securevllmdeployments"):
        install("one", "one")
    install("one", "one", "--set", "crds.enabled=false")
    # The same name again, and another name with the same cluster-wide objects.
    with pytest.raises(HelmError, match=r"cannot re-use a name that is still in use|cannot reuse a name"):
        install("one", "one", "--set", "crds.enabled=false")
    with pytest.raises(HelmError, match=r"invalid ownership metadata|exists and cannot be imported"):
        install("one", "two", "--set", "crds.enabled=false")
    helm("uninstall", "one", "--namespace", "one", kubeconfig=cluster.kubeconfig)
    objects = helm.template("--skip-tests", "--set", "crds.enabled=false", release="one", namespace="one")
    assert there(cluster, objects) == set()
    kubectl(cluster, "delete", "-k", str(MANIFESTS.parent / "crds"))
    for name in ("one", "two", NAME):
        kube.delete(Ref(kinds.NAMESPACE, None, name))
