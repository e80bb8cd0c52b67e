"""Between the moment when a pod exists and the one when its policies are enforced, no engine can be reached.

A scanner connects to every address that a pod can get, again and again, from before the first pod exists; and from the
moment that a pod has one, of either family, to that, twenty times a second, with many attempts under way at once.
Cilium programs a pod before it starts; an engine that is late, or none at all, is an agent that was told to enforce
nothing.
"""

from __future__ import annotations

import ipaddress
import json
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e import images
from e2e.cluster.kubectl import program
from e2e.conftest import ARTEFACTS
from e2e.enforcement import can_be_withheld, withheld
from e2e.reach import OPEN
from e2e.workload import (
    Pod,
    addresses,
    apply,
    at,
    engines_of,
    new_namespace,
    start_pods,
    started,
    until,
    until_resource_ready,
)
from securevllm.render import canary
from securevllm.render.meta import COMPONENT

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl

pytestmark = pytest.mark.usefixtures("operator")

API, EVENTS = 8000, 5557
WITHHELD_SECONDS = 5.0
UNMEASURED = {"verification": {"mode": "Disabled"}}
"""The operator's canary pods listen on the engines' ports: nobody may but the tests' own controls."""
ENGINES = 50
SCANNER_CPU = "500m"
MIN_ROUNDS = 5
MIN_TRIES = 20
READY_SECONDS = 900.0
"""A generous limit for what takes a minute or two on an idle machine with two cores."""


@dataclass
class Scan:
    """What a scanner saw; filled in when it ends.

    Attributes:
        rounds: How often it went over all targets.
        seconds: How long.
        opened: Target -> seconds after its start at which a handshake completed.
        attempts: How many connections it tried.
        named: Targets whose pods were known.
        fewest: How often that of them was tried that was tried least.
        gaps: Longest time between two tries of such a target: of the middle one, and of the worst; seconds.
    """

    rounds: int = 0
    seconds: float = 0.0
    opened: dict[str, float] | None = None
    attempts: int = 0
    named: int = 0
    fewest: int = 0
    gaps: tuple[float, ...] = ()

    def __str__(self) -> str:
        return (
            f"{self.attempts} attempts in {self.seconds:.0f} s, {self.attempts / max(self.seconds, 0.01):.0f} a second;"
            f" {self.rounds} rounds over all addresses, one every {self.seconds / max(self.rounds, 1):.1f} s;"
            f" {self.named} sockets of pods that had an address, each tried {self.fewest} times or more, with pauses of"
            f" {' s for the middle one and at most '.join(f'{gap:.2f}' for gap in self.gaps)} s"
        )


@dataclass(frozen=True)
class Range:
    """Two scanners, and every IPv4 address that a pod can get; of the other family there are too many to try."""

    kubectl: Kubectl
    namespace: str
    scanners: tuple[Pod, ...]
    addresses: tuple[str, ...]


@pytest.fixture(scope="module")
def lane(kubectl: Kubectl, nodes: list[str]) -> Iterator[Range]:
    """One scanner in the namespace of the engines, and one on the other node in another namespace."""
    with ExitStack() as stack:
        namespace = stack.enter_context(new_namespace(kubectl, "race"))
        other = stack.enter_context(new_namespace(kubectl, "other"))
        scanners = start_pods(
            kubectl,
            [(namespace, "scanner", nodes[0]), (other, "scanner", nodes[1])],
            # Fifty engines that start leave a pod without a request nothing for ten seconds and more.
            cpu=SCANNER_CPU,
        )
        ranges = [
            item["spec"]["podCIDR"] for item in kubectl.get("nodes")["items"] if item["metadata"]["name"] in nodes
        ]
        every = tuple(str(address) for text in ranges for address in ipaddress.ip_network(text).hosts())
        yield Range(kubectl, namespace, tuple(scanners), every)


