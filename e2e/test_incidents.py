"""Incidents on real nodes: what lapses, how soon the status says so, what mode Enforce does, how soon it is mended.

One resource in mode Enforce that is measured every 10 s, and others in mode Report with the default, where every engine
is tried once in 20 s. All times are in build/e2e/incidents.txt.
"""

from __future__ import annotations

import os
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest

from e2e import enforcement, images
from e2e.cluster import binaries
from e2e.cluster.errors import TooLate
from e2e.cluster.kubectl import KubectlError
from e2e.conftest import ARTEFACTS
from e2e.reach import OPEN, SILENT
from e2e.workload import (
    ALLOW_INGRESS,
    OPERATOR,
    PORT,
    Pod,
    addresses,
    apply,
    new_namespace,
    pods_of,
    policy,
    secret,
    start_pods,
    until,
    until_resource_ready,
)
from securevllm.render import canary
from securevllm.render.meta import COMPONENT

if TYPE_CHECKING:
    from pathlib import Path

    from e2e.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl
    from e2e.cluster.node import Node
    from e2e.workload import Cells

STRICT = "strict"
TOLD = ("told-0", "told-1", "told-2")
EVERY = (STRICT, *TOLD)
ENGINE_PORT = 8000
LAPSE = "nothing enforces policies any more"
SOON = 60.0
"""A lapse is told within so many seconds."""
_UNDER_WAY = 5.0
"""Seconds that a round without canary pods may take."""
LONG = 240.0
"""For what has no goal; on a machine that is many times slower."""

pytestmark = pytest.mark.usefixtures("operator")


@dataclass(frozen=True)
class Seen:
    """What the API server says at one moment.

    Attributes:
        resources: by name.
        endpoints: ready pods behind each Service, by its name.
        policies: names of the NetworkPolicies.
    """

    resources: Mapping[str, dict[str, Any]]
    endpoints: Mapping[str, int]
    policies: frozenset[str]

    def condition(self, name: str, kind: str) -> dict[str, str]:
        """A condition of a resource."""
        found = self.resources[name].get("status", {}).get("conditions") or ()
        return next((one for one in found if one["type"] == kind), {"status": "", "reason": ""})

    def told(self, name: str, kind: str) -> tuple[str, str]:
        """Its status and reason."""
        found = self.condition(name, kind)
        return found["status"], found["reason"]


Look = Callable[[Seen], bool]
Try = Callable[[], bool]


@dataclass(frozen=True)
class Scene:
    """Resources that are served and isolated, and who attacks them.

    Attributes:
        kubectl: of the cluster.
        namespace: of the resources.
        client: a pod of the same namespace, which may ask the gateways.
        attackers: the client, and a pod of another namespace on each node.
        engines: address and port of each resource's engine.
        access: certificate authority and key of each resource's gateway.
    """

    kubectl: Kubectl
    namespace: str
    client: Pod
    attackers: tuple[Pod, ...]
    engines: Mapping[str, str]
    access: Mapping[str, tuple[str, str]]

    def look(self) -> Seen:
        """One request for all of it: what looks often must not keep the machine busy."""
        return look(self.kubectl, self.namespace)

    def ask(self, name: str) -> int:
        """HTTP status of a completion through the gateway, with the key."""
        authority, key = self.access[name]
        url = f"https://{name}-gateway.{self.namespace}.svc/v1/chat/completions"
        body = {"messages": [{"role": "user", "content": "hi"}]}
        headers = {"Authorization": f"Bearer {key}"}
        return self.client.request(url, authority, method="POST", headers=headers, body=body)[0]

    def reached(self, answer: str, *, some: bool = False) -> Try:
        """Whether a pod of another namespace gets this answer from every engine, or from some."""

        def dial() -> bool:
            answers = self.attackers[-1].reach(self.engines.values()).values()
            return answer in answers if some else {*answers} == {answer}

        return dial

    def attack(self, answer: str) -> dict[Pod, dict[str, str]]:
        """Cells: every attacker, every engine; and that the attackers of the other namespace have a network at all."""
        control = {f"{self.client.ip}:{PORT}": OPEN}
        cells = {pod: dict.fromkeys(self.engines.values(), answer) for pod in self.attackers}
        return {pod: targets if pod == self.client else targets | control for pod, targets in cells.items()}


