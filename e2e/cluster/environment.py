"""The environment and the arguments of a container, resolved as kubelet does (core/v1 EnvVar, EnvFromSource)."""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from e2e.cluster.volumes import Sources, VolumeError

_REFERENCE = re.compile(r"\$(\$|\(([A-Za-z_.][\w.-]*)\))")


def expand(text: str, env: Mapping[str, str]) -> str:
    """Replace `$(NAME)` by its value; `$$` is a literal `$`; unknown names stay as they are."""

    def value(match: re.Match[str]) -> str:
        if match.group(1) == "$":
            return "$"
        return env.get(match.group(2), match.group())

    return _REFERENCE.sub(value, text)


def expand_all(texts: Sequence[str] | None, env: Mapping[str, str]) -> list[str]:
    """Expand a command or its arguments."""
    return [expand(text, env) for text in texts or []]


def downward_fields(pod: Mapping[str, Any], ip: str, node_ip: str) -> dict[str, str]:
    """Return what field paths of the downward API stand for, as of now."""
    metadata, spec = pod["metadata"], pod["spec"]
    fields = {
        "metadata.name": metadata["name"],
        "metadata.namespace": metadata["namespace"],
        "metadata.uid": metadata["uid"],
        "spec.nodeName": spec.get("nodeName", ""),
        "spec.serviceAccountName": spec.get("serviceAccountName", "default"),
        "status.hostIP": node_ip,
        "status.hostIPs": node_ip,
        "status.podIP": ip,
        "status.podIPs": ip,
    }
    for kind in ("labels", "annotations"):
        entries: dict[str, str] = metadata.get(kind) or {}
        fields[f"metadata.{kind}"] = "\n".join(f"{key}={json.dumps(value)}" for key, value in sorted(entries.items()))
        fields |= {f"metadata.{kind}['{key}']": value for key, value in entries.items()}
    return fields


async def resolve(container: Mapping[str, Any], sources: Sources, base: Mapping[str, str]) -> dict[str, str]:
    """Resolve `envFrom` and `env` in order, over `base`.

    Raises:
        VolumeError: A ConfigMap, Secret, key or field that is not optional is missing.
    """
    env = dict(base)
    for source in container.get("envFrom", []):
        data = await _data(source.get("configMapRef"), source.get("secretRef"), sources)
        env |= {f"{source.get('prefix', '')}{key}": value for key, value in (data or {}).items()}
    for variable in container.get("env", []):
        name, origin = variable["name"], variable.get("valueFrom")
        if origin is None:
            env[name] = expand(variable.get("value", ""), env)
        elif (value := await _value(name, origin, sources)) is not None:
            env[name] = value
    return env


async def _value(name: str, origin: Mapping[str, Any], sources: Sources) -> str | None:
    if field := origin.get("fieldRef"):
        path = field["fieldPath"]
        if path in sources.fields:
            return sources.fields[path]
        if "['" in path:  # a label or annotation that the pod does not have
            return ""
        raise VolumeError(f"env {name}: the hollow node does not know {path}")
    secret, config_map = origin.get("secretKeyRef"), origin.get("configMapKeyRef")
    reference = secret or config_map
    if not reference:
        raise VolumeError(f"env {name}: the hollow node resolves no {', '.join(origin)}")
    data = await _data(config_map, secret, sources)
    if data is not None and reference["key"] in data:
        return data[reference["key"]]
    if reference.get("optional", False):
        return None
    raise VolumeError(f"env {name}: {reference['name']} has no key {reference['key']}")


async def _data(
    config_map: Mapping[str, Any] | None, secret: Mapping[str, Any] | None, sources: Sources
) -> dict[str, str] | None:
    reference = config_map or secret or {}
    found = await (sources.config_map if config_map else sources.secret)(reference["name"])
    if found is None:
        if reference.get("optional", False):
            return None
        raise VolumeError(f"{'ConfigMap' if config_map else 'Secret'} {reference['name']} not found")
    data: dict[str, str] = found.get("data") or {}
    return data if config_map else {key: base64.b64decode(value).decode() for key, value in data.items()}
