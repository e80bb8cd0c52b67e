"""Ways around the guard that somebody might try, by the rule that has to stop each.

A row is the arguments as a user would write them; above the rows stands a fragment of the message that must come.
So a rule that is removed fails here even where another one happens to refuse the same thing.
"""

from __future__ import annotations

from typing import Any

import pytest

from securevllm.api.parse import parse
from securevllm.errors import SpecError

VOLUME = {"name": "files", "mountPath": "/mnt/files", "configMap": {"name": "files"}}

ONLY_EXACT = "only exact names of the allowlist"
PREFIX = "vLLM takes a prefix for the whole name"
OWNED = "the operator sets this flag"
CODE = "imports or runs code"
FILES = "reads or writes files"
ROUTES = "opens routes"
LISTENER = "opens another listener"
CONNECTS = "connects to other hosts"
REQUEST = "lets a request choose"
CORS = "lets pages of other sites call"
ONCE = "a flag may stand only once"
KEY_ONCE = "a key may stand only once"
NO_VALUE = "takes no value"
NO_FLAG = "a value without a flag"
NEEDS = "needs a value of kind"
KEY = "not a key that it may have"
OBJECT = "a JSON object, with each key once"
NO_KEYS = "takes no JSON"
PATH = "only a path below a volume"
CHOICE = "not one of the values"
FORM = "String should match pattern"
RISK = "this flag is a risk"
TRACE = "kind endpoint"
INNER = "it needs"
SHORT_O = "-O is another flag"
ADAPTER = "an adapter is written as name=path"
ADAPTER_NAME = "the name of an adapter is a word"
ADAPTER_KEYS = "an adapter has name and path"

