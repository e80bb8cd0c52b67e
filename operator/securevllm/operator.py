"""The operator process: who is created, in which order it starts, and how it stops.

    Lease -> watches -> work queue -> reconcile

A standby only tries for the Lease and answers probes. Whoever loses the Lease ends: no state of a leader survives
into another term. SIGTERM: what runs may finish, the Lease is handed over, exit code 0.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import structlog

from securevllm import __version__, log, resolvers
from securevllm.api import kinds
from securevllm.api import types as api
from securevllm.api.kinds import Ref
from securevllm.children import labelled
from securevllm.claims import Claims
from securevllm.cluster import Kubernetes, Login, connect
from securevllm.context import FIELD_MANAGER
from securevllm.errors import OperatorError
from securevllm.gateways import HttpGateways
from securevllm.http import HttpServer
from securevllm.leader import Elector, LeaseSettings, boot_clock
from securevllm.metrics import Metrics
from securevllm.proof.asking import HttpAsks
from securevllm.proof.dial import Listener, accepting
from securevllm.proof.evidence import Evidences
from securevllm.proof.foreign import asked_for
from securevllm.proof.others import Others
from securevllm.proof.prober import Prober
from securevllm.reconcile import Key, Reconciler, Told
from securevllm.render.canary import is_canary
from securevllm.render.meta import DENY_NAME, INSTANCE, MANAGED_BY, RESOURCE_LABEL, SECRET_LABEL, is_resource
from securevllm.store import Store, Watched
from securevllm.watch import Watcher
from securevllm.workqueue import WorkQueue

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject
    from securevllm.settings import Settings
    from securevllm.status import Figures

logger = structlog.stdlib.get_logger(__name__)

_OURS = f"{MANAGED_BY}={FIELD_MANAGER}"
_RESOLV_CONF = Path("/etc/resolv.conf")
_FINISH_SECONDS = 3.0
_ABORT_SECONDS = 5.0
_OBJECTS_BETWEEN_COLLECTIONS = 10_000

WATCHED = (
    Watched(kinds.SECURE_VLLM_DEPLOYMENT, own_status=True),
    # All of them, not only ours: NetworkPolicies add up, so anybody's can open what ours close.
    Watched(kinds.NETWORK_POLICY),
    # Repairs look at managedFields of what we apply.
    *(
        Watched(kind, _OURS)
        for kind in (
            kinds.DEPLOYMENT,
            kinds.STATEFUL_SET,
            kinds.SERVICE,
            kinds.CONFIG_MAP,
            kinds.SERVICE_ACCOUNT,
            kinds.POD_DISRUPTION_BUDGET,
            kinds.JOB,
            kinds.PERSISTENT_VOLUME_CLAIM,
        )
    ),
    Watched(kinds.SECRET, SECRET_LABEL),
    Watched(kinds.POD, _OURS, managed_fields=False),
)
"""What is watched, and by which label: of what is numerous, never all objects of a namespace."""


def controllers(obj: KubeObject) -> Iterator[str]:
    """The uid of an object's controller and, where that is a resource of ours, its name."""
    for reference in obj["metadata"].get("ownerReferences", ()):
        if reference.get("controller"):
            yield reference["uid"]
            if is_resource(reference):
                yield str(Ref(kinds.SECURE_VLLM_DEPLOYMENT, obj["metadata"]["namespace"], reference["name"]))


def words(obj: KubeObject) -> Iterator[str]:
    """The index of the store: ``controllers``, and the labels of resources that pods carry and policies ask for."""
    yield from controllers(obj)
    namespace = obj["metadata"].get("namespace", "")
    if obj["kind"] == kinds.POD.kind:
        yield labelled(kinds.POD, namespace, obj["metadata"].get("labels", {}).get(RESOURCE_LABEL, ""))
    elif obj["kind"] == kinds.NETWORK_POLICY.kind:
        yield labelled(kinds.NETWORK_POLICY, namespace, asked_for(obj))


