"""The real vLLM in pods that the operator makes: behind gate, policies and gateway, on nodes that enforce them.

vLLM 0.32 is below the floor of the catalogue, so the resources accept that in words.
"""

from __future__ import annotations

import base64
import inspect
import ipaddress
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pytest

from e2e import exchange, listening
from e2e.conftest import ARTEFACTS
from e2e.explained import NOT_ON_A_CPU, expected, explain, table
from e2e.listening import Seen
from e2e.reach import OPEN, SILENT
from e2e.real_vllm import image, packages
from e2e.real_vllm.process import FLAGS, NAME, serve_arguments
from e2e.workload import (
    Pod,
    apply,
    engines_of,
    new_namespace,
    opened,
    pods_of,
    secret,
    start_pods,
    until_resource_ready,
)
from tests.gateway import attacks, attacks_h2

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from e2e.cluster.kubectl import Kubectl
    from e2e.workload import Cells

START_SECONDS = 1500.0
"""A minute's work on an idle machine."""
PORT = 8443
CHAT = "/v1/chat/completions"
BODY = {"model": NAME, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}

_ACCESS = re.compile(r'"([A-Z]+) (\S+) HTTP/[\d.]+" (\d{3})')


@pytest.fixture(scope="module", autouse=True)
def real_image(request: pytest.FixtureRequest) -> None:
    """Run the operator on nodes that have the image of the real vLLM, or skip with the reason."""
    if reason := packages.missing():
        pytest.skip(reason)

    def tell(line: str) -> None:
        print(line, file=sys.__stderr__, flush=True)

    packages.ensure(tell)
    made = image.real()
    made.prepare(tell)
    tell(f"loading {made.name}")
    cluster: Cluster = request.getfixturevalue("cluster")
    cluster.load_images([made])
    request.getfixturevalue("operator")


@pytest.fixture(scope="module")
def place(kubectl: Kubectl) -> Iterator[str]:
    """Give a namespace to all tests of this file: a start of vLLM takes minutes on a busy machine."""
    with new_namespace(kubectl, "vllm") as name:
        yield name


@pytest.fixture(scope="module")
def client(kubectl: Kubectl, nodes: list[str], place: str) -> Pod:
    """Run a pod beside the resources: it may ask their gateways, and reach nothing else of them."""
    return start_pods(kubectl, [(place, "client", nodes[0])])[0]


@pytest.fixture(scope="module")
def alone(kubectl: Kubectl, place: str) -> str:
    """Run a model replica of one pod; its clients' keys are those of the attack corpus."""
    keys = {"alice": attacks.KEY, "bob": attacks.OTHER_KEY}
    apply(
        kubectl,
        {
            "apiVersion": "v1",
            "kind": "Secret",
            "metadata": {"name": "clients", "namespace": place, "labels": {"securevllm.io/secret": "user"}},
            "stringData": keys,
        },
        _resource(
            "alone",
            place,
            gateway={
                "authentication": {"apiKeys": {"secretRefs": [{"name": "clients"}]}},
                "routes": {"profiles": ["chat", "embeddings", "responses"]},
            },
        ),
    )
    until_resource_ready(kubectl, place, "alone", START_SECONDS)
    return "alone"


@pytest.fixture(scope="module")
def pair(kubectl: Kubectl, place: str) -> str:
    """Run a model replica of two pods: tensor parallelism over Gloo."""
    apply(kubectl, _resource("pair", place, parallelism={"tensor": 2, "nodes": 2}))
    until_resource_ready(kubectl, place, "pair", START_SECONDS)
    return "pair"


def test_one_pod_answers_through_its_gateway(kubectl: Kubectl, place: str, client: Pod, alone: str) -> None:
    _assert_serves(client, place, alone, secret(kubectl, place, f"{alone}-gateway-tls")["ca.crt"], attacks.KEY)
    status = kubectl.get(f"--namespace={place}", "securevllmdeployment", alone)["status"]
    assert status["vllmVersion"].startswith(str(packages.version()))
    assert ["vllmVersionBelowFloor" in risk for risk in status["acceptedRisks"]] == [True]


