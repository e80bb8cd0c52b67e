"""The command line without a cluster: what it prints, what it says to wrong input, and how it ends."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
import pytest
import yaml
from click.testing import CliRunner, Result

from securevllm import __version__, catalogue
from securevllm.cli import main
from securevllm.proof.report import Report, Row
from securevllm.proof.verdict import Proof

if TYPE_CHECKING:
    from collections.abc import Sequence

    from securevllm.settings import Settings

ROOT = Path(__file__).parents[2]
SAMPLE = ROOT / "manifests/samples/quickstart.yaml"


def run(*args: str, stdin: str | None = None) -> Result:
    return CliRunner().invoke(main, args, input=stdin)


def rendered(*args: str, stdin: str | None = None) -> Sequence[dict[str, object]]:
    result = run("render", "-f", "-" if stdin is not None else str(SAMPLE), *args, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return list(yaml.safe_load_all(result.stdout))


def test_help_teaches_the_first_step() -> None:
    assert "securevllm render -f manifests/samples/quickstart.yaml" in run("--help").stdout


def test_version_names_operator_and_catalogue() -> None:
    assert run("version").stdout == (
        f"secure-vllm-operator {__version__} (catalogue: vLLM {catalogue.oldest()} to {catalogue.newest()};"
        f" accepted without a risk from {catalogue.floor()})\n"
    )


def test_the_crd_is_the_one_in_the_repository() -> None:
    assert run("crd").stdout == (ROOT / "crds/securevllm.io_securevllmdeployments.yaml").read_text(encoding="utf-8")
    assert json.loads(run("crd", "-o", "json").stdout)["kind"] == "CustomResourceDefinition"


def test_render_begins_with_the_deny_and_ends_with_what_runs() -> None:
    kinds = [obj["kind"] for obj in rendered()]
    assert kinds[0] == "NetworkPolicy"
    assert kinds[-1] == "Deployment"
    assert len(kinds) > 15


def test_json_is_one_object_per_line() -> None:
    lines = run("render", "-f", str(SAMPLE), "-o", "json").stdout.splitlines()
    assert [json.loads(line) for line in lines] == list(rendered())


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--cluster-domain", "example.org"), "svc.example.org"),
        (("--operator-namespace", "ops"), "kubernetes.io/metadata.name: ops"),
        (("--cluster-range", "203.0.113.0/24"), "203.0.113.0/24"),
        (("--dns-cidr", "169.254.20.10/32"), "169.254.20.10/32"),
        (("--dns-namespace", "openshift-dns"), "kubernetes.io/metadata.name: openshift-dns"),
        (("--dns-pods", "app=dns"), "app: dns"),
        (("--dns-port", "5353"), "port: 5353"),
        (("--pod-ips", "10.0.0.1,fd00::1"), '\\"::\\"'),
        (("--gateway-image", "registry.example/envoy:v1"), "image: registry.example/envoy:v1"),
        (("--uid", "other"), "uid: other"),
        (("-n", "team"), "namespace: team"),
    ],
)
def test_every_option_of_the_cluster_reaches_the_objects(arguments: tuple[str, ...], found: str) -> None:
    assert found not in yaml.safe_dump_all(rendered())
    assert found in yaml.safe_dump_all(rendered(*arguments))


def test_a_restart_that_the_user_asked_for_is_in_the_template() -> None:
    resource = yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))
    resource["metadata"]["annotations"] = {"securevllm.io/restart-at": "noon"}
    assert "noon" in yaml.safe_dump_all(rendered(stdin=yaml.safe_dump(resource)))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a: [", "is not YAML"),
        ("", "holds no object"),
        ("- a", "holds list, not a Kubernetes object"),
        ("{apiVersion: securevllm.io/v1alpha1, kind: SecureVLLMDeployment, metadata: x}", "metadata is str, not a"),
        ("{apiVersion: securevllm.io/v1alpha1, kind: SecureVLLMDeployment, spec: [1]}", "spec is list, not a"),
        ("{apiVersion: v1, kind: Pod}", "holds v1 Pod; this command takes securevllm.io/v1alpha1"),
    ],
)
def test_wrong_input_is_named(text: str, told: str) -> None:
    result = run("render", "-f", "-", stdin=text)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr


def test_a_file_that_is_no_text_is_named(tmp_path: Path) -> None:
    path = tmp_path / "binary"
    path.write_bytes(b"\xff\xfe\x00")
    result = run("render", "-f", str(path))
    assert (result.exit_code, result.stdout) == (2, "")
    assert f"{path} is not YAML" in result.stderr


def test_a_bad_resource_does_not_hide_the_good_one() -> None:
    good = SAMPLE.read_text(encoding="utf-8")
    bad = yaml.safe_load(good)
    bad["metadata"]["name"] = "bad"
    del bad["spec"]["model"]["source"]
    result = run("render", "-f", "-", stdin=f"{yaml.safe_dump(bad)}\n---\n{good}")
    assert result.exit_code == 2
    assert "bad: ModelSourceMissing: spec.model.source" in result.stderr
    assert "source: {huggingFace: {}}" in result.stderr
    assert {obj["kind"] for obj in yaml.safe_load_all(result.stdout)} >= {"Deployment", "NetworkPolicy"}


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--dns-pods", "x"), "not a label"),
        (("--cluster-range", "10.0.0.1/8"), "host bits"),
        (("--dns-cidr", "x"), "x"),
        (("--pod-ips", "10.0.0.1,me"), "'me' does not appear to be an IPv4 or IPv6 address"),
        (("--dns-port", "99999"), "--dns-port"),
        (("--uid", "x y"), "'x y' is no UID such as 0000"),
        (("--uid", ""), "'' is no UID"),
        (("--gateway-image", ""), "'' is no image such as"),
        (("--operator-image", "a b"), "'a b' is no image such as"),
    ],
)
def test_wrong_options_are_named(arguments: tuple[str, ...], told: str) -> None:
    result = run("render", "-f", "-", *arguments, stdin=SAMPLE.read_text(encoding="utf-8"))
    assert result.exit_code == 2
    assert told in result.stderr


def test_an_empty_variable_of_an_image_is_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    before = rendered()
    for name in ("SECUREVLLM_GATEWAY_IMAGE", "SECUREVLLM_OPERATOR_IMAGE"):
        monkeypatch.setenv(name, "")
    assert rendered() == before


@pytest.mark.parametrize("seconds", ["-5", "0", "4", "86401", "nan"])
def test_a_pause_between_lists_that_the_chart_refuses_is_wrong_usage(seconds: str) -> None:
    result = run("run", "--resync", seconds)
    assert (result.exit_code, "--resync" in result.stderr) == (2, True)


def test_the_chart_takes_the_same_pauses_between_lists() -> None:
    schema = json.loads((ROOT / "charts/secure-vllm-operator/values.schema.json").read_text(encoding="utf-8"))
    taken = schema["properties"]["resyncSeconds"]
    (option,) = [item for item in main.commands["run"].params if item.name == "resync"]
    assert isinstance(option.type, click.IntRange)
    assert (option.type.min, option.type.max) == (taken["minimum"], taken["maximum"])


@pytest.mark.parametrize("command", ["routes", "guard"])
@pytest.mark.parametrize(
    ("version", "told"),
    [
        ("9.9.9", f"not 9.9.9: write --version {catalogue.newest()}, or leave it out"),
        ("0.5.0", f"not 0.5.0: write --version {catalogue.oldest()}, or leave it out"),
        ("", "is not a vLLM release number such as"),
    ],
)
def test_a_version_beyond_the_catalogue_has_no_answer(command: str, version: str, told: str) -> None:
    result = run(command, "--version", version)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr


@pytest.mark.parametrize("command", ["routes", "guard"])
def test_a_patch_release_is_known_by_its_minor_one_as_of_an_image(command: str) -> None:
    newest = catalogue.newest()
    assert run(command, "--version", str(replace(newest, patch=newest.patch + 1))).exit_code == 0


def test_routes_are_those_of_the_catalogue() -> None:
    rows = [json.loads(line) for line in run("routes", "-o", "json").stdout.splitlines()]
    assert {(row["method"], row["path"]) for row in rows} == set(catalogue.routes_of(catalogue.newest()))
    assert {row["gateway"] for row in rows if row["path"] == "/pause"} == {"never"}


def test_routes_start_at_once() -> None:
    """Half a second from the start of the process: no models, no client, no renderer; measured by bench/commands.py."""
    heavy = "{'pydantic', 'kopf', 'kubernetes', 'aiohttp', 'jinja2', 'cryptography'}"
    program = (
        "import sys; from click.testing import CliRunner; from securevllm.cli import main;"
        f" assert CliRunner().invoke(main, ['routes']).exit_code == 0; sys.exit(str({heavy} & set(sys.modules) or ''))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603
    assert done.stderr.strip() == ""


def test_the_operator_answers_before_it_loads_what_only_a_leader_needs() -> None:
    program = "import sys, securevllm.operator; sys.exit('kopf' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0  # noqa: S603


def test_routes_of_a_profile_as_tables() -> None:
    table = run("routes", "--profile", "chat").stdout.splitlines()
    marked = run("routes", "--profile", "chat", "-o", "md").stdout.splitlines()
    assert [line.split()[1] for line in table[1:]] == ["/v1/models", "/v1/chat/completions", "/v1/completions"]
    assert len(marked) == len(table) + 1
    assert run("routes", "--version", "x").exit_code == 2


def test_run_without_a_cluster_says_what_to_do() -> None:
    result = run("run", "--http-port", "0")
    assert result.exit_code == 1
    assert "--kubeconfig FILE" in result.stderr


@pytest.mark.parametrize(
    "address",
    ["", "docs", "docs.example.com", "javascript:alert(1)", "https://a b", "https://a/?q=1", "https://u:p@host/", "ftp://a",
     "https://a/<b>", "https://a/" + "x" * 300],
)  # fmt: skip
def test_an_address_of_the_documentation_that_is_none_is_wrong_usage(address: str) -> None:
    result = run("run", f"--docs-url={address}")
    assert result.exit_code == 2
    assert "is not an address such as https://docs.example.com" in result.stderr


def test_the_address_of_the_documentation_has_no_slash_at_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Settings] = []
    monkeypatch.setattr("securevllm.operator.run", seen.append)
    for arguments in ((), ("--docs-url=https://docs.example.com:8443/svllm/",)):
        assert run("run", *arguments).exit_code == 0
    assert [settings.docs_url for settings in seen] == ["docs", "https://docs.example.com:8443/svllm"]


# --------------------------------------------------------------------------------------------------------- explain


def both(first: str, second: str) -> str:
    """Two resources in one manifest; a `spec` without source is wrong."""
    good = yaml.safe_load(SAMPLE.read_text(encoding="utf-8"))
    documents = [good | {"metadata": {"name": name}} for name in (first, second)]
    for document in documents:
        if document["metadata"]["name"] == "bad":
            document["spec"] = {"model": {"name": "a/b"}, "image": "vllm/vllm-openai:v0.33.0"}
    return yaml.safe_dump_all(documents)


@pytest.mark.parametrize(
    ("output", "begins"),
    [
        ("text", "default/quickstart: Qwen/Qwen3-8B by vLLM"),
        ("mermaid", "flowchart LR\n"),
        ("html", "<!doctype html>\n"),
        ("json", '{"name": "quickstart", "namespace": "default"'),
    ],
)
def test_explain_in_every_form(output: str, begins: str) -> None:
    result = run("explain", "-f", str(SAMPLE), "-o", output)
    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout.startswith(begins)
    assert result.stdout.endswith("\n")
    assert not result.stdout.endswith("\n\n")


def test_explain_tells_text_unless_asked_otherwise() -> None:
    assert run("explain", "-f", str(SAMPLE)).stdout == run("explain", "-f", str(SAMPLE), "-o", "text").stdout


def test_explain_of_several_resources() -> None:
    told = {
        output: run("explain", "-f", "-", "-o", output, stdin=both("one", "two")).stdout for output in ("text", "json")
    }
    assert [json.loads(line)["name"] for line in told["json"].splitlines()] == ["one", "two"]
    assert "\n\ndefault/two: " in told["text"]
    assert run("explain", "-f", "-", "-o", "html", stdin=both("one", "two")).stdout.count("<!doctype html>") == 1
    assert run("explain", "-f", "-", "-o", "mermaid", stdin=both("one", "two")).stdout.count("flowchart LR") == 1


@pytest.mark.parametrize("output", ["text", "mermaid", "html", "json"])
def test_explain_names_what_is_wrong_and_tells_the_rest(output: str) -> None:
    result = run("explain", "-f", "-", "-o", output, stdin=both("bad", "good"))
    assert result.exit_code == 2
    assert "bad: ModelSourceMissing: spec.model.source" in result.stderr
    assert "default/good" in result.stdout or json.loads(result.stdout)["name"] == "good"
    nothing = run("explain", "-f", "-", "-o", output, stdin=both("bad", "bad"))
    assert (nothing.exit_code, nothing.stdout) == (2, "")


@pytest.mark.parametrize(
    ("arguments", "found"),
    [
        (("--cluster-domain", "example.org"), "svc.example.org"),
        (("--operator-namespace", "ops"), "of namespace ops"),
        (("--cluster-range", "203.0.113.0/24"), "203.0.113.0/24"),
        (("--dns-cidr", "169.254.20.10/32"), "169.254.20.10/32"),
        (("--dns-namespace", "openshift-dns"), "of namespace openshift-dns"),
        (("--dns-pods", "app=dns"), "pods app=dns"),
        (("--dns-port", "5353"), "UDP 5353, TCP 5353"),
        (("-n", "team"), "team/quickstart"),
    ],
)
def test_every_option_of_the_cluster_reaches_the_picture(arguments: tuple[str, ...], found: str) -> None:
    assert found not in run("explain", "-f", str(SAMPLE)).stdout
    assert found in run("explain", "-f", str(SAMPLE), *arguments).stdout


def test_explain_refuses_what_is_no_resource() -> None:
    result = run("explain", "-f", "-", stdin="{apiVersion: v1, kind: Pod}")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "this command takes securevllm.io/v1alpha1" in result.stderr


def test_a_port_in_use_is_named_with_the_way_out(tmp_path: Path) -> None:
    kubeconfig = tmp_path / "kubeconfig"
    cluster = {"name": "k", "cluster": {"server": "https://127.0.0.1:1"}}
    user, context = {"name": "u", "user": {"token": "x"}}, {"name": "c", "context": {"cluster": "k", "user": "u"}}
    parts = {"clusters": [cluster], "users": [user], "contexts": [context], "current-context": "c"}
    kubeconfig.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", **parts}), encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        command = [sys.executable, "-m", "securevllm", "run", "--kubeconfig", str(kubeconfig)]
        done = subprocess.run(  # noqa: S603 - our own program
            [*command, "--http-host", "127.0.0.1", "--http-port", port],
            capture_output=True, text=True, check=False, timeout=180, env={"PYTHONPATH": str(ROOT / "operator")},
        )  # fmt: skip
    assert done.returncode == 1
    assert f"cannot listen on 127.0.0.1:{port}" in done.stderr
    assert "--http-port" in done.stderr
    assert "Traceback" not in done.stderr


def test_probe_teaches_its_vantage_points_rights_and_exit_codes() -> None:
    told = run("probe", "--help").stdout
    for part in ("securevllm probe llama -n llm --from default", "Rights: get", "1 something can be reached", "Ctrl-C"):
        assert part in told


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "names of resources"),
        ([], "none of them is there"),
        (["llama", "--all"], "names of resources and --all do not go together"),
        (["--all", "--all-namespaces"], "--all and --all-namespaces do not go together"),
        (["llama", "--status", "--from", "other"], "leave one of them out"),
        (["llama", "--wait", "-1"], "--wait"),
        (["llama", "--wait", "nan"], "--wait"),
        (["llama", "--kubeconfig", "/nowhere"], "--kubeconfig"),
        (["llama", "--kubeconfig", str(SAMPLE)], "cannot be used"),
        (["llama", "-n", "BAD_NS"], "is no name of a namespace"),
        (["llama", "-n", "a/../b"], "is no name of a namespace"),
        (["llama", "--from", "fine", "--from", "a.b"], "'a.b' is no name of a namespace"),
        (["llama", "--from", ""], "is no name of a namespace"),
    ],
)
def test_probe_says_what_is_wrong_with_its_usage(arguments: Sequence[str], told: str) -> None:
    result = run("probe", *arguments)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr


def test_probe_never_takes_another_cluster_than_the_one_that_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a kubeconfig there is no context: the pod's own cluster is not what was asked for."""

    def never(*_: object) -> None:
        raise AssertionError

    monkeypatch.setattr("securevllm.probe.run", never)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("KUBECONFIG", raising=False)
    result = run("probe", "llama", "--context", "prod")
    assert (result.exit_code, result.stdout) == (2, "")
    assert "--context prod is one of a kubeconfig, and there is none" in result.stderr


