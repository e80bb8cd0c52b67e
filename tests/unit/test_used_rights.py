"""The tier `rights`: a right that no test uses fails, and so does a rule that says more than a test can use."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest

from tests.api import rights
from tests.api.operator_process import USER

INSTALLED = rights._installed()
NEEDED = sorted(rights.granted(INSTALLED) - rights.NEVER_ASKED.keys())


def evidence(folder: Path, *parts: list[rights.Right]) -> Path:
    for number, part in enumerate(parts):
        (folder / f"cluster-{number}.json").write_text(json.dumps(part), encoding="utf-8")
    return folder


def test_what_several_clusters_saw_counts_together(tmp_path: Path) -> None:
    assert rights.main([str(evidence(tmp_path, NEEDED[::2], NEEDED[1::2]))]) == 0


@pytest.mark.parametrize("right", NEEDED, ids="-".join)
def test_every_right_has_to_be_used(tmp_path: Path, right: rights.Right, capsys: pytest.CaptureFixture[str]) -> None:
    used = [other for other in NEEDED if other != right]
    assert rights.main([str(evidence(tmp_path, used))]) == 1
    assert f"no API test makes the operator {right[2]} {right[1]}" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["apiGroups", "resources", "verbs"])
def test_a_wildcard_is_used_by_nobody(tmp_path: Path, part: str) -> None:
    wide = copy.deepcopy(INSTALLED)
    wide[0]["rules"][0][part] = ["*"]
    assert rights.unused(evidence(tmp_path, NEEDED), wide)


def test_no_evidence_is_no_pass(tmp_path: Path) -> None:
    assert rights.main([str(tmp_path)]) == 1


def asked(verb: str = "list", **changed: Any) -> dict[str, Any]:
    event = {
        "verb": verb,
        "user": {"username": USER},
        "userAgent": "securevllm-operator/1",
        "requestURI": "/api/v1/pods",
        "requestReceivedTimestamp": "2026-01-01T00:00:00.000000Z",
        "objectRef": {"resource": "pods"},
        "responseStatus": {"code": 200},
    }
    return event | changed


def test_only_what_the_operator_itself_was_given_is_remembered(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused = {"annotations": {"authorization.k8s.io/decision": "forbid"}}
    applied = asked("patch", responseStatus={"code": 201})
    monkeypatch.delenv(rights.FOLDER, raising=False)
    rights.remember("one", [asked()])
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setenv(rights.FOLDER, str(tmp_path / "used"))
    rights.remember("one", [asked(), applied, asked("get", userAgent="test"), asked("delete", **refused)])
    found = json.loads((tmp_path / "used" / "one.json").read_text(encoding="utf-8"))
    assert found == [["", "pods", "create"], ["", "pods", "list"], ["", "pods", "patch"]]
    assert rights.forbidden([asked(), asked("delete", **refused)]) == [
        "delete /api/v1/pods at 2026-01-01T00:00:00.000000Z"
    ]
