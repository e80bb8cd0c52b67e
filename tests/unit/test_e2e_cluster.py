"""The parts of the local cluster that need no cluster: addresses, images, what is missing, what can be reached."""

from __future__ import annotations

import io
import itertools
import json
import os
import socket
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from e2e import images as project
from e2e import reach, test_race
from e2e.cluster import ClusterError, binaries, network, nodes, packages
from e2e.cluster import __main__ as command_line
from e2e.cluster.binaries import (
    ARGO_CD_PROGRAMS,
    CONTROL_PLANE,
    NODE_PROGRAMS,
    PROGRAMS,
    PROMETHEUS_OPERATOR,
    Component,
)
from e2e.cluster.images import Image, Layer
from e2e.cluster.node import Node
from e2e.cluster.paths import cache_folder, locked
from e2e.definitions import FILES
from securevllm.context import Context

NODES = ("n1", "n2")


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def routes(monkeypatch: pytest.MonkeyPatch, *destinations: str) -> None:
    answer = json.dumps([{"dst": destination} for destination in ("default", *destinations)])
    monkeypatch.setattr(network, "run_ip", lambda *_arguments: answer)


def test_the_first_free_plan_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    routes(monkeypatch)
    assert network.free_plan(NODES, []).index == 0
    assert network.free_plan(NODES, [0, 1]).index == 2


@pytest.mark.parametrize("route", ["10.99.0.0/24", "10.100.0.0/14", "10.100.7.0/24", "10.99.0.5"])
def test_a_plan_whose_addresses_are_routed_is_left_alone(monkeypatch: pytest.MonkeyPatch, route: str) -> None:
    routes(monkeypatch, route)
    assert network.free_plan(NODES, []).index == (4 if route == "10.100.0.0/14" else 1)


def test_no_free_plan_names_the_ranges_and_where_to_look(monkeypatch: pytest.MonkeyPatch) -> None:
    routes(monkeypatch, "10.0.0.0/8")
    with pytest.raises(ClusterError, match=r"10\.99\.0\.0.*10\.115\.0\.0.*e2e\.cluster status"):
        network.free_plan(NODES, [])


def test_plans_do_not_overlap_and_names_fit_the_kernel() -> None:
    plans = [network.Plan(index, NODES, dual=True) for index in range(network.PLANS)]
    for what in ("link", "gateway", "node_range", "pod_ranges", "own_ips", "outsider_ips"):
        assert len({getattr(plan, what) for plan in plans}) == network.PLANS
    assert all(len(plan.link) <= 15 for plan in plans)
    addresses = [ip for plan in plans for node in NODES for ip in plan.node_ips(node)]
    addresses += [ip for plan in plans for ip in (*plan.own_ips, *plan.outsider_ips)]
    assert len(set(addresses)) == len(addresses) == network.PLANS * 2 * (len(NODES) + 2)
    ranges = [ip_network(text) for plan in plans for text in (*plan.pod_ranges, *plan.service_ranges)]
    apart = {
        one
        for one in ranges
        if any(one.overlaps(other) for other in set(ranges) - {one} if one.version == other.version)
    }
    assert apart == set()
    assert not any(ip_address(ip) in one for ip in addresses for one in ranges)


def test_a_plan_has_the_families_that_the_machine_has(monkeypatch: pytest.MonkeyPatch) -> None:
    routes(monkeypatch)
    for dual in (True, False):
        monkeypatch.setattr(network, "has_ipv6", lambda dual=dual: dual)
        plan = network.free_plan(NODES, [])
        assert [len(plan.pod_ranges), len(plan.service_ranges), len(plan.node_ips("n1"))] == [1 + dual] * 3


def test_only_cilium_brings_an_agent(tmp_path: Path) -> None:
    plan = network.Plan(0, NODES)
    assert "cilium-agent" in Node("n1", plan, tmp_path, "cilium").daemons
    assert Node("n1", plan, tmp_path, "bridge").daemons == ("containerd", "kubelet", "kube-proxy")


def test_every_program_belongs_to_the_control_plane_or_to_nodes_or_to_argo_cd() -> None:
    sets = [{*CONTROL_PLANE}, {*NODE_PROGRAMS}, {*ARGO_CD_PROGRAMS}]
    assert set.union(*sets) == {*PROGRAMS}
    assert sum(map(len, sets)) == len(PROGRAMS)


