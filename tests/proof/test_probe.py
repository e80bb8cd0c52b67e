"""`securevllm probe` against an API in memory: its pods are sockets of this machine, and its prober is the real one.

Addresses of pods are loopback addresses. An engine on which nothing listens refuses, as one behind a policy of
kube-router does.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Mapping
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any, Self

import pytest

from securevllm import probe as edge
from securevllm.api import kinds
from securevllm.api.kinds import KubeObject, Ref
from securevllm.api.parse import parse
from securevllm.cluster import Listing
from securevllm.errors import Forbidden, NotFound, OperatorError
from securevllm.probe import Wanted, probe
from securevllm.proof import canary as program
from securevllm.proof.dial import Listener, accepting, dial
from securevllm.proof.report import Report
from securevllm.proof.verdict import Proof
from securevllm.proof.wire import CANARY_VARIABLE, Reach, dump_answers, load_canary
from securevllm.render import canary
from securevllm.render.meta import Owner

OWNER = Owner("llama", "llm", "11111111-1111-1111-1111-111111111111")
SPEC: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}


Names = list[str]
Pods = list[KubeObject]


def net(number: int) -> str:
    """An address of this test process; other workers have other ones."""
    return f"127.{100 + os.getpid() % 100}.{os.getpid() // 100 % 250}.{number}"


class World:
    """A cluster in memory: what `securevllm probe` asks of it."""

    def __init__(self, *, engines: int = 1, nodes: int = 1, spec: Mapping[str, Any] | None = None) -> None:
        self.objects: dict[Ref, KubeObject] = {}
        self.denied: set[tuple[str, str]] = set()
        self.refuses: Callable[[KubeObject], bool] = lambda _: False
        """Which pods a quota forbids."""
        self.unreadable: set[str] = set()
        """Names of objects that may not be read."""
        self.unable: set[str] = set()
        """Addresses to which canary pods could not even try to connect."""
        self.deaf: set[str] = set()
        """Namespaces whose pods reach nothing: a default-deny of a tenant."""
        self.open: set[str] = set()
        """Namespaces from which engines can be reached."""
        self.made: Pods = []
        self.deleted: list[str] = []
        self.stuck = False
        self._stack = AsyncExitStack()
        self._next = 100
        self.add(self.resource(dict(spec or SPEC)))
        for number in range(engines):
            self.add(self.engine(number, f"n{number % nodes + 1}"))

    @staticmethod
    def resource(spec: dict[str, Any], **status: Any) -> KubeObject:
        kind = kinds.SECURE_VLLM_DEPLOYMENT
        metadata = {"name": OWNER.name, "namespace": OWNER.namespace, "uid": OWNER.uid, "generation": 1}
        return {
            "apiVersion": kind.api_version, "kind": kind.kind, "metadata": metadata, "spec": spec, "status": status
        }  # fmt: skip

    @staticmethod
    def engine(number: int, node: str = "n1") -> KubeObject:
        return {
            "apiVersion": "v1",
            "kind": "Pod",
            "metadata": {
                "name": f"llama-engine-{number}",
                "namespace": OWNER.namespace,
                "uid": f"pod-{number}",
                "labels": OWNER.pod_labels("engine"),
            },
            "spec": {"nodeName": node, "initContainers": [{"name": "gate", "image": "mirror.example/operator:1"}]},
            "status": {
                "podIPs": [{"ip": net(number + 1)}],
                "conditions": [{"type": "Ready", "status": "True"}],
            },
        }

    def add(self, obj: KubeObject) -> None:
        self.objects[Ref.of(obj)] = obj

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    # ------------------------------------------------------------------------------------------- the Kubernetes API

    async def get(self, ref: Ref) -> KubeObject:
        if ref.name in self.unreadable:
            raise Forbidden(f"get {ref}: 403 forbidden", status=403)
        if ref not in self.objects:
            raise NotFound(f"get {ref}: 404 not found", status=404)
        return self.objects[ref]

    async def list(self, kind: kinds.Kind, namespace: str | None = None, label_selector: str | None = None) -> Listing:
        wanted = dict([label_selector.split("=", 1)]) if label_selector else {}
        found = [
            obj
            for ref, obj in self.objects.items()
            if ref.kind == kind
            and namespace in {None, ref.namespace}
            and wanted.items() <= obj["metadata"].get("labels", {}).items()
        ]
        return Listing(found, 1)

    async def allowed(self, verb: str, kind: kinds.Kind, namespace: str | None) -> bool:
        assert kind is kinds.POD
        return (namespace, verb) not in self.denied

    async def create(self, obj: KubeObject) -> KubeObject:
        if self.refuses(obj):
            raise Forbidden("create Pod: 403 exceeded quota: full", status=403)
        await asyncio.sleep(0.01)
        name, namespace = obj["metadata"]["name"], obj["metadata"]["namespace"]
        made = obj | {
            "metadata": obj["metadata"] | {"uid": f"uid-{name}", "creationTimestamp": datetime.now(UTC).isoformat()},
            "status": {},
        }
        self.made.append(made)
        self.add(made)
        if not self.stuck:
            await self._run(made, namespace)
        return made

    async def _run(self, pod: KubeObject, namespace: str) -> None:
        container = pod["spec"]["containers"][0]
        config = load_canary(next(item["value"] for item in container["env"] if item["name"] == CANARY_VARIABLE))
        if config.listen:
            self._next += 1
            address = net(self._next)
            for port in config.listen:
                await self._stack.enter_async_context(Listener((accepting(address, port),)))
            ready = [{"type": "Ready", "status": "True"}]
            pod["status"] |= {
                "podIP": address,
                "podIPs": [{"ip": address}],
                "phase": "Running",
                "conditions": ready,
            }
            return
        answers = await program.probe(config)
        if namespace in self.deaf:
            answers = dict.fromkeys(answers, Reach.SILENT)
        elif namespace not in self.open:
            answers = {key: Reach.SILENT if key.startswith("e") else reach for key, reach in answers.items()}
        lost = {item.key for item in config.targets if item.address in self.unable}
        answers |= dict.fromkeys(lost, Reach.NO_ATTEMPT)
        ended = {"terminated": {"exitCode": 0, "message": dump_answers(answers)}}
        pod["status"] |= {"phase": "Succeeded", "containerStatuses": [{"state": ended}]}

    async def delete(self, ref: Ref, *, uid: str | None = None, **_: Any) -> bool:
        assert self.objects[ref]["metadata"]["uid"] == uid
        del self.objects[ref]
        self.deleted.append(ref.name)
        return True

    @property
    def left(self) -> Names:
        return [ref.name for ref, obj in self.objects.items() if canary.is_canary(obj, canary.PROBE_MANAGER)]


@pytest.fixture
def progress() -> list[str]:
    return []


async def until(there: Callable[[], Any]) -> None:
    async with asyncio.timeout(60):
        while not there():  # noqa: ASYNC110 - of what the code under test does
            await asyncio.sleep(0.01)


async def measure(world: World, *, progress: list[str] | None = None, **wanted: Any) -> Report:
    told = progress if progress is not None else []
    (found,) = await probe(world, Wanted("llm", ("llama",), **wanted), told.append)  # type: ignore[arg-type]
    return found


def cells(report: Report) -> set[tuple[str, str, int, str]]:
    return {(row.vantage, row.pod, row.port, row.result) for row in report.rows}


SAME, HERE = "a canary pod of the same namespace", "this machine"


async def test_what_is_shut_is_isolated_beside_a_listener_that_answers(progress: list[str]) -> None:
    async with World(engines=2) as world:
        report = await measure(world, progress=progress)
    assert (report.exit_code, report.proof.reason) == (0, "Measured")
    assert cells(report) == {
        (vantage, f"llama-engine-{number}", 8000, "blocked") for vantage in (SAME, HERE) for number in (0, 1)
    }
    assert {row.purpose for row in report.rows} == {"vLLM's HTTP API"}
    assert "gateways" not in report.proof.message
    assert any("The gateways' routes were not tried" in note for note in report.notes)
    # One listener for the node, one pod that tries; the image is one that this cluster pulls; all are gone.
    assert [pod["spec"]["containers"][0]["image"] for pod in world.made] == ["mirror.example/operator:1"] * 2
    assert world.left == []
    assert progress[0] == "llm/llama: 2 Ready pods on 1 node, 2 sockets to try"


async def test_an_engine_that_can_be_reached_is_told_with_the_vantage_point() -> None:
    async with World() as world, Listener((accepting(net(1), 8000),)):
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (1, "EngineReachable")
    assert cells(report) == {(SAME, "llama-engine-0", 8000, "blocked"), (HERE, "llama-engine-0", 8000, "open")}
    assert "port 8000 (api) from this machine can be reached" in report.proof.message
    assert world.left == []


async def test_a_namespace_that_is_named_is_a_vantage_point_of_its_own() -> None:
    async with World() as world, Listener((accepting(net(1), 8000),)):
        world.open.add("team-b")
        report = await measure(world, vantages=("team-b",))
        assert ("a canary pod of namespace team-b", "llama-engine-0", 8000, "open") in cells(report)
        (there,) = (pod for pod in world.made if pod["metadata"]["namespace"] == "team-b")
        # Nothing of another namespace may own it: the garbage collector would remove it at once.
        assert "ownerReferences" not in there["metadata"]
        assert "from a canary pod of namespace team-b" in report.proof.message
    assert world.left == []


async def test_silence_without_a_control_is_no_isolation_and_names_the_policy_that_may_hold_pods_back() -> None:
    async with World() as world:
        world.deaf.add("llm")
        world.add(
            {
                "apiVersion": "networking.k8s.io/v1",
                "kind": "NetworkPolicy",
                "metadata": {"name": "tenant-deny", "namespace": "llm"},
                "spec": {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]},
            }
        )
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (2, "NoControl")
    assert (SAME, "llama-engine-0", 8000, "unknown") in cells(report)
    assert "tenant-deny" in report.proof.message
    assert world.left == []


async def test_no_ready_engine_is_nothing_to_measure_and_makes_no_pod() -> None:
    async with World(engines=0) as world:
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (2, "NothingToMeasure")
    assert world.made == []


async def test_what_is_suspended_is_no_failure_and_nobody_waits_for_it() -> None:
    async with World(engines=0, spec=SPEC | {"suspend": True}) as world:
        for status in (False, True):
            report = await measure(world, status=status, wait=3600.0)
            assert (report.exit_code, report.proof.reason) == (0, "Suspended")
    async with World(engines=1, spec=SPEC | {"suspend": True}) as world, Listener((accepting(net(1), 8000),)):
        # Pods that are still there are measured all the same.
        assert (await measure(world)).exit_code == 1


async def test_it_waits_for_a_ready_engine(monkeypatch: pytest.MonkeyPatch, progress: list[str]) -> None:
    monkeypatch.setattr(edge, "_WAIT_LOOK", 0.01)
    async with World(engines=0) as world:
        measuring = asyncio.create_task(measure(world, wait=60.0, progress=progress))
        await until(lambda: progress)
        assert progress == ["llm/llama: waiting up to 60 s for a Ready engine"]
        world.add(world.engine(0))
        assert (await measuring).exit_code == 0


async def test_missing_rights_are_all_named_before_a_pod_is_made() -> None:
    async with World() as world:
        world.denied = {("llm", "create"), ("team-b", "create"), ("team-b", "delete")}
        with pytest.raises(OperatorError) as raised:
            await measure(world, vantages=("team-b",))
        for part in ("create pods in namespace llm", "create, delete pods in namespace team-b", "probe --status"):
            assert part in str(raised.value)
        assert world.made == []
        # Nothing of it is needed to read what the operator measured.
        assert (await measure(world, status=True)).proof.reason == "NotMeasured"


async def test_pods_that_a_quota_refuses_are_told() -> None:
    async with World() as world:
        world.refuses = lambda _: True
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (2, "NoControl")
    assert "exceeded quota: full" in report.proof.message
    assert world.left == []


async def test_an_interrupt_leaves_no_pod_behind() -> None:
    async with World() as world:
        world.stuck = True  # as a node that pulls the image for ever
        measuring = asyncio.create_task(measure(world))
        await until(lambda: world.made)
        assert world.left != []
        measuring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        assert world.left == []
        assert len(world.deleted) == len(world.made) == 1


async def test_an_interrupt_while_a_pod_is_being_made_leaves_none_behind() -> None:
    """The request is on its way: the pod will be there, although nobody got its name."""
    async with World() as world:
        world.stuck, on_its_way, create = True, asyncio.Event(), world.create

        async def slow(obj: KubeObject) -> KubeObject:
            if obj["kind"] == "Pod":
                on_its_way.set()
                await asyncio.sleep(0.2)
            return await create(obj)

        world.create = slow  # type: ignore[method-assign]
        measuring = asyncio.create_task(measure(world))
        await on_its_way.wait()
        measuring.cancel()
        with pytest.raises(asyncio.CancelledError):
            await measuring
        assert (world.left, len(world.made)) == ([], 1)


async def test_what_a_killed_probe_left_goes_and_one_that_runs_beside_stays() -> None:
    async with World() as world:
        maker = canary.Maker(OWNER, parse("llama", SPEC).spec, "image", "llm", canary.PROBE_MANAGER)
        for name, age in (("killed", timedelta(minutes=10)), ("beside", timedelta(seconds=10))):
            pod = canary.prober(maker, name, targets=())
            pod["metadata"] |= {"uid": name, "creationTimestamp": (datetime.now(UTC) - age).isoformat()}
            world.add(pod | {"status": {"phase": "Succeeded"}})
        assert (await measure(world)).exit_code == 0
        assert world.left == ["beside"]


async def test_many_targets_take_several_rounds_and_all_are_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(edge, "_TARGETS", 2)
    async with World(engines=5) as world:
        report = await measure(world)
    assert (report.exit_code, "of 5 of 5 pods" in report.proof.message) == (0, True)
    assert len(cells(report)) == 10
    assert len(world.made) == 3 * 2


def program_of(pod: KubeObject) -> str:
    """``listen`` or ``probe``."""
    return str(pod["spec"]["containers"][0]["args"][1])


def no_listener_on_the_second_node(world: World) -> None:
    world.refuses = lambda pod: program_of(pod) == "listen" and "n2" in str(pod["spec"]["affinity"])


def prober_of(pod: KubeObject) -> str:
    """The namespace that it tries from; empty: it is none."""
    return str(pod["metadata"]["namespace"]) if program_of(pod) == "probe" else ""


def no_prober_in_the_second_part(world: World) -> None:
    world.refuses = lambda pod: prober_of(pod) == "llm" and "llm" in map(prober_of, world.made)


def no_prober_elsewhere_in_the_second_part(world: World) -> None:
    world.refuses = lambda pod: prober_of(pod) == "team-b" and "team-b" in map(prober_of, world.made)


def no_attempt(world: World) -> None:
    world.unable.add(net(2))


def another_pod_meanwhile(world: World) -> None:
    def replaces(pod: KubeObject) -> bool:
        if prober_of(pod):
            old = world.engine(1, "n2")
            world.add(old | {"metadata": old["metadata"] | {"uid": "another"}})
        return False

    world.refuses = replaces


@pytest.mark.parametrize(
    ("trouble", "vantage"),
    [
        (no_listener_on_the_second_node, SAME),
        (no_prober_in_the_second_part, SAME),
        (no_prober_elsewhere_in_the_second_part, "a canary pod of namespace team-b"),
        (no_attempt, SAME),
        (another_pod_meanwhile, SAME),
    ],
)
async def test_what_was_not_tried_is_not_isolated(
    monkeypatch: pytest.MonkeyPatch, trouble: Callable[[World], None], vantage: str
) -> None:
    """One engine is seen to be shut from everywhere; of the other one nobody knows."""
    monkeypatch.setattr(edge, "_NODES", 1)
    async with World(engines=2, nodes=2) as world:
        trouble(world)
        report = await measure(world, vantages=("team-b",))
    assert (report.exit_code, report.proof.reason) == (2, "NotAllTried")
    assert f"llama-engine-1 port 8000 ({net(2)}) from {vantage}" in report.proof.message
    assert "of 4 attempts" in report.proof.message
    assert "llama-engine-0" not in report.proof.message
    assert world.left == []


@pytest.mark.parametrize(
    ("numb", "told"),
    [
        (set(), ""),
        ({"n1", "n2"}, "This machine is not on the pod network"),
        ({"n2"}, "This machine reached 1 of 2 ports of the listeners"),
    ],
)
async def test_what_was_not_tried_from_this_machine_and_why_is_told(
    monkeypatch: pytest.MonkeyPatch, numb: set[str], told: str
) -> None:
    async with World(engines=2, nodes=2) as world:

        async def reaching(address: str, port: int, seconds: float) -> Reach:
            listeners = {pod["status"].get("podIP"): str(pod["spec"].get("affinity")) for pod in world.made}
            hidden = any(f"'{node}'" in listeners.get(address, "") for node in numb)
            return Reach.SILENT if hidden else await dial(address, port, seconds)

        monkeypatch.setattr(edge, "dial", reaching)
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (0, "Measured")
    notes = " ".join(report.notes)
    assert (told in notes, notes.count("This machine")) == (True, int(bool(told)))
    assert any(row.vantage == HERE for row in report.rows) == (not told)


async def test_every_family_of_an_engine_has_to_be_tried() -> None:
    async with World() as world:
        (pod,) = (obj for ref, obj in world.objects.items() if ref.kind == kinds.POD)
        pod["status"]["podIPs"].append({"ip": net(9)})
        world.unable.add(net(9))
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (2, "NotAllTried")
    told = f"of 2 attempts 1 were not made, or their targets changed meanwhile: llama-engine-0 port 8000 ({net(9)})"
    assert told in report.proof.message


def accepted(spec: dict[str, Any]) -> KubeObject:
    metadata = {"name": "llama-accepted", "namespace": "llm"}
    return {"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": {"spec.json": json.dumps(spec)}}


@pytest.mark.parametrize(
    ("condition", "told"),
    [
        ({"status": "False", "observedGeneration": 1}, "refuses the present spec"),
        # The operator is down: the spec says 8124, and on 8000 the engine listens.
        ({"status": "True", "observedGeneration": 0}, "has not looked at the present spec"),
        ({"status": "True"}, "has not looked at the present spec"),
    ],
)
async def test_while_a_spec_is_not_in_force_what_runs_is_measured(condition: dict[str, Any], told: str) -> None:
    refused = {"type": "Accepted", "reason": "InvalidSpec", "message": "no", **condition}
    async with World() as world:
        world.add(world.resource(SPEC | {"ports": {"api": 8124}}, conditions=[refused]))
        report = await measure(world)
        assert (report.exit_code, report.proof.reason) == (2, "CannotMeasure")
        assert "cannot be read" in report.proof.message
        world.add(accepted(SPEC | {"ports": {"api": 8123}}))
        report = await measure(world)
        assert {row.port for row in report.rows} == {8123}
        assert any(told in note for note in report.notes)
        assert world.made != []


@pytest.mark.parametrize("seen", [0, 1])
async def test_a_port_that_only_the_spec_has_does_not_hide_the_one_that_is_open(seen: int) -> None:
    """While no operator runs (0), or the engine's turn to be replaced has not come (1)."""
    condition = {"type": "Accepted", "status": "True", "reason": "SpecAccepted", "observedGeneration": seen}
    async with World() as world, Listener((accepting(net(1), 8000),)):
        world.add(world.resource(SPEC | {"ports": {"api": 8124}}, conditions=[condition]))
        world.add(accepted(SPEC))
        (pod,) = (obj for ref, obj in world.objects.items() if ref.kind == kinds.POD)
        pod["spec"]["containers"] = [{"name": "vllm", "ports": [{"name": "http", "containerPort": 8000}]}]
        report = await measure(world)
    assert (report.exit_code, report.proof.reason) == (1, "EngineReachable")
    assert {row.port for row in report.rows} == {8000}