@contextmanager
def scanning(scanner: Pod, targets: Iterable[str], named: Naming | None = None) -> Iterator[Scan]:
    """Let a pod connect to all targets again and again for the length of the block, and once more at its end.

    Args:
        scanner: The pod.
        targets: Whatever a pod can be at.
        named: Tells which of them are there, and are tried most often.
    """
    scan = Scan()
    command = [str(program()), f"--kubeconfig={scanner.kubectl.kubeconfig}", *scanner.exec_arguments("--stdin")]
    command += ["--", "python", "-m", "reach", "--watch", *targets]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        ending = threading.Event()
        awake = threading.Thread(target=_keep_awake, args=(process, ending))
        awake.start()
        try:
            if named is not None:
                named.listeners.append(process)
            yield scan
        finally:
            if named is not None:
                named.listeners.remove(process)
            ending.set()
            awake.join()
            said, _ = process.communicate(timeout=300)
    found = json.loads(said)
    scan.rounds, scan.seconds, scan.opened = found["rounds"], found["seconds"], found["open"]
    scan.attempts, scan.named, scan.fewest = found["attempts"], found["named"], found["fewest"]
    scan.gaps = tuple(found["gaps"])


def _keep_awake(process: subprocess.Popen[str], ending: threading.Event) -> None:
    """Say something now and then: kubectl gives up a connection a minute after the last line of its standard input."""
    while not ending.wait(10):
        _say(process, "\n")


def _say(process: subprocess.Popen[str], text: str) -> None:
    with suppress(OSError, ValueError):  # it has ended
        assert process.stdin
        process.stdin.write(text)
        process.stdin.flush()


@dataclass
class Naming:
    """Tells scanners each address that a pod of a namespace gets.

    Attributes:
        namespace: Of the pods.
        ports: That are tried of each.
        pods: Every address that a pod of the cluster had -> those pods.
        listeners: Scanners.
    """

    namespace: str
    ports: tuple[int, ...]
    pods: dict[str, set[str]] = field(default_factory=dict)
    listeners: list[subprocess.Popen[str]] = field(default_factory=list)

    def see(self, address: str, namespace: str, name: str) -> None:
        """Take in what the API server said of a pod."""
        # An address may have been another pod's, of a namespace that scanners are not told about.
        had = self.pods.setdefault(address, set())
        new = f"{namespace}/{name}" not in had
        had.add(f"{namespace}/{name}")
        if new and namespace == self.namespace and address != "<none>":
            for process in [*self.listeners]:
                _say(process, "".join(f"{at(address, port)}\n" for port in self.ports))


@contextmanager
def census(kubectl: Kubectl, namespace: str) -> Iterator[Naming]:
    """Every address that a pod of the cluster has while the block runs; those of a namespace are told to scanners."""
    columns = "custom-columns=IPS:.status.podIPs[*].ip,NAMESPACE:.metadata.namespace,NAME:.metadata.name"
    command = [str(program()), f"--kubeconfig={kubectl.kubeconfig}", "get", "pods", "--all-namespaces", "--watch"]
    naming = Naming(namespace, (API, EVENTS))
    with subprocess.Popen(
        [*command, "--no-headers", "--output", columns], stdout=subprocess.PIPE, text=True
    ) as process:

        def read() -> None:
            for line in process.stdout or ():
                listed, namespace, name = line.split()
                for address in listed.split(","):
                    naming.see(address, namespace, name)

        thread = threading.Thread(target=read)
        thread.start()
        try:
            yield naming
        finally:
            process.terminate()
            thread.join()


def looked(scan: Scan, count: int, families: int) -> None:
    """Require that a scan of so many engines looked often enough to have seen something."""
    assert scan.rounds >= MIN_ROUNDS, "between its looks a scanner may have missed a window"
    assert scan.named >= 2 * count * families, "each family of each engine"
    assert scan.fewest >= MIN_TRIES, "an engine was hardly looked at"


def unexplained(lane: Range, scan: Scan, control: Iterable[Pod], pods: dict[str, set[str]]) -> dict[str, set[str]]:
    """What a scanner reached beside the controls -> whose address it was.

    Left out are canary pods of the operator, which listen to everybody and end by themselves, and other namespaces:
    where policies are withheld, they are from everybody.
    """
    reached = {target: pods.get(target.rpartition(":")[0].strip("[]"), set()) for target in scan.opened or ()}
    for target in (at(ip, API) for pod in control for ip in pod.ips):
        assert target in reached, "a control was not reached: the scan would have seen nothing"
        del reached[target]

    def counts(name: str) -> bool:
        return name.startswith(f"{lane.namespace}/") and "-canary-" not in name

    return {target: whose for target, whose in reached.items() if not whose or any(map(counts, whose))}


