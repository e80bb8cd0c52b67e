# ruff: noqa: E501 - one attack is one line
"""Requests that try to reach an engine past the allowlist, as bytes.

The attacker holds a valid client key, unless the category is ``auth``. Every request, smuggled ones included, carries
``x-attack: <id>``, so that what the engine sees can be traced. ``reaches`` is how many requests the engine may see;
each of them must be an allowlisted one with nothing in it that the gateway had to take out.

The allowlist that they are aimed at is ``ALLOWED``.
"""

# ruff: noqa: E501 - one attack is one line
from __future__ import annotations

from dataclasses import dataclass

from securevllm.render.envoy import STRIPPED_HEADERS, AllowedRoute

KEY = "client-key-aaaaaaaaaaaaaaaaaaaaaaaa"
OTHER_KEY = "client-key-bbbbbbbbbbbbbbbbbbbbbbbb"
ENGINE_KEY = "engine-key-eeeeeeeeeeeeeeeeeeeeeeee"
BODY_LIMIT = 1 << 20

ALLOWED = (
    AllowedRoute("GET", "/v1/models"),
    AllowedRoute("POST", "/v1/chat/completions", streaming=True),
    AllowedRoute("POST", "/v1/embeddings"),
    AllowedRoute("GET", "/v1/responses/{response_id}"),
    AllowedRoute("POST", "/v1/responses/{response_id}/cancel"),
)


@dataclass(frozen=True)
class Attack:
    """One connection's worth of bytes.

    Attributes:
        category: row of the report.
        name: what is tried.
        data: ``@ID@`` stands for the attack's id.
        reaches: how many requests the engine sees.
        aborted: the body breaks off in a way that Envoy may notice before or after it opened the upstream request; the
            engine may then also see nothing, and the client never sees a success.
    """

    category: str
    name: str
    data: bytes
    reaches: int = 0
    aborted: bool = False


def _request(line: bytes, *headers: bytes, body: bytes = b"", key: str | None = KEY, close: bool = True) -> bytes:
    fields = [b"x-attack: @ID@"]
    if not any(header.lower().startswith(b"host:") for header in headers):
        fields.append(b"host: gateway")
    if key is not None:
        fields.append(b"authorization: Bearer " + key.encode())
    fields.extend(headers)
    if close:
        fields.append(b"connection: close")
    return b"\r\n".join([line + b" HTTP/1.1", *fields, b"", body])


_GET = b"GET /v1/models"
_POST = b"POST /v1/chat/completions"
_INNER = _request(b"POST /pause", b"content-length: 0")
_BODY = b'{"model": "m"}'


def _sized(body: bytes) -> bytes:
    return b"content-length: %d" % len(body)


_FORBIDDEN = ((b"POST", b"/pause"), (b"GET", b"/metrics"), (b"POST", b"/v1/load_lora_adapter"))