def test_each_socket_of_one_pod_is_explained(kubectl: Kubectl, place: str, alone: str) -> None:
    [head] = engines_of(kubectl, place, alone)
    _assert_explained(kubectl, head, {"api", "gloo"})


def test_nobody_else_reaches_a_socket_of_it(
    kubectl: Kubectl, place: str, client: Pod, alone: str, cells: Cells
) -> None:
    members = engines_of(kubectl, place, alone)
    assert len(members) == 1
    _assert_shut(kubectl, client, members, cells)
    gateway = pods_of(kubectl, place, "gateway")[0]["status"]["podIP"]
    cells.check("the one door", {client: {f"{gateway}:{PORT}": OPEN}})


def test_the_attack_corpus_finds_nothing(kubectl: Kubectl, place: str, client: Pod, alone: str) -> None:
    h1, h2 = attacks.h1_attacks(), attacks_h2.h2_attacks()
    [head] = engines_of(kubectl, place, alone)
    before = _requests(kubectl, head)
    wanted = [(attack, "http/1.1") for attack in h1] + [(attack, "h2") for attack in h2]
    payloads = [
        {"data": base64.b64encode(attack.data.replace(b"@ID@", b"%04d" % number)).decode(), "alpn": alpn}
        for number, (attack, alpn) in enumerate(wanted)
    ]
    program = inspect.getsource(exchange)
    said = kubectl(
        "exec",
        "--stdin",
        f"--namespace={place}",
        client.name,
        "--",
        *("python", "-c", program, f"{alone}-gateway.{place}.svc", "443"),
        stdin=json.dumps(payloads),
        timeout=START_SECONDS,
    )
    answers = [base64.b64decode(answer) for answer in json.loads(said)]
    assert sum(1 for answer in answers if answer) > len(answers) // 2, "the gateway answers most of them"
    seen = _requests(kubectl, head)[len(before) :]
    allowed = {("POST", CHAT), ("POST", "/v1/embeddings"), ("POST", "/v1/responses"), ("GET", "/v1/models")}
    strange = [
        found
        for found in seen
        if (found[0], found[1].partition("?")[0]) not in allowed and not found[1].startswith("/v1/responses/")
    ]
    assert strange == []
    assert 0 < len(seen) <= sum(attack.reaches for attack, _ in wanted)
    told = f"{len(answers)} attacks, {len(seen)} of their requests reached the engine, each of them allowed:"
    _keep("attacks on the real vLLM", "\n".join([told, *(" ".join(found) for found in sorted(set(seen)))]))
    _assert_serves(client, place, alone, secret(kubectl, place, f"{alone}-gateway-tls")["ca.crt"], attacks.KEY)


def test_two_pods_answer_through_their_gateway(kubectl: Kubectl, place: str, client: Pod, pair: str) -> None:
    key = next(iter(secret(kubectl, place, f"{pair}-client-keys").values()))
    _assert_serves(client, place, pair, secret(kubectl, place, f"{pair}-gateway-tls")["ca.crt"], key)


def test_each_socket_of_two_pods_is_explained_and_shut_to_others(
    kubectl: Kubectl, place: str, client: Pod, pair: str, cells: Cells
) -> None:
    head, worker = engines_of(kubectl, place, pair)
    _assert_explained(kubectl, head, {"api", "torch-distributed", "gloo", "message-queue"})
    _assert_explained(kubectl, worker, {"gloo", "message-queue"})
    _assert_shut(kubectl, client, (head, worker), cells)


def test_isolation_of_the_real_one_is_measured(kubectl: Kubectl, place: str, alone: str, pair: str) -> None:
    for name in (alone, pair):
        until_resource_ready(kubectl, place, name, 600, kind="Isolated")


