"""The client against a real HTTP server that answers by script: what a healthy API server cannot be made to do."""

from __future__ import annotations

import asyncio
import base64
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from aiohttp import web

from securevllm.api.kinds import CONFIG_MAP, LEASE, POD, SECRET, KubeObject, Ref
from securevllm.cluster import JSON_PATCH, KubernetesClient, Login, bearer_token, connect
from securevllm.errors import (
    AlreadyExists,
    ApiError,
    Conflict,
    Forbidden,
    InternalError,
    Invalid,
    LeadershipLost,
    NotFound,
    OperatorError,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Callable

CM: KubeObject = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "a", "namespace": "x"}}
A = Ref(CONFIG_MAP, "x", "a")


@dataclass(frozen=True)
class Answer:
    status: int = 200
    body: Any = field(default_factory=lambda: dict(CM))
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False


def status(code: int, reason: str, message: str = "", fields: tuple[str, ...] = (), **headers: str) -> Answer:
    causes = [{"field": name, "message": "Invalid value"} for name in fields]
    body = {"kind": "Status", "code": code, "reason": reason, "message": message, "details": {"causes": causes}}
    return Answer(code, body, {name.replace("_", "-"): value for name, value in headers.items()})


@dataclass
class Script:
    """A server that gives one answer after the other, and keeps the requests."""

    answers: list[Answer]
    server: str = ""
    requests: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    seen: list[tuple[str, str, str]] = field(default_factory=list)

    async def handle(self, request: web.Request) -> web.StreamResponse:
        text = await request.text()
        body = json.loads(text) if text else None
        self.requests.append((request.method, str(request.rel_url), dict(request.headers), body))
        answer = self.answers.pop(0)
        await asyncio.sleep(answer.delay)
        if answer.cut:
            assert request.transport is not None
            request.transport.abort()
        if isinstance(answer.body, str):
            return web.Response(status=answer.status, text=answer.body, headers=answer.headers)
        return web.json_response(answer.body, status=answer.status, headers=answer.headers)

    def observe(self, verb: str, kind: str, code: str, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append((verb, kind, code))


@asynccontextmanager
async def client(
    tmp_path: Path, *answers: Answer, fence: Callable[[], bool] = lambda: True, limit: float = 5.0
) -> AsyncIterator[tuple[KubernetesClient, Script]]:
    script = Script(list(answers))
    app = web.Application()
    app.router.add_route("*", "/{rest:.*}", script.handle)
    runner = web.AppRunner(app, shutdown_timeout=0.1)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    script.server = f"http://127.0.0.1:{runner.addresses[0][1]}"
    login = Login(kubeconfig(tmp_path, script.server))
    try:
        async with connect(login, fence=fence, observe=script.observe, timeout=limit, instance="pod-1") as connected:
            yield connected, script
    finally:
        await runner.cleanup()


def kubeconfig(tmp_path: Path, server: str) -> Path:
    (tmp_path / "token").write_text("t-1\n", encoding="utf-8")
    path = tmp_path / "config"
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "c",
        "contexts": [{"name": "c", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": server}}],
        "users": [{"name": "u", "user": {"tokenFile": "token"}}],
    }
    path.write_text(yaml.safe_dump(document), encoding="utf-8")
    return path


async def test_requests_are_what_the_api_wants(tmp_path: Path) -> None:
    async with client(tmp_path, *[Answer()] * 8) as (kubernetes, script):
        await kubernetes.get(A)
        await kubernetes.create(CM)
        await kubernetes.apply(CM)
        await kubernetes.replace(CM | {"metadata": CM["metadata"] | {"resourceVersion": "7"}})
        await kubernetes.patch(A, {"data": {}})
        await kubernetes.patch(A, [{"op": "remove", "path": "/data"}], content_type=JSON_PATCH)
        await kubernetes.patch_status(A, {"replicas": 1}, uid="u-1")
        await kubernetes.delete(A, uid="u-1", resource_version="7", propagation="Foreground")

    base, one = "/api/v1/namespaces/x/configmaps", "/api/v1/namespaces/x/configmaps/a"
    manager = "fieldManager=securevllm-operator"
    assert [(method, url) for method, url, _, _ in script.requests] == [
        ("GET", one),
        ("POST", f"{base}?{manager}"),
        ("PATCH", f"{one}?{manager}&force=true"),
        ("PUT", f"{one}?{manager}"),
        ("PATCH", f"{one}?{manager}"),
        ("PATCH", f"{one}?{manager}"),
        ("PATCH", f"{one}/status?{manager}"),
        ("DELETE", one),
    ]
    assert [headers.get("Content-Type", "") for _, _, headers, _ in script.requests[1:7]] == [
        "application/json",
        "application/apply-patch+yaml",
        "application/json",
        "application/merge-patch+json",
        "application/json-patch+json",
        "application/merge-patch+json",
    ]
    assert script.requests[6][3] == {"status": {"replicas": 1}, "metadata": {"uid": "u-1"}}
    assert script.requests[7][3]["preconditions"] == {"uid": "u-1", "resourceVersion": "7"}
    assert script.requests[7][3]["propagationPolicy"] == "Foreground"
    assert script.requests[0][2]["User-Agent"].startswith("securevllm-operator/")
    assert [verb for verb, _, _ in script.seen] == [
        "get",
        "create",
        "apply",
        "update",
        "patch",
        "patch",
        "patch",
        "delete",
    ]


async def test_lists_are_paged_typed_and_start_over_once_when_a_page_expires(tmp_path: Path) -> None:
    def page(*names: str, more: str = "") -> Answer:
        items = [{"metadata": {"name": name, "namespace": "x"}} for name in names]
        return Answer(body={"metadata": {"resourceVersion": "42", "continue": more}, "items": items})

    pages = (page("a", more="n"), status(410, "Expired"), page("a", more="m"), page("b"))
    async with client(tmp_path, *pages) as (kubernetes, script):
        listing = await kubernetes.list(POD, label_selector="app in (x, y)")

    assert [item["metadata"]["name"] for item in listing.items] == ["a", "b"]
    assert {(item["apiVersion"], item["kind"]) for item in listing.items} == {("v1", "Pod")}
    assert listing.resource_version == 42
    assert script.requests[0][1] == "/api/v1/pods?limit=500&labelSelector=app+in+(x,+y)"
    assert script.requests[3][1].endswith("continue=m")


@pytest.mark.parametrize(
    ("answer", "error"),
    [
        (status(400, "BadRequest", "cannot unmarshal"), Invalid),
        (status(401, "Unauthorized"), ApiError),
        (status(403, "Forbidden", "exceeded quota: gpu"), Forbidden),
        (status(404, "NotFound", 'configmaps "a" not found'), NotFound),
        (status(409, "Conflict", "has been modified"), Conflict),
        (status(409, "AlreadyExists", "exists"), AlreadyExists),
        (status(422, "Invalid", "port must be"), Invalid),
        (status(422, "Invalid", "metadata.uid is immutable", ("metadata.uid",)), Conflict),
        (status(405, "MethodNotAllowed"), ApiError),
        (Answer(404, "404 page not found"), NotFound),
        (Answer(499, "proxy"), ApiError),
    ],
    ids=lambda value: str(value.status) if isinstance(value, Answer) else value.__name__,
)
async def test_refusals_have_a_class_the_servers_words_and_no_retry(
    tmp_path: Path, answer: Answer, error: type[ApiError]
) -> None:
    async with client(tmp_path, answer) as (kubernetes, script):
        with pytest.raises(ApiError) as caught:
            await kubernetes.get(A)

    assert type(caught.value) is error
    assert caught.value.status == answer.status
    message = answer.body["message"] if isinstance(answer.body, dict) else answer.body
    assert str(caught.value).startswith("get ConfigMap x/a: ")
    assert message in str(caught.value)
    assert len(script.requests) == 1
    assert script.seen == [("get", "ConfigMap", str(answer.status))]


async def test_a_mistyped_field_on_apply_is_invalid_and_not_retried(tmp_path: Path) -> None:
    # kube-apiserver 1.36 says 500 here.
    answer = status(500, "", "failed to create typed patch object (x/a; /v1, Kind=ConfigMap): .foo: field not declared")
    async with client(tmp_path, answer) as (kubernetes, script):
        with pytest.raises(Invalid, match=r"\.foo: field not declared"):
            await kubernetes.apply(CM)

    assert len(script.requests) == 1


@pytest.mark.parametrize(
    "trouble", [status(429, "TooManyRequests"), status(503, ""), Answer(502, "bad gateway"), Answer(cut=True)]
)
async def test_idempotent_calls_are_retried(tmp_path: Path, trouble: Answer) -> None:
    async with client(tmp_path, trouble, trouble, Answer(), trouble, Answer(), trouble, Answer()) as (
        kubernetes,
        script,
    ):
        await kubernetes.get(A)
        await kubernetes.apply(CM)
        assert await kubernetes.delete(A)

    assert len(script.requests) == 7


@pytest.mark.parametrize(
    "trouble", [status(429, "TooManyRequests", Retry_After="1"), status(503, ""), Answer(cut=True)]
)
async def test_calls_that_add_up_are_not_retried(tmp_path: Path, trouble: Answer) -> None:
    async with client(tmp_path, trouble, trouble) as (kubernetes, script):
        with pytest.raises(Unavailable):
            await kubernetes.create(CM)
        with pytest.raises(Unavailable):
            await kubernetes.patch(A, [{"op": "add", "path": "/x/-", "value": 1}], content_type=JSON_PATCH)

    assert len(script.requests) == 2


async def test_retry_after_is_obeyed_within_the_timeout(tmp_path: Path) -> None:
    async with client(tmp_path, status(429, "TooManyRequests", Retry_After="1"), Answer()) as (kubernetes, _):
        started = time.monotonic()
        await kubernetes.get(A)
        assert 1.0 <= time.monotonic() - started < 3.0


async def test_a_retry_that_cannot_end_in_time_is_not_tried(tmp_path: Path) -> None:
    answer = status(429, "TooManyRequests", "slow down", Retry_After="60")
    async with client(tmp_path, answer) as (kubernetes, script):
        started = time.monotonic()
        with pytest.raises(Unavailable, match="slow down"):
            await kubernetes.get(A)
        assert time.monotonic() - started < 1.0

    assert len(script.requests) == 1


async def test_a_call_ends_within_its_timeout_retries_included(tmp_path: Path) -> None:
    slow = Answer(delay=5.0)
    async with client(tmp_path, status(503, ""), slow, slow, limit=0.8) as (kubernetes, script):
        started = time.monotonic()
        with pytest.raises(Unavailable, match=r"get ConfigMap x/a: no answer within 0\.8 s"):
            await kubernetes.get(A)
        assert time.monotonic() - started < 1.5

    assert script.seen[-1] == ("get", "ConfigMap", "<error>")


async def test_nobody_listening_is_unavailable(tmp_path: Path) -> None:
    login = Login(kubeconfig(tmp_path, "http://127.0.0.1:9"))
    async with connect(login, fence=lambda: True, timeout=0.5) as kubernetes:
        with pytest.raises(Unavailable, match="get ConfigMap x/a"):
            await kubernetes.get(A)


async def test_no_write_goes_out_when_the_fence_is_down(tmp_path: Path) -> None:
    async with client(tmp_path, Answer(), fence=lambda: False) as (kubernetes, script):
        await kubernetes.get(A)
        for write in (
            kubernetes.create(CM),
            kubernetes.apply(CM),
            kubernetes.replace(CM | {"metadata": CM["metadata"] | {"resourceVersion": "7"}}),
            kubernetes.patch(A, {}),
            kubernetes.patch_status(A, {}),
            kubernetes.delete(A),
            kubernetes.post_event(CM, reason="R", note="n", action="A"),
        ):
            with pytest.raises(LeadershipLost):
                await write

    assert [method for method, *_ in script.requests] == ["GET"]


async def test_the_fence_is_asked_again_before_a_retry(tmp_path: Path) -> None:
    up = iter([True, False])
    async with client(tmp_path, status(503, ""), Answer(), fence=lambda: next(up)) as (kubernetes, script):
        with pytest.raises(LeadershipLost):
            await kubernetes.apply(CM)

    assert len(script.requests) == 1


async def test_values_of_a_secret_are_in_no_error(tmp_path: Path) -> None:
    value = base64.b64encode(b"top-secret-value").decode()
    secret = {"apiVersion": "v1", "kind": "Secret", "metadata": {"name": "a", "namespace": "x"}, "data": {"k": value}}
    answers = (
        status(422, "Invalid", f'Secret "a" is invalid: data[k]: Invalid value: "{value}"', ("data[k]",)),
        status(400, "BadRequest", f"cannot decode {value}"),
        Answer(500, f"<html>{value}</html>"),
    )
    async with client(tmp_path, *answers) as (kubernetes, _):
        texts = []
        for _ in answers:
            with pytest.raises(ApiError) as caught:
                await kubernetes.create(secret)
            texts.append(f"{caught.value} {caught.value!r} {caught.value.__cause__!r} {caught.value.__context__!r}")

    assert texts[0].startswith("create Secret x/a: 422 Invalid, fields: data[k]")
    assert texts[1].startswith("create Secret x/a: 400 BadRequest")
    assert not [text for text in texts if value in text or "top-secret" in text]
    assert SECRET.kind == "Secret"


async def test_deleting_what_is_gone_is_fine(tmp_path: Path) -> None:
    async with client(tmp_path, status(404, "NotFound")) as (kubernetes, _):
        assert await kubernetes.delete(A) is False


async def test_replace_without_resource_version_is_refused(tmp_path: Path) -> None:
    async with client(tmp_path) as (kubernetes, _):
        with pytest.raises(InternalError, match=r"needs metadata\.resourceVersion"):
            await kubernetes.replace(CM)


async def test_events_are_complete_short_and_best_effort(tmp_path: Path) -> None:
    async with client(tmp_path, Answer(), status(403, "Forbidden", "terminating")) as (kubernetes, script):
        about = CM | {"metadata": CM["metadata"] | {"uid": "u-1"}}
        await kubernetes.post_event(about, reason="Isolated", note="x" * 2000, action="Verify", warning=True)
        await kubernetes.post_event(about, reason="Isolated", note="x", action="Verify")

    method, url, _, event = script.requests[0]
    assert (method, url.partition("?")[0]) == ("POST", "/apis/events.k8s.io/v1/namespaces/x/events")
    assert event["regarding"] == {"apiVersion": "v1", "kind": "ConfigMap", "namespace": "x", "name": "a", "uid": "u-1"}
    assert (event["type"], event["reason"], event["action"]) == ("Warning", "Isolated", "Verify")
    assert (event["reportingController"], event["reportingInstance"]) == ("securevllm-operator", "pod-1")
    assert len(event["note"]) == 1024
    assert event["metadata"]["generateName"] == "a-"
    assert script.requests[1][3]["type"] == "Normal"


async def test_a_new_token_in_the_file_is_used_after_a_401_even_for_a_post(tmp_path: Path) -> None:
    async with client(tmp_path, Answer(), status(401, "Unauthorized"), Answer()) as (kubernetes, script):
        await kubernetes.get(A)
        (tmp_path / "token").write_text("t-2\n", encoding="utf-8")
        await kubernetes.create(CM)

    assert [headers["Authorization"] for _, _, headers, _ in script.requests] == [
        "Bearer t-1",
        "Bearer t-1",
        "Bearer t-2",
    ]


async def test_many_requests_with_an_old_token_all_get_the_new_one(tmp_path: Path) -> None:
    async with client(tmp_path, *[status(401, "Unauthorized")] * 5, *[Answer()] * 5) as (kubernetes, script):
        (tmp_path / "token").write_text("t-2\n", encoding="utf-8")
        await asyncio.gather(*(kubernetes.create(CM) for _ in range(5)))

    assert len(script.requests) == 10


async def test_the_token_file_is_read_again_every_minute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with client(tmp_path, Answer(), Answer(), Answer()) as (kubernetes, script):
        await kubernetes.get(A)
        (tmp_path / "token").write_text("t-2\n", encoding="utf-8")
        await kubernetes.get(A)
        monkeypatch.setattr(kubernetes, "_token_read", time.monotonic() - 61.0)
        await kubernetes.get(A)

    assert [headers["Authorization"] for _, _, headers, _ in script.requests] == [
        "Bearer t-1",
        "Bearer t-1",
        "Bearer t-2",
    ]


async def test_a_token_file_that_is_gone_for_a_moment_does_not_stop_the_client(tmp_path: Path) -> None:
    async with client(tmp_path, Answer(), status(401, "Unauthorized")) as (kubernetes, script):
        (tmp_path / "token").unlink()
        await kubernetes.get(A)
        with pytest.raises(ApiError, match="401"):
            await kubernetes.get(A)

    assert len(script.requests) == 2


async def test_the_service_account_of_a_pod_is_the_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("bound-token", encoding="utf-8")
    (tmp_path / "ca.crt").write_text("certificate", encoding="utf-8")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "fd00::1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    login = Login(service_account=tmp_path)

    configuration = await login.load()
    assert configuration.host == "https://[fd00::1]:443"
    assert configuration.ssl_ca_cert == str(tmp_path / "ca.crt")
    assert bearer_token(configuration) == "bound-token"
    (tmp_path / "token").write_text("next-token", encoding="utf-8")
    assert bearer_token(await login.load()) == "next-token"


async def test_the_ambient_kubeconfig_is_never_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBECONFIG", str(kubeconfig(tmp_path, "http://127.0.0.1:9")))
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)

    with pytest.raises(OperatorError, match="--kubeconfig FILE"):
        await Login(service_account=tmp_path).load()


@pytest.mark.parametrize(
    ("content", "wrong"),
    [
        (None, "no such file or directory"),
        (b"", "it holds nothing"),
        (b"# nothing\n", "it holds nothing"),
        (b"a:\n- s3cret: [\n", "it is not YAML from line 3 on"),
        (b"\xff\xfe\x00", "it is not a text file"),
        (b"s3cret", "it holds a text, and a kubeconfig begins with apiVersion: v1 and kind: Config"),
        (b"- s3cret", "it holds a list, and"),
        (b"{}", "Expected key current-context"),
        (b"current-context: c\ncontexts: [s3cret]\n", "contexts list to have 'name' key"),
        (b"current-context: c\ncontexts: [{name: c, context: s3cret}]\n", "it is not formed as a kubeconfig"),
    ],
)
async def test_a_kubeconfig_that_cannot_be_used_is_named_with_what_is_wrong(
    tmp_path: Path, content: bytes | None, wrong: str
) -> None:
    path = tmp_path / "broken"
    if content is not None:
        path.write_bytes(content)

    with pytest.raises(OperatorError) as told:
        await Login(path).load()
    assert str(told.value).startswith(f"--kubeconfig {path} cannot be used: ")
    assert wrong in str(told.value)
    assert "kubectl --kubeconfig FILE get namespaces" in str(told.value)
    # What is in the file stays in it: there could be a token in any place.
    assert "s3cret" not in str(told.value)


async def test_proxies_of_the_environment_are_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "")
    async with client(tmp_path, Answer()) as (kubernetes, script):
        await kubernetes.get(A)

    assert len(script.requests) == 1
    assert LEASE.resource == "leases.coordination.k8s.io"
