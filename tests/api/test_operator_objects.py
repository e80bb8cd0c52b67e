"""From a resource to its objects, its status and its Events; and nothing is left when it goes."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster.hollow import hollow_node
from securevllm.api.kinds import (
    CONFIG_MAP,
    DEPLOYMENT,
    EVENT,
    POD,
    POD_DISRUPTION_BUDGET,
    SECRET,
    SECURE_VLLM_DEPLOYMENT,
    SERVICE,
    KubeObject,
    Ref,
)
from securevllm.drift import covers
from securevllm.render.engine import MADE
from securevllm.render.meta import ENGINE_KEY_ANNOTATION
from tests.api.audit import Audit, now
from tests.api.children import DENY, bare, children, defaulted, everything, rendered
from tests.api.kube import Kube, Refused, consistently, eventually
from tests.api.operator_process import USER, await_condition, condition, quiet, resource, settled

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]

FULL_SPEC: dict[str, Any] = {
    "replicas": 2,
    "engine": {"args": ["--max-model-len=4096"], "env": [{"name": "VLLM_LOGGING_LEVEL", "value": "DEBUG"}]},
    "gateway": {"replicas": 3, "routes": {"profiles": ["chat", "embeddings"]}, "limits": {"requestBody": "1Mi"}},
}


def create(kube: Kube, obj: KubeObject) -> KubeObject:
    """Create a resource and wait until all its objects are applied."""
    return settled(kube, Ref.of(kube.create(obj)))


def events(kube: Kube, namespace: str) -> list[tuple[str, str, str]]:
    """Type, reason and note of the operator's Events, in the order of their making."""
    found = [
        event for event in kube.list(EVENT, namespace) if event.get("reportingController") == "securevllm-operator"
    ]
    found.sort(key=lambda event: event["eventTime"])
    return [(event["type"], event["reason"], event["note"]) for event in found]


def secret_texts(kube: Kube, namespace: str) -> set[str]:
    """Values of all Secrets of a namespace in base64, and keys in plain text: each client's, each line of a PEM key."""
    found = set()
    for obj in kube.list(SECRET, namespace):
        for name, value in obj.get("data", {}).items():
            found.add(value)
            plain = base64.b64decode(value).decode()
            if name not in {"tls.crt", "ca.crt", "api_keys.yaml", MADE}:
                found |= {line for line in plain.splitlines() if not line.startswith("-----")}
    return found


# --------------------------------------------------------------------------------------------------------- objects


@pytest.mark.parametrize("spec", [{}, FULL_SPEC], ids=["smallest", "full"])
def test_every_child_is_what_render_prints(kube: Kube, namespace: str, spec: dict[str, Any]) -> None:
    obj = create(kube, resource(namespace, **spec))
    live, printed = children(kube, namespace), rendered(obj)

    assert set(live) == set(printed)
    # These hold generated content that `render` does not have.
    with_secrets = {"llama-accepted", "llama-gateway-auth", "llama-engine-key", "llama-client-keys"}
    with_secrets |= {"llama-gateway-ca", "llama-gateway-tls"}
    for ref, wanted in printed.items():
        if ref == Ref(DEPLOYMENT, namespace, "llama-engine"):
            assert without_key(bare(live[ref])) == without_key(defaulted(kube, wanted, "default"))
        elif ref.name not in with_secrets:
            assert bare(live[ref]) == defaulted(kube, wanted, "default"), ref
    accepted = live[Ref(CONFIG_MAP, namespace, "llama-accepted")]["data"]
    assert json.loads(accepted["spec.json"]) == obj["spec"]
    template = live[Ref(DEPLOYMENT, namespace, "llama-engine")]["spec"]["template"]
    assert covers(json.loads(accepted["templates.json"])["engine"]["template"], template)