@dataclass
class Times:
    """When something was seen, in seconds after the incident or after it was mended."""

    rows: list[tuple[str, str, float]] = field(default_factory=list)

    def wait(
        self,
        scene: Scene,
        incident: str,
        looks: Mapping[str, Look],
        tries: Mapping[str, Try] = MappingProxyType({}),
        since: float | None = None,
    ) -> None:
        """Look and try for all of it at the same time; note when each was first seen, counted from ``since`` or now."""
        began = time.monotonic() if since is None else since
        left = dict(looks)

        def all_seen() -> bool | None:
            seen = scene.look()
            for what in [what for what, holds in left.items() if holds(seen)]:
                del left[what]
                self.rows.append((incident, what, time.monotonic() - began))
            return not left or None

        def attempt(what: str) -> None:
            until(lambda: tries[what]() or None, f"{incident}: {what}", LONG)
            self.rows.append((incident, what, time.monotonic() - began))

        with ThreadPoolExecutor(max_workers=1 + len(tries)) as pool:
            tried = [pool.submit(attempt, what) for what in tries]
            try:
                until(all_seen, f"{incident}: {', '.join(looks)}", LONG)
            except TooLate as error:
                conditions = {name: scene.look().told(name, "Isolated") for name in EVERY}
                raise TooLate(f"{error}; left: {', '.join(left)}; {conditions}") from error
            for one in tried:
                one.result()

    def of(self, incident: str, what: str) -> list[float]:
        """How long all of a kind took, in order."""
        return sorted(took for told, seen, took in self.rows if told == incident and seen.startswith(what))

    def write(self) -> None:
        """Keep the table as text."""
        lines = [f"{took:7.1f} s  {incident}: {what}" for incident, what, took in self.rows]
        if lapses := self.of(LAPSE, "Isolated=False"):
            lines.append(f"{LAPSE} -> Isolated=False: p50 {statistics.median(lapses):.1f} s of {len(lapses)}")
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        (ARTEFACTS / "incidents.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def times() -> Iterator[Times]:
    """Collect times; the table is in build/e2e."""
    table = Times()
    yield table
    table.write()


@pytest.fixture(scope="module")
def scene(kubectl: Kubectl, operator: None, nodes: list[str]) -> Iterator[Scene]:  # noqa: ARG001 - it is there
    """All resources are Ready and isolated; their engines are on the two nodes in turn."""
    with new_namespace(kubectl, "incident") as namespace, new_namespace(kubectl, "elsewhere") as other:
        for number, name in enumerate(EVERY):
            apply(kubectl, _resource(namespace, name, nodes[number % 2], strict=name == STRICT))
        where = [(namespace, "client", nodes[0]), (other, "attacker-0", nodes[0]), (other, "attacker-1", nodes[1])]
        client, *attackers = start_pods(kubectl, where)
        for name in EVERY:
            until_resource_ready(kubectl, namespace, name)
        engines = {
            pod["metadata"]["labels"]["app.kubernetes.io/instance"]: f"{pod['status']['podIP']}:{ENGINE_PORT}"
            for pod in pods_of(kubectl, namespace, "engine")
        }
        access = {name: _access(kubectl, namespace, name) for name in EVERY}
        found = Scene(kubectl, namespace, client, (client, *attackers), engines, access)
        until(lambda: all(holds(found.look()) for holds in _isolated().values()) or None, "all are isolated", LONG)
        yield found


@pytest.fixture
def agents(cluster: Cluster) -> Iterator[list[Node]]:
    """Nodes whose network plugin can be stopped here; it runs as it should again afterwards."""
    if not cluster.nodes or cluster.nodes[0].cni != "cilium":
        pytest.skip(
            f"the network plugin's processes are not ours to stop: the cluster is of provider {cluster.provider}"
        )
    found = list(cluster.nodes)
    yield found
    _restart(found)
    _until_they_work(found)


def test_a_foreign_policy_that_opens_everything_is_told_and_enforce_takes_the_endpoints_away(
    scene: Scene, times: Times, cells: Cells
) -> None:
    cells.check("before", scene.attack(SILENT))
    assert [scene.ask(name) for name in EVERY] == [200] * len(EVERY)
    began = time.monotonic()
    apply(scene.kubectl, policy("theirs", scene.namespace, ALLOW_INGRESS))
    tries = {"the attacker gets through": scene.reached(OPEN), **_refused(scene)}
    times.wait(scene, "a foreign policy allows everything", _lapsed("ForeignPolicy"), tries, began)
    _report_only_says(scene)
    scene.kubectl("delete", f"--namespace={scene.namespace}", "networkpolicy", "theirs")
    times.wait(scene, "the foreign policy is deleted", _isolated(), _mended(scene))
    cells.check("after", scene.attack(SILENT))


@pytest.fixture
def person(cluster: Cluster, scene: Scene, tmp_path: Path) -> Path:
    """Kubeconfig of somebody with the role `view` in the namespace, and the rights that `securevllm probe` asks for."""
    kubectl, where = scene.kubectl, f"--namespace={scene.namespace}"
    kubectl("create", where, "serviceaccount", "person")
    account = f"--serviceaccount={scene.namespace}:person"
    kubectl("create", where, "role", "prober", "--verb=create,list,delete", "--resource=pods")
    kubectl("create", where, "rolebinding", "prober", "--role=prober", account)
    kubectl("create", where, "rolebinding", "viewer", "--clusterrole=view", account)
    token = kubectl("create", where, "token", "person").strip()
    return cluster.kubeconfig_for_token(token, tmp_path / "person")


def test_a_person_who_measures_by_hand_is_told_the_same(scene: Scene, person: Path) -> None:
    def told(name: str, *command: str) -> tuple[int, str]:
        done = subprocess.run(
            [sys.executable, "-m", "securevllm", *command, "--kubeconfig", str(person)],
            env={**os.environ, "PYTHONPATH": str(images.ROOT / "operator")},
            capture_output=True,
            text=True,
            check=False,
            timeout=600,
        )
        said = done.stdout + done.stderr
        ARTEFACTS.mkdir(parents=True, exist_ok=True)
        (ARTEFACTS / f"by hand, {name}.txt").write_text(f"securevllm {' '.join(command)}\n{said}", encoding="utf-8")
        return done.returncode, said

    probe = ("probe", STRICT, "--namespace", scene.namespace)
    code, said = told("isolated", *probe)
    assert (code, "blocked" in said, bool(re.search(r"\bopen\b", said))) == (0, True, False), said
    # What the role `view` may not read is named, and everything else is told.
    code, said = told("check", "check", "--namespace", scene.namespace)
    assert (code, all(f"{scene.namespace}/{name}" in said for name in EVERY)) == (2, True), said
    assert "validatingadmissionpolicybindings.admissionregistration.k8s.io: may not be read" in said
    assert said.count("No findings") == len(EVERY)
    apply(scene.kubectl, policy("theirs", scene.namespace, ALLOW_INGRESS))
    try:
        until(scene.reached(OPEN), "the policy that allows everything is enforced", LONG)
        code, said = told("open", *probe)
        assert (code, bool(re.search(r"\bopen\b", said))) == (1, True), said
    finally:
        scene.kubectl("delete", f"--namespace={scene.namespace}", "networkpolicy", "theirs")
    until(lambda: all(holds(scene.look()) for holds in _isolated().values()) or None, "all are isolated", LONG)


def test_an_operator_that_is_cut_off_from_the_pods_does_not_go_on_calling_them_isolated(
    scene: Scene, times: Times, cluster: Cluster
) -> None:
    if not enforcement.can_be_withheld(cluster):
        pytest.skip("a policy of Cilium cuts the operator off: no NetworkPolicy takes away what another one allows")
    incident = "the operator is cut off from the pods"
    gateway = pods_of(scene.kubectl, scene.namespace, "gateway")[0]["status"]["podIP"]
    operators = [
        Pod(scene.kubectl, OPERATOR, pod["metadata"]["name"], addresses(pod))
        for pod in scene.kubectl.get(f"--namespace={OPERATOR}", "pods")["items"]
    ]

    def reached() -> bool:
        return any(_connects(pod, gateway, 8443) for pod in operators)

    assert reached()
    assert all(holds(scene.look()) for holds in _isolated().values())
    apply(scene.kubectl, _cut_off(scene.namespace))
    try:
        until(lambda: not reached(), "the operator is cut off", LONG)
        cut, began = time.time(), time.monotonic()
        looks: dict[str, Look] = {
            f"Isolated=Unknown of {name}": partial(_tells, name, "Isolated", "Unknown", "NoControl") for name in EVERY
        }
        times.wait(scene, incident, looks, since=began)
        # Silence of everything shows nothing, however long it lasts: STRICT would have had three full rounds by then.
        time.sleep(30)
        seen = scene.look()
        assert {seen.told(name, "Isolated") for name in EVERY} == {("Unknown", "NoControl")}
        assert "silence proves nothing" in seen.condition(STRICT, "Isolated")["message"]
        verified = {name: moment for pod in operators for name, moment in _verified(pod, scene.namespace).items()}
        assert {*verified} >= {*EVERY}
        # What was under way when it was cut off may have ended.
        assert {name: moment - cut for name, moment in verified.items() if moment > cut + _UNDER_WAY} == {}
        times.rows.append((incident, "last verified, after it", max(verified.values()) - cut))
        # Unknown is not broken: clients are served, also in mode Enforce.
        assert seen.endpoints[f"{STRICT}-engine"] == 1
        assert [scene.ask(name) for name in EVERY] == [200] * len(EVERY)
    finally:
        scene.kubectl("delete", f"--namespace={OPERATOR}", "ciliumnetworkpolicy", "cut-off")
    times.wait(scene, "the operator reaches the pods again", _isolated())


def test_canaries_that_may_send_nothing_make_nothing_isolated(scene: Scene, times: Times) -> None:
    """A tenant's own deny of all egress: to the canary pods everything is silent."""
    incident = "a foreign policy holds the canary pods back"
    everybody = {"podSelector": {"matchLabels": {COMPONENT: canary.COMPONENT_VALUE}}, "policyTypes": ["Egress"]}
    apply(scene.kubectl, policy("hold-back", scene.namespace, everybody))
    try:
        _measure(scene, "held")
        looks: dict[str, Look] = {
            f"Isolated=Unknown of {name}": partial(_tells, name, "Isolated", "Unknown", "NoControl") for name in EVERY
        }
        times.wait(scene, incident, looks)
        seen = scene.look()
        assert all("hold-back" in seen.condition(name, "Isolated")["message"] for name in EVERY)
        assert seen.endpoints[f"{STRICT}-engine"] == 1
    finally:
        scene.kubectl("delete", f"--namespace={scene.namespace}", "networkpolicy", "hold-back")
    _measure(scene, "free")
    times.wait(scene, "the canary pods may send again", _isolated())


def test_policies_that_are_deleted_by_hand_come_back(scene: Scene, times: Times, cells: Cells) -> None:
    before = scene.look().policies
    back: dict[str, Look] = {"all policies are back": lambda seen: seen.policies == before}
    began = time.monotonic()
    _delete_policies(scene)
    times.wait(scene, "all policies are deleted", {**back, **_isolated()}, _mended(scene), began)
    cells.check("repaired", scene.attack(SILENT))

    # Without an operator nobody puts them back: the control, and what its being away costs.
    with _without_operator(scene.kubectl):
        _delete_policies(scene)
        until(lambda: scene.reached(OPEN)() or None, "nothing guards the engines", LONG)
        cells.check("control: no operator, no policies", scene.attack(OPEN))
    times.wait(scene, "all policies were deleted, and the operator is back", {**back, **_isolated()}, _mended(scene))
    cells.check("operator back", scene.attack(SILENT))


def test_a_network_that_stops_enforcing_is_told_and_enforce_takes_the_endpoints_away(
    scene: Scene, times: Times, cells: Cells, agents: list[Node]
) -> None:
    _restart(agents, "--enable-policy=never")
    until(lambda: scene.reached(OPEN, some=True)() or None, "the policy engine enforces nothing", LONG)
    times.wait(scene, LAPSE, _lapsed("EngineReachable"), _refused(scene))
    until(lambda: scene.reached(OPEN)() or None, "it enforces nothing on both nodes", LONG)
    cells.check("control: everything is open", scene.attack(OPEN))
    assert max(times.of(LAPSE, "Isolated=False")) < SOON
    _report_only_says(scene)

    _restart(agents)
    until(lambda: scene.reached(SILENT)() or None, "the policy engine enforces again", LONG)
    times.wait(scene, "policies are enforced again", _isolated(), _mended(scene))
    cells.check("after", scene.attack(SILENT))


def test_a_restart_of_the_network_plugin_opens_nothing_and_interrupts_nothing(
    scene: Scene, times: Times, cells: Cells, agents: list[Node], nodes: list[str]
) -> None:
    def verdicts() -> dict[str, dict[str, str]]:
        seen = scene.look()
        return {name: seen.condition(name, "Isolated") for name in EVERY}

    before = verdicts()
    for node in agents:
        node.stop(binaries.CILIUM_AGENT)
    cells.check("no agent: what it enforced stays", scene.attack(SILENT))
    assert scene.ask(STRICT) == 200
    for node in agents:
        node.start(binaries.CILIUM_AGENT)
    new = [(scene.namespace, f"new-{number}", node) for number, node in enumerate(nodes)]
    tries = {"new pods have a network": lambda: len(start_pods(scene.kubectl, new)) == len(new)}
    times.wait(scene, "the network plugin is back", {}, tries)
    cells.check("agent back", scene.attack(SILENT))
    assert verdicts() == before


def test_a_node_that_is_cut_off_is_told_and_its_engines_serve_again_when_it_is_back(
    scene: Scene, times: Times, cells: Cells, cluster: Cluster, nodes: list[str]
) -> None:
    if not cluster.nodes:
        pytest.skip(f"the nodes' network is not ours to cut: the cluster is of provider {cluster.provider}")
    lost = next(node for node in cluster.nodes if node.name == nodes[1])
    there = EVERY[1::2]
    lost.unplug()
    try:
        # Kubernetes waits for a sign of life of the node before it says that its pods are not ready.
        looks: dict[str, Look] = {
            f"EnginesReady=False of {name}": partial(_tells, name, "EnginesReady", "False", "") for name in there
        }
        looks |= {
            f"Isolated=Unknown of {name}": partial(_tells, name, "Isolated", "Unknown", "NothingToMeasure")
            for name in there
        }
        times.wait(scene, "a node is cut off", looks)
        # What cannot be seen is not known to be broken: nobody is cut off for it, on the other node or on this one.
        seen = scene.look()
        assert [name for name in EVERY if seen.told(name, "Isolated")[0] == "False"] == []
    finally:
        lost.plug()
    _until_they_work([lost])
    tries = {f"{name} answers": partial(_answers, scene, name) for name in EVERY}
    # Those on the node that was away are measured again when pods can be made there again, which may take minutes.
    here = {what: holds for what, holds in _isolated().items() if not what.endswith(there)}
    times.wait(scene, "the node is back", here, tries)
    cells.check("after", scene.attack(SILENT))


# ------------------------------------------------------------------------------------------------------- what is seen


def look(kubectl: Kubectl, namespace: str) -> Seen:
    """Ask the API server."""
    kinds = "securevllmdeployments,endpointslices,networkpolicies"
    resources, policies = {}, set()
    endpoints: Counter[str] = Counter()
    for item in kubectl.get(f"--namespace={namespace}", kinds)["items"]:
        name = item["metadata"]["name"]
        if item["kind"] == "SecureVLLMDeployment":
            resources[name] = item
        elif item["kind"] == "NetworkPolicy":
            policies.add(name)
        else:
            ready = [one for one in item["endpoints"] or () if one["conditions"].get("ready")]
            endpoints[item["metadata"]["labels"]["kubernetes.io/service-name"]] += len(ready)
    return Seen(resources, endpoints, frozenset(policies))


def _tells(name: str, kind: str, status: str, reason: str, seen: Seen) -> bool:
    found = seen.told(name, kind)
    return found[0] == status and reason in {"", found[1]}


def _lapsed(reason: str) -> dict[str, Look]:
    """Every resource says so, and mode Enforce acts."""
    looks: dict[str, Look] = {
        f"Isolated=False of {name}": partial(_tells, name, "Isolated", "False", reason) for name in EVERY
    }
    looks["mode Enforce: no endpoints"] = lambda seen: seen.endpoints[f"{STRICT}-engine"] == 0
    return looks


def _isolated() -> dict[str, Look]:
    """Every resource is isolated, and mode Enforce lets requests through."""
    looks: dict[str, Look] = {
        f"Isolated=True of {name}": partial(_tells, name, "Isolated", "True", "") for name in EVERY
    }
    looks["mode Enforce: endpoints"] = lambda seen: seen.endpoints[f"{STRICT}-engine"] == 1
    return looks


def _refused(scene: Scene) -> dict[str, Try]:
    """The gateway of mode Enforce has nobody to ask."""
    return {"mode Enforce: requests get 503": lambda: scene.ask(STRICT) == 503}


def _mended(scene: Scene) -> dict[str, Try]:
    """Attackers are stopped, clients are served."""
    return {
        "the attacker is stopped": scene.reached(SILENT),
        "mode Enforce: requests get 200": partial(_answers, scene, STRICT),
    }


def _answers(scene: Scene, name: str) -> bool:
    return scene.ask(name) == 200


def _report_only_says(scene: Scene) -> None:
    """Mode Report: requests are answered, and Ready does not follow."""
    seen = scene.look()
    for name in TOLD:
        assert seen.endpoints[f"{name}-engine"] == 1
        assert scene.ask(name) == 200
        assert seen.told(name, "Ready")[0] == "True"
    assert seen.told(STRICT, "Ready")[0] == "False"


# -------------------------------------------------------------------------------------------------------- what is done


def _resource(namespace: str, name: str, node: str, *, strict: bool) -> dict[str, Any]:
    verification = {"mode": "Enforce", "interval": "10s"} if strict else {}
    return {
        "apiVersion": "securevllm.io/v1alpha1",
        "kind": "SecureVLLMDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"name": "/models/none"},
            "image": "vllm/vllm-openai:v0.33.0",
            "engine": {"nodeSelector": {"kubernetes.io/hostname": node}},
            "gateway": {"replicas": 2 if strict else 1},
            "security": {"verification": verification},
        },
    }


