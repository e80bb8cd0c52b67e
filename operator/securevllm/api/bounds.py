"""Platform bounds: what the platform lets any resource ask for, whoever writes it.

Whoever may create a resource may run an image and name Secrets of the namespace; the rules for specs stop mistakes,
these bounds are the border between the platform and the users of a namespace. They come from the operator's settings,
never from the cluster's users. The default is safe without knowing the platform: it opens nothing, and limits only what
would leave the sight of the policies. A spec that was accepted under wider bounds goes on running, Accepted=False.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, TypeAdapter, ValidationError

from securevllm import catalogue
from securevllm.api import types as api
from securevllm.api.fields import Cidr, LabelKey, LabelValue, Model, unknown_field
from securevllm.api.reserved import is_reserved
from securevllm.errors import Problem, SpecError

REASON = "OutOfBounds"
SECRET_REASON = "SecretNotAllowed"  # noqa: S105 - a reason of a condition

# No * in the first part: it would be any registry.
_PATTERN = r"^[a-z0-9][a-z0-9.:_-]*(/[a-z0-9._*-]+)*(:[A-Za-z0-9_.*-]{1,128})?(@sha256:[a-f0-9]{64})?$"
_ANYWHERE = ("0.0.0.0/0", "::/0")
_DEFAULT_RISKS: tuple[api.Risk, ...] = tuple(name for name in get_args(api.Risk) if catalogue.risks()[name].default)


class EgressCeiling(Model):
    """The widest egress that a spec may declare."""

    cidrs: tuple[Cidr, ...] = Field(_ANYWHERE, description="Every declared range lies within one of these.")
    ports: tuple[Annotated[int, Field(ge=1, le=65535)], ...] | None = Field(
        None, description="Ports that may be declared. Absent: any."
    )
    other_namespaces: bool = Field(True, description="Whether pods of other namespaces may be named.")
    downloads: bool = Field(True, description="Whether models may be fetched from a hub: a Job with egress of its own.")


class SecretLabel(Model):
    """The label that a Secret must carry before a spec may name it."""

    key: LabelKey = Field(description="Key of the label.")
    value: LabelValue = Field("true", description="Its value.")


class PlatformBounds(Model):
    """What any resource may ask for. Unknown fields are refused: a misspelt bound would bound nothing."""

    images: tuple[Annotated[str, Field(max_length=512, pattern=_PATTERN)], ...] = Field(
        (),
        description="Images that may run, as repository[:tag][@digest]; what an entry leaves out is free, * is any text"
        " within one part of the path or the tag. Absent: any image.",
    )
    image_digests: bool = Field(False, description="Whether every image must be pinned by digest.")
    secret_label: SecretLabel | None = Field(
        None, description="The label that Secrets must carry to be named in a spec. Absent: any Secret."
    )
    acceptances: tuple[api.Risk, ...] = Field(
        _DEFAULT_RISKS,
        description="Risks that may be taken in security.accept. Absent: those that leave policies whole.",
    )
    egress: EgressCeiling = Field(default_factory=EgressCeiling, description="The widest egress of any spec.")
    service_types: tuple[Literal["ClusterIP", "LoadBalancer", "NodePort"], ...] = Field(
        ("ClusterIP", "LoadBalancer", "NodePort"),
        description="Types of the gateway's Service; the latter two always need clients.cidrs.",
    )
    labels: tuple[LabelKey, ...] = Field((), description="Further labels of engine pods.")
    annotations: tuple[LabelKey, ...] = Field((), description="Further annotations of engine pods.")
    service_annotations: tuple[LabelKey, ...] = Field((), description="Further annotations of the gateway's Service.")
    extended_resources: tuple[LabelKey, ...] = Field(
        (), description="Further devices of engines, none of which is a network."
    )
    network_devices: tuple[LabelKey, ...] = Field(
        (), description="RDMA and SR-IOV devices of engines; a spec needs the acceptance networkDevices, too."
    )


_BOUNDS = TypeAdapter(PlatformBounds)


def read(raw: Any) -> PlatformBounds:
    """The bounds of a parsed YAML document; an empty one is the default.

    Raises:
        SpecError: with everything that is wrong.
    """
    try:
        bounds = _BOUNDS.validate_json(
            json.dumps({} if raw is None else raw), strict=True, by_alias=True, by_name=False
        )
    except ValidationError as error:
        raise SpecError(*_schema_problems(error)) from None
    problems = [*_reserved(bounds), *_ceiling(bounds.egress)]
    if problems:
        raise SpecError(*problems)
    return bounds


def _schema_problems(error: ValidationError) -> Iterator[Problem]:
    for item in error.errors(include_url=False):
        field = "bounds" + "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in item["loc"])
        told, fix = item["msg"], "docs/guard.md has all fields."
        if item["type"] == "extra_forbidden":
            told, fix = unknown_field(PlatformBounds, item["loc"], "docs/guard.md")
        yield Problem(field, "InvalidBounds", told, fix, str(item["input"])[:80])


def _reserved(bounds: PlatformBounds) -> Iterator[Problem]:
    """What no platform can open: the machinery of networks, and our own."""
    for field, keys in (("labels", bounds.labels), ("annotations", bounds.annotations)):
        for key in keys:
            if is_reserved(key):
                yield Problem(
                    f"bounds.{field}",
                    "InvalidBounds",
                    "it is read by Kubernetes, a CNI, a CRI, a mesh or this operator",
                    "Leave it out: traffic would go past the policies.",
                    key,
                )


def _ceiling(egress: EgressCeiling) -> Iterator[Problem]:
    for cidr in egress.cidrs:
        try:
            ipaddress.ip_network(cidr)
        except ValueError as error:
            fix = "Write a network such as 203.0.113.0/24."
            yield Problem("bounds.egress.cidrs", "InvalidBounds", str(error), fix, cidr)


# ------------------------------------------------------------------------------------------------- a spec within them


@dataclass(frozen=True)
class Reference:
    """An image as a registry understands it; what is not said is empty."""

    repository: str
    tag: str = ""
    digest: str = ""

    @classmethod
    def parse(cls, text: str) -> Reference:
        """Split a reference; short names are those of Docker Hub (distribution/reference, ``ParseNormalizedNamed``)."""
        rest, _, digest = text.partition("@")
        path, colon, tag = rest.rpartition(":")
        if not colon or "/" in tag:
            path, tag = rest, ""
        first, slash, _ = path.partition("/")
        if not slash:
            path = f"docker.io/library/{path}"
        elif not re.search(r"[.:]", first) and first != "localhost":
            path = f"docker.io/{path}"
        return cls(path.removeprefix("index."), tag, digest)


def image_matches(pattern: str, image: str) -> bool:
    """Whether an image is one of those that an entry of ``images`` means."""
    wanted, given = Reference.parse(pattern), Reference.parse(image)
    parts, others = wanted.repository.split("/"), given.repository.split("/")
    return (
        len(parts) == len(others)
        and all(fnmatchcase(other, part) for part, other in zip(parts, others, strict=True))
        and (not wanted.tag or (bool(given.tag) and fnmatchcase(given.tag, wanted.tag)))
        and (not wanted.digest or wanted.digest == given.digest)
    )


def check(spec: api.Spec, bounds: PlatformBounds) -> Iterator[Problem]:
    """What of a spec is out of bounds. Labels, annotations and devices are judged by the guard."""
    yield from _images(spec, bounds)
    yield from _acceptances(spec, bounds)
    yield from _egress(spec, bounds)
    kind = spec.gateway.service.type
    if kind not in bounds.service_types:
        yield _out("spec.gateway.service.type", "Services of this type", ", ".join(bounds.service_types), kind)


def _out(field: str, what: str, allowed: str, value: str) -> Problem:
    fix = f"Allowed: {allowed}." if allowed else "Leave it out, or ask those who run the platform."
    return Problem(field, REASON, f"the platform does not allow {what}", fix, value)


def _images(spec: api.Spec, bounds: PlatformBounds) -> Iterator[Problem]:
    images = {"spec.image": spec.image}
    if spec.disaggregation is not None:
        images["spec.disaggregation.router.image"] = spec.disaggregation.router.image
    if spec.model.source is not None and spec.model.source.image is not None:
        images["spec.model.source.image.reference"] = spec.model.source.image.reference
    for field, image in images.items():
        if bounds.images and not any(image_matches(pattern, image) for pattern in bounds.images):
            yield _out(field, "this image", ", ".join(bounds.images), image)
        if bounds.image_digests and not Reference.parse(image).digest:
            yield _out(field, "an image that is not pinned by digest", "repository:tag@sha256:...", image)


def _acceptances(spec: api.Spec, bounds: PlatformBounds) -> Iterator[Problem]:
    for index, item in enumerate(spec.security.accept):
        if item.risk not in bounds.acceptances:
            field = f"spec.security.accept[{index}].risk"
            yield _out(field, "this risk to be taken", ", ".join(bounds.acceptances), item.risk)


def _egress(spec: api.Spec, bounds: PlatformBounds) -> Iterator[Problem]:
    ceiling = bounds.egress
    ranges = ", ".join(ceiling.cidrs)
    for index, entry in enumerate(spec.security.egress):
        field = f"spec.security.egress[{index}]"
        for cidr in entry.to.cidrs:
            if not _within(cidr, ceiling.cidrs):
                yield _out(f"{field}.to.cidrs", "egress to this range", ranges, cidr)
        if entry.to.namespace_selector is not None and not ceiling.other_namespaces:
            yield _out(f"{field}.to.namespaceSelector", "egress to other namespaces", "", "")
        for port in entry.ports:
            if ceiling.ports is not None and port.port not in ceiling.ports:
                allowed = ", ".join(map(str, ceiling.ports))
                yield _out(f"{field}.ports", "egress to this port", allowed, str(port.port))
    if spec.model.source is not None and spec.model.source.hugging_face is not None and not ceiling.downloads:
        yield _out(
            "spec.model.source.huggingFace", "downloads", "persistentVolumeClaim, or an image that has the model", ""
        )


def secrets(spec: api.Spec) -> Iterator[tuple[str, str]]:
    """Every Secret that a spec names, with the field that names it."""
    keys = spec.gateway.authentication.api_keys
    for index, ref in enumerate(keys.secret_refs if keys is not None else ()):
        yield f"spec.gateway.authentication.apiKeys.secretRefs[{index}].name", ref.name
    if spec.gateway.authentication.mtls is not None:
        yield "spec.gateway.authentication.mtls.caSecretRef.name", spec.gateway.authentication.mtls.ca_secret_ref.name
    if spec.gateway.tls.secret_name is not None:
        yield "spec.gateway.tls.secretName", spec.gateway.tls.secret_name
    for index, ref in enumerate(spec.image_pull_secrets):
        yield f"spec.imagePullSecrets[{index}].name", ref.name
    hub = spec.model.source.hugging_face if spec.model.source is not None else None
    if hub is not None and hub.token_secret_ref is not None:
        yield "spec.model.source.huggingFace.tokenSecretRef.name", hub.token_secret_ref.name
    for index, variable in enumerate(spec.engine.env):
        if variable.value_from is not None and variable.value_from.secret_key_ref is not None:
            yield f"spec.engine.env[{index}].valueFrom.secretKeyRef.name", variable.value_from.secret_key_ref.name
    for index, volume in enumerate(spec.engine.volumes):
        if volume.secret is not None:
            yield f"spec.engine.volumes[{index}].secret.secretName", volume.secret.secret_name


def secret_problem(field: str, name: str, labels: Mapping[str, str] | None, wanted: SecretLabel) -> Problem | None:
    """What is wrong with naming a Secret.

    Args:
        field: of the spec, that names it.
        name: of the Secret.
        labels: its labels; None: it does not exist, and could come without the label.
        wanted: the label that it must carry.
    """
    if labels is not None and labels.get(wanted.key) == wanted.value:
        return None
    told = "this Secret does not exist" if labels is None else "this Secret does not carry it"
    rule = f"the platform demands the label {wanted.key}={wanted.value} on Secrets that a spec names, and {told}"
    return Problem(field, SECRET_REASON, rule, "Ask those who run the platform to label it.", name)


def _within(cidr: str, ceiling: tuple[str, ...]) -> bool:
    try:
        network = ipaddress.ip_network(cidr)
    except ValueError:
        return True  # told by parse.py
    return any(
        network.version == other.version and network.subnet_of(other)  # type: ignore[arg-type]  # same version
        for other in map(ipaddress.ip_network, ceiling)
    )
