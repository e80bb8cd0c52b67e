"""The table of who reaches what: what counts as wrong, what is tried again, and who is expected to get through."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from e2e.matrix import (
    Cell,
    Place,
    Report,
    Source,
    Target,
    cells,
    dial,
    member_of,
    open_at,
    socket_names,
    stranger,
    wrong,
)
from e2e.reach import OPEN, SILENT
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render.meta import Owner
from securevllm.topology import Topology, plan
from tests.netpol import Node
from tests.property.world import Member, World

OWNER = Owner("llama", "apps", "uid-1")
SPEC: dict[str, Any] = {
    "model": {"name": "/models/any"},
    "image": "vllm/vllm-openai:v0.33.0",
    "replicas": 2,
    "parallelism": {"tensor": 2, "nodes": 2},
}


class Scripted:
    """Answers in turn; the last one for ever."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), 0

    def reach(self, targets: Iterable[str], seconds: float = 2.0) -> dict[str, str]:
        del seconds
        self.asked += 1
        answer = self.answers[min(self.asked, len(self.answers)) - 1]
        return dict.fromkeys(targets, answer)


@pytest.fixture
def topology() -> Topology:
    return plan(parse(OWNER.name, SPEC).spec, Context())


def member(topology: Topology, role: str, group: str = "", number: int = 1) -> Member:
    labels = {"securevllm.io/resource": OWNER.label, "securevllm.io/role": role}
    pod = {
        "metadata": {
            "name": f"{role}-{group}-{number}",
            "namespace": "apps",
            "labels": labels | ({"securevllm.io/group": group} if group else {}),
        },
        "spec": {"nodeName": "n1"},
        "status": {"podIPs": [{"ip": f"10.0.0.{number}"}, {"ip": f"fd00::{number}"}]},
    }
    return member_of(pod, OWNER, topology)


def source(one: Member, dialler: Scripted | None = None) -> Source:
    return Source(one.pod.name, "", one.pod, dialler or Scripted(SILENT), one)


def test_who_is_expected_to_get_through(topology: Topology) -> None:
    head, worker = member(topology, "engine", "e0", 1), member(topology, "engine-worker", "e0", 2)
    other, gateway = member(topology, "engine", "e1", 3), member(topology, "gateway", "", 4)
    attacker = stranger("attacker", "apps", ("10.0.0.9",), "n1", {})
    world = World((head, worker, other, gateway), (attacker,), ())
    sources = [source(one) for one in world.members]
    sources += [Source("attacker", "same namespace", attacker, Scripted(SILENT))]
    sources += [
        Source(f"host-{name}", "hostNetwork", Node(name, ("10.9.9.9",)), Scripted(SILENT)) for name in ("n1", "n2")
    ]
    store = Target("10.0.0.1", 29501, "torch-distributed", head, "llama")
    api = Target("10.0.0.1", 8000, "api", head, "llama")
    made = cells(world, sources, [store, api])
    assert {(cell.source.name, cell.target.name, cell.kind) for cell in made if cell.wanted} == {
        ("engine-worker-e0-2", "torch-distributed", "same group"),
        ("engine-worker-e0-2", "api", "same group"),
        ("gateway--4", "api", "gateway of the same resource"),
        ("host-n1", "torch-distributed", "hostNetwork, the target's own node"),
        ("host-n1", "api", "hostNetwork, the target's own node"),
    }
    refused = {(cell.source.name, cell.kind) for cell in made if not cell.wanted}
    assert ("engine-e1-3", "another group of the same resource") in refused
    assert {("attacker", "same namespace"), ("host-n2", "hostNetwork")} <= refused
    assert not any(cell.source.endpoint is head.pod for cell in made), "nobody is asked about its own sockets"


def test_a_source_tries_the_families_that_it_has(topology: Topology) -> None:
    head, worker = member(topology, "engine", "e0", 1), member(topology, "engine-worker", "e0", 2)
    attacker = stranger("attacker", "apps", ("10.0.0.9",), "n1", {})
    sources = [source(worker), Source("attacker", "same namespace", attacker, Scripted(SILENT))]
    targets = [Target(ip, 29501, "torch-distributed", head, "llama") for ip in head.pod.ips]
    made = cells(World((head, worker), (attacker,), ()), sources, targets)
    assert [(cell.source.name, str(cell.target), cell.wanted) for cell in made] == [
        ("engine-worker-e0-2", "10.0.0.1:29501", True),
        ("engine-worker-e0-2", "[fd00::1]:29501", True),
        ("attacker", "10.0.0.1:29501", False),
    ]


