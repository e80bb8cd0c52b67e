"""The engine's command, environment, probes and volumes, and the fetch Job beside it."""

from __future__ import annotations

from typing import Any

import pytest

from securevllm import catalogue
from securevllm.api.parse import parse
from securevllm.context import Context
from securevllm.render import Observed, Rendered, pods, render
from securevllm.render.accepted import Pin
from securevllm.render.envoy import ENGINE_KEEP_ALIVE_SECONDS
from securevllm.render.meta import Object, Owner

OWNER = Owner("llama", "apps", "uid-1")
LOCAL: dict[str, Any] = {"model": {"name": "/models/llama"}, "image": "vllm/vllm-openai:v0.33.0"}
HUB: dict[str, Any] = {"model": {"name": "a/b", "source": {"huggingFace": {}}}}


def made(**spec: Any) -> Rendered:
    observed = Observed(
        restart_at=spec.pop("restart_at", ""),
        fetched=spec.pop("fetched", frozenset()),
        pins=spec.pop("pins", {}),
        engine_key=spec.pop("engine_key", b""),
        seal_key=b"seal",
    )
    return render(OWNER, parse("llama", {**LOCAL, **spec}), Context(), observed)


def workload(name: str, found: Rendered) -> Object:
    return next(obj for obj in (*found.workloads, *found.withheld) if obj["metadata"]["name"].startswith(name))


def engine(**spec: Any) -> Object:
    return workload("llama-engine", made(**spec))


