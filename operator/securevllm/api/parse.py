"""From a raw object to an accepted spec, or to everything that is wrong with it.

The schema and CEL in the API server refuse most mistakes; this judges again, because an older schema may be installed,
because some rules need a catalogue, and because only here an answer can say what to write instead.
"""

from __future__ import annotations

import ipaddress
import itertools
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from pydantic import TypeAdapter, ValidationError
from pydantic.alias_generators import to_camel

from securevllm import catalogue
from securevllm.api import bounds as platform
from securevllm.api import guard, layout, routes
from securevllm.api import types as api
from securevllm.api.addresses import IPV4_MAPPED, is_public
from securevllm.api.advisories import Hit, hits
from securevllm.api.applicable import unapplicable
from securevllm.api.fields import unknown_field
from securevllm.api.guard.pod import NOT_OFFERED
from securevllm.api.placement import LabelSelector
from securevllm.api.schema import size_problems
from securevllm.api.units import LARGEST, quantity
from securevllm.errors import Problem, SpecError

_SPEC = TypeAdapter(api.Spec)
_TAG = re.compile(r":(?P<tag>[A-Za-z0-9_][A-Za-z0-9._-]{0,127})(@sha256:[a-f0-9]{64})?$")
_FIELD = re.compile(r"[a-z][A-Za-z]*")
_DEFAULT_BOUNDS = platform.PlatformBounds()


@dataclass(frozen=True)
class Accepted:
    """A spec that may be reconciled.

    Attributes:
        spec: the models.
        version: the vLLM version that the catalogue is asked for.
        raw: the spec as the user wrote it, kept for the time when a later one is wrong.
        risks: what the spec gives up, in its own words; shown in status.
    """

    spec: api.Spec
    version: catalogue.Version
    raw: dict[str, Any]
    risks: tuple[str, ...]

    @property
    def advisories(self) -> tuple[Hit, ...]:
        """Published holes that concern it. What the tag says counts, too: an assumption is about routes only."""
        return hits(self.spec, _oldest(self.spec, self.version))


def parse(name: str, raw: dict[str, Any], bounds: platform.PlatformBounds = _DEFAULT_BOUNDS) -> Accepted:
    """Judge a spec.

    Args:
        name: ``metadata.name``.
        raw: ``spec``, as the API server holds it.
        bounds: what the platform lets any resource ask for.

    Raises:
        SpecError: with everything that is wrong.
    """
    raw = _said(raw)
    try:
        spec = _read(raw)
    except ValidationError as error:
        raise SpecError(*_schema_problems(error)) from None
    problems = [*size_problems(raw), *(problem for check in _CHECKS for problem in check(spec))]
    problems += _name_problems(name)
    version = version_of(spec)
    problems += platform.check(spec, bounds)
    if isinstance(version, Problem):
        # What is wrong in every version is told all the same.
        raise SpecError(*problems, version, *guard.check(spec, catalogue.newest(), bounds))
    problems += guard.check(spec, version, bounds)
    problems += [problem for check in _VERSION_CHECKS for problem in check(spec, version)]
    if problems:
        raise SpecError(*problems)
    return Accepted(spec=spec, version=version, raw=raw, risks=tuple(_risks(spec)))


def parse_accepted(raw: dict[str, Any]) -> Accepted | None:
    """Read a spec that an earlier release accepted, without judging it by today's rules.

    A newer floor or a stricter rule says ``Accepted=False``; it must not end the care for what runs.

    Returns:
        None when not even today's models can read it.
    """
    raw = _said(raw)
    try:
        spec = _read(raw)
    except ValidationError:
        return None
    version = version_of(spec)
    return None if isinstance(version, Problem) else Accepted(spec, version, raw, tuple(_risks(spec)))


def _read(raw: dict[str, Any]) -> api.Spec:
    return _SPEC.validate_json(json.dumps(raw, default=str), strict=True, by_alias=True, by_name=False)


def _said(raw: Any) -> Any:
    """What was said: a field that is null is one that is absent, as the API server stores it."""
    match raw:
        case dict():
            return {name: _said(value) for name, value in raw.items() if value is not None}
        case list():
            return [_said(item) for item in raw]
    return raw


