"""The Envoy configuration of a gateway: one Jinja2 template per resource file, parsed back and checked.

The templates in ``templates/`` are what a person reviews. What is published is their parsed content as JSON (YAML's
unambiguous subset), so that the text checked by ``envoy_check`` is the text that Envoy gets, and a comment changes no
version. Every value passes ``tojson``: the environment refuses any other. The allowlist exists twice, as routes
(rds.yaml) and as a filter (rbac.yaml), from one list.

Every file but the bootstrap carries a ``version_info`` made of its content; ``readback`` finds it again in what a
running Envoy reports. Field names, traps and measurements are those of Envoy 1.40.
"""

from __future__ import annotations

import functools
import hashlib
import hmac
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any
from urllib.parse import quote

import yaml
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from securevllm.catalogue import WEBSOCKET
from securevllm.errors import InternalError
from securevllm.render import envoy_check

DIRECTORIES: Mapping[str, str] = MappingProxyType(
    {name: f"/etc/envoy/{name}" for name in ("bootstrap", "xds", "auth", "engine", "tls")}
)
"""Mount points in the gateway container; whole volumes, never subPath (it would freeze the content).

``bootstrap`` and ``xds`` are ConfigMaps, ``auth`` the Secret with api_keys.yaml, ``engine`` the Secret with the engine
key, ``tls`` a kubernetes.io/tls Secret.
"""

API_KEYS_FILE = "api_keys.yaml"
BOOTSTRAP_FILE = "bootstrap.yaml"
SIDECAR_FILE = "sidecar.yaml"
XDS_FILES = ("lds.yaml", "rds.yaml", "rbac.yaml", "cds.yaml", "sds.yaml", "engine_key_sds.yaml")

CLIENT_HEADER = "x-gateway-client"
"""Verified client id. Removed from every request; set by the authentication filter; the engine sees it."""

MARKER_HEADER = "x-securevllm-gateway"
"""On answers that the gateway gave itself, with its name; never on an engine's answer."""

ANONYMOUS = "anonymous"
"""The client id of everybody when the spec renounces authentication."""

ENGINE_HOST = "vllm.internal"
"""The one Host header that an engine ever sees."""

ENGINE_KEEP_ALIVE_SECONDS = 30
"""VLLM_HTTP_TIMEOUT_KEEP_ALIVE of the engines. Must be longer than ``Timeouts.upstream_idle_seconds``."""

CLIENT_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
CLIENT_KEY = re.compile(r"[A-Za-z0-9._~+/=-]{16,512}")
"""The token68 characters of RFC 9110: the only ones that ``Authorization: Bearer`` may carry. No comma, no space."""

_METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", WEBSOCKET})
_BODILESS = frozenset({"GET", "DELETE"})
_LITERAL = r"[A-Za-z0-9_-]+(?:\.[A-Za-z0-9_-]+)*"
_PATH = re.compile(rf"(?:/(?:{_LITERAL}|\{{[a-z_]+\}}))+")
_VARIABLE = re.compile(r"\{([a-z_]+)\}")
_VARIABLE_CLASS = "[A-Za-z0-9_-]{1,128}"
_HOSTNAME = re.compile(r"(?:\*\.)?[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")
_UPSTREAM = re.compile(r"[a-z0-9](?:[-a-z0-9.]*[a-z0-9])?")

STRIPPED_HEADERS = (
    CLIENT_HEADER,
    "x-request-id",  # vLLM makes it the id of the request in the engine
    "x-data-parallel-rank",  # picks the engine
    "x-session-id",  # affinity across clients
    "x-forwarded-for",
    "x-forwarded-host",
    "x-forwarded-port",
    "x-forwarded-prefix",
    "x-forwarded-proto",
    "x-real-ip",
    "forwarded",
    "x-original-url",
    "x-rewrite-url",
    "x-http-method-override",
    "x-http-method",
    "x-method-override",
    "cookie",
    "proxy-authorization",
    "te",
)
STRIPPED_PREFIXES = ("x-envoy-", "x-vllm-", "x-amzn-sagemaker-")
WEBSOCKET_PREFIX = "sec-websocket-"

