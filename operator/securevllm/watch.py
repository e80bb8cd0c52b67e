"""Watching the cluster: kopf streams the events, lists of our own say when all is known and find what was missed.

kopf (its `on.event` handlers, and nothing else of it) keeps the watch streams alive: bookmarks, reconnects, expired
versions. Its events are hints. A list through our own client comes first, which says when the cache is complete also
when there is nothing to list, and is repeated, which finds the deletions that no watch reports after a gap.

kopf runs in a thread with an event loop of its own. In ours it would take over SIGTERM, and when it ends it cancels
every task of the loop that is younger than itself, reconciles included. Its handlers only hand events over.

Nothing is written: no annotation, no finalizer, no event.
"""

from __future__ import annotations

import asyncio
import logging
import random
import threading
import time
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from http import HTTPStatus
from typing import TYPE_CHECKING, Any, Generic, NoReturn, Protocol, TypeVar

import structlog

from securevllm.cluster import Kubernetes, Login, bearer_token
from securevllm.errors import ApiError, Forbidden, NotFound, OperatorError, Unavailable

if TYPE_CHECKING:
    import kopf

    from securevllm.api.kinds import Kind, KubeObject
    from securevllm.store import Change, Store, Watched

K = TypeVar("K", bound=Hashable)

CHUNK_SIZE = 500
_FIRST_PAUSE = 1.0
_LONGEST_PAUSE = 30.0
_STOP_TIMEOUT = 10.0
_CLOSE_SECONDS = 0.1
_GAP_PAUSE = 1.0
"""After a gap of one kind the others have theirs too: one list of ours for all of them."""

log = structlog.stdlib.get_logger(__name__)


class WatchObserver(Protocol):
    """What the watcher reports, for metrics."""

    def watch_event(self, kind: str, unix_time: float) -> None:
        """An event or a list of a kind came in."""

    def watch_missed(self, kind: str, changes: int) -> None:
        """A resync found changes before the watch reported them."""


class Watcher(Generic[K]):
    """Fills a `Store` and tells which keys need a reconcile.

    Args:
        client: for the lists.
        login: for kopf; read again when the API server no longer accepts the token.
        store: what to fill; it also says what is watched and where.
        keys_of: the keys that an object concerns. Called with the old and with the new state of a changed object, so
            that an object that moves from one owner to another concerns both.
        sink: takes the keys; called in the event loop's thread, once per change and key.
        observer: told about events.
        resync: seconds between two complete lists.
        jitter: factor for `resync`.
    """

    def __init__(
        self,
        client: Kubernetes,
        login: Login,
        store: Store,
        *,
        keys_of: Callable[[KubeObject], Iterable[K]],
        sink: Callable[[K], None],
        observer: WatchObserver,
        resync: float = 600.0,
        jitter: Callable[[], float] = lambda: random.uniform(0.9, 1.1),  # noqa: S311 - spreads load, guards nothing
    ) -> None:
        self._client = client
        self._login = login
        self._store = store
        self._keys_of = keys_of
        self._sink = sink
        self._observer = observer
        self._resync = resync
        self._jitter = jitter
        self._seen: dict[Kind, float] = {}
        # kopf has listed: at its start, or because a stream could not go on where it had ended. What was deleted before
        # it did, it never tells.
        self._gap = asyncio.Event()

    async def run(self) -> None:
        """Watch for ever; stops the watches when it is cancelled.

        Raises:
            OperatorError: a kind is not served or may not be read; says what to install or to allow.
        """
        await self._list_until_complete()
        streams = _Streams(self._store, self._login, self._take_event)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(streams.failed(), name="watch streams")
                group.create_task(self._resync_for_ever(), name="resync")
        except ExceptionGroup as group:
            raise _main_error(group) from None
        finally:
            await streams.stop()

    def unhealthy(self) -> str | None:
        """Which kind was neither listed nor heard of for too long, for a liveness check; None when all were."""
        limit = 3.0 * self._resync
        now = time.monotonic()
        silent = sorted(kind.resource for kind, seen in self._seen.items() if now - seen > limit)
        return f"no event and no list for {limit:.0f} s: {', '.join(silent)}" if silent else None

    async def _list_until_complete(self) -> None:
        pause = _FIRST_PAUSE
        while (missing := self._store.unsynced()) is not None:
            try:
                await self._list_all(first=True)
            except Unavailable as error:
                log.warning("waiting for the API server", problem=str(error), missing=missing, retry_in=pause)
                await asyncio.sleep(pause)
                pause = min(2.0 * pause, _LONGEST_PAUSE)

    async def _resync_for_ever(self) -> None:
        pause = self._resync
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(pause * self._jitter()):
                    await self._gap.wait()
                    await asyncio.sleep(_GAP_PAUSE)
            self._gap.clear()
            try:
                await self._list_all(first=False)
                pause = self._resync
            except ApiError as error:
                # Not fatal when it is Forbidden: an API server that has just started does not know its RBAC rules yet.
                # A right that is really gone ends the streams.
                log.warning("resync failed", problem=str(error))
                pause = min(_LONGEST_PAUSE, self._resync)

    async def _list_all(self, *, first: bool) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                for watched, namespace in self._store.scopes:
                    group.create_task(self._list(watched, namespace, first=first))
        except ExceptionGroup as group:
            raise _main_error(group) from None

    async def _list(self, watched: Watched, namespace: str | None, *, first: bool) -> None:
        kind = watched.kind
        try:
            listing = await self._client.list(kind, namespace, watched.label_selector)
        except (NotFound, Forbidden) as error:
            if not first:
                raise
            raise _unusable(kind.group, kind.plural, namespace, error) from error
        changes = self._store.replace(kind, namespace, listing)
        self._heard_of(kind)
        if changes and not first:
            self._observer.watch_missed(kind.kind, len(changes))
        for change in changes:
            self._tell(change)

    def _take_event(self, kind: Kind, event_type: str | None, obj: KubeObject) -> None:
        self._heard_of(kind)
        listed = event_type is None
        change = self._store.remove(obj) if event_type == "DELETED" else self._store.hear(obj, listed=listed)
        if change is not None:
            self._tell(change)
        if listed:
            self._gap.set()

    def _tell(self, change: Change) -> None:
        states = (state for state in (change.old, change.new) if state is not None)
        for key in dict.fromkeys(key for state in states for key in self._keys_of(state)):
            self._sink(key)

    def _heard_of(self, kind: Kind) -> None:
        self._seen[kind] = time.monotonic()
        self._observer.watch_event(kind.kind, time.time())


