"""A source tree in memory, from an sdist or a folder. Nothing is unpacked, no link is followed.

An archive is input from outside: names that leave the tree are refused, sizes are bounded before anything is read.
"""

from __future__ import annotations

import gzip
import re
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

MAX_FILE = 8 << 20
"""Bytes of one Python file; the largest of vLLM 0.33.0 has 0.3 MiB."""
MAX_TOTAL = 512 << 20
"""Bytes of all members of an archive together; vLLM 0.33.0 has 170 MiB."""
MAX_MEMBERS = 100_000
_ELSEWHERE = ("tests/", "examples/", "benchmarks/", "docs/", "tools/", "build/")


class SourceError(Exception):
    """The archive or folder cannot be read as a whole; says what it is instead."""


@dataclass
class Source:
    """Python files of a tree.

    Attributes:
        files: path below the tree's root, with slashes, to the file's bytes.
        version: release number of the tree's metadata; empty when it has none.
        problems: what could not be read, one sentence each; the rest was.
    """

    files: dict[str, bytes] = field(default_factory=dict)
    version: str = ""
    problems: list[str] = field(default_factory=list)


def read(path: Path) -> Source:
    """Read the Python files of an sdist (.tar.gz) or of a folder.

    Raises:
        SourceError: no such file, not an archive, a broken one, a bomb, or a name that leaves the tree.
    """
    if path.is_dir():
        return _folder(path)
    try:
        return _archive(path)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise SourceError(f"{path.name}: not a readable .tar.gz archive: {error}") from error
    except OSError as error:
        raise SourceError(f"{path}: {error.strerror or error}") from error


def _archive(path: Path) -> Source:
    source = Source()
    total = 0
    with tarfile.open(path, "r|gz") as archive:
        for count, member in enumerate(archive):
            total += member.size
            if count >= MAX_MEMBERS or total > MAX_TOTAL:
                raise SourceError(f"{path.name}: more than {MAX_MEMBERS} members or {MAX_TOTAL >> 20} MiB")
            parts = PurePosixPath(member.name).parts
            if ".." in parts or member.name.startswith("/"):
                raise SourceError(f"{path.name}: member {member.name!r} leaves the tree")
            inner = "/".join(parts[1:])
            if not member.isfile():
                if inner.endswith(".py"):
                    source.problems.append(f"{inner}: a link or a device, not a file")
            elif _wanted(inner):
                stream = archive.extractfile(member) if member.size <= MAX_FILE else None
                _add(source, inner, None if stream is None else stream.read())
    return source


def _folder(path: Path) -> Source:
    source = Source()
    for inner, file in _walk(path):
        if file.is_symlink():
            source.problems.append(f"{inner}: a link or a device, not a file")
        else:
            _add(source, inner, file.read_bytes() if file.stat().st_size <= MAX_FILE else None)
    return source


def _walk(path: Path) -> Iterator[tuple[str, Path]]:
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path).as_posix()
        if _wanted(inner) and not file.is_dir():
            yield inner, file


def _wanted(inner: str) -> bool:
    """Python below a package's folder; tests, examples and build scripts are on no server."""
    if inner == "PKG-INFO":
        return True
    return inner.endswith(".py") and "/" in inner and not inner.startswith(_ELSEWHERE)


def _add(source: Source, inner: str, data: bytes | None) -> None:
    if data is None:
        source.problems.append(f"{inner}: larger than {MAX_FILE >> 20} MiB")
    elif inner == "PKG-INFO":
        match = re.search(rb"^Version: (\S+)", data, re.MULTILINE)
        source.version = match[1].decode() if match else ""
    else:
        source.files[inner] = data