# {p}: path; {r}: path without its first slash; {f}: first letter percent-encoded; {e}: every byte percent-encoded;
# {d}: the same, encoded twice; {u}: upper case
_PATH_TRICKS = [
    "{p}",
    "/{p}",
    "//{p}",
    "/.{p}",
    "/./.{p}",
    "/v1/..{p}",
    "/v1/models/../..{p}",
    "/v1/models/..{p}",
    "/v1/../v1/..{p}",
    "/v1//..{p}",
    "{p}/",
    "{p}//",
    "{p}/.",
    "{p}/..",
    "{p}/./",
    "{p}?",
    "{p}?a=b",
    "{p}?/v1/models",
    "{p};",
    "{p};a=b",
    "{p};/v1/models",
    "{p}.",
    "{p}%2e",
    "/%2e%2e{p}",
    "/%2e{p}",
    "/.%2e{p}",
    "/%2e.{p}",
    "/v1/%2e%2e{p}",
    "/v1/models/%2e%2e/%2e%2e{p}",
    "/v1/.%2e{p}",
    "/{f}",
    "/v1/../{f}",
    "{e}",
    "/{e}",
    "{d}",
    "/%2f{r}",
    "%2f{r}",
    "/v1/models%2f..%2f..{p}",
    "/v1%2f..{p}",
    "/v1/..%2f{r}",
    "/%2f%2f{r}",
    "/v1/models/%2e%2e%2f%2e%2e%2f{r}",
    "/%252e%252e{p}",
    "/%252f{r}",
    "/v1/%252e%252e/{r}",
    "\\{r}",
    "/\\{r}",
    "/v1\\..\\{r}",
    "/v1/models\\..\\..\\{r}",
    "/v1/models/..\\..{p}",
    "/%5c{r}",
    "/v1%5c..%5c{r}",
    "{p}%00",
    "{p}%00.html",
    "{p}%20",
    "{p}%09",
    "{p}%0a",
    "{p}%0d%0a",
    "{p}%23",
    "{p}%3f",
    "{p}%3b",
    "{p}%c0%ae",
    "/%c0%af{r}",
    "/%u002f{r}",
    "/%ef%bc%8f{r}",
    "/..;{p}",
    "/v1/..;{p}",
    "/v1/models/..;/..;{p}",
    "/;{p}",
    "/;a=b{p}",
    "/v1;x/..{p}",
    "/v1/models;/..{p}",
    "/.;{p}",
    "{u}",
    "/v1/chat/completions/../../..{p}",
    "/v1/responses/..{p}",
    "/v1/responses/../..{p}",
    "/v1/responses/a/../../..{p}",
    "http://gateway{p}",
    "http://gateway/{p}",
    "https://gateway{p}",
    "http://127.0.0.1{p}",
    "http://user@gateway{p}",
    "http://{p}",
    "//gateway{p}",
    "///gateway{p}",
    "ftp://gateway{p}",
    "{p}#x",
    "#{p}",
    "{r}",
    "*{p}",
    "?{p}",
    "..{p}",
    ".{p}",
    "~{p}",
]


def _paths() -> list[Attack]:
    found = []
    for method, path in _FORBIDDEN:
        text = path.decode()
        every = "".join(f"%{byte:02x}" for byte in path[1:])
        values = {
            "p": text,
            "r": text[1:],
            "f": f"%{path[1]:02x}{text[2:]}",
            "e": f"/{every}",
            "d": f"/{every.replace('%', '%25')}",
            "u": text.upper(),
        }
        tricks = [trick.format(**values).encode() for trick in _PATH_TRICKS]
        raw = [
            path + b"\x00",
            path + b"\x80",
            path + b"\xff",
            path + b" x",
            b"\t" + path,
            path + b"\x7f",
            path + b"\x0b",
        ]
        body = () if method == b"GET" else (b"content-length: 0",)
        found += [
            Attack("path", f"{method!r} {trick!r}", _request(b"%s %s" % (method, trick), *body))
            for trick in tricks + raw
        ]
    # The same tricks around an allowed path: either it is normalised before matching *and* before forwarding, or refused.
    same = (
        b"/v1/%6dodels",
        b"/v1/./models",
        b"/v1/x/../models",
        b"/%76%31/models",
        b"/v1\\models",
        b"/v1/models?x=/../../pause",
    )
    other = (
        b"//v1/models /v1//models /v1/models/ /v1/models// /V1/models /v1/Models /v1/models;a=b /v1;a=b/models /v1/models%20"
        b" /v1/models%2f /v1%2fmodels /v1/models%00 /v1/models. /v1/models%3fx /v1/modelsX /v1/model /v1/models/x /v1 / /v1/"
        b" /v1/chat/completions http://gateway/v1/models /metrics?/v1/models /v1/models%2f..%2fload"
    ).split(b" ")
    found += [Attack("path", f"same {path!r}", _request(b"GET " + path), reaches=1) for path in same]
    found += [Attack("path", f"near {path!r}", _request(b"GET " + path)) for path in other]
    variable = b"/v1/responses/"
    bad = (
        b". .. ../x %2e%2e %2e a.b a;b a/b a/b/c a%2fb a%5cb a%00 a%0d%0a a%20b a%25 a:b a@b a+b a,b a'b {id} * $x ~a "
        + b"x" * 129
        + " é a%c3%a9".encode()
    ).split(b" ")
    found += [Attack("path", f"variable {value[:20]!r}", _request(b"GET " + variable + value)) for value in bad]
    good = (b"resp_1", b"x" * 128, b"A-b_9", b"%61bc")
    found += [
        Attack("path", f"variable {value[:20]!r} is fine", _request(b"GET " + variable + value), reaches=1)
        for value in good
    ]
    found += [
        Attack("path", "cancel", _request(b"POST " + variable + b"a/cancel", b"content-length: 0"), reaches=1),
        Attack("path", "GET cancel", _request(b"GET " + variable + b"a/cancel")),
        Attack("path", "cancel of a parent", _request(b"POST " + variable + b"../cancel", b"content-length: 0")),
        Attack("path", "cancel below", _request(b"POST " + variable + b"a/cancel/x", b"content-length: 0")),
        Attack("path", "empty id", _request(b"POST " + variable + b"/cancel", b"content-length: 0")),
    ]
    return found


