"""The guard against vLLM's real parser: whatever that parser would set, the guard saw, or it refused.

Both get the same arguments, made of the release's own flags in every spelling that the parser takes. When the guard has
nothing to say, what vLLM reads in the rendered arguments must be what it would have read in the user's own, the flags
that it sets must be those that the guard judged, and no flag of the operator may have changed.
"""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securevllm import catalogue
from securevllm.api.guard import arguments
from tests.catalogue.flexible_parser import Release, release

pytestmark = pytest.mark.slow

VERSIONS = ("0.33.0", "0.22.1", "0.11.1")
MODEL = "/models/llama"
OWN = [
    "--served-model-name=llama", "--host=10.0.0.7", "--port=8000", "--tensor-parallel-size=1",
    "--pipeline-parallel-size=1", "--allowed-media-domains", "none.invalid", "--disable-fastapi-docs",
]  # fmt: skip
MOUNTS = ("/mnt/files",)
RISKS = tuple(catalogue.risks())

# Values in which something is hidden, and values that are fine for some flag.
VALUES = (
    "8192", "32k", "-1", "0.9", "auto", "bfloat16", "ngram", "safetensors", "/mnt/files/a", "sql=/mnt/files/a", "true",
    '{"method":"ngram","num_speculative_tokens":3}', '{"image":2}', '{"temperature":0.5}', "{}", "[1,2]", "1,2",
    '{"method":"custom_class","model":"a.B"}', '{"auto_map":{"AutoModel":"a.B"}}', '{"backend":"a.b"}', '{"a":1,"a":2}',
    "--trust-remote-code", "--host=0.0.0.0", "-tp", "a.b.C", "a b", "", "/etc/passwd", "x.yaml", "pt", "NaN", "-0.5",
)  # fmt: skip
KEYS = (
    "", ".method", ".num_speculative_tokens", ".model", ".backend", ".cudagraph_mode", ".pass_config.fuse_norm_quant",
    ".compile_sizes+", ".temperature", ".image.count", ".auto_map", ".kv_connector", ".", "..", ".a.b.c+",
)  # fmt: skip


@pytest.fixture(scope="module", params=VERSIONS)
def real(request: pytest.FixtureRequest) -> Release:
    return release(request.param)


def spelled(name: str, draw: st.DrawFn) -> str:
    """A spelling of a flag that the real parser may understand."""
    how = draw(st.sampled_from(["", "", "", "prefix", "underscores", "case", "no", "disable", "one dash"]))
    spellings = {
        "": name,
        "prefix": name[: draw(st.integers(3, max(3, len(name) - 1)))],
        "underscores": "--" + name[2:].replace("-", "_"),
        "case": name.upper(),
        "no": f"--no-{name[2:]}",
        "disable": name.replace("--enable-", "--disable-"),
        "one dash": name[1:],
    }
    return spellings[how]


FITTING = {
    "count": ["8", "0"], "int": ["-1", "8192"], "float": ["0.9", "1"],
    "size": ["32k", "1.5k", "8K", "auto", "-1"],
    "word": ["bfloat16", "a-b_c"], "path": ["/mnt/files/a", "/mnt/files/a/b.c"], "endpoint": ["http://a:4317"],
    "loras": ["sql=/mnt/files/a", '{"name": "sql", "path": "/mnt/files/b"}'],
    "bool": ["true", "false"], "words": ['["a", "b"]'], "ints": ["[1, 2]", "[]"], "floats": ["[0.5]"],
    "ops": ['["+a", "-b"]'],
}  # fmt: skip


def fitting(setting: catalogue.Setting) -> list[str]:
    """Values that the guard takes for a flag that is no JSON, or for a key."""
    return [*setting.choices, *FITTING.get("path" if setting.path else setting.kind, [])]


