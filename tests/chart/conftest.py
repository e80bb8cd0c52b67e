"""The real helm and the real kustomize, without a cluster."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def values_file(tmp_path: Path) -> Path:
    """Give a path for values of a test."""
    return tmp_path / "values.yaml"