READY_PATH = "/ready"
METRICS_PATH = "/stats/prometheus"
VERSIONS_PATH = "/stats/prometheus?text_readouts&filter=version_text%7Cmembership_healthy"
"""What the operator asks a gateway pod's ops port for; ``readback`` reads the answer."""

ENGINE_VERSION_PATH = "/engine-version"
"""The operator's way to ask an engine for its version; the request that the engine gets is always the same."""

ADMIN_PATHS = (METRICS_PATH, VERSIONS_PATH)
OPS_PATHS = (READY_PATH, *ADMIN_PATHS, ENGINE_VERSION_PATH)
"""All that the ops port answers."""

SCRAPE_PATH = "/metrics"
"""All that declared scrapers may ask for, at an engine's sidecar and at a gateway."""

SCRAPED = (
    "^http.gateway.downstream_",
    "^http.gateway.api_key_auth.",
    "^http.gateway.rbac.",
    "^per_client.http_local_rate_limit.",
    "^cluster.engine.membership_",
    "^cluster.engine.upstream_",
    "update_rejected$",
    "key_rotation_failed$",
    "ssl_certificate_expiration",
    "^listener.*.ssl.connection_error$",
    "downstream_global_cx_overflow$",
    "fixed_heap.pressure$",
    "^server.memory_",
    "^server.uptime$",
)
"""Which of Envoy's statistics a scraper gets, as expressions over Envoy's own names: a fifth of what there is.

Those that are still zero are among them: ``rate`` does not see the first event of a counter that appears with it. A
change is one of the bootstrap: gateways of before answer scrapers 403 until they are rolled.
"""

SCRAPED_PATH = f"{METRICS_PATH}?filter={quote('|'.join(SCRAPED), safe='')}"
"""What the admin interface is asked for a scraper."""


