"""I1: what the rendered policies allow is what the topology's flows say, seen by an evaluator that knows neither.

Every pair of pods and outsiders, both directions, every port, TCP and UDP, and both ways in which network engines read
an ipBlock. Then the same question about policies with one deliberate mistake: each has to be noticed.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from securevllm.context import Context  # noqa: TC001 - hypothesis looks at the annotations of a test
from tests.netpol import CALICO, CILIUM, Engine, Evaluator, Pod
from tests.property import strategies
from tests.property.world import CONTEXT, NAMESPACES, PUBLIC_CONTEXT, World, differences, rendered, world

SMALL = {"model": {"name": "/models/other"}, "image": "vllm/vllm-openai:v0.33.0"}


def make(name: str, raw: dict[str, Any], context: Context) -> World:
    """The resource, another one beside it, and one of the same name in another namespace."""
    return world(
        [
            rendered(name, "apps", "uid-1", raw, context),
            rendered("gemma", "apps", "uid-2", SMALL, context),
            rendered(name, "other", "uid-3", raw, context),
        ],
        context,
    )


@pytest.mark.parametrize("engine", [CALICO, CILIUM], ids=["ipBlock selects pods", "ipBlock selects no pods"])
@given(
    raw=strategies.specs(),
    name=st.sampled_from(strategies.NAMES),
    context=st.sampled_from([CONTEXT, PUBLIC_CONTEXT]),
)
def test_policies_say_what_flows_say(raw: dict[str, Any], name: str, context: Context, engine: Engine) -> None:
    assert [*differences(make(name, raw, context), engine)] == []


# ----------------------------------------------------------------------------------------------------------- mutants

RICH: dict[str, Any] = {
    "model": {"name": "a/b", "source": {"huggingFace": {"storage": {"accessModes": ["ReadWriteMany"]}}}},
    "image": "vllm/vllm-openai:v0.33.0",
    "gateway": {
        "clients": {
            "namespaceSelector": {"matchLabels": {"team": "blue"}},
            "podSelector": {"matchExpressions": [{"key": "app", "operator": "In", "values": ["web"]}]},
            "cidrs": ["1.1.0.0/16", "192.0.2.0/25"],
        }
    },
    "security": {
        "egress": [
            {
                "to": {"podSelector": {"matchLabels": {"app": "batch"}}, "cidrs": ["0.0.0.0/0", "::/0"]},
                "ports": [{"port": 5432}, {"port": 4433, "protocol": "UDP"}],
                "why": "a database beside it",
            }
        ]
    },
}
EVENTS = {"from": {"podSelector": {"matchLabels": {"app": "web"}}}, "why": "a router that follows the cache"}
NODES: dict[str, Any] = {
    **SMALL,
    "replicas": 2,
    "parallelism": {"tensor": 2, "nodes": 2},
    "security": {"egress": [{"to": {"podSelector": {}}, "ports": [{"port": 5432}], "why": "a database beside it"}]},
}
HYBRID: dict[str, Any] = {
    **SMALL,
    "replicas": 2,
    "parallelism": {"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}},
    "security": {"kvEvents": EVENTS},
}
SPLIT: dict[str, Any] = {
    **SMALL,
    "disaggregation": {
        "connector": "mooncake",
        "router": {"image": "vllm/vllm-router:v0.1.17"},
        "prefill": {"replicas": 2, "parallelism": {"tensor": 2, "nodes": 2}},
        "decode": {"replicas": 2},
    },
}
SCRAPED: dict[str, Any] = {
    **NODES,
    "security": {
        **NODES["security"],
        "metrics": {
            "from": {
                "namespaceSelector": {"matchLabels": {"team": "blue"}},
                "podSelector": {"matchLabels": {"app": "web"}},
                "cidrs": ["192.0.2.0/25"],
            }
        },
    },
}
MUTATED = {"one pod": RICH, "nodes": NODES, "hybrid": HYBRID, "prefill and decode": SPLIT, "metrics": SCRAPED}
Mutant = tuple[str, list[dict[str, Any]]]


def mutants(policies: list[dict[str, Any]]) -> Iterator[Mutant]:
    """Every policy of the first resource and the default-deny, with one mistake each."""
    for index, policy in enumerate(policies):
        name = policy["metadata"]["name"]
        yield f"{name}: missing", policies[:index] + policies[index + 1 :]
        for told, changed in _changed(policy):
            yield f"{name}: {told}", [*policies[:index], changed, *policies[index + 1 :]]


def _changed(policy: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    spec = policy["spec"]
    for direction in ("Ingress", "Egress"):
        # A policy without rules for a direction only repeats the default-deny there: leaving it out changes nothing.
        if spec.get(direction.lower()) or policy["metadata"]["name"] == "securevllm-default-deny":
            yield (
                f"policyTypes without {direction}",
                _edit(policy, ("policyTypes",), lambda t, d=direction: t.remove(d)),
            )
    for key in spec["podSelector"].get("matchLabels", {}):
        path = ("podSelector", "matchLabels")
        yield f"podSelector without {key}", _edit(policy, path, lambda labels, key=key: labels.pop(key))
        yield f"podSelector other {key}", _edit(policy, path, lambda labels, key=key: labels.update({key: "x"}))
    for section, peers in (("ingress", "from"), ("egress", "to")):
        for index, rule in enumerate(spec.get(section, ())):
            where = f"{section}[{index}]"
            yield f"{where} missing", _edit(policy, (section,), lambda rules, i=index: rules.pop(i))
            yield f"{where} for everybody", _edit(policy, (section, index), lambda r, p=peers: r.pop(p))
            yield f"{where} on every port", _edit(policy, (section, index), lambda r: r.pop("ports"))
            yield from _changed_ports(policy, (section, index, "ports"), rule["ports"])
            for number, peer in enumerate(rule[peers]):
                here = (section, index, peers, number)
                yield from _changed_peer(policy, here, peer, alone=len(rule[peers]) == 1)


def _changed_ports(
    policy: dict[str, Any], path: tuple[Any, ...], ports: list[Any]
) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, port in enumerate(ports):
        other = "UDP" if port["protocol"] == "TCP" else "TCP"
        here = (*path, number)
        yield f"{here} missing", _edit(policy, path, lambda items, n=number: items.pop(n))
        yield f"{here} {other}", _edit(policy, here, lambda item, o=other: item.update(protocol=o))
        if "port" not in port:
            yield f"{here} one port", _edit(policy, here, lambda item: item.update(port=29501))
            continue
        last = port.get("endPort", port["port"])
        yield f"{here} next port", _edit(policy, here, lambda item, p=port: item.update(port=p["port"] + 1))
        yield f"{here} a longer range", _edit(policy, here, lambda item, e=last: item.update(endPort=e + 1))
        if "endPort" in port:
            yield f"{here} no range", _edit(policy, here, lambda item: item.pop("endPort"))


def _changed_peer(
    policy: dict[str, Any], path: tuple[Any, ...], peer: dict[str, Any], *, alone: bool
) -> Iterator[tuple[str, dict[str, Any]]]:
    if not alone:
        yield f"{path} missing", _edit(policy, path[:-1], lambda peers: peers.pop(path[-1]))
    if "ipBlock" in peer:
        yield f"{path} narrower", _edit(policy, (*path, "ipBlock"), _narrow)
        for number, cidr in enumerate(peer["ipBlock"].get("except", ())):
            yield f"{path} with {cidr}", _edit(policy, (*path, "ipBlock", "except"), lambda e, n=number: e.pop(n))
        return
    for selector, labels_of in peer.items():
        if len(peer) > 1:
            yield f"{path} without {selector}", _edit(policy, path, lambda item, s=selector: item.pop(s))
        for key in labels_of.get("matchLabels", {}):
            here = (*path, selector, "matchLabels")
            yield f"{here} without {key}", _edit(policy, here, lambda labels, k=key: labels.pop(k))
            yield f"{here} other {key}", _edit(policy, here, lambda labels, k=key: labels.update({k: "x"}))
        if labels_of.get("matchExpressions"):
            here = (*path, selector, "matchExpressions")
            yield f"{here} missing", _edit(policy, here, lambda items: items.pop(0))
            yield f"{here} turned", _edit(policy, (*here, 0), lambda item: item.update(operator="NotIn"))
    yield f"{path} everywhere", _edit(policy, path, lambda item: item.update(namespaceSelector={}))


def _narrow(block: dict[str, Any]) -> None:
    block.pop("except", None)
    block["cidr"] = "9.9.9.9/32"


def _edit(policy: dict[str, Any], path: tuple[Any, ...], change: Any) -> dict[str, Any]:
    changed = copy.deepcopy(policy)
    node = changed["spec"]
    for part in path:
        node = node[part]
    change(node)
    return changed


@pytest.fixture(scope="module", params=MUTATED)
def rich(request: pytest.FixtureRequest) -> World:
    return make("llama", MUTATED[request.param], PUBLIC_CONTEXT)


def test_without_a_mistake_nothing_is_noticed(rich: World) -> None:
    for engine in (CILIUM, CALICO):
        assert [*differences(rich, engine, ("both", "Ingress", "Egress"))] == []


def _noticed(made: World) -> bool:
    return any(next(differences(made, engine), None) is not None for engine in (CALICO, CILIUM))


def test_every_mistake_is_noticed(rich: World) -> None:
    first = [p for p in rich.policies if p["metadata"]["namespace"] == "apps" and "gemma" not in p["metadata"]["name"]]
    others = [p for p in rich.policies if p not in first]
    table = list(mutants(first))
    assert len(table) > 100
    assert [told for told, made in table if not _noticed(replace(rich, policies=(*made, *others)))] == []


def test_scrapers_reach_the_metrics_of_heads_and_nothing_else() -> None:
    """Said in numbers, besides the comparison with the flows, which would follow a mistake in the plan."""
    made = make("llama", SCRAPED, CONTEXT)
    evaluator = Evaluator(made.policies, made.pods(), NAMESPACES, engine=CALICO)
    pods = [item for item in made.outsiders if isinstance(item, Pod)]
    scraper = next(pod for pod in pods if pod.namespace == "other" and pod.labels.get("app") == "web")
    mine = [one for one in made.members if one.topology and (one.owner.name, one.owner.namespace) == ("llama", "apps")]
    opened = {(one.role.value, evaluator.open_ports(scraper, one.pod, "TCP")) for one in mine}
    assert opened == {("gateway", ((9903, 9903),)), ("engine", ((9464, 9464),)), ("engine-worker", ())}
    for pod in pods:
        for one in mine:
            assert evaluator.open_ports(pod, one.pod, "UDP") == ()
            if pod is not scraper and one.role.value == "engine":
                assert evaluator.open_ports(pod, one.pod, "TCP") == ()