async def test_what_was_accepted_and_may_not_be_read_names_the_right_and_the_others_are_measured() -> None:
    condition = {"type": "Accepted", "status": "False", "reason": "InvalidSpec", "observedGeneration": 1}
    async with World() as world:
        other = world.resource(SPEC, conditions=[condition])
        other["metadata"] |= {"name": "qwen", "uid": "2"}
        world.add(other)
        world.unreadable.add("qwen-accepted")
        found = await probe(world, Wanted("llm"), print)  # type: ignore[arg-type]
    assert [(item.name, item.proof.reason) for item in found] == [("llama", "Measured"), ("qwen", "CannotMeasure")]
    assert "ask for the right to get ConfigMaps in namespace llm" in found[1].proof.message


async def test_a_resource_that_is_not_there_is_an_error_with_the_way_to_find_it() -> None:
    async with World() as world:
        with pytest.raises(OperatorError, match="kubectl get svllm --all-namespaces"):
            await probe(world, Wanted("llm", ("lama",)), print)  # type: ignore[arg-type]
        assert await probe(world, Wanted("empty"), print) == []  # type: ignore[arg-type]
        assert len(await probe(world, Wanted(None), print)) == 1  # type: ignore[arg-type]


# -------------------------------------------------------------------------------------------------------- --status


