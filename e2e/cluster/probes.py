"""httpGet and tcpSocket probes, as kubelet performs them (core/v1 Probe)."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

import aiohttp

KINDS = ("startupProbe", "readinessProbe")
_ACTIONS = ("httpGet", "tcpSocket")


def unsupported(container: Mapping[str, Any]) -> str | None:
    """Say which probe of a container cannot be performed, or None."""
    for kind in KINDS:
        probe = container.get(kind)
        if probe and not any(action in probe for action in _ACTIONS):
            return f"{kind} of container {container['name']}: the hollow node performs {' and '.join(_ACTIONS)} only"
    return None


async def perform(probe: Mapping[str, Any], container: Mapping[str, Any], ip: str) -> bool:
    """Perform a probe once; any failure to connect or to answer in `timeoutSeconds` is False."""
    try:
        async with asyncio.timeout(probe.get("timeoutSeconds", 1)):
            if http := probe.get("httpGet"):
                return await _http(http, container, ip)
            socket = probe["tcpSocket"]
            _, writer = await asyncio.open_connection(socket.get("host") or ip, _port(socket["port"], container))
            writer.close()
            return True
    except (OSError, TimeoutError, aiohttp.ClientError):
        return False


async def _http(http: Mapping[str, Any], container: Mapping[str, Any], ip: str) -> bool:
    scheme = http.get("scheme", "HTTP").lower()
    url = f"{scheme}://{http.get('host') or ip}:{_port(http['port'], container)}{http.get('path', '/')}"
    headers = {header["name"]: header["value"] for header in http.get("httpHeaders", [])}
    # Like kubelet: certificates are not verified, redirects count as an answer, and no proxy is asked.
    async with (
        aiohttp.ClientSession(trust_env=False) as session,
        session.get(url, headers=headers, ssl=False, allow_redirects=False) as response,
    ):
        return 200 <= response.status < 400


def _port(port: int | str, container: Mapping[str, Any]) -> int:
    if isinstance(port, int):
        return port
    named = {item.get("name"): item["containerPort"] for item in container.get("ports", [])}
    if port not in named:
        raise OSError(f"container {container['name']} has no port named {port}")
    return int(named[port])
