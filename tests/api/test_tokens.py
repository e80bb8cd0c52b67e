"""Credentials that end while the operator runs: bound tokens of ten minutes in a file that kubelet would replace."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from securevllm.api import kinds
from securevllm.api.kinds import Ref
from tests.api.kube import Kube, Refused, eventually
from tests.api.lab import as_rendered
from tests.api.operator_process import OPERATOR_NAMESPACE, SERVICE_ACCOUNT, new_namespace, resource, total

if TYPE_CHECKING:
    from pathlib import Path

    from tests.api.lab import Lab

pytestmark = pytest.mark.cluster

SHORTEST = 600
"""Seconds; the API server refuses less."""


def bound_token(kube: Kube, secret: str) -> str:
    """A token that is valid as long as this Secret exists, as a pod's is as long as the pod exists."""
    ref = Ref(kinds.SECRET, OPERATOR_NAMESPACE, secret)
    body = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": secret, "namespace": OPERATOR_NAMESPACE}}
    made = kube.find(ref) or kube.create(body)
    to = {"apiVersion": "v1", "kind": "Secret", "name": secret, "uid": made["metadata"]["uid"]}
    request = {
        "apiVersion": "authentication.k8s.io/v1",
        "kind": "TokenRequest",
        "spec": {"expirationSeconds": SHORTEST, "boundObjectRef": to},
    }
    path = f"/api/v1/namespaces/{OPERATOR_NAMESPACE}/serviceaccounts/{SERVICE_ACCOUNT}/token"
    return str(kube.request("POST", path, request)["status"]["token"])


def put(file: Path, text: str) -> None:
    """As kubelet writes it: the old or the new content, never a part."""
    partial = file.with_suffix(".new")
    partial.write_text(text, encoding="ascii")
    partial.replace(file)


def works(lab: Lab, path: Path) -> bool:
    client = Kube(path)
    try:
        client.list(kinds.SECURE_VLLM_DEPLOYMENT)
    except Refused as refused:
        assert refused.code == 401, refused  # noqa: PT017 - any other answer is a mistake of this test
        return False
    else:
        return True
    finally:
        client.close()


@pytest.mark.slow
def test_a_replaced_token_is_taken_up_before_and_after_the_old_one_has_died(lab: Lab, tmp_path: Path) -> None:
    kube = lab.kube
    operator = lab.operator("tokens")
    first, second = bound_token(kube, "token-1"), bound_token(kube, "token-2")
    put(operator.token_file, first)
    with new_namespace(kube, "tokens") as namespace, operator:
        pid = operator.pid
        kube.create(resource(namespace))
        eventually(lambda: as_rendered(kube, namespace), 30)

        # The new one is there, and the old one dies at once: a request or two meets 401 and is sent again.
        put(operator.token_file, second)
        kube.delete(Ref(kinds.SECRET, OPERATOR_NAMESPACE, "token-1"))
        old = lab.cluster.kubeconfig_for_token(first, tmp_path / "old")
        eventually(lambda: not works(lab, old), 30, pause=1.0)  # authentication is cached for 10 s
        kube.delete(Ref(kinds.SERVICE, namespace, "llama-engine"))
        eventually(lambda: as_rendered(kube, namespace))

        # Nobody had to notice. What is asked while there is no API server may fail, and does below. (In namespaces of
        # other tests, which end meanwhile, much is refused.)
        log = operator.log.splitlines()
        assert [line for line in log if "reconcile failed" in line and f"{namespace}/" in line] == []
        assert any("became the leader" in line for line in log)

        # Every stream is opened again, with the token that kopf has, which is dead.
        if lab.cluster.provider == "local":
            lab.take_apiserver_away(0)
        eventually(lambda: operator.get("/leadz")[0] == 200, 30)
        kube.delete(Ref(kinds.NETWORK_POLICY, namespace, "llama-engine"))
        kube.patch(Ref(kinds.SECURE_VLLM_DEPLOYMENT, namespace, "llama"), {"spec": {"replicas": 3}})
        eventually(lambda: as_rendered(kube, namespace), 30)

        assert operator.pid == pid
        metrics = operator.get("/metrics")[1]
        # The old one was met, and not again and again.
        assert 0 < total(metrics, "securevllm_api_requests_total", 'code="401"') < 20
        assert operator.stop() == 0
    assert second not in operator.log
    assert first not in operator.log
