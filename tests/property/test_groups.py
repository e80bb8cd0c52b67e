"""A cluster of dice: StatefulSet controllers, kubelets, accidents and crashes of the operator, all in memory.

Whatever happens, no group that serves is replaced while another does not, no two epochs form one world, an epoch never
goes back, and when the accidents end all groups are whole with what is wanted.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm.groups import Group, Member, Pair, Plan, State, Step, Workload, judge, plan

if TYPE_CHECKING:
    from securevllm.render.accepted import GroupMemory

SIZE, STARTUP = 2, 60.0
ACCIDENTS = ("lose", "restart", "spec", "forget", "crash", "pending", "nothing")


@dataclass
class World:
    """Groups of two; time in seconds."""

    names: tuple[str, ...]
    now: int = 1000
    template: str = "t0"
    memory: dict[str, GroupMemory] = field(default_factory=dict)
    sets: dict[tuple[str, int], Workload] = field(default_factory=dict)
    pods: dict[tuple[str, int], Member] = field(default_factory=dict)
    late: set[tuple[str, int]] = field(default_factory=set)
    serial: itertools.count[int] = field(default_factory=itertools.count)

    def controllers_and_kubelets(self) -> None:
        """Pods that end are gone; missing ones are made of the StatefulSet; engines start when all gates have met."""
        self.now += 5
        for place, pod in [*self.pods.items()]:
            if pod.gone:
                del self.pods[place]
        for place, workload in self.sets.items():
            if place not in self.pods:
                self.pods[place] = Member("pod", f"uid-{next(self.serial)}", workload.pair)
            elif not self.pods[place].scheduled and place not in self.late:
                self.pods[place] = replace(self.pods[place], scheduled=True)
        for name in self.names:
            members = [self.pods.get((name, rank)) for rank in range(SIZE)]
            waiting = [pod for pod in members if pod is not None and pod.scheduled and not pod.started]
            if len(waiting) == SIZE and len({pod.pair for pod in waiting}) == 1:
                for rank, pod in enumerate(waiting):
                    started = replace(pod, started=True, started_at=self.now, ready=True)
                    self.pods[name, rank] = started

    def look(self) -> Plan:
        """One pass of the operator's judgement; gates follow at once."""
        judged = []
        for name in self.names:
            places = [(name, rank) for rank in range(SIZE)]
            group = Group(
                name,
                self.template,
                SIZE,
                tuple(self.sets.get(place) for place in places),
                tuple(self.pods.get(place) for place in places),
                self.memory.get(name),
            )
            found = judge(group, self.now, STARTUP)
            judged.append(found)
            for place, gate in zip(places, found.gates, strict=False):
                if (pod := self.pods.get(place)) is not None:
                    since = (pod.ready_since or self.now) if gate and pod.ready and not pod.gone else None
                    self.pods[place] = replace(pod, gate=gate, ready_since=since)
        decided = plan(judged, self.now)
        rolled = [item for item in judged if decided.steps[item.name] is Step.ROLL and item.serving]
        if rolled:
            assert len(rolled) == 1
            assert all(item.serving for item in judged), "a group that serves was replaced while another did not"
        for item in judged:
            if decided.steps[item.name] is Step.RESTART:
                assert item.state is State.BROKEN
        for name, memory in decided.memory.items():
            assert memory.epoch >= self.memory.get(name, memory).epoch
        return decided

    def act(self, decided: Plan, crash_after: int | None = None) -> None:
        """Persist, then apply and delete, and perhaps die in between."""
        self.memory = dict(decided.memory)
        todo = [(name, rank) for name in self.names if decided.steps[name] is not Step.WAIT for rank in range(SIZE)]
        for place in todo[:crash_after]:
            self.sets[place] = Workload(Pair(self.template, self.memory[place[0]].epoch))
        if crash_after is not None:
            return
        for name in {name for name, _ in todo}:
            wanted = Pair(self.template, self.memory[name].epoch)
            for rank in range(SIZE):
                pod = self.pods.get((name, rank))
                if pod is not None and pod.pair != wanted:
                    self.pods[name, rank] = replace(pod, gone="is being deleted")

    def accident(self, kind: str, place: tuple[str, int]) -> None:
        pod = self.pods.get(place)
        if kind == "spec":
            self.template = f"t{next(self.serial)}"
        elif kind == "forget":
            self.memory = {}
        elif kind == "pending":
            self.late ^= {place}
        elif kind == "lose" and pod is not None:
            self.pods[place] = replace(pod, gone="is being deleted")
        elif kind == "restart" and pod is not None and pod.started:
            self.pods[place] = replace(pod, restarted="ended")

    def check(self) -> None:
        """No world has formed of two epochs."""
        for name in self.names:
            members = [self.pods.get((name, rank)) for rank in range(SIZE)]
            if all(pod is not None and pod.ready_since is not None for pod in members):
                assert len({pod.pair for pod in members if pod is not None}) == 1


@settings(deadline=None)
@given(
    st.integers(1, 3),
    st.lists(
        st.tuples(st.sampled_from(ACCIDENTS), st.integers(0, 2), st.integers(0, SIZE - 1), st.integers(0, 5)),
        max_size=25,
    ),
)
def test_whatever_happens_it_ends_well(count: int, accidents: list[tuple[str, int, int, int]]) -> None:
    world = World(tuple(f"e{number}" for number in range(count)))
    for kind, number, rank, moment in accidents:
        world.accident(kind, (world.names[number % count], rank))
        world.act(world.look(), crash_after=moment if kind == "crash" else None)
        if moment % 2:
            world.controllers_and_kubelets()
        world.check()
    world.late.clear()
    # Longer than the longest back-off, shorter than a member that never starts is waited for.
    for _ in range(110):
        world.act(world.look())
        world.controllers_and_kubelets()
        world.check()
    assert all(workload.pair.template == world.template for workload in world.sets.values())
    assert len(world.sets) == count * SIZE
    assert all(pod.ready_since is not None and not pod.gone for pod in world.pods.values()), world
    assert len(world.pods) == count * SIZE
    epochs = {name: memory.epoch for name, memory in world.memory.items()}
    world.act(world.look())
    assert {name: memory.epoch for name, memory in world.memory.items()} == epochs, "whole groups are left alone"
