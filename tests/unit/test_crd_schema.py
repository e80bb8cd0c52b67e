"""Sizes and uniqueness of lists and maps, which the models leave to the API server."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.schema import size_problems

SECRETS = [{"name": f"s{number}"} for number in range(9)]


@pytest.mark.parametrize(
    ("raw", "found"),
    [
        pytest.param({"imagePullSecrets": SECRETS[:8], "engine": {"nodeSelector": {"a": "b"}}}, [], id="nothing"),
        pytest.param({"imagePullSecrets": SECRETS}, ["spec.imagePullSecrets: at most 8, not 9"], id="a long list"),
        pytest.param(
            {"engine": {"nodeSelector": {str(number): "a" for number in range(33)}}},
            ["spec.engine.nodeSelector: at most 32, not 33"],
            id="a large map",
        ),
        pytest.param(
            {"engine": {"sharedMemory": "1" * 33}},
            ["spec.engine.sharedMemory: at most 32, not 33"],
            id="a long int-or-string",
        ),
        pytest.param(
            {"gateway": {"routes": {"profiles": ["chat", "score", "chat"]}}},
            ["spec.gateway.routes.profiles[2] 'chat': the same value twice"],
            id="a set",
        ),
        pytest.param(
            {"engine": {"env": [{"name": "A", "value": "1"}, {"name": "A", "value": "2"}]}},
            ["spec.engine.env[1] 'A': the same name twice"],
            id="a map by key",
        ),
        pytest.param({"engine": {"args": ["--a", "--a"]}}, [], id="an atomic list may repeat"),
        pytest.param(
            {"security": {"egress": [{"to": {"cidrs": ["1.1.1.1/32"] * 33}}]}},
            ["spec.security.egress[0].to.cidrs: at most 32, not 33"],
            id="within a list",
        ),
    ],
)
def test_sizes(raw: dict[str, Any], found: list[str]) -> None:
    assert [str(problem).partition(". ")[0] for problem in size_problems(raw)] == found
