"""Every topology on real nodes: it becomes Ready by itself, and nobody reaches what the topology does not say.

All topologies run side by side in one namespace, so that each is the other's neighbour. Every pod of theirs and every
attacker connects to every socket of theirs, fixed and random; tables are in build/e2e/topologies. What listens is read
from /proc in the pods. Each blocked connection has its control: the same one, with policies that open everything.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
import yaml

from e2e import images
from e2e.cluster.kubectl import KubectlError
from e2e.conftest import ARTEFACTS
from e2e.matrix import (
    Cell,
    Place,
    Report,
    Source,
    Target,
    cells,
    dial,
    member_of,
    open_at,
    socket_names,
    stranger,
    wrong,
)
from e2e.outside import INTERNET, METADATA, PORTS, outside_host
from e2e.reach import OPEN
from e2e.workload import (
    OPERATOR,
    PORT,
    SIDE_PORT,
    Pod,
    add_reach,
    addresses,
    api_service,
    apply,
    at,
    condition,
    engines_of,
    new_namespace,
    opened,
    pods_of,
    secret,
    start_pods,
    started,
    until,
    until_resource_ready,
)
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render.meta import RESOURCE_LABEL, Owner
from securevllm.topology import Role, Topology, plan
from tests.netpol import External, Node
from tests.property.world import Member, World

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl

pytestmark = pytest.mark.usefixtures("operator")

SAMPLES = images.ROOT / "manifests" / "samples"
TOPOLOGIES = {
    "tensor-parallel": "claim-source",
    "multi-node": "multi-node",
    "data-parallel": "data-parallel",
    "data-parallel-hybrid": "data-parallel-hybrid",
    "expert-parallel": "expert-parallel",
    "expert-parallel-external": "expert-parallel-external",
    "kv-events": "kv-events",
    "metrics": "metrics",
    "nixl": "prefill-decode-nixl",
    "mooncake": "prefill-decode-mooncake",
}
"""Name of the resource -> the sample with its shape."""
SHAPE = ("parallelism", "disaggregation", "security", "ports", "replicas")

LATE, ZONE, LATE_SECONDS = "late", "example.com/late-zone", 180.0
"""Name of a group, the label of nodes that its members are spread by, and by how much its second member is late."""
READER = "kv-index"
"""Label of the pod that the sample of KV events lets read them."""
SCRAPER = "scraper"
"""Label of the pod that may scrape engines; the sample's is in a namespace of a fixed name."""
GATEWAY_PORT, NODE_PORT = 8443, 17070
READY_SECONDS = 420.0
BORROWED = (RESOURCE_LABEL, "securevllm.io/role", "securevllm.io/group")

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


def resource(name: str, namespace: str) -> dict[str, Any]:
    """A resource with the shape of its sample, spread over the nodes; weights do not matter here."""
    sample = yaml.safe_load((SAMPLES / f"{TOPOLOGIES[name]}.yaml").read_text(encoding="utf-8"))
    spread = {
        "maxSkew": 1,
        "topologyKey": "kubernetes.io/hostname",
        "whenUnsatisfiable": "ScheduleAnyway",
        "labelSelector": {"matchLabels": {"topology": name}},
    }
    spec = {
        **{part: sample["spec"][part] for part in SHAPE if part in sample["spec"]},
        "model": {"name": "/models/any"},
        "image": sample["spec"]["image"],
        "gateway": {"replicas": 1},
        "engine": {"labels": {"topology": name}, "topologySpreadConstraints": [spread]},
    }
    if name == "metrics":
        spec["security"] = {"metrics": {"from": {"podSelector": {"matchLabels": {"app": SCRAPER}}}}}
    metadata = {"name": name, "namespace": namespace}
    return {"apiVersion": sample["apiVersion"], "kind": sample["kind"], "metadata": metadata, "spec": spec}


@dataclass
class Stage:
    """Everything that takes part.

    Attributes:
        cluster: Where.
        namespace: Of the resources.
        other: Another namespace.
        attackers: Pods of nobody's resource, by name.
        client: One of them, in the namespace of the resources.
        others: What connects and is no pod of a resource.
        places: What is outside of all resources.
    """

    cluster: Cluster
    namespace: str
    other: str
    attackers: dict[str, Pod]
    client: Pod
    others: list[Source] = field(default_factory=list)
    places: list[Place] = field(default_factory=list)
    report: Report = field(default_factory=lambda: Report(ARTEFACTS / "topologies"))

    @property
    def kubectl(self) -> Kubectl:
        """An administrator's."""
        return self.cluster.kubectl


