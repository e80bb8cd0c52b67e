"""``spec.engine.env``: exact names of the allowlist, in plain text or from one key of a Secret or ConfigMap.

There is no ``envFrom``: it would bring names that nobody sees. A value from a Secret or ConfigMap is not seen either,
so the allowlist holds only names of which no value opens anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from securevllm import catalogue
from securevllm.api.guard import values
from securevllm.api.guard.values import Refused
from securevllm.errors import Problem

if TYPE_CHECKING:
    from securevllm.api import types as api

REASON = "VariableRefused"


def check(env: Sequence[api.EnvVar], version: catalogue.Version) -> Iterator[Problem]:
    """What is wrong with ``spec.engine.env``."""
    known = catalogue.environment()
    seen: set[str] = set()
    for index, variable in enumerate(env):
        field, name = f"spec.engine.env[{index}]", variable.name
        if name in seen:
            yield Problem(f"{field}.name", REASON, "a name may stand only once", "Remove one of the two.", name)
        seen.add(name)
        if name not in known.allowed:
            yield Problem(f"{field}.name", REASON, *_why_not(name), name)
            continue
        setting = known.allowed[name]
        if version not in setting.versions:
            yield Problem(f"{field}.name", REASON, f"vLLM {version} has no such variable", "Leave it out.", name)
        if variable.value is not None:
            try:
                values.check(setting, variable.value, ())
            except Refused as refused:
                yield Problem(f"{field}.value", REASON, refused.rule, refused.fix, variable.value)


def _why_not(name: str) -> tuple[str, str]:
    """Rule and way out for a name that nobody may set."""
    known, (_, dangers) = catalogue.environment(), catalogue.dangers()
    if name in known.fixed:
        return "the operator always sets this variable", _INSTEAD.get(name, "Leave it out.")
    if name in dangers:
        return f"this variable is refused: {dangers[name].why}", _INSTEAD.get(name, "Leave it out.")
    if name in _INSTEAD:
        return "the operator always sets this variable", _INSTEAD[name]
    return (
        "only names of the allowlist may be set: a variable can open what the operator closed",
        f"Use one of: {', '.join(sorted(known.allowed))}.",
    )


_PROXY = 'Use instead: security: {egress: [{to: ..., ports: ..., proxy: "http://...", why: ...}]}.'
_MEDIA = "Use instead: spec.security.media"
_INSTEAD = {
    "ALL_PROXY": _PROXY,
    "HTTP_PROXY": _PROXY,
    "HTTPS_PROXY": _PROXY,
    "NO_PROXY": _PROXY,
    "VLLM_API_KEY": "Leave it out: the operator makes the engine's key.",
    "VLLM_ENGINE_READY_TIMEOUT_S": "Use instead: spec.engine.startupTimeout.",
    "VLLM_MAX_IMAGE_PIXELS": f"{_MEDIA}.maxImagePixels.",
    "VLLM_MAX_MEDIA_DOWNLOAD_SIZE_MB": f"{_MEDIA}.maxDownloadMegabytes.",
    "VLLM_MAX_MEDIA_REQUEST_DOWNLOAD_SIZE_MB": f"{_MEDIA}.maxRequestDownloadMegabytes.",
    "VLLM_MEDIA_URL_ALLOW_REDIRECTS": f"{_MEDIA}.allowRedirects.",
    "VLLM_MOONCAKE_BOOTSTRAP_PORT": "Use instead: spec.ports.mooncakeBootstrap.",
    "VLLM_NIXL_SIDE_CHANNEL_PORT": "Use instead: spec.ports.nixlSideChannel.",
}
"""The field that a user writes instead of a refused variable."""
