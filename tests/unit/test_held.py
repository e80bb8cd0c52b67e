"""Which pods a gate holds back, and when to look again."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

from securevllm.proof.held import PATIENCE_SECONDS, held

NOW = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
LONG, SHORT = PATIENCE_SECONDS + 1, PATIENCE_SECONDS - 10


def pod(name: str, age: float | None, *, group: str = "", container: str = "gate", **metadata: Any) -> dict[str, Any]:
    """A pod whose gate has run for so many seconds; None: it does not run."""
    started = (NOW - timedelta(seconds=age or 0)).isoformat()
    state = {"running": {"startedAt": started}} if age is not None else {"terminated": {"exitCode": 0}}
    labels = {"securevllm.io/group": group} if group else {}
    return {
        "metadata": {"name": name, "labels": labels, **metadata},
        "status": {"initContainerStatuses": [{"name": container, "state": state}]},
    }


def test_a_gate_that_has_run_long_holds_its_pod() -> None:
    found = held([pod("b", LONG), pod("a", LONG), pod("young", SHORT), pod("through", None)], NOW)
    assert found.pods == ("a", "b")
    assert found.again == 10


def test_nobody_is_held_and_nobody_has_to_look_again() -> None:
    assert held([], NOW).again is None
    assert held([pod("through", None), {"metadata": {"name": "new", "labels": {}}}], NOW).pods == ()


def test_the_next_look_is_never_at_once() -> None:
    assert held([pod("a", PATIENCE_SECONDS - 0.1)], NOW).again == 1.0


def test_another_init_container_that_runs_long_is_no_gate() -> None:
    assert held([pod("pulls", LONG, container="pull")], NOW).pods == ()


def test_a_pod_that_goes_is_not_held() -> None:
    assert held([pod("goes", LONG, deletionTimestamp="2026-01-02T03:04:00Z")], NOW).pods == ()


def test_a_group_that_waits_for_a_member_is_no_matter_of_policies() -> None:
    waiting = [pod("m0", LONG, group="e0"), {"metadata": {"name": "m1", "labels": {"securevllm.io/group": "e0"}}}]
    assert held(waiting, NOW) == held([], NOW)
    whole = [pod("m0", LONG, group="e0"), pod("m1", SHORT, group="e0"), pod("other", SHORT, group="e1")]
    assert held(whole, NOW).pods == ("m0",)