EVASIONS: dict[str, list[list[str]]] = {
    PREFIX: [
        ["--trust-remote"], ["--trust-rem"], ["--roo=/"], ["--root-p", "/"], ["--hos=0.0.0.0"], ["--api-ke=x"],
        ["--middle=a.b"], ["--max-model=8192"], ["--dtyp=bfloat16"], ["--enforce"], ["--conf=/x.yaml"],
        ["--serv=x"], ["--allowed-local=/"], ["--kv-tr={}"], ["--mode=x"], ["--trust_remote"],
        ["--speculative-conf={}"],
    ],
    ONLY_EXACT: [
        ["--TRUST-REMOTE-CODE"], ["--Trust-Remote-Code"], ["--Host=0.0.0.0"], ["--DTYPE=bfloat16"], ["---dtype=x"],
        ["--"], ["-"], ["--=x"], ["-tp2"], ["-tp-x"], ["-trust-remote-code"], ["-host=0.0.0.0"], ["-x"], ["-h"],
        ["--help"], ["--help=all"], ["--nozz"], ["--unknown-flag=1"], ["--numa-bind"], ["--dtype =bfloat16"],
        ["--dtype bfloat16"], ["-- dtype=x"], ["--dtype\\=x"], ["--dtype:x"], ["--disable-x"],
        ["--enable-sliding-window"], ["--disable-auto-tool-choice"], ["--addi-x=1"], ["--no-no-enforce-eager"],
        ["--no-max-model-len"], ["--no-dtype"], ["--show-hidden-metrics-for-version=0.1"],
        ["--fail-on-environ-validation"],
    ],
    OWNED: [
        ["--host=0.0.0.0"], ["--host", "10.0.0.7"], ["--port=1"], ["--api-key=x"], ["--api_key=x"],
        ["--api_key", "x"], ["--model=x"], ["--model", "x"], ["--served-model-name=x"],
        ["--served_model_name", "x", "y"], ["--revision=main"], ["--download-dir=/x"], ["-tp=2"], ["-tp", "2"],
        ["-pp", "2"], ["-dp=2"], ["-dpa=10.0.0.1"], ["-n=2"], ["-r", "1"], ["--nnodes=2"], ["--headless"],
        ["--no-headless"], ["--master-addr=1.2.3.4"], ["--master_port", "1"],
        ["--distributed-executor-backend=a.B"], ["--kv-transfer-config={}"],
        ["--kv_transfer_config.kv_connector=X"], ["--kv-transfer-config.kv_connector_module_path", "a.b"],
        ["--kv-events-config.publisher=zmq"], ["--allowed-media-domains=evil.example"],
        ["--allowed-media-domains", "a", "b"], ["--ssl-keyfile=/x"], ["--no-disable-fastapi-docs"],
        ["--disable-fastapi-docs"], ["-asc=2"], ["-ep"], ["--no-enable-expert-parallel"],
        ["--tensor-parallel-size.x=1"], ["--port.x=1"], ["-dcp=2"],
    ],
    CODE: [
        ["--middleware=a.b"], ["--middleware", "a.b"], ["--worker-cls=a.B"], ["--worker_cls=a.B"],
        ["--scheduler-cls=a.B"], ["--worker-extension-cls=a.B"], ["--logits-processors=a.B"],
        ["--tool-parser-plugin=/x.py"], ["--reasoning-parser-plugin=/x.py"], ["--io-processor-plugin=x"],
        ["--code-revision=main"], ["--config-format=x"], ["--additional-config={}"], ["--additional-config.x=1"],
        ["--model-class-overrides={}"], ["--log-config-file=/x"], ["--logging-config=x"],
        ["--ray-workers-use-nsight"], ["--kv-offloading-backend=native"], ["--spec-model=a/b"],
    ],
    FILES: [
        ["--config=/x/x.yaml"], ["--config", "/x/x.yaml"], ["--config.x=1"], ["--allowed-local-media-path=/"],
        ["--allowed_local_media_path", "/"], ["--hf-token=x"], ["--hf_token"], ["--tokenizer-revision=main"],
        ["--pt-load-map-location=cpu"], ["--default-mm-loras={}"], ["--mm-encoder-fp8-scale-path=/x"],
    ],
    ROUTES: [
        ["--enable-scale-out"], ["--tokens-only"], ["--enable-tokenizer-info-endpoint"], ["--enable-offline-docs"],
        ["--profiler-config={}"], ["--profiler-config.profiler=torch"], ["--enable-sleep-mode"],
        ["--enable-elastic-ep"], ["--enable-fault-tolerance"], ["--weight-transfer-config={}"],
        ["--no-enable-sleep-mode"],
    ],
    LISTENER: [
        ["--uds=/x"], ["--root-path=/"], ["--root_path", "/"], ["--grpc"], ["--grpc-port=1"],
        ["--data-parallel-multi-port-external-lb"], ["-dpm"], ["--data-parallel-supervisor-port=1"],
    ],
    CONNECTS: [
        ["--tool-server=demo"], ["--ec-transfer-config={}"], ["--ec-transfer-config.ec_connector=x"],
    ],
    REQUEST: [
        ["--trust-request-mm-kwargs"], ["--trust_request_mm_kwargs"],
    ],
    CORS: [
        ["--allowed-origins=[*]"], ["--allow-credentials"], ["--allowed-headers", "*"],
    ],
    RISK: [
        ["--trust-remote-code"], ["--trust_remote_code"], ["--enable-log-requests"], ["--enable-log-outputs"],
        ["--trust-request-chat-template"], ["--enable-prompt-embeds"], ["--enable-mm-embeds"],
        ["--max-log-len=10"],
    ],
    KEY_ONCE: [
        ["--speculative-config.method=ngram", "-sc.method=eagle"],
        ["--hf-overrides.rope_scaling.factor=1", "--hf-overrides.rope_scaling=1"],
        ["--hf-overrides.rope_scaling=1", "--hf-overrides.rope_scaling.factor=1"],
    ],
    ONCE: [
        ["--speculative-config={}", "--speculative-config.method=ngram"],
        ["--speculative-config.method=ngram", "--speculative-config={}"],
        ["--dtype=half", "--dtype=half"], ["--dtype=half", "--dtype", "half"],
        ["--max-model-len=1", "--max_model_len=2"], ["-q=fp8", "--quantization=fp8"],
        ["--enforce-eager", "--no-enforce-eager"], ["--no-enable-lora", "--enable_lora"],
        ['--speculative-config={"method":"ngram"}', "--speculative-config.method=eagle"],
        ["--speculative-config.method=ngram", '-sc={"method":"eagle"}'],
        ["--lora-modules", "a=/mnt/files/a", "--lora-modules=b=/mnt/files/b"],
    ],
    NO_VALUE: [
        ["--enforce-eager=true"], ["--enforce-eager="], ["--disable-log-stats=false"], ["--no-enable-lora=1"],
    ],
    NO_FLAG: [
        ["bfloat16"], ["--enforce-eager", "true"], ["--dtype=half", "host"], ["--max-model-len", "1", "2"],
        ["/models/other"], ["other/model", "--dtype=half"], ["--enable-lora", "x=/mnt/files/x"], ["@/etc/passwd"],
        ["=x"],
    ],
    NEEDS: [
        ["--dtype"], ["--dtype="], ["--dtype", "--host=0.0.0.0"], ["--dtype=--host"], ["--dtype=-x"],
        ["--dtype=a.b"], ["--quantization=a.b"], ["--tool-call-parser=a/b"], ["--reasoning-parser=a.b:C"],
        ["--tool-call-parser=/x.py"], ["--max-model-len=1e9"], ["--max-model-len=0x10"], ["--max-model-len="],
        ["--max-model-len=9" + "9" * 20], ["--max-model-len=1_000"], ["--max-model-len=1 000"],
        ["--max-model-len=+1"], ["--max-model-len=8kk"], ["--gpu-memory-utilization=nan"],
        ["--gpu-memory-utilization=inf"], ["--gpu-memory-utilization=1e-1"], ["--gpu-memory-utilization=0x1p-1"],
        ["--seed=1.5"], ["--seed", "--enforce-eager"], ["--block-size=16;id"], ["--dtype=`id`"], ["--dtype=a|b"],
        ["--dtype='half'"], ['--dtype="half"'], ["--dtype=half,float"], ["--runner=../x"],
        ["--kv-cache-dtype=fp8 "], ["--dtype= half"], ["--attention-backend=a.B"], ["--moe-backend=a:b"],
        ["--seed=--1"],
    ],
    CHOICE: [
        ["--load-format=pt"], ["--load-format=npcache"], ["--load-format=tensorizer"],
        ["--load-format=modelexpress"], ["--load-format=ipc_cache"], ["--load-format=SAFETENSORS"],
        ["--load-format="], ["--model-impl=terratorch"], ["--tokenizer-mode=custom"],
        ["--uvicorn-log-level=trace"], ["--fingerprint-mode=custom"], ["--scheduling-policy=a.B"],
        ["--all2all-backend=nixl_ep"], ["--expert-placement-strategy=x"],
    ],
    PATH: [
        ["--chat-template={{ x }}"], ["--chat-template=/etc/passwd"],
        ["--chat-template=/mnt/files/../../etc/passwd"], ["--chat-template=mnt/files/x"],
        ["--chat-template=/mnt/files//x"], ["--chat-template=/mnt/filesx/x"],
        ["--chat-template=/proc/self/environ"], ["--chat-template=file:///mnt/files/x"], ["--tokenizer=evil/repo"],
        ["--tokenizer=/home/vllm/x"], ["--generation-config=/var/x"], ["--generation-config=evil/repo"],
        ["--lora-modules=a=/etc/x"], ["--lora-modules", "a=/mnt/files/a", "b=evil/repo"],
        ["--lora-modules=a=../x"], ['--lora-modules={"name":"a","path":"evil/repo"}'],
        ["--tokenizer=/mnt/files/.hidden"],
    ],
    ADAPTER: [["--lora-modules=/mnt/files/a"], ["--lora-modules", "sql=/mnt/files/a", "/mnt/files/b"]],
    ADAPTER_NAME: [
        ["--lora-modules=a b=/mnt/files/a"], ["--lora-modules==/mnt/files/a"], ["--lora-modules=--host=/mnt/files/a"],
        ['--lora-modules={"name":"a","path":"/mnt/files/a","base_model_name":"a b"}'],
    ],
    ADAPTER_KEYS: [
        ['--lora-modules={"name":"a"}'], ['--lora-modules={"name":"a","path":"/mnt/files/a","x":1}'],
    ],
    KEY: [
        ["--hf-overrides.auto_map.AutoModel=a.B"], ['--hf-overrides={"auto_map":{"AutoModel":"a--b.C"}}'],
        ['--hf-overrides={"rope_scaling":{"auto_map":{}}}'], ["--hf-overrides.trust_remote_code=true"],
        ["--compilation-config.backend=a.b"], ['--compilation-config={"backend":"a.b"}'],
        ['--compilation-config={"inductor_passes":{"post_grad_custom_post_pass":"a.b"}}'],
        ["-cc.inductor_compile_config.x=1"], ["--compilation-config.cache_dir=/mnt/files"],
        ["--compilation-config.debug_dump_path=/mnt/files"], ["-cc.local_cache_dir=/x"],
        ["--speculative-config.code_revision=x"], ["--speculative-config.revision=x"],
        ["-sc.draft_load_config.load_format=pt"], ["--structured-outputs-config.reasoning_parser_plugin=/x.py"],
        ["--eplb-config.communicator=nixl"], ["--mm-processor-kwargs.code_revision=x"],
        ["--mm-processor-kwargs.trust_remote_code=true"], ["--model-loader-extra-config.tensorizer_uri=s3://x"],
        ['--model-loader-extra-config={"tensorizer_config":{}}'], ["--media-io-kwargs.video.video_backend=x"],
        ["--media-io-kwargs.image.x=1"], ["--limit-mm-per-prompt.text=1"], ["--pooler-config.normalize=true"],
        ["--hf-overrides..=1"], ["--hf-overrides.=1"], ["--speculative-config..method=x"],
        ['--hf-overrides={"":1}'], ['--hf-overrides={"rope_scaling.factor":1}'], ['--hf-overrides={"a b":1}'],
        ['--speculative-config={"meth\\u006fd ":"x"}'], ["--speculative-config.Method=ngram"],
    ],
    INNER: [
        ["--speculative-config.method=custom_class"], ["--speculative-config.method=extract_hidden_states"],
        ["--speculative-config.method.x=1"], ['--speculative-config={"method":"custom_class","model":"a.B"}'],
        ["--speculative-config.model=evil/repo"], ["--speculative-config.model=a.b.C"],
        ["--speculative-config.model=/etc/x"], ["-sc.method+=ngram"],
        ['--speculative-config={"method":["ngram"]}'], ['--speculative-config={"method":null}'],
        ['--speculative-config={"num_speculative_tokens":"3"}'],
        ['--speculative-config={"num_speculative_tokens":true}'],
        ['--speculative-config={"num_speculative_tokens":1e30}'],
        ['--speculative-config={"num_speculative_tokens":-1}'],
        ['--speculative-config={"num_speculative_tokens":{"a":1}}'], ["--media-io-kwargs.video.num_frames=-1"],
        ["--hf-overrides.architectures=a.B"], ["--hf-overrides.architectures+=a.B"],
        ['--hf-overrides={"architectures":["a/b"]}'], ["--structured-outputs-config.backend=a.B"],
        ["--structured-outputs-config.reasoning_parser=/x.py"], ["--compilation-config.custom_ops+=--x"],
        ['--compilation-config={"custom_ops":["+a.b"]}'], ["--compilation-config.compile_sizes+=1,x"],
        ['--hf-overrides={"rope_theta":"\\u0024(VLLM_API_KEY)"}'],
        ['--hf-overrides={"rope_scaling":{"rope_type":"\\u0024(VLLM_API_KEY)"}}'],
        ['--hf-overrides={"num_labels":2.5}'], ["--attention-config.backend=a.B"],
        ['--default-chat-template-kwargs={"enable_thinking":"{{ x }}"}'],
        ["--override-generation-config.temperature=NaN"], ["--limit-mm-per-prompt.image=-1"],
        ['--limit-mm-per-prompt={"image":[1]}'],
    ],
    OBJECT: [
        ["--speculative-config=[]"], ["--speculative-config=3"], ['--speculative-config="{}"'],
        ["--speculative-config={"], ["--speculative-config={'method':'ngram'}"],
        ['--speculative-config={"method":"ngram","method":"custom_class"}'],
        ['--speculative-config={"num_speculative_tokens":NaN}'], ["--speculative-config=" + '{"a":' * 500],
        ['--hf-overrides={"rope_scaling":{"factor":1,"factor":2}}'], ["--hf-overrides=a.b.C"],
        ["--compilation-config=3"],
    ],
    NO_KEYS: [
        ["--dtype.x=half"], ["--enforce-eager.x=1"], ["-q.x=fp8"], ["--lora-modules.name=x"],
        ["--max-model-len.+=1"],
    ],
    TRACE: [
        ["--otlp-traces-endpoint=file:///x"], ["--otlp-traces-endpoint=http://a:1@b"],
        ["--otlp-traces-endpoint=evil"],
    ],
    SHORT_O: [
        ["-O3"], ["-O=3"], ["-O", "3"], ["-O.level=3"], ["-O{}"],
    ],
    FORM: [
        ["--dtype\n--host=x"], ["--dtype=bfloat16\n--host=x"], ["--dtype=\tx"], ["--dtype=$(VLLM_API_KEY)"],
        ["$(POD_IP)"], ["--dtype=$$(A)"], ["--served-model-name=$(VLLM_API_KEY)"], ["\u2013\u2013dtype=x"],
        ["\u2014host=x"], ["\u2010-host=x"], ["--d\u0442ype=x"], ["--dtype\u200b=x"], ["--dtype=\u0661"],
        ["--max-model-len=\uff11"], ["--dtype=half\r"], ["--dtype=half\x00"], ["--dtype=half\x7f"],
        ["\ufeff--dtype=half"], ["--dtype=half\u2028"], ['--hf-overrides={"num_labels":2}$'], ["--dtype=\x1b[0m"],
    ],
}  # fmt: skip

