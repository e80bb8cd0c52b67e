"""Other ways to write a path that some server, proxy or parser might read as the same one."""

from __future__ import annotations

import re
from collections.abc import Callable
from urllib.parse import quote

from securevllm import catalogue

Spelling = Callable[[str], str]


def _encoded(path: str) -> str:
    """Every letter percent-encoded, slashes left."""
    return "".join(char if char == "/" else f"%{ord(char):02x}" for char in path)


def _wide(path: str) -> str:
    """Full-width letters, which some libraries fold to ASCII."""
    return "".join(chr(ord(char) + 0xFEE0) if char.isalpha() and char.isascii() else char for char in path)


SPELLINGS: dict[str, Spelling] = {
    "itself": lambda path: path,
    "upper case": str.upper,
    "capital": lambda path: path[:1] + path[1:].capitalize(),
    "swapped case": lambda path: path[:2] + path[2:].swapcase(),
    "slash at the end": lambda path: f"{path}/",
    "two slashes at the end": lambda path: f"{path}//",
    "two slashes before": lambda path: f"/{path}",
    "doubled slashes": lambda path: path.replace("/", "//"),
    "dot before": lambda path: f"/.{path}",
    "dot at the end": lambda path: f"{path}/.",
    "up from below": lambda path: f"{path}/x/..",
    "up from beside": lambda path: f"/v1/..{path}",
    "up by encoded dots": lambda path: f"/v1/%2e%2e{path}",
    "up by an encoded slash": lambda path: f"/v1/..%2f{path[1:]}",
    "first letter encoded": lambda path: f"/%{ord(path[1]):02x}{path[2:]}",
    "last letter encoded": lambda path: f"{path[:-1]}%{ord(path[-1]):02x}",
    "all letters encoded": _encoded,
    "slashes encoded": lambda path: f"/{quote(path[1:], safe='')}",
    "encoded twice": lambda path: f"/%25{ord(path[1]):02x}{path[2:]}",
    "encoded as unicode": lambda path: f"/%u00{ord(path[1]):02x}{path[2:]}",
    "overlong slash": lambda path: path.replace("/", "/%c0%af", 1),
    "backslash": lambda path: path.replace("/", "\\"),
    "backslash encoded": lambda path: path.replace("/", "%5c"),
    "full width": _wide,
    "full width encoded": lambda path: quote(_wide(path)),
    "matrix parameter": lambda path: f"{path};a=b",
    "empty matrix parameter": lambda path: f"{path};",
    "matrix parameter before": lambda path: f"/;{path}",
    "query": lambda path: f"{path}?a=b",
    "query encoded": lambda path: f"{path}%3fa=b",
    "fragment": lambda path: f"{path}#a",
    "fragment encoded": lambda path: f"{path}%23a",
    "NUL": lambda path: f"{path}%00",
    "space": lambda path: f"{path}%20",
    "tab": lambda path: f"{path}%09",
    "line feed": lambda path: f"{path}%0a",
    "carriage return": lambda path: f"{path}%0d%0a",
    "soft hyphen": lambda path: f"{path}%c2%ad",
}
"""By name; each makes another text of a path that begins with a slash."""

METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE")
"""Methods that a spec can name."""

NEVER = sorted({re.sub(r"\{.*?\}", "abc", route.path) for route in catalogue.routes() if route.never})
"""Every path that is never opened, of every version, with something in place of its parameters."""

TEMPLATES = (
    *("/{path}", "/{a}/{b}", "/{a}/{b}/{c}", "/{a}/{b}/{c}/{d}", "/v1/{path}", "/v1/{a}/{b}", "/v1/chat/{path}"),
    *("/v1/chat/completions/{path}", "/v2/{path}", "/inference/v1/{path}", "/inference/{a}/{b}", "/adapters/{name}"),
    *("/adapters/{adapter_name}", "/{adapters}/x", "/fault_tolerance/{path}", "/docs/{path}", "/static/{file}"),
    *("/metrics{path}", "/metrics/{path}", "/v1/load_{what}", "/{path}adapters", "/v1/{load_lora_adapter}"),
    *("/{}", "/{{path}}", "/{path:path}", "/{path:.*}", "/{*path}", "/{path}/", "/v1/responses/{response_id}/{path}"),
)
"""Templates that a router of some kind would match with such a path."""
