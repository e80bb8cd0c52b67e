"""Input that is broken, hostile or not vLLM: a clear error, exit code 2, and what is readable is still reported."""

from __future__ import annotations

import gzip
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from securevllm_dev.catalogue import source
from securevllm_dev.catalogue.__main__ import main
from tests.catalogue.planted import files


def _archive(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


@pytest.fixture
def planted(tmp_path: Path) -> Callable[..., Path]:
    def make(**extra: bytes) -> Path:
        members = {f"vllm-1/{name}": data for name, data in (files() | extra).items()}
        return _archive(tmp_path / "planted.tar.gz", {"vllm-1/PKG-INFO": b"Name: vllm\nVersion: 0.33.0\n"} | members)

    return make


def _run(*arguments: str | Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


def test_archive_and_folder_say_the_same(planted: Callable[..., Path], tmp_path: Path) -> None:
    code, printed, _ = _run("extract", planted(), "-o", "json")
    assert code == 0
    for name, data in files().items():
        (tmp_path / "tree" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "tree" / name).write_bytes(data)
    code, again, _ = _run("extract", tmp_path / "tree", "-o", "json")
    assert code == 0
    assert json.loads(printed) | {"version": ""} == json.loads(again)
    assert {"name": "VLLM_SECRET_PORT", "number": 4711} in [
        {"name": port["name"], "number": port["number"]} for port in json.loads(again)["ports"]
    ]


def test_table_has_every_concern(planted: Callable[..., Path]) -> None:
    code, printed, _ = _run("extract", planted())
    assert code == 0
    for heading in ("vLLM 0.33.0", "guarded prefixes: /v1 /v2", "routes: ", "flags: ", "ports: ", "unreadable: "):
        assert heading in printed


def test_syntax_error_in_one_file_hides_nothing_else(planted: Callable[..., Path]) -> None:
    path = "vllm/entrypoints/broken.py"
    code, printed, errors = _run("extract", planted(**{path: b"import fastapi\ndef f(:\n"}), "-o", "json")
    assert code == 2
    assert f"{path}:2: not Python" in errors
    assert {"/plain", "/socket"} <= {route["path"] for route in json.loads(printed)["routes"]}


def test_null_bytes_and_deep_nesting_are_problems_of_that_file(planted: Callable[..., Path]) -> None:
    extra = {
        "vllm/entrypoints/null.py": b"import fastapi\n\0",
        "vllm/entrypoints/deep.py": b"import fastapi\nx = " + b"(" * 5000 + b")" * 5000,
        "vllm/entrypoints/large.py": b"#" * (source.MAX_FILE + 1),
    }
    code, _, errors = _run("extract", planted(**extra))
    assert code == 2
    for name in extra:
        assert name in errors


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.tar.gz", b"not an archive", "not a readable .tar.gz archive"),
        ("empty.tar.gz", b"", "not a readable .tar.gz archive"),
        # mtime: without it the second of the import is in the bytes, and workers that collect in two seconds disagree.
        ("noise.tar.gz", gzip.compress(b"\xff" * 4096, mtime=0), "not a readable .tar.gz archive"),
    ],
    ids=["text", "empty", "noise"],
)
def test_broken_archive(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(data)
    code, printed, errors = _run("extract", tmp_path / name)
    assert (code, printed) == (2, "")
    assert message in errors


def test_cut_archive(planted: Callable[..., Path]) -> None:
    path = planted()
    path.write_bytes(path.read_bytes()[:-2000])
    code, printed, errors = _run("check", path)
    assert (code, printed) == (2, "")
    assert "not a readable .tar.gz archive" in errors


@pytest.mark.parametrize("name", ["vllm-1/../../etc/x.py", "/vllm/x.py"])
def test_name_that_leaves_the_tree(tmp_path: Path, name: str) -> None:
    code, _, errors = _run("extract", _archive(tmp_path / "a.tar.gz", {name: b""}))
    assert code == 2
    assert "leaves the tree" in errors


def test_bomb(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "MAX_TOTAL", 1 << 20)
    path = _archive(tmp_path / "bomb.tar.gz", {"vllm-1/vllm/envs.py": b"\0" * (2 << 20)})
    code, _, errors = _run("extract", path)
    assert code == 2
    assert "more than" in errors


def test_links_are_not_followed(tmp_path: Path, planted: Callable[..., Path]) -> None:
    with tarfile.open(tmp_path / "link.tar.gz", "w:gz") as archive:
        member = tarfile.TarInfo("vllm-1/vllm/link.py")
        member.type, member.linkname = tarfile.SYMTYPE, "../../outside.py"
        archive.addfile(member)
    assert source.read(tmp_path / "link.tar.gz").problems == ["vllm/link.py: a link or a device, not a file"]
    (tmp_path / "tree" / "vllm").mkdir(parents=True)
    (tmp_path / "tree" / "vllm" / "link.py").symlink_to(planted())
    assert source.read(tmp_path / "tree").problems == ["vllm/link.py: a link or a device, not a file"]


def test_tree_that_is_not_vllm(tmp_path: Path) -> None:
    code, _, errors = _run("extract", _archive(tmp_path / "other.tar.gz", {"other-1/other/x.py": b""}))
    assert code == 2
    assert "not a vLLM source tree" in errors


def test_check_names_what_is_not_classified(planted: Callable[..., Path]) -> None:
    code, printed, _ = _run("check", planted())
    assert code == 1
    assert "vllm/entrypoints/way_decorator.py:3: GET /plain: not classified" in printed
    assert "way_aiohttp.py:3: POST /aio: on a server that is not reviewed" in printed
    assert "middleware: Answers.__call__: not reviewed" in printed


def test_diff_of_a_tree_with_itself_and_with_a_changed_one(planted: Callable[..., Path], tmp_path: Path) -> None:
    path = planted()
    code, printed, _ = _run("diff", path, path)
    assert (code, printed) == (0, "vLLM 0.33.0 -> 0.33.0\n")
    old = tmp_path / "old.tar.gz"
    old.write_bytes(path.read_bytes())
    new = planted(**{"vllm/entrypoints/way_decorator.py": b"", "vllm/entrypoints/way_more.py": b"import fastapi\n"
                     b"from vllm.entrypoints.app import app\n@app.get('/more')\ndef f(): ..."})  # fmt: skip
    code, printed, _ = _run("diff", old, new)
    assert code == 0
    assert "- GET /plain (api)" in printed
    assert "+ GET /more (api)" in printed