@pytest.mark.parametrize("command", [["probe", "llama"], ["check", "-n", "llm"]])
@pytest.mark.parametrize(
    ("files", "told"),
    [
        (["one", "two"], "$KUBECONFIG lists several files; name one with --kubeconfig"),
        (["", "absent"], "which is no file; name one with --kubeconfig"),
        (["", "one"], "one cannot be used: it holds nothing"),
    ],
)
def test_the_kubeconfig_of_the_shell_has_to_be_one_file(
    command: list[str], files: list[str], told: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("one", "two"):
        (tmp_path / name).touch()
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(name and str(tmp_path / name) for name in files))
    result = run(*command)
    assert (result.exit_code, result.stdout) == (2, "")
    assert told in result.stderr
    assert "$KUBECONFIG" in run(command[0], "--help").stdout


def test_files_are_checked_whatever_the_kubeconfig_of_the_shell_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", os.pathsep.join(("/one", "/two")))
    assert run("check", "-f", str(SAMPLE)).exit_code == 0


def told_by(monkeypatch: pytest.MonkeyPatch, reports: Sequence[Report] | BaseException) -> None:
    def instead(*_: object) -> Sequence[Report]:
        if isinstance(reports, BaseException):
            raise reports
        return reports

    monkeypatch.setattr("securevllm.probe.run", instead)


