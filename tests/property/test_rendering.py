"""What holds for the objects of every valid spec."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from ipaddress import ip_network
from typing import Any

from hypothesis import given, reject
from hypothesis import strategies as st

from securevllm.api.parse import parse
from securevllm.errors import SpecError
from securevllm.render import Observed, Rendered, accepted, render
from securevllm.render.meta import Object, Owner
from securevllm.topology import VLLM
from tests import pod_security
from tests.kubernetes_models import validate_strict
from tests.property import strategies
from tests.property.world import CONTEXT

LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
KEY = b"seal"
names = st.sampled_from(strategies.NAMES)


def made(raw: dict[str, Any], name: str = "llama", **observed: Any) -> Rendered:
    return render(Owner(name, "apps", "uid-1"), parse(name, raw), CONTEXT, Observed(seal_key=KEY, **observed))


def all_objects(found: Rendered) -> list[Object]:
    return [*found.objects(), *found.withheld, *(item.object for item in found.generated)]


def workloads(found: Rendered) -> list[Object]:
    return [*found.workloads, *found.withheld]


@given(raw=strategies.specs(), name=names)
def test_objects_are_kubernetes_objects_with_names_of_their_own(raw: dict[str, Any], name: str) -> None:
    objects = all_objects(made(raw, name))
    for obj in objects:
        validate_strict(obj)
        assert LABEL.fullmatch(obj["metadata"]["name"]), obj["metadata"]["name"]
    addresses = [(obj["kind"], obj["metadata"]["name"]) for obj in objects]
    assert len(set(addresses)) == len(addresses)


@given(raw=strategies.specs())
def test_pods_are_restricted_and_have_no_token(raw: dict[str, Any]) -> None:
    found = made(raw)
    accounts = {obj["metadata"]["name"] for obj in found.configuration if obj["kind"] == "ServiceAccount"}
    for workload in workloads(found):
        template = workload["spec"]["template"]
        assert pod_security.violations(template) == []
        assert template["spec"]["automountServiceAccountToken"] is False
        assert template["spec"]["serviceAccountName"] in accounts


@given(raw=strategies.specs(), name=names)
def test_selectors_match_the_pods_they_are_for(raw: dict[str, Any], name: str) -> None:
    found = made(raw, name)
    templates = [workload["spec"]["template"] for workload in workloads(found)]
    for obj in all_objects(found):
        for selector in _selectors(obj):
            assert selector, obj["kind"]
            selected = [item for item in templates if selector.items() <= item["metadata"]["labels"].items()]
            # A side without replicas has policies and no pods.
            assert selected or not _replicas(found, obj), obj["metadata"]["name"]
            if obj["kind"] in {"Deployment", "StatefulSet"}:
                assert selected == [obj["spec"]["template"]], "no workload selects the pods of another"
            if obj["kind"] == "Service":
                _assert_listening(obj, selected)


def _replicas(found: Rendered, obj: Object) -> bool:
    """Whether there are pods of the role or group that an object is named after."""
    component = obj["metadata"]["labels"]["app.kubernetes.io/component"]
    role = "engine" if obj["kind"] == "Service" and component == "engine" else component
    return any(item.role == role and item.replicas for item in found.topology.pods)


def _assert_listening(service: Object, selected: list[Object]) -> None:
    wanted = {port["targetPort"] for port in service["spec"]["ports"]}
    listening = [
        {port["containerPort"] for container in item["spec"]["containers"] for port in container.get("ports", ())}
        for item in selected
    ]
    if service["spec"].get("publishNotReadyAddresses"):
        assert wanted <= listening[0], "the head has HTTP"
    else:
        assert all(wanted <= ports for ports in listening), "requests go to pods that have HTTP only"


def _selectors(obj: Object) -> Iterator[dict[str, str]]:
    spec = obj.get("spec", {})
    match obj["kind"]:
        case "Deployment" | "StatefulSet" | "PodDisruptionBudget":
            yield spec["selector"]["matchLabels"]
        case "NetworkPolicy" if "matchLabels" in spec["podSelector"]:  # not the namespace's default-deny
            yield spec["podSelector"]["matchLabels"]
        case "Service":
            yield spec["selector"]


@given(raw=strategies.specs(), name=names)
def test_rendering_is_repeatable_json(raw: dict[str, Any], name: str) -> None:
    first, second = made(raw, name), made(json.loads(json.dumps(raw)), name)
    assert first == second
    # What comes back from the API server is compared with what is rendered: a tuple would never be equal to its list.
    assert json.loads(json.dumps(all_objects(first))) == all_objects(first)


@given(raw=strategies.specs())
def test_addresses_are_the_declared_ones_and_never_the_clusters(raw: dict[str, Any]) -> None:
    found = made(raw)
    declared = {cidr for entry in raw.get("security", {}).get("egress", ()) for cidr in entry["to"].get("cidrs", ())}
    clients = set((raw.get("gateway", {}).get("clients") or {}).get("cidrs", ()))
    events = (raw.get("security", {}).get("kvEvents") or {}).get("from", {})
    scrapers = set((raw.get("security", {}).get("metrics") or {}).get("from", {}).get("cidrs", ()))
    allowed = {role.value: declared | scrapers | {*events.get("cidrs", ())} for role in VLLM}
    allowed |= {"gateway": clients | scrapers, "fetch": {"0.0.0.0/0", "::/0"}, "router": set()}
    for policy in found.isolation:
        role = policy["spec"]["podSelector"]["matchLabels"].get("securevllm.io/role")
        for block in _blocks(policy["spec"]):
            assert role is not None, "a group's own policy names its pods only"
            assert block["cidr"] in allowed[role]
            outer, inner = ip_network(block["cidr"]), [ip_network(text) for text in block.get("except", ())]
            for text in CONTEXT.cluster_ranges:
                own = ip_network(text)
                covered = any(own.version == hole.version and own.subnet_of(hole) for hole in inner)  # type: ignore[arg-type]
                assert covered or not outer.overlaps(own)


def _blocks(node: Any) -> Iterator[dict[str, Any]]:
    if isinstance(node, dict):
        if "ipBlock" in node:
            yield node["ipBlock"]
        for value in node.values():
            yield from _blocks(value)
    elif isinstance(node, list):
        for item in node:
            yield from _blocks(item)


@given(raw=strategies.specs())
def test_suspending_scales_and_keeps_the_policies(raw: dict[str, Any]) -> None:
    awake, asleep = made({**raw, "suspend": False}), made({**raw, "suspend": True})
    assert [item["spec"] for item in asleep.isolation] == [item["spec"] for item in awake.isolation]
    assert {w["spec"]["replicas"] for w in workloads(asleep) if w["kind"] == "Deployment"} == {0}


@given(raw=strategies.specs(), name=names)
def test_what_was_accepted_is_read_back(raw: dict[str, Any], name: str) -> None:
    owner = Owner(name, "apps", "uid-1")
    kept = accepted.read(owner, made(raw, name).configuration[0]["data"], KEY)
    assert kept is not None
    assert kept.spec == raw
    assert made(kept.spec, name, pins=kept.pins) == made(raw, name)


@given(before=strategies.specs(), after=strategies.specs(), data=st.data())
def test_a_change_of_the_spec_never_leaves_an_old_template(
    before: dict[str, Any], after: dict[str, Any], data: st.DataObject
) -> None:
    """I11: what a template depends on is all in its `inputs`; "outdated" only ever speaks of another operator."""
    section = data.draw(st.sampled_from(sorted({*before, *after} - {"image", "vllmVersion"})))
    changed = {key: value for key, value in before.items() if key != section}
    if section in after:
        changed[section] = after[section]
    kept = accepted.read(Owner("llama", "apps", "uid-1"), made(before).configuration[0]["data"], KEY)
    assert kept is not None
    try:
        found = made({**changed, "updatePolicy": "WithSpec"}, pins=kept.pins)
    except SpecError:
        reject()  # the two do not go together, for example disaggregation beside parallelism
    assert found.outdated == ()
