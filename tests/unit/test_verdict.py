"""What proves what: rounds and their verdicts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from securevllm.proof.verdict import Asked, Control, Question, Round, Sample, Vantage, judge, merged
from securevllm.proof.wire import Reach

OPERATOR, CANARY = Vantage.OPERATOR, Vantage.CANARY


def sample(vantage: Vantage = OPERATOR, reach: Reach = Reach.SILENT, **fields: Any) -> Sample:
    told: dict[str, Any] = {"pod": "llama-0", "node": "n1", "port": 8000, "socket": "api", **fields}
    return Sample(vantage, reach=reach, **told)


def control(vantage: Vantage, reach: Reach = Reach.OPEN, node: str = "n1", port: int = 8000) -> Control:
    return Control(vantage, node, port, reach)


def asked(answer: Asked = Asked.REFUSED, path: str = "/sleep") -> Question:
    return Question("llama-gateway-0", "GET", path, keyed=True, asked=answer)


GOOD = Round(
    samples=(sample(OPERATOR), sample(CANARY, Reach.REFUSED)),
    controls=(control(OPERATOR), control(CANARY)),
    questions=(asked(), asked(path="/metrics")),
    targets=1,
    limits=("random ports", "UDP"),
    complete=True,
)
TRUE = judge(GOOD, None)
OPENED = sample(reach=Reach.OPEN)

TABLE: dict[str, tuple[Round, str, str, str]] = {
    "isolated": (GOOD, "True", "Measured", "Not measured: random ports, UDP."),
    "an ICMP error is blocked as well": (
        replace(GOOD, samples=(sample(OPERATOR, Reach.REFUSED), sample(CANARY, Reach.REFUSED))),
        "True",
        "Measured",
        "The gateways refuse 2 forbidden requests.",
    ),
    "what had to be tried and was not is not isolated": (
        replace(GOOD, wanted=(sample().attempt, *(sample(pod=f"llama-{number}").attempt for number in range(1, 8)))),
        "Unknown",
        "NotAllTried",
        "of 8 attempts 7 were not made, or their targets changed meanwhile: llama-1 port 8000",
    ),
    "all that had to be tried is shut": (
        replace(GOOD, wanted=(sample(OPERATOR).attempt, sample(CANARY).attempt)),
        "True",
        "Measured",
        "of 1 of 1 pods",
    ),
    "a breach is one, however much was not tried": (
        replace(GOOD, samples=(OPENED,), wanted=(sample(CANARY, pod="llama-9").attempt,)),
        "False",
        "EngineReachable",
        "llama-0",
    ),
    "reachable from the operator": (
        replace(GOOD, samples=(OPENED, sample(CANARY))),
        "False",
        "EngineReachable",
        "llama-0 port 8000 (api) from the operator can be reached",
    ),
    "reachable from the namespace only": (
        replace(GOOD, samples=(sample(), sample(CANARY, Reach.OPEN))),
        "False",
        "EngineReachable",
        "from a canary pod of the same namespace",
    ),
    "a port of a gateway is no engine's": (
        replace(GOOD, samples=(*GOOD.samples, replace(OPENED, pod="llama-gateway-0", port=9903, gateway=True))),
        "False",
        "GatewayReachable",
        "the network does not enforce the NetworkPolicies. No engine was reached so far.",
    ),
    "an engine counts more than a gateway": (
        replace(GOOD, samples=(OPENED, replace(OPENED, pod="llama-gateway-0", port=9903, gateway=True))),
        "False",
        "EngineReachable",
        "llama-0 port 8000 (api) from the operator can be reached",
    ),
    "reachable needs no control": (Round(samples=(OPENED,), targets=1), "False", "EngineReachable", "llama-0"),
    "reachable although nothing else could be measured": (
        Round(samples=(OPENED,), targets=1, lacking=("Canary pods are turned off.",), complete=True),
        "False",
        "EngineReachable",
        "llama-0",
    ),
    "a pod that was replaced meanwhile says nothing": (
        replace(GOOD, samples=(replace(OPENED, steady=False), sample(OPERATOR), sample(CANARY))),
        "True",
        "Measured",
        "of 1 of 1 pods",
    ),
    "only pods that were replaced meanwhile": (
        replace(GOOD, samples=(sample(OPERATOR, steady=False), sample(CANARY, steady=False))),
        "Unknown",
        "NoControl",
        "Nothing was tried from the operator.",
    ),
    "an egress deny at the source looks like isolation": (
        replace(GOOD, controls=(control(OPERATOR, Reach.SILENT), control(CANARY))),
        "Unknown",
        "NoControl",
        "port 8000 on node n1 from the operator",
    ),
    "the control was on another port": (
        replace(GOOD, controls=(control(OPERATOR, port=9902), control(CANARY))),
        "Unknown",
        "NoControl",
        "silence proves nothing",
    ),
    "the control was on another node": (
        replace(GOOD, controls=(control(OPERATOR, node="n2"), control(CANARY))),
        "Unknown",
        "NoControl",
        "silence proves nothing",
    ),
    "the control was of another vantage point": (
        replace(GOOD, controls=(control(CANARY),)),
        "Unknown",
        "NoControl",
        "from the operator",
    ),
    "no canary pod by a quota": (
        Round(
            samples=(sample(),),
            questions=(asked(),),
            targets=1,
            lacking=("Canary pods cannot be made: exceeded quota.",),
            complete=True,
        ),
        "Unknown",
        "NoControl",
        "exceeded quota",
    ),
    "no engine": (replace(GOOD, samples=(), controls=(), targets=0), "Unknown", "NothingToMeasure", "No engine"),
    "a forbidden route came through": (
        replace(GOOD, questions=(asked(), asked(Asked.PASSED, "/metrics"))),
        "False",
        "ForbiddenRouteOpen",
        "GET /metrics at llama-gateway-0",
    ),
    "a gateway says nothing clear": (
        replace(GOOD, questions=(asked(), asked(Asked.UNCLEAR))),
        "Unknown",
        "GatewayNotAsked",
        "No clear answer from llama-gateway-0.",
    ),
    "no gateway is ready": (replace(GOOD, questions=None), "Unknown", "GatewayNotAsked", "None is ready."),
    "the first cheap round": (Round(samples=(sample(),), targets=1), "Unknown", "NotMeasured", "under way"),
}


@pytest.mark.parametrize("case", TABLE)
def test_table(case: str) -> None:
    seen, status, reason, told = TABLE[case]
    proof = judge(seen, None)
    assert (proof.status, proof.reason) == (status, reason)
    assert told in proof.message


def test_a_round_without_canary_pods_keeps_what_it_does_not_contradict() -> None:
    cheap = Round(samples=(sample(),), targets=1)
    broken = judge(Round(samples=(OPENED,), targets=1), TRUE)
    assert judge(cheap, TRUE) == TRUE
    assert broken.reason == "EngineReachable"
    assert judge(cheap, broken) == broken  # only a complete round takes a breach back
    assert judge(GOOD, broken) == TRUE


def test_a_gateway_without_engines_does_not_take_back_that_a_route_was_open() -> None:
    """In mode Enforce the endpoints are gone, and it answers 503: the finding must not end itself."""
    opened = judge(replace(GOOD, questions=(asked(Asked.PASSED),)), TRUE)
    assert judge(replace(GOOD, questions=(asked(Asked.UNCLEAR),)), opened) == opened
    assert judge(GOOD, opened) == TRUE


def test_the_message_does_not_depend_on_order_or_time() -> None:
    again = replace(
        GOOD, samples=GOOD.samples[::-1], controls=GOOD.controls[::-1], questions=(GOOD.questions or ())[::-1]
    )
    assert judge(again, None) == TRUE
    assert replace(TRUE, verified_at="2026-01-01T00:00:00Z") == TRUE


def test_a_long_list_is_cut() -> None:
    many = tuple(sample(reach=Reach.OPEN, pod=f"llama-{number}") for number in range(9))
    assert "and 4 more" in judge(Round(samples=many, targets=9), None).message


def test_unknown_is_no_breach() -> None:
    statuses = {case: judge(row[0], None).status for case, row in TABLE.items()}
    assert set(statuses.values()) == {"True", "False", "Unknown"}
    breached = {proof.reason for proof in (judge(row[0], None) for row in TABLE.values()) if proof.breached}
    assert breached == {"EngineReachable", "GatewayReachable", "ForbiddenRouteOpen"}


def test_parts_of_a_round_are_judged_as_one_each_with_its_own_controls() -> None:
    here = replace(GOOD, targets=2, lacking=("No canary pod on n3.",))
    there = replace(
        GOOD,
        samples=(sample(OPERATOR, pod="llama-1", node="n2"), sample(CANARY, pod="llama-1", node="n2")),
        controls=(control(OPERATOR, node="n2"), control(CANARY, node="n2")),
        targets=2,
        lacking=("No canary pod on n3.", "No canary pod on n4."),
    )
    found = judge(merged((here, there)), None)
    assert (found.status, found.reason) == ("True", "Measured")
    assert "of 2 of 2 pods on 2 nodes" in found.message
    assert found.message.count("No canary pod on n3.") == found.message.count("No canary pod on n4.") == 1
    alone = replace(there, controls=())
    assert judge(merged((here, alone)), None).reason == "NoControl", "the controls of a part are of its own nodes"
    opened = replace(there, samples=(replace(OPENED, node="n2"),))
    assert judge(merged((opened, here)), None).reason == "EngineReachable"


def test_a_control_of_one_family_of_addresses_says_nothing_about_the_other() -> None:
    """A plugin may enforce one of two families only, or the source may have a way out by one only."""
    addresses = ("10.0.0.1", "fd00::1")
    both = replace(
        GOOD,
        samples=tuple(sample(vantage, address=address) for vantage in (OPERATOR, CANARY) for address in addresses),
        controls=tuple(
            replace(control(vantage), address=address) for vantage in (OPERATOR, CANARY) for address in addresses
        ),
    )
    assert judge(both, None).status == "True"
    for missing in both.controls:
        proof = judge(replace(both, controls=tuple(item for item in both.controls if item != missing)), None)
        assert (proof.status, proof.reason) == ("Unknown", "NoControl")
        assert ("(IPv6)" in proof.message) == (":" in missing.address)
    opened = replace(both, samples=(*both.samples[:-1], replace(both.samples[-1], reach=Reach.OPEN)))
    assert judge(opened, None).reason == "EngineReachable"
