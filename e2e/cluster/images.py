"""Container images without a registry or a container engine: layers packed from folders, imported into nodes.

An image is a list of layers and a configuration. A layer is made once for the inputs that its key names (a version, a
lock file, the content of source files) and kept in the cache; packing is reproducible: sorted names, no owner, no
times. Layers are shared: the Python of one image is the Python of the next, and a node unpacks it once.
"""

from __future__ import annotations

import hashlib
import io
import json
import platform
import shutil
import subprocess
import tarfile
import tempfile
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from e2e.cluster import binaries
from e2e.cluster.errors import ClusterError
from e2e.cluster.paths import cache_folder, locked

if TYPE_CHECKING:
    from e2e.cluster.binaries import Progress

ROOT = Path(__file__).resolve().parents[2]

# Names of what the local cluster itself needs, and of tests' own pods.
PAUSE = "registry.local/pause:1"
COREDNS = "registry.local/coredns:1"

_EPOCH = "1970-01-01T00:00:00Z"
_PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_PACKER = "1"  # part of every key: raise it when the packing of a folder changes


@dataclass(frozen=True)
class Layer:
    """A folder that becomes one layer.

    Attributes:
        name: For people, and in the name of the cached file.
        key: All that its content depends on.
        fill: Writes the content into an empty folder.
        as_it_is: Keep owners and modes, setuid bits too.
    """

    name: str
    key: str
    fill: Callable[[Path], None]
    as_it_is: bool = False

    @property
    def file(self) -> Path:
        """Where the packed layer is, or will be."""
        key = hashlib.sha256(f"{_PACKER}\0{self.name}\0{self.key}".encode()).hexdigest()[:16]
        return cache_folder() / "layers" / f"{self.name}-{key}.tar"

    def prepare(self, progress: Progress) -> str:
        """Pack the layer unless the cache has it, and return the SHA-256 of the tar file (its `diff_id`)."""
        digest = self.file.with_suffix(".sha256")
        if not digest.exists():
            with locked(self.file.with_suffix(".lock")):
                if not digest.exists():
                    progress(f"packing {self.name}")
                    self._pack(digest)
        return digest.read_text(encoding="ascii")

    def _pack(self, digest: Path) -> None:
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{self.name}-", dir=self.file.parent) as scratch:
            root, partial = Path(scratch) / "root", Path(scratch) / "layer.tar"
            root.mkdir()
            self.fill(root)
            with tarfile.open(partial, "w", format=tarfile.GNU_FORMAT) as archive:
                for path in sorted(root.iterdir()):
                    archive.add(path, path.name, filter=None if self.as_it_is else _without_history)
            partial.rename(self.file)
        with self.file.open("rb") as file:
            digest.write_text(hashlib.file_digest(file, "sha256").hexdigest(), encoding="ascii")


@dataclass(frozen=True)
class Image:
    """An image: what `docker load` would take, made when it is needed.

    Attributes:
        name: With tag, as pods name it.
        layers: From the lowest up.
        config: `config` of the OCI image configuration: Entrypoint, Cmd, Env, User.
    """

    name: str
    layers: tuple[Layer, ...]
    config: Mapping[str, Any] = field(default_factory=dict)

    def prepare(self, progress: Progress) -> None:
        """Pack what the cache does not have yet."""
        for layer in self.layers:
            layer.prepare(progress)

    def digest(self) -> str:
        """Return what names this image and no other: SHA-256 of its name, configuration and layers."""
        return hashlib.sha256(self.name.encode() + self._configuration()).hexdigest()

    def _environment(self) -> list[str]:
        own: list[str] = self.config.get("Env", [])
        return own if any(one.startswith("PATH=") for one in own) else [_PATH, *own]

    def _digests(self) -> list[str]:
        return [layer.prepare(_silent) for layer in self.layers]

    def _configuration(self) -> bytes:
        return json.dumps(
            {
                "architecture": {"x86_64": "amd64", "aarch64": "arm64"}[platform.machine()],
                "os": "linux",
                "created": _EPOCH,
                "config": {"WorkingDir": "/", **self.config, "Env": self._environment()},
                "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}" for digest in self._digests()]},
                "history": [{"created": _EPOCH, "created_by": layer.name} for layer in self.layers],
            },
            sort_keys=True,
        ).encode()

    def write(self, out: IO[bytes]) -> None:
        """Write the image as a docker-archive."""
        config = self._configuration()
        config_name = f"{hashlib.sha256(config).hexdigest()}.json"
        files = [f"{digest}/layer.tar" for digest in self._digests()]
        manifest = json.dumps([{"Config": config_name, "RepoTags": [self.name], "Layers": files}]).encode()
        with tarfile.open(fileobj=out, mode="w|", format=tarfile.GNU_FORMAT) as archive:
            for name, content in ((config_name, config), ("manifest.json", manifest)):
                archive.addfile(_entry(name, len(content)), io.BytesIO(content))
            for name, layer in zip(files, self.layers, strict=True):
                with layer.file.open("rb") as file:
                    archive.addfile(_entry(name, layer.file.stat().st_size), file)

    def load(self, ctr: Callable[..., list[str]]) -> None:
        """Import the image with containerd's client; `ctr` makes its command line.

        Raises:
            ClusterError: It was refused; with what was said.
        """
        load(self.name, self.write, ctr)


def load(name: str, write: Callable[[IO[bytes]], object], ctr: Callable[..., list[str]]) -> None:
    """Import the docker-archive that `write` writes with containerd's client; `ctr` makes its command line.

    Raises:
        ClusterError: It was refused; with what was said.
    """
    command = ctr("images", "import", "-")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdin  # noqa: S101 (tells the type checker that a pipe was asked for)
        with suppress(BrokenPipeError):  # it ends with a reason
            write(process.stdin)
            process.stdin.close()
        said = process.stdout.read() if process.stdout else b""
    if process.returncode != 0:
        raise ClusterError(f"importing {name} failed: {said.decode(errors='replace').strip()}")


def base() -> tuple[Image, ...]:
    """Return what every node needs: the sandbox of pods, and cluster DNS."""
    return (
        Image(PAUSE, (program_layer(binaries.PAUSE),), {"Entrypoint": [f"/{binaries.PAUSE}"], "User": "65535:65535"}),
        Image(COREDNS, (program_layer(binaries.COREDNS),), {"Entrypoint": [f"/{binaries.COREDNS}"]}),
    )


def program_layer(name: str) -> Layer:
    """A statically linked program of ours, at the root."""

    def fill(root: Path) -> None:
        _copy(binaries.program(name), root / name)

    return Layer(name, binaries.PROGRAMS[name].component.version, fill)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, target)


def _without_history(entry: tarfile.TarInfo) -> tarfile.TarInfo:
    entry.uid = entry.gid = entry.mtime = 0
    entry.uname = entry.gname = ""
    # Whatever the umask was: everybody may read, and write where everybody always may (/tmp).
    if entry.isdir():
        entry.mode = 0o1777 if entry.mode & 0o1000 else 0o755
    elif entry.isfile():
        entry.mode = 0o755 if entry.mode & 0o100 else 0o644
    return entry


def _entry(name: str, size: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(name)
    entry.size = size
    return entry


def _silent(_line: str) -> None:
    """Report nothing."""