def _methods() -> list[Attack]:
    verbs = b"HEAD OPTIONS TRACE PUT PATCH DELETE PROPFIND MKCOL LOCK QUERY FOO get Get GETX PRI SEARCH CONNECT".split(
        b" "
    )
    found = [
        Attack("method", f"{verb!r} on GET", _request(verb + b" /v1/models", b"content-length: 0")) for verb in verbs
    ]
    found += [
        Attack("method", f"{verb!r} on POST", _request(verb + b" /v1/chat/completions", b"content-length: 0"))
        for verb in verbs
    ]
    preflight = (b"origin: https://evil.example", b"access-control-request-method: POST")
    found += [
        Attack("method", "preflight", _request(b"OPTIONS /v1/chat/completions", *preflight)),
        Attack("method", "preflight of a forbidden path", _request(b"OPTIONS /pause", *preflight)),
        Attack("method", "preflight without key", _request(b"OPTIONS /v1/models", *preflight, key=None)),
        Attack("method", "OPTIONS *", _request(b"OPTIONS *")),
        Attack("method", "CONNECT authority", _request(b"CONNECT 127.0.0.1:8000")),
        Attack("method", "CONNECT engine", _request(b"CONNECT vllm.internal:80")),
        Attack("method", "GET on POST", _request(b"GET /v1/chat/completions")),
        Attack("method", "POST on GET", _request(b"POST /v1/models", b"content-length: 0")),
        Attack("method", "two spaces", _request(b"GET  /v1/models"), reaches=1),
        Attack("method", "tab", _request(b"GET\t/v1/models"), reaches=1),
        Attack("method", "leading space", _request(b" GET /v1/models")),
        Attack("method", "no method", _request(b"/v1/models")),
    ]
    return found


