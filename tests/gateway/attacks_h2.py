# ruff: noqa: E501 - one attack is one line
"""HTTP/2 requests that try to reach an engine past the allowlist, frame by frame.

Frames are built without a client that would refuse to send them. Header blocks are not Huffman-coded, so that ``@ID@``
can be replaced in the bytes. See ``attacks`` for what ``reaches`` and ``aborted`` mean.
"""

# ruff: noqa: E501 - one attack is one line
from __future__ import annotations

import struct
from collections.abc import Sequence

import hpack
from hpack.exceptions import HPACKError

from tests.gateway.attacks import ENGINE_KEY, KEY, Attack

_PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_DATA, _HEADERS, _PRIORITY, _RESET, _SETTINGS, _PUSH, _PING, _GOAWAY, _WINDOW, _CONTINUATION = range(10)
_END_STREAM, _END_HEADERS, _PADDED = 0x1, 0x4, 0x8

Header = tuple[str | bytes, str | bytes]


def frame(kind: int, flags: int, stream: int, payload: bytes = b"") -> bytes:
    """One HTTP/2 frame (RFC 9113, 4.1)."""
    return struct.pack("!I", len(payload))[1:] + struct.pack("!BBI", kind, flags, stream) + payload


def parse_frames(data: bytes) -> list[tuple[int, int, int, bytes]]:
    """Kind, flags, stream and payload of each complete frame."""
    found, at = [], 0
    while at + 9 <= len(data):
        length = int.from_bytes(data[at : at + 3], "big")
        kind, flags, stream = struct.unpack_from("!BBI", data, at + 3)
        found.append((kind, flags, stream, data[at + 9 : at + 9 + length]))
        at += 9 + length
    return found


def statuses(data: bytes) -> list[int]:
    """Status codes of the answers, in order; what cannot be decoded counts as none."""
    decoder, found = hpack.Decoder(), []
    for kind, _, _, payload in parse_frames(data):
        if kind == _HEADERS:
            try:
                found += [int(value) for name, value in decoder.decode(payload, raw=True) if name == b":status"]
            except HPACKError:
                break
    return found


class _Connection:
    """Collects the bytes of one connection, with its header compression state."""

    def __init__(self) -> None:
        self.data = _PREFACE + frame(_SETTINGS, 0, 0)
        self._encoder = hpack.Encoder()

    def block(self, headers: Sequence[Header]) -> bytes:
        return self._encoder.encode(list(headers), huffman=False)

    def headers(
        self, headers: Sequence[Header], *, stream: int = 1, flags: int = _END_STREAM | _END_HEADERS
    ) -> _Connection:
        return self.add(_HEADERS, flags, stream, self.block(headers))

    def body(self, data: bytes, *, stream: int = 1, flags: int = _END_STREAM) -> _Connection:
        return self.add(_DATA, flags, stream, data)

    def add(self, kind: int, flags: int, stream: int, payload: bytes = b"") -> _Connection:
        self.data += frame(kind, flags, stream, payload)
        return self


def _request(method: str = "GET", path: str = "/v1/models", *more: Header, key: str | None = KEY) -> list[Header]:
    fields: list[Header] = [(":method", method), (":scheme", "https"), (":authority", "gateway"), (":path", path)]
    fields.append(("x-attack", "@ID@"))
    if key is not None:
        fields.append(("authorization", f"Bearer {key}"))
    return [*fields, *more]


def _without(name: str) -> list[Header]:
    return [field for field in _request() if field[0] != name]