def resource(lane: Range, name: str, **spec: Any) -> dict[str, Any]:
    """A resource of CPU-less engines; a reader of KV events that does not exist opens one more socket."""
    sample = yaml.safe_load(images.QUICKSTART.read_text(encoding="utf-8"))
    nobody = {"podSelector": {"matchLabels": {"app": "nobody"}}}
    security = {"kvEvents": {"from": nobody, "why": "a socket that is open to all interfaces"}}
    smallest = {"model": {"name": "/models/any"}, "image": sample["spec"]["image"], "gateway": {"replicas": 1}}
    metadata = {"name": name, "namespace": lane.namespace}
    whole = {**smallest, **spec, "security": {**security, **spec.get("security", {})}}
    return {"apiVersion": sample["apiVersion"], "kind": sample["kind"], "metadata": metadata, "spec": whole}


def engines(lane: Range, name: str) -> list[dict[str, Any]]:
    """The engine pods of a resource, as they are now."""
    return engines_of(lane.kubectl, lane.namespace, name)


def addresses_of(pods: Iterable[dict[str, Any]]) -> set[str]:
    """Where they are, or were given an address."""
    return {addresses(pod)[0] for pod in pods if addresses(pod)}


def note(name: str, text: str) -> None:
    """Keep a sentence of what was measured, beside the tables."""
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / f"race-{name}.txt").write_text(f"{text}\n", encoding="utf-8")


@pytest.fixture
def late(cluster: Cluster) -> Cluster:
    """A cluster whose policy engine can be made late."""
    if not can_be_withheld(cluster):
        pytest.skip("policies are withheld by a word to Cilium's agents, on nodes of our own only")
    return cluster


def test_while_policies_are_withheld_no_engine_starts(late: Cluster, lane: Range, nodes: list[str]) -> None:
    count = 6
    targets = [f"{address}:{port}" for address in lane.addresses for port in (API, EVENTS)]
    with (
        withheld(late) as enforce,
        census(lane.kubectl, lane.namespace) as named,
        scanning(lane.scanners[0], targets, named) as scan,
    ):
        apply(lane.kubectl, resource(lane, "late", replicas=count, security=UNMEASURED))
        where = [(lane.namespace, "control", nodes[0])]
        control = start_pods(lane.kubectl, where, partial(until, seconds=READY_SECONDS), port=API)
        until(lambda: len(addresses_of(engines(lane, "late"))) == count, "every pod has an address", READY_SECONDS)
        until(lambda: all(_gate_waits(lane, pod) for pod in engines(lane, "late")), "every gate waits", READY_SECONDS)
        time.sleep(WITHHELD_SECONDS)
        assert [pod["metadata"]["name"] for pod in engines(lane, "late") if started(pod)] == []
        enforce()
        until_resource_ready(lane.kubectl, lane.namespace, "late", READY_SECONDS)
        assert all(started(pod) for pod in engines(lane, "late"))
    lane.kubectl("delete", f"--namespace={lane.namespace}", "securevllmdeployment", "late", "--wait=false")
    lane.kubectl("delete", f"--namespace={lane.namespace}", "pod", "control")  # it listens where engines do
    note("late", f"{count} engines while policies are withheld: {scan}")
    # Each had its addresses for WITHHELD_SECONDS at least: time for five times as many tries on an idle machine.
    looked(scan, count, len(lane.scanners[0].ips))
    assert unexplained(lane, scan, control, named.pods) == {}


def _gate_waits(lane: Range, pod: dict[str, Any]) -> bool:
    """Whether the gate has seen from inside that nothing is enforced."""
    where = (f"--namespace={lane.namespace}", pod["metadata"]["name"], "--container=gate")
    return "NetworkPolicies are not enforced" in lane.kubectl("logs", *where)