def _framing() -> list[Attack]:
    inner = b"0\r\n\r\n" + _INNER

    def post(*headers: bytes, body: bytes = _BODY) -> bytes:
        return _request(_POST, *headers, body=body, close=False)

    chunked = b"transfer-encoding: chunked"
    one = b"%x\r\n%s\r\n" % (len(_BODY), _BODY)
    tests: list[tuple[str, bytes, int]] = [
        ("CL.TE", post(_sized(inner), chunked, body=inner), 0),
        ("TE.CL", post(chunked, b"content-length: 4", body=b"%x\r\n%s\r\n0\r\n\r\n" % (len(_INNER), _INNER)), 0),
        ("CL 0 and a body", post(b"content-length: 0", body=_INNER), 1),
        ("two CL, differing", post(b"content-length: 0", _sized(_INNER), body=_INNER), 0),
        ("two CL, equal", post(_sized(_BODY), _sized(_BODY)), 0),
        ("chunked, complete, then another request", post(chunked, body=one + b"0\r\n\r\n" + _INNER), 1),
        ("chunk extension", post(chunked, body=b"e;x=y\r\n%s\r\n0\r\n\r\n" % _BODY + _INNER), 1),
        ("trailers", post(chunked, body=one + b"0\r\nx-trailer: 1\r\nauthorization: Bearer x\r\n\r\n"), 1),
    ]
    tests += [
        (f"CL {value!r}", post(b"content-length: " + value), 0)
        for value in (
            b"+14",
            b"-1",
            b"0x0e",
            b"1 4",
            b"14,14",
            b"14, 15",
            b"18446744073709551617",
            b"1e1",
            b"",
            b"14;",
            b"\x0014",
            b"abc",
        )
    ]
    tests += [
        (f"TE {value!r}", post(b"transfer-encoding:" + value, _sized(inner), body=inner), 0)
        for value in (
            b" chunked", b" xchunked", b" identity", b" gzip, chunked", b" chunked, identity", b" chunked, chunked", b" CHUNKED",
            b"\tchunked", b" chunked\t", b"\x0bchunked", b' "chunked"', b" chunked;q=1", b" x\r\n chunked", b"", b" ,chunked", b" deflate",
        )
    ]  # fmt: skip
    tests += [
        (f"TE alone {value!r}", post(b"transfer-encoding:" + value, body=inner), 0)
        for value in (
            b" xchunked",
            b" identity",
            b" gzip, chunked",
            b" chunked, identity",
            b"\x0bchunked",
            b' "chunked"',
            b" chunked, x",
        )
    ]
    tests += [
        ("TE twice", post(chunked, chunked, body=inner), 0),
        ("TE twice, differing", post(chunked, b"transfer-encoding: identity", body=inner), 0),
        ("TE with a space before the colon", post(b"transfer-encoding : chunked", _sized(inner), body=inner), 0),
        ("TE with an underscore", post(b"transfer_encoding: chunked", _sized(inner), body=inner), 0),
        ("CL with a space before the colon", post(b"content-length : 14"), 0),
        ("CL folded", post(b"content-length:\r\n 14"), 1),
        ("leading space on a header", post(b" content-length: 14"), 0),
    ]
    broken = [
        (f"chunk size {size!r}", post(chunked, body=size + b"\r\n" + _BODY + b"\r\n" + inner))
        for size in (
            b"-1",
            b"+e",
            b"0xe",
            b"g",
            b"",
            b" e",
            b"ffffffffffffffffe",
            b"10000000000000000",
            b"e\x00",
            b"1_0",
        )
    ]
    broken += [
        ("chunk size ends with LF", post(chunked, body=b"e\n%s\r\n0\r\n\r\n" % _BODY + _INNER)),
        ("chunk size ends with CR", post(chunked, body=b"e\r%s\r\n0\r\n\r\n" % _BODY + _INNER)),
        ("chunk extension with LF", post(chunked, body=b"e;x\n%s\r\n0\r\n\r\n" % _BODY + _INNER)),
    ]
    tests += [
        ("chunk longer than its size", post(chunked, body=b"3\r\n" + _BODY + b"\r\n" + inner), 1),
        ("chunk ends with LF", post(chunked, body=b"e\r\n%s\n0\r\n\r\n" % _BODY + _INNER), 1),
        ("GET with CL body", _request(_GET, _sized(_INNER), body=_INNER, close=False), 0),
        (
            "GET with chunked body",
            _request(_GET, chunked, body=b"%x\r\n%s\r\n%s" % (len(_INNER), _INNER, inner), close=False),
            1,
        ),
        ("GET with CL 0", _request(_GET, b"content-length: 0", body=_INNER, close=False), 0),
        ("GET then a forbidden one", _request(_GET, close=False) + _INNER, 1),
        ("a forbidden one then GET", _request(b"GET /metrics", close=False) + _request(_GET), 1),
        ("ten pipelined", _request(_GET, close=False) * 9 + _INNER, 9),
        ("HEAD with a body", _request(b"HEAD /v1/models", _sized(_INNER), body=_INNER), 0),
        ("expect, body at once", post(b"expect: 100-continue", _sized(_BODY)), 1),
        ("expect, body is a request", post(b"expect: 100-continue", b"content-length: 0", body=_INNER), 1),
        ("unknown expectation", post(b"expect: 200-ok", _sized(_BODY)), 1),
        ("NUL in a header value", _request(_GET, b"x-a: a\x00b"), 0),
        ("NUL in a header name", _request(_GET, b"x-\x00a: b"), 0),
        ("space in a header name", _request(_GET, b"x a: b"), 0),
        ("header without colon", _request(_GET, b"nonsense"), 0),
        ("empty header name", _request(_GET, b": x"), 0),
        ("CR in a header value", _request(_GET, b"x-a: a\rPOST /pause HTTP/1.1\r\rx"), 1),
        ("high bytes in a header name", _request(_GET, b"x-\xe9: b"), 0),
        ("bare LF headers", _request(_GET).replace(b"\r\n", b"\n"), 1),
        ("leading CRLF", b"\r\n" + _request(_GET), 1),
        ("leading LF", b"\n" + _request(_GET), 1),
        ("HTTP/1.0", _request(_GET).replace(b"HTTP/1.1", b"HTTP/1.0"), 0),
        (
            "HTTP/1.0 keep-alive",
            _request(_GET, b"connection: keep-alive").replace(b"HTTP/1.1", b"HTTP/1.0") + _INNER,
            0,
        ),
        ("HTTP/0.9", b"GET /v1/models\r\n\r\n", 0),
        ("HTTP/1.2", _request(_GET).replace(b"HTTP/1.1", b"HTTP/1.2"), 0),
        ("HTTP/2.0 in HTTP/1", _request(_GET).replace(b"HTTP/1.1", b"HTTP/2.0"), 0),
        ("HTTP/1.1x", _request(_GET).replace(b"HTTP/1.1", b"HTTP/1.1x"), 0),
        ("http/1.1", _request(_GET).replace(b"HTTP/1.1", b"http/1.1"), 0),
        ("no version", _request(_GET).replace(b" HTTP/1.1", b""), 0),
        ("second request line as header", _request(_GET, b"POST /pause HTTP/1.1"), 0),
        ("body shorter than CL", post(b"content-length: 100"), 1),
        ("HTTP/2 preface", b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _INNER, 0),
    ]
    return [
        *(Attack("framing", name, data, reaches) for name, data, reaches in tests),
        *(Attack("framing", name, data, reaches=1, aborted=True) for name, data in broken),
    ]