ROW = Row("this machine", "llama-engine-0", "n1", 8000, "api", "vLLM's HTTP API", "open", "the handshake was completed")
REPORTS = [
    Report("llm", "llama", Proof("False", "EngineReachable", "Told.", "2026-01-01T00:00:00Z"), (ROW,), ("A note.",)),
    Report("llm", "qwen", Proof("Unknown", "CannotMeasure", "Not told.")),
]


def test_probe_prints_a_row_for_each_attempt_and_the_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    told_by(monkeypatch, REPORTS)
    result = run("probe", "--all", "-n", "llm")
    assert result.exit_code == 1
    assert result.stdout.splitlines() == [
        "FROM          TARGET          NODE  PORT  WHAT LISTENS     RESULT  HOW IT ENDED",
        "this machine  llama-engine-0  n1    8000  vLLM's HTTP API  open    the handshake was completed",
        "llm/llama: NOT ISOLATED (EngineReachable, measured at 2026-01-01T00:00:00Z)",
        "  Told.",
        "  A note.",
        "  See docs/status.md#enginereachable",
        "llm/qwen: NOT MEASURED (CannotMeasure)",
        "  Not told.",
    ]


def test_probe_prints_json_for_programs(monkeypatch: pytest.MonkeyPatch) -> None:
    told_by(monkeypatch, REPORTS)
    lines = [json.loads(line) for line in run("probe", "--all", "-o", "json").stdout.splitlines()]
    assert [(line["name"], line["isolated"], line["measuredAt"]) for line in lines] == [
        ("llama", "False", "2026-01-01T00:00:00Z"),
        ("qwen", "Unknown", None),
    ]
    assert lines[0]["attempts"][0]["from"] == "this machine"


