"""Write the root file system of the operator's image; a step of operator/Dockerfile, run in its base image.

Taken over are Python, /packages, /app and the shared libraries that these load. So there is no shell, no pip, no
package manager and nothing setuid, whatever the base image has. What is in it is told by an SPDX document, which the
image's label io.securevllm.sbom names, and to scanners in /var/lib/dpkg/status.d, as distroless images do.

Standard library only: in the base image this file is alone. The images of tests take from it what is the same.
"""

from __future__ import annotations

import compileall
import hashlib
import importlib.metadata
import json
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import quote

PACKAGES = Path("/packages")
APPLICATION = Path("/app")
SBOM = Path("/sbom.spdx.json")

_PYTHON = f"python{sys.version_info.major}.{sys.version_info.minor}"
_LIBRARY = Path(f"/usr/local/lib/{_PYTHON}")
NOT_COPIED = (
    *("__pycache__", "site-packages", "ensurepip", "test", "tests", "idlelib", "tkinter", "_tkinter*", "turtledemo"),
    *("lib2to3", "venv", "config-*", "*.a"),
)
"""Patterns of names in Python's library that nobody needs who only runs programs."""
ACCOUNTS = {
    "etc/passwd": "root:x:0:0:root:/:/sbin/nologin\nnonroot:x:65532:65532:nonroot:/tmp:/sbin/nologin\n",
    "etc/group": "root:x:0:\nnonroot:x:65532:\n",
    "etc/nsswitch.conf": "passwd: files\ngroup: files\nhosts: files dns\n",
}
"""Users, and where they and hosts are looked up: path -> text."""
# Where the loader looks, certificates, and what distribution a scanner has before it.
_TAKEN = ("/etc/ld.so.cache", "/etc/ssl/certs/ca-certificates.crt", "/etc/os-release")


