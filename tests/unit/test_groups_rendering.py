"""StatefulSets, Services and command lines of groups, the router, and what is pinned of them."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.errors import SpecError
from securevllm.render import Observed, Rendered, accepted, render
from securevllm.render.accepted import GroupMemory
from securevllm.render.meta import Object, Owner

NAME = "a" * 40
OWNER = Owner("llama", "apps", "uid-1")
KEY = b"seal"
NODES: dict[str, Any] = {"parallelism": {"tensor": 8, "pipeline": 2, "nodes": 2}}
SPLIT: dict[str, Any] = {"disaggregation": {"connector": "nixl", "router": {"image": "vllm/vllm-router:v0.1.17"}}}


def made(owner: Owner = OWNER, observed: Observed | None = None, **spec: Any) -> Rendered:
    whole = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0", **spec}
    return render(owner, parse(owner.name, whole), Context(), observed or Observed(seal_key=KEY))


def named(found: Rendered, name: str) -> Object:
    return next(
        obj for obj in found.objects() if obj["metadata"]["name"] == f"llama-{name}" and "template" in _spec(obj)
    )


def _spec(obj: Object) -> dict[str, Any]:
    spec: dict[str, Any] = obj.get("spec", {})
    return spec


def container(workload: Object) -> dict[str, Any]:
    found: dict[str, Any] = workload["spec"]["template"]["spec"]["containers"][0]
    return found


def args(found: Rendered, name: str) -> list[str]:
    listed: list[str] = container(named(found, name))["args"]
    return listed


def labels(workload: Object) -> dict[str, str]:
    found: dict[str, str] = workload["spec"]["template"]["metadata"]["labels"]
    return found


def test_a_member_is_a_stateful_set_of_one_pod_that_nothing_rolls() -> None:
    found = made(**NODES, replicas=2)
    assert [obj["metadata"]["name"] for group in found.groups for obj in group.workloads] == [
        "llama-e0-0",
        "llama-e0-1",
        "llama-e1-0",
        "llama-e1-1",
    ]
    spec = named(found, "e1-1")["spec"]
    assert (spec["replicas"], spec["serviceName"], spec["podManagementPolicy"]) == (1, "llama-e1", "Parallel")
    assert spec["updateStrategy"] == {"type": "OnDelete"}
    assert spec["selector"]["matchLabels"].items() <= labels(named(found, "e1-1")).items()
    assert not spec["selector"]["matchLabels"].items() <= labels(named(found, "e1-0")).items()


def test_the_head_binds_its_own_address_and_the_others_name_it_with_a_dot_at_the_end() -> None:
    found = made(**NODES)
    assert "--master-addr=$(POD_IP)" in args(found, "e0-0")
    assert "--master-addr=llama-e0-0-0.llama-e0.apps.svc.cluster.local." in args(found, "e0-1")


def test_a_headless_pod_has_neither_port_nor_probe() -> None:
    found = container(named(made(**NODES), "e0-1"))
    assert "--headless" in found["args"]
    assert not any(argument.startswith(("--host", "--port", "--api-server-count")) for argument in found["args"])
    assert not {"ports", "startupProbe", "readinessProbe", "livenessProbe"} & found.keys()


def test_peers_are_waited_for_as_long_as_a_start_may_take() -> None:
    found = made(**NODES, engine={"startupTimeout": "90m"})
    assert "--distributed-timeout-seconds=5400" in args(found, "e0-1")
    variables = {item["name"]: item.get("value") for item in container(named(found, "e0-0"))["env"]}
    assert variables["VLLM_ENGINE_READY_TIMEOUT_S"] == "5400"


def test_an_old_version_is_not_told_what_it_does_not_know() -> None:
    found = made(
        **NODES,
        image="vllm/vllm-openai:v0.12.0",
        security={"accept": [{"risk": "vllmVersionBelowFloor", "why": "a test of old versions"}]},
    )
    assert not any(argument.startswith("--distributed-timeout") for argument in args(found, "e0-0"))


@pytest.mark.parametrize(
    ("balancing", "local", "head", "other"),
    [
        ("internal", 2, ["--api-server-count=4"], ["--headless", "--data-parallel-start-rank=2"]),
        (
            "hybrid",
            2,
            ["--api-server-count=2", "--data-parallel-start-rank=0", "--data-parallel-hybrid-lb"],
            ["--api-server-count=2", "--data-parallel-start-rank=2", "--data-parallel-hybrid-lb"],
        ),
        (
            "external",
            1,
            ["--api-server-count=1", "--data-parallel-rank=0", "--data-parallel-external-lb"],
            ["--api-server-count=1", "--data-parallel-rank=1", "--data-parallel-external-lb"],
        ),
    ],
)
def test_data_parallel(balancing: str, local: int, head: list[str], other: list[str]) -> None:
    data = {"size": 4, "sizeLocal": local, "loadBalancing": balancing}
    found = made(parallelism={"expert": True, "data": data}, ports={"dataParallelRpc": 13345})
    first, second = args(found, "e0-0"), args(found, "e0-1")
    assert set(head) <= set(first)
    assert set(other) <= set(second)
    assert "--data-parallel-address=$(POD_IP)" in first
    assert "--data-parallel-address=llama-e0-0-0.llama-e0.apps.svc.cluster.local." in second
    assert {"--data-parallel-size=4", "--data-parallel-rpc-port=13345", "--enable-expert-parallel"} <= {*first} & {
        *second
    }
    if balancing == "internal":
        # On a pod with HTTP it would switch to hybrid.
        assert not any(argument.startswith("--data-parallel-start-rank") for argument in first)


def test_api_servers_are_bounded() -> None:
    found = made(parallelism={"data": {"size": 64, "sizeLocal": 8}})
    assert "--api-server-count=8" in args(found, "e0-0")


def test_every_flag_of_ours_is_one_that_a_user_may_not_set() -> None:
    spec: dict[str, Any] = {"security": {"kvEvents": {"from": {"podSelector": {}}, "why": "an index of the test"}}}
    topologies = [
        NODES,
        {"parallelism": {"expert": True, "data": {"size": 2, "sizeLocal": 1, "loadBalancing": "external"}}},
        {"parallelism": {"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}}},
        SPLIT,
    ]
    for topology in topologies:
        for group in made(**topology, **spec).groups:
            for workload in group.workloads:
                flags = {item.partition("=")[0] for item in container(workload)["args"] if item.startswith("--")}
                assert flags <= catalogue.flags().owned.keys()


def test_the_pair_is_that_of_the_group_and_an_epoch_is_no_other_template() -> None:
    before = made(**NODES, replicas=2)
    remembered = {"e1": GroupMemory(3)}
    after = made(OWNER, Observed(seal_key=KEY, groups=remembered), **NODES, replicas=2)
    assert [group.epoch for group in after.groups] == [0, 3]
    assert {group.template for group in before.groups} == {group.template for group in after.groups}
    for group in after.groups:
        for workload in group.workloads:
            pair = (labels(workload)["securevllm.io/template"], labels(workload)["securevllm.io/epoch"])
            assert pair == (group.template, str(group.epoch))
    kept = accepted.read(OWNER, after.configuration[0]["data"], KEY)
    assert kept is not None
    assert kept.groups == remembered


def test_what_is_remembered_of_groups_is_under_the_seal() -> None:
    found = made(OWNER, Observed(seal_key=KEY, groups={"e0": GroupMemory(3)}), **NODES)
    data: dict[str, str] = found.configuration[0]["data"]
    assert accepted.read(OWNER, data, KEY) is not None
    changed = data["groups.json"].replace("3", "4")
    assert accepted.read(OWNER, {**data, "groups.json": changed}, KEY) is None
    assert accepted.read(OWNER, {name: text for name, text in data.items() if name != "groups.json"}, KEY) is None


def test_an_upgrade_restarts_no_group() -> None:
    """I11: a pinned template is filled in for every group, and a newer rendering is only told."""
    fresh = made(**NODES, replicas=2)
    kept = accepted.read(OWNER, fresh.configuration[0]["data"], KEY)
    assert kept is not None
    older = json.loads(json.dumps(kept.pins["engine/2x1/others"].template))
    older["spec"]["containers"][0]["args"].append("--of-an-older-release")
    pins = {**kept.pins, "engine/2x1/others": accepted.Pin(kept.pins["engine/2x1/others"].inputs, older)}
    found = made(OWNER, Observed(seal_key=KEY, pins=pins), **NODES, replicas=2)
    assert found.outdated == ("engine",)
    assert args(found, "e1-1")[-1] == "--of-an-older-release"
    assert "--master-addr=llama-e1-0-0.llama-e1.apps.svc.cluster.local." in args(found, "e1-1")


def test_pins_of_another_shape_are_not_used() -> None:
    """Not even while a new model is awaited: the old templates say another number of pods."""
    hub = {"name": "a/b", "source": {"huggingFace": {"storage": {"accessModes": ["ReadWriteMany"]}}}}
    kept = accepted.read(OWNER, made(parallelism={"tensor": 16}).configuration[0]["data"], KEY)
    assert kept is not None
    found = made(OWNER, Observed(seal_key=KEY, pins=kept.pins), **NODES, model=hub)
    assert found.groups == ()
    assert [obj["metadata"]["name"] for obj in found.withheld] == ["llama-e0-0", "llama-e0-1"]


def test_no_mark_is_left() -> None:
    found = made(**SPLIT, engine={"labels": {"team": "red"}})
    assert "$[" not in json.dumps([group.workloads for group in found.groups])


@pytest.mark.parametrize(
    "spec",
    [
        {"parallelism": {"tensor": 2, "nodes": 2}, "replicas": 512},
        {"parallelism": {"tensor": 64, "nodes": 64}, "replicas": 1},
    ],
)
def test_what_is_kept_fits_into_a_config_map(spec: dict[str, Any]) -> None:
    engine = {"args": ["--max-model-len=8192"]}
    names = [f"e{number}" for number in range(spec["replicas"])]
    members = ("00000000-0000-0000-0000-000000000000",) * spec["parallelism"]["nodes"]
    memory = {name: GroupMemory(99, 1767323045, 9, members, "w" * 120) for name in names}
    found = made(Owner(NAME, "apps", "uid-1"), Observed(seal_key=KEY, groups=memory), **spec, engine=engine)
    size = sum(len(text) for text in found.configuration[0]["data"].values())
    assert size < 400_000, "the limit of etcd is 1 MiB"
    assert max(len(obj["metadata"]["name"]) for group in found.groups for obj in group.workloads) <= 52


def test_one_pod_of_a_replica_is_counted() -> None:
    found = made(parallelism={"data": {"size": 4, "sizeLocal": 2, "loadBalancing": "hybrid"}})
    wanted = dict(pair.split("=") for pair in found.selector.split(","))
    counted = [wanted.items() <= labels(workload).items() for group in found.groups for workload in group.workloads]
    assert counted == [True, False]
    assert wanted.items() <= labels(named(made(**SPLIT), "p0-0")).items()
    assert not wanted.items() <= labels(named(made(**SPLIT), "router")).items()


def test_nixl() -> None:
    found = made(**SPLIT, ports={"nixlSideChannel": 5700})
    for name, role in (("p0-0", "kv_producer"), ("d0-0", "kv_consumer")):
        (config,) = (item.partition("=")[2] for item in args(found, name) if item.startswith("--kv-transfer-config"))
        assert json.loads(config) == {
            "kv_connector": "NixlConnector",
            "kv_role": role,
            "kv_load_failure_policy": "fail",
        }
        variables = {item["name"]: item for item in container(named(found, name))["env"]}
        assert variables["VLLM_NIXL_SIDE_CHANNEL_HOST"]["valueFrom"] == {"fieldRef": {"fieldPath": "status.podIP"}}
        assert variables["VLLM_NIXL_SIDE_CHANNEL_PORT"]["value"] == "5700"
        assert variables["UCX_NET_DEVICES"]["value"] == "eth0"


def test_mooncake_uses_tcp_and_the_router_knows_the_bootstrap_port() -> None:
    split = {**SPLIT["disaggregation"], "connector": "mooncake"}
    found = made(disaggregation=split, ports={"mooncakeBootstrap": 8999})
    (config,) = (item.partition("=")[2] for item in args(found, "p0-0") if item.startswith("--kv-transfer-config"))
    assert json.loads(config)["kv_connector_extra_config"] == {"mooncake_protocol": "tcp"}
    assert ("http://llama-p0-0-0.llama-p0.apps.svc.cluster.local.:8000", "8999") in pairwise(args(found, "router"))


def test_a_side_that_is_scaled_rolls_the_router_and_no_engine() -> None:
    before, after = made(**SPLIT), made(disaggregation={**SPLIT["disaggregation"], "decode": {"replicas": 2}})
    assert "--decode=http://llama-d1-0-0.llama-d1.apps.svc.cluster.local.:8000" in args(after, "router")
    assert named(before, "router") != named(after, "router")
    assert named(before, "d0-0") == named(after, "d0-0")
    assert named(before, "p0-0") == named(after, "p0-0")


def test_no_router_runs_beside_a_side_without_replicas() -> None:
    found = made(disaggregation={**SPLIT["disaggregation"], "prefill": {"replicas": 0}})
    assert named(found, "router")["spec"]["replicas"] == 0


def test_the_router_keeps_its_metrics_to_itself_and_takes_the_engines_key_from_its_secret() -> None:
    found = made(**SPLIT)
    assert "--prometheus-host=127.0.0.1" in args(found, "router")
    assert "--host=$(POD_IP)" in args(found, "router")
    keys = [item for item in container(named(found, "router"))["env"] if item["name"] == "OPENAI_API_KEY"]
    assert keys[0]["valueFrom"]["secretKeyRef"]["name"] == "llama-engine-key"
    assert found.gateway_files["cds.yaml"].count("llama-router.apps.svc.cluster.local") == 1


@pytest.mark.parametrize(
    ("argument", "word"),
    [
        ("--host=0.0.0.0", "the operator sets this flag"),
        ("--prometheus-host=0.0.0.0", "the operator sets this flag"),
        ("--wasm-middleware=/tmp/x", "exact names"),
        ("--service-discovery", "exact names"),
        ("--polic=random", "exact names"),
        ("--policy=mine", "not one of the values"),
        ("--policy", "needs a value"),
        ("--disable-retries=1", "takes no value"),
        ("--queue-size=many", "kind int"),
    ],
)
def test_arguments_of_the_router_are_judged(argument: str, word: str) -> None:
    router = {**SPLIT["disaggregation"]["router"], "args": [argument]}
    with pytest.raises(SpecError, match=word) as error:
        made(disaggregation={**SPLIT["disaggregation"], "router": router})
    assert [item.field for item in error.value.problems] == ["spec.disaggregation.router.args[0]"]


def test_an_argument_of_the_router_stands_once_and_before_ours() -> None:
    router = {**SPLIT["disaggregation"]["router"], "args": ["--policy=random", "--disable-retries"]}
    found = made(disaggregation={**SPLIT["disaggregation"], "router": router})
    assert args(found, "router")[:3] == ["--policy=random", "--disable-retries", "--vllm-pd-disaggregation"]
    router["args"].append("--policy=random")
    with pytest.raises(SpecError, match="only once"):
        made(disaggregation={**SPLIT["disaggregation"], "router": router})
