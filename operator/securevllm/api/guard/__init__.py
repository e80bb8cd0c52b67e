"""The guard: nothing that a user writes re-opens what the operator closed (I5).

``arguments`` reads flags of vLLM in every spelling, ``values`` judges what they are set to, ``environment`` judges
variables, ``pod`` labels, annotations, devices and volumes. What is allowed is data: ``catalogue/data/flags.toml``,
``environment.toml`` and ``risks.toml``. ``check`` is the whole of it for one spec.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from securevllm.api.guard import arguments, environment, pod
from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm import catalogue
    from securevllm.api import types as api
    from securevllm.api.bounds import PlatformBounds

TRUST_REMOTE_CODE = "--trust-remote-code"
_TRACES = "--otlp-traces-endpoint"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_DEFAULT_PORTS = {"http": 80, "https": 443, "grpc": 4317}


def check(spec: api.Spec, version: catalogue.Version, bounds: PlatformBounds) -> Iterator[Problem]:
    """Everything in a spec that could re-open something."""
    engine = spec.engine
    accepted = frozenset(item.risk for item in spec.security.accept)
    yield from arguments.check(engine.args, version, mounts=pod.mounts(engine.volumes), accepted=accepted)
    yield from _remote_code(spec)
    yield from _traces(spec)
    yield from environment.check(engine.env, version)
    yield from pod.check_secret_names(_handed_out(spec))
    yield from pod.check_labels(engine.labels, bounds)
    yield from pod.check_annotations(engine.annotations, bounds)
    yield from pod.check_service_annotations(spec.gateway.service.annotations, bounds)
    yield from pod.check_resources("spec.engine.resources", engine.resources, bounds, devices=True, accepted=accepted)
    yield from pod.check_resources(
        "spec.gateway.resources", spec.gateway.resources, bounds, devices=False, accepted=accepted
    )
    if spec.disaggregation is not None:
        yield from pod.check_resources(
            "spec.disaggregation.router.resources",
            spec.disaggregation.router.resources,
            bounds,
            devices=False,
            accepted=accepted,
        )
    yield from pod.check_volumes(spec)


def _handed_out(spec: api.Spec) -> dict[str, str]:
    """Fields that give a Secret's content to an engine, or to a hub of the user's choice, and the Secrets' names."""
    found = {
        f"spec.engine.env[{index}].valueFrom.secretKeyRef.name": variable.value_from.secret_key_ref.name
        for index, variable in enumerate(spec.engine.env)
        if variable.value_from is not None and variable.value_from.secret_key_ref is not None
    }
    hub = spec.model.source.hugging_face if spec.model.source is not None else None
    if hub is not None and hub.token_secret_ref is not None:
        found["spec.model.source.huggingFace.tokenSecretRef.name"] = hub.token_secret_ref.name
    return found


def trusts_remote_code(spec: api.Spec) -> bool:
    """Whether code of the model's repository runs in the engine."""
    return TRUST_REMOTE_CODE in arguments.names(spec.engine.args)


def _remote_code(spec: api.Spec) -> Iterator[Problem]:
    """Code that runs is code that somebody can look at: a branch would change it at the next download."""
    hub = spec.model.source is not None and spec.model.source.hugging_face is not None
    if hub and trusts_remote_code(spec) and not _COMMIT.fullmatch(spec.model.revision or ""):
        yield Problem(
            "spec.model.revision",
            "RevisionNotPinned",
            f"{TRUST_REMOTE_CODE} runs code of the repository, which a branch or tag can exchange",
            "Write the commit, 40 hexadecimal digits.",
            spec.model.revision or "",
        )


def _traces(spec: api.Spec) -> Iterator[Problem]:
    """An endpoint that no egress leads to would only fill the log with errors."""
    ports = {port.port for entry in spec.security.egress for port in entry.ports if port.protocol == "TCP"}
    for argument in arguments.read(spec.engine.args)[0]:
        if argument.name != _TRACES:
            continue
        try:
            parts = urlsplit(argument.texts[0])
            port = parts.port or _DEFAULT_PORTS.get(parts.scheme, 0)
        except ValueError:
            port = 0
        if port not in ports:
            yield Problem(
                argument.field,
                arguments.REASON,
                f"{_TRACES} needs a declared egress to its port",
                "Write security: {egress: [{to: ..., ports: [{port: 4317}], why: ...}]}.",
                argument.texts[0],
            )
