"""What `make image` asks of a machine, and what it knows of the Dockerfile."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

from e2e import build_image, images, test_image
from e2e.cluster import ClusterError, python_root
from e2e.cluster.daemon import ProcessIdentity
from tests.api.kube import eventually
from tools import image_root


def test_the_build_gets_the_files_that_the_dockerfile_copies_and_no_others() -> None:
    lines = (images.ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in lines
    assert {line[1:] for line in lines if line.startswith("!")} == {*build_image.copied()}


def test_the_base_is_given_by_one_argument() -> None:
    assert len(build_image.base_names()) == 1
    stages = [line for line in images.DOCKERFILE.read_text(encoding="utf-8").splitlines() if line.startswith("FROM")]
    assert stages == ["FROM ${PYTHON} AS root", "FROM scratch"]


@pytest.mark.parametrize("code", [build_image, python_root, image_root])
def test_a_change_of_what_fills_the_base_makes_another_one(
    code: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = build_image.base("python").layers[0].file
    assert code.__file__
    copy = tmp_path / Path(code.__file__).name
    copy.write_bytes(Path(code.__file__).read_bytes())
    monkeypatch.setattr(code, "__file__", str(copy))
    assert build_image.base("python").layers[0].file == before
    copy.write_text("another text", encoding="ascii")
    assert build_image.base("python").layers[0].file != before


def test_what_runs_inside_of_the_base_has_the_standard_library_alone() -> None:
    tree = ast.parse(Path(image_root.__file__).read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name.partition(".")[0] for name in imported} <= sys.stdlib_module_names


def test_libraries_are_those_of_the_machine_that_the_loader_names(
    tmp_path: Path, programs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, library, ldd = tmp_path / "root", tmp_path / "libz.so.1.3", programs / "ldd"
    (root / "bin").mkdir(parents=True)
    (root / "bin" / "program").write_bytes(b"\x7fELF")
    (root / "bin" / "text").write_bytes(b"text")
    (root / "own.so").write_bytes(b"\x7fELF")
    library.touch()
    (tmp_path / "libz.so.1").symlink_to(library.name)
    said = [
        "  linux-vdso.so.1 (0x1)",
        f"  libz.so.1 => {tmp_path}/libz.so.1 (0x1)",
        f"  own.so => {root}/own.so (0x1)",
        "  own.so => not found",
        f"  {library} (0x1)",
    ]
    ldd.write_text("#!/bin/sh\necho '{}'\n".format("\n".join(said)), encoding="ascii")
    ldd.chmod(0o755)
    assert {*image_root.loaded(root)} == {("libz.so.1", tmp_path / "libz.so.1"), ("", library)}
    assert python_root.libraries(root) == {library}
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    python_root.add_libraries(root)
    assert (root / "lib/x86_64-linux-gnu/libz.so.1").is_file()
    ldd.write_text("#!/bin/sh\necho '  libx.so => not found'\n", encoding="ascii")
    with pytest.raises(ClusterError, match=r"/bin/program needs libx\.so: not here"):
        python_root.add_libraries(root)


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give the only folder in which programs are."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(build_image, "SYSTEM_PATH", str(tmp_path))
    monkeypatch.setattr("os.geteuid", lambda: 0)
    return tmp_path


def put(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).write_text("#!/bin/sh\nexit 1\n", encoding="ascii")
        (folder / name).chmod(0o755)


def test_what_is_missing_is_named(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "as root on Debian only" in build_image.missing()
    put(programs, "dpkg-query", "docker")  # a docker that does not answer
    assert build_image.missing().endswith(": apt-get install buildah debootstrap")
    put(programs, "buildah")
    assert build_image.missing().endswith(": apt-get install debootstrap")
    put(programs, "debootstrap")
    assert build_image.missing() == ""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "as root on Debian only" in build_image.missing()


def test_an_engine_that_answers_makes_no_base(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (programs / "docker").write_text("#!/bin/sh\n", encoding="ascii")
    (programs / "docker").chmod(0o755)
    put(programs, "dpkg-query")
    assert build_image.missing() == ""
    assert build_image.missing_for_base().endswith(": apt-get install debootstrap")
    with pytest.raises(pytest.skip.Exception, match="apt-get install debootstrap"):
        test_image.test_the_base_image_has_what_is_not_in_it()
    put(programs, "debootstrap")
    assert build_image.missing_for_base() == ""
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert build_image.missing() == ""
    assert build_image.missing_for_base() == "the base image is made as root on Debian only"


def test_the_same_files_are_not_built_again(programs: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    put(programs, "dpkg-query", "buildah", "debootstrap")
    archive = tmp_path / "image.tar"
    monkeypatch.setattr(build_image, "ARCHIVE", archive)
    monkeypatch.setattr(images, "operator_name", lambda: "operator:1")
    built: list[str] = []

    def build(name: str) -> None:
        built.append(name)
        archive.write_text("", encoding="ascii")

    monkeypatch.setattr(build_image, "_with_buildah", build)
    assert [build_image.build(), build_image.build()] == ["operator:1", "operator:1"]
    assert built == ["operator:1"]
    monkeypatch.setattr(build_image, "_inputs", lambda _engine: "other files")
    build_image.build()
    archive.unlink()
    build_image.build()
    assert len(built) == 3


# A build whose program has a child; both would be there for minutes.
BUILD = """
import os, sys, tempfile
from pathlib import Path
from e2e import build_image

def build():
    with tempfile.TemporaryDirectory(dir=sys.argv[1]):
        build_image._run(["sh", "-c", "sleep 600 & echo $! >$0.new && mv $0.new $0 && wait", sys.argv[1] + "/child"])

os.geteuid = lambda: 1000  # mounts nothing
build_image.build = build
sys.exit(build_image.main())
"""


def test_a_build_that_is_ended_leaves_nothing(tmp_path: Path) -> None:
    child = tmp_path / "child"
    with subprocess.Popen([sys.executable, "-c", BUILD, tmp_path], cwd=images.ROOT) as process:  # noqa: S603 - fixed
        eventually(child.exists)
        identity = ProcessIdentity.of(int(child.read_text(encoding="ascii")))
        try:
            process.terminate()
            assert process.wait(60) == 130
            eventually(lambda: not identity.alive())
        finally:
            process.kill()
            identity.stop(grace=0)
    assert [*tmp_path.iterdir()] == [child]
