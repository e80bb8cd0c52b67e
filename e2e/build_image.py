"""`make image`: build the operator's image from its Dockerfile, and keep it as a docker-archive in build/.

With docker or podman where one answers. Otherwise with buildah as root on Debian, which needs no engine; no registry is
asked then: an image under the base image's name is made first, Debian by debootstrap with this machine's Python and pip
in /usr/local, and kept in the cache. What pip is told on this machine (an index, certificates) is mounted for the build
and does not get into the image. What was built from the same files is not built again.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import pip

from e2e import images
from e2e.cluster import ClusterError, lifecycle, python_root
from e2e.cluster.images import Image, Layer
from e2e.cluster.packages import SYSTEM_PATH
from e2e.cluster.paths import locked
from tools import image_root

_RESOLVER = Path("/etc/resolv.conf")
# What is not in Debian's smallest system and in every image of Python.
_INCLUDED = ("ca-certificates", "netbase", "tzdata")
ENGINES = ("docker", "podman")
ARCHIVE = images.ROOT / "build" / "operator-image.tar"

_PIP = "#!/usr/local/bin/python\nimport sys\n\nfrom pip._internal.cli.main import main\n\nsys.exit(main())\n"


def main() -> int:
    """Build; 0 done, 1 not possible (the reason is on stderr), 130 interrupted."""
    try:
        with lifecycle.signals_raise():
            name = build()
    except ClusterError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted: nothing was left running", file=sys.stderr)
        return 130
    size = ARCHIVE.stat().st_size / 2**20
    print(f"{name}: {ARCHIVE}, {size:.0f} MiB\n  python -m e2e.cluster load-image {ARCHIVE.relative_to(images.ROOT)}")
    return 0


def missing() -> str:
    """Why nothing here can build an image; empty: something can."""
    if any(map(_answers, ENGINES)):
        return ""
    reason = _lacking("buildah", "debootstrap")
    return reason and f"no docker or podman answers; without one the image is built {reason}"


def missing_for_base() -> str:
    """Why `base` cannot be made here, whatever builds images; empty: it can."""
    reason = _lacking("debootstrap")
    return reason and f"the base image is made {reason}"


def _lacking(*programs: str) -> str:
    if os.geteuid() != 0 or not shutil.which("dpkg-query", path=SYSTEM_PATH):
        return "as root on Debian only"
    lacking = [program for program in programs if not shutil.which(program, path=SYSTEM_PATH)]
    return f"with what is not there: apt-get install {' '.join(lacking)}" if lacking else ""


def build() -> str:
    """Build the image unless the archive is of these files, write the archive and return the image's name.

    Raises:
        ClusterError: Nothing here can build it, or it does not build.
    """
    if reason := missing():
        raise ClusterError(reason)
    name = images.operator_name()
    engine = next(filter(_answers, ENGINES), None)
    made_of = hashlib.sha256(f"{name} {engine or 'buildah'} {_inputs(engine)}".encode()).hexdigest()
    told = ARCHIVE.with_suffix(".sha256")
    with locked(ARCHIVE.with_suffix(".lock")):
        if ARCHIVE.exists() and told.exists() and told.read_text(encoding="ascii") == made_of:
            return name
        for path in (told, ARCHIVE):
            path.unlink(missing_ok=True)
        if engine:
            _run([engine, "build", f"--file={images.DOCKERFILE}", f"--tag={name}", str(images.ROOT)])
            _run([engine, "save", f"--output={ARCHIVE}", name])
        else:
            _with_buildah(name)
        told.write_text(made_of, encoding="ascii")
    return name


def base(name: str) -> Image:
    """Debian with Python and pip in /usr/local, under the name of the base image."""
    codename = platform.freedesktop_os_release().get("VERSION_CODENAME", "")

    def fill(root: Path) -> None:
        with tempfile.TemporaryDirectory() as scratch:
            python_root.copy_interpreter(Path(scratch))
            owners = {path: _owner(path) for path in python_root.libraries(Path(scratch))}
        included = ",".join(sorted({*_INCLUDED, *filter(None, owners.values())}))
        command = ["debootstrap", "--variant=minbase", f"--include={included}", codename, str(root), *_mirror(codename)]
        _run(command)
        for folder in ("dev", "var/cache/apt/archives", "var/lib/apt/lists"):
            shutil.rmtree(root / folder)
            (root / folder).mkdir()
        python_root.copy_interpreter(root)
        for path in (path for path, owner in owners.items() if not owner):  # Python's own
            shutil.copy2(path, root / "usr/local/lib")
        _run(["ldconfig", "-r", str(root)])
        packages = root / "usr/local/lib" / f"python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
        shutil.copytree(Path(pip.__file__).parent, packages / "pip", ignore=shutil.ignore_patterns("__pycache__"))
        program = root / "usr/local/bin/pip"
        program.write_text(_PIP, encoding="ascii")
        program.chmod(0o755)
        (root / "etc/pip.conf").touch()
        python_root.compile_all(root / "usr/local")

    # By name alone: the cache is for every checkout.
    filled_by = {path.name: path for path in map(Path, (__file__, python_root.__file__, image_root.__file__))}
    key = f"{codename} {_INCLUDED} {sys.version} {pip.__version__} {python_root.digest(filled_by)}"
    return Image(name, (Layer("debian-with-python", key, fill, as_it_is=True),))


def _with_buildah(name: str) -> None:
    with tempfile.TemporaryDirectory(prefix="secure-vllm-image-") as scratch:
        folder = Path(scratch)
        # A store of its own: nothing is left on the machine. chroot: no runtime, no cgroups, no network set-up.
        buildah = ["buildah", f"--root={folder / 'store'}", f"--runroot={folder / 'run'}", "--storage-driver=vfs"]
        for needed in base_names():
            with (folder / "base.tar").open("wb") as file:
                base(needed).write(file)
            _run([*buildah, "pull", "--quiet", f"docker-archive:{folder / 'base.tar'}"])
        volumes = [f"--volume={source}:{target}:ro" for source, target in _pip_settings(folder)]
        build = ["bud", "--pull-never", "--isolation=chroot", *volumes, f"--file={images.DOCKERFILE}", f"--tag={name}"]
        _run([*buildah, *build, str(images.ROOT)])
        _run([*buildah, "push", "--quiet", name, f"docker-archive:{ARCHIVE}:{name}"])


def copied() -> list[str]:
    """Name what the Dockerfile takes from this repository."""
    return re.findall(r"^COPY (?!--)(\S+) ", images.DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)


def _inputs(engine: str | None) -> str:
    """All that the image's content depends on, as far as it is on this machine."""
    paths = [images.DOCKERFILE, Path(__file__), *(images.ROOT / path for path in copied())]
    layers = [] if engine else [layer.file.name for name in base_names() for layer in base(name).layers]
    return f"{python_root.sources('inputs', {str(path): path for path in paths}).key} {layers}"


