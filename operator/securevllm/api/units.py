"""Quantities and durations of a spec as numbers, exactly."""

from __future__ import annotations

import re
from fractions import Fraction

QUANTITY_PATTERN = r"^\+?([0-9]+(\.[0-9]*)?|\.[0-9]+)([KMGTPE]i|[numkMGTPE]|[eE][+-]?[0-9]{1,2})?$"
"""Grammar of apimachinery's resource.Quantity (pkg/api/resource/quantity.go), without negative numbers.

Exponents have two digits: more would only make numbers that Kubernetes caps, and that take long to compute.
"""

LARGEST = Fraction(2**63 - 1)
"""Kubernetes replaces larger quantities by this one."""

_FINEST = Fraction(1, 10**9)
_QUANTITY = re.compile(QUANTITY_PATTERN)
_DECIMAL = {"n": -3, "u": -2, "m": -1, "": 0, "k": 1, "M": 2, "G": 3, "T": 4, "P": 5, "E": 6}
_FACTORS = {suffix: Fraction(1000) ** power for suffix, power in _DECIMAL.items()} | {
    f"{unit}i": Fraction(1024) ** power for power, unit in enumerate("KMGTPE", 1)
}
_SECONDS = {"s": 1, "m": 60, "h": 3600}


def quantity(value: str | int) -> Fraction:
    """A Kubernetes quantity as a number.

    Raises:
        ValueError: it is none, or one that Kubernetes would round or cap.
    """
    match = _QUANTITY.fullmatch(str(value))
    if match is None:
        raise ValueError(f"{value!r} is not a quantity such as 8Gi")
    number, suffix = match[1], match[3] or ""
    factor = _FACTORS[suffix] if suffix in _FACTORS else Fraction(10) ** int(suffix[1:])
    result = Fraction(number) * factor
    if result > LARGEST or result % _FINEST:
        raise ValueError(f"{value!r} is beyond 2^63 - 1, or has more than nine decimals")
    return result


def seconds(duration: str) -> int:
    """``90s``, ``60m`` or ``2h`` in seconds."""
    return int(duration[:-1]) * _SECONDS[duration[-1]]
