"""From facts to conditions: each reason, who wins, and what is told when."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from securevllm.errors import Problem
from securevllm.status import Facts, Failure, Fetch, Gateway, Workload, fetch, status, transitions, workload

ROOT = Path(__file__).parents[2]
NOW, LATER = "2026-01-01T00:00:00Z", "2026-01-01T00:01:00Z"
DONE = Workload(desired=2, updated=2, ready=2, replicas=2)
GOOD: dict[str, Any] = {
    "generation": 3,
    "engine": DONE,
    "gateway": DONE,
    "served": Gateway({"a": (), "b": ()}),
    "url": "https://x",
    "version": "0.33.0",
}


def failure(component: str, child: str, reason: str = "ApplyFailed") -> Failure:
    return Failure(component, child, reason, "quota")


CONTESTED = failure("isolation", "NetworkPolicy a", "DriftContested")
WRONG = Problem("spec.image", "VersionUnreadable", "no version", "Use a tag.", "a:b")


def conditions(**facts: Any) -> dict[str, dict[str, Any]]:
    found = status(Facts(**{**GOOD, **facts}), {}, NOW)["conditions"]
    return {item["type"]: item for item in found}


def test_all_is_well() -> None:
    found = conditions()
    assert {name: (item["status"], item["reason"]) for name, item in found.items()} == {
        "Accepted": ("True", "SpecAccepted"),
        "EnginesReady": ("True", "AllReady"),
        "GatewayReady": ("True", "ServingCurrentRevision"),
        "Isolated": ("Unknown", "NotMeasured"),
        "Ready": ("True", "Serving"),
        "Stalled": ("False", "SpecAccepted"),
    }
    assert all(item["observedGeneration"] == 3 for item in found.values())


OLD = "vllmVersionBelowFloor"


@pytest.mark.parametrize(
    ("facts", "reason", "told"),
    [
        ({"served": Gateway({}, reported=("0.33.0",))}, "ServingCurrentRevision", "Engines are vLLM 0.33.0."),
        ({"served": Gateway({}, reported=("0.33.0+cu130",))}, "ServingCurrentRevision", "0.33.0+cu130."),
        ({"served": Gateway({})}, "ServingCurrentRevision", "vLLM 0.33.0 is claimed by the image, not confirmed."),
        ({"served": Gateway({}), "assumed": True}, "ServingCurrentRevision", "assumed by the spec, not confirmed."),
        (
            {"served": Gateway({}, reported=("0.34.0",))},
            "VersionMismatch",
            "vLLM 0.34.0, and the image's tag says 0.33.0",
        ),
        ({"served": Gateway({}, reported=("0.33.0", "0.33.1"))}, "VersionMismatch", "0.33.0, 0.33.1"),
        ({"served": Gateway({}, reported=("0.33.1.dev3+gabc",))}, "VersionMismatch", "0.33.1.dev3+gabc"),
        # The spec says it in words: whatever the image holds. But a hole is a hole.
        ({"served": Gateway({}, reported=("0.33.1.dev3+gabc",)), "assumed": True}, "ServingCurrentRevision", "dev3"),
        ({"served": Gateway({}, reported=("0.20.0",)), "assumed": True}, "VersionMismatch", OLD),
        (
            {"served": Gateway({}, reported=("0.20.0",)), "assumed": True, "old_accepted": True},
            "ServingCurrentRevision",
            "0.20.0",
        ),
        # Two versions run while engines are replaced.
        (
            {"served": Gateway({}, reported=("0.34.0",)), "engine": Workload(2, updated=1, ready=2, replicas=2)},
            "ServingCurrentRevision",
            "0.34.0",
        ),
    ],
)
def test_the_version_that_runs_is_compared_with_the_one_that_is_claimed(
    facts: dict[str, Any], reason: str, told: str
) -> None:
    served = replace(facts["served"], stale={"a": (), "b": ()})
    found = conditions(**facts | {"served": served})
    assert found["GatewayReady"]["reason"] == reason
    assert told in found["GatewayReady"]["message"]
    assert found["Ready"]["reason"] in {reason, "Serving", "Progressing"}


def test_what_engines_said_stays_while_nobody_can_be_asked_and_nothing_else_is_claimed() -> None:
    silent = {**GOOD, "served": Gateway({"a": (), "b": ()})}
    before = status(Facts(**{**GOOD, "served": Gateway({}, reported=("0.33.0",))}), {}, NOW)
    assert before["runningVersion"] == "0.33.0"
    assert status(Facts(**silent), before, LATER)["runningVersion"] == "0.33.0"
    assert status(Facts(**{**silent, "version": "0.34.0"}), before, LATER)["runningVersion"] is None
    assert status(Facts(**{**silent, "engine": Workload(2)}), before, LATER)["runningVersion"] is None


CASES: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("Accepted", "False", "VersionUnreadable", "Use a tag.", {"problems": (WRONG,)}),
    ("Accepted", "False", "VersionUnreadable", "keeps running", {"problems": (WRONG,), "fallback": True}),
    ("Accepted", "False", "VersionUnreadable", "No earlier accepted spec", {"problems": (WRONG,), "lost": True}),
    ("EnginesReady", "False", "ApplyFailed", "quota", {"failures": (failure("isolation", "NetworkPolicy a"),)}),
    (
        "EnginesReady",
        "False",
        "ApplyFailed",
        "Deployment a: quota (1 more)",
        {"failures": (failure("engine", "Deployment a"), failure("engine", "Service b"))},
    ),
    (
        "EnginesReady",
        "False",
        "ForeignObject",
        "Deployment a",
        {"failures": (failure("engine", "Deployment a", "ForeignObject"),)},
    ),
    (
        "EnginesReady",
        "False",
        "ApplyFailed",
        "PersistentVolumeClaim",
        {"failures": (failure("fetch", "PersistentVolumeClaim a"),), "fetch": Fetch(done=False)},
    ),
    ("EnginesReady", "False", "ApplyFailed", "ConfigMap a", {"failures": (failure("operator", "ConfigMap a"),)}),
    ("EnginesReady", "False", "ScaledToZero", "0 engines", {"engine": Workload(0)}),
    ("EnginesReady", "False", "SecretMissing", "Secret t", {"unfetched": ("Secret t does not exist.",)}),
    ("EnginesReady", "False", "FetchingModel", "ErrImagePull", {"fetch": Fetch(done=False, trouble="ErrImagePull")}),
    ("EnginesReady", "False", "Progressing", "no GPU", {"engine": Workload(2, 2, 1, 2, trouble="no GPU")}),
    ("EnginesReady", "False", "Suspended", "spec.suspend", {"suspended": True}),
    ("EnginesReady", "False", "FetchingModel", "fetch Job", {"fetch": Fetch(done=False)}),
    ("EnginesReady", "False", "FetchFailed", "backoff", {"fetch": Fetch(done=False, failure="backoff")}),
    ("EnginesReady", "False", "NotCreated", "do not exist", {"engine": None}),
    ("EnginesReady", "False", "Progressing", "1 of 2 engines", {"engine": Workload(2, 2, 1, 2)}),
    ("EnginesReady", "False", "Progressing", "1 have the current", {"engine": Workload(2, 1, 2, 2)}),
    ("EnginesReady", "False", "Progressing", "2 of 2", {"engine": Workload(2, 2, 2, 2, observed=False)}),
    ("EnginesReady", "False", "Progressing", "2 of 2", {"engine": Workload(2, 2, 2, 3)}),
    ("EnginesReady", "False", "NotProgressing", "no GPU", {"engine": Workload(2, 2, 1, 2, failure="no GPU")}),
    ("EnginesReady", "True", "AllReady", "2 of 2", {"fetch": Fetch(done=True)}),
    ("GatewayReady", "False", "ApplyFailed", "quota", {"failures": (failure("gateway", "Deployment a"),)}),
    ("GatewayReady", "False", "ApplyFailed", "quota", {"failures": (failure("operator", "ConfigMap a"),)}),
    ("GatewayReady", "False", "Suspended", "policies are kept", {"suspended": True}),
    ("GatewayReady", "False", "SecretMissing", "Secret a", {"missing": ("Secret a does not exist.",)}),
    ("GatewayReady", "False", "NoClientKeys", "every request is refused. bad", {"no_keys": True, "keys": ("bad",)}),
    ("GatewayReady", "False", "NotCreated", "gateways", {"gateway": None}),
    ("GatewayReady", "False", "Progressing", "gateways", {"gateway": Workload(2, 2, 1, 2)}),
    (
        "GatewayReady",
        "False",
        "RevisionUnknown",
        "No answer on the ops port of b",
        {"served": Gateway({"a": ()}, ("b",))},
    ),
    ("GatewayReady", "False", "RevisionUnknown", "1 of 2", {"served": Gateway({"a": ()})}),
    (
        "GatewayReady",
        "False",
        "OldRevisionServed",
        "1 of 2 gateways do not serve",
        {"served": Gateway({"a": (), "b": ("rbac.yaml",)})},
    ),
    ("GatewayReady", "True", "SomeClientKeysRefused", "bad", {"keys": ("bad",)}),
    (
        "GatewayReady",
        "False",
        "NoHealthyEngine",
        "b found no healthy engine",
        {"served": Gateway({"a": (), "b": ()}, unconnected=("b",))},
    ),
    (
        "GatewayReady",
        "True",
        "ServingCurrentRevision",
        "2 of 2",
        {"served": Gateway({"a": (), "b": ()}, unconnected=("b",)), "engine": Workload(2)},
    ),
    ("Isolated", "False", "ApplyFailed", "quota", {"failures": (failure("isolation", "NetworkPolicy a"),)}),
    ("Isolated", "False", "DriftContested", "NetworkPolicy a", {"failures": (CONTESTED,)}),
    ("Isolated", "Unknown", "VerificationDisabled", "nothing is measured", {"verification": "Disabled"}),
    ("Isolated", "False", "NetworkDevices", "rdma/hca: what crosses such a network", {"devices": ("rdma/hca",)}),
    ("Ready", "False", "VersionUnreadable", "Accepted: spec.image", {"problems": (WRONG,), "suspended": True}),
    ("Ready", "False", "Suspended", "EnginesReady: ", {"suspended": True}),
    ("Ready", "False", "SecretMissing", "GatewayReady: ", {"missing": ("Secret a does not exist.",)}),
    ("Stalled", "True", "VersionUnreadable", "Use a tag.", {"problems": (WRONG,)}),
    ("Stalled", "False", "SpecAccepted", "by itself", {"engine": None}),
]


@pytest.mark.parametrize(("name", "truth", "reason", "told", "facts"), CASES)
def test_conditions(name: str, truth: str, reason: str, told: str, facts: dict[str, Any]) -> None:
    found = conditions(**facts)[name]
    assert (found["status"], found["reason"]) == (truth, reason)
    assert told in found["message"]


def test_a_policy_that_is_not_as_it_should_be_unreadies() -> None:
    assert conditions(failures=(CONTESTED,))["Ready"]["reason"] == "DriftContested"


def test_what_needs_a_person_names_the_heading_with_the_way_out() -> None:
    refused = conditions(problems=(WRONG,))
    headings = re.findall(r"^### (\w+)$", (ROOT / "docs" / "status.md").read_text(encoding="utf-8"), re.MULTILINE)
    for name in ("Accepted", "Ready"):
        found = refused[name]
        assert found["reason"] in headings
        assert found["message"].endswith(f" See docs/status.md#{found['reason'].lower()}.")
    # What goes by itself, and what is well, does not.
    assert [item["message"] for item in conditions().values() if "docs/status.md" in item["message"]] == []


def test_pages_are_where_the_platform_says() -> None:
    where = "https://docs.example.com/v1/docs"
    problem = replace(WRONG, fix="docs/guard.md lists what may be set; not mydocs/guard.md, x/docs/a.md or docs/a.txt.")
    linked = status(Facts(**GOOD | {"problems": (problem,)}), {}, NOW, where)["conditions"]
    (told,) = [item["message"] for item in linked if item["type"] == "Accepted"]
    assert f" {where}/guard.md lists what may be set; not mydocs/guard.md, x/docs/a.md or docs/a.txt." in told
    assert told.endswith(f" See {where}/status.md#{WRONG.reason.lower()}.")
    assert " docs/status.md" not in str(linked)
    # Another address is no change of a condition: whoever sets it wakes nobody.
    before = status(Facts(**GOOD | {"problems": (problem,)}), {}, NOW)["conditions"]
    assert transitions(before, linked) == []

    many = status(Facts(**GOOD | {"problems": (problem,) * 500}), {}, NOW, where)["conditions"]
    assert {len(item["message"]) for item in many if item["type"] == "Accepted"} == {4096}


def test_messages_fit() -> None:
    assert len(conditions(problems=(WRONG,) * 500)["Accepted"]["message"]) == 4096


def test_nothing_new_is_the_same_status() -> None:
    first = status(Facts(**GOOD), {}, NOW)
    assert status(Facts(**GOOD), first, LATER) == first


def test_the_time_moves_with_the_status_and_not_with_the_reason() -> None:
    first = status(Facts(**{**GOOD, "suspended": True}), {}, NOW)
    second = status(Facts(**{**GOOD, "engine": None}), first, LATER)
    times = {item["type"]: item["lastTransitionTime"] for item in second["conditions"]}
    assert times == {
        "Accepted": NOW, "EnginesReady": NOW, "GatewayReady": LATER, "Isolated": NOW, "Ready": NOW, "Stalled": NOW
    }  # fmt: skip


def test_the_rest_of_the_status() -> None:
    found = status(Facts(**{**GOOD, "outdated": ("engine",), "risks": ("x: y",), "selector": "a=b"}), {}, NOW)
    del found["conditions"]
    assert found == {
        "observedGeneration": 3, "replicas": 2, "readyReplicas": 2, "selector": "a=b", "url": "https://x",
        "vllmVersion": "0.33.0", "runningVersion": None, "advisories": [], "outdated": ["engine"],
        "acceptedRisks": ["x: y"],
    }  # fmt: skip
    assert status(Facts(generation=1), {}, NOW)["replicas"] == 0


# ------------------------------------------------------------------------------------------------------ transitions


def told(before: dict[str, Any], after: dict[str, Any]) -> list[tuple[str, bool]]:
    first = status(Facts(**{**GOOD, **before}), {}, NOW)["conditions"] if before is not GOOD else []
    second = status(Facts(**{**GOOD, **after}), {"conditions": first}, LATER)["conditions"]
    return [(change.reason, change.warning) for change in transitions(first, second)]


def test_a_repetition_is_not_told() -> None:
    for facts in ({}, {"suspended": True}, {"problems": (WRONG,)}, {"engine": None}):
        assert told(facts, facts) == []


def test_a_new_message_of_the_same_reason_is_not_told() -> None:
    assert told({"engine": Workload(2, 2, 0, 2)}, {"engine": Workload(2, 2, 1, 2)}) == []


def test_ready_is_told_once_and_its_loss_by_the_part_and_itself() -> None:
    assert told({"engine": None}, {}) == [("AllReady", False), ("Serving", False)]
    assert told({}, {"engine": None}) == [("NotCreated", False), ("NotCreated", False)]
    assert told({"engine": None}, {"engine": Workload(2)}) == [("Progressing", False)]


def test_warnings_are_what_a_person_has_to_look_at() -> None:
    assert told({}, {"problems": (WRONG,), "fallback": True}) == [
        ("VersionUnreadable", True),
        ("VersionUnreadable", True),
    ]
    assert ("DriftContested", True) in told({}, {"failures": (CONTESTED,)})
    assert "DriftContested" not in [reason for reason, _ in told({"failures": (CONTESTED,)}, {})]


def test_the_beginning_is_told_without_ready_and_unknown() -> None:
    assert told(GOOD, {"engine": None, "gateway": None}) == [
        ("SpecAccepted", False), ("NotCreated", False), ("NotCreated", False)
    ]  # fmt: skip


# ------------------------------------------------------------------------------------------------------------- facts


def test_a_deployment_is_read() -> None:
    live = {
        "metadata": {"generation": 4},
        "spec": {"replicas": 2},
        "status": {"observedGeneration": 4, "replicas": 3, "updatedReplicas": 2, "readyReplicas": 1},
    }
    assert workload(live) == Workload(desired=2, updated=2, ready=1, replicas=3)
    assert workload({"metadata": {"generation": 1}, "spec": {}}) == Workload(desired=1, observed=False)


@pytest.mark.parametrize(
    ("condition", "failure"),
    [
        ({"type": "Progressing", "status": "False", "reason": "ProgressDeadlineExceeded", "message": "late"}, "late"),
        ({"type": "ReplicaFailure", "status": "True", "reason": "FailedCreate"}, "FailedCreate"),
        ({"type": "Progressing", "status": "True", "message": "fine"}, ""),
        ({"type": "Available", "status": "False", "message": "no"}, ""),
    ],
)
def test_why_a_deployment_stands_still(condition: dict[str, str], failure: str) -> None:
    assert workload({"metadata": {}, "spec": {}, "status": {"conditions": [condition]}}).failure == failure


@pytest.mark.parametrize(
    ("job", "found"),
    [
        (None, Fetch(done=False)),
        ({}, Fetch(done=False)),
        ({"status": {"active": 1}}, Fetch(done=False)),
        ({"status": {"conditions": [{"type": "Complete", "status": "True"}]}}, Fetch(done=True)),
        ({"status": {"conditions": [{"type": "Complete", "status": "False"}]}}, Fetch(done=False)),
        ({"status": {"conditions": [{"type": "Failed", "status": "True", "message": "why"}]}}, Fetch(False, "why")),
        ({"status": {"conditions": [{"type": "Failed", "status": "True"}]}}, Fetch(False, "failed")),
    ],
)
def test_a_job_is_read(job: dict[str, Any] | None, found: Fetch) -> None:
    assert fetch(job) == found