def _owner(path: Path) -> str:
    """Name the Debian package that a file is of; empty: none."""
    # Packages name some by /lib, where they are in /usr/lib.
    for name in (str(path), str(path).removeprefix("/usr")):
        found = subprocess.run(["dpkg-query", "--search", name], capture_output=True, text=True, check=False)  # noqa: S607
        if found.returncode == 0:
            return found.stdout.partition(":")[0]
    return ""


def _mirror(codename: str) -> list[str]:
    """Where this machine has its packages of Debian from; nothing: debootstrap knows one."""
    wanted = ["apt-get", "indextargets", "--format", "$(CODENAME) $(COMPONENT) $(REPO_URI)", "Created-By: Packages"]
    listed = subprocess.run(wanted, capture_output=True, text=True, check=False).stdout.splitlines()
    return [line.split()[2] for line in listed if line.startswith(f"{codename} main ")][:1]


def base_names() -> list[str]:
    """Name the images that the Dockerfile is built on."""
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
    # In a namespace of its own: what is mounted goes with the program, whatever becomes of it.
    apart = ["unshare", "--mount"] if os.geteuid() == 0 and command[0] not in ENGINES else []
    environment = os.environ | {"PATH": f"{os.environ.get('PATH', '')}:{SYSTEM_PATH}"}
    process = subprocess.Popen([*apart, *command], env=environment, stdin=subprocess.DEVNULL, process_group=0)
    try:
        code = process.wait()
    except BaseException:
        _end_group(process)
        raise
    if code != 0:
        raise ClusterError(f"`{' '.join(command)}` failed (exit code {code})")


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a program with those that it started, which would go on after Ctrl-C."""
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 5
    with suppress(ProcessLookupError):  # nobody is left to write into what is deleted next
        while time.monotonic() < deadline:
            os.killpg(process.pid, 0)
            time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(main())
