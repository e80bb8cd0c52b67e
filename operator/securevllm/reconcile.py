"""One resource, level-based: whatever happened, look at everything and bring it to what the spec says.

    gather -> parse -> plan, render -> judge groups -> isolate -> configure -> run -> prune -> read back -> status

Order is safety: the namespace's default-deny and the resource's policies are there before a pod is; when one of them
cannot be applied, nothing that runs is created or changed. A bad spec changes nothing: the last accepted one is
reconciled instead.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, NamedTuple

import structlog

from securevllm import certs, topology
from securevllm.api import bounds, kinds
from securevllm.api.guard.pod import network_devices
from securevllm.api.kinds import KubeObject, Ref
from securevllm.api.parse import Accepted, parse, parse_accepted
from securevllm.api.units import seconds
from securevllm.children import Children, Outcome, failed, pods_of
from securevllm.errors import ApiError, Conflict, InternalError, NotFound, Problem, SpecError
from securevllm.gateways import ReadBack
from securevllm.generate import Generator, Secrets, decode, key_made
from securevllm.isolation import DefaultDeny
from securevllm.log import register_secret
from securevllm.render import Made, Observed, Rendered, accepted, engine, fetch, gateway, keys, router
from securevllm.render import render as render_resource
from securevllm.render.closing import closed
from securevllm.render.meta import ISOLATION, RESTART_ANNOTATION, ROLE_LABEL, Owner
from securevllm.rollout import Look, Rollout
from securevllm.status import DOCS, Facts, Fetch, Figures, Workload, status, transitions
from securevllm.status import fetch as read_fetch
from securevllm.status import workload as read_workload

if TYPE_CHECKING:
    from securevllm.api import types as api
    from securevllm.children import Cache
    from securevllm.claims import Claims
    from securevllm.cluster import Kubernetes
    from securevllm.context import Context
    from securevllm.gateways import Gateways
    from securevllm.proof.evidence import Evidences

log = structlog.stdlib.get_logger(__name__)

_LOOK_ANYWAY = 300.0
"""Each resource is looked at every five minutes. `--resync` is something else: a full list of everything."""
_LOOK_AGAIN = 10.0

_PRUNED_FIRST = frozenset({kinds.NETWORK_POLICY, kinds.JOB})
_PRUNED = frozenset({kinds.DEPLOYMENT, kinds.SERVICE, kinds.POD_DISRUPTION_BUDGET})
_PRUNED_LATE = frozenset({kinds.CONFIG_MAP, kinds.SECRET, kinds.SERVICE_ACCOUNT})
"""What pods refer to stays until no pod of an older template is left. Claims and generated Secrets stay for good."""
_CLEARED = _PRUNED_FIRST | _PRUNED | _PRUNED_LATE | {kinds.STATEFUL_SET}
"""What a deleted resource of the same name may leave: all but claims, which hold weights."""

_OF_A_GROUP = (kinds.NETWORK_POLICY, kinds.SERVICE)


Told = Callable[[str, str, Mapping[str, str] | None, Figures | None], None]
"""Namespace and name of a resource, condition type to status, and what is told in numbers."""


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


_NO_KEYS = keys.ClientKeys((), ())


@dataclass(frozen=True)
class _Keys:
    """The clients' keys, what the spec names and is not there, and whether a Secret could not be read at all."""

    judged: keys.ClientKeys = _NO_KEYS
    missing: tuple[str, ...] = ()
    unreadable: bool = False


