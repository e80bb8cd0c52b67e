"""The one error of this package."""

from __future__ import annotations


class ClusterError(RuntimeError):
    """A cluster cannot be built, started or found; the message says what to do about it."""
