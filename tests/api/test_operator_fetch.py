"""Fetching a model: engines wait for the Job, a new model gets a new Job, and the old engines go on meanwhile."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from e2e.cluster.hollow import hollow_node
from e2e.cluster.runners import succeed_jobs
from securevllm.api.kinds import DEPLOYMENT, JOB, PERSISTENT_VOLUME_CLAIM, POD, KubeObject, Ref
from tests.api.kube import Kube, consistently, eventually
from tests.api.operator_process import await_condition, condition, resource, settled

if TYPE_CHECKING:
    from e2e.cluster import Cluster
    from tests.api.operator_process import OperatorProcess

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("operator")]


def model(name: str, **source: Any) -> dict[str, Any]:
    """A model of a hub."""
    return {"name": name, "source": {"huggingFace": source}}


def the_job(kube: Kube, namespace: str) -> KubeObject:
    """The only Job of a namespace."""
    (job,) = kube.list(JOB, namespace)
    return job


def finish(kube: Kube, job: KubeObject, kind: str, message: str = "") -> None:
    """What the Job controller writes at the end: first the decision, then, when no pod is left, the result."""
    ref = Ref.of(job)
    # Set by the controller, and it never moves.
    moment = eventually(lambda: kube.get(ref).get("status", {}).get("startTime"))
    early = {"Complete": "SuccessCriteriaMet", "Failed": "FailureTarget"}[kind]

    def conditions(*kinds: str) -> list[dict[str, str]]:
        return [
            {"type": name, "status": "True", "message": message, "lastTransitionTime": moment, "lastProbeTime": moment}
            for name in kinds
        ]

    kube.patch(ref, {"status": {"conditions": conditions(early)}}, subresource="status")
    for pod in kube.list(POD, job["metadata"]["namespace"], f"job-name={job['metadata']['name']}"):
        kube.patch(Ref.of(pod), {"metadata": {"finalizers": None}})
        kube.delete(Ref.of(pod), gracePeriodSeconds=0)

    def ended() -> bool:
        done = {"completionTime": moment} if kind == "Complete" else {}
        counts = {"active": None, "ready": None, "terminating": None, "uncountedTerminatedPods": None}
        written = kube.patch(
            ref, {"status": {**done, **counts, "conditions": conditions(early, kind)}}, subresource="status"
        )
        return kind in {item["type"] for item in written["status"]["conditions"]}

    eventually(ended)


def test_engines_wait_until_the_model_is_there(cluster: Cluster, kube: Kube, namespace: str) -> None:
    ref = Ref.of(kube.create(resource(namespace, model=model("org/model", storage={"size": "20Gi"}))))
    found = await_condition(kube, ref, "EnginesReady", "False", reason="FetchingModel")
    assert found["message"] == "The fetch Job downloads the model; engines start when it is complete."
    engine = Ref(DEPLOYMENT, namespace, "llama-engine")
    consistently(lambda: kube.find(engine) is None, 1)
    assert kube.find(Ref(DEPLOYMENT, namespace, "llama-gateway"))
    claim = kube.get(Ref(PERSISTENT_VOLUME_CLAIM, namespace, "llama-model"))
    assert claim["spec"]["resources"] == {"requests": {"storage": "20Gi"}}

    with hollow_node(cluster, succeed_jobs, namespace=namespace):
        await_condition(kube, ref, "EnginesReady", "True", reason="AllReady")
    (volume,) = [item for item in kube.get(engine)["spec"]["template"]["spec"]["volumes"] if item["name"] == "model"]
    assert volume["persistentVolumeClaim"] == {"claimName": "llama-model", "readOnly": True}


def test_a_fetch_that_failed_says_why(kube: Kube, namespace: str) -> None:
    ref = Ref.of(kube.create(resource(namespace, model=model("org/model"))))
    await_condition(kube, ref, "EnginesReady", "False", reason="FetchingModel")
    finish(kube, the_job(kube, namespace), "Failed", "Job has reached the specified backoff limit")

    found = await_condition(kube, ref, "EnginesReady", "False", reason="FetchFailed")
    assert "Job has reached the specified backoff limit" in found["message"]
    assert "delete the Job to try again" in found["message"]
    assert kube.find(Ref(DEPLOYMENT, namespace, "llama-engine")) is None


def test_old_engines_go_on_until_the_new_model_is_there(kube: Kube, namespace: str, operator: OperatorProcess) -> None:
    shared = {"storage": {"accessModes": ["ReadWriteMany"]}}  # one claim for two engines
    ref = Ref.of(kube.create(resource(namespace, model=model("org/first", **shared))))
    await_condition(kube, ref, "EnginesReady", "False", reason="FetchingModel")
    first = the_job(kube, namespace)
    finish(kube, first, "Complete")
    settled(kube, ref)
    engine = Ref(DEPLOYMENT, namespace, "llama-engine")
    eventually(lambda: kube.find(engine))
    before = kube.get(engine)

    kube.patch(ref, {"spec": {"model": {"name": "org/second"}, "replicas": 2}})
    await_condition(kube, ref, "EnginesReady", "False", reason="FetchingModel")
    second = eventually(lambda: the_job(kube, namespace))
    assert second["metadata"]["name"] != first["metadata"]["name"]
    assert "org/second" in second["spec"]["template"]["spec"]["containers"][0]["args"]

    def goes_on() -> bool:
        """As many as the spec says, all with the old model."""
        spec = kube.get(engine)["spec"]
        return bool(spec["replicas"] == 2 and spec["template"] == before["spec"]["template"])

    eventually(goes_on)
    consistently(goes_on, 1)
    with operator.down():
        pass
    consistently(goes_on, 1)
    # They are cared for meanwhile, as ever.
    kube.patch(engine, {"spec": {"template": {"spec": {"hostNetwork": True}}}})
    eventually(goes_on)

    finish(kube, second, "Complete")
    settled(kube, ref)
    eventually(lambda: kube.get(engine)["spec"]["template"] != before["spec"]["template"])
    after = kube.get(engine)
    old, new = (obj["spec"]["template"]["spec"]["containers"][0]["args"] for obj in (before, after))
    assert old[0] != new[0]
    assert after["metadata"]["uid"] == before["metadata"]["uid"]
    assert [job["metadata"]["name"] for job in kube.list(JOB, namespace)] == [second["metadata"]["name"]]


def test_an_absent_token_is_named(kube: Kube, namespace: str) -> None:
    token = {"tokenSecretRef": {"name": "hub", "key": "token"}}
    ref = Ref.of(kube.create(resource(namespace, model=model("org/model", **token))))
    found = await_condition(kube, ref, "EnginesReady", "False", reason="SecretMissing")
    assert (
        found["message"]
        == "Secret hub (model.source.huggingFace.tokenSecretRef) does not exist. See docs/status.md#secretmissing."
    )
    assert condition(kube, ref, "GatewayReady")["reason"] == "Progressing"
    assert "HF_TOKEN" in str(the_job(kube, namespace)["spec"]["template"]["spec"]["containers"][0]["env"])

    metadata = {"name": "hub", "namespace": namespace, "labels": {"securevllm.io/secret": "hub"}}
    kube.create({"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"token": "hf_0123456789"}})
    await_condition(kube, ref, "EnginesReady", "False", reason="FetchingModel", seconds=3)