@pytest.mark.parametrize(
    "component",
    dict.fromkeys([*(what.component for what in PROGRAMS.values()), PROMETHEUS_OPERATOR]),
    ids=lambda component: component.name,
)
def test_every_component_s_module_requires_its_version(component: Component) -> None:
    text = (Path(network.__file__).parent / component.module / "go.mod").read_text(encoding="utf-8")
    assert component.source.startswith("securevllm.io/") or f"{component.source} v{component.version}" in text


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Component:
    """A component whose module is a folder of this test."""
    (tmp_path / "module" / "definitions").mkdir(parents=True)
    monkeypatch.setattr(binaries, "_find_go", lambda _progress: "go")
    monkeypatch.setattr(binaries, "_module_folder", lambda _go, _component: tmp_path / "module")
    return Component("example", "Example", "1", ".", "example.com/module", shared=(("crds", "definitions"),))


def test_what_is_only_copied_waits_for_no_build(module: Component) -> None:
    def waits(line: str) -> None:
        raise AssertionError(line)

    with locked(cache_folder() / ".build.lock"):
        folder = binaries.unpack(module, waits)
    assert [path.name for path in folder.iterdir()] == ["crds"]
    with locked(folder / ".shared.lock"):  # there already: nobody is waited for
        assert binaries.unpack(module, waits) == folder