def main() -> None:
    """Write it to the folder that the command line names."""
    root = Path(sys.argv[1])
    root.mkdir()
    root.chmod(0o755)
    for name in ("/bin", "/lib", "/lib64"):  # as the base has them: links into /usr, or folders
        if Path(name).is_symlink():
            (root / name[1:]).symlink_to(Path(name).readlink())
    shutil.copytree(_LIBRARY, _below(root, _LIBRARY), symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    for folder in (PACKAGES, APPLICATION):
        shutil.copytree(folder, _below(root, folder), ignore=shutil.ignore_patterns("__pycache__"))
    shutil.rmtree(_below(root, PACKAGES) / "bin", ignore_errors=True)
    programs = _below(root, Path("/usr/local/bin"))
    programs.mkdir(parents=True)
    shutil.copy2(Path("/usr/local/bin", _PYTHON).resolve(), programs / _PYTHON)
    for alias in ("python", "python3"):
        (programs / alias).symlink_to(_PYTHON)
    taken = {Path(name).resolve() for name in _TAKEN if Path(name).exists()}
    taken |= _copy_libraries(root)
    for name in _TAKEN:
        if Path(name).exists():
            _copy(Path(name), root)
    for path, content in ACCOUNTS.items():
        (root / path).write_text(content, encoding="ascii")
    (root / "tmp").mkdir()
    (root / "tmp").chmod(0o1777)
    _compile(root)
    _tell_contents(root, taken)


def _below(root: Path, path: Path) -> Path:
    return root / path.relative_to("/")


def _copy(source: Path, root: Path) -> None:
    """Copy a file to its place, where programs look for it by this name."""
    target = _below(root, source.parent.resolve() / source.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _copy_libraries(root: Path) -> set[Path]:
    """Copy the libraries of the base that the programs and modules below `root` load; returns where they were."""
    copied: set[Path] = set()
    try:
        for _, source in loaded(root):
            if source not in copied:
                _copy(source, root)
                copied.add(source)
    except LookupError as error:
        sys.exit(str(error))
    return {path.resolve() for path in copied}


def loaded(root: Path) -> Iterator[tuple[str, Path]]:
    """Tell what the programs and modules below `root` load from elsewhere: name (empty: the loader) and place.

    Raises:
        LookupError: a library is not here; says which, and who needs it.
    """
    files = list(_elf_files(root))
    there = {path.name for path in files}
    for file in files:
        said = subprocess.run(["ldd", file], capture_output=True, text=True, check=False).stdout  # noqa: S607
        # A wheel's own libraries find each other through the module that loads them.
        if lost := set(re.findall(r"(\S+) => not found", said)) - there:
            raise LookupError(f"/{file.relative_to(root)} needs {', '.join(sorted(lost))}: not here")
        for name, found in re.findall(r"(?:(\S+) => )?(/\S+) \(0x", said):
            if not Path(found).resolve().is_relative_to(root.resolve()):
                yield name, Path(found)


def _elf_files(root: Path) -> Iterator[Path]:
    for path in sorted(root.rglob("*")):
        if path.is_file() and not path.is_symlink():
            with path.open("rb") as file:
                if file.read(4) == b"\x7fELF":
                    yield path


def _compile(root: Path) -> None:
    """Compile everything for use without writing: the root file system is read-only in the cluster."""
    mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
    if not compileall.compile_dir(
        root, quiet=1, stripdir=str(root), prependdir="/", invalidation_mode=mode, workers=os.cpu_count() or 1
    ):
        sys.exit("a module does not compile")


# ------------------------------------------------------------------------------------------------------ what is in it


def _tell_contents(root: Path, taken: Iterable[Path]) -> None:
    system = platform.freedesktop_os_release()
    listed = [_ourselves(), _python(), *_distributions(), *_debian(root, taken, system)]
    digest = hashlib.sha256(json.dumps(listed, sort_keys=True).encode()).hexdigest()
    now = datetime.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH") or datetime.now(UTC).timestamp()), UTC)
    document = {
        "spdxVersion": "SPDX-2.3",
        "dataLicense": "CC0-1.0",
        "SPDXID": "SPDXRef-DOCUMENT",
        "name": "secure-vllm-operator",
        "documentNamespace": f"https://securevllm.io/spdx/secure-vllm-operator-{digest}",
        "creationInfo": {
            "created": now.strftime("%Y-%m-%dT%H:%M:%SZ"),
            "creators": ["Tool: secure-vllm-operator-image_root"],
        },
        "packages": listed,
        "relationships": [
            _relation("SPDXRef-DOCUMENT", "DESCRIBES", listed[0]["SPDXID"]),
            *(_relation(listed[0]["SPDXID"], "DEPENDS_ON", one["SPDXID"]) for one in listed[1:]),
        ],
    }
    _below(root, SBOM).write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def _relation(one: str, kind: str, other: str) -> dict[str, str]:
    return {"spdxElementId": one, "relationshipType": kind, "relatedSpdxElement": other}


def _entry(kind: str, name: str, version: str, purl: str, license_: str = "NOASSERTION") -> dict[str, Any]:
    return {
        "SPDXID": f"SPDXRef-{kind}-{re.sub('[^A-Za-z0-9.-]', '-', name)}",
        "name": name,
        "versionInfo": version,
        "downloadLocation": "NOASSERTION",
        "filesAnalyzed": False,
        "licenseConcluded": "NOASSERTION",
        "licenseDeclared": license_,
        "copyrightText": "NOASSERTION",
        "externalRefs": [
            {"referenceCategory": "PACKAGE-MANAGER", "referenceType": "purl", "referenceLocator": f"pkg:{purl}"}
        ],
    }


def _ourselves() -> dict[str, Any]:
    code = (APPLICATION / "securevllm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "(.+)"$', code, re.MULTILINE)
    version = match[1] if match else sys.exit("the operator has no version")
    name = "secure-vllm-operator"
    return _entry("application", name, version, f"generic/{name}@{version}", "Apache-2.0")


def _python() -> dict[str, Any]:
    version = platform.python_version()
    return _entry("interpreter", "python", version, f"generic/python@{version}", "Python-2.0.1")


def _distributions() -> list[dict[str, Any]]:
    found = []
    for one in importlib.metadata.distributions(path=[str(PACKAGES)]):
        name = re.sub(r"[-_.]+", "-", one.name).lower()
        [expression, *_] = one.metadata.get_all("License-Expression") or ["NOASSERTION"]
        found.append(_entry("python", name, one.version, f"pypi/{name}@{quote(one.version)}", expression))
    return sorted(found, key=lambda entry: str(entry["name"]))


def _debian(root: Path, taken: Iterable[Path], system: dict[str, str]) -> list[dict[str, Any]]:
    """Tell whose the files are that were taken from the base; their licences and what scanners read come along."""
    names = {"ca-certificates"} if (root / "etc/ssl/certs/ca-certificates.crt").exists() else set()
    for path in taken:
        # Debian's packages name some by /lib, where they are in /usr/lib.
        for name in (str(path), str(path).removeprefix("/usr")):
            if owner := _dpkg("--search", name):
                names.add(owner.partition(":")[0])
                break
    found = []
    for name in sorted(names):
        format_ = "${Version}\t${Architecture}"
        version, _, architecture = _dpkg("--show", f"--showformat={format_}", name).partition("\t")
        status = _below(root, Path("/var/lib/dpkg/status.d", name))
        status.parent.mkdir(parents=True, exist_ok=True)
        status.write_text(_dpkg("--status", name), encoding="utf-8")
        licence = Path("/usr/share/doc", name, "copyright")
        if licence.exists():
            target = _below(root, licence)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(licence, target)
        distribution = f"{system['ID']}-{system.get('VERSION_ID', '')}"
        purl = f"deb/{system['ID']}/{name}@{quote(version, safe='')}?arch={architecture}&distro={distribution}"
        found.append(_entry("debian", name, version, purl))
    return found


def _dpkg(*arguments: str) -> str:
    command = ["dpkg-query", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


if __name__ == "__main__":
    main()