def _schema_problems(error: ValidationError) -> list[Problem]:
    """Pydantic's findings in our own words; the value is shown unless it may be large."""
    problems = []
    for item in error.errors(include_url=False):
        path, told = item["loc"], item["msg"]
        if path[-1:] in {("str",), ("int",)}:  # pydantic appends the member of the union: a quantity
            path, told = path[:-1], "Input should be a string or an integer"
        elif path[-1:] == ("[key]",):
            path, told = path[:-1], f"The name: {told}"
        field = "spec" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        value = item.get("input")
        shown = str(value)[:80] if isinstance(value, str | int | float | bool) else ""
        names = itertools.takewhile(_FIELD.fullmatch, (part for part in path if isinstance(part, str)))
        fix = f"See: kubectl explain {'.'.join(('securevllmdeployment.spec', *names))}"
        if item["type"] == "extra_forbidden":
            told, fix = NOT_OFFERED.get(str(path[-1])) or _unknown(path)
        elif item["type"] == "missing":
            told = "it is required"
        problems.append(Problem(field, "InvalidSpec", told, fix, shown))
    return problems


def _unknown(path: tuple[int | str, ...]) -> tuple[str, str]:
    parents = (part for part in path[:-1] if isinstance(part, str))
    command = f"kubectl explain {'.'.join(('securevllmdeployment.spec', *parents))}"
    return unknown_field(api.Spec, path, command)


def version_of(spec: api.Spec) -> catalogue.Version | Problem:
    """The vLLM version, said in words or read from the image's tag."""
    if spec.vllm_version is not None and spec.vllm_version.assume is not None:
        return catalogue.Version.parse(spec.vllm_version.assume)
    return _tagged(spec) or Problem(
        "spec.image",
        "VersionUnreadable",
        "the tag does not say which vLLM version this is, and the routes depend on it",
        f"Use a release tag such as vllm/vllm-openai:v{catalogue.newest()}, or say it:"
        f" vllmVersion: {{assume: {catalogue.newest()}}}.",
        spec.image,
    )


def _oldest(spec: api.Spec, version: catalogue.Version) -> catalogue.Version:
    return min(version, _tagged(spec) or version)


def _tagged(spec: api.Spec) -> catalogue.Version | None:
    match = _TAG.search(spec.image)
    try:
        return catalogue.Version.parse(match["tag"]) if match else None
    except ValueError:
        return None


# ------------------------------------------------------------------------------------------- checks of the spec alone


def _name_problems(name: str) -> Iterator[Problem]:
    if len(name) > api.NAME_LIMIT:
        yield Problem(
            "metadata.name",
            "NameTooLong",
            f"a name has at most {api.NAME_LIMIT} characters, so that the names of its objects fit",
            "Use a shorter name.",
            name,
        )
    if re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", name) is None:
        yield Problem(
            "metadata.name",
            "InvalidSpec",
            "Services are named after it: lower case letters, digits and '-', beginning with a letter",
            "Use a name such as llama.",
            name,
        )


def _not_supported(spec: api.Spec) -> Iterator[Problem]:
    gateway, source = spec.gateway, spec.model.source
    later: list[tuple[str, bool, str]] = [
        ("spec.model.source.image", source is not None and source.image is not None, "use persistentVolumeClaim"),
        (
            "spec.gateway.routes.profiles",
            "realtime" in gateway.routes.profiles,
            "leave realtime out: WebSockets are not rendered yet",
        ),
        ("spec.gateway.authentication.jwt", gateway.authentication.jwt is not None, "use apiKeys"),
        ("spec.gateway.authentication.mtls", gateway.authentication.mtls is not None, "use apiKeys"),
        ("spec.gateway.autoscaling", gateway.autoscaling is not None, "set gateway.replicas"),
    ]
    for field, asked, instead in later:
        if asked:
            yield Problem(field, "NotSupportedYet", "this release does not support it", f"For now: {instead}.")


def _model(spec: api.Spec) -> Iterator[Problem]:
    model = spec.model
    absolute = model.name.startswith("/")
    if ".." in model.name.split("/") or "//" in model.name:
        yield Problem(
            "spec.model.name", "InvalidSpec", "'..' and '//' are not allowed", "Use a plain path.", model.name
        )
    if model.source is None:
        if not absolute:
            yield Problem(
                "spec.model.source",
                "ModelSourceMissing",
                "engines have no egress, so the weights must be there before they start",
                "Paste below spec.model: source: {huggingFace: {}}",
            )
        return
    kinds = [model.source.hugging_face, model.source.persistent_volume_claim, model.source.image]
    if sum(kind is not None for kind in kinds) != 1:
        yield Problem(
            "spec.model.source",
            "InvalidSpec",
            "exactly one of huggingFace, persistentVolumeClaim and image",
            "Keep one of them.",
        )
    if model.source.hugging_face is not None and (absolute or model.name.count("/") > 1):
        yield Problem(
            "spec.model.name",
            "InvalidSpec",
            "a hub knows models as owner/name",
            "Write for example meta-llama/Llama-3.1-8B-Instruct.",
            model.name,
        )
    claim = model.source.persistent_volume_claim
    if claim is not None and claim.path is not None and ".." in claim.path.split("/"):
        yield Problem(
            "spec.model.source.persistentVolumeClaim.path", "InvalidSpec", "'..' is not allowed", "Use a plain path.",
            claim.path,
        )  # fmt: skip


