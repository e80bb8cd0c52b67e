"""What documentation says is true as far as a program can tell: reasons, links, YAML, names of machines."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import get_args
from urllib.parse import unquote

import pytest
import yaml
from click.testing import CliRunner

from e2e.cluster.binaries import ARGO_CD_VERSION
from securevllm import catalogue
from securevllm.api import bounds
from securevllm.api import types as api
from securevllm.api.parse import parse
from securevllm.cli import main
from tests.pages import EXECUTED, blocks

ROOT = Path(__file__).parents[2]
CODE = ROOT / "operator" / "securevllm"
DOCS = ROOT / "docs"
PAGES = sorted([*ROOT.glob("*.md"), *DOCS.rglob("*.md")])
SAMPLES = sorted((ROOT / "manifests" / "samples").glob("*.yaml"))
IDS = {path: path.relative_to(ROOT).as_posix() for path in (*PAGES, *SAMPLES)}

# The argument of a call that is a condition's reason: its position, or its name.
_CALLS = {"Problem": (1, "reason"), "Verdict": (1, "reason"), "Proof": (1, "reason"), "_no": (0, "reason")}


_HOSTS = {
    "keepachangelog.com",
    "semver.org",
    "kubernetes.io",
    "pkg.go.dev",
    "docs.vllm.ai",
    "git.example.com",
    "kubernetes.default.svc",
    "token.actions.githubusercontent.com",
}
"""Where documentation may point to; no package index and no host of somebody's network is among them."""
_SERVICE = re.compile(r"quickstart-gateway(\.llm\.svc\.cluster\.local)?|squid\.proxy\.svc:3128")


def _reasons(tree: ast.AST) -> Iterator[str]:
    """CamelCase reasons of conditions, and of problems of a spec, that a module can give."""
    for node in ast.walk(tree):
        values: list[ast.expr] = []
        match node:
            case ast.Call(func=ast.Name(id=name)) if name in _CALLS:
                position, keyword = _CALLS[name]
                values += node.args[position : position + 1]
                values += [item.value for item in node.keywords if item.arg == keyword]
            case ast.Assign(targets=[ast.Name(id="reason" | "WAITING" | "REASON" | "SECRET_REASON")]):
                values.append(node.value)
        for value in values:
            for part in (value.body, value.orelse) if isinstance(value, ast.IfExp) else (value,):
                if isinstance(part, ast.Constant) and isinstance(part.value, str):
                    yield part.value


def _reasons_of_code() -> set[str]:
    files = [*(CODE / "api").rglob("*.py"), *(CODE / "status").glob("*.py"), CODE / "children.py"]
    files.append(CODE / "proof" / "verdict.py")
    return {reason for path in files for reason in _reasons(ast.parse(path.read_text(encoding="utf-8")))}


def _prose(text: str) -> str:
    return re.sub(r"```.*?```", "", text, flags=re.DOTALL)