def without_key(deployment: KubeObject) -> KubeObject:
    """Engines without the fingerprint of the key that they started with, and without the hash that it goes into."""
    del deployment["metadata"]["annotations"]["securevllm.io/rendered"]
    deployment["spec"]["template"]["metadata"].get("annotations", {}).pop(ENGINE_KEY_ANNOTATION, None)
    if not deployment["spec"]["template"]["metadata"].get("annotations"):
        deployment["spec"]["template"]["metadata"].pop("annotations", None)
    return deployment


def test_every_child_but_the_default_deny_is_owned_and_goes_with_the_resource(kube: Kube, namespace: str) -> None:
    obj = create(kube, resource(namespace))
    owner = {
        "apiVersion": obj["apiVersion"],
        "kind": obj["kind"],
        "name": "llama",
        "uid": obj["metadata"]["uid"],
        "controller": True,
        "blockOwnerDeletion": True,
    }
    for ref, child in children(kube, namespace).items():
        assert child["metadata"].get("ownerReferences") == (None if ref.name == DENY else [owner]), ref

    kube.delete(Ref.of(obj))
    # The garbage collector learns a new CRD every 30 s only.
    eventually(lambda: everything(kube, namespace) == set(), 60)


def test_generated_secrets_keep_their_content(kube: Kube, namespace: str, operator: OperatorProcess) -> None:
    ref = Ref.of(create(kube, resource(namespace)))
    names = ("llama-engine-key", "llama-client-keys", "llama-gateway-ca", "llama-gateway-tls")
    before = [kube.get(Ref(SECRET, namespace, name)) for name in names]

    with operator.down():
        kube.patch(ref, {"spec": {"replicas": 3}})
    settled(kube, ref)

    assert [kube.get(Ref(SECRET, namespace, name)) for name in names] == before


def test_an_update_reaches_its_children_and_only_them(kube: Kube, namespace: str) -> None:
    obj = create(kube, resource(namespace))
    before = children(kube, namespace)

    kube.patch(Ref.of(obj), {"spec": {"engine": {"args": ["--max-model-len=2048"]}}})
    obj = settled(kube, Ref.of(obj))
    after = children(kube, namespace)

    assert obj["status"]["observedGeneration"] == 2
    changed = {ref.name for ref in before if bare(before[ref]) != bare(after[ref])}
    assert changed == {"llama-engine", "llama-accepted"}
    engine = after[Ref(DEPLOYMENT, namespace, "llama-engine")]["spec"]["template"]["spec"]["containers"][0]
    assert "--max-model-len=2048" in engine["args"]
    assert set(before) == set(after)


def test_objects_that_a_new_spec_has_no_use_for_are_pruned_once_no_pod_refers_to_them(
    cluster: Cluster, kube: Kube, namespace: str
) -> None:
    ref = Ref.of(create(kube, resource(namespace)))
    before = set(children(kube, namespace))
    keys = {child: obj["data"] for child, obj in children(kube, namespace).items() if child.kind == SECRET}

    plain = {"tls": {"disabled": "the mesh encrypts it"}, "authentication": {"none": "I accept this in a lab"}}
    kube.patch(ref, {"spec": {"gateway": {"replicas": 1, **plain}}})
    settled(kube, ref)

    budget, auth = Ref(POD_DISRUPTION_BUDGET, namespace, "llama-gateway"), Ref(SECRET, namespace, "llama-gateway-auth")
    eventually(lambda: before - set(children(kube, namespace)) == {budget})
    # Pods of the old template, which still mount it, are being replaced.
    consistently(lambda: kube.find(auth), 1)
    with hollow_node(cluster, namespace=namespace):
        eventually(lambda: kube.find(auth) is None, 30)
    # Keys and certificates stay: the edit may have been a mistake.
    del keys[auth]
    assert {child: kube.get(child)["data"] for child in keys} == keys