def test_a_socket_is_tried_at_every_address_that_it_may_be_open_at() -> None:
    everywhere = "0.0.0.0"  # noqa: S104 - what sockets say
    listening = [("::", 1), (everywhere, 2), ("fd00::1", 3), ("10.0.0.1", 4), (everywhere, 1)]
    assert open_at(listening, ("10.0.0.1", "fd00::1")) == [
        ("10.0.0.1", 1), ("fd00::1", 1), ("10.0.0.1", 2), ("fd00::1", 3), ("10.0.0.1", 4),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("address", "tried"),
    [
        ("::ffff:10.0.0.1", ["10.0.0.1"]),
        ("::ffff:0.0.0.0", ["10.0.0.1"]),
        ("fd00:0:0::1", ["fd00::1"]),
        ("fe80::1", ["10.0.0.1", "fd00::1"]),
        ("192.0.2.1", ["10.0.0.1", "fd00::1"]),
        ("::ffff:192.0.2.1", ["10.0.0.1", "fd00::1"]),
        ("127.0.0.1", []),
        ("::1", []),
        ("::ffff:127.0.0.1", []),
    ],
)
def test_what_listens_is_left_out_on_loopback_alone(address: str, tried: list[str]) -> None:
    assert open_at([(address, 1)], ("10.0.0.1", "fd00::1")) == [(ip, 1) for ip in tried]


def cell(dialler: Scripted, *, wanted: bool) -> Cell:
    attacker = stranger("attacker", "apps", ("10.0.0.9",), "n1", {})
    return Cell(Source("attacker", "x", attacker, dialler), Place("10.0.0.1:1", "place"), "x", wanted)


def test_one_handshake_that_must_not_be_is_one_too_many() -> None:
    dialler = Scripted(OPEN, SILENT)
    tried = cell(dialler, wanted=False)
    dial([tried])
    assert (tried.found, dialler.asked, len(wrong([tried]))) == (OPEN, 1, 1)


@pytest.mark.parametrize(("answers", "mistakes"), [((SILENT, OPEN), 0), ((SILENT,), 1)])
def test_what_must_be_open_is_tried_again(answers: tuple[str, ...], mistakes: int) -> None:
    tried = cell(Scripted(*answers), wanted=True)
    dial([tried], patience=0.0 if mistakes else 60.0)
    assert len(wrong([tried])) == mistakes


@pytest.mark.parametrize(("answer", "mistakes"), [(OPEN, 0), (SILENT, 1)])
def test_a_blocked_connection_without_a_control_that_succeeds_is_wrong(answer: str, mistakes: int) -> None:
    tried = cell(Scripted(SILENT), wanted=False)
    dial([tried])
    assert wrong([tried]) == []
    tried.source.dialler.answers = [answer]  # type: ignore[attr-defined]
    dial([tried], control=True, patience=0.0)
    assert (tried.found, tried.control, len(wrong([tried]))) == (SILENT, answer, mistakes)


def test_random_sockets_have_the_name_that_the_log_gives(topology: Topology) -> None:
    log = "INFO [fake_vllm] gloo (Gloo) of rank 3 listens on 10.0.0.1:40001\nnccl (NCCL) of rank 0 listens on x:1\n"
    names = socket_names(member(topology, "engine", "e0"), log)
    assert (names[8000], names[29501], names[40001]) == ("api", "torch-distributed", "gloo")
    assert 1 not in names


def test_the_table_has_every_cell_and_the_summary_counts_them(tmp_path: Path) -> None:
    good, bad = cell(Scripted(SILENT), wanted=False), cell(Scripted(OPEN), wanted=False)
    dial([good])
    dial([bad])
    Report(tmp_path).write("llama", [good, bad])
    rows = (tmp_path / "llama.csv").read_text(encoding="utf-8").splitlines()
    assert [row.rpartition(",")[2] for row in rows] == ["verdict", "as expected", "WRONG"]
    assert "| x | 2 | 0 | 1 | 0 | 1 |" in (tmp_path / "summary.md").read_text(encoding="utf-8")