def keys_of(store: Store) -> Callable[[KubeObject], Iterator[Key]]:
    """Which keys an object concerns."""

    def keys(obj: KubeObject) -> Iterator[Key]:
        metadata = obj["metadata"]
        namespace, labels = metadata["namespace"], metadata.get("labels", {})
        owners = [ref["name"] for ref in metadata.get("ownerReferences", ()) if is_resource(ref)]
        if obj["kind"] == api.KIND:
            yield Key(namespace, metadata["name"])
        elif obj["kind"] == kinds.POD.kind and is_canary(obj):
            return  # the prober waits for it, and tells when that changes anything
        elif owners:
            yield from (Key(namespace, name) for name in owners)
        elif obj["kind"] == kinds.POD.kind:
            # A pod belongs to what made it; the label is a hint, and a wrong one costs one idle reconcile.
            yield Key(namespace, labels.get(INSTANCE, ""))
        elif metadata["name"] == DENY_NAME:
            yield Key(namespace, "")
        elif obj["kind"] in {kinds.SECRET.kind, kinds.NETWORK_POLICY.kind}:
            # A user's Secret: whoever names it will see it. A foreign policy: whose pods it selects will see it.
            for resource in store.all(kinds.SECURE_VLLM_DEPLOYMENT, namespace):
                yield Key(namespace, resource["metadata"]["name"])

    return keys


def run(settings: Settings) -> None:
    """Run until SIGTERM or SIGINT.

    Raises:
        OperatorError: it cannot go on; says why.
    """
    log.configure(settings.log_format, settings.log_level)
    if settings.kubeconfig is None and _RESOLV_CONF.exists():
        # In a pod: its resolv.conf is that of engines and gateways too.
        for told in resolvers.unnamed(_RESOLV_CONF.read_text(encoding="utf-8"), settings.context):
            logger.warning("dns", problem=told)
    try:
        asyncio.run(_main(settings))
    except ExceptionGroup as group:
        errors = _leaves(group)
        known = [error for error in errors if isinstance(error, OperatorError)]
        if len(known) != len(errors):
            raise
        raise known[0] from group


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    found: list[BaseException] = []
    for error in group.exceptions:
        found += _leaves(error) if isinstance(error, BaseExceptionGroup) else [error]
    return found


async def _main(settings: Settings) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(signum, stop.set)
    logger.info("starting", version=__version__, identity=settings.identity, namespace=settings.watch_namespace or "*")
    async with AsyncExitStack() as stack:
        process = await stack.enter_async_context(_Process.started(settings))
        # What lives here is JSON, without cycles. Python's default looks for some after every 700 objects, and while
        # a hundred resources are made, at everything that there is every few seconds: 80 ms in which all else waits.
        gc.freeze()
        gc.set_threshold(_OBJECTS_BETWEEN_COLLECTIONS)
        if await process.until(stop, process.elector.acquire()):
            return
        await process.until(stop, process.lead())
        logger.info("stopping")
        await process.finish()
    logger.info("stopped")