def test_suspending_keeps_the_policies_and_resuming_brings_the_pods(kube: Kube, namespace: str) -> None:
    ref = Ref.of(create(kube, resource(namespace)))
    policies = {name for name in children(kube, namespace) if name.kind.kind == "NetworkPolicy"}
    eventually(lambda: len(kube.list(POD, namespace)) == 3)

    kube.patch(ref, {"spec": {"suspend": True}})
    await_condition(kube, ref, "EnginesReady", "False", reason="Suspended")
    eventually(lambda: kube.list(POD, namespace) == [])
    assert {name for name in children(kube, namespace) if name.kind.kind == "NetworkPolicy"} == policies

    kube.patch(ref, {"spec": {"suspend": False}})
    eventually(lambda: len(kube.list(POD, namespace)) == 3)


def test_kubectl_scale_works_through_the_scale_subresource(cluster: Cluster, kube: Kube, namespace: str) -> None:
    ref = Ref.of(create(kube, resource(namespace)))

    command = [str(Path(sys.executable).parent / "kubectl"), "--kubeconfig", str(cluster.kubeconfig)]
    subprocess.run([*command, "-n", namespace, "scale", "svllm/llama", "--replicas=3"], check=True)  # noqa: S603 - fixed

    def scaled() -> bool:
        status = kube.get(ref, "scale")["status"]
        assert status["replicas"] == 3, status
        pods = kube.list(POD, namespace, status["selector"])
        return len(pods) == 3 and all(pod["metadata"]["name"].startswith("llama-engine-") for pod in pods)

    eventually(scaled)
    assert kube.get(ref)["spec"]["replicas"] == 3


# ---------------------------------------------------------------------------------------------------------- status


def test_conditions_follow_the_pods_and_events_tell_transitions_once(
    cluster: Cluster, kube: Kube, namespace: str
) -> None:
    ref = Ref.of(create(kube, resource(namespace, replicas=2)))
    waiting = await_condition(kube, ref, "EnginesReady", "False", reason="Progressing")
    eventually(lambda: "0 of 2 engines are ready, 2 have" in condition(kube, ref, "EnginesReady")["message"])
    time.sleep(1.1)  # lastTransitionTime has seconds

    with hollow_node(cluster, namespace=namespace):
        ready = await_condition(kube, ref, "EnginesReady", "True", reason="AllReady")
        assert ready["lastTransitionTime"] > waiting["lastTransitionTime"]
        # No Envoy answers on a pod without processes: the revision is unknown, and that is what it says.
        await_condition(kube, ref, "GatewayReady", "False", reason="RevisionUnknown")
        assert condition(kube, ref, "Ready")["reason"] == "RevisionUnknown"
        status = kube.get(ref)["status"]
        assert (status["replicas"], status["readyReplicas"]) == (2, 2)
        kube.patch(ref, {"metadata": {"labels": {"a": "b"}}})
        consistently(lambda: condition(kube, ref, "EnginesReady") == ready, 1)

    told = [(kind, reason) for kind, reason, note in events(kube, namespace) if note.startswith("EnginesReady=")]
    assert told == [("Normal", "Progressing"), ("Normal", "AllReady")]
    assert [reason for _, reason, note in events(kube, namespace) if note.startswith("Accepted=")] == ["SpecAccepted"]


def test_a_condition_keeps_its_transition_time_while_only_its_message_moves(kube: Kube, namespace: str) -> None:
    ref = Ref.of(create(kube, resource(namespace, replicas=1)))
    quiet(kube, ref, 1.1)  # Events come after the status; lastTransitionTime has seconds
    before = {item["type"]: item for item in kube.get(ref)["status"]["conditions"]}
    told = len(events(kube, namespace))

    kube.patch(ref, {"spec": {"replicas": 4}})
    eventually(lambda: "of 4 engines" in await_condition(kube, ref, "EnginesReady", "False")["message"])

    after = {item["type"]: item for item in kube.get(ref)["status"]["conditions"]}
    assert {name: item["lastTransitionTime"] for name, item in after.items()} == {
        name: item["lastTransitionTime"] for name, item in before.items()
    }
    assert {item["observedGeneration"] for item in after.values()} == {2}
    assert len(events(kube, namespace)) == told


