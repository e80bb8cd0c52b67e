"""A bad spec changes nothing that runs; what was accepted before is what is reconciled, also by the next operator."""

from __future__ import annotations

import json
import time
from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api.kinds import CONFIG_MAP, DEPLOYMENT, EVENT, NETWORK_POLICY, SECRET, SERVICE, KubeObject, Ref
from tests.api.audit import Audit, now
from tests.api.children import DENY, bare, children, everything, versions
from tests.api.kube import Kube, consistently, eventually
from tests.api.operator_process import USER, await_condition, condition, quiet, resource, settled

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]

IMAGE = "registry.example/vllm-openai:v0.33.0"
BAD: dict[str, Any] = {"engine": {"args": ["--trust-remote-code"]}, "image": IMAGE, "replicas": 7}
"""The schema lets it pass, the operator does not; two of its fields alone would be fine."""


def spoil(kube: Kube, obj: KubeObject) -> None:
    """Put a bad spec over a good one, and wait for the refusal."""
    kube.patch(Ref.of(obj), {"spec": BAD})
    await_condition(kube, Ref.of(obj), "Accepted", "False", reason="ArgumentRefused")


def good(kube: Kube, namespace: str) -> KubeObject:
    """A settled resource."""
    return settled(kube, Ref.of(kube.create(resource(namespace))))


def test_a_bad_spec_is_refused_with_the_field_the_value_and_the_way_out(kube: Kube, namespace: str) -> None:
    obj = good(kube, namespace)
    spoil(kube, obj)

    accepted = condition(kube, Ref.of(obj), "Accepted")
    assert accepted["message"].startswith("spec.engine.args[0] '--trust-remote-code': ")
    assert "What was accepted before keeps running unchanged." in accepted["message"]
    stalled = condition(kube, Ref.of(obj), "Stalled")
    assert (stalled["status"], stalled["reason"]) == ("True", "ArgumentRefused")
    assert condition(kube, Ref.of(obj), "Ready")["message"].startswith("Accepted: spec.engine.args[0]")
    assert kube.get(Ref.of(obj))["status"]["observedGeneration"] == 2
    told = [event for event in kube.list(EVENT, namespace) if event["reason"] == "ArgumentRefused"]
    assert [(event["type"], event["note"][:14]) for event in told] == [("Warning", "Accepted=False")]


def test_a_bad_spec_changes_no_object_and_a_restart_of_the_operator_neither(
    cluster: Cluster, kube: Kube, namespace: str, operator: OperatorProcess
) -> None:
    obj = good(kube, namespace)
    eventually(lambda: kube.get(Ref(DEPLOYMENT, namespace, "llama-engine")).get("status", {}).get("replicas"))
    before, since = versions(children(kube, namespace)), now()

    spoil(kube, obj)
    assert versions(children(kube, namespace)) == before
    with operator.down():
        pass
    consistently(lambda: versions(children(kube, namespace)) == before, 1.5)
    assert condition(kube, Ref.of(obj), "Accepted")["reason"] == "ArgumentRefused"

    written = {request.resource for request in Audit(cluster).writes(since, user=USER, namespace=namespace)}
    assert written <= {"securevllmdeployments", "events"}


def test_drift_is_put_right_from_the_accepted_spec_while_the_spec_is_bad(
    kube: Kube, namespace: str, operator: OperatorProcess
) -> None:
    spoil(kube, good(kube, namespace))
    before = children(kube, namespace)
    engine, gateway = Ref(DEPLOYMENT, namespace, "llama-engine"), Ref(SERVICE, namespace, "llama-gateway")
    policy, deny = Ref(NETWORK_POLICY, namespace, "llama-engine"), Ref(NETWORK_POLICY, namespace, DENY)

    def repaired() -> bool:
        assert {ref: bare(kube.get(ref)) for ref in before} == {ref: bare(obj) for ref, obj in before.items()}
        return True

    def disturb() -> None:
        kube.patch(engine, {"spec": {"replicas": 7}})
        kube.patch(policy, {"spec": {"ingress": [{}]}})
        for ref in (gateway, deny):
            kube.delete(ref)

    disturb()
    eventually(repaired)
    with operator.down():
        disturb()
    eventually(repaired)