class _Streams:
    """kopf's operator in a thread."""

    def __init__(self, store: Store, login: Login, take: Callable[[Kind, str | None, KubeObject], None]) -> None:
        self._store = store
        self._login = login
        self._take = take
        self._loop = asyncio.get_running_loop()
        self._failure: asyncio.Future[OperatorError] = self._loop.create_future()
        self._stop = asyncio.Event()  # of kopf's loop, see `stop`
        self._kopf_loop: Future[asyncio.AbstractEventLoop] = Future()
        # A daemon: a kopf that does not end must not keep the process from ending.
        self._thread = threading.Thread(target=self._main, name="kopf", daemon=True)
        self._thread.start()

    async def failed(self) -> NoReturn:
        """Wait until the streams end or an event cannot be taken.

        Raises:
            OperatorError: why.
        """
        raise await self._failure

    async def stop(self) -> None:
        """End the thread."""
        kopf_loop = await asyncio.wrap_future(self._kopf_loop)
        with suppress(RuntimeError):  # closed: it has ended by itself
            kopf_loop.call_soon_threadsafe(self._stop.set)
        await asyncio.to_thread(self._thread.join, _STOP_TIMEOUT)
        if self._thread.is_alive():
            log.warning("the watches did not stop", seconds=_STOP_TIMEOUT)

    def _main(self) -> None:
        try:
            asyncio.run(self._kopf())
        except BaseException as error:  # noqa: BLE001 - handed over to the other thread
            problem = _translate(error)
        else:
            problem = OperatorError("the watches have ended")
        self._loop.call_soon_threadsafe(self._fail, problem)

    async def _kopf(self) -> None:
        self._kopf_loop.set_result(asyncio.get_running_loop())
        import kopf  # noqa: PLC0415 - in this thread: a standby needs none, and a leader reconciles meanwhile

        namespaces = self._store.namespaces
        try:
            await kopf.operator(
                registry=_registry(self._store, self._login, self._hand_over),
                settings=_settings(self._store),
                standalone=True,
                clusterwide=not namespaces,
                namespaces=namespaces,
                stop_flag=self._stop,
            )
        finally:
            # kopf leaves generators suspended in an event; asyncio ends them, and would tell each of it as an error.
            asyncio.get_running_loop().set_exception_handler(lambda *_: None)
            # kopf closes its sessions without waiting for the TLS connections to be shut down.
            await asyncio.sleep(_CLOSE_SECONDS)

    def _hand_over(self, kind: Kind, event_type: str | None, obj: KubeObject) -> None:
        self._loop.call_soon_threadsafe(self._take_or_fail, kind, event_type, obj)

    def _take_or_fail(self, kind: Kind, event_type: str | None, obj: KubeObject) -> None:
        try:
            self._take(kind, event_type, obj)
        except Exception as error:
            # The loop would only log it, and go on with a cache that lacks this event.
            log.exception("event not taken", kind=kind.kind)
            self._fail(_translate(error))

    def _fail(self, problem: OperatorError) -> None:
        if not self._failure.done():
            self._failure.set_result(problem)