def test_without_the_gate_there_is_a_window(late: Cluster, lane: Range) -> None:
    """What the gate is there for; otherwise the test above would pass with an engine that is never reachable."""
    disabled = {"gate": {"disabled": "the test wants to see what happens"}}
    with withheld(late) as enforce:
        apply(lane.kubectl, resource(lane, "ungated", security=disabled))
        until(lambda: any(started(pod) for pod in engines(lane, "ungated")), "the engine runs", READY_SECONDS)
        [address] = addresses_of(engines(lane, "ungated"))
        sockets = [f"{address}:{API}", f"{address}:{EVENTS}"]
        began = time.monotonic()
        for scanner in lane.scanners:
            until(partial(_all, scanner, sockets, reached=True), "the window is open", READY_SECONDS)
        enforce()
        for scanner in lane.scanners:
            until(partial(_all, scanner, sockets, reached=False), "the window is shut", READY_SECONDS)
        note("window", f"without the gate both sockets were open to both scanners for {time.monotonic() - began:.1f} s")
    lane.kubectl("delete", f"--namespace={lane.namespace}", "securevllmdeployment", "ungated", "--wait=false")


def _all(scanner: Pod, sockets: list[str], *, reached: bool) -> bool:
    """Whether a scanner reaches every socket, or none of them."""
    return {answer == OPEN for answer in scanner.reach(sockets).values()} == {reached}


def test_without_a_policy_engine_no_engine_ever_starts_and_the_status_says_why(late: Cluster, lane: Range) -> None:
    shapes = {"alone": {}, "together": {"parallelism": {"tensor": 2, "nodes": 2}}}

    def told(name: str) -> dict[str, Any] | None:
        item = lane.kubectl.get(f"--namespace={lane.namespace}", "securevllmdeployment", name)
        conditions = item.get("status", {}).get("conditions") or ()
        return next((one for one in conditions if one.get("reason") == "PolicyNotEnforced"), None)

    with withheld(late) as enforce:
        apply(lane.kubectl, *(resource(lane, name, **shape) for name, shape in shapes.items()))
        for name in shapes:
            found = until(partial(told, name), f"{name} says that nothing is enforced", READY_SECONDS)
            assert (found["type"], found["status"]) == ("Isolated", "False")
            message = found["message"]
            assert "NetworkPolicies are not enforced: install a network plugin that does" in message
            assert "such as Cilium or Calico" in message
        pods = [pod for name in shapes for pod in engines(lane, name)]
        assert len(pods) == 3
        assert [pod["metadata"]["name"] for pod in pods if started(pod)] == []
        # It is no dead end: with an engine they start by themselves.
        enforce()
        for name in shapes:
            until_resource_ready(lane.kubectl, lane.namespace, name, READY_SECONDS)


def without_canaries(kubectl: Kubectl, namespace: str) -> None:
    """Delete the resources of a namespace and wait for the end of their canary pods.

    Those listen to everybody, on the engines' ports: when an engine gets the address of one, they look alike.
    """
    kubectl("delete", f"--namespace={namespace}", "securevllmdeployments", "--all", "--wait=true")
    selector = f"--selector={COMPONENT}={canary.COMPONENT_VALUE}"
    until(lambda: not kubectl.get("pods", "--all-namespaces", selector)["items"], "no canary pod is left", 180)


def test_no_scanner_reaches_an_engine_from_the_moment_it_exists(lane: Range, nodes: list[str]) -> None:
    without_canaries(lane.kubectl, lane.namespace)
    targets = [f"{address}:{port}" for address in lane.addresses for port in (API, EVENTS)]
    beside, foreign = lane.scanners
    with (
        census(lane.kubectl, lane.namespace) as named,
        scanning(beside, targets, named) as near,
        scanning(foreign, targets, named) as far,
    ):
        apply(lane.kubectl, resource(lane, "many", replicas=ENGINES, security=UNMEASURED))
        # Beside the engines, and as new as they are: what a scanner sees when nothing keeps it out.
        wanted = [(lane.namespace, f"late-{node}", node) for node in nodes]
        control = start_pods(lane.kubectl, wanted, partial(until, seconds=READY_SECONDS), port=API)
        until_resource_ready(lane.kubectl, lane.namespace, "many", READY_SECONDS)
        there = engines(lane, "many")
    lane.kubectl("delete", f"--namespace={lane.namespace}", "securevllmdeployment", "many", "--wait=false")
    assert len(there) == ENGINES
    assert addresses_of(there) <= set(lane.addresses)
    for scan in (near, far):
        looked(scan, ENGINES, len(beside.ips))
        assert unexplained(lane, scan, control, named.pods) == {}
    note(
        "many",
        f"{ENGINES} engines, {len(targets)} sockets: 0 connections to an engine,"
        f" {len(control)} of {len(control)} controls reached\nbeside: {near}\nother namespace: {far}",
    )