@pytest.fixture(scope="module")
def stage(cluster: Cluster, nodes: list[str], operator: None) -> Iterator[Stage]:  # noqa: ARG001
    """Apply all resources at once; attackers are there before them."""
    kubectl = cluster.kubectl
    with ExitStack() as stack:
        namespace = stack.enter_context(new_namespace(kubectl, "topologies"))
        other = stack.enter_context(new_namespace(kubectl, "other"))
        apply(kubectl, *(resource(name, namespace) for name in TOPOLOGIES))
        wanted = [(namespace, f"beside-{one}", one) for one in nodes] + [
            (other, f"foreign-{one}", one) for one in nodes
        ]
        started = start_pods(kubectl, [*wanted, (namespace, READER, nodes[0]), (namespace, SCRAPER, nodes[1])])
        hosts = start_pods(kubectl, [(other, f"host-{one}", one) for one in nodes], port=NODE_PORT, host_network=True)
        made = Stage(cluster, namespace, other, {pod.name: pod for pod in (*started, *hosts)}, started[0])
        made.others = [_outsider(pod, nodes) for pod in made.attackers.values()]
        made.places = _places(made, nodes)
        if cluster.nodes:
            host = stack.enter_context(outside_host(cluster))
            made.others.append(Source(host.name, "a host outside", External(host.name, host.ips), host))
            for metadata, internet in zip(METADATA, INTERNET, strict=True):
                if any((":" in metadata) == (":" in ip) for ip in host.ips):
                    made.places += [
                        Place(at(metadata, PORTS[0]), "metadata address"),
                        Place(at(internet, PORTS[1]), "internet"),
                    ]
        yield made


def _outsider(pod: Pod, nodes: list[str]) -> Source:
    """An attacker as the judge knows it."""
    where = next((one for one in nodes if pod.name.endswith(f"-{one}")), nodes[0])
    if pod.name.startswith("host-"):
        return Source(pod.name, "hostNetwork", Node(where, pod.ips), pod)
    kinds = {"beside": "same namespace", "foreign": "another namespace"}
    kinds |= {READER: "the declared reader", SCRAPER: "the declared scraper"}
    kind = next(kind for start, kind in kinds.items() if pod.name.startswith(start))
    return Source(pod.name, kind, stranger(pod.name, pod.namespace, pod.ips, where, {"app": pod.name}), pod)


def _places(stage: Stage, nodes: list[str]) -> list[Place]:
    """What no pod with model code may reach, and cluster DNS, which it may."""
    kubectl = stage.kubectl
    [endpoint] = kubectl.get("--namespace=default", "endpoints", "kubernetes")["subsets"]
    dns = kubectl.get("--namespace=kube-system", "service", "kube-dns")["spec"]["clusterIP"]
    operators = kubectl.get(f"--namespace={OPERATOR}", "pods", f"--selector=app.kubernetes.io/name={OPERATOR}")["items"]
    first = {
        item["metadata"]["name"]: item["status"]["addresses"][0]["address"] for item in kubectl.get("nodes")["items"]
    }
    return [
        Place(f"{dns}:53", "cluster DNS", allowed=True),
        Place(api_service(kubectl), "API server, Service"),
        Place(f"{endpoint['addresses'][0]['ip']}:{endpoint['ports'][0]['port']}", "API server, endpoint"),
        *(Place(at(ip, Context().canary_port), "what gates look for") for item in operators for ip in addresses(item)),
        *(Place(f"{first[one]}:10250", f"kubelet of {one}") for one in nodes),
        *(
            Place(at(ip, PORT), f"{what} on {one}")
            for start, what in (("beside", "pod beside it"), ("foreign", "pod of another namespace"))
            for one in nodes
            for ip in stage.attackers[f"{start}-{one}"].ips
        ),
    ]


@dataclass(frozen=True)
class Latecomer:
    """A group of two whose second member cannot be scheduled.

    Attributes:
        namespace: Where it is, under the name of `LATE`.
        began: When it was applied, on the monotonic clock.
    """

    namespace: str
    began: float