@dataclass(frozen=True)
class AllowedRoute:
    """One entry of the allowlist.

    Attributes:
        method: GET, POST, PUT, PATCH, DELETE, or WEBSOCKET (a GET with ``upgrade: websocket`` and nothing else).
        path: exact path; ``{name}`` stands for one segment of ``[A-Za-z0-9_-]{1,128}``.
        streaming: the answer may take as long as a generation.

    Raises:
        InternalError: a method that is never allowed (HEAD, OPTIONS, TRACE, CONNECT ...), or a path with anything that
            two servers could read in two ways.
    """

    method: str
    path: str
    streaming: bool = False

    def __post_init__(self) -> None:
        if self.method not in _METHODS:
            raise InternalError(f"route {self.name}: method must be one of {', '.join(sorted(_METHODS))}")
        if _PATH.fullmatch(self.path) is None:
            raise InternalError(f"route {self.name}: segments are [A-Za-z0-9_-] with single dots inside, or {{name}}")
        if len(set(self.parameters)) != len(self.parameters):
            raise InternalError(f"route {self.name}: a variable appears twice")

    @property
    def name(self) -> str:
        """``GET /v1/models``."""
        return f"{self.method} {self.path}"

    @property
    def websocket(self) -> bool:
        """Whether this is a WebSocket."""
        return self.method == WEBSOCKET

    @property
    def http_method(self) -> str:
        """The method on the wire."""
        return "GET" if self.websocket else self.method

    @property
    def bodiless(self) -> bool:
        """Whether a body is refused."""
        return self.http_method in _BODILESS

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the variables in the path."""
        return tuple(_VARIABLE.findall(self.path))

    @property
    def regex(self) -> str:
        """RE2 expression of the whole path; empty when the path has no variable."""
        if not self.parameters:
            return ""
        return _VARIABLE.sub(_VARIABLE_CLASS, self.path.replace(".", r"\."))


@dataclass(frozen=True)
class ClientKey:
    """A client and one of its keys; two keys of one client overlap during a rotation."""

    client: str
    key: str = field(repr=False)


@dataclass(frozen=True)
class Timeouts:
    """Seconds that no spec sets. Defaults from Envoy's edge guide and from measurements; tests shorten them.

    Attributes:
        tls_handshake_seconds: until a connection's handshake is done.
        request_headers_seconds: until a request's headers are complete; then 408.
        upload_seconds: until a request's body is complete; then 408. Does not limit the answer.
        answer_seconds: a whole answer of a route that does not stream.
        stream_idle_seconds: silence on a stream for which no route has decided yet.
        connection_idle_seconds: an idle client connection.
        connection_seconds: age at which a client connection is drained; its streams finish.
        upstream_idle_seconds: an idle connection to an engine.
    """

    tls_handshake_seconds: float = 10
    request_headers_seconds: float = 10
    upload_seconds: float = 300
    answer_seconds: float = 300
    stream_idle_seconds: float = 300
    connection_idle_seconds: float = 300
    connection_seconds: float = 3600
    upstream_idle_seconds: float = 3


@dataclass(frozen=True)
class GatewayModel:
    """All that the configuration of one gateway depends on.

    Attributes:
        name: node id and value of the marker header, for example ``llama-gateway``.
        listen_port: clients; 8443, or 8080 without TLS.
        ops_port: readiness, metrics and readback, plain HTTP on the pod IP.
        admin_port: Envoy's admin interface on 127.0.0.1.
        routes: the effective allowlist.
        upstream_host: FQDN of the headless Service of the engines, or of the router, without a trailing dot.
        upstream_port: API port behind it.
        tls: serve TLS with tls.crt and tls.key of the ``tls`` directory.
        hostnames: Host headers that are answered; none: all.
        authentication: demand a client key; False only when the spec says so in words.
        request_body_bytes: larger bodies get 413. A WebSocket is closed when its whole session sent more.
        requests_per_second_per_client: per replica of the gateway; more get 429.
        stream_seconds: longest answer.
        stream_idle_seconds: longest silence within an answer.
        max_clients: client ids that have a bucket of their own; not less than there are clients.
        heap_bytes: about 80 % of the container's memory limit.
        connections: client connections, and requests under way.
        metrics_port: the gateway's own metrics, for declared scrapers; 0: there are none, and nothing listens.
        scrapes: per second, of all scrapers together; more get 429.
        listen_address: ``0.0.0.0``, or ``::`` (both families).
        health_path: what the upstream answers with 200 when it can serve.
        version_path: what an engine tells its version on; empty: the upstream is no engine.
        timeouts: see there.
    """

    name: str
    listen_port: int
    ops_port: int
    admin_port: int
    routes: tuple[AllowedRoute, ...]
    upstream_host: str
    upstream_port: int
    tls: bool
    hostnames: tuple[str, ...]
    authentication: bool
    request_body_bytes: int
    requests_per_second_per_client: int
    stream_seconds: int
    stream_idle_seconds: int
    max_clients: int
    heap_bytes: int
    connections: int
    metrics_port: int = 0
    scrapes: int = 20
    listen_address: str = "0.0.0.0"  # noqa: S104 - a pod's own address; NetworkPolicies say who reaches it
    health_path: str = "/health"
    version_path: str = ""
    timeouts: Timeouts = Timeouts()

    def __post_init__(self) -> None:
        names = [route.name for route in self.routes]
        if len(set(names)) != len(names):
            raise InternalError(f"gateway {self.name}: a route is listed twice")
        for host in self.hostnames:
            if _HOSTNAME.fullmatch(host) is None:
                raise InternalError(f"gateway {self.name}: {host!r} is not a host name such as llm.example.com")
        if _UPSTREAM.fullmatch(self.upstream_host) is None:
            raise InternalError(f"gateway {self.name}: upstream {self.upstream_host!r} is not a DNS name")
        if self.timeouts.upstream_idle_seconds >= ENGINE_KEEP_ALIVE_SECONDS:
            raise InternalError(f"gateway {self.name}: engines would close idle connections before the gateway does")


_NAMES = MappingProxyType(
    {
        "certificate": "server_cert",
        "engine_key": "engine_key",
        "api_keys": "api_keys",
        "rbac": "allowlist",
        "routes": "gateway",
        "engine_cluster": "engine",
        "admin_cluster": "self_admin",
        "self_cluster": "self_gateway",
        "engine_host": ENGINE_HOST,
        "client_header": CLIENT_HEADER,
        "marker_header": MARKER_HEADER,
        "anonymous": ANONYMOUS,
    }
)

_FILES = MappingProxyType(
    {
        "lds": f"{DIRECTORIES['xds']}/lds.yaml",
        "rds": f"{DIRECTORIES['xds']}/rds.yaml",
        "rbac": f"{DIRECTORIES['xds']}/rbac.yaml",
        "cds": f"{DIRECTORIES['xds']}/cds.yaml",
        "sds": f"{DIRECTORIES['xds']}/sds.yaml",
        "engine_key_sds": f"{DIRECTORIES['xds']}/engine_key_sds.yaml",
        "api_keys": f"{DIRECTORIES['auth']}/{API_KEYS_FILE}",
        "engine_key": f"{DIRECTORIES['engine']}/api-key",
        "certificate": f"{DIRECTORIES['tls']}/tls.crt",
        "private_key": f"{DIRECTORIES['tls']}/tls.key",
    }
)


def _only_json(value: object) -> object:
    if not isinstance(value, Markup):
        raise InternalError("a template prints a value without tojson")
    return value


_ENVIRONMENT = Environment(
    loader=PackageLoader("securevllm.render"),
    undefined=StrictUndefined,
    finalize=_only_json,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
    auto_reload=False,
)


_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
"""The same safe loader in C: the files of one gateway take 4 ms instead of 40."""


def _duration(seconds: float) -> str:
    """A ``google.protobuf.Duration`` in JSON."""
    return f"{seconds:g}s"


def filled(name: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """A template filled in, and read back as YAML.

    Raises:
        InternalError: it is not a mapping.
    """
    # Compiled when it is needed first, and kept by the environment: not in the way of a start.
    template = _ENVIRONMENT.get_template(f"{name}.j2")
    content = yaml.load(
        template.render(names=_NAMES, files=_FILES, directories=DIRECTORIES, duration=_duration, **values),
        Loader=_LOADER,  # noqa: S506 - a safe one
    )
    if not isinstance(content, dict):
        raise InternalError(f"{name}: not a mapping")
    return content


def _digest(text: str, digits: int) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:digits]


def _versioned(text: str, content: Mapping[str, Any], salt: bytes = b"") -> str:
    """The text of a file, with the version of its content in front."""
    version = hmac.new(salt, json.dumps(content, sort_keys=True).encode(), hashlib.sha256).hexdigest()[:16]
    return f'{{\n "version_info": "{version}",{text.removeprefix("{")}\n'


_NAME, _HOST = "the_name", "the-host"
"""Stand for the two words in which the gateways of like resources differ, until ``_named`` puts those in."""


@functools.lru_cache(maxsize=256)
def _of_a_kind(model: GatewayModel) -> tuple[tuple[str, str], ...]:
    """File name to text without version. To fill in and read the YAML is half of the first reconcile of a resource."""
    websocket = any(route.websocket for route in model.routes)
    values = {
        "model": model,
        "timeouts": model.timeouts,
        "rate": model.requests_per_second_per_client,
        "websocket": websocket,
        "ready_path": READY_PATH,
        "admin_paths": ADMIN_PATHS,
        "scrape_path": SCRAPE_PATH,
        "scraped_path": SCRAPED_PATH,
        "engine_version_path": ENGINE_VERSION_PATH,
        "stripped_headers": STRIPPED_HEADERS,
        "stripped_prefixes": STRIPPED_PREFIXES if websocket else (*STRIPPED_PREFIXES, WEBSOCKET_PREFIX),
    }
    names = (BOOTSTRAP_FILE, *(name for name in XDS_FILES if model.tls or name != "sds.yaml"))
    return tuple((name, json.dumps(filled(name, values), indent=1)) for name in names)


def _named(text: str, model: GatewayModel) -> str:
    # With their quotes: neither is a whole value of anything else, because no host name has '_' or ends with a dot.
    for stand_in, meant in ((_NAME, model.name), (f"{_HOST}.", f"{model.upstream_host}.")):
        text = text.replace(json.dumps(stand_in), json.dumps(meant))
        if stand_in in text:
            raise InternalError(f"gateway {model.name}: {stand_in!r} stands within another value of a template")
    return text


@functools.lru_cache(maxsize=1024)
def envoy_files(model: GatewayModel) -> Mapping[str, str]:
    """Render every file of a gateway but the clients' keys.

    Args:
        model: what to render; equal models give equal text.

    Returns:
        File name to text: bootstrap.yaml for the ``bootstrap`` directory, ``XDS_FILES`` for ``xds`` (without
        sds.yaml when there is no TLS).

    Raises:
        InternalError: the parsed result is not what the model means.
    """
    texts = {name: _named(text, model) for name, text in _of_a_kind(replace(model, name=_NAME, upstream_host=_HOST))}
    parsed = {name: json.loads(text) for name, text in texts.items()}
    wanted = frozenset(
        envoy_check.Entry(route.http_method, "" if route.regex else route.path, route.regex, route.websocket)
        for route in model.routes
    )
    envoy_check.check(
        parsed,
        wanted=wanted,
        authentication=model.authentication,
        engine_version=(ENGINE_VERSION_PATH, model.version_path) if model.version_path else None,
        scraped=(SCRAPE_PATH, SCRAPED_PATH) if model.metrics_port else None,
    )
    bootstrap = texts.pop(BOOTSTRAP_FILE) + "\n"
    versioned = {name: _versioned(text, parsed[name]) for name, text in texts.items()}
    return MappingProxyType({BOOTSTRAP_FILE: bootstrap, **versioned})


def api_keys_file(keys: Sequence[ClientKey], salt: bytes = b"") -> str:
    """Render api_keys.yaml, the content of a Secret.

    Args:
        keys: in any order; repetitions count once. None: everybody gets 401.
        salt: secret. The version is readable on the ops port; with a salt it confirms no guess of a key.

    Returns:
        The text.

    Raises:
        InternalError: an id or a key has characters that a header cannot carry, or two clients have the same key
            (Envoy would print it in its log). Keys are never quoted.
    """
    unique = sorted({(entry.client, entry.key) for entry in keys})
    owners: dict[str, str] = {}
    for client, key in unique:
        if CLIENT_ID.fullmatch(client) is None:
            raise InternalError(f"client id {client!r}: {CLIENT_ID.pattern}")
        if CLIENT_KEY.fullmatch(key) is None:
            raise InternalError(f"the key of client {client!r} does not match {CLIENT_KEY.pattern}")
        if owners.setdefault(key, client) != client:
            raise InternalError(f"clients {owners[key]!r} and {client!r} have the same key")
    credentials = [{"key": key, "client": client} for client, key in unique]
    content = filled(API_KEYS_FILE, {"credentials": credentials})
    if content["resources"][0]["typed_config"]["credentials"] != credentials:
        raise InternalError(f"{API_KEYS_FILE}: the parsed credentials are not those that were given")
    return _versioned(json.dumps(content, indent=1), content, salt)


def revision(files: Mapping[str, str]) -> str:
    """Hash of a set of files, for the nudge annotation and for names of revisions."""
    return _digest(json.dumps(dict(files), sort_keys=True), 16)


def arguments(model: GatewayModel, *, concurrency: int) -> tuple[str, ...]:
    """Command line of the envoy container.

    Args:
        model: whose files are mounted.
        concurrency: worker threads; Envoy's default is the node's cores, not the container's limit.
    """
    return (
        "-c",
        f"{DIRECTORIES['bootstrap']}/{BOOTSTRAP_FILE}",
        "--concurrency",
        str(concurrency),
        # A changed listener drains the old one: no stream may be cut by it.
        "--drain-time-s",
        str(model.stream_seconds),
        "--log-level",
        "warning",
        "--disable-hot-restart",
        # A field that this Envoy does not know rejects the update; the last good one stays.
        "--reject-unknown-dynamic-fields",
    )