def test_probe_of_nothing_says_so_and_an_interrupt_has_its_own_code(monkeypatch: pytest.MonkeyPatch) -> None:
    told_by(monkeypatch, [])
    result = run("probe", "--all-namespaces")
    assert (result.exit_code, "no SecureVLLMDeployment in the cluster" in result.stderr) == (0, True)
    told_by(monkeypatch, KeyboardInterrupt())
    result = run("probe", "llama")
    assert (result.exit_code, "the canary pods are removed" in result.stderr) == (130, True)


@pytest.mark.parametrize("option", ["--namespace", "--operator-namespace", "--dns-namespace", "--canary-service"])
@pytest.mark.parametrize("value", ["BAD_NS", "-a", "a.b", "a" * 64, ""])
def test_a_name_that_no_namespace_can_have_is_wrong_usage(option: str, value: str) -> None:
    sample = SAMPLE.read_text(encoding="utf-8")
    result = run("render", "-f", "-", f"{option}={value}", stdin=sample)
    assert result.exit_code == 2, result.output
    assert "is no name of a namespace" in result.stderr
    assert run("render", "-f", "-", f"{option}=a-good-one", stdin=sample).exit_code == 0


def test_a_namespace_of_the_manifest_is_judged_too() -> None:
    text = SAMPLE.read_text(encoding="utf-8")
    assert text.count("  name: quickstart\n") == 1
    result = run(
        "render", "-f", "-", stdin=text.replace("  name: quickstart\n", "  name: quickstart\n  namespace: A_B\n")
    )
    assert result.exit_code == 2
    assert "metadata.namespace 'A_B': this is no name of a namespace" in result.stderr


def test_a_domain_that_is_none_is_wrong_usage() -> None:
    sample = SAMPLE.read_text(encoding="utf-8")
    refused = run("render", "-f", "-", "--cluster-domain=a..b", stdin=sample)
    assert "is no domain such as cluster.local" in refused.stderr
    assert run("render", "-f", "-", "--cluster-domain=k8s.example", stdin=sample).exit_code == 0


def test_an_object_without_api_version_is_named_as_such() -> None:
    assert (
        "holds (no apiVersion) Deployment; this command takes"
        in run("render", "-f", "-", stdin="kind: Deployment").stderr
    )


def test_the_list_of_commands_is_not_cut_off() -> None:
    assert "..." not in run("--help").stdout.partition("Commands:")[2]