def _paths() -> list[Attack]:
    paths = (
        "/pause", "//pause", "/./pause", "/v1/../pause", "/v1/models/../../pause", "/%70ause", "/%2e%2e/pause", "/v1/%2e%2e/pause",
        "/v1/..%2fpause", "/%2fpause", "\\pause", "/v1\\..\\pause", "/pause;x", "/v1/models;/../pause", "/..;/pause", "/pause%00",
        "/pause#/v1/models", "/pause?/v1/models", "pause", "*", "http://gateway/pause", "/metrics", "/v1/models/", "/V1/models", "/health",
        "/v1/models /pause", "/v1/models HTTP/1.1\r\nhost: x\r\n\r\nGET /pause", "/v1/models\x00", "/v1/models\n", "/v1/models\t", "",
    )  # fmt: skip
    found = [Attack("h2 path", f"{path!r}", _Connection().headers(_request("GET", path)).data) for path in paths]
    return [
        *found,
        Attack("h2 path", "normalised", _Connection().headers(_request("GET", "/v1/x/../%6dodels")).data, 1),
    ]


def _methods() -> list[Attack]:
    methods = (
        "HEAD", "OPTIONS", "TRACE", "PUT", "PATCH", "DELETE", "FOO", "get", "PRI", "POST", "CONNECT", "GET ", "", "GET\r\nx: y",
        "POST /pause HTTP/1.1\r\nhost: x\r\n\r\nGET",
    )  # fmt: skip
    found = [Attack("h2 method", f"{method!r}", _Connection().headers(_request(method)).data) for method in methods]
    connect: list[Header] = [
        (":method", "CONNECT"),
        (":authority", "127.0.0.1:8000"),
        ("authorization", f"Bearer {KEY}"),
    ]
    extended = [*_request("CONNECT", "/v1/models"), (":protocol", "websocket")]
    found += [
        Attack("h2 method", "CONNECT without path", _Connection().headers(connect, flags=_END_HEADERS).data),
        Attack("h2 method", "CONNECT without key", _Connection().headers(connect[:2], flags=_END_HEADERS).data),
        Attack("h2 method", "extended CONNECT", _Connection().headers(sorted(extended), flags=_END_HEADERS).data),
    ]
    return found


def _pseudo_headers() -> list[Attack]:
    late = [*_without(":path"), (":path", "/pause")]
    tests: list[tuple[str, list[Header], int]] = [
        ("plain", _request(), 1),
        ("two paths", [(":path", "/pause"), *_request()], 0),
        ("two methods", [(":method", "POST"), *_request()], 0),
        ("two authorities", [(":authority", "evil"), *_request()], 0),
        ("two schemes", [(":scheme", "http"), *_request()], 0),
        ("late path", late, 0),
        ("no path", _without(":path"), 0),
        ("no method", _without(":method"), 0),
        ("no scheme", _without(":scheme"), 0),
        ("unknown pseudo header", [(":x", "y"), *_request()], 0),
        ("a response's pseudo header", [(":status", "200"), *_request()], 0),
        ("host differs", _request("GET", "/v1/models", ("host", "evil.example")), 1),
        ("no authority but host", [*_without(":authority"), ("host", "gateway")], 1),
        ("no authority", _without(":authority"), 0),
        ("scheme with a path", [(":scheme", "https://x/pause?"), *_without(":scheme")], 0),
        ("authority with a path", [(":authority", "gateway/pause"), *_without(":authority")], 0),
        ("authority with CRLF", [(":authority", "a\r\nx: y"), *_without(":authority")], 0),
        ("authority with userinfo", [(":authority", "u:p@gateway"), *_without(":authority")], 0),
        ("evil authority", [(":authority", "evil.example"), *_without(":authority")], 1),
    ]
    return [Attack("h2 pseudo", name, _Connection().headers(headers).data, reaches) for name, headers, reaches in tests]