def _upgrades() -> list[Attack]:
    websocket = (
        b"upgrade: websocket",
        b"connection: upgrade",
        b"sec-websocket-key: dGhlIHNhbXBsZSBub25jZQ==",
        b"sec-websocket-version: 13",
    )
    h2c = (b"upgrade: h2c", b"connection: upgrade, http2-settings", b"http2-settings: AAMAAABkAAQAoAAAAAIAAAAA")
    tests: list[tuple[str, bytes, int]] = [
        (f"websocket {path!r}", _request(b"GET " + path, *websocket, close=False) + _INNER, 0)
        for path in (b"/v1/realtime", b"/v1/models", b"/pause", b"/v1/realtime?model=m", b"/v1/responses/a")
    ]
    tests += [
        ("websocket by POST", _request(_POST, *websocket, b"content-length: 0", close=False) + _INNER, 0),
        ("Websocket", _request(b"GET /v1/realtime", b"upgrade: WebSocket", *websocket[1:], close=False) + _INNER, 0),
        ("h2c on an allowed path", _request(_GET, *h2c, close=False) + _INNER, 1),
        ("h2c on a forbidden path", _request(b"GET /metrics", *h2c, close=False) + _INNER, 0),
        ("connect-udp", _request(_GET, b"upgrade: connect-udp", b"connection: upgrade", close=False) + _INNER, 0),
        ("TLS/1.0", _request(_GET, b"upgrade: TLS/1.0", b"connection: upgrade", close=False) + _INNER, 0),
        ("list", _request(_GET, b"upgrade: h2c, websocket", b"connection: upgrade", close=False) + _INNER, 0),
        ("upgrade without connection", _request(_GET, b"upgrade: websocket", close=False) + _INNER, 1),
    ]
    return [Attack("upgrade", name, data, reaches) for name, data, reaches in tests]