def test_no_secret_stands_in_a_log_an_event_or_another_object(
    kube: Kube, namespace: str, operator: OperatorProcess
) -> None:
    keys = {"alice": "alice-key-0123456789", "bob": "not a key, for it has blanks"}
    labels = {"securevllm.io/secret": "clients"}
    metadata = {"name": "clients", "namespace": namespace, "labels": labels}
    kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": keys})
    references = {"apiKeys": {"secretRefs": [{"name": "clients"}]}}
    ref = Ref.of(create(kube, resource(namespace, gateway={"authentication": references})))
    create(kube, resource(namespace, "mistral"))  # with generated keys
    await_condition(kube, ref, "GatewayReady", "False", reason="Progressing")
    # Drift in a Secret is logged too.
    kube.patch(Ref(SECRET, namespace, "llama-gateway-auth"), {"stringData": {"extra": "x" * 20}})
    eventually(lambda: "extra" not in kube.get(Ref(SECRET, namespace, "llama-gateway-auth"))["data"])

    hidden = secret_texts(kube, namespace)
    assert {"alice-key-0123456789", "not a key, for it has blanks"} <= hidden
    assert len(hidden) > 20
    objects = [obj for child, obj in children(kube, namespace).items() if child.kind != SECRET]
    shown = {
        "log": operator.log,
        "events": json.dumps(kube.list(EVENT, namespace)),
        "resources": json.dumps(kube.list(SECURE_VLLM_DEPLOYMENT, namespace)),
        "objects": json.dumps(objects),
        "metrics": operator.get("/metrics")[1],
    }
    for place, text in shown.items():
        assert [secret for secret in hidden if secret in text] == [], place


# ------------------------------------------------------------------------------------------------- Secrets of users


def secret(namespace: str, name: str, data: dict[str, str], **labels: str) -> KubeObject:
    """An Opaque Secret that is watched."""
    metadata = {"name": name, "namespace": namespace, "labels": {"securevllm.io/secret": "user"}}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": data}


def with_keys(namespace: str) -> KubeObject:
    """A resource whose client keys are in a user's Secret."""
    references = [{"name": "clients"}]
    return resource(namespace, gateway={"authentication": {"apiKeys": {"secretRefs": references}}})


def test_an_absent_secret_of_keys_is_named_and_noticed_at_once_when_it_appears(kube: Kube, namespace: str) -> None:
    ref = Ref.of(kube.create(with_keys(namespace)))
    found = await_condition(kube, ref, "GatewayReady", "False", reason="SecretMissing")
    assert (
        found["message"]
        == "Secret clients (gateway.authentication.apiKeys) does not exist. See docs/status.md#secretmissing."
    )
    assert condition(kube, ref, "Accepted")["status"] == "True"

    kube.create(secret(namespace, "clients", {"alice": "alice-key-0123456789"}))
    await_condition(kube, ref, "GatewayReady", "False", reason="Progressing", seconds=3)
    envoy = base64.b64decode(kube.get(Ref(SECRET, namespace, "llama-gateway-auth"))["data"]["api_keys.yaml"]).decode()
    assert "alice-key-0123456789" in envoy


@pytest.mark.parametrize(
    ("data", "reason", "message"),
    [
        ({}, "SecretMissing", "Secret clients (gateway.authentication.apiKeys) has no key."),
        ({"alice": "short"}, "NoClientKeys", "Secret clients, client alice: a key is 16 to 512 characters"),
        ({"alice": "with blanks in the middle"}, "NoClientKeys", "client alice: a key is 16 to 512 characters"),
        ({"_": "alice-key-0123456789"}, "NoClientKeys", "data key '_': not a client id"),
    ],
    ids=["empty", "short", "blanks", "id"],
)
def test_a_secret_without_a_usable_key_closes_the_gateway_and_says_why(
    kube: Kube, namespace: str, data: dict[str, str], reason: str, message: str
) -> None:
    kube.create(secret(namespace, "clients", data))
    ref = Ref.of(kube.create(with_keys(namespace)))
    found = await_condition(kube, ref, "GatewayReady", "False", reason=reason)
    assert message in found["message"]
    assert all(value not in found["message"] for value in data.values())


