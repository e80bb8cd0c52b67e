"""Quantities by the grammar of apimachinery, and durations."""

from __future__ import annotations

import re
from fractions import Fraction

import pytest

from securevllm.api.units import LARGEST, QUANTITY_PATTERN, quantity, seconds


@pytest.mark.parametrize(
    ("text", "value"),
    [
        (0, 0),
        (7, 7),
        ("1.", 1),
        (".5", Fraction(1, 2)),
        ("+1.5Gi", 3 * 2**29),
        ("1n", Fraction(1, 10**9)),
        ("1u", Fraction(1, 10**6)),
        ("100m", Fraction(1, 10)),
        ("2k", 2000),
        ("2Ki", 2048),
        ("1E", 10**18),
        ("1E3", 1000),
        ("1e-3", Fraction(1, 1000)),
        ("7Ei", 7 * 2**60),
        (str(LARGEST), 2**63 - 1),
    ],
)
def test_a_quantity(text: str | int, value: int | Fraction) -> None:
    assert quantity(text) == value


@pytest.mark.parametrize(
    "text",
    ["", "Gi", ".", "1K", "1ki", "1mi", "1g", "1GiB", "1 Gi", "1Gi\n", "-1", -1, "1e", "1e999", "1.5e1.5", "\u0661"],
)
def test_no_quantity(text: str | int) -> None:
    with pytest.raises(ValueError, match="is not a quantity"):
        quantity(text)


@pytest.mark.parametrize("text", ["8Ei", "99E", "1e99", 2**63, "0.5n", "1e-10"])
def test_a_quantity_that_kubernetes_would_change(text: str | int) -> None:
    with pytest.raises(ValueError, match="beyond"):
        quantity(text)


def test_the_pattern_means_the_same_to_the_api_server() -> None:
    """Go's RE2 has no look-around, and its `$` is the end of the text."""
    assert re.search(r"\(\?|\\[1-9dws]", QUANTITY_PATTERN) is None


@pytest.mark.parametrize(("text", "value"), [("90s", 90), ("60m", 3600), ("2h", 7200)])
def test_a_duration(text: str, value: int) -> None:
    assert seconds(text) == value