def test_a_repaired_spec_is_taken_at_once(kube: Kube, namespace: str) -> None:
    obj = good(kube, namespace)
    spoil(kube, obj)

    kube.patch(Ref.of(obj), {"spec": {"engine": {"args": ["--max-model-len=2048"]}}})
    settled(kube, Ref.of(obj))

    assert condition(kube, Ref.of(obj), "Accepted")["status"] == "True"
    assert condition(kube, Ref.of(obj), "Stalled")["status"] == "False"
    spec = kube.get(Ref(DEPLOYMENT, namespace, "llama-engine"))["spec"]
    assert spec["replicas"] == 7
    assert spec["template"]["spec"]["containers"][0]["image"] == IMAGE
    assert "--max-model-len=2048" in spec["template"]["spec"]["containers"][0]["args"]


def test_a_first_spec_that_is_bad_creates_nothing(kube: Kube, namespace: str) -> None:
    ref = Ref.of(kube.create(resource(namespace, **BAD)))
    message = await_condition(kube, ref, "Accepted", "False", reason="ArgumentRefused")["message"]
    assert "accepted before" not in message
    assert "No earlier accepted spec" not in message
    consistently(lambda: everything(kube, namespace) == {ref}, 1)

    kube.patch(ref, {"spec": resource(namespace)["spec"] | {"engine": None}})
    settled(kube, ref)
    assert Ref(DEPLOYMENT, namespace, "llama-engine") in children(kube, namespace)


def forge(kube: Kube, accepted: Ref) -> None:
    """What somebody with write access to ConfigMaps would like the operator to run."""
    data = kube.get(accepted)["data"]
    spec = json.loads(data["spec.json"]) | {"image": "evil/vllm:v0.33.0"}
    templates = json.loads(data["templates.json"])
    templates["engine"]["template"]["spec"]["hostNetwork"] = True
    forged = {"spec.json": json.dumps(spec), "templates.json": json.dumps(templates)}
    kube.patch(accepted, {"data": forged})


def lose(kube: Kube, accepted: Ref) -> None:
    """What was accepted is gone."""
    kube.delete(accepted)


def lose_the_seal(kube: Kube, accepted: Ref) -> None:
    """The Secret with the key of the seal is gone."""
    kube.delete(Ref(SECRET, accepted.namespace, "llama-engine-key"))


@pytest.mark.parametrize("down", [False, True], ids=["running", "down"])
@pytest.mark.parametrize("harm", [forge, lose, lose_the_seal])
def test_a_lost_memory_changes_nothing_and_prunes_nothing(
    kube: Kube, namespace: str, operator: OperatorProcess, harm: Any, *, down: bool
) -> None:
    obj = good(kube, namespace)
    spoil(kube, obj)
    # A reconcile that has read the memory already would put it right, as any drift.
    quiet(kube, Ref.of(obj))
    accepted = Ref(CONFIG_MAP, namespace, "llama-accepted")
    if down:
        with operator.down():
            harm(kube, accepted)
            left = versions(children(kube, namespace))
    else:
        harm(kube, accepted)
        left = versions(children(kube, namespace))

    def told() -> bool:
        found = condition(kube, Ref.of(obj), "Accepted")["message"]
        assert "No earlier accepted spec can be read: existing objects and the default-deny stay" in found
        return True

    eventually(told)
    consistently(lambda: versions(children(kube, namespace)) == left, 1)
    # The default-deny is nobody's spec: it stays closed whatever is known.
    kube.delete(Ref(NETWORK_POLICY, namespace, DENY))
    eventually(lambda: kube.find(Ref(NETWORK_POLICY, namespace, DENY)))

    kube.patch(Ref.of(obj), {"spec": {"engine": None}})
    settled(kube, Ref.of(obj))
    template = kube.get(Ref(DEPLOYMENT, namespace, "llama-engine"))["spec"]["template"]["spec"]
    assert template["containers"][0]["image"] == IMAGE
    assert "hostNetwork" not in template


def test_a_forged_memory_is_put_right_while_the_spec_is_good(
    kube: Kube, namespace: str, operator: OperatorProcess
) -> None:
    obj = good(kube, namespace)
    accepted = Ref(CONFIG_MAP, namespace, "llama-accepted")
    before = children(kube, namespace)
    with operator.down():
        forge(kube, accepted)

    eventually(lambda: bare(kube.get(accepted)) == bare(before[accepted]))
    time.sleep(0.5)
    assert bare(kube.get(Ref(DEPLOYMENT, namespace, "llama-engine"))) == bare(
        before[Ref(DEPLOYMENT, namespace, "llama-engine")]
    )
    assert condition(kube, Ref.of(obj), "Accepted")["status"] == "True"
    assert "carries no valid seal" in operator.log
