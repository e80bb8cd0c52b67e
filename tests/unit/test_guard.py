"""Nothing that a user writes becomes a flag, a variable, a label or a device that opens what the operator closed.

`test_guard_evasions.py` has the spellings that are tried; here are the rules, one by one, and the property over all of
them. Each refusal is tried beside what is allowed, so that removing a rule fails a test.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm import catalogue
from securevllm.api.guard import arguments, pod
from securevllm.api.parse import Accepted, parse
from securevllm.context import Context
from securevllm.errors import Problem, SpecError
from securevllm.render import Observed, render
from securevllm.render.meta import Owner

if TYPE_CHECKING:
    from securevllm.catalogue import Setting

FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
FILES = {"name": "files", "mountPath": "/mnt/files", "configMap": {"name": "files"}}
WHY = "because this test says so"


def problems(**spec: Any) -> tuple[Problem, ...]:
    try:
        parse("llama", {**FINE, **spec})
    except SpecError as error:
        return error.problems
    return ()


def reasons(**spec: Any) -> set[str]:
    return {problem.reason for problem in problems(**spec)}


def refused(*args: str, **spec: Any) -> str:
    """All that is said about these arguments; empty when they are fine."""
    return " ".join(str(problem) for problem in problems(engine={"args": list(args), "volumes": [FILES]}, **spec))


def rendered(judged: Accepted) -> list[dict[str, Any]]:
    """Containers of engine and download; the gateway's has no argument of the user."""
    made = render(Owner("llama", "apps", "u"), judged, Context(), Observed(fetched=frozenset()))
    pods = [workload["spec"]["template"]["spec"] for workload in (*made.workloads, *made.withheld)]
    return [container for pod in pods for container in pod["containers"] if container["name"] != "envoy"]


# ---------------------------------------------------------------------------------------------------------- arguments

EXAMPLES = {
    "none": "",
    "bool": "",
    "count": "8",
    "int": "16",
    "float": "0.5",
    "size": "32k",
    "word": "some_word-2",
    "path": "/mnt/files/a.jinja",
    "endpoint": "http://collector.tracing:4317",
    "loras": "sql=/mnt/files/sql",
    "json": "{}",
}
EGRESS = {"egress": [{"to": {"podSelector": {"matchLabels": {"app": "otel"}}}, "ports": [{"port": 4317}], "why": WHY}]}


def example(setting: Setting) -> str:
    value = setting.choices[0] if setting.choices else EXAMPLES[setting.kind]
    return f"{setting.name}={value}" if value else setting.name


@pytest.mark.parametrize("flag", sorted(catalogue.flags().owned))
def test_flags_of_the_operator_are_refused_and_the_way_is_told(flag: str) -> None:
    field = catalogue.flags().owned[flag]
    for arg in (flag, f"{flag}=1", flag.replace("-", "_").replace("__", "--", 1), f"--no-{flag[2:]}", f"{flag}.a=1"):
        assert field in refused(arg), arg
    assert flag in refused(flag[:-1])


@pytest.mark.parametrize("flag", sorted(catalogue.dangers()[0]))
def test_dangerous_flags_are_refused_with_the_reason(flag: str) -> None:
    why = catalogue.dangers()[0][flag].why
    for arg in (flag, f"{flag}=1", flag.replace("-", "_").replace("__", "--", 1)):
        risk = catalogue.risky_flags().get(flag)
        assert why in refused(arg) or (
            risk is not None and ("takes no value" in refused(arg) or risk.name in refused(arg))
        )


@pytest.mark.parametrize("flag", sorted(catalogue.flags().allowed))
def test_allowed_flags_are_allowed_with_their_kind_of_value_and_once(flag: str) -> None:
    setting = catalogue.flags().allowed[flag]
    version = catalogue.newest() if catalogue.newest() in setting.versions else catalogue.oldest()
    arg = example(setting)
    name, _, value = arg.partition("=")

    def said(*args: str) -> str:
        return " ".join(map(str, arguments.check(args, version, mounts=("/mnt/files",), accepted=())))

    assert said(arg) == ""
    assert said(arg.replace("-", "_").replace("__", "--", 1)) == ""
    assert "only once" in said(arg, arg)
    if setting.kind == "none":
        assert "takes no value" in said(f"{flag}=true")
        assert f"--no-{flag[2:]}" not in arguments.settable()
    elif setting.kind == "bool":
        assert "takes no value" in said(f"{flag}=true")
        assert said(f"--no-{flag[2:]}") == ""
        assert "only once" in said(flag, f"--no-{flag[2:]}")
    else:
        assert said(name, value) == ""
        for bad in ("", "a b", "../x", "--host", "\u0661", "{", "[]", "a.b:C"):
            assert said(f"{flag}={bad}"), bad
        assert said(flag)
        assert said(flag, "--enforce-eager")
    assert arguments.canonical([arg.replace("=", " ", 0)])[0].startswith(flag)