@st.composite
def allowed(draw: st.DrawFn, settings_: list[catalogue.Setting]) -> list[str]:
    """A flag that may be set, with a value that fits, in one of the spellings that the parser takes."""
    setting = draw(st.sampled_from(settings_))
    name = setting.name
    if draw(st.booleans()):
        name = "--" + name[2:].replace("-", "_")
    short = [short for short, long in catalogue.flags().short.items() if long == setting.name]
    name = draw(st.sampled_from([name, *short]))
    if setting.kind in {"none", "bool"}:
        return [f"--no-{setting.name[2:]}" if setting.kind == "bool" and draw(st.booleans()) else name]
    if setting.kind != "json":
        value = draw(st.sampled_from(fitting(setting)))
        return draw(st.sampled_from([[f"{name}={value}"], [name, value]]))
    keys = catalogue.flags().json[setting.name]
    chosen = draw(st.lists(st.sampled_from(sorted(keys)), max_size=3, unique=True))
    texts = {key: draw(st.sampled_from(fitting(keys[key]))) for key in chosen}
    apart, spaced = draw(st.tuples(st.booleans(), st.booleans()))
    if chosen and apart:
        dotted = [(f"{name}.{key}", text) for key, text in texts.items()]
        return [arg for key, text in dotted for arg in ([key, text] if spaced else [f"{key}={text}"])]
    whole = {
        key: text if keys[key].kind in {"word", "path", "choice"} else json.loads(text)
        for key, text in texts.items()
        if "." not in key
    }
    text = json.dumps(whole, separators=(", ", " : ") if spaced else None)
    return [name, text] if apart else [f"{name}={text}"]


def commands(version: str, names: list[str], shorts: list[str]) -> st.SearchStrategy[list[str]]:
    settable = [item for item in arguments.settable().values() if catalogue.Version.parse(version) in item.versions]

    @st.composite
    def any_(draw: st.DrawFn) -> list[str]:
        name = draw(st.sampled_from(draw(st.sampled_from([[item.name for item in settable], names, shorts]))))
        head = (spelled(name, draw) if name.startswith("--") else name) + draw(st.sampled_from(("",) * 8 + KEYS))
        value = draw(st.sampled_from(VALUES))
        return draw(st.sampled_from([[head], [f"{head}={value}"], [f"{head}={value}"], [head, value], [value]]))

    fine = st.lists(allowed(settable), min_size=1, max_size=4)
    mixed = st.lists(allowed(settable) | any_(), min_size=1, max_size=3)
    return (fine | mixed | st.lists(any_(), min_size=1, max_size=2)).map(
        lambda parts: [arg for part in parts for arg in part]
    )


def said(args: list[str], version: str) -> list[str]:
    found = arguments.check(args, catalogue.Version.parse(version), mounts=MOUNTS, accepted=RISKS)
    return [str(problem) for problem in found]


def meant(value: Any) -> Any:
    """A value as vLLM understands it: JSON texts by what they hold, lists of adapters by name and path."""
    if isinstance(value, list):
        return [meant(item) for item in value]
    if isinstance(value, str) and value[:1] in {"{", "["}:
        return json.loads(value, object_pairs_hook=lambda pairs: sorted((key, numbers(item)) for key, item in pairs))
    if isinstance(value, str) and value.startswith("sql="):
        return [("name", "sql"), ("path", value[4:])]
    return value


def numbers(value: Any) -> Any:
    """Lists that are given by commas are texts for vLLM, which makes numbers of them."""
    return (
        [int(item) if isinstance(item, str) and item.isdigit() else item for item in value]
        if isinstance(value, list)
        else value
    )


