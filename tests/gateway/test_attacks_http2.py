"""Every HTTP/2 attack against the hardened gateway; what counts is what the engine saw."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.gateway import attacks, attacks_h2, wire

if TYPE_CHECKING:
    from tests.gateway.engine import Seen
    from tests.gateway.gateway import Gateway

pytestmark = pytest.mark.envoy

ATTACKS = attacks_h2.h2_attacks()
Results = tuple[list[wire.Outcome], "list[Seen]"]


@pytest.fixture(scope="module")
def results(gateway: Gateway) -> Results:
    return wire.run(ATTACKS, gateway.port, gateway.engine, alpn="h2")


@pytest.mark.parametrize(
    "number", range(len(ATTACKS)), ids=[f"{attack.category}-{attack.name[:60]}" for attack in ATTACKS]
)
def test_engine_sees_only_what_is_allowed(number: int, results: Results) -> None:
    outcome, attack = results[0][number], ATTACKS[number]
    successes = [status for status in attacks_h2.statuses(outcome.answer) if status < 300]

    assert [broken for seen in outcome.seen if (broken := wire.violations(seen, attacks.ALLOWED))] == []
    assert len(outcome.seen) in ({0, attack.reaches} if attack.aborted else {attack.reaches}), outcome.answer[:300]
    assert not (attack.aborted and any(seen.complete for seen in outcome.seen))
    assert len(successes) == (0 if attack.aborted else attack.reaches)


def test_nothing_reaches_the_engine_without_a_trace(results: Results) -> None:
    assert results[1] == []


def test_there_are_enough_attacks_and_the_gateway_survived(gateway: Gateway, results: Results) -> None:
    assert len(results[0]) >= 60
    assert gateway.envoy.ready()
