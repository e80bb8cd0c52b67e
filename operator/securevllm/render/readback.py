"""What a running Envoy says it enforces: the versions that it has accepted, per file.

Measured on Envoy 1.40: a subscription sets its ``version_text`` only after the update was accepted. A rejected or
unreadable file leaves the last good configuration (with, for example, revoked keys) and the last good version, so
"the version equals the file's" means "the file is enforced", and anything else means that it is not.

The bootstrap is read once and has no version. Contents of mounted Secrets have none either: sds.yaml and
engine_key_sds.yaml only name files, and their versions say nothing about a certificate or an engine key. A certificate
is read back by a TLS handshake, or in the metrics: ``..._ssl_context_update_by_sds`` counts its reloads and
``envoy_listener_ssl_certificate_expiration_unix_time_seconds`` says which it is. An engine key cannot be read back: no
counter of ``envoy_sds_*`` moves when it changes, ``envoy_sds_key_rotation_failed`` when that fails.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping

_STAT = re.compile(r"envoy_(?P<name>\w+)_version_text\{(?P<labels>.*)\} 0")
_HEALTHY = re.compile(r'^envoy_cluster_membership_healthy\{envoy_cluster_name="engine"\} (?P<count>\d+)$', re.MULTILINE)
_ENGINE_VERSION = re.compile(r"[0-9A-Za-z][0-9A-Za-z.+_-]{0,63}")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')

_FILES = {
    ("listener_manager_lds", ""): "lds.yaml",
    ("cluster_manager_cds", ""): "cds.yaml",
    ("http_rds", "gateway"): "rds.yaml",
    ("extension_config_discovery_http_filter_allowlist", ""): "rbac.yaml",
    ("extension_config_discovery_http_filter_api_keys", ""): "api_keys.yaml",
    ("sds", "server_cert"): "sds.yaml",
    ("sds", "engine_key"): "engine_key_sds.yaml",
}


def parse_versions(text: str) -> dict[str, str]:
    """Read the answer of a gateway pod's ops port to ``GET`` ``envoy.VERSIONS_PATH``.

    Args:
        text: Prometheus text with text readouts.

    Returns:
        File name to accepted version. A file that is not loaded, or that Envoy reports with two versions, is absent.
    """
    found: dict[str, set[str]] = {}
    for match in map(_STAT.fullmatch, text.splitlines()):
        if match is None:
            continue
        labels = dict(_LABEL.findall(match["labels"]))
        resource = labels.get("envoy_rds_route_config") or labels.get("envoy_xds_resource_name") or ""
        file = _FILES.get((match["name"], resource))
        if file is not None and labels.get("text_value"):
            found.setdefault(file, set()).add(labels["text_value"])
    return {file: versions.pop() for file, versions in found.items() if len(versions) == 1}


def parse_healthy(text: str) -> int:
    """Engines that this gateway may send requests to: they have an address in DNS and passed the health check."""
    match = _HEALTHY.search(text)
    return int(match["count"]) if match else 0


def parse_engine_version(text: str) -> str:
    """Read an engine's answer to ``GET /version``; empty when it is none.

    An engine is not to be trusted with the status: only characters of a version get there.
    """
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        return ""
    said = answer.get("version") if isinstance(answer, dict) else None
    return said if isinstance(said, str) and _ENGINE_VERSION.fullmatch(said) else ""


def versions_of(files: Mapping[str, str]) -> dict[str, str]:
    """The versions that an Envoy with exactly these files reports.

    Args:
        files: file name to text, from ``envoy.envoy_files`` and ``envoy.api_keys_file``.
    """
    parsed = {name: json.loads(text) for name, text in files.items()}
    return {name: content["version_info"] for name, content in parsed.items() if "version_info" in content}