def test_whatever_the_real_parser_sets_the_guard_saw_or_refused(real: Release) -> None:
    flags = [flag.name for flag in real.found.flags]
    shorts = sorted({flag.short for flag in real.found.flags if flag.short} | {"-O", "-O3", "-h"})
    plain = real.parse([MODEL, *OWN])
    assert plain is not None
    tried = {"accepted": 0, "refused": 0, "refused, and vLLM would take it": 0}

    @settings(max_examples=800, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(args=commands(real.version, flags, shorts))
    def compare(args: list[str]) -> None:
        users = real.parse([MODEL, *args, *OWN])
        if said(args, real.version):
            tried["refused"] += 1
            tried["refused, and vLLM would take it"] += users is not None
            return
        tried["accepted"] += 1
        rendered = real.parse([MODEL, *arguments.canonical(args), *OWN])
        assert rendered is not None, "vLLM does not take what is rendered"
        changed = {name for name, value in rendered.items() if value != plain[name]}
        seen = {name.removeprefix("--").removeprefix("no-").replace("-", "_") for name in arguments.names(args)}
        assert changed == seen
        if users is not None:  # a short form that came later than this release is written out all the same
            assert {name: meant(value) for name, value in rendered.items()} == {
                name: meant(value) for name, value in users.items()
            }

    compare()
    assert tried["accepted"] > 150, tried
    assert tried["refused, and vLLM would take it"] > 80, tried


def test_every_flag_that_may_be_set_is_set_by_what_is_rendered(real: Release) -> None:
    version = catalogue.Version.parse(real.version)
    plain = real.parse([MODEL, *OWN])
    assert plain is not None
    for name, setting in arguments.settable().items():
        if version not in setting.versions:
            continue
        args = [name] if setting.kind in {"none", "bool"} else [f"{name}={_value(setting)}"]
        assert said(args, real.version) in ([], [text for text in said(args, real.version) if "egress" in text])
        rendered = real.parse([MODEL, *arguments.canonical(args), *OWN])
        assert rendered is not None, name
        changed = {key for key, value in rendered.items() if value != plain[key]}
        assert changed == {name.removeprefix("--").removeprefix("no-").replace("-", "_")}


def _value(setting: catalogue.Setting) -> str:
    examples = {
        "json": "{}", "loras": "sql=/mnt/files/a", "path": "/mnt/files/a", "word": "a", "endpoint": "http://a:4317",
        "float": "0.5",
    }  # fmt: skip
    return setting.choices[0] if setting.choices else examples.get(setting.kind, "8")


@pytest.mark.parametrize(
    ("args", "dest"),
    [
        (["--root-p=/"], "root_path"),
        (["--root_path", "/"], "root_path"),
        (["--trust-rem"], "trust_remote_code"),
        (["--middlew", "a.b"], "middleware"),
        (["-tp", "8"], "tensor_parallel_size"),
        (["--api_key=x"], "api_key"),
        (["--hf-overrides.auto_map.AutoModel=a.B"], "hf_overrides"),
        (["--kv-transfer-config.kv_connector=X"], "kv_transfer_config"),
        (["-tp.x=1"], "tensor_parallel_size"),
        (["--served-model-name.x=1"], "served_model_name"),
    ],
)
def test_evasions_work_on_the_real_parser_and_are_refused(real: Release, args: list[str], dest: str) -> None:
    """Each of these is a way around a list of forbidden texts; so it is known that the parser is the real one."""
    plain, evaded = real.parse([MODEL, *OWN]), real.parse([MODEL, *args])
    assert plain is not None
    assert evaded is not None
    assert evaded[dest] is not None
    assert said(args, real.version) or dest == "trust_remote_code"


def test_a_dotted_key_of_a_user_would_win_over_the_operators_own_flag(real: Release) -> None:
    """Why no spelling of the user is passed on: the parser moves dotted keys behind everything else."""
    own = ["--kv-transfer-config", '{"kv_connector":"NixlConnector"}']
    evaded = real.parse([MODEL, "--kv-transfer-config.kv_connector=Evil", *own])
    assert evaded is not None
    assert json.loads(evaded["kv_transfer_config"]) == {"kv_connector": "Evil"}
    assert "spec.disaggregation" in said(["--kv-transfer-config.kv_connector=Evil"], real.version)[0]
