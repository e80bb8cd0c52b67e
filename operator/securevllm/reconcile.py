"""One resource, level-based: whatever happened, look at everything and bring it to what the spec says.

    gather -> parse -> plan, render -> isolate -> configure -> run -> prune -> read back -> status

Order is safety: the namespace's default-deny and the resource's policies are there before a pod is; when one of them
cannot be applied, nothing that runs is created or changed. A bad spec changes nothing: the last accepted one is
reconciled instead.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import structlog

from securevllm import certs
from securevllm.api import types as api
from securevllm.api.kinds import DEPLOYMENT, JOB, NETWORK_POLICY, POD, SECRET, SECURE_VLLM_DEPLOYMENT, KubeObject, Ref
from securevllm.api.parse import Accepted, parse
from securevllm.children import Cache, Children, Outcome
from securevllm.errors import ApiError, Conflict, Forbidden, ForeignObject, NotFound, OperatorError, Problem, SpecError
from securevllm.gateways import Gateways, Pod
from securevllm.log import register_secret
from securevllm.render import Generated, Made, Observed, Rendered, accepted, engine, fetch, gateway, generated, keys
from securevllm.render import render as render_resource
from securevllm.render.meta import DENY_NAME, RESOURCE_LABEL, RESTART_ANNOTATION, Object, Owner, stamp
from securevllm.render.policies import default_deny
from securevllm.render.readback import versions_of
from securevllm.status import Facts, Gateway, status, transitions
from securevllm.status import fetch as read_fetch
from securevllm.status import workload as read_workload
from securevllm.topology import Role

if TYPE_CHECKING:
    from securevllm.cluster import Kubernetes
    from securevllm.context import Context

log = structlog.stdlib.get_logger(__name__)

REVISION_ANNOTATION = f"{api.GROUP}/revision"
"""The nudge: a change of it on a gateway *pod* makes kubelet sync the pod's volumes now instead of within 80 s."""

_RESYNC = 300.0
_POLL = 0.2
_POLL_LIMIT = 10.0
_RETRY = 2.0
_DENY_RETRY = 2.0

_KEYS = tuple[keys.ClientKeys, tuple[str, ...]]
_NO_KEYS: _KEYS = (keys.ClientKeys((), ()), ())


class Key(NamedTuple):
    """What is reconciled: a resource, or with an empty name the default-deny of a namespace."""

    namespace: str
    name: str

    def __str__(self) -> str:
        return f"{self.namespace}/{self.name}"


@dataclass(frozen=True)
class _Held:
    """What was accepted last, if it can be read, and the key of its seal; empty when there is none yet."""

    kept: accepted.Kept | None
    seal_key: bytes


@dataclass
class _Poll:
    """Read-back of what is not served everywhere yet; the pause grows until something else is awaited."""

    awaited: str
    pause: float = _POLL

    def next(self) -> float:
        pause, self.pause = self.pause, min(self.pause * 1.5, _POLL_LIMIT)
        return pause


