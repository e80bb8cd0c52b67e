"""From an accepted spec to every object that the operator applies. Pure: equal arguments give equal objects.

``render`` is the one entry point, of the operator and of ``securevllm render`` alike. Objects come in three waves;
a later wave is applied when the earlier one is there: what isolates, what configures, what runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import TYPE_CHECKING

from securevllm.render import accepted as kept
from securevllm.render import engine, envoy, fetch, former, gate, gateway, keys, pods, policies, router
from securevllm.render.meta import Object, Owner, stamp
from securevllm.render.readback import versions_of
from securevllm.render.vllm import Process
from securevllm.topology import Role, Topology, plan, sides

if TYPE_CHECKING:
    from securevllm.api.parse import Accepted
    from securevllm.context import Context


class Made(StrEnum):
    """What a generated Secret holds; the edge makes it once and never changes it without need."""

    ENGINE_KEY = "engine key and seal"
    CLIENT_KEYS = "one client key"
    CA = "certificate authority"
    TLS = "server certificate"


@dataclass(frozen=True)
class Generated:
    """A Secret whose content is random: the object without data, and what to put in."""

    made: Made
    object: Object
    names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Observed:
    """What has to be known from the cluster; the defaults are those of ``securevllm render``.

    Attributes:
        client_keys: the judged keys of all clients.
        pins: templates that were rolled out, by workload name.
        fetched: names of fetch Jobs that are complete.
        restart_at: value of the user's annotation.
        engine_key: the engines' API key; a new one restarts them, because they read it at their start.
        seal_key: key of the seal on what was accepted, and of everything that is derived from a secret.
        groups: what is remembered of each group, by its name; kept as it is given, and the epochs are rendered.
        prober_key: the prober's own client key.
        carried: by group: hashes of the templates that its StatefulSets and pods carry.
    """

    client_keys: tuple[envoy.ClientKey, ...] = ()
    pins: Mapping[str, kept.Pin] = field(default_factory=dict)
    fetched: frozenset[str] = frozenset()
    restart_at: str = ""
    engine_key: bytes = field(default=b"", repr=False)
    seal_key: bytes = field(default=b"", repr=False)
    groups: Mapping[str, kept.GroupMemory] = field(default_factory=dict)
    prober_key: bytes = field(default=b"", repr=False)
    carried: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def clients(self) -> tuple[envoy.ClientKey, ...]:
        """Everybody whom the gateways let in."""
        key = self.prober_key.decode("ascii", "replace")
        # A key that a person has put there and that no header can carry must not take the others along.
        usable = envoy.CLIENT_KEY.fullmatch(key) is not None and key not in {item.key for item in self.client_keys}
        return (*self.client_keys, *([envoy.ClientKey(keys.PROBER, key)] if usable else []))


@dataclass(frozen=True)
class Rendered:
    """Everything for one resource.

    Attributes:
        topology: what it was made from.
        deny: the namespace's default-deny; shared, without owner.
        isolation: wave 1, NetworkPolicies.
        generated: Secrets that are made once.
        configuration: wave 2.
        workloads: wave 3, the StatefulSets of groups included.
        groups: the same StatefulSets by group, so that each can be applied, restarted and removed as one; none that
            is withheld.
        former: the groups that still carry another template, as they were rolled out: until their turn they stay so.
        withheld: workloads that are not made yet, because their model is not there; what exists of them stays.
        outdated: workloads that a fresh rendering would change.
        gateway_files: Envoy file name to text, without keys.
        keys_file: text of the file with the client keys; empty without authentication.
        url: where clients find the gateway.
        selector: label selector that matches one pod per model replica.
    """

    topology: Topology
    deny: Object
    isolation: tuple[Object, ...]
    generated: tuple[Generated, ...]
    configuration: tuple[Object, ...]
    workloads: tuple[Object, ...]
    groups: tuple[engine.RenderedGroup, ...]
    former: tuple[engine.RenderedGroup, ...]
    withheld: tuple[Object, ...]
    outdated: tuple[str, ...]
    gateway_files: Mapping[str, str]
    keys_file: str = field(repr=False)
    url: str
    selector: str

    def objects(self) -> Iterator[Object]:
        """Everything that is applied, in order."""
        yield self.deny
        yield from self.isolation
        yield from self.configuration
        yield from self.workloads

    def ungrouped(self) -> list[Object]:
        """The workloads but the StatefulSets, whose groups have their turns."""
        return [obj for obj in self.workloads if obj["kind"] != "StatefulSet"]

    def served_files(self) -> dict[str, str]:
        """The files that an up-to-date gateway has loaded: file name to text."""
        files = dict(self.gateway_files)
        if self.keys_file:
            files[envoy.API_KEYS_FILE] = self.keys_file
        return files

    def revision(self) -> str:
        """Hash of the versions of everything that a gateway serves; nothing of a key can be guessed from it."""
        return envoy.revision(versions_of(self.served_files()))


def render(owner: Owner, accepted: Accepted, context: Context, observed: Observed) -> Rendered:
    """Render a resource.

    Args:
        owner: name, namespace and uid of the resource.
        accepted: its judged spec.
        context: the cluster and the operator.
        observed: what was read from the cluster.
    """
    spec = accepted.spec
    topology = plan(spec, context)
    model = gateway.model(owner, spec, accepted.version, topology, context)
    files = envoy.envoy_files(model)
    keys_file = envoy.api_keys_file(observed.clients(), observed.seal_key) if model.authentication else ""
    started_with = engine.StartedWith(observed.restart_at, kept.fingerprint(observed.seal_key, observed.engine_key))

    job = fetch.job(owner, spec)
    waiting = job is not None and fetch.job_name(owner, spec) not in observed.fetched and not spec.suspend
    settled = {
        gateway.ROLE: kept.settle(
            gateway.template(owner, spec, context, model, files),
            gateway.inputs(accepted.raw),
            observed.pins.get(gateway.ROLE),
            spec.update_policy,
        )
    }
    replicas = [
        _replicas(Process(owner, accepted, context, topology, side), observed, started_with, waiting=waiting)
        for side in sides(spec)
    ]
    for item in replicas:
        settled |= item.settled
    split = spec.disaggregation
    if split is not None:
        gates = gate.inputs(accepted.raw, topology, Role.ROUTER, context)
        settled[router.ROLE] = kept.settle(
            router.template(owner, spec, topology, context, started_with.key),
            router.inputs(accepted.raw, topology, started_with.key, gates),
            observed.pins.get(router.ROLE),
            spec.update_policy,
        )
    pinned = {name: item.pin for name, item in settled.items()}
    groups = tuple(group for item in replicas for group in item.groups)
    known = former.templates(observed.pins)
    wanted, carried = (
        {group.template for group in groups},
        {item for items in observed.carried.values() for item in items},
    )
    memory = kept.Kept(accepted.raw, pinned | former.kept(known, wanted, carried), observed.groups)

    configuration = [
        kept.config_map(owner, memory, observed.seal_key),
        *(pods.service_account(owner, item.role.value) for item in topology.pods),
        *(engine.group_service(owner, topology, group) for group in topology.groups),
        engine.service(owner, topology) if split is None else router.service(owner, topology),
        gateway.service(owner, spec, topology),
        gateway.config_map(owner, files),
        *([gateway.auth_secret(owner, keys_file)] if model.authentication else []),
        gateway.disruption_budget(owner, spec),
        engine.disruption_budget(owner, topology),
        fetch.claim(owner, spec),
    ]
    gateways = gateway.deployment(owner, spec, settled[gateway.ROLE].pin.template)
    withheld = [obj for item in replicas for obj in item.withheld]
    workloads = [job, gateways, *(obj for item in replicas for obj in item.workloads)]
    if split is not None:
        # It would wait for engines that are not there, give up, and start again.
        (withheld or workloads).append(router.deployment(owner, spec, settled[router.ROLE].pin.template))
    return Rendered(
        topology=topology,
        deny=stamp(policies.default_deny(owner.namespace)),
        isolation=tuple(map(stamp, policies.policies(owner, topology))),
        generated=tuple(generated(owner, accepted, context)),
        configuration=tuple(stamp(item) for item in configuration if item is not None),
        workloads=tuple(stamp(item) for item in workloads if item is not None),
        groups=groups,
        former=tuple(former.groups(owner, spec, known, groups, carried=observed.carried, memory=observed.groups)),
        withheld=tuple(withheld),
        outdated=tuple(sorted({name.partition("/")[0] for name, item in settled.items() if item.outdated})),
        gateway_files=files,
        keys_file=keys_file,
        url=gateway.url(owner, spec, context),
        selector=_selector(engine.heads(owner, topology)),
    )


@dataclass(frozen=True)
class _Replicas:
    """The model replicas of one side; withheld ones have neither pins nor workloads."""

    settled: Mapping[str, kept.Settled] = field(default_factory=dict)
    workloads: tuple[Object, ...] = ()
    groups: tuple[engine.RenderedGroup, ...] = ()
    withheld: tuple[Object, ...] = ()


def _replicas(process: Process, observed: Observed, started_with: engine.StartedWith, *, waiting: bool) -> _Replicas:
    owner, spec, side = process.owner, process.spec, process.side
    names, fresh = engine.pin_names(side), engine.templates(process, started_with)
    running = [observed.pins[name] for name in names if name in observed.pins]
    if not waiting:
        gates = gate.inputs(process.accepted.raw, process.topology, side.role, process.context)
        inputs = engine.inputs(process.accepted.raw, side, started_with, gates)
        before = engine.inputs_before(process.accepted.raw, side, inputs)
        settled = {
            name: kept.settle(template, inputs, observed.pins.get(name), spec.update_policy, before=before)
            for name, template in zip(names, fresh, strict=True)
        }
    elif len(running) == len(names):
        # The old engines go on, and are cared for, until the new model is there.
        settled = {name: kept.Settled(pin, outdated=False) for name, pin in zip(names, running, strict=True)}
    else:
        settled = {}
    templates = tuple(item.pin.template for item in settled.values()) or fresh
    groups: tuple[engine.RenderedGroup, ...] = ()
    if side.groups:
        epochs = {name: memory.epoch for name, memory in observed.groups.items()}
        groups = tuple(
            replace(group, workloads=tuple(map(stamp, group.workloads)))
            for group in engine.groups(process, templates, epochs)
        )
        workloads = tuple(obj for group in groups for obj in group.workloads)
    else:
        workloads = (engine.deployment(owner, spec, templates[0]),)
    return _Replicas(settled, workloads, groups) if settled else _Replicas(withheld=workloads)


def _selector(labels: Mapping[str, str]) -> str:
    return ",".join(f"{key}={value}" for key, value in sorted(labels.items()))


def generated(owner: Owner, accepted: Accepted, context: Context) -> Iterator[Generated]:
    """Secrets with random content, in the order in which they are made: the certificate needs the CA."""
    spec = accepted.spec
    yield Generated(Made.ENGINE_KEY, _secret(owner, engine.KEY_SECRET, engine.ROLE, "Opaque"))
    authentication = spec.gateway.authentication
    if authentication.api_keys is None and authentication.none is None:
        yield Generated(Made.CLIENT_KEYS, _secret(owner, gateway.CLIENT_KEYS_SUFFIX, gateway.ROLE, "Opaque"))
    if spec.gateway.tls.disabled is None and spec.gateway.tls.secret_name is None:
        names = gateway.server_names(owner, spec, context)
        yield Generated(Made.CA, _secret(owner, gateway.CA_SUFFIX, gateway.ROLE, "kubernetes.io/tls"))
        yield Generated(Made.TLS, _secret(owner, gateway.TLS_SUFFIX, gateway.ROLE, "kubernetes.io/tls"), names)


def _secret(owner: Owner, suffix: str, component: str, kind: str) -> Object:
    return owner.object("v1", "Secret", suffix, component, type=kind)