def _access(kubectl: Kubectl, namespace: str, name: str) -> tuple[str, str]:
    """Certificate authority (PEM) and a client key of a gateway."""
    authority = secret(kubectl, namespace, f"{name}-gateway-tls")["ca.crt"]
    return authority, next(iter(secret(kubectl, namespace, f"{name}-client-keys").values()))


def _cut_off(namespace: str) -> dict[str, Any]:
    """Lets the operator's pods reach everything but the pods of a namespace; its own policies cannot overrule that."""
    there = {"matchLabels": {"k8s:io.kubernetes.pod.namespace": namespace}}
    spec = {
        "endpointSelector": {},
        "enableDefaultDeny": {"ingress": False, "egress": False},
        "egressDeny": [{"toEndpoints": [there]}],
    }
    metadata = {"name": "cut-off", "namespace": OPERATOR}
    return {"apiVersion": "cilium.io/v2", "kind": "CiliumNetworkPolicy", "metadata": metadata, "spec": spec}


def _connects(pod: Pod, address: str, port: int) -> bool:
    """Whether a pod of the operator's completes a handshake."""
    program = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"
    try:
        pod.run("python", "-c", program, address, str(port))
    except KubectlError:
        return False
    return True


def _verified(pod: Pod, namespace: str) -> dict[str, float]:
    """When a pod of the operator's last measured each resource of a namespace; nothing: it does not lead."""
    ask = "import urllib.request as r; print(r.urlopen('http://127.0.0.1:8080/metrics', timeout=10).read().decode())"
    found = re.findall(
        r"^securevllm_isolation_verified_timestamp_seconds\{(.*)\} (\S+)$", pod.run("python", "-c", ask), re.MULTILINE
    )
    labels = [(dict(re.findall(r'(\w+)="([^"]*)"', text)), float(moment)) for text, moment in found]
    return {told["name"]: moment for told, moment in labels if told["namespace"] == namespace}


