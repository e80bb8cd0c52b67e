"""The errors of this package, and the one of tests that wait."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """A cluster cannot be built, started or found; the message says what to do about it."""


class TooLate(AssertionError):  # noqa: N818 - what a test says, not what a program did wrong
    """What a test waited for did not come in time. Only this gets a second try (tools/test_tiers.py)."""
