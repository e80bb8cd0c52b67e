"""Volumes as kubelet materialises them, in folders.

ConfigMap, Secret, projected and downward API volumes are written like kubelet's atomic writer does (Kubernetes 1.36,
pkg/volume/util/atomic_writer.go): the files are in a folder with a time in its name, `..data` is a symlink to it that
is swapped by one rename, and each top-level name is a symlink through `..data`. A reader sees the old set of files or
the new one; a watcher of the volume's folder (Envoy's `watched_directory`) sees the rename of `..data`. Unchanged
content writes nothing.

Modes are kubelet's; owners are not: everything belongs to the user that runs this.
"""

from __future__ import annotations

import base64
import shutil
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

DEFAULT_MODE = 0o644
DATA = "..data"


@dataclass(frozen=True)
class File:
    """One file of a volume: its bytes and its mode."""

    content: bytes
    mode: int = DEFAULT_MODE


Payload = dict[str, File]
"""Relative path -> file."""


class VolumeError(ValueError):
    """A volume cannot be made yet, or ever; kubelet would leave the pod in ContainerCreating."""


@dataclass(frozen=True)
class Sources:
    """Where the content of volumes comes from.

    Attributes:
        config_map: Name -> ConfigMap of the pod's namespace, or None.
        secret: Name -> Secret of the pod's namespace, or None.
        token: TokenRequest spec -> a token of the pod's service account.
        fields: Field path -> value, for the downward API.
    """

    config_map: Callable[[str], Awaitable[dict[str, Any] | None]]
    secret: Callable[[str], Awaitable[dict[str, Any] | None]]
    token: Callable[[dict[str, Any]], Awaitable[str]]
    fields: Mapping[str, str]


async def payload(volume: Mapping[str, Any], sources: Sources) -> Payload | None:
    """Collect the files of a volume (core/v1 Volume); None for a volume that is an ordinary folder.

    Raises:
        VolumeError: A source is missing and not optional, or the kind of volume is not supported.
    """
    name = volume["name"]
    if "emptyDir" in volume or "persistentVolumeClaim" in volume:
        return None
    if projected := volume.get("projected"):
        mode = projected.get("defaultMode", DEFAULT_MODE)
        files: Payload = {}
        for source in projected.get("sources", []):
            files |= await _source(name, source, mode, sources)
        return files
    for kind in ("configMap", "secret", "downwardAPI"):
        if source := volume.get(kind):
            # A Secret volume calls it secretName, a projected source name.
            named = {"name": source["secretName"], **source} if kind == "secret" else source
            return await _source(name, {kind: named}, source.get("defaultMode", DEFAULT_MODE), sources)
    kinds = ", ".join(sorted(set(volume) - {"name"}))
    raise VolumeError(f"volume {name}: the hollow node has no {kinds} volumes")


async def _source(volume: str, source: Mapping[str, Any], mode: int, sources: Sources) -> Payload:
    if wanted := source.get("configMap"):
        found = await sources.config_map(wanted["name"])
        data = None if found is None else _config_map_data(found)
        return _selected(volume, f"ConfigMap {wanted['name']}", wanted, data, mode)
    if wanted := source.get("secret"):
        found = await sources.secret(wanted["name"])
        data = None if found is None else _decoded(found.get("data"))
        return _selected(volume, f"Secret {wanted['name']}", wanted, data, mode)
    if wanted := source.get("downwardAPI"):
        files: Payload = {}
        for item in wanted.get("items", []):
            path = item.get("fieldRef", {}).get("fieldPath")
            if path not in sources.fields:
                raise VolumeError(f"volume {volume}: the hollow node does not know {path or 'resourceFieldRef'}")
            files[item["path"]] = File(sources.fields[path].encode(), item.get("mode", mode))
        return files
    if wanted := source.get("serviceAccountToken"):
        request = {"expirationSeconds": wanted.get("expirationSeconds", 3600)}
        if audience := wanted.get("audience"):
            request["audiences"] = [audience]
        return {wanted["path"]: File((await sources.token(request)).encode(), mode)}
    raise VolumeError(f"volume {volume}: the hollow node does not project {', '.join(source)}")


def _config_map_data(config_map: Mapping[str, Any]) -> dict[str, bytes]:
    text = {key: value.encode() for key, value in (config_map.get("data") or {}).items()}
    return text | _decoded(config_map.get("binaryData"))


def _decoded(data: Mapping[str, str] | None) -> dict[str, bytes]:
    return {key: base64.b64decode(value) for key, value in (data or {}).items()}


def _selected(volume: str, what: str, wanted: Mapping[str, Any], data: dict[str, bytes] | None, mode: int) -> Payload:
    optional = wanted.get("optional", False)
    if data is None:
        if optional:
            return {}
        raise VolumeError(f"volume {volume}: {what} not found")
    items = wanted.get("items")
    if not items:
        return {key: File(content, mode) for key, content in data.items()}
    files: Payload = {}
    for item in items:
        if item["key"] in data:
            files[item["path"]] = File(data[item["key"]], item.get("mode", mode))
        elif not optional:
            raise VolumeError(f"volume {volume}: {what} has no key {item['key']}")
    return files


def write(folder: Path, files: Payload) -> bool:
    """Make `folder` hold exactly `files`; tell whether anything changed.

    Raises:
        VolumeError: A path leaves the folder, or begins with `..`.
    """
    for path in files:
        parts = PurePosixPath(path).parts
        if not parts or path.startswith("/") or ".." in parts or parts[0].startswith(".."):
            raise VolumeError(f"{path!r} is not a path inside a volume")
    folder.mkdir(parents=True, exist_ok=True)
    if read(folder) == files:
        return False
    old = folder / (folder / DATA).readlink() if (folder / DATA).is_symlink() else None
    new = Path(tempfile.mkdtemp(prefix=time.strftime("..%Y_%m_%d_%H_%M_%S.", time.gmtime()), dir=folder))
    new.chmod(0o755)
    for path, file in files.items():
        target = new / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(file.content)
        target.chmod(file.mode)
    temporary = folder / f"{DATA}_tmp"
    temporary.unlink(missing_ok=True)
    temporary.symlink_to(new.name)
    temporary.rename(folder / DATA)
    visible = {PurePosixPath(path).parts[0] for path in files}
    for name in visible:
        if not (folder / name).is_symlink():
            (folder / name).symlink_to(f"{DATA}/{name}")
    for entry in folder.iterdir():
        if not entry.name.startswith("..") and entry.name not in visible:
            entry.unlink()
    if old:
        shutil.rmtree(old)
    return True


def read(folder: Path) -> Payload | None:
    """Read back what `write` wrote, or None when nothing was written yet."""
    data = folder / DATA
    if not data.is_symlink():
        return None
    return {
        str(path.relative_to(data)): File(path.read_bytes(), path.stat().st_mode & 0o7777)
        for path in data.rglob("*")
        if path.is_file()
    }