def test_two_clients_never_share_a_key(kube: Kube, namespace: str) -> None:
    kube.create(secret(namespace, "clients", {"alice": "shared-key-0123456789", "bob": "shared-key-0123456789\n"}))
    create(kube, with_keys(namespace))
    files = kube.get(Ref(SECRET, namespace, "llama-gateway-auth"))["data"]
    assert base64.b64decode(files["api_keys.yaml"]).decode().count("shared-key-0123456789") == 1


def test_an_absent_tls_secret_is_named(kube: Kube, namespace: str) -> None:
    ref = Ref.of(kube.create(resource(namespace, gateway={"tls": {"secretName": "certificate"}})))
    found = await_condition(kube, ref, "GatewayReady", "False", reason="SecretMissing")
    assert found["message"] == "Secret certificate (gateway.tls) does not exist. See docs/status.md#secretmissing."
    assert kube.find(Ref(SECRET, namespace, "llama-gateway-tls")) is None

    kube.create(secret(namespace, "certificate", {"tls.crt": "x", "tls.key": "y"}))
    await_condition(kube, ref, "GatewayReady", "False", reason="Progressing", seconds=3)


def test_a_client_added_to_the_generated_secret_is_let_in_and_an_emptied_one_gets_a_key_again(
    kube: Kube, namespace: str
) -> None:
    create(kube, resource(namespace))
    clients, auth = (Ref(SECRET, namespace, f"llama-{name}") for name in ("client-keys", "gateway-auth"))

    kube.patch(clients, {"stringData": {"bob": "bob-key-0123456789"}})
    eventually(lambda: "bob-key-0123456789" in base64.b64decode(kube.get(auth)["data"]["api_keys.yaml"]).decode())

    kube.patch(clients, {"data": None})
    eventually(lambda: list(kube.get(clients).get("data", {})) == ["default"])
    key = base64.b64decode(kube.get(clients)["data"]["default"]).decode()
    eventually(lambda: key in base64.b64decode(kube.get(auth)["data"]["api_keys.yaml"]).decode())
    assert "bob-key" not in base64.b64decode(kube.get(auth)["data"]["api_keys.yaml"]).decode()


# ----------------------------------------------------------------------------------------------------------- names


def test_the_longest_name_works(kube: Kube, namespace: str) -> None:
    name = "a" + "b" * 39
    obj = create(kube, resource(namespace, name))
    assert set(children(kube, namespace)) == set(rendered(obj))
    eventually(lambda: len(kube.list(POD, namespace)) == 3)


def test_a_longer_name_is_refused_with_the_reason(kube: Kube, namespace: str) -> None:
    with pytest.raises(Refused, match="at most 40 characters: names of StatefulSets are made from it"):
        kube.create(resource(namespace, "a" * 41))


# -------------------------------------------------------------------------------------------------------- idleness


def test_a_settled_resource_costs_no_write(cluster: Cluster, kube: Kube, namespace: str) -> None:
    ref = Ref.of(create(kube, resource(namespace)))
    quiet(kube, ref)
    since = now()
    # A change that concerns nobody: the resource is looked at, and nothing is written.
    kube.patch(ref, {"metadata": {"labels": {"team": "a"}}})
    version = kube.get(ref)["metadata"]["resourceVersion"]
    consistently(lambda: kube.get(ref)["metadata"]["resourceVersion"] == version, 2)
    assert Audit(cluster).writes(since, user=USER, namespace=namespace) == []
    assert kube.get(Ref(SERVICE, namespace, "llama-gateway"))["spec"]["type"] == "ClusterIP"
