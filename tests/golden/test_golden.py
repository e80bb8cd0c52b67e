"""What is rendered for named resources is what a person has looked at.

After a change that is meant: `make golden`, then read `git diff tests/golden/expected`.
"""

from __future__ import annotations

import difflib
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pytest

from securevllm import catalogue, certs
from securevllm.api.guard import arguments
from securevllm.render.envoy import api_keys_file
from tests import pod_security
from tests.gateway.envoy_process import validate
from tests.golden.cases import HERE, NAMES, files, load
from tests.kubernetes_models import validate_strict

COMMAND = "make golden"


def expected(name: str) -> Path:
    return HERE / "expected" / name


@pytest.mark.parametrize("name", NAMES)
def test_case(name: str, accept: bool) -> None:
    folder, made = expected(name), files(load(name))
    if accept:
        shutil.rmtree(folder, ignore_errors=True)
        for path, text in made.items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text, encoding="utf-8")
        return
    kept = {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in folder.rglob("*")
        if path.is_file()
    }
    changes = "".join(
        _diff(f"{name}/{path}", kept.get(path, ""), made.get(path, "")) for path in sorted({*kept, *made})
    )
    if kept != made:
        pytest.fail(f"{changes}\nIf this is what you want: {COMMAND}", pytrace=False)


def _diff(path: str, before: str, after: str) -> str:
    lines = difflib.unified_diff(
        before.splitlines(keepends=True), after.splitlines(keepends=True), f"expected/{path}", f"rendered/{path}"
    )
    return "".join(lines)


def test_no_expectation_is_left_of_a_case_that_is_gone(accept: bool) -> None:
    left = {path.name for path in (HERE / "expected").iterdir()} - set(NAMES)
    if accept:
        for name in left:
            shutil.rmtree(expected(name))
        return
    assert left == set(), f"remove them with: {COMMAND}"


@pytest.mark.parametrize("name", NAMES)
def test_objects_are_valid_and_pods_are_restricted(name: str) -> None:
    made = load(name).rendered
    objects = [*made.objects(), *made.withheld, *(item.object for item in made.generated)]
    for obj in objects:
        validate_strict(obj)
    templates = [obj["spec"]["template"] for obj in objects if obj["kind"] in {"Deployment", "StatefulSet", "Job"}]
    assert {finding for template in templates for finding in pod_security.violations(template)} == set()
    assert len(templates) >= 2


@pytest.fixture(scope="module")
def certificate() -> tuple[str, str]:
    now = datetime.now(UTC)
    leaf = certs.leaf(None, certs.ca(None, "golden", now), ("localhost",), now)
    return leaf["tls.crt"].decode(), leaf["tls.key"].decode()


@pytest.mark.envoy
@pytest.mark.parametrize("name", NAMES)
def test_envoy_accepts_the_files(name: str, certificate: tuple[str, str]) -> None:
    made = load(name).rendered
    assert validate(made.gateway_files, made.keys_file or api_keys_file(()), certificate) == ""


@pytest.mark.parametrize("name", NAMES)
def test_no_user_may_set_what_the_operator_sets(name: str) -> None:
    """A flag twice is a question of order, and a variable twice is refused by server-side apply."""
    case = load(name)
    engine = case.accepted.spec.engine
    users, theirs = arguments.names(engine.args), {variable.name for variable in engine.env}
    for obj in (*case.rendered.workloads, *case.rendered.withheld):
        for container in obj.get("spec", {}).get("template", {}).get("spec", {}).get("containers", ()):
            if container["name"] != "vllm":
                continue
            flags = [arg.partition("=")[0] for arg in container["args"] if arg.startswith("--")]
            variables = [item["name"] for item in container["env"]]
            assert len(flags) == len(set(flags))
            assert len(variables) == len(set(variables))
            # A pinned template is that of an older release.
            assert set(flags) - users <= catalogue.flags().owned.keys() or case.second.get("pins")
            assert (set(variables) - theirs) & catalogue.environment().allowed.keys() == set()
