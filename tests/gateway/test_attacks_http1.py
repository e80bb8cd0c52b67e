"""Every HTTP/1 attack against the hardened gateway; what counts is what the engine saw."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from tests.gateway import attacks, wire
from tests.gateway.gateway import MODEL, Gateway, started

if TYPE_CHECKING:
    from tests.gateway.engine import Seen

pytestmark = pytest.mark.envoy

ATTACKS = attacks.h1_attacks()
Results = tuple[list[wire.Outcome], "list[Seen]"]


@pytest.fixture(scope="module", params=[True, False], ids=["tls", "plain"])
def gateway(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, certificate: tuple[str, str]
) -> Iterator[Gateway]:
    with started(
        dataclasses.replace(MODEL, tls=request.param), tmp_path_factory.mktemp("gateway"), certificate
    ) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def results(gateway: Gateway) -> Results:
    return wire.run(ATTACKS, gateway.port, gateway.engine, tls=gateway.envoy.model.tls)


@pytest.mark.parametrize(
    "number", range(len(ATTACKS)), ids=[f"{attack.category}-{attack.name[:60]}" for attack in ATTACKS]
)
def test_engine_sees_only_what_is_allowed(number: int, results: Results) -> None:
    outcome, attack = results[0][number], ATTACKS[number]

    assert [
        wire.violations(seen, attacks.ALLOWED) for seen in outcome.seen if wire.violations(seen, attacks.ALLOWED)
    ] == []
    assert len(outcome.seen) in ({0, attack.reaches} if attack.aborted else {attack.reaches}), outcome.answer[:300]
    assert not (attack.aborted and any(seen.complete for seen in outcome.seen))
    assert outcome.answer.count(b"HTTP/1.1 2") == (0 if attack.aborted else sum(seen.complete for seen in outcome.seen))


def test_nothing_reaches_the_engine_without_a_trace(results: Results) -> None:
    assert results[1] == []


def test_there_are_enough_attacks_and_the_gateway_survived(gateway: Gateway, results: Results) -> None:
    assert len(results[0]) >= 250
    assert gateway.envoy.ready()
