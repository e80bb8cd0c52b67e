"""Real sdists as files, from the package index that this machine's Python tools use; cached for the user.

pypi-simple fetches a file and its hash; an installer would run the build of vLLM first.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from pypi_simple import DistributionPackage, PyPISimple

_TIMEOUT = 60
"""Seconds for one answer of the index; a file of 47 MB takes some seconds."""


def cache() -> Path:
    """Where downloads stay: the XDG cache of the user."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    folder = Path(base) / "secure-vllm-operator" / "sdists"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def sdist(project: str, version: str) -> Path:
    """The sdist of a release, verified by its hash when it is downloaded; skips the test when the index is away."""
    known = cache() / f"{project}-{version}.tar.gz"
    if known.exists():
        return known
    partial = known.with_suffix(f".part-{os.getpid()}")
    try:
        with PyPISimple() as index:
            package = _package(index, project, version)
            index.download_package(package, partial, verify=True, timeout=_TIMEOUT)
        partial.rename(known)
    except OSError as error:  # of the network; requests' errors are OSErrors
        pytest.skip(f"the sdist of {project} {version} is not cached and the package index is away: {error!r:.120}")
    finally:
        partial.unlink(missing_ok=True)
    return known


def _package(index: PyPISimple, project: str, version: str) -> DistributionPackage:
    for package in index.get_project_page(project, timeout=_TIMEOUT).packages:
        if package.package_type == "sdist" and package.version == version:
            return package
    raise AssertionError(f"{project} {version} has no sdist")