def test_only_one_process_copies_the_same(module: Component, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = itertools.count()
    monkeypatch.setattr(binaries, "_module_folder", lambda _go, _component: next(asked))  # not a folder: copying fails
    module.folder.mkdir(parents=True)
    with ThreadPoolExecutor(max_workers=1) as pool:
        with locked(module.folder / ".shared.lock"):
            other = pool.submit(binaries.unpack, module, print)
            time.sleep(0.2)  # it waits, or is done for
            assert not other.done()
            (module.folder / "crds").mkdir()
        assert other.result(timeout=30) == module.folder


def test_a_build_stays_in_the_session_whose_weight_the_background_lowered(
    module: Component, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A session of its own would weigh as much as all tests together, whatever its niceness."""
    monkeypatch.setitem(PROGRAMS, "example", binaries.Program(module, ".", "1"))
    module.folder.mkdir(parents=True)
    go = tmp_path / "go"
    go.write_text('#!/bin/sh\nwhile [ "$1" != -o ]; do shift; done\nps -o sid=,pgid= -p $$ >"$2"\n')
    go.chmod(0o755)
    binaries._go_build(str(go), "example", [], lambda _line: None)
    session, group = map(int, (module.folder / "example").read_text(encoding="ascii").split())
    assert session == os.getsid(0)
    assert group != os.getpgrp()  # which ends with its compilers


@pytest.mark.parametrize("command", ["build", "deps"])
def test_what_builds_programs_has_the_definitions_too(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    unpacked: list[Component] = []

    def unpack(component: Component, _progress: binaries.Progress) -> None:
        unpacked.append(component)
        raise ClusterError("no network")  # no reason to fail: the tests that need them say so

    monkeypatch.setenv("SVLLM_CLUSTER", "local")
    monkeypatch.delenv("SVLLM_KUBECONFIG", raising=False)
    for name in ("build", "find_or_build"):
        monkeypatch.setattr(command_line, name, lambda *_arguments: None)
    for name in ("check_machine", "prepare"):
        monkeypatch.setattr(nodes, name, lambda *_arguments: None)
    monkeypatch.setattr(command_line, "unpack", unpack)
    assert command_line.main([command]) == 0
    assert {*unpacked} == {component for component, _ in FILES.values()}


def test_missing_packages_are_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packages, "SYSTEM_PATH", "/nowhere")
    monkeypatch.setattr(packages, "NEEDED", {"containerd": "containerd", "ctr": "containerd", "runc": "runc"})
    monkeypatch.setattr(packages, "NEEDED_BY_CILIUM", {"/nowhere/clang": "clang-19"})
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert packages.missing(cilium=False) == ["containerd", "runc"]
    with pytest.raises(
        ClusterError, match=r"apt-get install --no-install-recommends containerd runc clang-19 \(as root"
    ):
        packages.ensure(lambda _line: None, cilium=True)


def test_nodes_without_root_are_refused_with_the_alternatives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ClusterError, match=r"Linux and root.*kind on PATH.*SVLLM_KUBECONFIG="):
        nodes.check_machine()


def layer(name: str, key: str, *, mode: int = 0o644, time: int = 0, times_filled: list[int] | None = None) -> Layer:
    def fill(root: Path) -> None:
        if times_filled is not None:
            times_filled.append(1)
        for file in ("b", "a"):
            (root / file).write_text(file, encoding="ascii")
            (root / file).chmod(mode)
            os.utime(root / file, (time, time))
        (root / "tmp").mkdir(mode=0o700)
        (root / "tmp").chmod(0o1777)

    return Layer(name, key, fill)


def test_a_layer_is_packed_once_for_its_key() -> None:
    filled: list[int] = []
    one = layer("one", "key", times_filled=filled)
    assert one.prepare(lambda _line: None) == layer("one", "key", times_filled=filled).prepare(lambda _line: None)
    assert len(filled) == 1
    assert layer("one", "other").file != one.file


def test_packing_does_not_depend_on_time_owner_and_umask() -> None:
    digests = {
        layer("l", key, mode=mode, time=time).prepare(lambda _line: None)
        for key, mode, time in (("1", 0o644, 0), ("2", 0o600, 10**9))
    }
    assert len(digests) == 1
    with tarfile.open(layer("l", "1").file) as archive:
        assert [(item.name, item.mode, item.uid, item.mtime) for item in archive] == [
            ("a", 0o644, 0, 0),
            ("b", 0o644, 0, 0),
            ("tmp", 0o1777, 0, 0),
        ]


def test_a_layer_that_fails_leaves_nothing_in_the_cache() -> None:
    def fill(_root: Path) -> None:
        raise ClusterError("no disk")

    broken = Layer("broken", "key", fill)
    with pytest.raises(ClusterError, match="no disk"):
        broken.prepare(lambda _line: None)
    assert list(broken.file.parent.iterdir()) == []


def test_an_image_is_a_docker_archive_with_its_name_layers_and_configuration() -> None:
    image = Image("registry.local/x:1", (layer("l1", "1"), layer("l2", "2")), {"Env": ["A=b"], "User": "1:1"})
    out = io.BytesIO()
    image.write(out)
    out.seek(0)
    with tarfile.open(fileobj=out) as archive:
        content = {item.name: archive.extractfile(item).read() for item in archive}  # type: ignore[union-attr]
    [manifest] = json.loads(content["manifest.json"])
    config: dict[str, Any] = json.loads(content[manifest["Config"]])
    assert manifest["RepoTags"] == ["registry.local/x:1"]
    assert [f"sha256:{name.removesuffix('/layer.tar')}" for name in manifest["Layers"]] == config["rootfs"]["diff_ids"]
    assert all(name in content for name in manifest["Layers"])
    assert config["config"]["User"] == "1:1"
    assert config["config"]["Env"][-1] == "A=b"
    assert config["config"]["Env"][0].startswith("PATH=")


def test_the_operator_s_image_is_configured_by_its_dockerfile() -> None:
    assert project.dockerfile_config(project.DOCKERFILE) == {
        "Env": ["PATH=/usr/local/bin", "PYTHONPATH=/app:/packages", "PYTHONUNBUFFERED=1"],
        "User": "65532:65532",
        "Entrypoint": ["python", "-m", "securevllm"],
        "Cmd": ["run"],
    }


def test_images_carry_the_names_that_are_rendered() -> None:
    names = [image.name for image in project.every()]
    assert names[0].startswith("secure-vllm-operator:")
    assert names[1] == Context().gateway_image
    assert names[2] == "vllm/vllm-openai:v0.33.0"


def answer(target: str, seconds: float) -> str:
    return reach.reach_each([target], seconds)[target]


def test_reach_tells_open_from_refused_and_unknown() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, not listening: nobody else takes the port
        assert answer(f"127.0.0.1:{server.getsockname()[1]}", 5) == reach.OPEN
        assert answer(f"127.0.0.1:{closed.getsockname()[1]}", 5) == reach.REFUSED
        assert answer("no-such-name.invalid:1", 5) == reach.UNKNOWN_NAME


def test_a_handshake_that_is_noticed_late_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a busy machine the process has its turn after its own deadline."""
    late = itertools.chain((0.0,), itertools.repeat(100.0))
    monkeypatch.setattr("e2e.reach.time.monotonic", lambda: next(late))
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert answer(f"127.0.0.1:{server.getsockname()[1]}", 5) == reach.OPEN


def test_a_watch_sees_a_socket_that_is_open_for_a_moment() -> None:
    with socket.socket() as short, socket.socket() as never:
        for one in (short, never):
            one.bind(("127.0.0.1", 0))
        targets = [f"127.0.0.1:{one.getsockname()[1]}" for one in (short, never)]
        watching = reach.Watch(["127.0.0.1:1", *targets])
        watching.name(targets[0])
        opened = threading.Timer(0.2, short.listen)
        opened.start()
        end = time.monotonic() + 5
        while not watching.opened and time.monotonic() < end:
            watching.turn()
        opened.join()
        watching.finish()
    assert [*watching.opened] == [targets[0]]
    told = watching.told()
    assert (told["named"], told["open"]) == (1, watching.opened)
    assert int(str(told["attempts"])) > int(str(told["fewest"])) >= 2


def test_a_watch_tries_what_is_named_more_often_and_forgets_nothing_of_the_rest() -> None:
    now = [0.0]
    watching = reach.Watch([f"127.0.0.1:{port}" for port in range(1, 301)], lambda: now[0])
    watching.name("127.0.0.1:1")
    for _ in range(100):
        now[0] += 0.06
        watching.turn()
    told = watching.told()
    assert told["fewest"] == 100 + watching.rounds
    assert watching.rounds >= 5
    assert watching.attempts >= watching.rounds * 300 + 100
    assert told["gaps"] == [0.06, 0.06]


def test_reach_calls_a_full_backlog_silent() -> None:
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        target = full.getsockname()
        waiting = [socket.socket() for _ in range(3)]
        for item in waiting:
            item.setblocking(False)
            item.connect_ex(target)
        assert answer(f"{target[0]}:{target[1]}", 0.3) == reach.SILENT
        for item in waiting:
            item.close()


def test_a_watcher_tells_what_was_open_until_its_input_ends() -> None:
    program = Path(reach.__file__)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))  # not listening: refused
        opened, shut = (f"127.0.0.1:{one.getsockname()[1]}" for one in (server, bound))
        done = subprocess.run(  # noqa: S603 - this interpreter
            [sys.executable, program, "--watch", opened, shut], input="", capture_output=True, text=True, check=True
        )
    found = json.loads(done.stdout)
    assert (list(found["open"]), found["rounds"] >= 1) == ([opened], True)


