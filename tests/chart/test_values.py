"""Values that helm refuses, and what it says."""

from __future__ import annotations

import re

import pytest
import yaml

from securevllm.api.parse import parse
from securevllm.api.types import API_VERSION, KIND
from tests.chart.programs import CHART, NAME, Helm, HelmError

REFUSED = {
    "replica=3": "replica",
    "replicas=two": "/replicas",
    "replicas=-1": "/replicas",
    "image.tags=1": "/image",
    "image.digest=sha256:abc": "/image/digest",
    "image.pullPolicy=Sometimes": "/image/pullPolicy",
    "image.repository=": "/image/repository",
    "crds.install=true": "/crds",
    "crds.keep=maybe": "/crds/keep",
    "watchNamespace=Not_A_Name": "/watchNamespace",
    "docsUrl=docs": "/docsUrl",
    "docsUrl=javascript:alert(1)": "/docsUrl",
    "log.level=TRACE": "/log/level",
    "log.format=text": "/log/format",
    "workers=0": "/workers",
    "bounds.image[0]=a": "/bounds",
    "bounds.images[0]=A B": "/bounds/images/0",
    "bounds.serviceTypes[0]=ExternalName": "/bounds/serviceTypes/0",
    "bounds.egress.ports[0]=http": "/bounds/egress/ports",
    "resyncSeconds=4": "/resyncSeconds",
    "resyncSeconds=86401": "/resyncSeconds",
    "dns.port=0": "/dns/port",
    "dns.peers[0].namespace=x": "/dns/peers/0",
    "dns.peers[0].cidr=10.0.0.10": "/dns/peers/0",
    "cluster.ranges[0]=10.0.0.0": "/cluster/ranges/0",
    "networkPolicy.egress.flavor=calico": "/networkPolicy/egress/flavor",
    "admission.podMakers[0]=it's": "/admission/podMakers/0",
    "admission.operators[0]=it's": "/admission/operators/0",
    "admission.podMakers[0]=x' || true || '": "/admission/podMakers/0",
    "admission.allowEphemeralContainers=sometimes": "/admission/allowEphemeralContainers",
    "monitoring.serviceMonitor.interval=often": "/monitoring/serviceMonitor/interval",
    "extraEnv[0].value=x": "/extraEnv/0",
    "podDisruptionBudget.minAvailable=1": "/podDisruptionBudget",
}
"""--set-string or --set argument: part of the message."""


@pytest.mark.parametrize("setting", REFUSED)
def test_a_wrong_value_is_refused_with_its_path(helm: Helm, setting: str) -> None:
    with pytest.raises(HelmError) as error:
        helm.template("--set", setting)
    told = str(error.value).replace("'", "").replace(".", "/")
    assert REFUSED[setting] in told, error.value
    assert "schema" in told


CONTRADICTIONS = {
    "serviceAccount.create=false": "serviceAccount.name",
    "networkPolicy.egress.enabled=true": "networkPolicy.egress.apiServer.cidrs",
    'dns.peers=[{"cidr": "10.0.0.10/32"}]': "dns.peers",
}


@pytest.mark.parametrize("setting", CONTRADICTIONS)
def test_values_that_contradict_each_other_are_refused_with_the_way_out(helm: Helm, setting: str) -> None:
    with pytest.raises(HelmError) as error:
        helm.template("--set-json", setting)
    assert f"{CONTRADICTIONS[setting]}: " in str(error.value)


def test_a_cluster_that_is_too_old_is_refused(helm: Helm) -> None:
    with pytest.raises(HelmError, match=r"requires kubeVersion: >=1\.30"):
        helm.template("--kube-version", "1.29.0")


def test_the_notes_give_a_resource_that_the_operator_takes(helm: Helm) -> None:
    notes = helm("install", NAME, str(CHART), "--dry-run=client").partition("NOTES:")[2]
    [text] = re.findall(r"echo '(.*?)' \|", notes, re.DOTALL)
    obj = yaml.safe_load(text)
    assert (obj["apiVersion"], obj["kind"]) == (API_VERSION, KIND)
    assert parse(obj["metadata"]["name"], obj["spec"]).spec.model.name
    assert "create namespace llm" in notes


def test_another_installation_may_write_templates_only_when_it_is_named(helm: Helm) -> None:
    beside = "system:serviceaccount:llm:team-operator"

    def trusted(*options: str) -> list[str]:
        policies = [obj for obj in helm.template(*options) if obj["kind"] == "ValidatingAdmissionPolicy"]
        [templates] = [obj for obj in policies if obj["metadata"]["name"].endswith("-pod-templates")]
        [users] = [one["expression"] for one in templates["spec"]["variables"] if one["name"] == "operators"]
        return yaml.safe_load(users)  # type: ignore[no-any-return]

    own = f"system:serviceaccount:{NAME}:{NAME}"
    assert trusted() == [own]
    assert trusted("--set", f"admission.operators={{{beside}}}") == [own, beside]
