"""Real sdists as files, from the package index that this machine's Python tools use; cached for the user.

pypi-simple fetches a file and its hash; an installer would run the build of vLLM first.
"""

from __future__ import annotations

import functools
import os
from pathlib import Path

import pytest
from pypi_simple import ProjectPage, PyPISimple

_TIMEOUT = 30
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
    page = _page(project)
    if isinstance(page, str):
        pytest.skip(f"the sdist of {project} {version} is not cached and the package index is away: {page}")
    (package,) = (one for one in page.packages if one.package_type == "sdist" and one.version == version)
    partial = known.with_suffix(f".part-{os.getpid()}")
    try:
        with PyPISimple() as index:
            index.download_package(package, partial, verify=True, timeout=_TIMEOUT)
        partial.rename(known)
    except OSError as error:  # requests' errors are OSErrors
        pytest.skip(f"the download of {project} {version} failed: {type(error).__name__}")
    finally:
        partial.unlink(missing_ok=True)
    return known


@functools.cache
def _page(project: str) -> ProjectPage | str:
    """What the index has of a project, or the kind of error; asked once: no test waits for a second time-out."""
    try:
        with PyPISimple() as index:
            return index.get_project_page(project, timeout=_TIMEOUT)
    except OSError as error:
        return type(error).__name__