class _Process:
    """Everything that lives as long as the process."""

    def __init__(
        self,
        settings: Settings,
        kubernetes: Kubernetes,
        elector: Elector,
        session: aiohttp.ClientSession,
        metrics: Metrics,
    ) -> None:
        self.elector = elector
        self._settings = settings
        self._interrupted: list[asyncio.Future[None]] = []
        self.store = Store(
            WATCHED,
            namespaces=[settings.watch_namespace] if settings.watch_namespace else [],
            index=words,
        )
        self.prober = Prober(
            kubernetes,
            self.store,
            HttpAsks(session),
            settings.context,
            now=_now,
            monotonic=boot_clock,
            changed=lambda who: self.queue.add(Key(*who)),
            observer=metrics,
            others=Others(kubernetes, boot_clock, everywhere=not settings.watch_namespace),
        )
        reconciler = Reconciler(
            kubernetes,
            self.store,
            HttpGateways(session),
            settings.context,
            settings.bounds,
            claims=Claims(kubernetes, settings.installation, settings.take_over),
            evidences=Evidences(self.store, self.prober, settings.context, _now, canary_pods=settings.canary_pods),
            now=_now,
            monotonic=boot_clock,
            told=_told(metrics),
            docs=settings.docs_url,
        )
        self.queue: WorkQueue[Key] = WorkQueue(reconciler, observer=metrics)
        self._metrics = metrics
        self.watcher = Watcher(
            kubernetes,
            Login(settings.kubeconfig),
            self.store,
            keys_of=keys_of(self.store),
            sink=self.queue.add,
            observer=metrics,
            resync=settings.resync_seconds,
        )
        metrics.follow(depth=self.queue.depth, oldest_age=self.queue.oldest_age, leader=lambda: self.elector.is_leader)

    @classmethod
    @asynccontextmanager
    async def started(cls, settings: Settings) -> AsyncIterator[_Process]:
        """Connections and the HTTP server, closed at the end."""
        login = Login(settings.kubeconfig)
        metrics = Metrics(__version__)
        lease = LeaseSettings(settings.namespace, settings.lease, settings.identity)
        async with AsyncExitStack() as stack:
            # The elector has connections of its own: a queue of slow writes must not delay a renewal.
            election = await stack.enter_async_context(
                connect(login, fence=lambda: True, observe=metrics.api_request, timeout=lease.request_timeout)
            )
            elector = Elector(election, lease, on_lost=_abort)
            kubernetes = await stack.enter_async_context(
                connect(
                    login,
                    fence=elector.may_write,
                    observe=metrics.api_request,
                    # A write that starts right before the renew deadline must end before the lease does (I9).
                    timeout=lease.lease_duration - lease.renew_deadline - 1,
                    instance=settings.identity,
                )
            )
            session = await stack.enter_async_context(aiohttp.ClientSession(trust_env=False))
            process = cls(settings, kubernetes, elector, session, metrics)
            try:
                await stack.enter_async_context(process.server())
            except OSError as error:
                where = f"{settings.listen_address}:{settings.http_port}"
                raise OperatorError(
                    f"cannot listen on {where} ({error.strerror}): choose another --http-port"
                ) from error
            if settings.canary_listener:
                await stack.enter_async_context(_canary(settings))
            yield process

    def server(self) -> HttpServer:
        """Health, readiness, metrics."""
        return HttpServer(
            healthz={"workers": self._workers, "watches": self.watcher.unhealthy},
            readyz={"ready": self._ready},
            leadz={
                "leader": lambda: None if self.elector.is_leader else "not the leader",
                "caches": self.store.unsynced,
            },
            registry=self._metrics.registry,
            host=self._settings.listen_address,
            port=self._settings.http_port,
        )

    def _workers(self) -> str | None:
        return self.queue.unhealthy() if self.elector.is_leader and self.store.unsynced() is None else None

    def _ready(self) -> str | None:
        """A standby is ready when it could take over; otherwise a rollout would wait for ever."""
        return self.store.unsynced() if self.elector.is_leader else self.elector.unreadable()

    async def lead(self) -> None:
        """Watch, reconcile, renew.

        Raises:
            ExceptionGroup: the Lease was lost, or a watch or a worker ended.
        """
        async with asyncio.TaskGroup() as group:
            group.create_task(self.elector.renew(), name="renew")
            group.create_task(self.watcher.run(), name="watch")
            group.create_task(self._work(), name="work")
            group.create_task(self.prober.run(), name="prober")

    async def _work(self) -> None:
        # Children of resources that were deleted meanwhile are seen only by a complete cache.
        while self.store.unsynced() is not None:  # noqa: ASYNC110 - once, at start
            await asyncio.sleep(0.01)
        await self.queue.run(self._settings.workers)

    async def until(self, stop: asyncio.Event, work: Coroutine[Any, Any, None]) -> bool:
        """Work until it is done or a stop is asked for; whether it was asked for.

        What a stop interrupts goes on until ``finish`` ends it, after the reconciles.
        """
        task, asked = asyncio.ensure_future(work), asyncio.ensure_future(stop.wait())
        try:
            await asyncio.wait([task, asked], return_when=asyncio.FIRST_COMPLETED)
        finally:
            asked.cancel()
        if task.done():
            await task
            return False
        self._interrupted.append(task)
        return True

    async def finish(self) -> None:
        """Let running reconciles end, then hand over the Lease."""
        await self.queue.shutdown(_FINISH_SECONDS)
        for task in self._interrupted:
            task.cancel()
        await asyncio.gather(*self._interrupted, return_exceptions=True)
        await self.elector.release()


def _now() -> datetime:
    return datetime.now(UTC)


def _canary(settings: Settings) -> Listener:
    """Listening on every candidate: gates of all pods look for whichever is Ready."""
    port = settings.context.canary_port
    try:
        return Listener((accepting(settings.listen_address, port),))
    except OSError as error:
        where = f"{settings.listen_address}:{port}"
        raise OperatorError(
            f"cannot listen on {where} ({error.strerror}): choose another --canary-port, or --no-canary-listener"
        ) from error


def _told(metrics: Metrics) -> Told:
    def told(namespace: str, name: str, statuses: Mapping[str, str] | None, figures: Figures | None) -> None:
        if statuses is None:
            metrics.forget(namespace, name)
            return
        metrics.set_conditions(namespace, name, statuses)
        if figures is not None:
            metrics.set_figures(namespace, name, figures)

    return told


def _abort() -> None:
    """The Lease is lost. The process ends by itself; when something hangs, without asking."""
    timer = threading.Timer(_ABORT_SECONDS, os._exit, args=(1,))
    timer.daemon = True
    timer.start()