def _hosts() -> list[Attack]:
    accepted = (
        b"vllm.internal", b"evil.example", b"127.0.0.1", b"localhost:8000", b"gateway.", b"gateway:99999", b"[::1]:80", b"GATEWAY", b"user:pass@gateway", b"a,b", b"",
    )  # fmt: skip
    refused = (b"a b", b"a\x00b", b"a/b", b"a\\b", b"x?", b"x#", b"x/health?")
    found = [Attack("host", f"{host!r}", _request(_GET, b"host: " + host), reaches=1) for host in accepted]
    found += [Attack("host", f"{host!r}", _request(_GET, b"host: " + host)) for host in refused]
    found += [
        Attack("host", "two hosts", _request(_GET, b"host: gateway", b"host: evil.example"), reaches=1),
        Attack("host", "no host", _request(_GET).replace(b"host: gateway\r\n", b"")),
        Attack("host", "x-forwarded-host", _request(_GET, b"x-forwarded-host: evil.example"), reaches=1),
        Attack("host", "a forbidden path by host", _request(b"GET /metrics", b"host: vllm.internal")),
    ]
    return found


def _headers() -> list[Attack]:
    spoofed = [
        *STRIPPED_HEADERS,
        "x-envoy-upstream-rq-timeout-ms",
        "x-envoy-original-path",
        "x-envoy-internal",
        "x-envoy-external-address",
        "x-envoy-retry-on",
        "x-envoy-force-trace",
        "x-envoy-decorator-operation",
        "x-envoy-max-retries",
        "x-vllm-priority",
        "x-vllm-anything",
        "x-amzn-sagemaker-adapter-identifier",
        "x-amzn-sagemaker-session-id",
        "x-amzn-sagemaker-custom-attributes",
        "x-forwarded-client-cert",
        "X-Gateway-Client",
        "X-ENVOY-Retry-On",
        "X-Vllm-Priority",
        "X-AMZN-SageMaker-Target-Model",
        "sec-websocket-key",
        "sec-websocket-protocol",
        "x-api-key",
    ]
    found = [
        Attack("header", name, _request(_GET, f"{name}: forged".encode(), f"{name}: forged".encode()), reaches=1)
        for name in spoofed
        if name != "te"
    ]
    found += [
        Attack("header", f"{name!r} for a path", _request(b"GET /v1/models", name + b": /pause"), reaches=1)
        for name in (
            b"x-original-url",
            b"x-rewrite-url",
            b"x-envoy-original-path",
            b"x-forwarded-prefix",
            b"x-forwarded-uri",
        )
    ]
    found += [
        Attack("header", f"underscore {name!r}", _request(_GET, name + b": forged"))
        for name in (b"x_gateway_client", b"author_ization", b"x_request_id", b"content_length", b"x-vllm_priority")
    ]
    found += [
        Attack("header", f"hop-by-hop {name!r}", _request(_GET, b"connection: " + name, close=False), reaches=reaches)
        for name, reaches in (
            (b"authorization", 0),
            (b"close, authorization", 0),
            (b"x-gateway-client", 1),
            (b"x-request-id", 1),
            (b"keep-alive, te", 1),
            (b"host", 0),
            (b":method", 0),
        )
    ]
    found += [
        Attack("header", "te: trailers", _request(_GET, b"te: trailers"), reaches=1),
        Attack("header", "method override to POST /pause", _request(b"GET /v1/models?_method=POST", b"x-http-method-override: POST"), reaches=1),
        Attack("header", "pseudo header in HTTP/1", _request(_GET, b":path: /pause")),
        Attack("header", "pseudo method in HTTP/1", _request(_GET, b":method: POST")),
        Attack("header", "client id of another", _request(_GET, b"x-gateway-client: other"), reaches=1),
    ]  # fmt: skip
    return found