@pytest.mark.parametrize(
    ("version", "flag", "told"),
    [
        ("0.28.0", "--max-num-queued-reqs=5", "only vLLM 0.29.0 and newer"),
        ("0.33.0", "--override-pooler-config={}", "only vLLM before 0.12.0"),
    ],
)
def test_a_flag_that_the_version_lacks_is_refused(version: str, flag: str, told: str) -> None:
    (problem,) = arguments.check([flag], catalogue.Version.parse(version), mounts=(), accepted=())
    assert told in problem.rule


@pytest.mark.parametrize(
    ("args", "canonical"),
    [
        (["--max-model-len", "8192"], ["--max-model-len=8192"]),
        (["--max_model_len=8k"], ["--max-model-len=8k"]),
        (["-q", "fp8"], ["--quantization=fp8"]),
        (["--seed", "-1"], ["--seed=-1"]),
        (["--enforce_eager"], ["--enforce-eager"]),
        (["--no-enable-prefix-caching"], ["--no-enable-prefix-caching"]),
        (
            ["--speculative-config", '{"method": "ngram", "num_speculative_tokens": 3}'],
            ['--speculative-config={"method":"ngram","num_speculative_tokens":3}'],
        ),
        (
            ["--compilation-config.pass_config.fuse_norm_quant", "true", "--seed=1", "-cc.compile_sizes+=1,2"],
            ['--compilation-config={"pass_config":{"fuse_norm_quant":true},"compile_sizes":[1,2]}', "--seed=1"],
        ),
        (['--limit-mm-per-prompt={"image": 2, "video": {"count": 1}}'],
         ['--limit-mm-per-prompt={"image":2,"video":{"count":1}}']),
        (
            ["--lora-modules", "sql=/mnt/files/sql", '{"name": "py", "path": "/mnt/files/py"}', "--enable-lora"],
            ["--lora-modules", "sql=/mnt/files/sql", "py=/mnt/files/py", "--enable-lora"],
        ),
        (
            ['--lora-modules={"name": "py", "path": "/mnt/files/py", "base_model_name": "llama"}'],
            ["--lora-modules", '{"name":"py","path":"/mnt/files/py","base_model_name":"llama"}'],
        ),
    ],
)  # fmt: skip
def test_every_spelling_becomes_one(args: list[str], canonical: list[str]) -> None:
    assert refused(*args) == ""
    assert arguments.canonical(args) == canonical
    assert arguments.canonical(canonical) == canonical
    judged = parse("llama", {**FINE, "engine": {"args": args, "volumes": [FILES]}})
    assert rendered(judged)[0]["args"][1 : 1 + len(canonical)] == canonical


@pytest.mark.parametrize(
    ("prefix", "advice", "never"),
    [
        ("--max-model-le=1", "Write the full name: --max-model-len.", "Leave it out"),
        ("--root-p=/", "Leave it out: it stands for --root-path", "Write the full name"),
    ],
)
def test_a_prefix_is_never_answered_with_a_flag_that_is_refused_too(prefix: str, advice: str, never: str) -> None:
    told = refused(prefix)
    assert advice in told
    assert never not in told


def test_what_an_earlier_release_accepted_is_passed_on() -> None:
    assert arguments.canonical(["--gone-since=1", "--dtype=bfloat16"]) == ["--gone-since=1", "--dtype=bfloat16"]


