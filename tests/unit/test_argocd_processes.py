"""Argo CD's processes in tests: none of them outlives its cluster, nor do the programs that it starts."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from e2e.cluster import daemon
from e2e.cluster.daemon import ProcessIdentity
from tests.api.argocd import in_session
from tests.api.kube import eventually

NAME = "argocd-repo-server"


@pytest.mark.parametrize("ending", ["exec sleep 600", "trap '' TERM; kill -9 $$"], ids=["runs", "has ended by itself"])
def test_a_process_ends_with_its_children(tmp_path: Path, ending: str) -> None:
    processes, told = tmp_path / "processes", tmp_path / "told"
    command = ["sh", "-c", f"sleep 600 & echo $! >$0.new; mv $0.new $0; {ending}", str(told)]
    with in_session(NAME, command, {"PATH": os.environ["PATH"]}, tmp_path / "log", processes):
        eventually(told.exists)
        child = ProcessIdentity.of(int(told.read_text(encoding="ascii")))
    eventually(lambda: not child.alive())
    assert [*processes.iterdir()] == []


def test_what_stops_the_cluster_knows_it(tmp_path: Path) -> None:
    processes = tmp_path / "processes"
    with in_session(NAME, ["sleep", "600"], {"PATH": os.environ["PATH"]}, tmp_path / "log", processes) as process:
        assert daemon.recorded(processes, NAME) == ProcessIdentity.of(process.pid)
        daemon.stop_all(processes)
        assert process.wait(30) < 0


def test_one_that_ends_at_once_can_say_why(tmp_path: Path) -> None:
    command = ["sh", "-c", "echo because; exit 3"]
    with in_session(NAME, command, {"PATH": os.environ["PATH"]}, tmp_path / "log", tmp_path / "processes") as process:
        assert process.wait(30) == 3
    assert (tmp_path / "log").read_text(encoding="ascii") == "because\n"