def _resource(name: str, namespace: str, **spec: Any) -> dict[str, Any]:
    env = {"OMP_NUM_THREADS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    return {
        "apiVersion": "securevllm.io/v1alpha1",
        "kind": "SecureVLLMDeployment",
        "metadata": {"name": name, "namespace": namespace},
        "spec": {
            "model": {"name": image.MODEL, "servedName": NAME},
            "image": image.name(),
            "engine": {
                "args": [flag for flag in FLAGS if not flag.startswith("--served-model-name")],
                "env": [{"name": name, "value": value} for name, value in env.items()],
                "resources": {"requests": {"cpu": "100m", "memory": "2Gi"}, "limits": {"memory": "6Gi"}},
                "sharedMemory": "1Gi",
                "startupTimeout": "25m",
            },
            "security": {
                "accept": [
                    {
                        "risk": "vllmVersionBelowFloor",
                        "why": "the newest release that is packaged for a CPU; a test without clients of others",
                    }
                ]
            },
            **spec,
        },
    }


def _seen(kubectl: Kubectl, pod: Mapping[str, Any]) -> Seen:
    """Look from inside of a pod's engine container."""
    where = (f"--namespace={pod['metadata']['namespace']}", pod["metadata"]["name"], "--container=vllm")
    return Seen.read(kubectl("exec", *where, "--", "python", "-c", inspect.getsource(listening)))


def _assert_explained(kubectl: Kubectl, pod: Mapping[str, Any], there: set[str]) -> None:
    seen = _seen(kubectl, pod)
    address = pod["status"]["podIP"]
    rows = expected(serve_arguments(seen), seen.environment, packages.version(), address, NOT_ON_A_CPU)
    explained = explain(seen, rows)
    shown = table(explained, rows)
    _keep(f"sockets of the real vLLM, pod {pod['metadata']['name']}", shown)
    assert all(explained.values()), shown
    assert {name for names in explained.values() for name in names} >= there, shown


def _assert_shut(kubectl: Kubectl, client: Pod, pods: Sequence[Mapping[str, Any]], cells: Cells) -> None:
    """A pod beside them reaches no TCP socket of theirs, and every one without the policies."""
    sockets = [
        f"{pod['status']['podIP']}:{found.port}"
        for pod in pods
        for found in _seen(kubectl, pod).listeners
        if found.protocol == "TCP" and not ipaddress.ip_address(found.address).is_loopback
    ]
    assert len(sockets) > len(pods), "an API, and what torch opens"
    cells.check("policies", {client: dict.fromkeys(sockets, SILENT)})
    [first, *_] = sockets
    with opened(kubectl, client.namespace, lambda: client.reach([first])[first] == OPEN):
        cells.check("control: no policies", {client: dict.fromkeys(sockets, OPEN)})


def _assert_serves(client: Pod, namespace: str, name: str, authority: str, key: str) -> None:
    """A completion with the key, also as a stream; nothing without it, and nothing on another route."""
    url = f"https://{name}-gateway.{namespace}.svc"

    def ask(path: str, bearer: str | None, **more: Any) -> tuple[int, str]:
        headers = {"Authorization": f"Bearer {bearer}"} if bearer else {}
        return client.request(f"{url}{path}", authority, method="POST", headers=headers, body=BODY | more)

    status, answer = ask(CHAT, key)
    assert (status, json.loads(answer)["usage"]["completion_tokens"] if status == 200 else answer) == (200, 8)
    status, answer = ask(CHAT, key, stream=True)
    events = [line.removeprefix("data: ") for line in answer.splitlines() if line.startswith("data: ")]
    assert (status, events[-1:], len(events) > 2) == (200, ["[DONE]"], True), answer
    assert ask(CHAT, None)[0] == 401
    assert ask(CHAT, "not-the-key-that-was-made")[0] == 401
    assert ask("/invocations", key)[0] == 403


def _requests(kubectl: Kubectl, pod: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Method, path and status of the requests in an engine's log; what kubelet and operator ask left out."""
    where = (f"--namespace={pod['metadata']['namespace']}", pod["metadata"]["name"], "--container=vllm")
    found = _ACCESS.findall(kubectl("logs", "--tail=-1", *where))
    return [(method, path, status) for method, path, status in found if path not in {"/health", "/version"}]


def _keep(name: str, text: str) -> None:
    ARTEFACTS.mkdir(parents=True, exist_ok=True)
    (ARTEFACTS / f"{name}.txt").write_text(text + "\n", encoding="utf-8")
