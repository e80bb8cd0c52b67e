"""What is read from generated Secrets. How they are made is tested on a real API server."""

from __future__ import annotations

import base64
from typing import Any

import pytest

from securevllm.generate import key_made

BORN = "2026-01-01T00:00:00Z"
AT = 1767225600.0
"""The same, in unix seconds."""


def secret(**data: str) -> dict[str, Any]:
    encoded = {name.replace("_", "-"): base64.b64encode(value.encode()).decode() for name, value in data.items()}
    return {"metadata": {"creationTimestamp": BORN}, "data": encoded}


@pytest.mark.parametrize(
    ("found", "made"),
    [
        (secret(api_key="k", made="2026-01-01T01:00:00Z"), AT + 3600),
        (secret(api_key="k"), AT),
        (secret(api_key="k", made="yesterday"), AT),
        (secret(made="2026-01-01T01:00:00Z"), None),
        (secret(api_key=""), None),
    ],
    ids=["it says when", "of an earlier release", "a person wrote there", "the key was taken out", "empty"],
)
def test_an_engine_key_is_as_old_as_it_says_or_as_its_secret(found: dict[str, Any], made: float | None) -> None:
    assert key_made(found) == made
