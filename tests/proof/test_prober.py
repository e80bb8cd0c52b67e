"""The prober over many resources: within its time, fair, bounded. A lapse is a real socket on loopback."""

from __future__ import annotations

import asyncio
import time
from datetime import UTC, datetime
from typing import Any

import pytest

from securevllm.api.kinds import POD
from securevllm.api.parse import parse
from securevllm.children import labelled
from securevllm.context import Context
from securevllm.proof.dial import Listener, accepting, dial
from securevllm.proof.prober import Gateways, Prober, Subject, Who
from securevllm.proof.verdict import Proof
from securevllm.proof.wire import Reach
from securevllm.render.meta import Owner
from securevllm.topology import plan

RESOURCES, PODS = 1000, 4
SPEC = parse("llama", {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0", "replicas": PODS}).spec
TOPOLOGY = plan(SPEC, Context())


class Cache:
    """Ready engine pods by the word under which they are found."""

    def __init__(self) -> None:
        self.pods: dict[str, list[dict[str, Any]]] = {}

    def indexed(self, word: str) -> list[dict[str, Any]]:
        return self.pods.get(word, [])

    def get(self, _ref: Any) -> None:
        return None


class Observer:
    def __init__(self) -> None:
        self.rounds: list[str] = []
        self.connections = 0

    def probed(self, tier: str, _seconds: float) -> None:
        self.rounds.append(tier)

    def connected(self, _reach: str) -> None:
        self.connections += 1

    def verified(self, *_: Any) -> None:
        pass


async def no_others(_namespace: str) -> tuple[str, ...]:
    return ()


def engine(owner: Owner, number: int, address: str) -> dict[str, Any]:
    return {
        "metadata": {"name": f"e{number}", "uid": f"{owner.uid}-{number}", "labels": owner.pod_labels("engine")},
        "spec": {"nodeName": f"n{number}"},
        "status": {
            "podIP": address,
            "podIPs": [{"ip": address}],
            "conditions": [{"type": "Ready", "status": "True"}],
        },
    }


def subject(owner: Owner) -> Subject:
    gateways = Gateways(8443, "", "", ())
    return Subject(owner, SPEC, TOPOLOGY, gateways, interval=300.0, canaries="Canary pods are turned off.")


async def test_a_thousand_resources_are_measured_within_five_minutes_and_a_lapse_is_among_them() -> None:
    cache, observer, open_at_once, most = Cache(), Observer(), 0, 0
    told: set[Who] = set()
    everybody = asyncio.Event()

    def changed(who: Who) -> None:
        told.add(who)
        if len(told) == RESOURCES:
            everybody.set()

    async def counted(address: str, port: int, seconds: float) -> Reach:
        nonlocal open_at_once, most
        open_at_once += 1
        most = max(most, open_at_once)
        try:
            if address.startswith("127.90."):
                return await dial(address, port, seconds)
            await asyncio.sleep(seconds)  # a plugin that drops: silence costs the whole time
            return Reach.SILENT
        finally:
            open_at_once -= 1

    prober = Prober(
        None, cache, None, Context(), now=lambda: datetime.now(UTC), monotonic=time.monotonic,  # type: ignore[arg-type]
        changed=changed, observer=observer, others=no_others, dial=counted,
    )  # fmt: skip
    for number in range(RESOURCES):
        owner = Owner("llama", f"ns{number}", f"uid-{number}")
        last = number == RESOURCES - 1
        cache.pods[labelled(POD, owner.namespace, owner.label)] = [
            engine(owner, pod, f"127.90.0.{pod + 1}" if last else f"10.{number // 250}.{number % 250}.{pod}")
            for pod in range(PODS)
        ]
        prober.follow(subject(owner))
    lapsed = Who(f"ns{RESOURCES - 1}", "llama")
    began = time.monotonic()
    async with Listener((accepting("127.90.0.3", 8000),)):
        running = asyncio.create_task(prober.run())
        async with asyncio.timeout(300):
            await everybody.wait()
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    seconds = time.monotonic() - began
    print(f"{RESOURCES} resources, {observer.connections} connections: {seconds:.0f} s")  # noqa: T201
    assert most <= 256
    proof = prober.proof(lapsed, f"uid-{RESOURCES - 1}")
    assert proof is not None
    assert (proof.reason, "e2 port 8000" in proof.message) == ("EngineReachable", True)
    other = prober.proof(Who("ns0", "llama"), "uid-0")
    assert other is not None
    assert (other.status, other.reason) == ("Unknown", "NoControl")
    # Fair: nobody had a third complete round before everybody had the second. Who saw a lapse needs none.
    complete = [track.rounds["complete"] for who, track in prober._tracks.items() if who != lapsed]
    assert max(complete) - min(complete) <= 1
    assert observer.rounds.count("cheap") > RESOURCES // 2, "they did not wait for the dear ones"


class Fast:
    """A clock that runs twenty times as fast: 20 s between cheap rounds are one."""

    def __call__(self) -> float:
        return 1000.0 + 20 * time.monotonic()


async def test_dear_rounds_that_do_not_end_hide_no_lapse_of_others() -> None:
    async def dialled(address: str, _port: int, seconds: float) -> Reach:
        if address.startswith("10.9."):
            await asyncio.sleep(3600)
        await asyncio.sleep(seconds / 100)
        return Reach.OPEN if address == lapsing else Reach.SILENT

    lapsing, cache, told = "", Cache(), asyncio.Event()
    prober = Prober(
        None, cache, None, Context(), now=lambda: datetime.now(UTC), monotonic=Fast(),  # type: ignore[arg-type]
        changed=lambda who: told.set() if who.namespace == "apps" else None, observer=Observer(), others=no_others,
        dial=dialled,
    )  # fmt: skip
    running = asyncio.create_task(prober.run())
    for number in range(40):
        owner = Owner("llama", f"ns{number}", f"uid-{number}")
        cache.pods[labelled(POD, owner.namespace, owner.label)] = [engine(owner, 0, f"10.9.0.{number}")]
        prober.follow(subject(owner))
    await asyncio.sleep(1)  # their changes are due, and nothing of theirs ever ends
    owner = Owner("llama", "apps", "uid-1")
    cache.pods[labelled(POD, "apps", owner.label)] = [engine(owner, 0, "10.0.0.1")]
    prober.follow(subject(owner), Proof("True", "Measured", "As it was."))
    track = prober._tracks[owner.namespace, owner.name]  # type: ignore[index]
    try:
        async with asyncio.timeout(20):
            while not track.rounds["cheap"]:  # noqa: ASYNC110 - nobody tells of a round that changes nothing
                await asyncio.sleep(0.05)
            lapsing = "10.0.0.1"
            await told.wait()
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    assert track.proof is not None
    assert track.proof.reason == "EngineReachable"
    assert track.rounds["complete"] == 0, "all places for these were taken"


async def test_silence_without_a_sign_of_life_renews_nothing_and_is_looked_into() -> None:
    async def dialled(address: str, port: int, _seconds: float) -> Reach:
        tried.append((address, port))
        return Reach.OPEN if address in answering else Reach.SILENT

    tried, answering, moment = list[tuple[str, int]](), {"10.0.1.1"}, 1000.0
    owner, cache = Owner("llama", "apps", "uid-1"), Cache()
    door = engine(owner, 1, "10.0.1.1")
    door["metadata"]["labels"] = owner.pod_labels("gateway")
    cache.pods[labelled(POD, "apps", owner.label)] = [engine(owner, 0, "10.0.0.1"), door]
    prober = Prober(
        None, cache, None, Context(), now=lambda: datetime.now(UTC), monotonic=lambda: moment,  # type: ignore[arg-type]
        changed=lambda _who: None, observer=Observer(), others=no_others, dial=dialled,
    )  # fmt: skip
    before = Proof("True", "Measured", "As it was.", "2026-11-30T00:00:00Z")
    prober.follow(subject(owner), before)
    track = prober._tracks[Who("apps", "llama")]
    track.changed_at, track.canary_at = None, 10_000.0

    await prober._turn(track, "cheap")
    assert tried == [("10.0.0.1", 8000), ("10.0.1.1", 8443)]
    assert track.proof == before
    assert track.proof.verified_at > before.verified_at
    assert track.due("complete") == 10_000.0

    answering.clear()
    track.proof = before
    await prober._turn(track, "cheap")
    assert (track.proof, track.proof.verified_at) == (before, before.verified_at)
    assert track.due("complete") == moment, "what silences the gateway is looked into at once"
    track.changed_at = None
    cache.pods[labelled(POD, "apps", owner.label)].pop()
    await prober._turn(track, "full")
    assert track.due("complete") == moment, "no gateway is no sign of life either"


@pytest.mark.parametrize(("ipv6", "alive"), [(True, False), (False, True)])
async def test_a_way_out_by_one_family_of_addresses_is_no_sign_of_life_for_the_other(ipv6: bool, alive: bool) -> None:
    async def dialled(address: str, _port: int, _seconds: float) -> Reach:
        return Reach.OPEN if address == "10.0.1.1" else Reach.SILENT

    owner, cache = Owner("llama", "apps", "uid-1"), Cache()
    door = engine(owner, 1, "10.0.1.1")
    door["metadata"]["labels"] = owner.pod_labels("gateway")
    door["status"]["podIPs"].append({"ip": "fd00::1"})
    cache.pods[labelled(POD, "apps", owner.label)] = [engine(owner, 0, "10.0.0.1"), door]
    # Without an address of its own the operator lets gateways listen on IPv4 only.
    context = Context(ipv6=ipv6)
    prober = Prober(
        None, cache, None, context, now=lambda: datetime.now(UTC), monotonic=time.monotonic,  # type: ignore[arg-type]
        changed=lambda _who: None, observer=Observer(), others=no_others, dial=dialled,
    )  # fmt: skip
    assert (await prober.look(subject(owner), "cheap")).alive is alive


async def test_a_complete_round_of_a_large_resource_says_nothing_before_its_last_part_but_a_breach() -> None:
    async def dialled(address: str, _port: int, _seconds: float) -> Reach:
        tried.append(address)
        return Reach.OPEN if address in reached else Reach.SILENT

    tried, reached = list[str](), set[str]()
    owner, cache = Owner("llama", "apps", "uid-1"), Cache()
    cache.pods[labelled(POD, "apps", owner.label)] = [
        engine(owner, number, f"10.0.0.{number}") for number in range(10, 30)
    ]  # a node each
    prober = Prober(
        None, cache, None, Context(), now=lambda: datetime.now(UTC), monotonic=lambda: 1000.0,  # type: ignore[arg-type]
        changed=lambda _who: None, observer=Observer(), others=no_others, dial=dialled,
    )  # fmt: skip
    before = Proof("True", "Measured", "As it was.", "2026-11-30T00:00:00Z")
    prober.follow(subject(owner), before)
    track = prober._tracks[Who("apps", "llama")]

    async def part() -> tuple[int, str]:
        tried.clear()
        await prober._turn(track, "complete")
        assert track.proof is not None
        return len(tried), track.proof.reason

    assert [await part() for _ in range(3)] == [(8, "Measured"), (8, "Measured"), (4, "NoControl")]
    assert track.proof is not None
    assert track.due("complete") > 1000.0, "with the last part it is over"
    assert (await part())[0] == 8, "and begins anew"
    reached |= {"10.0.0.19", "10.0.0.29"}
    assert await part() == (9, "EngineReachable"), "one of the second part, tried twice; not that of the third"
    assert "e19 " in track.proof.message
    assert "e29 " not in track.proof.message
    assert track.parts == ()
    # A change in between begins anew, too.
    reached.clear()
    assert (await part())[0] == 8
    track.changed_at = 1000.0
    assert [(await part())[0] for _ in range(3)] == [8, 8, 4]


async def test_a_port_that_the_spec_opens_to_somebody_is_not_tried_from_there_and_that_is_told() -> None:
    tried: list[int] = []

    async def recorded(_address: str, port: int, _seconds: float) -> Reach:
        tried.append(port)
        return Reach.SILENT

    owner, cache = Owner("llama", "apps", "uid-1"), Cache()
    cache.pods[labelled(POD, "apps", owner.label)] = [engine(owner, 0, "10.0.0.1")]
    prober = Prober(
        None, cache, None, Context(), now=lambda: datetime.now(UTC), monotonic=time.monotonic,  # type: ignore[arg-type]
        changed=lambda _who: None, observer=Observer(), others=no_others, dial=recorded,
    )  # fmt: skip

    async def limits(**peers: Any) -> tuple[str, ...]:
        raw = {"model": {"name": "/m"}, "image": "vllm/vllm-openai:v0.33.0", "security": {"metrics": {"from": peers}}}
        spec = parse("llama", raw).spec
        seen = Subject(owner, spec, plan(spec, Context()), Gateways(8443, "", "", ()), interval=300.0)
        tried.clear()
        return (await prober.look(seen, "full")).round.limits

    told = await limits(namespaceSelector={"matchLabels": {"kubernetes.io/metadata.name": "monitoring"}})
    assert (tried, [limit for limit in told if "metrics" in limit]) == ([8000, 9464], [])
    told = await limits(podSelector={})
    assert tried == [8000, 9464]
    assert "metrics 9464 from a canary pod of the same namespace (the spec may allow it)" in told
    told = await limits(namespaceSelector={})
    assert tried == [8000]
    assert "metrics 9464 from the operator (the spec may allow it)" in told


async def test_pauses_between_measurements_that_show_nothing_grow_until_a_pod_comes_or_goes() -> None:
    async def silence(_address: str, _port: int, _seconds: float) -> Reach:
        return Reach.SILENT

    moment = 1000.0
    owner, cache = Owner("llama", "apps", "uid-1"), Cache()
    cache.pods[labelled(POD, "apps", owner.label)] = [engine(owner, 0, "10.0.0.1")]
    prober = Prober(
        None, cache, None, Context(), now=lambda: datetime.now(UTC), monotonic=lambda: moment,  # type: ignore[arg-type]
        changed=lambda _who: None, observer=Observer(), others=no_others, dial=silence,
    )  # fmt: skip
    prober.follow(subject(owner))
    track = prober._tracks[Who("apps", "llama")]

    async def pause() -> float:
        """Measure when it is due; how long until it is tried again."""
        nonlocal moment
        moment = track.canary_at if track.changed_at is None else track.changed_at
        await prober._turn(track, "complete")
        return track.canary_at - moment

    assert [await pause() for _ in range(4)] == [60, 120, 240, 480]
    cache.pods[labelled(POD, "apps", owner.label)].append(engine(owner, 1, "10.0.0.2"))
    prober.follow(subject(owner))
    assert [await pause() for _ in range(2)] == [60, 120]