def _headers() -> list[Attack]:
    tests: list[tuple[Header, int]] = [
        (("x-a", "b\r\nauthorization: Bearer forged"), 0),
        (("x-a", "b\nc"), 0),
        (("x-a", "b\rc"), 0),
        (("x-a", "b\x00c"), 0),
        (("x-a\r\nx-b", "c"), 0),
        (("x-a: b\r\nx", "c"), 0),
        (("X-A", "b"), 0),
        (("x a", "b"), 0),
        (("x-a:", "b"), 0),
        (("", "b"), 0),
        (("transfer-encoding", "chunked"), 0),
        (("connection", "close"), 0),
        (("connection", "authorization"), 0),
        (("keep-alive", "1"), 0),
        (("proxy-connection", "close"), 0),
        (("upgrade", "h2c"), 0),
        (("te", "gzip"), 0),
        (("te", "trailers"), 1),
        (("x_gateway_client", "forged"), 0),
        (("x-gateway-client", "forged"), 1),
        (("x-request-id", "forged"), 1),
        (("x-envoy-original-path", "/pause"), 1),
        (("x-vllm-priority", "forged"), 1),
        (("x-amzn-sagemaker-session-id", "forged"), 1),
        (("x-http-method-override", "POST"), 1),
        (("cookie", "a=forged"), 1),
        (("x-api-key", "forged"), 1),
        (("content-length", "5"), 0),
        (("content-length", "-1"), 0),
        (("content-length", "0x5"), 0),
        (("content-length", "99999999999999999999"), 0),
        (("authorization", f"Bearer {KEY}"), 0),
        (("authorization", "Bearer wrong"), 0),
        (("x-a", "a" * 40000), 0),
    ]
    found = []
    for (name, value), reaches in tests:
        shown = f"{name!r}: {value[:30]!r}"
        found.append(
            Attack(
                "h2 header", shown, _Connection().headers(_request("GET", "/v1/models", (name, value))).data, reaches
            )
        )
    many: list[Header] = [(f"x-{number}", "a") for number in range(70)]
    return [*found, Attack("h2 header", "70 headers", _Connection().headers(_request("GET", "/v1/models", *many)).data)]


def _auth() -> list[Attack]:
    values = (
        None,
        "",
        "Bearer",
        "Bearer wrong",
        f"bearer {KEY}",
        f"Bearer {ENGINE_KEY}",
        f"Bearer {KEY}, Bearer {KEY}",
        f"Bearer  {KEY}",
    )
    found = []
    for value in values:
        more: tuple[Header, ...] = () if value is None else (("authorization", value),)
        data = _Connection().headers(_request("GET", "/v1/models", *more, key=None)).data
        found.append(Attack("h2 auth", f"{value!r}", data))
    return found