@pytest.fixture(scope="module", autouse=True)
def latecomer(cluster: Cluster, nodes: list[str], operator: None) -> Iterator[Latecomer]:  # noqa: ARG001 - it is there
    """Apply it before everything else of this file: it waits while the other tests run."""
    kubectl = cluster.kubectl
    spread = {
        "maxSkew": 1,
        "minDomains": 2,
        "topologyKey": ZONE,
        "whenUnsatisfiable": "DoNotSchedule",
        "labelSelector": {"matchLabels": {"topology": LATE}},
    }
    with new_namespace(kubectl, LATE) as namespace:
        made = resource("multi-node", namespace)
        made["metadata"]["name"] = LATE
        made["spec"] |= {
            "replicas": 1,
            "engine": {"labels": {"topology": LATE}, "topologySpreadConstraints": [spread]},
            "security": {"verification": {"mode": "Disabled"}},
        }
        kubectl("label", "node", nodes[0], f"{ZONE}=here")
        try:
            apply(kubectl, made)
            yield Latecomer(namespace, time.monotonic())
        finally:
            kubectl("label", "node", *nodes[:2], f"{ZONE}-")


@dataclass
class Found:
    """What was seen once everything was Ready.

    Attributes:
        world: For the judge.
        targets: Every socket of every pod of the resources.
        sources: Who connects, pods of the resources first.
        tried: By name of the resource: to its sockets.
        outward: By name of the resource: from its pods to what is outside.
    """

    world: World
    targets: list[Target]
    sources: list[Source]
    tried: dict[str, list[Cell]]
    outward: dict[str, list[Cell]]

    def names(self) -> set[str]:
        """Who connected."""
        return {cell.source.name for cell in self.all()}

    def all(self) -> list[Cell]:
        """Every cell."""
        return [cell for made in (self.tried, self.outward) for part in made.values() for cell in part]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_topology_becomes_ready_by_itself_and_serves(stage: Stage, name: str) -> None:
    kubectl, namespace = stage.kubectl, stage.namespace
    until_resource_ready(kubectl, namespace, name, READY_SECONDS)
    authority = secret(kubectl, namespace, f"{name}-gateway-tls")["ca.crt"]
    key = next(iter(secret(kubectl, namespace, f"{name}-client-keys").values()))
    url = f"https://{name}-gateway.{namespace}.svc/v1/chat/completions"
    headers = {"Authorization": f"Bearer {key}"}

    def asked() -> tuple[int, str]:
        return stage.client.request(url, authority, method="POST", headers=headers, body=CHAT)

    status, answer = until(asked, "the gateway answers")
    assert (status, "Hello from behind the gateway." in answer) == (200, True), answer
    assert stage.client.request(url, authority, method="POST", body=CHAT)[0] == 401


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_operator_measures_that_it_is_isolated(stage: Stage, name: str) -> None:
    until_resource_ready(stage.kubectl, stage.namespace, name, READY_SECONDS, kind="Isolated")


@pytest.fixture(scope="module")
def found(stage: Stage) -> Found:
    """Let everybody connect to everything, once."""
    kubectl, namespace = stage.kubectl, stage.namespace
    members: dict[str, list[tuple[Member, Pod]]] = {}
    pods = kubectl.get(f"--namespace={namespace}", "pods", f"--selector={RESOURCE_LABEL}")["items"]
    for item in kubectl.get(f"--namespace={namespace}", "securevllmdeployments")["items"]:
        owner = Owner(item["metadata"]["name"], namespace, item["metadata"]["uid"])
        topology = plan(parse(owner.name, item["spec"]).spec, Context())
        own = [pod for pod in pods if pod["metadata"]["labels"][RESOURCE_LABEL] == owner.label]
        with ThreadPoolExecutor(max_workers=4) as pool:
            members[owner.name] = list(pool.map(lambda pod, o=owner, t=topology: _member(stage, pod, o, t), own))
    everybody = [member for one in members.values() for member, _ in one]
    world = World(tuple(everybody), tuple(source.endpoint for source in stage.others), ())
    with ThreadPoolExecutor(max_workers=4) as pool:
        looked = pool.map(
            lambda item: _sockets(stage, *item),
            [(name, member, pod) for name, one in members.items() for member, pod in one],
        )
        targets = [target for sockets in looked for target in sockets]
    inner = [Source(member.pod.name, "", member.pod, pod, member) for one in members.values() for member, pod in one]
    copied = _copied(stage, next(one for one, _ in members["multi-node"] if one.role is Role.GATEWAY))
    tried = {
        name: cells(world, [*inner, *stage.others, copied], [target for target in targets if target.resource == name])
        for name in members
    }
    outward = {
        name: [
            Cell(source, place, "to the outside", place.allowed)
            for source in inner
            if source.member in [member for member, _ in one]
            for place in stage.places
        ]
        for name, one in members.items()
    }
    made = Found(world, targets, inner, tried, outward)
    dial(made.all())
    for name in members:
        stage.report.write(name, [*tried[name], *outward[name]])
    return made