def _registry(
    store: Store, login: Login, hand_over: Callable[[Kind, str | None, KubeObject], None]
) -> kopf.OperatorRegistry:
    import kopf  # noqa: PLC0415 - see `_Streams`

    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)
    async def log_in(**_: Any) -> kopf.ConnectionInfo:
        configuration = await login.load()
        return kopf.ConnectionInfo(
            server=configuration.host,
            ca_path=configuration.ssl_ca_cert,
            insecure=not configuration.verify_ssl,
            certificate_path=configuration.cert_file,
            private_key_path=configuration.key_file,
            scheme="Bearer" if bearer_token(configuration) else None,
            token=bearer_token(configuration),
            proxy_url=configuration.proxy,
        )

    def register(kind: Kind) -> None:
        @kopf.on.event(kind.group, kind.version, kind.plural, registry=registry, id=kind.resource)
        async def on_event(event: kopf.RawEvent, **_: Any) -> None:
            hand_over(kind, event["type"], dict(event["object"]))

    for kind in dict.fromkeys(watched.kind for watched, _ in store.scopes):
        register(kind)
    return registry


def _settings(store: Store) -> kopf.OperatorSettings:
    import kopf  # noqa: PLC0415 - see `_Streams`

    settings = kopf.OperatorSettings()
    settings.scanning.disabled = True  # needs rights on CRDs and namespaces; the lists have shown that all exist
    settings.posting.enabled = False
    settings.peering.standalone = True
    settings.watching.chunk_size = CHUNK_SIZE
    settings.networking.connect_timeout = 10.0
    settings.networking.request_timeout = 60.0
    settings.process.ultimate_exiting_timeout = None  # would kill the whole process
    for watched, _ in store.scopes:
        if watched.label_selector is not None:
            kind = watched.kind
            settings.watching.label_selectors[kind.group, kind.version, kind.plural] = watched.label_selector
    # Said at every start, and on purpose here.
    logging.getLogger("kopf._core.reactor.running").addFilter(_not_about_signals)
    return settings


def _not_about_signals(record: logging.LogRecord) -> bool:
    return "OS signals are ignored" not in record.getMessage()


def _translate(error: BaseException) -> OperatorError:
    """The errors of kopf carry the HTTP status, and of a ``metav1.Status`` the message and the details."""
    if isinstance(error, OperatorError):
        return error
    details = getattr(error, "details", None) or {}
    refusals: dict[int, type[ApiError]] = {HTTPStatus.FORBIDDEN: Forbidden, HTTPStatus.NOT_FOUND: NotFound}
    cls = refusals.get(getattr(error, "status", 0))
    if cls is not None and details.get("kind"):
        refusal = cls(str(getattr(error, "message", error)))
        return _unusable(details.get("group", ""), details["kind"], None, refusal)
    return OperatorError(f"the watches have ended: {type(error).__name__}: {error}")


def _unusable(group: str, plural: str, namespace: str | None, error: ApiError) -> OperatorError:
    """Why a kind cannot be watched, and what to do about it."""
    resource = f"{plural}.{group}" if group else plural
    where = f"in namespace {namespace}" if namespace else "in all namespaces"
    if isinstance(error, Forbidden):
        return OperatorError(
            f"may not watch {resource} {where}: {error}. "
            f'Allow it: apiGroups: ["{group}"], resources: ["{plural}"], verbs: ["get", "list", "watch"]'
        )
    fix = (
        "Install the CRD: kubectl apply --server-side -k crds"
        if group.endswith("securevllm.io")
        else "This version of Kubernetes does not have it"
    )
    return OperatorError(f"{resource} is not served by the API server ({error}). {fix}")


def _main_error(group: ExceptionGroup[Exception]) -> Exception:
    """The one that needs a person: a kind that is missing matters more than one that did not answer in time."""
    return min(group.exceptions, key=lambda error: (isinstance(error, Unavailable), isinstance(error, OperatorError)))