def _anchors(path: Path) -> set[str]:
    """Anchors as the usual renderers of Markdown make them from headings."""
    headings = re.findall(r"^#{1,6} +(.+?)\s*$", _prose(path.read_text(encoding="utf-8")), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _resources(path: Path) -> Iterator[tuple[str, dict[str, object]]]:
    text = path.read_text(encoding="utf-8")
    blocks = [text] if path.suffix == ".yaml" else re.findall(r"^```yaml\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    for block in blocks:
        for document in yaml.safe_load_all(block):
            if isinstance(document, dict) and document.get("kind") == api.KIND:
                assert document["apiVersion"] == api.API_VERSION
                yield document["metadata"]["name"], document["spec"]


def test_every_reason_is_explained_and_none_that_does_not_exist() -> None:
    code = _reasons_of_code()
    assert {"SpecAccepted", "ForeignObject", "ApplyFailed", "InvalidSpec", "ArgumentRefused"} <= code
    headings = re.findall(r"^#{3,4} `?(\w+)`?$", (DOCS / "status.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(code - set(headings)) == [], "explain these reasons in docs/status.md"
    assert sorted(set(headings) - code) == [], "docs/status.md explains reasons that no code gives"
    assert len(headings) == len(set(headings)), "a reason has one anchor"


@pytest.mark.parametrize("page", PAGES, ids=IDS.get)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", _prose(page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        name, _, anchor = unquote(link).partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside of the repository"
        if anchor and target.suffix == ".md":
            assert anchor in _anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("path", [*PAGES, *SAMPLES], ids=IDS.get)
def test_yaml_in_documentation_is_accepted(path: Path) -> None:
    found = list(_resources(path))
    assert found or path.suffix == ".md", "a sample without a resource"
    for name, spec in found:
        parse(name, spec)


def test_gateway_page_lists_the_routes_of_the_catalogue() -> None:
    text = (DOCS / "gateway.md").read_text(encoding="utf-8")
    known = [route for route in catalogue.routes_of(catalogue.newest()).values() if not route.never]
    told = {
        profile: set(re.findall(r"`([A-Z]+ /[^`]*)`", cells))
        for profile, cells in re.findall(r"^\| `(\w+)` \| (.*) \|$", text, re.MULTILINE)
    }
    everywhere = {"GET /v1/models"}
    assert f"`{min(everywhere)}` belongs to every\nprofile" in text
    for profile in get_args(api.Profile):
        routes = {f"{r.method} {r.path}" for r in known if profile in r.profiles and r.method != catalogue.WEBSOCKET}
        assert told[profile] | everywhere == routes, profile
    single = {
        name
        for cells in re.findall(r"^\| (`[A-Z]+ /.*?) \|", text, re.MULTILINE)
        for name in re.findall(r"`([^`]+)`", cells)
    }
    assert single == {f"{route.method} {route.path}" for route in known if not route.profiles}


def test_gateway_page_tells_the_defaults_of_the_limits() -> None:
    text = (DOCS / "gateway.md").read_text(encoding="utf-8")
    told = dict(re.findall(r"^\| `(\w+)` \| (\S+) \| [^|]+ \|$", text, re.MULTILINE))
    assert told == {name: str(value) for name, value in api.Limits().model_dump(by_alias=True).items()}


@pytest.mark.parametrize("where", ["args", "env"])
def test_guard_page_lists_what_may_be_set(where: str) -> None:
    text = (DOCS / "guard.md").read_text(encoding="utf-8")
    command = f"securevllm guard --where {where} -o md"
    made = CliRunner().invoke(main, command.split()[1:])
    assert made.exit_code == 0
    block = text.partition(f"<!-- made by: {command} -->\n")[2].partition("\n<!-- end -->")[0]
    assert block == made.output.rstrip("\n"), f"paste the output of: {command}"


def test_guard_page_tells_every_risk() -> None:
    text = (DOCS / "guard.md").read_text(encoding="utf-8")
    told = re.findall(r"^\| `(\w+)` \| (.*) \| (yes|no) \|$", text, re.MULTILINE)
    risks = catalogue.risks().values()
    assert told == [(risk.name, risk.why, "yes" if risk.default else "no") for risk in risks]


def test_guard_page_shows_bounds_that_are_valid_and_complete() -> None:
    text = (DOCS / "guard.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"^```yaml\n(images:.*?)^```", text, re.DOTALL | re.MULTILINE)
    shown = bounds.read(yaml.safe_load(block))
    assert shown.model_fields_set == set(bounds.PlatformBounds.model_fields)


def test_gitops_page_names_the_argo_cd_that_the_tests_run() -> None:
    assert f"Seen with Argo CD {ARGO_CD_VERSION} itself" in (DOCS / "gitops.md").read_text(encoding="utf-8")


def test_readme_shows_the_quickstart() -> None:
    (sample,) = _resources(ROOT / "manifests" / "samples" / "quickstart.yaml")
    assert sample in list(_resources(ROOT / "README.md"))


@pytest.mark.parametrize("path", [*PAGES, *sorted(ROOT.glob("charts/*/README.md"))], ids=str)
def test_every_command_is_executed_by_a_test_or_says_why_not(path: Path) -> None:
    assert (path in EXECUTED) == bool([*blocks(path)]), "write <!-- not run: why --> and an empty line before the block"


def test_commands_that_are_told_exist() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    for page in PAGES:
        told = set(re.findall(r"\bmake ([a-z0-9-]+)", " ".join(_code(page.read_text(encoding="utf-8")))))
        assert told <= targets, f"{page.name}: make {', '.join(sorted(told - targets))}"


def _code(text: str) -> list[str]:
    return [*re.findall(r"```\w*\n(.*?)```", text, re.DOTALL), *re.findall(r"`([^`\n]+)`", _prose(text))]


@pytest.mark.parametrize(
    "path",
    [
        path
        for pattern in ("*.md", "Makefile", "pyproject.toml", ".ci/*", "docs/**/*", "manifests/**/*", "requirements/*")
        for path in sorted(ROOT.glob(pattern))
        if path.is_file()
    ],
    ids=lambda path: path.relative_to(ROOT).as_posix(),
)
def test_no_package_index_and_no_folder_of_somebody_s_machine_is_named(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    hosts = {host for host in re.findall(r"https?://([^/\s)`\"]+)", text) if _SERVICE.fullmatch(host) is None}
    assert hosts <= (_HOSTS if path.suffix in {".md", ".yaml"} else set())
    assert re.findall(r"--(?:extra-)?index-url|--find-links", text) == []
    folders = set(re.findall(r"(?<![\w.*$}])/(?:home|root|Users)/\w+", text))
    assert folders <= {"/home/vllm"}, "the only one is the home of the user in vLLM's image"
