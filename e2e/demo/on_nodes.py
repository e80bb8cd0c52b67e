"""The demo on two real nodes: every pod is real, Cilium enforces the policies, and an attacker tries.

Only the engine is a stand-in, fake-vllm: it has no model, and the GPUs that its node says it has are not there.
"""

from __future__ import annotations

import json
import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from e2e import images, reach
from e2e.cluster import running
from e2e.demo import scenes
from e2e.demo.tell import Table
from e2e.reach import OPEN, SILENT
from e2e.workload import (
    ALLOW_INGRESS,
    PORT,
    advertise_gpus,
    api_service,
    apply,
    install_operator,
    pods_of,
    policy,
    start_pods,
    workers,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from e2e.cluster import Cluster
    from e2e.demo.scenes import Attempt, Service
    from e2e.demo.tell import Teller
    from e2e.workload import Pod

ELSEWHERE = "elsewhere"
OPENS = "opens-everything"


def show(stack: ExitStack, tell: Teller, *, keep: bool) -> None:
    """Run it; what was started ends with `stack`.

    Raises:
        DemoError: Something was not as it has to be.
        ClusterError: No cluster.
    """
    tell.step("A Kubernetes cluster with two nodes, for this demo alone")
    cluster = stack.enter_context(running(f"demo-{os.getpid()}", progress=tell.line, node_count=2))
    kubectl = cluster.kubectl
    images.load(cluster, tell.line)
    advertise_gpus(kubectl, workers(kubectl))
    tell.line("the nodes say that they have GPUs; the engine is a stand-in and needs none")

    tell.step("kubectl apply -k manifests/install")
    install_operator(kubectl, tell.until)
    tell.line("the operator runs as a pod, with its own service account")

    kubectl("create", "namespace", scenes.NAMESPACE)
    kubectl("create", "namespace", ELSEWHERE)
    service = scenes.apply_sample(kubectl, tell)
    play(service, tell, ELSEWHERE)
    _next(tell, cluster, service, keep=keep)


def play(service: Service, tell: Teller, elsewhere: str) -> None:
    """Show all scenes, for a resource that was just applied.

    Args:
        service: The resource.
        tell: For the person.
        elsewhere: Another namespace.

    Raises:
        DemoError: Something was not as it has to be.
    """
    conditions = scenes.Conditions(service, tell)
    conditions.until("Ready", "True")
    conditions.until("Isolated", "True")
    scenes.tree(service, tell)
    people = _people(service, tell, elsewhere)
    scenes.requests(service, tell, people.ask(service), f"from the pod {people.client.name} through the Service")
    tell.step("An attacker tries")
    _attack(service, tell, people)
    scenes.policy_deleted(service, tell)

    tell.step("Somebody adds a NetworkPolicy that lets everybody in")
    apply(service.kubectl, policy(OPENS, service.namespace, ALLOW_INGRESS))
    try:
        conditions.until("Isolated", "False")
        _open(service, tell, people)
    finally:
        service.kubectl("delete", f"--namespace={service.namespace}", "networkpolicy", OPENS)
    tell.line(f"{OPENS} is deleted again")
    conditions.until("Isolated", "True")
    # The status follows the object at once; the network needs a moment longer.
    _until_outsider(service, tell, people, SILENT)
    _attack(service, tell, people)


@dataclass(frozen=True)
class People:
    """Pods that are not the operator's.

    Attributes:
        client: In the namespace of the resource.
        attacker: There, too, on another node.
        outsider: In another namespace.
    """

    client: Pod
    attacker: Pod
    outsider: Pod

    def ask(self, service: Service) -> Callable[[Attempt], tuple[int, str]]:
        """Let the client send requests through the gateway's Service."""
        authority = service.authority()

        def ask(attempt: Attempt) -> tuple[int, str]:
            url = f"https://{service.host}{attempt.path}"
            return self.client.request(
                url, authority, method=attempt.method, headers=attempt.headers, body=attempt.body
            )

        return ask


def _people(service: Service, tell: Teller, elsewhere: str) -> People:
    tell.step("A client and two attackers: ordinary pods")
    here, there = workers(service.kubectl)[:2]
    wanted = [
        (service.namespace, "client", here),
        (service.namespace, "attacker", there),
        (elsewhere, "outsider", here),
    ]
    people = People(*start_pods(service.kubectl, wanted, tell.until))
    for pod, (_, _, node) in zip((people.client, people.attacker, people.outsider), wanted, strict=True):
        tell.line(f"{pod.namespace}/{pod.name} {pod.ip} on {node}")
    return people


def _attack(service: Service, tell: Teller, people: People) -> None:
    """Let everybody try everything, and show that those who fail can reach something, and that what is silent answers.

    Raises:
        DemoError: Somebody gets through, or a control does not.
    """
    engine, gateway, another = (
        f"{service.address('engine')}:8000",
        f"{service.address('gateway')}:8443",
        people.client.ip,
    )
    door, api = "the gateway: the one door", api_service(service.kubectl)
    _dials(tell, people.attacker.name, people.attacker.reach, [
        (engine, "vLLM's API", SILENT),
        (f"{service.name}-engine.{service.namespace}.svc:8000", "the same, by its Service", SILENT),
        (gateway, door, OPEN),
        (f"{another}:{PORT}", "control: another pod", OPEN),
    ])  # fmt: skip
    _dials(tell, f"{people.outsider.name} (other namespace)", people.outsider.reach, [
        (engine, "vLLM's API", SILENT),
        (gateway, door, SILENT),
        (f"{another}:{PORT}", "control: another pod", OPEN),
        (api, "control: the Kubernetes API", OPEN),
    ])  # fmt: skip
    _dials(tell, "the engine, taken over", lambda targets: _from_engine(service, targets), [
        (api, "the Kubernetes API", SILENT),
        (f"{another}:{PORT}", "a pod beside it", SILENT),
        (gateway, "its own gateway", SILENT),
    ])  # fmt: skip


def _dials(
    tell: Teller, who: str, dial: Callable[[Sequence[str]], dict[str, str]], wanted: Sequence[tuple[str, str, str]]
) -> None:
    """Show a table of connections: target, what it is, what has to come of it."""
    found = dial([target for target, _, _ in wanted])
    tell.text(" ")
    table = Table((who, "connects to", "and finds it"))
    for target, what, expected in wanted:
        table.add((what, target, found[target]), found=found[target], expected=expected)
    table.show(tell)


def _from_engine(service: Service, targets: Sequence[str]) -> dict[str, str]:
    """Look around from the engine's own container: the program comes along as an argument."""
    pod = pods_of(service.kubectl, service.namespace, "engine")[0]["metadata"]["name"]
    program = Path(reach.__file__).read_text(encoding="utf-8")
    where = ("exec", f"--namespace={service.namespace}", pod, "--container=vllm")
    found: dict[str, str] = json.loads(service.kubectl(*where, "--", "python", "-c", program, *targets))
    return found


def _open(service: Service, tell: Teller, people: People) -> None:
    """Show what everybody has then: silence before was isolation, and the engine answers without a key."""
    engine = f"{service.address('engine')}:8000"
    _until_outsider(service, tell, people, OPEN)
    _dials(tell, f"{people.outsider.name} (other namespace)", people.outsider.reach, [(engine, "vLLM's API", OPEN)])
    table = Table(("the engine, asked directly", "request", "answer"))
    for what, path, expected in (
        ("vLLM's key guards this", "/v1/chat/completions", 401),
        ("and this it does not", "/invocations", 200),
    ):
        status, body = people.outsider.request(f"http://{engine}{path}", "", method="POST", body={})
        table.add((what, f"POST {path}", f"{status}  {body[:60]}"), found=status, expected=expected)
    table.show(tell)


def _until_outsider(service: Service, tell: Teller, people: People, answer: str) -> None:
    """Wait until somebody in another namespace gets this answer of the engine."""
    engine = f"{service.address('engine')}:8000"
    tell.until(
        lambda: people.outsider.reach([engine])[engine] == answer or None, f"the engine is {answer} to outsiders"
    )


def _next(tell: Teller, cluster: Cluster, service: Service, *, keep: bool) -> None:
    tell.step("What to try next")
    if keep:
        here = f"-n {service.namespace}"
        lines = [
            f"export KUBECONFIG={cluster.kubeconfig}",
            f"kubectl {here} describe svllm {service.name}",
            f"kubectl {here} exec attacker -- python -m reach {service.address('engine')}:8000",
            f"kubectl {here} logs deploy/{service.name}-engine -c gate",
            f"kubectl {here} delete networkpolicy --all        # and look again: all are back",
            f"a shell in a node: {' '.join(cluster.nodes[0].command('sh'))}" if cluster.nodes else "",
            "Ctrl-C ends everything",
        ]
    else:
        lines = [
            f".venv/bin/securevllm explain -f {scenes.SAMPLE}   who may talk to whom, and why",
            "docs/getting-started.md                                  on a cluster of yours",
            "make demo KEEP=1                                         the same, and it stays up for you to look at",
            "make e2e                                                 every attack that is tested, as tables",
        ]
    tell.text("\n".join(line for line in lines if line))
