"""`make image`: build the operator's image from its Dockerfile, and keep it as a docker-archive in build/.

With docker or podman where one answers. Otherwise with buildah as root, which needs no engine; no registry is asked
then: a stand-in for the base image is made first, this machine's Python with pip and a shell. What pip is told on this
machine (an index, certificates) is mounted for the build and does not get into the image.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pip

from e2e import images
from e2e.cluster import ClusterError, python_root
from e2e.cluster.images import Image, Layer

_RESOLVER = Path("/etc/resolv.conf")
ENGINES = ("docker", "podman")
ARCHIVE = images.ROOT / "build" / "operator-image.tar"

_PIP = "#!/usr/local/bin/python\nimport sys\n\nfrom pip._internal.cli.main import main\n\nsys.exit(main())\n"


def main() -> int:
    """Build; 0 done, 1 not possible (the reason is on stderr)."""
    try:
        name = build()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    size = ARCHIVE.stat().st_size / 2**20
    print(f"{name}: {ARCHIVE}, {size:.0f} MiB\n  python -m e2e.cluster load-image {ARCHIVE.relative_to(images.ROOT)}")
    return 0


def missing() -> str:
    """Why nothing here can build an image; empty: something can."""
    if any(map(_answers, ENGINES)) or (shutil.which("buildah") and os.geteuid() == 0):
        return ""
    return "no docker or podman answers, and buildah (as root) is not there: apt-get install buildah"


def build(name: str = "") -> str:
    """Build the image, write the archive and return the image's name.

    Args:
        name: Of the image; that of `manifests/install` without one.

    Raises:
        ClusterError: Nothing here can build it, or it does not build.
    """
    if reason := missing():
        raise ClusterError(reason)
    name = name or images.operator_name()
    ARCHIVE.parent.mkdir(exist_ok=True)
    ARCHIVE.unlink(missing_ok=True)
    engine = next(filter(_answers, ENGINES), None)
    if engine:
        _run([engine, "build", f"--file={images.DOCKERFILE}", f"--tag={name}", str(images.ROOT)])
        _run([engine, "save", f"--output={ARCHIVE}", name])
    else:
        _with_buildah(name)
    return name


def base(name: str) -> Image:
    """A stand-in for the base image of this name: a Python that pip and the commands of `RUN` work in."""

    def fill(root: Path) -> None:
        version = f"python{sys.version_info.major}.{sys.version_info.minor}"
        packages = root / "usr/local/lib" / version / "site-packages"
        shutil.copytree(Path(pip.__file__).parent, packages / "pip", ignore=shutil.ignore_patterns("__pycache__"))
        for path, content in {"usr/local/bin/pip": _PIP, "etc/pip.conf": ""}.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_text(content, encoding="ascii")
            (root / path).chmod(0o755)
        (root / "bin").mkdir()
        for program in ("sh", "rm"):
            shutil.copy2(Path("/bin", program).resolve(), root / "bin" / program)
        python_root.add_libraries(root)
        python_root.compile_all(root)

    return Image(name, (python_root.interpreter(), Layer("pip", f"{sys.version} {pip.__version__}", fill)))


def _with_buildah(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="secure-vllm-image-") as scratch:
        folder = Path(scratch)
        # A store of its own: nothing is left on the machine. chroot: no runtime, no cgroups, no network set-up.
        buildah = ["buildah", f"--root={folder / 'store'}", f"--runroot={folder / 'run'}", "--storage-driver=vfs"]
        for needed in _base_names():
            with (folder / "base.tar").open("wb") as file:
                base(needed).write(file)
            _run([*buildah, "pull", "--quiet", f"docker-archive:{folder / 'base.tar'}"])
        volumes = [f"--volume={source}:{target}:ro" for source, target in _pip_settings(folder)]
        build = ["bud", "--pull-never", "--isolation=chroot", *volumes, f"--file={images.DOCKERFILE}", f"--tag={name}"]
        _run([*buildah, *build, str(images.ROOT)])
        _run([*buildah, "push", "--quiet", name, f"docker-archive:{ARCHIVE}:{name}"])


def _base_names() -> list[str]:
    return re.findall(r"^ARG PYTHON=(\S+)$", images.DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)


def _pip_settings(folder: Path) -> list[tuple[Path, str]]:
    """What pip uses here, environment included, as a file for the build, with the certificates it names."""
    listed = subprocess.run([sys.executable, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True)
    settings = {}
    for line in listed.stdout.splitlines():
        key, _, value = line.partition("=")
        settings[key.rpartition(".")[2]] = value.strip("'\"")
    file = folder / "pip.conf"
    file.write_text("[global]\n" + "".join(f"{key} = {value}\n" for key, value in settings.items()), encoding="utf-8")
    named = [Path(settings[key]) for key in ("cert", "find-links") if key in settings]
    paths = [path for path in (_RESOLVER, *named) if path.is_absolute() and path.exists()]
    return [(file, "/etc/pip.conf"), *((path, str(path)) for path in paths)]


def _answers(engine: str) -> bool:
    program = shutil.which(engine)
    return bool(program) and subprocess.run([engine, "info"], capture_output=True, check=False).returncode == 0


def _run(command: Sequence[str]) -> None:
    result = subprocess.run(command, check=False)
    if result.returncode != 0:
        raise ClusterError(f"`{' '.join(command)}` failed (exit code {result.returncode})")


if __name__ == "__main__":
    sys.exit(main())