def _copied(stage: Stage, lent: Member) -> Source:
    """A pod of another namespace that has the labels of a pod of ours from its first moment."""
    [pod] = start_pods(stage.kubectl, [(stage.other, "copied", lent.pod.node)], labels=selector_labels(lent))
    endpoint = stranger(pod.name, pod.namespace, pod.ips, lent.pod.node, lent.pod.labels)
    return Source(pod.name, "borrowed labels, another namespace", endpoint, pod)


def selector_labels(member: Member) -> dict[str, str]:
    """The labels by which policies select a pod."""
    return {key: value for key, value in member.pod.labels.items() if key in BORROWED}


def _member(stage: Stage, pod: dict[str, Any], owner: Owner, topology: Topology) -> tuple[Member, Pod]:
    member = member_of(pod, owner, topology)
    if member.role is Role.GATEWAY:  # it holds Envoy and nothing to look around with
        return member, add_reach(stage.kubectl, stage.namespace, pod)
    container = "router" if member.role is Role.ROUTER else "vllm"
    return member, Pod(stage.kubectl, stage.namespace, member.pod.name, member.pod.ips, container)


def _sockets(stage: Stage, name: str, member: Member, pod: Pod) -> list[Target]:
    """What listens in a pod, but for the container that was added to a gateway."""
    log = ""
    if member.role not in {Role.GATEWAY, Role.ROUTER}:
        log = stage.kubectl("logs", f"--namespace={pod.namespace}", pod.name, f"--container={pod.container}")
    names = socket_names(member, log)
    open_there = [one for one in pod.listening() if member.role is not Role.GATEWAY or one[1] != SIDE_PORT]
    return [Target(ip, port, names.get(port, "unexplained"), member, name) for ip, port in open_at(open_there, pod.ips)]


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_socket_is_one_of_the_topology(found: Found, name: str) -> None:
    own = [target for target in found.targets if target.resource == name]
    assert [str(target) for target in own if target.name == "unexplained"] == []
    topology = own[0].member.topology
    assert topology is not None
    closed_by_now = {"barrier"}
    planned = {(socket.role, socket.name) for socket in topology.sockets if socket.name not in closed_by_now}
    assert {(target.member.role, target.name) for target in own} == planned


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_its_sockets_are_reached_by_whom_the_topology_names_and_by_nobody_else(
    stage: Stage, found: Found, name: str
) -> None:
    assert wrong(found.tried[name]) == []
    kinds = {cell.kind for cell in found.tried[name] if not cell.wanted}
    always = {"same namespace", "another namespace", "hostNetwork", "another resource"}
    always |= {"borrowed labels, another namespace"} | ({"a host outside"} if "outside" in found.names() else set())
    assert kinds >= always, "every kind of attacker tried it"
    ways = {cell.way for cell in found.tried[name] if cell.kind == "same namespace"}
    assert ways == {"on one node", "across nodes"}
    families = {":" in cell.target.address for cell in found.tried[name] if isinstance(cell.target, Target)}
    assert families == {":" in ip for ip in stage.client.ips}, "each family of the cluster is tried"
    # A gateway's second port is the operator's; that it reaches it is what GatewayReady says. An engine that is a world
    # of its own has random sockets that nobody may reach: their control is the test without policies.
    own = {
        target
        for target in found.targets
        if target.resource == name
        and target.member.role is not Role.GATEWAY
        and (target.member.group or target.name in {"api", "kv-events", "metrics"})
    }
    reached = {cell.target for cell in found.tried[name] if cell.wanted and not cell.kind.endswith("own node")}
    assert own - reached == set(), "each is reached by somebody"


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_its_pods_reach_nothing_outside_but_dns(found: Found, name: str) -> None:
    assert wrong(found.outward[name]) == []


@pytest.mark.parametrize(("name", "groups"), [("multi-node", {"e0", "e1"}), ("nixl", {"p0", "p1"})])
def test_groups_of_one_resource_are_strangers(found: Found, name: str, groups: set[str]) -> None:
    """By name, where the matrix only says `as the topology says`."""
    tried = [cell for cell in found.tried[name] if cell.kind == "another group of the same resource"]
    pairs = {(_group(cell), cell.target.member.group) for cell in tried if isinstance(cell.target, Target)}
    one, other = sorted(groups)
    assert {(one, other), (other, one)} <= pairs
    opened = [cell.row() for cell in tried if isinstance(cell.target, Target) and cell.found == OPEN
              and {_group(cell), cell.target.member.group} == groups]  # fmt: skip
    assert opened == []