class Reconciler:
    """Brings resources to what their specs say.

    Args:
        kubernetes: the API.
        cache: what the watches told.
        gateways: reads back what Envoys serve.
        context: the cluster and the operator.
        now: wall clock, UTC.
        monotonic: clock for pauses, seconds.
        conditions: told the conditions of every resource, and None when it is gone (metrics).
    """

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        gateways: Gateways,
        context: Context,
        *,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        conditions: Callable[[str, str, Mapping[str, str] | None], None] = lambda *_: None,
    ) -> None:
        self._kubernetes, self._cache, self._gateways, self._context = kubernetes, cache, gateways, context
        self._now, self._conditions = now, conditions
        self._children = Children(kubernetes, cache, monotonic)
        self._locks: dict[str, asyncio.Lock] = {}
        self._users: Counter[str] = Counter()
        self._polls: dict[Key, _Poll] = {}

    async def __call__(self, key: Key) -> float | None:
        """Reconcile a key; gives the seconds until it wants to be called again, None when it is gone."""
        if not key.name:
            return await self._tidy(key.namespace)
        ref = Ref(SECURE_VLLM_DEPLOYMENT, key.namespace, key.name)
        resource = self._cache.get(ref)
        if resource is None:
            # The watch may lag behind; only the API server knows that it is gone.
            try:
                resource = await self._kubernetes.get(ref)
            except NotFound:
                return await self._gone(key)
            self._cache.put(resource)
        if resource["metadata"].get("deletionTimestamp"):
            return await self._gone(key)
        try:
            return await self._reconcile(key, resource)
        except (Conflict, NotFound) as error:
            # The object moved under us (or was recreated): what the cache holds is old.
            self._cache.forget(ref)
            log.info("state is old, looking again", error=str(error))
            return _RETRY / 4

    async def _reconcile(self, key: Key, resource: KubeObject) -> float:
        metadata = resource["metadata"]
        owner = Owner(key.name, key.namespace, metadata["uid"])
        problems: tuple[Problem, ...] = ()
        try:
            wanted: Accepted | None = parse(key.name, resource.get("spec", {}))
        except SpecError as error:
            problems, wanted = error.problems, None
        held = await self._held(owner)
        if wanted is None and held.kept is not None:
            wanted = _reparse(key.name, held.kept.spec)
        facts = Facts(
            generation=metadata.get("generation", 0),
            problems=problems,
            fallback=bool(problems) and wanted is not None,
            lost=bool(problems) and wanted is None and bool(self._cache.indexed(owner.uid)),
        )
        if wanted is None:
            await self._report(resource, facts)
            return _RESYNC
        facts, again = await self._bring(resource, owner, wanted, held, facts)
        await self._report(resource, facts)
        return again

    # ------------------------------------------------------------------------------------------------------- gather

    async def _held(self, owner: Owner) -> _Held:
        """What was accepted last."""
        secret = await self._find(Ref(SECRET, owner.namespace, engine.key_secret(owner)))
        config = await self._find(Ref.of(accepted.config_map(owner, accepted.Kept({}, {}), b"")))
        seal_key = _decode(secret.get("data", {})).get(engine.SEAL, b"") if secret else b""
        if config is None or not seal_key:
            return _Held(None, seal_key)
        held = accepted.read(owner, config.get("data", {}), seal_key)
        if held is None:
            log.warning("the accepted spec carries no valid seal and is not used")
        return _Held(held, seal_key)

    async def _find(self, ref: Ref) -> KubeObject | None:
        cached = self._cache.get(ref)
        if cached is not None:
            return cached
        try:
            return await self._kubernetes.get(ref)
        except NotFound:
            return None

    async def _client_keys(self, owner: Owner, wanted: Accepted, made: Mapping[Made, KubeObject]) -> _KEYS:
        """The judged client keys, and what the spec names and is not there."""
        authentication = wanted.spec.gateway.authentication
        if authentication.none is not None:
            return _NO_KEYS
        if authentication.api_keys is None:
            secret = made[Made.CLIENT_KEYS]
            return keys.judge({secret["metadata"]["name"]: _decode(secret.get("data", {}))}), ()
        found, missing = {}, []
        for reference in authentication.api_keys.secret_refs:
            live = await self._find(Ref(SECRET, owner.namespace, reference.name))
            if live is None:
                missing.append(f"Secret {reference.name} (gateway.authentication.apiKeys) does not exist.")
            elif not live.get("data"):
                missing.append(f"Secret {reference.name} (gateway.authentication.apiKeys) has no key.")
            else:
                found[reference.name] = _decode(live["data"])
        return keys.judge(found), tuple(missing)

    async def _missing_secrets(self, owner: Owner, spec: api.Spec) -> tuple[str, ...]:
        """Secrets that pods mount and that are not there; only names are asked for, their content is not read."""
        wanted = [("gateway.tls", spec.gateway.tls.secret_name)]
        hub = spec.model.source.hugging_face if spec.model.source is not None else None
        if hub is not None and hub.token_secret_ref is not None:
            wanted.append(("model.source.huggingFace.tokenSecretRef", hub.token_secret_ref.name))
        missing = []
        for field, name in wanted:
            if name is not None and not await self._kubernetes.exists(Ref(SECRET, owner.namespace, name)):
                missing.append(f"Secret {name} ({field}) does not exist.")
        return tuple(missing)

    # -------------------------------------------------------------------------------------------------------- bring

    async def _bring(
        self, resource: KubeObject, owner: Owner, wanted: Accepted, held: _Held, facts: Facts
    ) -> tuple[Facts, float]:
        # The default-deny must not be tidied away between here and the first pod.
        seal_key = held.seal_key
        async with self._using(owner.namespace):
            deny = await self._children.bring([stamp(default_deny(owner.namespace))], None, prefix="isolation/")
            made, failures = await self._make(owner, wanted)
            if Made.ENGINE_KEY in made:
                secret = _decode(made[Made.ENGINE_KEY]["data"])
                seal_key = secret[engine.SEAL]
                register_secret(secret[engine.KEY].decode())
            judged, missing = _NO_KEYS
            if not failures:
                judged, missing = await self._client_keys(owner, wanted, made)
            for client in judged.keys:
                register_secret(client.key)
            job = self._job(owner, wanted)
            annotations = resource["metadata"].get("annotations", {})
            rendered = render_resource(
                owner,
                wanted,
                self._context,
                Observed(
                    client_keys=judged.keys,
                    pins=held.kept.pins if held.kept else {},
                    fetched=frozenset([job["metadata"]["name"]] if job is not None and read_fetch(job).done else []),
                    restart_at=annotations.get(RESTART_ANNOTATION, ""),
                    seal_key=seal_key,
                ),
            )
            outcomes = [deny]
            if not deny.failures:
                outcomes.append(await self._children.bring(rendered.isolation, owner.uid, prefix="isolation/"))
            isolated = not any(outcome.failures for outcome in outcomes)
            if isolated and not failures:
                configured = await self._children.bring(rendered.configuration, owner.uid)
                outcomes.append(configured)
                if f"operator/ConfigMap {owner.child(accepted.SUFFIX)}" not in configured.failures:
                    outcomes.append(await self._children.bring(rendered.workloads, owner.uid))
        if isolated and not failures:
            outcomes.append(await self._children.prune(owner.uid, _kept(rendered, wanted, owner, self._context)))
        together = _together([*outcomes, Outcome(failures)])
        missing += await self._missing_secrets(owner, wanted.spec)
        served, again = await self._read_back(owner, rendered)
        engines = self._cache.get(Ref(DEPLOYMENT, owner.namespace, owner.child(engine.ROLE)))
        gateways = self._cache.get(Ref(DEPLOYMENT, owner.namespace, owner.child(gateway.ROLE)))
        authenticated = wanted.spec.gateway.authentication.none is None
        found = replace(
            facts,
            suspended=wanted.spec.suspend,
            engine=read_workload(engines) if engines else None,
            gateway=read_workload(gateways) if gateways else None,
            fetch=read_fetch(self._job(owner, wanted)) if fetch.job(owner, wanted.spec) is not None else None,
            served=served,
            missing=missing,
            keys=judged.problems,
            no_keys=authenticated and not judged.keys,
            failures=together.failures,
            outdated=rendered.outdated,
            risks=wanted.risks,
            contested=together.contested,
            url=rendered.url,
            selector=rendered.selector,
            version=str(wanted.version),
            verification=wanted.spec.security.verification.mode,
        )
        if together.failures:
            again = min(again, _RETRY if together.retry else _RESYNC / 10)
        return found, min(again, self._renewal(made))

    def _job(self, owner: Owner, wanted: Accepted) -> KubeObject | None:
        return self._cache.get(Ref(JOB, owner.namespace, fetch.job_name(owner, wanted.spec)))

    async def _make(self, owner: Owner, wanted: Accepted) -> tuple[dict[Made, KubeObject], dict[str, str]]:
        """The generated Secrets, in order: the certificate needs the CA."""
        made: dict[Made, KubeObject] = {}
        failures: dict[str, str] = {}
        for item in generated(owner, wanted, self._context):
            try:
                made[item.made] = await self._children.make(item.object, owner.uid, self._content(item, made))
            except (ApiError, ForeignObject, ValueError, KeyError) as error:
                component = item.object["metadata"]["labels"]["app.kubernetes.io/component"]
                failures[f"{component}/Secret {item.object['metadata']['name']}"] = str(error)
        return made, failures

    def _content(self, item: Generated, made: Mapping[Made, KubeObject]) -> Callable[..., Any]:
        async def content(current: Mapping[str, str] | None) -> dict[str, str]:
            data = _decode(current) if current is not None else None
            match item.made:
                case Made.ENGINE_KEY:
                    wanted: Mapping[str, bytes] = data or {}
                    for name in (engine.KEY, engine.SEAL):
                        if not wanted.get(name):
                            wanted = {**wanted, name: certs.token().encode()}
                case Made.CLIENT_KEYS:
                    # A user may add clients; an emptied Secret gets a key again.
                    wanted = data or {"default": certs.token().encode()}
                case Made.CA:
                    wanted = certs.ca(data, item.object["metadata"]["name"], self._now())
                case Made.TLS:
                    authority = _decode(made[Made.CA]["data"])
                    wanted = certs.leaf(data, authority, item.names, self._now())
            return {name: base64.b64encode(value).decode() for name, value in wanted.items()}

        return content

    def _renewal(self, made: Mapping[Made, KubeObject]) -> float:
        if Made.TLS not in made:
            return _RESYNC
        left = certs.renewal(_decode(made[Made.TLS]["data"])) - self._now()
        return max(1.0, min(_RESYNC, left.total_seconds()))

    # ---------------------------------------------------------------------------------------------------- read back

    async def _read_back(self, owner: Owner, rendered: Rendered) -> tuple[Gateway, float]:
        """Which gateways serve the current files; nudges those that do not."""
        key = Key(owner.namespace, owner.name)
        pods = [
            pod
            for pod in self._cache.all(POD, owner.namespace)
            if owner.selector(gateway.ROLE).items() <= pod["metadata"].get("labels", {}).items()
            and pod.get("status", {}).get("podIP")
            and pod["status"].get("phase") == "Running"
            and not pod["metadata"].get("deletionTimestamp")
        ]
        if not pods:
            self._polls.pop(key, None)
            return Gateway(), _RESYNC
        expected = versions_of(rendered.served_files())
        addresses = [Pod(pod["metadata"]["name"], pod["status"]["podIP"]) for pod in pods]
        port = rendered.topology.socket(Role.GATEWAY, "ops").port
        answers = await self._gateways.served(addresses, port)
        stale = {
            name: tuple(sorted(file for file, version in expected.items() if served.versions.get(file) != version))
            for name, served in answers.items()
            if served is not None
        }
        found = Gateway(
            stale,
            silent=tuple(sorted(name for name, served in answers.items() if served is None)),
            unconnected=tuple(sorted(name for name, served in answers.items() if served and not served.engines)),
        )
        engines = self._cache.get(Ref(DEPLOYMENT, owner.namespace, owner.child(engine.ROLE)))
        ready = read_workload(engines).ready if engines else 0
        if not found.silent and not any(stale.values()) and not (ready and found.unconnected):
            self._polls.pop(key, None)
            return found, _RESYNC
        revision = rendered.revision()
        await asyncio.gather(*(self._nudge(pod, revision) for pod in pods if stale.get(pod["metadata"]["name"])))
        awaited = f"{revision} {ready}"
        poll = self._polls.get(key)
        if poll is None or poll.awaited != awaited:
            poll = self._polls[key] = _Poll(awaited)
        return found, poll.next()

    async def _nudge(self, pod: KubeObject, revision: str) -> None:
        if pod["metadata"].get("annotations", {}).get(REVISION_ANNOTATION) == revision:
            return
        body = {"metadata": {"annotations": {REVISION_ANNOTATION: revision}, "uid": pod["metadata"]["uid"]}}
        try:
            self._cache.put(await self._kubernetes.patch(Ref.of(pod), body))
        except (NotFound, Conflict):
            self._cache.forget(Ref.of(pod))
        except Forbidden as error:
            log.warning(
                "gateway pod not nudged, kubelet takes up to 80 s", pod=pod["metadata"]["name"], error=str(error)
            )

    # ------------------------------------------------------------------------------------------------------- report

    async def _report(self, resource: KubeObject, facts: Facts) -> None:
        before = resource.get("status", {})
        now = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        after = status(facts, before, now)
        metadata = resource["metadata"]
        if facts.lost or (facts.problems and not facts.fallback):
            # Nothing was reconciled: what was seen before is still the best that can be said.
            after = {**before, "observedGeneration": after["observedGeneration"], "conditions": after["conditions"]}
        self._conditions(
            metadata["namespace"], metadata["name"], {item["type"]: item["status"] for item in after["conditions"]}
        )
        if {name: before.get(name) for name in after} == after:
            return
        ref = Ref.of(resource)
        self._cache.put(await self._kubernetes.patch_status(ref, after, uid=metadata["uid"]))
        for change in transitions(before.get("conditions", ()), after["conditions"]):
            await self._kubernetes.post_event(
                resource, reason=change.reason, note=change.message, action="Reconcile", warning=change.warning
            )

    # --------------------------------------------------------------------------------------------------------- gone

    async def _gone(self, key: Key) -> float | None:
        """The resource is gone: its children go by their owner reference; the default-deny goes last."""
        self._polls.pop(key, None)
        self._children.forget(key.namespace, key.name)
        self._conditions(key.namespace, key.name, None)
        return await self._tidy(key.namespace)

    async def _tidy(self, namespace: str) -> float | None:
        """Keep the namespace's default-deny while anybody needs it, then remove it (I2)."""
        async with self._lock(namespace):
            if self._users[namespace]:
                return _DENY_RETRY
            resources = bool(self._cache.all(SECURE_VLLM_DEPLOYMENT, namespace))
            if resources or self._has_pods(namespace):
                outcome = await self._children.bring([stamp(default_deny(namespace))], None)
                if outcome.failures and not outcome.retry:
                    return _RESYNC / 10  # refused, for example in a namespace that is being deleted
                return None if resources and not outcome.failures else _DENY_RETRY
            deny = self._cache.get(Ref(NETWORK_POLICY, namespace, DENY_NAME))
            return await self._remove_deny(namespace, deny) if deny is not None else None

    def _has_pods(self, namespace: str) -> bool:
        return any(RESOURCE_LABEL in pod["metadata"].get("labels", {}) for pod in self._cache.all(POD, namespace))

    async def _remove_deny(self, namespace: str, deny: KubeObject) -> float | None:
        """Only a live look counts: the cache may not have seen a resource or a pod that was just made."""
        if (await self._kubernetes.list(SECURE_VLLM_DEPLOYMENT, namespace)).items:
            return _DENY_RETRY
        if (await self._kubernetes.list(POD, namespace, RESOURCE_LABEL)).items:
            return _DENY_RETRY
        ref, metadata = Ref.of(deny), deny["metadata"]
        try:
            await self._kubernetes.delete(ref, uid=metadata["uid"], resource_version=metadata["resourceVersion"])
        except Conflict:
            return _DENY_RETRY
        self._cache.forget(ref)
        log.info("default-deny removed: no resource and no pod is left", namespace=namespace)
        return None

    def _lock(self, namespace: str) -> asyncio.Lock:
        return self._locks.setdefault(namespace, asyncio.Lock())

    @asynccontextmanager
    async def _using(self, namespace: str) -> AsyncIterator[None]:
        """Any number of resources of a namespace side by side, but none while its default-deny is being judged."""
        async with self._lock(namespace):
            self._users[namespace] += 1
        try:
            yield
        finally:
            self._users[namespace] -= 1


def _reparse(name: str, raw: dict[str, Any]) -> Accepted | None:
    """An accepted spec that this release refuses is as good as lost: nothing is changed."""
    try:
        return parse(name, raw)
    except OperatorError:
        return None


def _kept(rendered: Rendered, wanted: Accepted, owner: Owner, context: Context) -> set[Ref]:
    objects: Iterable[Object] = [
        *rendered.objects(),
        *rendered.withheld,
        *(item.object for item in generated(owner, wanted, context)),
    ]
    return {Ref.of(obj) for obj in objects}


def _together(outcomes: Iterable[Outcome]) -> Outcome:
    failures: dict[str, str] = {}
    contested: list[str] = []
    retry = False
    for outcome in outcomes:
        failures |= outcome.failures
        contested += outcome.contested
        retry = retry or outcome.retry
    return Outcome(failures, tuple(contested), retry)


def _decode(data: Mapping[str, str]) -> dict[str, bytes]:
    decoded = {}
    for name, value in data.items():
        try:
            decoded[name] = base64.b64decode(value, validate=True)
        except binascii.Error:
            decoded[name] = b""
    return decoded