def _measure(scene: Scene, word: str) -> None:
    """Have every resource measured completely, now."""
    scene.kubectl(
        *("annotate", f"--namespace={scene.namespace}", "securevllmdeployments", "--all", "--overwrite"),
        f"securevllm.io/verify-at={word}",
    )


def _delete_policies(scene: Scene) -> None:
    """All of the namespace, the default-deny included."""
    scene.kubectl("delete", f"--namespace={scene.namespace}", "networkpolicies", "--all")


def _restart(agents: Sequence[Node], *options: str) -> None:
    """Restart the policy engine of all nodes."""
    for node in agents:
        node.stop(binaries.CILIUM_AGENT)
    for node in agents:
        node.start(binaries.CILIUM_AGENT, *options)


def _until_they_work(agents: Sequence[Node]) -> None:
    for node in agents:
        until(partial(enforcement.works, node), f"the policy engine of {node.name} works", 300)


@contextmanager
def _without_operator(kubectl: Kubectl) -> Iterator[None]:
    deployment = (f"--namespace={OPERATOR}", f"deployment/{OPERATOR}")
    replicas = kubectl.get(*deployment)["spec"]["replicas"]
    kubectl("scale", *deployment, "--replicas=0")
    until(lambda: not kubectl.get(f"--namespace={OPERATOR}", "pods")["items"] or None, "the operator is gone")
    try:
        yield
    finally:
        kubectl("scale", *deployment, f"--replicas={replicas}")
