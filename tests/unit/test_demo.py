"""The demo's own parts: which one is shown, how it waits, and that it does not pass over what went wrong."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from e2e.cluster import ClusterError, lifecycle, nodes
from e2e.demo import __main__ as command
from e2e.demo import hollow, scenes, tell
from e2e.demo.tell import DemoError, Table, Teller


@pytest.fixture
def local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SVLLM_KUBECONFIG", raising=False)
    monkeypatch.setenv("SVLLM_CLUSTER", "local")


@pytest.mark.usefixtures("local")
def test_real_nodes_are_taken_where_they_can_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nodes, "at_once", lambda: True)
    assert command.stage() == ("nodes", "")


@pytest.mark.usefixtures("local")
def test_without_the_nodes_programs_nobody_waits_for_a_build_and_one_line_says_what_to_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(nodes, "at_once", lambda: False)
    where, why = command.stage()
    assert where == "hollow"
    assert "make e2e-deps" in why
    assert "\n" not in why


def test_another_provider_has_the_demo_without_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lifecycle, "choose_provider", lambda: "kind")
    monkeypatch.setattr(nodes, "at_once", lambda: True)
    assert command.stage() == ("hollow", "")


def test_nodes_do_not_start_at_once_with_an_empty_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert not nodes.at_once()


@pytest.mark.parametrize("error", [DemoError("gone"), ClusterError("gone")])
def test_what_stops_the_demo_is_told_with_exit_code_one(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def show(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(hollow, "show", show)
    assert command.main(["--on", "hollow"]) == 1
    assert "The demo stopped: gone" in capsys.readouterr().err


def test_a_long_wait_is_told_and_ends(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(tell, "_AGAIN", 0.0)
    answers = iter([None, None, "there"])
    assert Teller().until(lambda: next(answers), "it is there") == "there"
    assert "... waiting until it is there" in capsys.readouterr().out
    monkeypatch.setattr(tell, "_WAIT", 0.0)
    with pytest.raises(DemoError, match="it is there"):
        Teller().until(lambda: None, "it is there")


def test_a_row_that_is_not_as_expected_is_shown_and_stops_the_demo(capsys: pytest.CaptureFixture[str]) -> None:
    table = Table(("who", "answer"))
    table.add(("attacker", "open"), found="open", expected="silent")
    with pytest.raises(DemoError, match="attacker: open instead of silent"):
        table.show(Teller())
    assert "attacker  open" in capsys.readouterr().out


def test_a_stream_is_summed_up_and_has_to_end() -> None:
    chunk = json.dumps({"choices": [{"delta": {"content": "Hello"}}]})
    whole = f"data: {chunk}\n\ndata: {chunk}\n\ndata: [DONE]\n\n"
    assert scenes.streamed(whole) == "3 events: HelloHello"
    with pytest.raises(DemoError, match="DONE"):
        scenes.streamed(whole[:-20])
