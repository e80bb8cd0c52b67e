"""Platform bounds on a real API server: what is out of them is not made, and what ran before goes on as it was."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from securevllm.api.kinds import DEPLOYMENT, SECRET, KubeObject, Ref
from tests.api.children import bare, children, everything
from tests.api.kube import Kube, consistently, eventually
from tests.api.operator_process import await_condition, condition, new_namespace, resource, settled

if TYPE_CHECKING:
    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

LABEL = "example.com/vllm"


def secret(namespace: str, name: str, labels: dict[str, str]) -> KubeObject:
    metadata = {"name": name, "namespace": namespace, "labels": labels}
    return {"apiVersion": "v1", "kind": "Secret", "metadata": metadata, "stringData": {"headers": "a=b"}}


def mounting(namespace: str, name: str) -> KubeObject:
    volume = {"name": "a", "mountPath": "/mnt/a", "secret": {"secretName": name}}
    return resource(namespace, engine={"volumes": [volume]})


def bounds(folder: Path, text: str) -> tuple[str, str]:
    file = folder / "bounds.yaml"
    file.write_text(text, encoding="utf-8")
    return "--bounds", str(file)


def test_a_secret_is_used_once_the_platform_labelled_it(lab: Lab, tmp_path: Path) -> None:
    kube: Kube = lab.kube
    arguments = bounds(tmp_path, f"secretLabel: {{key: {LABEL}}}")
    with new_namespace(kube) as namespace, lab.operator("bounds", arguments=arguments):
        ref = Ref.of(kube.create(mounting(namespace, "files")))
        missing = await_condition(kube, ref, "Accepted", "False", reason="SecretNotAllowed")
        assert "does not exist" in missing["message"]
        kube.create(secret(namespace, "files", {LABEL: "false"}))
        eventually(lambda: "does not carry it" in condition(kube, ref, "Accepted")["message"] or None, 60)
        consistently(lambda: not children(kube, namespace), 1)

        kube.patch(Ref(SECRET, namespace, "files"), {"metadata": {"labels": {LABEL: "true"}}})
        await_condition(kube, ref, "Accepted", "True", seconds=60)
        settled(kube, ref)
        template = kube.get(Ref(DEPLOYMENT, namespace, "llama-engine"))["spec"]["template"]["spec"]
        assert template["volumes"][-1]["secret"]["secretName"] == "files"


def test_what_was_accepted_goes_on_when_the_bounds_become_narrower(lab: Lab, tmp_path: Path) -> None:
    kube: Kube = lab.kube
    with new_namespace(kube) as namespace:
        with lab.operator("wide"):
            ref = Ref.of(settled(kube, Ref.of(kube.create(resource(namespace)))))
            kube.create(secret(namespace, "files", {}))
            before = {child: bare(obj) for child, obj in children(kube, namespace).items()}
        arguments = bounds(tmp_path, "images: ['registry.example.com/ml/*']\nacceptances: []\n")
        with lab.operator("narrow", arguments=arguments):
            told = await_condition(kube, ref, "Accepted", "False", reason="OutOfBounds", seconds=40)
            assert told["message"].startswith("spec.image 'vllm/vllm-openai:v0.33.0': the platform does not allow")
            assert "What was accepted before keeps running unchanged." in told["message"]
            # It is still cared for: what somebody changes is put right.
            engine = Ref(DEPLOYMENT, namespace, "llama-engine")
            kube.patch(engine, {"spec": {"replicas": 7}})
            eventually(lambda: kube.get(engine)["spec"]["replicas"] == 1 or None)
            assert {child: bare(kube.get(child)) for child in before} == before

            other: dict[str, Any] = resource(namespace, "other")
            refused = Ref.of(kube.create(other))
            await_condition(kube, refused, "Accepted", "False", reason="OutOfBounds")
            assert not [item for item in everything(kube, namespace) if item.name.startswith("other-")]


def test_an_operator_with_wrong_bounds_does_not_start(lab: Lab, tmp_path: Path) -> None:
    operator = lab.operator("wrong", arguments=bounds(tmp_path, "image: [a]"))
    with pytest.raises(RuntimeError, match=r"ended with 2:\n.*bounds\.image"):
        operator.start()
    assert operator.ended(5) == 2