def pod(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = engine(**spec)["spec"]["template"]["spec"]
    return found


def container(**spec: Any) -> dict[str, Any]:
    found: dict[str, Any] = pod(**spec)["containers"][0]
    return found


def test_the_command_line() -> None:
    found = container(
        model={"name": "/models/llama", "servedName": "llama"},
        engine={"args": ["--max-model-len=8192", "--enforce-eager"]},
        parallelism={"tensor": 4, "pipeline": 2},
        ports={"api": 9000},
        security={"media": {"allowedDomains": ["a.example"]}},
    )
    assert found["command"] == ["vllm", "serve"]
    assert found["args"] == [
        "/models/llama",
        "--max-model-len=8192",
        "--enforce-eager",
        "--served-model-name=llama",
        "--host=$(POD_IP)",
        "--port=9000",
        "--tensor-parallel-size=4",
        "--pipeline-parallel-size=2",
        "--allowed-media-domains",
        "a.example",
        "--disable-fastapi-docs",
    ]


def test_the_operators_flags_come_last() -> None:
    args = container(engine={"args": ["--dtype=auto"]})["args"]
    ours = [arg.partition("=")[0] for arg in args if arg.partition("=")[0] in catalogue.flags().owned]
    assert args.index("--dtype=auto") < args.index("--served-model-name=/models/llama")
    assert ours[0] == "--served-model-name"


def test_no_media_domain_means_none() -> None:
    """An empty list would mean any domain."""
    args = container()["args"]
    assert args[args.index("--allowed-media-domains") + 1] == "none.invalid"


def variables(**spec: Any) -> dict[str, Any]:
    listed = container(**spec)["env"]
    names = [item["name"] for item in listed]
    assert len(names) == len(set(names))
    return {item["name"]: item.get("value", item.get("valueFrom")) for item in listed}


def test_the_environment_closes_what_vllm_opens() -> None:
    found = variables(engine={"env": [{"name": "TZ", "value": "UTC"}]})
    assert catalogue.environment().fixed.items() <= found.items()
    assert found["VLLM_API_KEY"] == {"secretKeyRef": {"name": "llama-engine-key", "key": "api-key"}}
    assert found["VLLM_HOST_IP"] == found["POD_IP"] == {"fieldRef": {"fieldPath": "status.podIP"}}
    assert found["VLLM_HTTP_TIMEOUT_KEEP_ALIVE"] == str(ENGINE_KEEP_ALIVE_SECONDS)
    assert found["TZ"] == "UTC"


def test_redirects_of_media_are_followed_only_when_said() -> None:
    assert variables()["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "0"
    assert variables(security={"media": {"allowRedirects": True}})["VLLM_MEDIA_URL_ALLOW_REDIRECTS"] == "1"


def test_every_path_that_is_written_is_a_scratch_volume() -> None:
    mounts = {item["mountPath"]: item for item in container(**HUB)["volumeMounts"]}
    assert {path for path, item in mounts.items() if not item.get("readOnly")} == {"/home/vllm", "/tmp", "/dev/shm"}  # noqa: S108
    for name, value in variables(**HUB).items():
        if isinstance(value, str) and value.startswith("/"):
            assert value.startswith("/home/vllm"), name


@pytest.mark.parametrize(
    ("resources", "expected"),
    [
        (None, {"limits": {"nvidia.com/gpu": "8"}}),
        ({"limits": {"amd.com/gpu": 8}}, {"limits": {"amd.com/gpu": "8"}}),
        ({"requests": {"cpu": 4}}, {"requests": {"cpu": "4"}}),
        ({}, {}),
    ],
)
def test_resources(resources: Any, expected: Any) -> None:
    spec = {} if resources is None else {"engine": {"resources": resources}}
    assert container(parallelism={"tensor": 4, "pipeline": 2}, **spec)["resources"] == expected


def test_a_long_start_is_no_failure() -> None:
    found = engine(engine={"startupTimeout": "2h"})["spec"]
    probe = found["template"]["spec"]["containers"][0]["startupProbe"]
    assert probe["periodSeconds"] * probe["failureThreshold"] == 7200
    assert found["progressDeadlineSeconds"] > 7200
    assert container(engine={"startupTimeout": "1s"})["startupProbe"]["failureThreshold"] == 1


def test_no_spare_gpu_is_needed_for_a_rollout() -> None:
    assert engine()["spec"]["strategy"]["rollingUpdate"] == {"maxSurge": 0, "maxUnavailable": 1}


@pytest.mark.parametrize(("grace", "sleep"), [("60s", 15), ("10s", 5), ("1s", 1), ("10m", 15)])
def test_running_requests_may_finish(grace: str, sleep: int) -> None:
    found = pod(engine={"terminationGracePeriod": grace})
    assert found["containers"][0]["lifecycle"]["preStop"]["sleep"]["seconds"] == sleep
    assert found["terminationGracePeriodSeconds"] >= sleep


def test_a_restart_is_part_of_the_template() -> None:
    annotations = engine(restart_at="now")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["securevllm.io/restart-at"] == "now"


def test_labels_and_annotations_of_the_user_never_win() -> None:
    """The parser refuses them; the template does not rely on it."""
    labels = {"team": "red", "securevllm.io/role": "gateway", "sidecar.istio.io/inject": "true"}
    annotations = {"note": "x", "linkerd.io/inject": "enabled"}
    found = pods.template(OWNER, "engine", user=1, group=1, pod={}, labels=labels, annotations=annotations)["metadata"]
    assert found["labels"] == {**labels, **OWNER.pod_labels("engine"), "sidecar.istio.io/inject": "false"}
    assert found["annotations"]["note"] == "x"
    assert found["annotations"]["linkerd.io/inject"] == "disabled"


# ------------------------------------------------------------------------------------------------------------- fetch


def job(**spec: Any) -> Object:
    return workload("llama-fetch", made(**{**HUB, **spec}))


def hub(**source: Any) -> dict[str, Any]:
    return {"model": {"name": "a/b", "source": {"huggingFace": source}}}


def test_old_engines_go_on_as_they_are_while_a_new_model_comes() -> None:
    old = engine(**HUB, fetched=frozenset({job()["metadata"]["name"]}))["spec"]["template"]
    moved = {"model": {"name": "c/d", "source": {"huggingFace": {}}}}

    waiting = made(**moved, pins={"engine": Pin("of the old model", old)}, replicas=1)

    assert waiting.withheld == ()
    assert workload("llama-engine", waiting)["spec"]["template"] == old
    kept = next(obj for obj in waiting.configuration if obj["metadata"]["name"] == "llama-accepted")
    assert '"inputs": "of the old model"' in kept["data"]["templates.json"]


def test_another_engine_key_is_another_template_and_shows_nothing_of_the_key() -> None:
    first, second = (engine(engine_key=key) for key in (b"a" * 32, b"b" * 32))
    assert first["spec"]["template"] != second["spec"]["template"]
    assert "a" * 32 not in str(first)


def test_engines_wait_for_their_model_and_stay_when_it_is_there() -> None:
    waiting = made(**HUB)
    assert [obj["metadata"]["name"] for obj in waiting.withheld] == ["llama-engine"]
    assert "llama-engine" not in {obj["metadata"]["name"] for obj in waiting.workloads}
    done = made(**HUB, fetched=frozenset({job()["metadata"]["name"]}))
    assert done.withheld == ()
    assert made(**HUB, suspend=True).withheld == ()


def test_the_fetch_and_the_engine_agree_on_the_place() -> None:
    fetched = job()["spec"]["template"]["spec"]["containers"][0]
    folder = next(arg for arg in fetched["args"] if arg.startswith("--local-dir=")).removeprefix("--local-dir=")
    assert container(**HUB)["args"][0] == folder
    assert {"name": "model", "persistentVolumeClaim": {"claimName": "llama-model", "readOnly": True}} in pod(**HUB)[
        "volumes"
    ]


def test_code_and_pickles_are_not_fetched() -> None:
    args = job()["spec"]["template"]["spec"]["containers"][0]["args"]
    assert {"--exclude=*.py", "--exclude=*.bin", "--exclude=*.pt", "--exclude=*.pkl"} <= set(args)


def test_only_the_fetch_sees_the_token() -> None:
    spec = hub(tokenSecretRef={"name": "hub", "key": "token"}, endpoint="https://hub.example.com")
    variables = {item["name"]: item for item in job(**spec)["spec"]["template"]["spec"]["containers"][0]["env"]}
    assert variables["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hub", "key": "token"}}
    assert variables["HF_ENDPOINT"]["value"] == "https://hub.example.com"
    assert "'hub'" not in str(engine(**spec))
    assert "HF_TOKEN" not in str(engine(**spec))


def test_another_model_is_another_job() -> None:
    names = {
        job(**spec)["metadata"]["name"]
        for spec in (
            hub(),
            hub(endpoint="https://hub.example.com"),
            hub(storage={"claimName": "other"}),
            {"model": {"name": "a/b", "revision": "v1", "source": {"huggingFace": {}}}},
            {"model": {"name": "a/c", "source": {"huggingFace": {}}}},
        )
    }
    assert len(names) == 5
    assert job(replicas=0)["metadata"]["name"] in names


def test_the_fetch_runs_where_the_engines_run() -> None:
    placement = {
        "nodeSelector": {"pool": "gpu"},
        "tolerations": [{"key": "a", "operator": "Exists"}],
        "runtimeClassName": "x",
    }
    fetched, serving = job(engine=placement)["spec"]["template"]["spec"], pod(**HUB, engine=placement)
    for field in placement:
        assert fetched[field] == serving[field]


def test_a_claim_is_made_unless_there_is_one() -> None:
    made_claim = [obj for obj in made(**HUB).configuration if obj["kind"] == "PersistentVolumeClaim"]
    assert made_claim[0]["spec"] == {"accessModes": ["ReadWriteOnce"], "resources": {"requests": {"storage": "100Gi"}}}
    for spec in (hub(storage={"claimName": "mine"}), {}):
        assert [obj for obj in made(**spec).configuration if obj["kind"] == "PersistentVolumeClaim"] == []


@pytest.mark.parametrize(("path", "folder"), [(None, "/models"), ("llama/8b", "/models/llama/8b")])
def test_a_claim_that_is_filled_is_mounted(path: str | None, folder: str) -> None:
    source = {"claimName": "weights", **({"path": path} if path else {})}
    spec = {"model": {"name": "llama", "source": {"persistentVolumeClaim": source}}}
    assert container(**spec)["args"][0] == folder
    assert made(**spec).withheld == ()