# One list is of another kind: the API server's own limits.
OF_THE_SCHEMA: list[Any] = [
    [""],
    ["--dtype=" + "x" * 5000],
    [3],
    [None],
    [["--dtype=half"]],
    ["--seed=1"] * 65,
    "--dtype=half",
]

ROWS = [(fragment, args) for fragment, rows in EVASIONS.items() for args in rows]


def told(args: Any) -> str:
    spec = {
        "model": {"name": "/models/llama"},
        "image": "vllm/vllm-openai:v0.33.0",
        "engine": {"args": args, "volumes": [VOLUME]},
    }
    try:
        parse("llama", spec)
    except SpecError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(("fragment", "args"), ROWS, ids=[f"{n}" for n, _ in enumerate(ROWS)])
def test_an_evasion_is_refused_by_the_rule_that_is_there_for_it(fragment: str, args: list[str]) -> None:
    assert fragment in told(args)


@pytest.mark.parametrize("args", OF_THE_SCHEMA, ids=[f"{n}" for n, _ in enumerate(OF_THE_SCHEMA)])
def test_what_is_no_list_of_short_texts_is_refused(args: Any) -> None:
    assert "InvalidSpec" not in told(args)
    assert "spec.engine.args" in told(args)


def test_there_are_more_than_two_hundred() -> None:
    assert len({tuple(args) for _, args in ROWS}) == len(ROWS) > 200


@pytest.mark.parametrize("args", [row for fragment, row in ROWS if fragment not in {NO_FLAG, FORM}][::7])
def test_an_evasion_is_refused_wherever_it_stands(args: list[str]) -> None:
    for around in (["--enforce-eager"], ["--max-model-len=8192", "--enable-lora"]):
        assert told([*around, *args])
        assert told([*args, *around])


def test_every_finding_is_told_and_none_hides_another() -> None:
    text = told(["--host=0.0.0.0", "--dtype=a.b", "--middleware", "a.b", "--seed=1", "--worker-cls=x", "stray"])
    for index, fragment in ((0, OWNED), (1, NEEDS), (2, CODE), (5, CODE), (6, NO_FLAG)):
        assert f"spec.engine.args[{index}]" in text
        assert fragment in text
    assert "args[4]" not in text