@pytest.mark.parametrize("name", sorted(catalogue.risky_flags()))
def test_a_risky_flag_needs_its_risk_in_words(name: str) -> None:
    risk = catalogue.risky_flags()[name]
    arg = example(risk.flags[name])
    assert risk.name in refused(arg)
    taken = {"security": {"accept": [{"risk": risk.name, "why": WHY}]}}
    assert refused(arg, **taken) == ""
    assert arg in rendered(parse("llama", {**FINE, "engine": {"args": [arg]}, **taken}))[0]["args"]
    assert parse("llama", {**FINE, "engine": {"args": [arg]}, **taken}).risks == (f"{risk.name}: {WHY}",)
    other = next(item for item in catalogue.risks() if item != risk.name)
    assert risk.name in refused(arg, security={"accept": [{"risk": other, "why": WHY}]})


def test_remote_code_is_pinned_and_only_then_downloaded() -> None:
    taken = {"accept": [{"risk": "trustRemoteCode", "why": WHY}]}
    hub = {"name": "a/b", "source": {"huggingFace": {}}}
    spec: dict[str, Any] = {"engine": {"args": ["--trust-remote-code"]}, "security": taken}
    for revision in ({}, {"revision": "main"}, {"revision": "0" * 39}):
        assert reasons(model={**hub, **revision}, **spec) == {"RevisionNotPinned"}
    pinned = {**hub, "revision": "0" * 40}
    assert reasons(model=pinned, **spec) == set()
    code, plain = (parse("llama", {**FINE, "model": pinned, **more}) for more in (spec, {}))
    excluded = [{arg for arg in rendered(judged)[0]["args"] if "exclude" in arg} for judged in (code, plain)]
    assert excluded[1] - excluded[0] == {"--exclude=*.py"}
    assert {"--exclude=*.pt", "--exclude=*.bin"} <= excluded[0]
    folders = {arg for judged in (code, plain) for arg in rendered(judged)[0]["args"] if "local-dir" in arg}
    assert len(folders) == 2


def test_traces_need_an_egress_to_their_port() -> None:
    arg = "--otlp-traces-endpoint=http://collector.tracing.svc:4317"
    assert "declared egress" in refused(arg)
    assert refused(arg, security=EGRESS) == ""
    assert "declared egress" in refused(arg.replace("4317", "4318"), security=EGRESS)
    assert refused("--otlp-traces-endpoint=grpc://collector.tracing.svc", security=EGRESS) == ""
    for url in ("file:///x", "http://u:p@h:4317", "http://h:4317?x", "4317", "http://:4317"):
        assert "kind endpoint" in refused(f"--otlp-traces-endpoint={url}", security=EGRESS)


@pytest.mark.parametrize("flag", ["--chat-template", "--tokenizer", "--generation-config"])
def test_a_path_is_in_a_declared_volume(flag: str) -> None:
    assert refused(f"{flag}=/mnt/files/x") == ""
    for path in ("/mnt/file", "/mnt/filesx", "/mnt/files/../x", "/mnt/files//x", "/mnt", "/etc/passwd", "mnt/files/x",
                 "/mnt/files/.x", "{{ x }}", "/models/x", "owner/name", "/mnt/files/x/"):  # fmt: skip
        assert "spec.engine.volumes" in refused(f"{flag}={path}"), path
    assert "mount a volume" in " ".join(map(str, problems(engine={"args": [f"{flag}=/mnt/files/x"]})))
    assert flag == "--generation-config" or refused(f"{flag}=auto")


# -------------------------------------------------------------------------------------------------------- environment


@pytest.mark.parametrize("name", sorted(name for name in catalogue.environment().fixed if name.isupper()))
def test_variables_of_the_operator_are_refused(name: str) -> None:
    assert reasons(engine={"env": [{"name": name, "value": "1"}]}) == {"VariableRefused"}


