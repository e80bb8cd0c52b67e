"""Small libraries in place of those of CUDA that torch is linked to: without a GPU they are loaded and never called.

The package index has one torch for Linux, which does not start without 3.8 GB of CUDA libraries. A stand-in has the
name, the symbols and the versions that torch's own libraries ask for, and every function returns 1: an error.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from e2e.cluster.errors import ClusterError

_CUDA = re.compile(r"lib(?:cu(?!dart)|nccl|nvrtc|nvshmem|nvJit)\w*\.so\.\d+")
_UNVERSIONED = re.compile(r"(?:nccl|curand|cuFile|cusparseLt|cusolver|nvshmem)[A-Za-z_]")

Symbols = dict[str, dict[str, set[str]]]
"""Library -> version -> symbols; version "" has those without one."""


def make(libraries: Path) -> None:
    """Make what the libraries in this folder (`torch/lib`) need of CUDA, in the same folder.

    Raises:
        ClusterError: no gcc or readelf, or they failed.
    """
    wanted = needed({path.name: _read(path) for path in sorted(libraries.glob("*.so*"))})
    for name, versions in wanted.items():
        _compile(libraries / name, versions)


def needed(read: Mapping[str, str]) -> Symbols:
    """Tell which CUDA libraries are asked for and with which symbols.

    Args:
        read: library -> what ``readelf -dVW --dyn-syms`` says of it.
    """
    found: Symbols = {}
    unversioned: set[str] = set()
    for text in read.values():
        found |= {name: {} for name in re.findall(r"\(NEEDED\).*\[(.+?)\]", text) if _CUDA.fullmatch(name)}
    for text in read.values():
        of_version = dict(_versions(text))
        for symbol, version in _undefined(text):
            library = of_version.get(version, "")
            if library in found:
                found[library].setdefault(version, set()).add(symbol)
            elif not version and _UNVERSIONED.match(symbol):
                unversioned.add(symbol)
    if found:  # whoever has them: the loader looks in all of them
        found[min(found)][""] = unversioned
    return found


def _versions(text: str) -> Iterator[tuple[str, str]]:
    """Version and the library that it is asked of."""
    library = ""
    for line in text.splitlines():
        if match := re.search(r"File: (\S+)", line):
            library = match[1]
        elif library and (match := re.search(r"Name: (\S+) +Flags", line)):
            yield match[1], library


def _undefined(text: str) -> Iterator[tuple[str, str]]:
    """Symbols that have to come from elsewhere, and their versions."""
    for line in text.splitlines():
        columns = line.split()
        if len(columns) >= 8 and columns[6] == "UND":
            symbol, _, version = columns[7].partition("@")
            yield symbol, version


def _compile(target: Path, versions: Mapping[str, set[str]]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        source, script = Path(scratch, "stand_in.c"), Path(scratch, "stand_in.map")
        symbols = sorted(set().union(*versions.values()))
        source.write_text("".join(f"long {symbol}(void) {{ return 1; }}\n" for symbol in symbols), encoding="ascii")
        nodes = [
            f"{version} {{ global: {'; '.join(sorted(names))}; }};\n" for version, names in versions.items() if version
        ]
        script.write_text("".join(nodes), encoding="ascii")
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", f"-Wl,-soname,{target.name}"]
        _run([*command, "-o", str(target), str(source), *([f"-Wl,--version-script={script}"] if nodes else [])])


def _read(path: Path) -> str:
    return _run(["readelf", "-dVW", "--dyn-syms", str(path)])


def _run(command: list[str]) -> str:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=300).stdout
    except FileNotFoundError as error:
        raise ClusterError(f"{command[0]} is not on this machine; on Debian: apt-get install gcc binutils") from error
    except subprocess.CalledProcessError as error:
        raise ClusterError(f"`{' '.join(command)}` failed: {error.stderr.strip()}") from error