def _hub(spec: api.Spec) -> Iterator[Problem]:
    hub = spec.model.source.hugging_face if spec.model.source is not None else None
    if hub is None:
        return
    pods = layout.engine_pods(spec)
    if hub.storage.claim_name is None and pods > 1:
        shared = {"ReadWriteMany", "ReadOnlyMany"} & set(hub.storage.access_modes)
        if not shared:
            yield Problem(
                "spec.model.source.huggingFace.storage.accessModes",
                "StorageNotShared",
                f"{pods} pods on several nodes cannot mount a ReadWriteOnce volume",
                "Use accessModes: [ReadWriteMany] with a storage class that has it, or replicas: 1.",
                ", ".join(hub.storage.access_modes),
            )
    if set(hub.storage.access_modes) == {"ReadOnlyMany"}:
        yield Problem(
            "spec.model.source.huggingFace.storage.accessModes",
            "InvalidSpec",
            "the fetch Job has to write into the volume",
            "Use accessModes: [ReadWriteMany], or persistentVolumeClaim for a volume that is filled already.",
            "ReadOnlyMany",
        )
    if hub.endpoint is not None and not _is_url(hub.endpoint):
        yield Problem(
            "spec.model.source.huggingFace.endpoint",
            "InvalidSpec",
            "not the address of a hub",
            "Write for example https://hub.example.com:8443.",
            hub.endpoint,
        )


def _is_url(text: str) -> bool:
    """Whether an address has a host, and a port that exists or none."""
    try:
        parts = urlsplit(text)
        return bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def _quantities(spec: api.Spec) -> Iterator[Problem]:
    hub = spec.model.source.hugging_face if spec.model.source else None
    values: list[tuple[str, str | int]] = [
        ("spec.engine.sharedMemory", spec.engine.shared_memory),
        ("spec.gateway.limits.requestBody", spec.gateway.limits.request_body),
        *(
            (f"spec.engine.volumes[{index}].emptyDir.sizeLimit", volume.empty_dir.size_limit)
            for index, volume in enumerate(spec.engine.volumes)
            if volume.empty_dir is not None
        ),
    ]
    if hub is not None:
        values.append(("spec.model.source.huggingFace.storage.size", hub.storage.size))
    router = spec.disaggregation.router.resources if spec.disaggregation is not None else None
    for field, block in (
        ("spec.engine.resources", spec.engine.resources),
        ("spec.gateway.resources", spec.gateway.resources),
        ("spec.disaggregation.router.resources", router),
    ):
        if block is not None:
            values += [(f"{field}.requests.{name}", value) for name, value in block.requests.items()]
            values += [(f"{field}.limits.{name}", value) for name, value in block.limits.items()]
    for field, value in values:
        try:
            quantity(value)
        except ValueError:
            rule = "not a quantity from 0 to 2^63 - 1 with at most nine decimals"
            yield Problem(field, "InvalidSpec", rule, "Write for example 8Gi.", str(value))


def _limits(spec: api.Spec) -> Iterator[Problem]:
    memory = spec.gateway.resources.limits.get("memory") if spec.gateway.resources else None
    values: list[tuple[str, str | int, str, str, str]] = [
        ("limits.requestBody", spec.gateway.limits.request_body, *api.REQUEST_BODY, str(api.REQUEST_BODY)),
    ]
    if memory is not None:
        told = f"the gateway needs a memory limit of at least {api.GATEWAY_MEMORY}"
        values.append(("resources.limits.memory", memory, api.GATEWAY_MEMORY, str(LARGEST), told))
    for field, value, least, most, told in values:
        try:
            fits = quantity(least) <= quantity(value) <= quantity(most)
        except ValueError:
            continue  # reported by _quantities
        if not fits:
            yield Problem(f"spec.gateway.{field}", "InvalidSpec", told, "Write for example 128Mi.", str(value))