def test_only_what_others_could_reach_counts_as_listening() -> None:
    with socket.create_server(("0.0.0.0", 0)) as reachable, socket.create_server(("127.0.0.1", 0)) as own:  # noqa: S104
        there, hidden = reachable.getsockname(), own.getsockname()
        found = reach.listening()
    assert there in found
    assert hidden not in found


def test_a_scan_that_hardly_looked_proves_nothing() -> None:
    enough = test_race.Scan(rounds=5, named=24, fewest=20)
    test_race.looked(enough, count=6, families=2)
    for little in (replace(enough, rounds=4), replace(enough, named=23), replace(enough, fewest=19)):
        with pytest.raises(AssertionError):
            test_race.looked(little, count=6, families=2)


def test_the_withheld_scan_lasts_for_the_tries_that_it_needs() -> None:
    assert test_race.WITHHELD_SECONDS / reach._OFTEN >= 5 * test_race.MIN_TRIES


def test_scanners_are_told_an_address_that_was_a_foreign_pod_s_before(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    monkeypatch.setattr(test_race, "_say", lambda _process, text: said.append(text))
    naming = test_race.Naming("race", (1, 2), listeners=[subprocess.Popen.__new__(subprocess.Popen)])
    for namespace, name in (("other", "a"), ("race", "b"), ("race", "b")):
        naming.see("fd00::1", namespace, name)
    naming.see("<none>", "race", "c")
    assert said == ["[fd00::1]:1\n[fd00::1]:2\n"]