def _auth() -> list[Attack]:
    values = (
        None, b"", b"Bearer", b"Bearer ", b"Bearer wrong", b"bearer " + KEY.encode(), b"BEARER " + KEY.encode(),
        b"Basic " + KEY.encode(), b"Bearer " + KEY.encode()[:-1], b"Bearer " + KEY.encode() + b"x", b"Bearer " + KEY.upper().encode(),
        b"Bearer " + KEY.encode() + b"," + OTHER_KEY.encode(), b"Bearer wrong, Bearer " + KEY.encode(), b"Bearer  " + KEY.encode(),
        b"Bearer " + ENGINE_KEY.encode(), ENGINE_KEY.encode(), b"Token " + KEY.encode(), b"Bearer *", b"Bearer null", b"Bearer undefined",
    )  # fmt: skip
    found = []
    for value in values:
        headers = () if value is None else (b"authorization: " + value,)
        found.append(Attack("auth", f"{value!r}", _request(_GET, *headers, key=None)))
    found += [
        Attack("auth", f"{place!r}", _request(line, *headers, key=None))
        for place, line, headers in (
            ("query api_key", b"GET /v1/models?api_key=" + KEY.encode(), ()),
            ("query access_token", b"GET /v1/models?access_token=" + KEY.encode(), ()),
            ("query key", b"GET /v1/models?key=" + KEY.encode(), ()),
            ("cookie", _GET, (b"cookie: authorization=" + KEY.encode(),)),
            ("proxy-authorization", _GET, (b"proxy-authorization: Bearer " + KEY.encode(),)),
            ("api-key", _GET, (b"api-key: " + KEY.encode(),)),
            ("two authorizations", _GET, (b"authorization: Bearer wrong", b"authorization: Bearer " + KEY.encode())),
            ("two good authorizations", _GET, (b"authorization: Bearer " + KEY.encode(),) * 2),
            (
                "a wrong one before a good x-api-key",
                _GET,
                (b"authorization: Bearer wrong", b"x-api-key: " + KEY.encode()),
            ),
            ("client id instead of a key", _GET, (b"x-gateway-client: alice",)),
            ("client id and a wrong key", _GET, (b"x-gateway-client: alice", b"authorization: Bearer wrong")),
            ("x-api-key engine key", _GET, (b"x-api-key: " + ENGINE_KEY.encode(),)),
            ("forbidden path", b"GET /metrics", ()),
            ("health", b"GET /health", ()),
        )
    ]
    found += [
        Attack("auth", "x-api-key", _request(_GET, b"x-api-key: " + KEY.encode(), key=None), reaches=1),
        Attack("auth", "x-api-key twice", _request(_GET, *(b"x-api-key: " + KEY.encode(),) * 2, key=None), reaches=1),
        Attack("auth", "a bare key", _request(_GET, b"authorization: " + KEY.encode(), key=None), reaches=1),
        Attack("auth", "both headers", _request(_GET, b"x-api-key: " + OTHER_KEY.encode()), reaches=1),
    ]
    return found


def _sizes() -> list[Attack]:
    big = b"x" * (BODY_LIMIT + 1)
    return [
        Attack("size", "one header of 40 KiB", _request(_GET, b"x-a: " + b"a" * 40960)),
        Attack("size", "headers of 100 KiB", _request(_GET, *(b"x-%d: " % n + b"a" * 2000 for n in range(50)))),
        Attack("size", "70 headers", _request(_GET, *(b"x-%d: a" % n for n in range(70)))),
        Attack("size", "path of 40 KiB", _request(b"GET /v1/models?" + b"a" * 40960)),
        Attack("size", "path of 16 KiB", _request(b"GET /v1/models?" + b"a" * 16384), reaches=1),
        Attack("size", "body over the limit", _request(_POST, _sized(big), body=big)),
        Attack("size", "body announced over the limit", _request(_POST, b"content-length: 99999999999")),
    ]


def h1_attacks() -> tuple[Attack, ...]:
    """All of them, in a stable order; names are unique per category."""
    found = (*_paths(), *_methods(), *_framing(), *_upgrades(), *_hosts(), *_headers(), *_auth(), *_sizes())
    return tuple(found)
