"""Command lines of containers, as people write them: found, understood, or said to be unreadable."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.check.command import Launch, Variable, canonical, environment, is_vllm_image, launch

IMAGE = "vllm/vllm-openai:v0.33.0"
ARGS = ["--port", "8080"]
MODULE = "vllm.entrypoints.openai.api_server"


def started(variables: dict[str, Variable] | None = None, **container: Any) -> Launch | None:
    return launch({"name": "c", **container}, variables or {}, ())


def served(variables: dict[str, Variable] | None = None, **container: Any) -> Launch:
    found = started(variables, **container)
    assert found is not None
    assert found.serves
    return found


@pytest.mark.parametrize(
    "container",
    [
        {"image": IMAGE, "args": ["owner/model", *ARGS]},
        {"image": IMAGE, "args": ["--model", "owner/model", *ARGS]},
        {"image": IMAGE, "args": ["serve", "owner/model", *ARGS]},
        {"image": IMAGE, "args": ["--model=owner/model", "--port=8080"]},
        {"image": "other", "command": ["vllm", "serve", "owner/model", *ARGS]},
        {"image": "other", "command": ["vllm", "serve"], "args": ["owner/model", *ARGS]},
        {"image": "other", "command": ["/usr/local/bin/vllm"], "args": ["serve", "owner/model", *ARGS]},
        {"image": "other", "args": ["vllm", "serve", "owner/model", *ARGS]},
        {"image": "other", "command": ["python3", "-m", MODULE, "--model", "owner/model", *ARGS]},
        {"image": "other", "command": ["python", "-m", "vllm.entrypoints.cli.main", "serve", "owner/model", *ARGS]},
        {"image": "other", "command": ["sh", "-c", "vllm serve owner/model --port 8080"]},
        {"image": "other", "command": ["/bin/bash", "-lc"], "args": ["exec vllm serve owner/model --port 8080"]},
        {"image": "other", "command": ["bash", "-ec", "sleep 5 && vllm serve owner/model \\\n  --port 8080 > /l 2>&1"]},
        {"image": "other", "command": ["sh", "-c", "# it\nexport A=1\nB=/x vllm serve 'owner/model' --port 8080 # 80"]},
        {"image": "other", "command": ["sh", "-c", "cd x || exit; vllm serve owner/model --port 8080 | tee l &\nwait"]},
        {"image": "other", "command": ["tini", "--", "numactl", "-N", "0", "vllm", "serve", "owner/model", *ARGS]},
        {"image": "other", "command": ["vllm", "serve", "--trust-remote-code", "owner/model", "--port", "8080"]},
        {"image": "other", "command": ["vllm", "serve", "--port", "8080", "owner/model"]},
        {"image": "other", "command": ["vllm", "serve", "owner/model", "--p", "1", "--port", "8080"]},
    ],
    ids=str,
)  # fmt: skip
def test_a_server_is_found(container: dict[str, Any]) -> None:
    found = served(**container)
    assert (found.model, found.number("--port", 8000)) == ("owner/model", 8080)


@pytest.mark.parametrize(
    "container",
    [
        {"image": "nginx"},
        {"image": "nginx", "command": ["vllm", "bench", "serve"]},
        {"image": "lmcache/lmstack-router:latest", "args": ["--port", "8000"]},
        {"image": "ghcr.io/llm-d/llm-d-routing-sidecar:v0.3.0", "args": ["--vllm-port=8200"]},
        {"image": "vllm/vllm-router:v1"},
        {"image": IMAGE, "command": ["sleep", "inf"]},
        {"image": "python:3", "command": ["sh", "-c", "echo 'unclosed"]},
        {"image": "python:3", "args": None, "command": None},
    ],
    ids=str,
)
def test_what_is_no_server_is_none(container: dict[str, Any]) -> None:
    assert started(**container) is None


@pytest.mark.parametrize(
    ("container", "why"),
    [
        ({"image": IMAGE, "command": ["/start.sh"]}, "a program of its own"),
        ({"image": IMAGE, "command": ["bash", "-c", "echo 'vllm serve x"]}, "No closing quotation"),
        ({"image": IMAGE, "command": ["python", "serve.py"]}, "a program of its own"),
    ],
)
def test_what_cannot_be_read_is_said(container: dict[str, Any], why: str) -> None:
    found = started(**container)
    assert found is not None
    assert not found.serves
    assert why in found.unreadable


@pytest.mark.parametrize(
    ("command", "ray", "dashboard"),
    [
        ("ray start --head --port=6379 && vllm serve m", "head", False),
        ("ray start --head --dashboard-host=0.0.0.0; vllm serve m", "head", True),
        ("ray start --address=$(LWS_LEADER_ADDRESS):6379 --block", "worker", False),
        ("bash /x/multi-node-serving.sh leader --ray_cluster_size=2; vllm serve m", "head", False),
        ("bash /x/multi-node-serving.sh worker --ray_address=a", "worker", False),
    ],
)
def test_ray_is_found(command: str, ray: str, dashboard: bool) -> None:
    found = started(image=IMAGE, command=["sh", "-c", command])
    assert found is not None
    assert (found.ray, found.dashboard, found.serves) == (ray, dashboard, "serve m" in command)


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("--trust-remote-code", "--trust-remote-code"),
        ("--trust_remote_code", "--trust-remote-code"),
        ("--trust-rem", "--trust-remote-code"),
        ("--root-p", "--root-path"),
        ("--kv-transfer-config.kv_connector", "--kv-transfer-config"),
        ("--hf-overrides.a+", "--hf-overrides"),
        ("-tp", "--tensor-parallel-size"),
        ("--no-enable-prefix-caching", "--no-enable-prefix-caching"),
        ("--no-enable_prefix_c", "--no-enable-prefix-caching"),
        ("--unheard-of", "--unheard-of"),
        ("-x", "-x"),
    ],
)
def test_a_flag_has_one_name(written: str, name: str) -> None:
    assert canonical(written) == name


def test_the_last_of_a_repeated_flag_wins_and_no_takes_back() -> None:
    found = served(image=IMAGE, args=["m", "--port=1", "--port=2", "--enable-lora", "--no-enable-lora"])
    assert found.number("--port", 8000) == 2
    assert not found.on("--enable-lora")
    assert found.number("--nnodes", 1) == 1
    assert served(image=IMAGE, args=["m", "--port=$(PORT)"]).number("--port", 8000) is None


def test_lists_end_at_the_next_flag() -> None:
    found = served(image=IMAGE, args=["m", "--served-model-name", "a", "b", "--dtype", "auto"])
    flag = found.flag("--served-model-name")
    assert flag is not None
    assert flag.values == ("a", "b")


def test_references_are_expanded_where_the_value_is_known() -> None:
    variables = {"MODEL": Variable("owner/m"), "PORT": Variable(None, "secret s/k")}
    assert served(variables, image=IMAGE, args=["$(MODEL)", "--port=$(PORT)"]).model == "owner/m"
    assert served(variables, image=IMAGE, command=["sh", "-c", 'vllm serve "${MODEL}"']).model == "owner/m"
    assert served(variables, image=IMAGE, command=["vllm", "serve", "$MODEL"]).model == "$MODEL"


def test_the_environment_says_what_it_hides() -> None:
    container = {
        "envFrom": [
            {"prefix": "P_", "configMapRef": {"name": "known"}},
            {"configMapRef": {"name": "away"}},
            {"secretRef": {"name": "secret"}},
            "nonsense",
        ],
        "env": [
            {"name": "A", "value": "$(P_X)/b"},
            {"name": "B", "valueFrom": {"secretKeyRef": {"name": "s", "key": "k"}}},
            {"name": "C", "valueFrom": {"configMapKeyRef": {"name": "known", "key": "X"}}},
            {"name": "D", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "E"},
            {"name": "F", "valueFrom": {}},
            {"value": "no name"},
        ],
    }
    variables, hidden = environment(container, {"known": {"X": "x"}})
    assert hidden == ("configMap away", "secret secret")
    assert {name: (item.value, item.source) for name, item in variables.items()} == {
        "P_X": ("x", "configMap known"),
        "A": ("x/b", ""),
        "B": (None, "secret s/k"),
        "C": ("x", "configMap known"),
        "D": (None, "field status.podIP"),
        "E": ("", ""),
        "F": (None, "unknown source"),
    }
    assert variables["E"].off
    assert not variables["B"].off


@pytest.mark.parametrize(
    ("image", "known"),
    [
        (IMAGE, True),
        ("registry:5000/mirror/vllm-openai", True),
        ("rocm/vllm:rocm6.2", True),
        ("ghcr.io/llm-d/llm-d-cuda:v0.3.0", True),
        ("lmcache/vllm-openai@sha256:" + "0" * 64, True),
        ("ghcr.io/llm-d/llm-d-inference-scheduler:v0.3", False),
        ("vllm/secure-vllm-operator:v1", False),
        ("nginx", False),
        ("", False),
    ],
)
def test_images_are_known_by_their_repository(image: str, known: bool) -> None:
    assert is_vllm_image(image) is known
