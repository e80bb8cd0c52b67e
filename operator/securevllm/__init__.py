"""Secure vLLM Operator: vLLM on Kubernetes behind an exact route allowlist and isolated networks."""

from __future__ import annotations

__version__ = "0.2.0"
