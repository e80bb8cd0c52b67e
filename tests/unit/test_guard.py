"""Nothing that a user writes becomes a flag, a variable, a label or a device that opens what the operator closed."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from securevllm import catalogue
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.errors import SpecError
from securevllm.render import Observed, render
from securevllm.render.meta import Owner

FINE: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}


def reasons(**spec: Any) -> set[str]:
    try:
        parse("llama", {**FINE, **spec})
    except SpecError as error:
        return {problem.reason for problem in error.problems}
    return set()


EVASIONS = [
    "--trust-remote-code", "--trust-remote", "--trust_remote_code", "--TRUST-REMOTE-CODE", "--Trust-Remote-Code",
    "--host=0.0.0.0", "--hos=0.0.0.0", "--port=1", "--api-key=x", "--api-ke=x", "--model=x", "--config=/tmp/x",
    "--config", "--conf=/x", "-tp=2", "-tp", "-O3", "-O.level=3", "-h", "--", "-", "x", "", "--=x", "---dtype=x",
    "--dtype bfloat16", "--dtype\n--host=x", "--dtype=bfloat16\n--host=x", "--dtype=\tx", " --dtype=x", "--dtype=x ",
    "--dtype=$(VLLM_API_KEY)", "--dtype=$$(A)", "--dtype=`id`", "--dtype=--host", "--dtype=-x", "--dtype", "--dtype=",
    "\u2013\u2013dtype=x", "\u2014host=x", "\u2010-host=x", "--d\u0442ype=x", "--dtype\u200b=x", "--dtype=\u0661",
    "--hf-overrides.auto_map=x", "--compilation-config.backend=x", "--speculative-config.model=x",
    "--speculative-config={}", "--middleware=a.b", "--kv-transfer-config={}", "--kv-transfer-config.kv_connector=x",
    "--worker-cls=a.b", "--scheduler-cls=a.b", "--tool-parser-plugin=/x.py", "--chat-template=/x",
    "--allowed-local-media-path=/", "--enable-scale-out", "--tokens-only", "--uds=/x", "--root-path=/x",
    "--hf-token=x", "--load-format=pt", "--download-dir=/x", "--ssl-keyfile=/x", "--numa-bind", "--grpc",
    "--quantization=a.b", "--tool-call-parser=a/b", "--reasoning-parser=a.b:C", "--max-model-len=1e9",
    "--max-model-len=0x10", "--max-model-len=", "--max-model-len=9" + "9" * 20, "--enforce-eager=true",
    "--enforce-eager=", "--no-enforce-eager", "--gpu-memory-utilization=nan", "--gpu-memory-utilization=inf",
    "--gpu-memory-utilization=-1", "--dtyp=bfloat16", "--max-model=8192", "--enforce", "--max_model_len=8192",
]  # fmt: skip


@pytest.mark.parametrize("arg", EVASIONS)
def test_evasions_are_refused(arg: str) -> None:
    assert reasons(engine={"args": [arg]}) & {"ArgumentRefused", "InvalidSpec"}


@pytest.mark.parametrize("flag", sorted(catalogue.flags().owned))
def test_flags_of_the_operator_are_refused_and_the_way_is_told(flag: str) -> None:
    for arg in (flag, f"{flag}=1", flag.replace("-", "_").replace("__", "--", 1), flag[:-1]):
        with pytest.raises(SpecError) as caught:
            parse("llama", {**FINE, "engine": {"args": [arg]}})
        if arg.startswith(flag):
            assert catalogue.flags().owned[flag] in str(caught.value)


@pytest.mark.parametrize("flag", sorted(catalogue.flags().allowed))
def test_allowed_flags_are_allowed_with_their_kind_of_value_and_once(flag: str) -> None:
    kind = catalogue.flags().allowed[flag]
    arg = {"none": flag, "int": f"{flag}=16", "float": f"{flag}=0.5", "word": f"{flag}=some_word-2"}[kind]
    assert reasons(engine={"args": [arg]}) == set()
    assert reasons(engine={"args": [arg, arg]}) == {"ArgumentRefused"}
    assert reasons(engine={"args": [f"{flag}=a b"]}) == {"InvalidSpec"}


@pytest.mark.parametrize("name", sorted(catalogue.environment().fixed))
def test_variables_of_the_operator_are_refused(name: str) -> None:
    assert reasons(engine={"env": [{"name": name, "value": "1"}]}) == {"VariableRefused"}


@pytest.mark.parametrize(
    "name",
    ["LD_PRELOAD", "LD_LIBRARY_PATH", "PYTHONPATH", "PATH", "HF_ENDPOINT", "HF_TOKEN", "VLLM_API_KEY", "VLLM_HOST_IP",
     "POD_IP", "HTTPS_PROXY", "VLLM_LORA_RESOLVER_CACHE_DIR", "VLLM_ENABLE_COHERE_API", "NCCL_SOCKET_IFNAME", "HOME"],
)  # fmt: skip
def test_variables_that_open_something_are_refused(name: str) -> None:
    assert reasons(engine={"env": [{"name": name, "value": "1"}]}) == {"VariableRefused"}


@pytest.mark.parametrize("name", sorted(catalogue.environment().allowed))
def test_allowed_variables_are_allowed_once(name: str) -> None:
    assert reasons(engine={"env": [{"name": name, "value": "1"}]}) == set()
    assert reasons(engine={"env": [{"name": name, "value": "1"}, {"name": name, "value": "2"}]}) != set()


@pytest.mark.parametrize("value", ["$(VLLM_API_KEY)", "a$b", "$$"])
def test_a_value_expands_nothing(value: str) -> None:
    assert reasons(engine={"env": [{"name": "TZ", "value": value}]}) == {"InvalidSpec"}


@pytest.mark.parametrize(
    "key",
    ["securevllm.io/resource", "x.securevllm.io/a", "app.kubernetes.io/name", "kubernetes.io/a", "k8s.io/a",
     "sidecar.istio.io/inject", "istio.io/rev", "linkerd.io/inject", "kuma.io/sidecar-injection", "io.cilium.io/x",
     "azure.workload.identity/use", "pod-template-hash", "controller-revision-hash", "job-name",
     "batch.kubernetes.io/job-name"],
)  # fmt: skip
def test_labels_that_others_read_are_refused(key: str) -> None:
    assert reasons(engine={"labels": {key: "x"}}) == {"LabelRefused"}


@pytest.mark.parametrize("key", ["team", "example.com/team", "mysecurevllm.io/a", "notkubernetes.io/x"])
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


@pytest.mark.parametrize("gpu", ["nvidia.com/gpu", "nvidia.com/mig-1g.5gb", "amd.com/gpu", "gpu.intel.com/xe"])
def test_gpus_are_allowed(gpu: str) -> None:
    assert reasons(engine={"resources": {"limits": {gpu: 1}}}) == set()
    assert "InvalidSpec" in reasons(engine={"resources": {"limits": {gpu: 1, "aws.amazon.com/neuron": 1}}})


# -------------------------------------------------------------------------------- whatever passes is harmless in argv

HOSTILE = st.sampled_from(
    ["--host=0.0.0.0", "-x", "--", "--trust-remote-code", "$(VLLM_API_KEY)", "a$(B)", "a\n--host=x", "\n", "a b",
     "a\x00", "\u2013x", "a\u200b", "a", "a/b", "/models/x", "A_b.c", "\u0430", "a\r",
     "'", '"', "{}", "a=b", "--x=y", "a,--x"]
) | st.text(max_size=12)  # fmt: skip
OURS = frozenset(catalogue.flags().owned) | frozenset(catalogue.flags().allowed)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    name=HOSTILE,
    served=st.none() | HOSTILE,
    revision=st.none() | HOSTILE,
    path=st.none() | HOSTILE,
    domains=st.lists(HOSTILE, max_size=2),
    args=st.lists(HOSTILE | HOSTILE.map("--dtype={}".format), max_size=2),
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
        "engine": {"args": args, "env": [{"name": "TZ", "value": value}]},
        "security": {"media": {"allowedDomains": domains}},
    }
    # Each hostile value is tried alone as well: one that is refused must not hide another.
    for candidate in (
        raw,
        {**raw, "engine": {}},
        {**raw, "engine": {}, "security": {}},
        {**FINE, "engine": raw["engine"]},
    ):
        try:
            judged = parse("llama", candidate)
        except SpecError:
            continue
        made = render(Owner("llama", "apps", "u"), judged, Context(), Observed())
        for workload in (*made.workloads, *made.withheld):
            for container in workload["spec"]["template"]["spec"]["containers"]:
                if container["name"] != "envoy":
                    harmless(container)


def harmless(container: dict[str, Any]) -> None:
    fetches = container["name"] == "fetch"
    flags = {"--revision", "--local-dir", "--exclude"} if fetches else OURS
    for index, arg in enumerate(container["args"]):
        if arg.startswith("-"):
            assert index > 0, "the model comes first"
            assert arg.partition("=")[0] in flags
        assert not set(arg) & set("\n\r\x00\t ")
        assert "$(" not in arg or arg == "--host=$(POD_IP)"
        assert arg.isascii()
    for variable in container["env"]:
        assert "$" not in variable.get("value", "")


def test_a_list_of_values_ends_at_a_flag_of_ours() -> None:
    judged = parse("llama", {**FINE, "security": {"media": {"allowedDomains": ["a.example", "b.example"]}}})
    made = render(Owner("llama", "apps", "u"), judged, Context(), Observed())
    args = made.workloads[-1]["spec"]["template"]["spec"]["containers"][0]["args"]
    last = ["--allowed-media-domains", "a.example", "b.example", "--disable-fastapi-docs"]
    assert args[-len(last) :] == last