def _frames() -> list[Attack]:
    post = _request("POST", "/v1/chat/completions")
    sized = [*post, ("content-length", "5")]
    inner = b"POST /pause HTTP/1.1\r\nhost: x\r\nx-attack: @ID@\r\ncontent-length: 0\r\n\r\n"
    open_ = _END_HEADERS
    trailers: list[Header] = [("authorization", "Bearer forged"), (":path", "/pause")]
    split = _Connection()
    block = split.block(_request())
    split.add(_HEADERS, _END_STREAM, 1, block[:9]).add(_CONTINUATION, _END_HEADERS, 1, block[9:])
    two = (
        _Connection()
        .headers(_request("GET", "/metrics"))
        .headers(_request(), stream=3)
        .headers(_request("POST", "/pause"), stream=5)
    )
    tests: list[tuple[str, _Connection, int, bool]] = [
        ("body", _Connection().headers(post, flags=open_).body(b"{}"), 1, False),
        ("body that looks like a request", _Connection().headers(post, flags=open_).body(inner), 1, False),
        ("GET with a body that looks like a request", _Connection().headers(_request(), flags=open_).body(inner), 1, False),
        ("content-length too small", _Connection().headers(sized, flags=open_).body(b"123456" + inner), 1, True),
        ("content-length too large", _Connection().headers(sized, flags=open_).body(b"123"), 1, True),
        ("two content-lengths", _Connection().headers([*sized, ("content-length", "6")], flags=open_).body(b"12345"), 0, False),
        ("trailers", _Connection().headers(post, flags=open_).body(b"{}", flags=0).headers(trailers[:1]), 1, False),
        ("pseudo header in trailers", _Connection().headers(post, flags=open_).body(b"{}", flags=0).headers(trailers[1:]), 1, True),
        ("trailers that do not end", _Connection().headers(post, flags=open_).headers(trailers[:1], flags=open_), 1, True),
        ("continuation", split, 1, False),
        ("continuation without headers", _Connection().add(_CONTINUATION, _END_HEADERS, 1, block), 0, False),
        ("unfinished header block", _Connection().add(_HEADERS, _END_STREAM, 1, block[:9]).headers(_request(), stream=3), 0, False),
        ("allowed between forbidden ones", two, 1, False),
        ("stream 0", _Connection().headers(_request(), stream=0), 0, False),
        ("even stream", _Connection().headers(_request(), stream=2), 0, False),
        ("data on an idle stream", _Connection().body(inner), 0, False),
        ("padding longer than the frame", _Connection().add(_HEADERS, _END_HEADERS | _END_STREAM | _PADDED, 1, b"\xff" + block), 0, False),
        ("frame over the maximum", _Connection().headers(post, flags=open_).body(b"x" * 20000), 1, True),
        ("push promise", _Connection().add(_PUSH, _END_HEADERS, 1, b"\x00\x00\x00\x02" + block), 0, False),
        ("stream depends on itself", _Connection().add(_PRIORITY, 0, 1, b"\x00\x00\x00\x01\x10").headers(_request()), 1, False),
        ("unknown frame", _Connection().add(0x42, 0, 0, b"x" * 9).headers(_request()), 1, False),
        ("bad header index", _Connection().add(_HEADERS, _END_HEADERS | _END_STREAM, 1, b"\xff\xff\xff\xff\x0f"), 0, False),
        ("reset at once", _Connection().headers(post, flags=open_).add(_RESET, 0, 1, b"\x00\x00\x00\x08"), 1, True),
        ("window of zero", _Connection().add(_WINDOW, 0, 0, b"\x00\x00\x00\x00").headers(_request()), 0, False),
        ("bad settings", _Connection().add(_SETTINGS, 0, 0, b"\x00\x05\x00\x00\x00\x01").headers(_request()), 0, False),
        ("settings of odd length", _Connection().add(_SETTINGS, 0, 0, b"\x00\x05").headers(_request()), 0, False),
        ("enable connect protocol", _Connection().add(_SETTINGS, 0, 0, b"\x00\x08\x00\x00\x00\x01").headers(_request("CONNECT")), 0, False),
    ]  # fmt: skip
    found = [Attack("h2 frame", name, made.data, reaches, aborted) for name, made, reaches, aborted in tests]
    pings, settings, empty, resets = _Connection(), _Connection(), _Connection(), _Connection()
    empty.headers(post, flags=open_)
    for number in range(3000):
        pings.add(_PING, 0, 0, b"12345678")
        settings.add(_SETTINGS, 0, 0, b"\x00\x03\x00\x00\x00\x64")
        empty.body(b"", flags=0)
        resets.headers(_request("GET", "/metrics"), stream=2 * number + 1)
        resets.add(_RESET, 0, 2 * number + 1, b"\x00\x00\x00\x08")
    flood = _Connection().add(_HEADERS, _END_STREAM, 1, block[:9])
    for _ in range(300):
        flood.add(_CONTINUATION, 0, 1, b"\x00\x01a\x01b" * 100)
    return [
        *found,
        Attack("h2 flood", "pings", pings.data),
        Attack("h2 flood", "settings", settings.data),
        Attack("h2 flood", "empty data", empty.data, 1, aborted=True),
        Attack("h2 flood", "resets of forbidden requests", resets.data),
        Attack("h2 flood", "continuations", flood.data),
    ]


def h2_attacks() -> tuple[Attack, ...]:
    """All of them, in a stable order."""
    return (*_paths(), *_methods(), *_pseudo_headers(), *_headers(), *_auth(), *_frames())
