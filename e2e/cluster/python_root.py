"""Layers with this machine's Python, packages of a lock file, and source folders; for `images`.

A distribution's image cannot be had without a registry. The interpreter that runs this is copied with its standard
library and the shared libraries that both need; there is no shell and nothing else. Everything is compiled when it is
packed: root file systems are read-only in the cluster, and file times are not kept.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import platform
import py_compile
import shutil
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from e2e.cluster.errors import ClusterError
from e2e.cluster.images import Layer
from tools.image_root import ACCOUNTS, NOT_COPIED, loaded

PACKAGES = "/packages"
APPLICATION = "/app"

_VERSION = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY = f"usr/local/lib/{_VERSION}"
# Loaded by name, so that no ELF header mentions them.
_RESOLVER = ("libnss_files.so.2", "libnss_dns.so.2", "libresolv.so.2")


def interpreter() -> Layer:
    """Python, its standard library and the C library, with the folders and files that a container expects."""
    made_of = f"{sys.version} {' '.join(platform.libc_ver())} {NOT_COPIED} {sorted(ACCOUNTS.items())}"
    return Layer("python", made_of, _fill_interpreter)


def packages(lock: Path) -> Layer:
    """The packages of a lock file with hashes, in `PACKAGES`; wheels only."""

    def fill(root: Path) -> None:
        target = root / PACKAGES.lstrip("/")
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-compile", "--disable-pip-version-check"]
        command += ["--require-hashes", "--no-deps", "--only-binary", ":all:"]
        command += ["--target", str(target), "--requirement", str(lock)]
        result = subprocess.run(command, capture_output=True, text=True, check=False, timeout=900)
        if result.returncode != 0:
            raise ClusterError(f"`{' '.join(command)}` failed: {result.stderr.strip()}")
        shutil.rmtree(target / "bin", ignore_errors=True)
        add_libraries(root)
        compile_all(root)

    return Layer("packages", f"{sys.version} {hashlib.sha256(lock.read_bytes()).hexdigest()}", fill)


def installed(distribution: str) -> Layer:
    """A package of this environment with all that it requires, in `PACKAGES`."""
    found: dict[str, importlib.metadata.Distribution] = {}
    _collect(distribution, found)

    def fill(root: Path) -> None:
        target = root / PACKAGES.lstrip("/")
        for one in found.values():
            for file in one.files or ():
                # Programs are beside site-packages; what was compiled is compiled again.
                if ".." not in file.parts and "__pycache__" not in file.parts:
                    copy = target / file
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    shutil.copyfile(str(one.locate_file(file)), copy)
        add_libraries(root)
        compile_all(root)

    versions = sorted(f"{name}=={one.version}" for name, one in found.items())
    return Layer(distribution, f"{sys.version} {' '.join(versions)}", fill)


def _collect(name: str, found: dict[str, importlib.metadata.Distribution]) -> None:
    key = canonicalize_name(name)
    if key in found:
        return
    found[key] = importlib.metadata.distribution(name)
    for text in found[key].requires or ():
        requirement = Requirement(text)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            _collect(requirement.name, found)


def sources(name: str, files: Mapping[str, Path | str]) -> Layer:
    """Files and folders of this repository, compiled.

    Args:
        name: Of the layer.
        files: Path in the image -> what is there: a file or folder, or the text of an executable script.
    """

    def fill(root: Path) -> None:
        for path, content in files.items():
            target = root / path.lstrip("/")
            target.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                target.write_text(content, encoding="utf-8")
                target.chmod(0o755)
            elif content.is_dir():
                shutil.copytree(content, target, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copyfile(content, target)
        compile_all(root)

    return Layer(name, f"{sys.version} {digest(files)}", fill)


def add_libraries(root: Path) -> None:
    """Copy the shared libraries that the programs and libraries below `root` need and that are not there."""
    for name, source in _libraries(root).items():
        target = root / name.lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target)


def _libraries(root: Path) -> dict[str, Path]:
    """Return path in the image -> file on this machine."""
    try:
        # The loader is named by its path; the others are looked for where the loader looks first.
        return {
            str(found) if not name else f"/lib/{platform.machine()}-linux-gnu/{Path(name).name}": found.resolve()
            for name, found in loaded(root)
        }
    except LookupError as error:
        raise ClusterError(str(error)) from error


def compile_all(root: Path) -> None:
    """Compile every module below `root`, for use without writing and without comparing file times.

    Raises:
        ClusterError: A module does not compile.
    """
    if not compile_below(root, "/"):
        raise ClusterError(f"a module below {root} does not compile: python -m compileall tells which")


def compile_below(root: Path, place: str) -> bool:
    """Compile what compiles below `root`, which will be at `place`; whether that was everything."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    return bool(
        compileall.compile_dir(root, quiet=2, stripdir=str(root), prependdir=place, invalidation_mode=mode, workers=2)
    )


def copy_interpreter(root: Path) -> None:
    """Copy Python and its standard library to `/usr/local`, without what they load."""
    prefix = Path(sys.base_prefix)
    (root / "usr/local/bin").mkdir(parents=True, exist_ok=True)
    shutil.copytree(
        prefix / "lib" / _VERSION, root / _LIBRARY, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED)
    )
    shutil.copy2((prefix / "bin" / _VERSION).resolve(), root / "usr/local/bin" / _VERSION)
    for alias in ("python", "python3"):
        (root / "usr/local/bin" / alias).symlink_to(_VERSION)


def libraries(root: Path) -> set[Path]:
    """Return where this machine has the shared libraries that the programs and libraries below `root` load.

    Raises:
        ClusterError: One is not on this machine.
    """
    return set(_libraries(root).values())


def _fill_interpreter(root: Path) -> None:
    for folder in ("etc", "proc", "sys", "dev", APPLICATION.lstrip("/")):
        (root / folder).mkdir(parents=True)
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    copy_interpreter(root)
    for name, content in ACCOUNTS.items():
        (root / name).write_text(content, encoding="utf-8")
    certificates = Path("/etc/ssl/certs/ca-certificates.crt")
    if certificates.exists():
        (root / "etc/ssl/certs").mkdir(parents=True)
        shutil.copy2(certificates, root / "etc/ssl/certs")
    add_libraries(root)
    libraries = root / f"lib/{platform.machine()}-linux-gnu"
    for name in _RESOLVER:
        source = Path("/", libraries.relative_to(root), name)
        if source.exists():
            shutil.copy2(source.resolve(), libraries / name)
    compile_all(root)


def digest(files: Mapping[str, Path | str]) -> str:
    """Hash names and content; see `sources`."""
    hashed = hashlib.sha256()
    for target, content in sorted(files.items()):
        if isinstance(content, str):
            hashed.update(f"{target}\0{content}\0".encode())
            continue
        for path in sorted(content.rglob("*")) if content.is_dir() else [content]:
            if path.is_file() and "__pycache__" not in path.parts:
                hashed.update(
                    f"{target}\0{path.relative_to(content)}\0{hashlib.sha256(path.read_bytes()).hexdigest()}\0".encode()
                )
    return hashed.hexdigest()
