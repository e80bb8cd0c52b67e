"""The development package stays apart, and says which releases were compared."""

from __future__ import annotations

import re
import tomllib
from importlib import resources
from pathlib import Path

from securevllm import catalogue
from securevllm.catalogue import Version

OPERATOR = Path(__file__).parents[2] / "operator"


def _imports(folder: Path) -> set[str]:
    texts = [path.read_text(encoding="utf-8") for path in folder.rglob("*.py")]
    return {name for text in texts for name in re.findall(r"^\s*(?:from|import) ([\w.]+)", text, re.MULTILINE)}


def test_nothing_of_the_operator_imports_it() -> None:
    imported = _imports(OPERATOR / "securevllm")
    assert "securevllm.errors" in imported
    assert {name for name in imported if name.startswith("securevllm_dev")} == set()


def test_it_imports_the_catalogue_at_most() -> None:
    imported = _imports(OPERATOR / "securevllm_dev")
    ours = {name for name in imported if name.partition(".")[0] == "securevllm"}
    assert ours == {"securevllm"}
    sources = (OPERATOR / "securevllm_dev").rglob("*.py")
    froms = {line for path in sources for line in re.findall(r"from securevllm import .*", path.read_text("utf-8"))}
    assert froms == {"from securevllm import catalogue"}


def test_it_is_in_no_wheel() -> None:
    project = tomllib.loads((OPERATOR.parent / "pyproject.toml").read_text(encoding="utf-8"))
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"] == ["operator/securevllm"]


def test_compared_releases_are_in_order_and_end_with_the_newest() -> None:
    text = (resources.files(catalogue) / "data" / "versions.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)
    compared = [Version.parse(one) for one in table["compared"]]
    assert compared == sorted(set(compared))
    assert (compared[0], compared[-1]) == (Version.parse(table["oldest"]), catalogue.newest())