def _group(cell: Cell) -> str:
    return cell.source.member.group if cell.source.member else ""


def _reaches(cell: Cell) -> bool:
    return cell.source.dialler.reach([str(cell.target)])[str(cell.target)] == OPEN


def test_without_the_policies_every_blocked_connection_succeeds(stage: Stage, found: Found) -> None:
    blocked = [cell for cell in found.all() if not cell.wanted]
    canary = next(cell for cell in blocked if cell.kind == "another namespace")
    with opened(stage.kubectl, stage.namespace, partial(_reaches, canary)):
        # Every endpoint has programs of its own: what is not open yet is tried again.
        dial(blocked, control=True)
    for name in TOPOLOGIES:
        stage.report.write(name, [*found.tried[name], *found.outward[name]])
    assert wrong(blocked) == []


@pytest.fixture(scope="module")
def borrower(stage: Stage, nodes: list[str]) -> Pod:
    """A pod without labels of ours, so far."""
    [pod] = start_pods(stage.kubectl, [(stage.namespace, "borrower", nodes[1])])
    return pod


def label(stage: Stage, pod: str, labels: dict[str, str | None], *options: str) -> None:
    """Set labels of a pod; None removes one."""
    words = [f"{key}-" if value is None else f"{key}={value}" for key, value in labels.items()]
    stage.kubectl("label", f"--namespace={stage.namespace}", "pod", pod, "--overwrite", *options, *words)


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("multi-node", Role.ENGINE_WORKER),
        ("multi-node", Role.GATEWAY),
        ("kv-events", Role.ENGINE),
        ("nixl", Role.ROUTER),
        ("nixl", Role.DECODE),
    ],
)
def test_a_pod_with_borrowed_labels_is_taken_for_what_they_say(
    stage: Stage, found: Found, borrower: Pod, nodes: list[str], *, name: str, role: Role
) -> None:
    """Why manifests/admission is there: labels are all that a NetworkPolicy knows of a pod. No more than that, too."""
    lent = next(one.member for one in found.targets if one.resource == name and one.member.role is role)
    labels = selector_labels(lent)
    endpoint = stranger(borrower.name, stage.namespace, borrower.ips, nodes[1], labels)
    member = Member(endpoint, lent.owner, lent.role, lent.group, lent.topology)
    source = Source(f"borrower as {role}", f"borrowed labels: {role} {lent.group}".strip(), endpoint, borrower, member)
    world = World((*found.world.members, member), found.world.outsiders, ())
    tried = cells(world, [source], [target for target in found.targets if target.resource == name])
    reachable = [str(cell.target) for cell in tried if cell.wanted]
    beside = f"{stage.client.ip}:{PORT}"  # nobody with labels of ours may reach it
    before = borrower.reach([*reachable, beside])
    assert (set(before.values()) - {OPEN} != set() or not reachable, before[beside]) == (True, OPEN)
    label(stage, borrower.name, dict(labels))
    try:
        # Its egress is isolated: the engine has noticed. What the labels let it reach, it reaches by the retries.
        until(lambda: borrower.reach([beside])[beside] != OPEN, "the labels have taken effect", seconds=300)
        dial(tried)
    finally:
        label(stage, borrower.name, dict.fromkeys(labels, None))
    until(lambda: borrower.reach([beside])[beside] == OPEN, "the labels are gone", seconds=300)
    found.tried[name] += tried
    stage.report.write(name, [*found.tried[name], *found.outward[name]])
    assert wrong(tried) == []
    assert bool(reachable) is (role is not Role.ENGINE), "an engine of its own world reaches nobody"