def said(status: str = "True", *, age: timedelta = timedelta(minutes=3), generation: int = 1) -> dict[str, Any]:
    at = (datetime.now(UTC) - age).strftime("%Y-%m-%dT%H:%M:%SZ")
    condition = {"type": "Isolated", "status": status, "reason": "Measured", "message": "All of it."}
    return {"conditions": [condition | {"observedGeneration": generation}], "lastVerified": at}


@pytest.mark.parametrize(
    ("status", "code", "reason"),
    [
        (said(), 0, "Measured"),
        (said("False"), 1, "Measured"),
        (said("False", age=timedelta(days=3)), 1, "Measured"),  # a breach does not go by growing old
        (said("Unknown"), 2, "Measured"),
        (said(age=timedelta(hours=5)), 2, "Stale"),
        (said(generation=0), 2, "OldGeneration"),
        ({"conditions": said()["conditions"]}, 2, "Stale"),
        ({}, 2, "NotMeasured"),
    ],
)
async def test_the_operator_s_own_verdict_counts_while_it_is_fresh(
    status: dict[str, Any], code: int, reason: str
) -> None:
    async with World() as world:
        world.add(world.resource(SPEC, **status))
        report = await measure(world, status=True)
        assert (report.exit_code, report.proof.reason) == (code, reason)
        assert world.made == []


async def test_it_waits_for_the_operator_s_verdict(monkeypatch: pytest.MonkeyPatch, progress: list[str]) -> None:
    monkeypatch.setattr(edge, "_WAIT_LOOK", 0.01)
    async with World() as world:
        asking = asyncio.create_task(measure(world, status=True, wait=60.0, progress=progress))
        await until(lambda: progress)
        world.add(world.resource(SPEC, **said()))
        assert (await asking).exit_code == 0


def test_the_exit_code_is_of_the_worst_that_is_known() -> None:
    def of(*statuses: str) -> int:
        return edge.exit_code([Report("llm", "a", Proof(status, "R", "m")) for status in statuses])

    assert [of(), of("True"), of("True", "Unknown"), of("Unknown", "False", "True")] == [0, 0, 2, 1]