def _exclusive(spec: api.Spec) -> Iterator[Problem]:
    """Blocks of which only one may be set; the weaker one would win silently."""
    authentication, tls = spec.gateway.authentication, spec.gateway.tls
    for field, names, values in (
        (
            "spec.gateway.authentication",
            "apiKeys, jwt, mtls and none",
            (authentication.api_keys, authentication.jwt, authentication.mtls, authentication.none),
        ),
        ("spec.gateway.tls", "secretName and disabled", (tls.secret_name, tls.disabled)),
    ):
        if sum(value is not None for value in values) > 1:
            yield Problem(field, "InvalidSpec", f"at most one of {names}", "Keep one of them.")


def _without_effect(spec: api.Spec) -> Iterator[Problem]:
    """A field that would be ignored is a misunderstanding."""
    hub = spec.model.source.hugging_face if spec.model.source is not None else None
    beside: list[tuple[str, bool, str]] = []
    if hub is not None and hub.storage.claim_name is not None:
        given = hub.storage.model_fields_set - {"claim_name", "access_modes"}
        beside += [
            (f"spec.model.source.huggingFace.storage.{name}", True, "claimName")
            for name in map(to_camel, sorted(given))
        ]
    tls = spec.gateway.tls
    beside.append(("spec.gateway.tls.hostnames", bool(tls.hostnames and tls.secret_name), "secretName"))
    beside.append(("spec.model.revision", spec.model.revision is not None and hub is None, "this source"))
    for field, given_both, other in beside:
        if given_both:
            yield Problem(field, "InvalidSpec", f"it has no effect beside {other}", "Remove one of the two.")


def _clients(spec: api.Spec) -> Iterator[Problem]:
    service, clients = spec.gateway.service, spec.gateway.clients
    if service.type != "ClusterIP" and (clients is None or not clients.cidrs):
        yield Problem(
            "spec.gateway.clients.cidrs",
            "ClientsRequired",
            f"a Service of type {service.type} is open to the outside: who may connect has to be said",
            "Write for example clients: {cidrs: [203.0.113.0/24]}.",
        )
    for index, cidr in enumerate(clients.cidrs if clients else ()):
        yield from _cidr(f"spec.gateway.clients.cidrs[{index}]", cidr)
    events = spec.security.kv_events
    for index, cidr in enumerate(events.from_.cidrs if events else ()):
        yield from _cidr(f"spec.security.kvEvents.from.cidrs[{index}]", cidr)
    yield from _scrapers(spec.security.metrics)


def _scrapers(metrics: api.Metrics | None) -> Iterator[Problem]:
    if metrics is None:
        return
    field, peers = "spec.security.metrics.from", metrics.from_
    if not peers.cidrs and peers.pod_selector is None and peers.namespace_selector is None:
        yield Problem(
            field,
            "InvalidSpec",
            "nobody is named",
            "Write for example from: {namespaceSelector: {matchLabels: {kubernetes.io/metadata.name: monitoring}}},"
            " or leave metrics out.",
        )
    for index, cidr in enumerate(peers.cidrs):
        yield from _cidr(f"{field}.cidrs[{index}]", cidr)


def _cidr(field: str, cidr: str) -> Iterator[Problem]:
    fix = "Write a network such as 203.0.113.0/24."
    try:
        network = ipaddress.ip_network(cidr)
    except ValueError as error:
        yield Problem(field, "InvalidSpec", str(error), fix, cidr)
        return
    if isinstance(network, ipaddress.IPv6Network) and network.subnet_of(IPV4_MAPPED):
        yield Problem(field, "InvalidSpec", "no packet carries an IPv4 address in IPv6 notation", fix, cidr)


def _egress(spec: api.Spec) -> Iterator[Problem]:
    for index, entry in enumerate(spec.security.egress):
        field = f"spec.security.egress[{index}].to"
        if not entry.to.cidrs and entry.to.pod_selector is None and entry.to.namespace_selector is None:
            yield Problem(field, "EgressRefused", "nobody is named", "Name podSelector, namespaceSelector or cidrs.")
        for cidr in entry.to.cidrs:
            problems = list(_cidr(f"{field}.cidrs", cidr))
            yield from problems
            if not problems and not is_public(ipaddress.ip_network(cidr)):
                yield Problem(
                    f"{field}.cidrs",
                    "EgressRefused",
                    "private, link-local and shared ranges are carved out of every egress rule: the metadata service,"
                    " nodes and pods live there",
                    "Name pods by podSelector and namespaceSelector, or a public range.",
                    cidr,
                )


