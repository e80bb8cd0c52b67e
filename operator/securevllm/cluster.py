"""The port to the Kubernetes API, and its adapter on `kubernetes.aio`.

`Kubernetes` is what the rest of the operator sees: objects are plain JSON, errors are those of `errors.py`.
`KubernetesClient` sends through the ApiClient of `kubernetes.aio` (connections, TLS, login) with URLs from
`api/kinds.py`.

Guarantees:
    * a whole call, retries included, ends within its timeout
    * the fence is asked right before every write goes out, retried ones included
    * only idempotent calls are retried (GET, PUT, DELETE, apply, merge patch), on 429, 5xx and broken connections
    * no body of a Secret is in the text of an exception
    * neither the ambient kubeconfig nor proxies of the environment are used
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http import HTTPStatus
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import urlencode

import aiohttp
import structlog
import yaml
from kubernetes.aio.client import ApiClient, Configuration
from kubernetes.aio.config import ConfigException, load_kube_config
from kubernetes.aio.config.incluster_config import InClusterConfigLoader

from securevllm import __version__
from securevllm.api.kinds import ACCESS_REVIEW, EVENT, SECRET, Kind, KubeObject, Ref
from securevllm.context import FIELD_MANAGER
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

log = structlog.stdlib.get_logger(__name__)

APPLY = "application/apply-patch+yaml"
MERGE_PATCH = "application/merge-patch+json"
JSON_PATCH = "application/json-patch+json"
STRATEGIC_MERGE_PATCH = "application/strategic-merge-patch+json"
"""Merges lists by their keys, conditions by ``type``: those of others stay."""
METADATA_ONLY = "application/json;as=PartialObjectMetadata;g=meta.k8s.io;v=v1"

SERVICE_ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")

TIMEOUT = 10.0
_ATTEMPTS = 4
_FIRST_PAUSE = 0.2
_PAGE = 500
_NOTE_LIMIT = 1024
_BODY_LIMIT = 300
_TOKEN_AGE = 60.0

_ERRORS: Mapping[int, type[ApiError]] = {
    HTTPStatus.BAD_REQUEST: Invalid,
    HTTPStatus.FORBIDDEN: Forbidden,
    HTTPStatus.NOT_FOUND: NotFound,
    HTTPStatus.CONFLICT: Conflict,
    HTTPStatus.UNPROCESSABLE_ENTITY: Invalid,
    HTTPStatus.TOO_MANY_REQUESTS: Unavailable,
}


@dataclass(frozen=True)
class Listing:
    """A consistent list: the objects of a kind as they were at `resource_version`."""

    items: list[KubeObject]
    resource_version: int


class Kubernetes(Protocol):
    """What the operator needs of the Kubernetes API.

    Every method raises `Unavailable` when there is no usable answer in time, `Forbidden` when RBAC, a quota or an
    admission policy refuses, and `ApiError` for codes without a class. Writes raise `LeadershipLost` when the fence
    is down, and `Invalid` when the API server refuses the object.
    """

    async def get(self, ref: Ref) -> KubeObject:
        """Read one object. Raises `NotFound`."""

    async def exists(self, ref: Ref) -> bool:
        """Whether an object is there; its content does not leave the API server."""

    async def labels(self, ref: Ref) -> Mapping[str, str] | None:
        """Labels of an object, None when it is not there; its content does not leave the API server."""

    async def list(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> Listing:
        """Read all objects of a kind; of all namespaces when `namespace` is None."""

    async def allowed(self, verb: str, kind: Kind, namespace: str | None) -> bool:
        """Whether the login may do this to objects of a kind, in a namespace or, with None, in all of them."""

    async def create(self, obj: KubeObject) -> KubeObject:
        """POST; never retried. Raises `AlreadyExists`."""

    async def apply(self, obj: KubeObject) -> KubeObject:
        """Server-side apply, forced, with our field manager.

        Raises `Conflict` when ``metadata.uid`` or ``metadata.resourceVersion`` is given and is not the live one.
        """

    async def replace(self, obj: KubeObject) -> KubeObject:
        """PUT; `metadata.resourceVersion` must be there. Raises `Conflict`, `NotFound`."""

    async def patch(
        self, ref: Ref, body: Any, *, subresource: str | None = None, content_type: str = MERGE_PATCH
    ) -> KubeObject:
        """PATCH an object or a subresource. Raises `NotFound`, `Conflict`."""

    async def patch_status(
        self, ref: Ref, status: Mapping[str, Any], *, uid: str | None = None, resource_version: str | None = None
    ) -> KubeObject:
        """Merge into ``.status``, of the object with this uid only. Raises `NotFound`, `Conflict`."""

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        propagation: str = "Background",
    ) -> bool:
        """Delete under preconditions; False when it was already gone. Raises `Conflict` when one does not hold."""

    async def post_event(
        self, about: KubeObject, *, reason: str, note: str, action: str, warning: bool = False
    ) -> None:
        """Post an Event about an object. Best effort: a refused or lost Event is not an error."""


class RequestObserver(Protocol):
    """Told about every request that was sent, for metrics."""

    def __call__(self, verb: str, kind: str, code: str, seconds: float) -> None:
        """Take the Kubernetes verb, the kind, the HTTP status (``<error>`` without an answer) and the duration."""


@dataclass(frozen=True)
class Login:
    """Where the API server is and how to log in to it.

    Attributes:
        kubeconfig: a file; None for the pod's own service account. ``$KUBECONFIG`` and ``~/.kube/config`` are never
            read: an operator must not act on whatever cluster a shell happens to point at.
        service_account: folder with ``token`` and ``ca.crt``, as kubelet mounts it.
        context: of the kubeconfig; None: its current one.
    """

    kubeconfig: Path | None = None
    service_account: Path = SERVICE_ACCOUNT
    context: str | None = None

    async def load(self) -> Configuration:
        """Read everything afresh: a bound token is replaced on disk long before it expires.

        Raises:
            OperatorError: it cannot be read; says what was tried.
        """
        configuration = Configuration()
        try:
            if self.kubeconfig is None:
                InClusterConfigLoader(  # type: ignore[no-untyped-call]
                    str(self.service_account / "token"), str(self.service_account / "ca.crt"), try_refresh_token=False
                ).load_and_set(configuration)
            else:
                await load_kube_config(  # type: ignore[no-untyped-call]
                    config_file=str(self.kubeconfig),
                    context=self.context,
                    client_configuration=configuration,
                    persist_config=False,
                )
        except Exception as error:  # noqa: BLE001 - translated, never swallowed
            # The loader lets pass whatever a malformed file makes it raise, and a YAML error may quote a token.
            if self.kubeconfig is None:
                shown = str(error) if isinstance(error, ConfigException | OSError) else type(error).__name__
                tried = "no service account token of a pod; outside of a cluster name a file: --kubeconfig FILE"
                raise OperatorError(f"{tried} ({shown})") from None
            raise OperatorError(
                f"--kubeconfig {self.kubeconfig} cannot be used: {_fault(self.kubeconfig, error)}; name a file with"
                " which `kubectl --kubeconfig FILE get namespaces` works"
            ) from None
        # A proxy variable of the environment would see every request, and kopf ignores it too.
        configuration.client_session_kwargs = {"trust_env": False}
        return configuration


def _fault(kubeconfig: Path, error: Exception) -> str:
    """What is wrong with a kubeconfig, without a word of what is in it."""
    try:
        content = yaml.safe_load(kubeconfig.read_text(encoding="utf-8"))
    except OSError as wrong:
        return (wrong.strerror or type(wrong).__name__).lower()
    except yaml.MarkedYAMLError as wrong:
        mark = wrong.problem_mark or wrong.context_mark
        return f"it is not YAML{f' from line {mark.line + 1} on' if mark else ''}"
    except (UnicodeDecodeError, yaml.YAMLError):
        return "it is not a text file"
    if not isinstance(content, dict):
        held = {list: "a list", type(None): "nothing"}.get(type(content), "a text")
        return f"it holds {held}, and a kubeconfig begins with apiVersion: v1 and kind: Config"
    if isinstance(error, ConfigException | OSError):
        return str(error).removeprefix("Invalid kube-config file. ")
    return f"it is not formed as a kubeconfig ({type(error).__name__})"


def bearer_token(configuration: Configuration) -> str | None:
    """The token alone, without its scheme; None when the login is by client certificate."""
    header = configuration.api_key.get("BearerToken")
    return header.partition(" ")[2].strip() if header else None


@asynccontextmanager
async def connect(
    login: Login,
    *,
    fence: Callable[[], bool],
    observe: RequestObserver | None = None,
    timeout: float = TIMEOUT,  # noqa: ASYNC109 - of each later call, not of this one
    instance: str = "",
) -> AsyncIterator[KubernetesClient]:
    """A client with its own connections, closed at the end.

    Args:
        login: how to log in; the token is read again every minute and after a 401.
        fence: asked before every write; False raises `LeadershipLost`.
        observe: told about every request.
        timeout: seconds for one call with all its retries.
        instance: name of this process in Events (``reportingInstance``).

    Raises:
        OperatorError: the login cannot be read.
    """
    configuration = await login.load()
    api = ApiClient(configuration)
    try:
        yield KubernetesClient(
            api, login, fence=fence, observe=observe or _ignore, timeout=timeout, instance=instance or FIELD_MANAGER
        )
    finally:
        await api.close()  # type: ignore[no-untyped-call]


class KubernetesClient:
    """`Kubernetes` over HTTP; made by `connect`."""

    def __init__(
        self,
        api: ApiClient,
        login: Login,
        *,
        fence: Callable[[], bool],
        observe: RequestObserver,
        timeout: float,
        instance: str,
    ) -> None:
        self._api = api
        self._server = api.configuration.host.rstrip("/")
        self._login = login
        self._token = bearer_token(api.configuration)
        self._token_read = time.monotonic()
        self._fence = fence
        self._observe = observe
        self._timeout = timeout
        self._instance = instance

    async def get(self, ref: Ref) -> KubeObject:
        """See `Kubernetes.get`."""
        return await self._send(_Request("get", "GET", ref.kind, str(ref), ref.path()))

    async def exists(self, ref: Ref) -> bool:
        """See `Kubernetes.exists`."""
        return await self.labels(ref) is not None

    async def labels(self, ref: Ref) -> Mapping[str, str] | None:
        """See `Kubernetes.labels`."""
        try:
            found = await self._send(_Request("get", "GET", ref.kind, str(ref), ref.path(), accept=METADATA_ONLY))
        except NotFound:
            return None
        labels: Mapping[str, str] = found["metadata"].get("labels") or {}
        return labels

    async def list(self, kind: Kind, namespace: str | None = None, label_selector: str | None = None) -> Listing:
        """See `Kubernetes.list`. Pages of 500; starts over once when a page token has expired."""
        try:
            return await self._list(kind, namespace, label_selector)
        except ApiError as error:
            if error.status != HTTPStatus.GONE:
                raise
            return await self._list(kind, namespace, label_selector)

    async def _list(self, kind: Kind, namespace: str | None, label_selector: str | None) -> Listing:
        path = kind.path(namespace)
        query = {"limit": str(_PAGE)}
        if label_selector:
            query["labelSelector"] = label_selector
        where = f" in {namespace}" if namespace else ""
        items: list[KubeObject] = []
        while True:
            page = await self._send(_Request("list", "GET", kind, f"{kind.plural}{where}", path, query))
            # Items of a typed list lack both fields.
            items += [{"apiVersion": kind.api_version, "kind": kind.kind} | item for item in page["items"]]
            token = page["metadata"].get("continue")
            if not token:
                return Listing(items, int(page["metadata"]["resourceVersion"]))
            query["continue"] = token

    async def allowed(self, verb: str, kind: Kind, namespace: str | None) -> bool:
        """See `Kubernetes.allowed`."""
        asked = {"verb": verb, "group": kind.group, "resource": kind.plural, "namespace": namespace or ""}
        # Metadata must be empty.
        review = {
            "apiVersion": ACCESS_REVIEW.api_version,
            "kind": ACCESS_REVIEW.kind,
            "spec": {"resourceAttributes": asked},
        }
        what = f"SelfSubjectAccessReview of {verb} {kind.plural}"
        answer = await self._send(_Request("create", "POST", ACCESS_REVIEW, what, ACCESS_REVIEW.path(), body=review))
        return bool(answer["status"]["allowed"])

    async def create(self, obj: KubeObject) -> KubeObject:
        """See `Kubernetes.create`."""
        ref = Ref.of(obj)
        return await self._send(
            _Request(
                "create",
                "POST",
                ref.kind,
                str(ref),
                ref.kind.path(ref.namespace),
                {"fieldManager": FIELD_MANAGER},
                obj,
                retry=False,
            )
        )

    async def apply(self, obj: KubeObject) -> KubeObject:
        """See `Kubernetes.apply`."""
        ref = Ref.of(obj)
        query = {"fieldManager": FIELD_MANAGER, "force": "true"}
        return await self._send(_Request("apply", "PATCH", ref.kind, str(ref), ref.path(), query, obj, APPLY))

    async def replace(self, obj: KubeObject) -> KubeObject:
        """See `Kubernetes.replace`."""
        ref = Ref.of(obj)
        if not obj["metadata"].get("resourceVersion"):
            # Without it a PUT overwrites whatever somebody else has just written.
            raise InternalError(f"{ref}: replace needs metadata.resourceVersion")
        query = {"fieldManager": FIELD_MANAGER}
        return await self._send(_Request("update", "PUT", ref.kind, str(ref), ref.path(), query, obj))

    async def patch(
        self, ref: Ref, body: Any, *, subresource: str | None = None, content_type: str = MERGE_PATCH
    ) -> KubeObject:
        """See `Kubernetes.patch`."""
        return await self._send(
            _Request(
                "patch",
                "PATCH",
                ref.kind,
                str(ref),
                ref.path(subresource),
                {"fieldManager": FIELD_MANAGER},
                body,
                content_type,
                retry=content_type
                in (MERGE_PATCH, APPLY, STRATEGIC_MERGE_PATCH),  # the operations of a JSON patch may add up
            )
        )

    async def patch_status(
        self, ref: Ref, status: Mapping[str, Any], *, uid: str | None = None, resource_version: str | None = None
    ) -> KubeObject:
        """See `Kubernetes.patch_status`."""
        body: KubeObject = {"status": dict(status)}
        wanted = {"uid": uid, "resourceVersion": resource_version}
        if metadata := {name: value for name, value in wanted.items() if value is not None}:
            body["metadata"] = metadata
        return await self.patch(ref, body, subresource="status")

    async def delete(
        self,
        ref: Ref,
        *,
        uid: str | None = None,
        resource_version: str | None = None,
        propagation: str = "Background",
    ) -> bool:
        """See `Kubernetes.delete`."""
        preconditions = {"uid": uid, "resourceVersion": resource_version}
        body = {
            "apiVersion": "v1",
            "kind": "DeleteOptions",
            "propagationPolicy": propagation,
            "preconditions": {name: value for name, value in preconditions.items() if value is not None},
        }
        try:
            await self._send(_Request("delete", "DELETE", ref.kind, str(ref), ref.path(), {}, body))
        except NotFound:
            return False
        return True

    async def post_event(
        self, about: KubeObject, *, reason: str, note: str, action: str, warning: bool = False
    ) -> None:
        """See `Kubernetes.post_event`."""
        metadata = about["metadata"]
        namespace = metadata.get("namespace")
        event: KubeObject = {
            "apiVersion": EVENT.api_version,
            "kind": EVENT.kind,
            "metadata": {"generateName": f"{metadata['name']}-", "namespace": namespace or "default"},
            "eventTime": micro_time(datetime.now(UTC)),
            "reportingController": FIELD_MANAGER,
            "reportingInstance": self._instance,
            "type": "Warning" if warning else "Normal",
            "reason": reason,
            "action": action,
            # The API server counts bytes.
            "note": note.encode()[:_NOTE_LIMIT].decode(errors="ignore"),
            "regarding": {
                "apiVersion": about["apiVersion"],
                "kind": about["kind"],
                "namespace": namespace,
                "name": metadata["name"],
                "uid": metadata.get("uid"),
            },
        }
        path = EVENT.path(event["metadata"]["namespace"])
        request = _Request("create", "POST", EVENT, f"Event {reason}", path, {}, event, retry=False)
        try:
            await self._send(request)
        except ApiError as error:
            log.warning("event not posted", reason=reason, about=str(Ref.of(about)), error=str(error))

    async def _send(self, request: _Request) -> KubeObject:
        """Send until there is an answer, the attempts are used up, or the time is over."""
        deadline = time.monotonic() + self._timeout
        pause = _FIRST_PAUSE
        for attempt in range(1, _ATTEMPTS + 1):
            try:
                async with asyncio.timeout(max(0.0, deadline - time.monotonic())):
                    return await self._attempt(request)
            except TimeoutError:
                raise Unavailable(f"{request}: no answer within {self._timeout:g} s", reason="Timeout") from None
            except _Refused as refused:
                pause = max(pause, refused.retry_after)
                hopeless = attempt == _ATTEMPTS or time.monotonic() + pause >= deadline
                if not request.retry or not isinstance(refused.error, Unavailable) or hopeless:
                    raise refused.error from refused.__cause__
            await asyncio.sleep(pause)
            pause *= 2
        raise AssertionError("unreachable: the last attempt raises")

    async def _attempt(self, request: _Request) -> KubeObject:
        used = self._token
        status, headers, payload = await self._exchange(request)
        # Nothing was executed, so even a POST may be sent again. Of many requests with an old token one reads the file.
        if status == HTTPStatus.UNAUTHORIZED and (self._token != used or await self._refresh_token()):
            status, headers, payload = await self._exchange(request)
        if HTTPStatus.OK <= status < HTTPStatus.MULTIPLE_CHOICES:
            answer: KubeObject = json.loads(payload)
            return answer
        raise _Refused(_error(request, status, payload), _seconds(headers.get("Retry-After")))

    async def _exchange(self, request: _Request) -> tuple[int, Mapping[str, str], bytes]:
        if time.monotonic() - self._token_read > _TOKEN_AGE:
            await self._refresh_token()
        headers = {"Accept": request.accept, "User-Agent": f"{FIELD_MANAGER}/{__version__}"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        if request.body is not None:
            headers["Content-Type"] = request.content_type
        if request.method != "GET" and not self._fence():
            raise LeadershipLost(f"{request}: not sent, the Lease may belong to another instance")
        url = f"{self._server}{request.path}?{urlencode(request.query)}".removesuffix("?")
        started = time.monotonic()
        code = "<error>"
        try:
            response = await self._api.call_api(
                request.method,
                url,
                header_params=headers,
                body=request.body,
                _request_timeout=aiohttp.ClientTimeout(total=self._timeout),
            )
            payload: bytes = await response.read()  # type: ignore[no-untyped-call]
            code = str(response.status)
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                raise
            unavailable = Unavailable(f"{request}: {type(error).__name__}: {error}", reason="ConnectionError")
            raise _Refused(unavailable) from error
        finally:
            self._observe(request.verb, request.kind.kind, code, time.monotonic() - started)
        return response.status, response.headers, payload

    async def _refresh_token(self) -> bool:
        """Read the token again; whether it is another one."""
        before = self._token
        self._token_read = time.monotonic()
        try:
            self._token = bearer_token(await self._login.load())
        except OperatorError:
            return False  # half-written or gone for a moment: the one in memory may still be good
        return self._token != before


def micro_time(moment: datetime) -> str:
    """``metav1.MicroTime`` of an aware moment: UTC, six digits, ``Z``."""
    return moment.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


@dataclass(frozen=True)
class _Request:
    """One call. Its text is safe to show: it names the object, and never shows the body."""

    verb: str
    method: str
    kind: Kind
    what: str
    path: str
    query: Mapping[str, str] = field(default_factory=dict)
    body: Any = field(default=None, repr=False)
    content_type: str = "application/json"
    accept: str = "application/json"
    retry: bool = True

    def __str__(self) -> str:
        return f"{self.verb} {self.what}"


class _Refused(Exception):  # noqa: N818 - carries the error that is raised in the end
    def __init__(self, error: ApiError, retry_after: float = 0.0) -> None:
        self.error, self.retry_after = error, retry_after
        super().__init__(str(error))


def _error(request: _Request, status: int, payload: bytes) -> ApiError:
    """Translate an answer that is not 2xx; `payload` is a ``metav1.Status``, or text of something in between."""
    try:
        document = json.loads(payload)
    except ValueError:
        document = None
    if not isinstance(document, dict) or document.get("kind") != "Status":
        document = {"message": payload[:_BODY_LIMIT].decode(errors="replace").strip()}
    reason = document.get("reason") or _phrase(status)
    message = document.get("message") or reason
    causes = (document.get("details") or {}).get("causes") or []
    fields = sorted({cause.get("field") or "?" for cause in causes})
    cls = _error_class(request, status, reason, message, fields)
    if request.kind == SECRET and request.body is not None:
        # The API server quotes refused values; of a Secret only the names of the fields may be repeated.
        message = f"{reason}, fields: {', '.join(fields)}" if fields else reason
    return cls(f"{request}: {status} {message}", status=status, reason=reason)


def _error_class(request: _Request, status: int, reason: str, message: str, fields: Sequence[str]) -> type[ApiError]:
    if status == HTTPStatus.CONFLICT and reason == "AlreadyExists":
        return AlreadyExists
    # kube-apiserver 1.36 answers a uid of somebody else on apply with 422, on other verbs with 409.
    if status == HTTPStatus.UNPROCESSABLE_ENTITY and "metadata.uid" in fields:
        return Conflict
    # ... and an unknown or mistyped field on apply with 500: no retry makes it right.
    if request.verb == "apply" and message.startswith("failed to create typed patch object"):
        return Invalid
    if status >= HTTPStatus.INTERNAL_SERVER_ERROR:
        return Unavailable
    return _ERRORS.get(status, ApiError)


def _phrase(status: int) -> str:
    try:
        return HTTPStatus(status).phrase.replace(" ", "")
    except ValueError:
        return "Unknown"


def _seconds(retry_after: str | None) -> float:
    """Value of a Retry-After header; the API server sends seconds, a date of a proxy in between counts as 0."""
    return float(retry_after) if retry_after is not None and retry_after.isdecimal() else 0.0


def _ignore(verb: str, kind: str, code: str, seconds: float) -> None:
    """Observer of nobody."""