@pytest.mark.parametrize("name", sorted(catalogue.dangers()[1]))
def test_dangerous_variables_are_refused_with_the_reason(name: str) -> None:
    (problem,) = problems(engine={"env": [{"name": name, "value": "1"}]})
    assert name in catalogue.environment().fixed or catalogue.dangers()[1][name].why in problem.rule


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "LD_LIBRARY_PATH", "LD_AUDIT", "PYTHONPATH", "PYTHONSTARTUP", "PYTHONHOME", "PATH", "HF_ENDPOINT",
     "HF_TOKEN", "POD_IP", "NCCL_SOCKET_IFNAME", "NCCL_NET_PLUGIN", "NCCL_CONF_FILE", "GLOO_SOCKET_IFNAME", "HOME",
     "SAGEMAKER_MODEL_PATH", "CUSTOM_SCRIPT_FILENAME", "CUSTOM_FASTAPI_ANYTHING", "STANDARD_PIP_ARGS", "PIP_INDEX_URL",
     "TRITON_CACHE_DIR", "CUDA_INJECTION64_PATH", "RAY_ADDRESS", "UCX_NET_DEVICES", "MC_FORCE_TCP", "SSL_CERT_FILE",
     "REQUESTS_CA_BUNDLE", "OPENSSL_CONF", "TORCH_LOGS_OUT", "TORCHINDUCTOR_CACHE_DIR", "OTEL_PYTHON_DISTRO",
     "OTEL_EXPORTER_OTLP_ENDPOINT", "KUBERNETES_SERVICE_HOST", "ANYTHING_ELSE"],
)  # fmt: skip
def test_variables_that_open_something_are_refused(name: str) -> None:
    assert reasons(engine={"env": [{"name": name, "value": "1"}]}) == {"VariableRefused"}


@pytest.mark.parametrize("name", sorted(catalogue.environment().allowed))
def test_allowed_variables_are_allowed_once(name: str) -> None:
    setting = catalogue.environment().allowed[name]
    value = setting.choices[0] if setting.choices else {"text": "a:b"}.get(setting.kind, EXAMPLES.get(setting.kind))
    one = {"name": name, "value": value}
    assert reasons(engine={"env": [one]}) == set()
    assert "VariableRefused" in reasons(engine={"env": [one, one]})
    if setting.kind != "text":
        assert reasons(engine={"env": [{"name": name, "value": "x y"}]}) == {"VariableRefused"}


