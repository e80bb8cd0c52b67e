"""Settings of the operator process, read once at start."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from securevllm.api import bounds as platform
from securevllm.context import Context
from securevllm.errors import OperatorError
from securevllm.status import DOCS

LEASE = "secure-vllm-operator"


@dataclass(frozen=True)
class Settings:
    """What the command line says.

    Attributes:
        namespace: of the operator itself; its Lease is there.
        identity: of this process, unique among the candidates for the Lease; in a cluster the pod's name.
        watch_namespace: one-namespace mode; None: all namespaces.
        kubeconfig: None: the pod's service account.
        workers: resources that are reconciled side by side.
        http_host: address of health, metrics and the canary listener; None: as the cluster's families demand.
        http_port: port of health and metrics.
        canary_listener: whether to listen on ``context.canary_port``.
        canary_pods: whether canary pods may be made in users' namespaces.
        log_format: ``json`` or ``console``.
        log_level: for example ``INFO``.
        take_over: installations that are gone, whose resources become this one's; each ``<namespace>/<Lease>``.
        docs_url: where people find the pages that messages name, without a slash at the end.
        resync_seconds: how often everything is listed again: a deletion in a watch gap is never told.
        context: what rendering has to know of the cluster.
        bounds: what the platform lets any resource ask for.
    """

    namespace: str
    identity: str
    watch_namespace: str | None = None
    kubeconfig: Path | None = None
    workers: int = 8
    http_host: str | None = None
    http_port: int = 8080
    canary_listener: bool = True
    canary_pods: bool = True
    log_format: Literal["json", "console"] = "json"
    log_level: str = "INFO"
    take_over: tuple[str, ...] = ()
    docs_url: str = DOCS
    resync_seconds: float = 600.0
    context: Context = field(default_factory=Context)
    bounds: platform.PlatformBounds = field(default_factory=platform.PlatformBounds)

    @property
    def listen_address(self) -> str:
        """Where health, metrics and the canary listener are."""
        return self.http_host or self.context.listen_address

    @property
    def lease(self) -> str:
        """Name of the Lease; it carries the scope, so that operators of two scopes do not stand by for each other."""
        return LEASE if self.watch_namespace is None else f"{LEASE}-{self.watch_namespace}"

    @property
    def installation(self) -> str:
        """What tells this installation from every other of the cluster; ``status.operator`` of its resources."""
        return f"{self.namespace}/{self.lease}"


class _Strict(yaml.SafeLoader):
    """A key that stands twice is an error: of two bounds, the reader and the parser might take different ones."""


def _mapping(loader: _Strict, node: yaml.MappingNode) -> dict[Any, Any]:
    loader.flatten_mapping(node)
    keys = [loader.construct_object(key, deep=True) for key, _ in node.value]
    for key in keys:
        if keys.count(key) > 1:
            raise yaml.constructor.ConstructorError(None, None, f"{key!r} stands twice", node.start_mark)
    return loader.construct_mapping(node, deep=True)


_Strict.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, _mapping)


def read_bounds(path: Path) -> platform.PlatformBounds:
    """Read the platform's bounds.

    Args:
        path: a YAML file, as docs/guard.md shows it.

    Raises:
        OperatorError: the file cannot be read; a `SpecError` says what in it is wrong.
    """
    try:
        raw = yaml.load(path.read_text(encoding="utf-8"), Loader=_Strict)  # noqa: S506 - a SafeLoader
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise OperatorError(f"the bounds {path} cannot be read: {error}") from error
    return platform.read(raw)