def _proxy(spec: api.Spec) -> Iterator[Problem]:
    named = [(index, entry) for index, entry in enumerate(spec.security.egress) if entry.proxy is not None]
    for index, entry in named:
        port = (entry.proxy or "").rpartition(":")[2]
        if not any(str(item.port) == port and item.protocol == "TCP" for item in entry.ports):
            yield Problem(
                f"spec.security.egress[{index}].proxy",
                "EgressRefused",
                "the rule does not open the proxy's own port",
                f"Write ports: [{{port: {port}}}].",
                entry.proxy or "",
            )
    for index, _ in named[1:]:
        yield Problem(
            f"spec.security.egress[{index}].proxy",
            "EgressRefused",
            "engines send everything through one proxy",
            "Keep one of them.",
        )


_CHECKS: tuple[Callable[[api.Spec], Iterator[Problem]], ...] = (
    _not_supported,
    _model,
    _hub,
    _quantities,
    _limits,
    layout.world,
    _exclusive,
    unapplicable,
    layout.blocks,
    layout.ports,
    _without_effect,
    _clients,
    _egress,
    _proxy,
)


# ------------------------------------------------------------------------------------------ checks against a version


def _version(spec: api.Spec, version: catalogue.Version) -> Iterator[Problem]:
    said = spec.vllm_version or api.VllmVersion()
    field, value = ("spec.image", spec.image) if said.assume is None else ("spec.vllmVersion.assume", said.assume)
    if catalogue.too_new(version):
        yield Problem(
            field,
            "VersionUnknown",
            f"the catalogue ends at {catalogue.newest()}: a newer vLLM may have routes that nobody looked at",
            f"Use an older image, or say: vllmVersion: {{assume: {catalogue.newest()}}}.",
            value,
        )
    if version < catalogue.oldest():
        yield Problem(
            field,
            "VersionUnknown",
            f"the catalogue begins at {catalogue.oldest()}: nobody compared it with an older vLLM",
            "Use a newer image.",
            value,
        )
    accepted = any(item.risk == "vllmVersionBelowFloor" for item in spec.security.accept)
    # An assumption is about routes, not about holes.
    if (oldest := _oldest(spec, version)) != version:
        version, field, value = oldest, "spec.image", spec.image
    if version < catalogue.floor() and not accepted:
        yield Problem(
            field,
            "VersionBelowFloor",
            f"vLLM before {catalogue.floor()} has known holes that no control of this operator covers",
            "Use a newer image, or accept the risk in words:"
            " security: {accept: [{risk: vllmVersionBelowFloor, why: ...}]}.",
            value,
        )
    if said.minimum is not None and version < catalogue.Version.parse(said.minimum):
        yield Problem(
            field,
            "VersionBelowMinimum",
            f"the spec itself asks for at least {said.minimum}",
            "Use a newer image, or change vllmVersion.minimum.",
            value,
        )


_VERSION_CHECKS: tuple[Callable[[api.Spec, catalogue.Version], Iterator[Problem]], ...] = (
    _version,
    routes.problems,
    layout.versions,
)


def _risks(spec: api.Spec) -> Iterator[str]:
    """What the spec gives up, each in the user's words."""
    if spec.gateway.authentication.none is not None:
        yield f"gateway.authentication.none: {spec.gateway.authentication.none}"
    if spec.gateway.tls.disabled is not None:
        yield f"gateway.tls.disabled: {spec.gateway.tls.disabled}"
    if spec.security.gate.disabled is not None:
        yield f"security.gate.disabled: {spec.security.gate.disabled}"
    for acceptance in spec.security.accept:
        yield f"{acceptance.risk}: {acceptance.why}"
    for entry in spec.security.egress:
        yield f"security.egress: {entry.why}"
    if spec.security.kv_events is not None:
        yield f"security.kvEvents: {spec.security.kv_events.why}"
    yield from routes.risks(spec)
    if spec.vllm_version is not None and spec.vllm_version.assume is not None:
        yield f"vllmVersion.assume: the routes are those of {spec.vllm_version.assume}, whatever the image holds"
    if spec.security.media.allow_redirects:
        yield "security.media.allowRedirects: a redirect leads past the allowed domains"
    metrics = spec.security.metrics
    yield from _wide("gateway.clients", spec.gateway.clients, "connect")
    yield from _wide("security.metrics.from", metrics.from_ if metrics is not None else None, "scrape")


def _wide(field: str, peers: api.Peers | None, may: str) -> Iterator[str]:
    if peers is not None and any(ipaddress.ip_network(cidr).prefixlen == 0 for cidr in peers.cidrs):
        yield f"{field}.cidrs: every address may {may}"
    if peers is not None and peers.namespace_selector == LabelSelector():
        yield f"{field}.namespaceSelector: pods of every namespace may {may}"