def test_a_variable_that_the_version_lacks_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Today every allowed variable is in every release; the next one may not be."""
    name, since = "VLLM_LOGGING_LEVEL", catalogue.Range(since=catalogue.Version(0, 33))
    setting = replace(catalogue.environment().allowed[name], versions=since)
    monkeypatch.setitem(catalogue.environment().allowed, name, setting)
    env = {"env": [{"name": name, "value": "INFO"}]}
    below = {"accept": [{"risk": "vllmVersionBelowFloor", "why": WHY}]}
    assert reasons(engine=env) == set()
    assert reasons(engine=env, image="vllm/vllm-openai:v0.32.0", security=below) == {"VariableRefused"}


def test_a_variable_of_another_field_is_refused_with_that_field() -> None:
    for name, field in (("VLLM_ENGINE_READY_TIMEOUT_S", "startupTimeout"), ("HTTPS_PROXY", "proxy")):
        (problem,) = problems(engine={"env": [{"name": name, "value": "1"}]})
        assert field in problem.fix


@pytest.mark.parametrize("value", ["$(VLLM_API_KEY)", "a$b", "$$", "a\nb", "\x00", "a\rb"])
def test_a_value_expands_nothing_and_is_one_line(value: str) -> None:
    assert reasons(engine={"env": [{"name": "TZ", "value": value}]}) == {"InvalidSpec"}


def test_a_value_from_a_secret_or_config_map_is_for_names_of_the_allowlist() -> None:
    secret = {"secretKeyRef": {"name": "otel", "key": "headers"}}
    config = {"configMapKeyRef": {"name": "otel", "key": "attributes"}}
    env = [
        {"name": "OTEL_EXPORTER_OTLP_TRACES_HEADERS", "valueFrom": secret},
        {"name": "OTEL_RESOURCE_ATTRIBUTES", "valueFrom": config},
    ]
    written = rendered(parse("llama", {**FINE, "engine": {"env": env}}))[0]["env"]
    assert [item for item in written if item["name"].startswith("OTEL")] == env
    for name in ("LD_PRELOAD", "VLLM_API_KEY", "HTTPS_PROXY"):
        assert reasons(engine={"env": [{"name": name, "valueFrom": secret}]}) == {"VariableRefused"}
    wrong: list[dict[str, Any]] = [
        {}, {**secret, **config}, {"fieldRef": {"fieldPath": "status.hostIP"}}, {"resourceFieldRef": {}}
    ]  # fmt: skip
    for source in wrong:
        assert reasons(engine={"env": [{"name": "TZ", "valueFrom": source}]}) == {"InvalidSpec"}
    assert reasons(engine={"env": [{"name": "TZ", "value": "UTC", "valueFrom": secret}]}) == {"InvalidSpec"}
    assert reasons(engine={"env": [{"name": "TZ"}]}) == {"InvalidSpec"}


@pytest.mark.parametrize("end", ["-client-keys", "-engine-key", "-gateway-auth", "-gateway-ca", "-gateway-tls"])
def test_secrets_of_the_operator_reach_no_engine(end: str) -> None:
    source = {"secretKeyRef": {"name": f"other{end}", "key": "x"}}
    assert reasons(engine={"env": [{"name": "TZ", "valueFrom": source}]}) == {"SecretRefused"}
    token = {"tokenSecretRef": {"name": f"other{end}", "key": "x"}, "endpoint": "https://evil.example"}
    assert reasons(model={"name": "a/b", "source": {"huggingFace": token}}) == {"SecretRefused"}
    volume = {"name": "a", "mountPath": "/mnt/a", "secret": {"secretName": f"other{end}"}}
    assert reasons(engine={"volumes": [volume]}) == {"VolumeRefused"}


def test_the_operators_variables_come_last_and_once() -> None:
    env = [{"name": "TZ", "value": "UTC"}]
    names = [item["name"] for item in rendered(parse("llama", {**FINE, "engine": {"env": env}}))[0]["env"]]
    assert len(names) == len(set(names))
    fixed = catalogue.environment().fixed
    assert fixed.keys() <= set(names)
    assert all(names.index("TZ") < names.index(name) for name in fixed)


# --------------------------------------------------------------------------------------------------------- pod fields


@pytest.mark.parametrize(
    "key",
    ["securevllm.io/resource", "x.securevllm.io/a", "app.kubernetes.io/name", "kubernetes.io/a", "k8s.io/a",
     "sidecar.istio.io/inject", "istio.io/rev", "linkerd.io/inject", "kuma.io/sidecar-injection", "io.cilium.io/x",
     "azure.workload.identity/use", "pod-template-hash", "controller-revision-hash", "job-name",
     "batch.kubernetes.io/job-name", "k8s.v1.cni.cncf.io/networks", "consul.hashicorp.com/connect-inject",
     "example.com/team", "mysecurevllm.io/a", "notkubernetes.io/x"],
)  # fmt: skip
def test_labels_that_others_read_are_refused(key: str) -> None:
    assert reasons(engine={"labels": {key: "x"}}) == {"LabelRefused"}


@pytest.mark.parametrize("key", ["team", "cost-centre", "kueue.x-k8s.io/queue-name"])
def test_own_labels_are_allowed(key: str) -> None:
    assert reasons(engine={"labels": {key: "x"}}) == set()


@pytest.mark.parametrize(
    "key",
    ["k8s.v1.cni.cncf.io/networks", "sidecar.istio.io/inject", "cni.projectcalico.org/ipAddrs", "team",
     "container.apparmor.security.beta.kubernetes.io/vllm", "io.kubernetes.cri-o.userns-mode"],
)  # fmt: skip
def test_annotations_are_an_allowlist(key: str) -> None:
    assert reasons(engine={"annotations": {key: "x"}}) == {"AnnotationRefused"}


@pytest.mark.parametrize(
    "resource", ["rdma/hca_shared_devices_a", "nvidia.com/hostdev", "intel.com/sriov", "hugepages-2Mi"]
)
def test_devices_with_networks_are_refused(resource: str) -> None:
    assert "ResourceRefused" in reasons(engine={"resources": {"limits": {resource: 1}}})
    # Without the platform's word an acceptance does not help.
    taken = {"accept": [{"risk": "networkDevices", "why": WHY}]}
    assert reasons(engine={"resources": {"limits": {resource: 1}}}, security=taken) >= {
        "ResourceRefused",
        "OutOfBounds",
    }


@pytest.mark.parametrize("gpu", ["nvidia.com/gpu", "nvidia.com/mig-1g.5gb", "amd.com/gpu", "gpu.intel.com/xe"])
def test_gpus_are_allowed(gpu: str) -> None:
    assert reasons(engine={"resources": {"limits": {gpu: 1}}}) == set()
    assert "InvalidSpec" in reasons(engine={"resources": {"limits": {gpu: 1, "aws.amazon.com/neuron": 1}}})
    assert "ResourceRefused" in reasons(gateway={"resources": {"limits": {gpu: 1}}})
    router = {"image": "vllm/vllm-router:v0.1.17", "resources": {"limits": {gpu: 1}}}
    assert "ResourceRefused" in reasons(disaggregation={"connector": "nixl", "router": router})


@pytest.mark.parametrize(
    ("source", "volume", "writable"),
    [
        ({"configMap": {"name": "a"}}, {"configMap": {"name": "a"}}, False),
        ({"secret": {"secretName": "a"}}, {"secret": {"secretName": "a", "defaultMode": 0o440}}, False),
        (
            {"persistentVolumeClaim": {"claimName": "a"}},
            {"persistentVolumeClaim": {"claimName": "a", "readOnly": True}},
            False,
        ),
        (
            {"persistentVolumeClaim": {"claimName": "a", "readOnly": False}},
            {"persistentVolumeClaim": {"claimName": "a", "readOnly": False}},
            True,
        ),
        ({"emptyDir": {}}, {"emptyDir": {"sizeLimit": "1Gi"}}, True),
    ],
)
def test_volumes_are_mounted(source: dict[str, Any], volume: dict[str, Any], writable: bool) -> None:
    judged = parse("llama", {**FINE, "engine": {"volumes": [{"name": "home", "mountPath": "/mnt/x", **source}]}})
    made = render(Owner("llama", "apps", "u"), judged, Context(), Observed())
    pod = made.workloads[-1]["spec"]["template"]["spec"]
    assert pod["volumes"][-1] == {"name": "user-home", **volume}
    mount = {"name": "user-home", "mountPath": "/mnt/x"}
    assert pod["containers"][0]["volumeMounts"][-1] == (mount if writable else {**mount, "readOnly": True})
    assert len({item["name"] for item in pod["volumes"]}) == len(pod["volumes"])


@pytest.mark.parametrize(
    "path",
    ["/home/vllm", "/home/vllm/.cache", "/tmp", "/tmp/x", "/dev/shm", "/models", "/models/x",  # noqa: S108
     "/usr/lib", "/opt/ml/model",
     "/opt/venv/lib/python3.12/site-packages", "/etc", "/proc", "/sys", "/var/run/secrets/kubernetes.io/serviceaccount",
     "/run", "/root", "/", "/mnt", "/data", "/mnt/", "/mnt/../etc", "/mnt/./x", "/mnt//x", "/mnt/.x", "/mntx/a",
     "/workspace", "/vllm-workspace", "mnt/a", "/mnt/a b", "/mnt/a:b", "/mnt/a\n", "/mnt/\u0430"],
)  # fmt: skip
def test_a_volume_shadows_nothing(path: str) -> None:
    volume = {"name": "a", "mountPath": path, "emptyDir": {}}
    malformed = re.fullmatch(r"(/[A-Za-z0-9_][A-Za-z0-9._-]*)+", path) is None
    assert reasons(engine={"volumes": [volume]}) == {"InvalidSpec" if malformed else "VolumeRefused"}


@pytest.mark.parametrize(("one", "other"), [("/mnt/a", "/mnt/a"), ("/mnt/a", "/mnt/a/b"), ("/mnt/a/b", "/mnt/a")])
def test_volumes_stand_side_by_side(one: str, other: str) -> None:
    volumes = [{"name": str(n), "mountPath": path, "emptyDir": {}} for n, path in enumerate((one, other))]
    assert reasons(engine={"volumes": volumes}) == {"VolumeRefused"}
    volumes[1]["mountPath"] = f"{one}2"
    assert reasons(engine={"volumes": volumes}) == set()


@pytest.mark.parametrize(
    "source",
    [{"hostPath": {"path": "/"}}, {"csi": {"driver": "x"}}, {"projected": {"sources": []}}, {"nfs": {}}, {"image": {}},
     {"ephemeral": {}}, {"downwardAPI": {}}, {"emptyDir": {"medium": "Memory"}}, {},
     {"configMap": {"name": "a"}, "emptyDir": {}}],
)  # fmt: skip
def test_no_other_volume_is_offered(source: dict[str, Any]) -> None:
    assert reasons(engine={"volumes": [{"name": "a", "mountPath": "/mnt/a", **source}]}) == {"InvalidSpec"}


def test_weights_stay_read_only() -> None:
    claim = {"claimName": "weights", "readOnly": False}
    volume = {"name": "a", "mountPath": "/mnt/a", "persistentVolumeClaim": claim}
    source = {"name": "llama", "source": {"persistentVolumeClaim": {"claimName": "weights"}}}
    hub = {"name": "a/b", "source": {"huggingFace": {"storage": {"claimName": "weights"}}}}
    for model in (source, hub):
        assert reasons(model=model, engine={"volumes": [volume]}) == {"VolumeRefused"}
        assert (
            reasons(model=model, engine={"volumes": [{**volume, "persistentVolumeClaim": {"claimName": "weights"}}]})
            == set()
        )
        assert (
            reasons(model=model, engine={"volumes": [{**volume, "persistentVolumeClaim": {**claim, "claimName": "b"}}]})
            == set()
        )


@pytest.mark.parametrize(
    "field",
    ["hostNetwork", "hostPID", "hostIPC", "hostUsers", "shareProcessNamespace", "securityContext", "containers",
     "initContainers", "sidecars", "volumeMounts", "envFrom", "command", "serviceAccountName", "dnsPolicy", "dnsConfig",
     "hostAliases", "ports", "lifecycle", "podTemplate", "resourceClaims", "automountServiceAccountToken",
     "workingDir"],
)  # fmt: skip
def test_no_other_field_of_a_pod_is_offered(field: str) -> None:
    assert reasons(engine={field: True}) == {"InvalidSpec"}


@pytest.mark.parametrize("field", pod.NOT_OFFERED)
def test_a_field_that_people_look_for_is_refused_with_the_way_out(field: str) -> None:
    places: list[dict[str, Any]] = [
        {field: {}},
        {"volumes": [{"name": "a", "mountPath": "/mnt/a", field: {}}]},
        {"env": [{"name": "TZ", "valueFrom": {field: {}}}]},
    ]
    rule, fix = pod.NOT_OFFERED[field]
    for place in places:
        told = [problem for problem in problems(engine=place) if problem.field.endswith(field)]
        assert {(problem.rule, problem.fix) for problem in told} == {(rule, fix)}


# -------------------------------------------------------------------------------------------------------------- media


def environment_of(**spec: Any) -> dict[str, str]:
    return {item["name"]: item.get("value", "") for item in rendered(parse("llama", {**FINE, **spec}))[0]["env"]}


def test_limits_of_media_are_always_set_and_can_only_be_lowered() -> None:
    usual = environment_of()
    limits = {name: value for name, value in usual.items() if name.startswith("VLLM_MAX_")}
    assert len(limits) == 10
    assert all(int(value) > 0 for value in limits.values())
    lower = {"maxDownloadMegabytes": 8, "maxRequestDownloadMegabytes": 16, "maxImagePixels": 1000000}
    lowered = environment_of(security={"media": lower})
    changed = {name: value for name, value in lowered.items() if usual[name] != value}
    assert changed == {
        "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": "8",
        "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB": "16",
        "VLLM_MAX_IMAGE_PIXELS": "1000000",
    }
    for field in lower:
        for value in (0, -1, 178956971):
            assert reasons(security={"media": {field: value}}) == {"InvalidSpec"}


def test_a_declared_proxy_is_set_and_nothing_else_is() -> None:
    proxy = {
        "to": {"podSelector": {"matchLabels": {"app": "squid"}}},
        "ports": [{"port": 3128}],
        "proxy": "http://squid.proxy.svc:3128",
        "why": WHY,
    }
    names = ("HTTP_PROXY", "HTTPS_PROXY", "http_proxy", "https_proxy")
    assert {environment_of()[name] for name in (*names, "ALL_PROXY", "NO_PROXY")} == {""}
    with_proxy = environment_of(security={"egress": [proxy]})
    assert {with_proxy[name] for name in names} == {"http://squid.proxy.svc:3128"}
    assert "127.0.0.1" in with_proxy["NO_PROXY"] == with_proxy["no_proxy"]
    assert with_proxy["ALL_PROXY"] == ""
    for change in ({"ports": [{"port": 3129}]}, {"ports": [{"port": 3128, "protocol": "UDP"}]}):
        assert reasons(security={"egress": [{**proxy, **change}]}) == {"EgressRefused"}
    assert reasons(security={"egress": [proxy, proxy]}) == {"EgressRefused"}
    for url in ("http://squid", "socks5://squid:3128", "http://u:p@squid:3128", "http://squid:3128/x", "squid:3128"):
        assert reasons(security={"egress": [{**proxy, "proxy": url}]}) == {"InvalidSpec"}


# -------------------------------------------------------------------------------- whatever passes is harmless in argv

HOSTILE = st.sampled_from(
    ["--host=0.0.0.0", "-x", "--", "--trust-remote-code", "$(VLLM_API_KEY)", "a$(B)", "a\n--host=x", "\n", "a b",
     "a\x00", "\u2013x", "a\u200b", "a", "a/b", "/models/x", "A_b.c", "\u0430", "a\r",
     "'", '"', "{}", "a=b", "--x=y", "a,--x", '{"method":"ngram"}', '{"a":"\\u0024(B)"}', "/mnt/files/a", "-0.5", "-1"]
) | st.text(max_size=12)  # fmt: skip
FLAGGED = st.builds(
    "{}{}{}{}".format,
    st.sampled_from(["", "-", "--", "--no-", "---"]),
    st.sampled_from(sorted({name[2:] for name in (*arguments.settable(), *catalogue.flags().owned)} | {"sc", "q"})),
    st.sampled_from(["", ".a", ".model", ".method", ".x+", "."]),
    st.just("") | HOSTILE.map("={}".format),
)  # fmt: skip
OURS = frozenset(catalogue.flags().owned) | frozenset(arguments.settable())


@settings(max_examples=300, deadline=None, derandomize=True)
@given(
    name=HOSTILE,
    served=st.none() | HOSTILE,
    revision=st.none() | HOSTILE,
    path=st.none() | HOSTILE,
    domains=st.lists(HOSTILE, max_size=2),
    args=st.lists(HOSTILE | FLAGGED, max_size=3),
    value=HOSTILE,
    which=st.sampled_from(["hub", "claim", "none"]),
)
def test_no_value_becomes_a_flag_or_is_expanded(  # noqa: PLR0917 - hypothesis names them
    name: str, served: str | None, revision: str | None, path: str | None, domains: list[str], args: list[str],
    value: str, which: str,
) -> None:  # fmt: skip
    sources: dict[str, dict[str, Any]] = {
        "hub": {"source": {"huggingFace": {}}},
        "claim": {"source": {"persistentVolumeClaim": {"claimName": "a", **({"path": path} if path else {})}}},
        "none": {},
    }
    model: dict[str, Any] = {"name": name, **sources[which]}
    model |= {"servedName": served} if served is not None else {}
    model |= {"revision": revision} if revision is not None else {}
    raw = {
        **FINE,
        "model": model,
        "engine": {"args": args, "env": [{"name": "TZ", "value": value}], "volumes": [FILES]},
        "security": {"media": {"allowedDomains": domains}},
    }
    # Each hostile value is tried alone as well: one that is refused must not hide another.
    for candidate in (
        raw,
        {**raw, "engine": {}},
        {**raw, "engine": {}, "security": {}},
        {**FINE, "engine": {**raw["engine"], "env": []}},
        *({**FINE, "engine": {"args": [arg], "volumes": [FILES]}} for arg in args),
    ):
        try:
            judged = parse("llama", candidate)
        except SpecError:
            continue
        for container in rendered(judged):
            harmless(container)


def harmless(container: dict[str, Any]) -> None:
    fetches = container["name"] == "fetch"
    flags = {"--revision", "--local-dir", "--exclude"} if fetches else OURS
    seen: set[str] = set()
    for index, arg in enumerate(container["args"]):
        if arg.startswith("-"):
            assert index > 0, "the model comes first"
            name = arg.partition("=")[0]
            assert name in flags
            assert fetches or name not in seen
            seen.add(name)
        assert not set(arg) & set("\n\r\x00\t ")
        assert "$" not in arg.removeprefix("--host=$(POD_IP)")
        assert arg.isascii()
    for variable in container["env"]:
        assert "$" not in variable.get("value", "")


def test_a_list_of_values_ends_at_a_flag_of_ours() -> None:
    judged = parse("llama", {**FINE, "security": {"media": {"allowedDomains": ["a.example", "b.example"]}}})
    made = render(Owner("llama", "apps", "u"), judged, Context(), Observed())
    args = made.workloads[-1]["spec"]["template"]["spec"]["containers"][0]["args"]
    last = ["--allowed-media-domains", "a.example", "b.example", "--disable-fastapi-docs"]
    assert args[-len(last) :] == last