class Reconciler:
    """Brings resources to what their specs say.

    Args:
        kubernetes: the API.
        cache: what the watches told.
        gateways: reads back what Envoys serve.
        context: the cluster and the operator.
        limits: what the platform lets any resource ask for.
        now: wall clock, UTC.
        monotonic: clock for pauses, seconds.
        claims: which resources are this installation's.
        evidences: of isolation.
        told: the conditions and figures of every resource, and None when it is gone (metrics).
        docs: where people find the pages that messages name.
    """

    def __init__(
        self,
        kubernetes: Kubernetes,
        cache: Cache,
        gateways: Gateways,
        context: Context,
        limits: bounds.PlatformBounds,
        *,
        claims: Claims,
        evidences: Evidences,
        now: Callable[[], datetime],
        monotonic: Callable[[], float],
        told: Told = lambda *_: None,
        docs: str = DOCS,
    ) -> None:
        self._kubernetes, self._cache, self._context = kubernetes, cache, context
        self._bounds, self._now, self._told = limits, now, told
        self._claims, self._evidences, self._docs = claims, evidences, docs
        self._children = Children(kubernetes, cache, monotonic)
        self._deny = DefaultDeny(kubernetes, cache, self._children, monotonic)
        self._generator = Generator(self._children, context, now)
        self._read_back = ReadBack(kubernetes, cache, gateways)
        self._rollout = Rollout(kubernetes, cache, self._children, now)

    async def __call__(self, key: Key) -> float | None:
        """Reconcile a key; gives the seconds until it wants to be called again, None when it is gone."""
        if not key.name:
            return await self._tidy(key.namespace)
        ref = Ref(kinds.SECURE_VLLM_DEPLOYMENT, key.namespace, key.name)
        resource = self._cache.get(ref)
        if resource is None:
            # The watch may lag behind; only the API server knows that it is gone.
            try:
                resource = await self._kubernetes.get(ref)
            except NotFound:
                return await self._gone(key)
            self._cache.put(resource)
        # The garbage collector deletes children first; with any other finalizer the service goes on until it is gone.
        if "foregroundDeletion" in resource["metadata"].get("finalizers", ()):
            return await self._gone(key)
        try:
            claimed = await self._claims.claim(resource)
            if claimed is None:
                self._forget(key)
                return _LOOK_ANYWAY
            resource = claimed
            self._cache.wrote(resource)
            return await self._reconcile(key, resource)
        except (Conflict, NotFound):
            self._cache.forget(resource)  # it moved under us, or was recreated
            raise

    async def _reconcile(self, key: Key, resource: KubeObject) -> float:
        metadata = resource["metadata"]
        owner = Owner(key.name, key.namespace, metadata["uid"])
        problems: tuple[Problem, ...] = ()
        try:
            judged = parse(key.name, resource.get("spec", {}), self._bounds)
            topology.check(judged.spec, self._context)
            await self._judge_secrets(owner, judged)
            wanted: Accepted | None = judged
        except SpecError as error:
            problems, wanted = error.problems, None
        held = await self._held(owner)
        if wanted is None and held.kept is not None:
            wanted = parse_accepted(held.kept.spec)
        facts = Facts(
            generation=metadata.get("generation", 0),
            problems=problems,
            fallback=bool(problems) and wanted is not None,
            lost=bool(problems) and wanted is None and bool(self._cache.indexed(owner.uid)),
        )
        # Nobody watches a Secret without our label: the platform may label it at any moment.
        pause = _LOOK_AGAIN if any(problem.reason == bounds.SECRET_REASON for problem in problems) else _LOOK_ANYWAY
        if wanted is None:
            await self._report(resource, facts)
            return pause
        try:
            facts, again = await self._bring(resource, owner, wanted, held, facts)
        except (ValueError, InternalError):
            if not problems:
                raise
            # Accepted by an earlier release, and not to be rendered by this one.
            log.exception("the accepted spec cannot be rendered")
            facts, again = replace(facts, fallback=False, lost=True), _LOOK_ANYWAY
        await self._report(resource, facts)
        return min(again, pause)

    async def _judge_secrets(self, owner: Owner, wanted: Accepted) -> None:
        """Secrets that the platform did not label are not used, before any pod could mount one.

        Raises:
            SpecError: some are not there, or carry no label.
        """
        label = self._bounds.secret_label
        if label is None:
            return
        found = []
        for field, name in bounds.secrets(wanted.spec):
            labels = await self._kubernetes.labels(Ref(kinds.SECRET, owner.namespace, name))
            found.append(bounds.secret_problem(field, name, labels, label))
        problems = [problem for problem in found if problem is not None]
        if problems:
            raise SpecError(*problems)

    # ------------------------------------------------------------------------------------------------------- gather

    async def _held(self, owner: Owner) -> _Held:
        """What was accepted last."""
        secret, config = await asyncio.gather(
            self._find(Ref(kinds.SECRET, owner.namespace, engine.key_secret(owner))),
            self._find(Ref(kinds.CONFIG_MAP, owner.namespace, accepted.name(owner))),
        )
        seal_key = decode(secret).get(engine.SEAL, b"") if secret else b""
        if config is None or not seal_key:
            return _Held(None, seal_key)
        kept = accepted.read(owner, config.get("data", {}), seal_key)
        if kept is None:
            log.warning("the accepted spec carries no valid seal and is not used")
        return _Held(kept, seal_key)

    async def _find(self, ref: Ref) -> KubeObject | None:
        cached = self._cache.get(ref)
        if cached is not None:
            return cached
        try:
            return await self._kubernetes.get(ref)
        except NotFound:
            return None

    async def _client_keys(self, owner: Owner, spec: api.Spec, made: Secrets) -> _Keys:
        authentication = spec.gateway.authentication
        if authentication.none is not None:
            return _Keys()
        if authentication.api_keys is None:
            name = owner.child(gateway.CLIENT_KEYS_SUFFIX)
            return _Keys(keys.judge({name: made.data.get(Made.CLIENT_KEYS, {})}))
        found, missing, unreadable = {}, [], False
        for reference in authentication.api_keys.secret_refs:
            told = f"Secret {reference.name} (gateway.authentication.apiKeys)"
            try:
                live = await self._find(Ref(kinds.SECRET, owner.namespace, reference.name))
            except ApiError as error:
                unreadable = True
                missing.append(f"{told} cannot be read: {error}.")
                continue
            if live is None:
                missing.append(f"{told} does not exist.")
            elif not live.get("data"):
                missing.append(f"{told} has no key.")
            else:
                found[reference.name] = decode(live)
        return _Keys(keys.judge(found), tuple(missing), unreadable)

    async def _missing(self, owner: Owner, references: Mapping[str, str | None]) -> tuple[str, ...]:
        """Which Secrets that pods use are not there; their content is not read.

        Args:
            owner: whose namespace.
            references: field of the spec to name.
        """
        missing = []
        for field, name in references.items():
            if name is None:
                continue
            try:
                if not await self._kubernetes.exists(Ref(kinds.SECRET, owner.namespace, name)):
                    missing.append(f"Secret {name} ({field}) does not exist.")
            except ApiError as error:
                missing.append(f"Secret {name} ({field}) cannot be looked for: {error}.")
        return tuple(missing)

    def _fetched(self, owner: Owner, spec: api.Spec) -> frozenset[str]:
        """The fetch Job, when it is complete and its volume is still the one that it filled."""
        job = self._job(owner, spec)
        if job is None or not read_fetch(job).done or self._volume_is_newer(owner, job):
            return frozenset()
        return frozenset([job["metadata"]["name"]])

    def _volume_is_newer(self, owner: Owner, job: KubeObject) -> bool:
        claim = self._cache.get(Ref(kinds.PERSISTENT_VOLUME_CLAIM, owner.namespace, owner.child("model")))
        return claim is not None and bool(claim["metadata"]["creationTimestamp"] > job["metadata"]["creationTimestamp"])

    def _job(self, owner: Owner, spec: api.Spec) -> KubeObject | None:
        return self._cache.get(Ref(kinds.JOB, owner.namespace, fetch.job_name(owner, spec)))

    async def _refetch(self, owner: Owner, spec: api.Spec) -> Outcome:
        """Make the download anew when its volume was."""
        job = self._job(owner, spec) if fetch.job(owner, spec) is not None else None
        if job is None or not read_fetch(job).done or not self._volume_is_newer(owner, job):
            return Outcome()
        log.info("the volume is newer than its download: fetching again")
        try:
            await self._kubernetes.delete(Ref.of(job), uid=job["metadata"]["uid"])
        except ApiError as error:
            return failed(job, error)
        self._cache.forget(job)
        return Outcome()

    # -------------------------------------------------------------------------------------------------------- bring

    async def _bring(
        self, resource: KubeObject, owner: Owner, wanted: Accepted, held: _Held, facts: Facts
    ) -> tuple[Facts, float]:
        spec = wanted.spec
        async with self._deny.used(owner.namespace) as deny:
            left = Outcome() if deny.failures else await self._children.clear(resource, _CLEARED)
            made = await self._generator.make(owner, wanted)
            key = made.data.get(Made.ENGINE_KEY, {})
            clients = await self._client_keys(owner, spec, made)
            for name in (engine.KEY, engine.PROBER):
                register_secret(key.get(name, b"").decode(errors="replace"))
            for client in clients.judged.keys:
                register_secret(client.key)
            observed = Observed(
                client_keys=clients.judged.keys,
                pins=held.kept.pins if held.kept else {},
                fetched=self._fetched(owner, spec),
                restart_at=resource["metadata"].get("annotations", {}).get(RESTART_ANNOTATION, ""),
                engine_key=key.get(engine.KEY, b""),
                seal_key=key.get(engine.SEAL, held.seal_key),
                prober_key=key.get(engine.PROBER, b""),
                groups=held.kept.groups if held.kept else {},
                carried=self._rollout.carried(owner),
            )
            rendered, look = self._decided(owner, wanted, observed)
            gates = await self._rollout.shut(look)
            evidence = self._evidences.gather(owner, rendered, resource.get("status", {}))
            facts = self._evidences.add(facts, evidence, wanted, resource.get("status", {}))
            if spec.security.verification.mode == "Enforce" and facts.breached:
                rendered = closed(owner, rendered)
            isolation = deny
            if not deny.failures:
                isolation += await self._children.bring(rendered.isolation, owner.uid, component=ISOLATION)
            held_back = self._held_back(owner, made, clients)
            # Keys open no way through the network: a revocation does not wait for anything.
            ready = [
                item
                for item in rendered.configuration
                if (item["kind"], item["metadata"]["name"]) not in held_back
                and (not isolation.failures or item["metadata"]["name"] == owner.child(gateway.AUTH_SUFFIX))
            ]
            configuration = await self._children.bring(ready, owner.uid)
            kept = not configuration.of("operator", f"ConfigMap {accepted.name(owner)}")
            runs = not isolation.failures and kept and Made.ENGINE_KEY in made.data
            workloads = Outcome()
            if runs:
                await self._rollout.tell(resource, look)
                workloads = await self._refetch(owner, spec)
                workloads += await self._children.bring(rendered.ungrouped(), owner.uid)
                workloads += await self._rollout.bring(rendered, look, owner.uid)
                gates += await self._rollout.open(look)
            outcome = left + isolation + made.outcome + configuration + workloads + gates
        found = replace(
            facts,
            suspended=spec.suspend,
            engine=self._engine(owner, rendered, look),
            router=self._router(owner, spec),
            gateway=self._workload(owner, gateway.ROLE),
            fetch=self._fetch(owner, spec),
            keys=clients.judged.problems,
            no_keys=spec.gateway.authentication.none is None and not clients.judged.keys,
            outdated=rendered.outdated,
            risks=wanted.risks,
            url=rendered.url,
            selector=rendered.selector,
            version=str(wanted.version),
            assumed=spec.vllm_version is not None and spec.vllm_version.assume is not None,
            old_accepted=any(item.risk == "vllmVersionBelowFloor" for item in spec.security.accept),
            advisories=wanted.advisories,
            verification=spec.security.verification.mode,
            devices=network_devices(spec.engine.resources, self._bounds),
        )
        if runs and not workloads.failures:
            outcome += await self._rollout.prune(rendered, look)
            outcome += await self._prune(owner, rendered, look, found, everything=not outcome.failures)
        looked: float | None = None
        files = [f"ConfigMap {owner.child(gateway.XDS_SUFFIX)}", f"Secret {owner.child(gateway.AUTH_SUFFIX)}"]
        written = not isolation.failures and not any(configuration.of(gateway.ROLE, name) for name in files)
        if written and ("Secret", owner.child(gateway.AUTH_SUFFIX)) not in held_back:
            behind = found.router or found.engine
            served, looked = await self._read_back.look(owner, rendered, behind.ready if behind else 0)
            found = replace(found, served=served)
        tls, unfetched = await asyncio.gather(
            self._missing(owner, {"gateway.tls": spec.gateway.tls.secret_name}),
            self._missing(owner, _engine_secrets(spec, found)),
        )
        found = replace(
            found,
            failures=outcome.failures,
            missing=clients.missing + tls,
            unfetched=unfetched,
            figures=replace(await self._figures(owner, spec, made, evidence.wider), behind=found.served.behind),
        )
        # A Secret without our label is not watched: somebody who has just forgotten it will make it soon.
        missing = _LOOK_AGAIN if found.missing or found.unfetched else None
        self._evidences.follow(resource, owner, wanted, rendered, key.get(engine.PROBER, b""), evidence=evidence)
        renewal, waiting = self._generator.renewal(made), look.pause(self._now().timestamp())
        pauses = (_LOOK_ANYWAY, outcome.again, looked, missing, renewal, waiting, evidence.again)
        return found, min(pause for pause in pauses if pause is not None)

    async def _figures(self, owner: Owner, spec: api.Spec, made: Secrets, wider: int) -> Figures:
        """What is told in numbers; what cannot be read is left out, conditions say why."""
        key = self._cache.get(Ref(kinds.SECRET, owner.namespace, engine.key_secret(owner)))
        served: Mapping[str, bytes] = made.data.get(Made.TLS, {})
        if spec.gateway.tls.secret_name is not None:
            with contextlib.suppress(ApiError):
                live = await self._find(Ref(kinds.SECRET, owner.namespace, spec.gateway.tls.secret_name))
                served = decode(live) if live is not None else {}
        ends: float | None = None
        with contextlib.suppress(ValueError):
            ends = certs.expiry(served).timestamp()
        return Figures(wider, key_made(key) if key is not None else None, ends)

    def _decided(self, owner: Owner, wanted: Accepted, observed: Observed) -> tuple[Rendered, Look]:
        """What is rendered, with the epochs that groups have from now on."""
        rendered = render_resource(owner, wanted, self._context, observed)
        look = self._rollout.look(owner, rendered, observed.groups, seconds(wanted.spec.engine.startup_timeout))
        if look.plan.memory != observed.groups:
            rendered = render_resource(owner, wanted, self._context, replace(observed, groups=look.plan.memory))
        return rendered, look

    @staticmethod
    def _held_back(owner: Owner, made: Secrets, clients: _Keys) -> set[tuple[str, str]]:
        """Configuration that must stay as it is, because what goes into it could not be read or made."""
        held = set()
        if clients.unreadable or made.outcome.of(gateway.ROLE, f"Secret {owner.child(gateway.CLIENT_KEYS_SUFFIX)}"):
            held.add(("Secret", owner.child(gateway.AUTH_SUFFIX)))
        if Made.ENGINE_KEY not in made.data:
            held |= {("ConfigMap", accepted.name(owner)), ("Secret", owner.child(gateway.AUTH_SUFFIX))}
        return held

    async def _prune(self, owner: Owner, rendered: Rendered, look: Look, found: Facts, *, everything: bool) -> Outcome:
        """What isolates or downloads for an older spec goes at once, the rest when nothing is amiss."""
        wanted = _PRUNED_FIRST
        if everything:
            complete = all(item is not None and item.complete for item in (found.engine, found.gateway))
            complete = complete and (found.router is None or found.router.complete)
            wanted |= _PRUNED | (_PRUNED_LATE if complete else frozenset())
        objects = (*rendered.objects(), *rendered.withheld)
        # Weights and keys are never thrown away because of an edit that may be a mistake.
        lasting = {Ref(kinds.SECRET, owner.namespace, name) for name in gateway.generated_names(owner)}
        lasting |= {Ref(kinds.SECRET, owner.namespace, engine.key_secret(owner))}
        # What lets the pods of a group talk, and names them, goes after the last of them.
        ending = {Ref(kind, owner.namespace, owner.child(group)) for kind in _OF_A_GROUP for group in look.occupied}
        return await self._children.prune(owner.uid, {Ref.of(obj) for obj in objects} | lasting | ending, wanted)

    def _engine(self, owner: Owner, rendered: Rendered, look: Look) -> Workload | None:
        if rendered.topology.groups:
            return self._rollout.facts(look) if rendered.groups else None
        return self._workload(owner, engine.ROLE)

    def _router(self, owner: Owner, spec: api.Spec) -> Workload | None:
        if spec.disaggregation is None:
            return None
        return self._workload(owner, router.ROLE) or Workload(spec.disaggregation.router.replicas)

    def _workload(self, owner: Owner, role: str) -> Workload | None:
        live = self._cache.get(Ref(kinds.DEPLOYMENT, owner.namespace, owner.child(role)))
        return read_workload(live, self._pods(owner, role)) if live is not None else None

    def _fetch(self, owner: Owner, spec: api.Spec) -> Fetch | None:
        if fetch.job(owner, spec) is None:
            return None
        return read_fetch(self._job(owner, spec), self._pods(owner, fetch.ROLE))

    def _pods(self, owner: Owner, role: str) -> list[KubeObject]:
        return [pod for pod in pods_of(self._cache, owner) if pod["metadata"]["labels"].get(ROLE_LABEL) == role]

    # ------------------------------------------------------------------------------------------------------- report

    async def _report(self, resource: KubeObject, facts: Facts) -> None:
        before = resource.get("status", {})
        now = self._now().astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
        after = status(facts, before, now, self._docs)
        metadata = resource["metadata"]
        if facts.lost or (facts.problems and not facts.fallback):
            # Nothing was reconciled: what was seen before is still the best that can be said.
            after = {**before, "observedGeneration": after["observedGeneration"], "conditions": after["conditions"]}
        statuses = {item["type"]: item["status"] for item in after["conditions"]}
        self._told(metadata["namespace"], metadata["name"], statuses, facts.figures)
        if {name: before.get(name) for name in after} == after:
            return
        ref = Ref.of(resource)
        self._cache.wrote(await self._kubernetes.patch_status(ref, after, uid=metadata["uid"]))
        for change in transitions(before.get("conditions", ()), after["conditions"]):
            await self._kubernetes.post_event(
                resource, reason=change.reason, note=change.message, action="Reconcile", warning=change.warning
            )

    async def _gone(self, key: Key) -> float | None:
        """The resource is gone: its children go by their owner reference; the default-deny goes last."""
        self._forget(key)
        self._claims.forget(Ref(kinds.SECURE_VLLM_DEPLOYMENT, key.namespace, key.name))
        return await self._tidy(key.namespace)

    def _forget(self, key: Key) -> None:
        self._children.forget(key.namespace, key.name)
        self._evidences.forget(key.namespace, key.name)
        self._read_back.forget(key.namespace, key.name)
        self._told(key.namespace, key.name, None, None)

    async def _tidy(self, namespace: str) -> float | None:
        """The default-deny, unless every resource of the namespace is another installation's: then it is, too."""
        resources = self._cache.all(kinds.SECURE_VLLM_DEPLOYMENT, namespace)
        if resources and all(map(self._claims.is_foreign, resources)):
            return None
        return await self._deny.tidy(namespace)


def _engine_secrets(spec: api.Spec, found: Facts) -> dict[str, str | None]:
    """Secrets without which engines or the download cannot start; what runs does not need them any more."""
    wanted: dict[str, str | None] = {}
    hub = spec.model.source.hugging_face if spec.model.source is not None else None
    if hub is not None and hub.token_secret_ref is not None and found.fetch is not None and not found.fetch.done:
        wanted["model.source.huggingFace.tokenSecretRef"] = hub.token_secret_ref.name
    if found.engine is None or not found.engine.complete:
        wanted |= {f"imagePullSecrets[{n}]": ref.name for n, ref in enumerate(spec.image_pull_secrets)}
        named = ((field.removeprefix("spec."), name) for field, name in bounds.secrets(spec))
        wanted |= {field: name for field, name in named if field.startswith("engine.")}
    return wanted