def test_a_download_reaches_its_hub_and_nothing_inside(stage: Stage, found: Found, borrower: Pod) -> None:
    """The pod of a fetch Job, as far as policies know it: a pod with its labels has no program that ends."""
    kubectl, namespace = stage.kubectl, stage.namespace
    made = resource("tensor-parallel", namespace)
    made["metadata"]["name"] = "download"
    made["spec"] |= {"model": {"name": "org/model", "source": {"huggingFace": {}}}}
    apply(kubectl, made)

    def selected() -> dict[str, str] | None:
        try:
            rendered = kubectl.get(f"--namespace={namespace}", "networkpolicy", "download-fetch")
        except KubectlError:
            return None
        labels: dict[str, str] = rendered["spec"]["podSelector"]["matchLabels"]
        return labels

    labels = until(selected, "the policy of the download is there")
    sockets = [str(target) for target in found.targets]
    hub, shut = {at(ip, PORTS[1]) for ip in INTERNET}, [str(place) for place in stage.places if not place.allowed]
    before = borrower.reach(shut)
    assert {place for place, answer in before.items() if answer != OPEN} == set(), "without the labels it may"
    label(stage, borrower.name, dict(labels))
    try:
        first = f"{stage.client.ip}:{PORT}"
        until(lambda: borrower.reach([first])[first] != OPEN, "the labels have taken effect", seconds=300)
        after = borrower.reach([*shut, *sockets])
        assert {place for place, answer in after.items() if answer == OPEN} == hub & {*shut}
    finally:
        label(stage, borrower.name, dict.fromkeys(labels, None))
        kubectl("delete", f"--namespace={namespace}", "securevllmdeployment", "download", "--wait=false")


def test_with_the_admission_policies_labels_cannot_be_borrowed(
    stage: Stage, found: Found, borrower: Pod, nodes: list[str]
) -> None:
    kubectl, namespace = stage.kubectl, stage.namespace
    lent = next(one.member for one in found.targets if one.resource == "tensor-parallel" and one.name == "api")
    labels = selector_labels(lent)
    folder = images.ROOT / "manifests" / "admission"
    files = [f"--filename={folder / name}" for name in ("policies.yaml", "bindings.yaml")]
    kubectl("apply", "--server-side", *files)
    try:

        def refused() -> bool:
            try:
                label(stage, borrower.name, dict(labels), "--dry-run=server")
            except KubectlError as error:
                return "cannot be added" in str(error)
            return False

        until(refused, "the API server enforces the policies", seconds=300)
        with pytest.raises(KubectlError, match="cannot be added, changed or"):
            label(stage, borrower.name, dict(labels))
        with pytest.raises(KubectlError, match="are reserved"):
            start_pods(kubectl, [(namespace, "thief", nodes[0])], labels=labels)
        with pytest.raises(KubectlError, match="cannot be added, changed or"):
            label(stage, lent.pod.name, dict.fromkeys(labels, None))
        # The operator and the controllers behind it go on: a lost engine comes back.
        kubectl("delete", f"--namespace={namespace}", "pod", lent.pod.name, "--wait=true")
        until_resource_ready(kubectl, namespace, "tensor-parallel", READY_SECONDS)
        [again] = [
            pod
            for pod in pods_of(kubectl, namespace, "engine")
            if pod["metadata"]["labels"][RESOURCE_LABEL] == labels[RESOURCE_LABEL]
        ]
        assert again["metadata"]["name"] != lent.pod.name
    finally:
        kubectl("delete", *files, "--wait=true")


def test_a_member_that_is_three_minutes_late_makes_nobody_start_anew(
    stage: Stage, latecomer: Latecomer, nodes: list[str]
) -> None:
    """The barrier is before the engines: vLLM itself would give up on a member after ten minutes, or hang."""
    kubectl, where = stage.kubectl, (f"--namespace={latecomer.namespace}",)
    time.sleep(max(0.0, latecomer.began + LATE_SECONDS - time.monotonic()))
    waiting = {pod["metadata"]["name"]: pod for pod in engines_of(kubectl, latecomer.namespace, LATE)}
    here = [name for name, pod in waiting.items() if pod["spec"].get("nodeName")]
    assert (len(waiting), len(here)) == (2, 1)
    assert not any(map(started, waiting.values()))
    [absent] = waiting.keys() - {*here}
    group_and_rank = absent.removesuffix("-0")
    assert group_and_rank in kubectl("logs", *where, here[0], "--container=gate"), "the gate says for whom it waits"
    assert not condition(kubectl.get(*where, "securevllmdeployment", LATE), "EnginesReady")

    kubectl("label", "node", nodes[1], f"{ZONE}=there")
    until_resource_ready(kubectl, latecomer.namespace, LATE, READY_SECONDS)
    whole = {pod["metadata"]["name"]: pod for pod in engines_of(kubectl, latecomer.namespace, LATE)}
    assert {name: pod["metadata"]["uid"] for name, pod in whole.items()} == {
        name: pod["metadata"]["uid"] for name, pod in waiting.items()
    }
    statuses = [one for pod in whole.values() for one in pod["status"]["containerStatuses"]]
    assert [one["restartCount"] for one in statuses] == [0] * len(statuses) != []
