"""What the reconciler is told of isolation, and the times that go with it."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

import pytest

from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.proof.evidence import Evidence, Evidences, Follows
from securevllm.proof.verdict import Proof
from securevllm.render import Observed, render
from securevllm.render.meta import Owner
from securevllm.status import Facts

if TYPE_CHECKING:
    from securevllm.proof.prober import Subject

NOW = datetime(2026, 3, 4, 12, tzinfo=UTC)
PROOF = Proof("True", "Measured", "Nothing was reached.", "2026-03-04T12:00:00Z")
WANTED = parse("llama", {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"})


def shown(ago: timedelta, status: str = "True") -> str:
    """What becomes of a ``lastVerified`` of that age; empty: it stays."""
    evidences = Evidences(cast("Any", None), cast("Follows", None), Context(), lambda: NOW, canary_pods=True)
    before = {
        "lastVerified": (NOW - ago).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "conditions": [{"type": "Isolated", "status": status, "reason": "Measured"}],
    }
    told = evidences.add(Facts(1), Evidence(PROOF), WANTED, before).verified
    return "" if told == before["lastVerified"] else told


def test_the_time_of_a_verdict_that_stays_moves_once_an_hour() -> None:
    assert shown(timedelta(minutes=59)) == ""
    assert shown(timedelta(minutes=61)) == PROOF.verified_at


def test_another_verdict_brings_its_time() -> None:
    assert shown(timedelta(minutes=1), status="False") == PROOF.verified_at


@pytest.mark.parametrize("ahead", [timedelta(hours=2), timedelta(days=30)])
def test_a_time_that_a_wrong_clock_put_into_the_future_does_not_stay_until_it_has_come(ahead: timedelta) -> None:
    assert shown(-ahead) == PROOF.verified_at


def test_clocks_that_differ_by_little_write_nothing() -> None:
    assert shown(-timedelta(minutes=1)) == ""


def test_policies_of_others_that_come_and_go_are_a_reason_to_measure_again() -> None:
    revisions = []

    class Prober:
        def follow(self, subject: Subject, before: Proof | None = None) -> None:
            assert before is None
            revisions.append(subject.revision)

    evidences = Evidences(cast("Any", None), cast("Follows", Prober()), Context(), lambda: NOW, canary_pods=True)
    owner = Owner("llama", "apps", "uid-1")
    rendered = render(owner, WANTED, Context(), Observed())
    resource = {"metadata": {"name": "llama", "namespace": "apps", "generation": 3}}
    for foreign in ("", "", "opens-everything lets everybody in", ""):
        evidences.follow(resource, owner, WANTED, rendered, b"key", evidence=Evidence(foreign=foreign))
    quiet, again, opened, gone = revisions
    assert quiet == again == gone != opened
