"""Logging: one line per record, JSON or for a terminal, with secrets taken out.

Everything goes through one handler: structlog's own loggers and those of the standard library (kopf, aiohttp,
asyncio). Context variables (`key`, `reconcile`) are added to every record of a task.

Secrets are kept out twice: values under a name that sounds like a secret are replaced, and every value given to
`register_secret` is replaced wherever it turns up, in texts, names, exceptions, and escaped or base64 forms of it.
"""

from __future__ import annotations

import base64
import json
import logging
import re
import sys
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, TextIO

import structlog

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

LogFormat = Literal["json", "console"]

REDACTED = "[redacted]"

SHORTEST_SECRET = 8
"""Shorter values are not registered: replacing them everywhere would make every line unreadable."""

_SENSITIVE_NAME = re.compile(
    r"(token|secret|password|passphrase|passwd|authorization|credential|cookie|bearer"
    r"|(api|engine|client|private|signing|secret|access)[-_ ]?key)s?$",
    re.IGNORECASE,
)
_PLAIN_TYPES = (int, float, bool, type(None))


class Redactor:
    """Replaces registered values in texts; time per text does not grow with the number of values."""

    def __init__(self) -> None:
        self._by_start: dict[str, set[str]] = {}

    def register(self, value: str) -> None:
        """Take a value out of everything from now on, also in escaped and base64 forms.

        Values shorter than `SHORTEST_SECRET` are ignored.
        """
        encoded = base64.b64encode(value.encode("utf-8", "surrogatepass")).decode()
        forms = {value, encoded, encoded.rstrip("="), repr(value)[1:-1], ascii(value)[1:-1]}
        forms |= {json.dumps(value, ensure_ascii=ensure)[1:-1] for ensure in (True, False)}
        for form in forms:
            if len(form) >= SHORTEST_SECRET and len(value) >= SHORTEST_SECRET:
                self._by_start.setdefault(form[:SHORTEST_SECRET], set()).add(form)

    def text(self, text: str) -> str:
        """The text without any registered value."""
        if not self._by_start:
            return text
        parts: list[str] = []
        kept = position = 0
        while position <= len(text) - SHORTEST_SECRET:
            candidates = self._by_start.get(text[position : position + SHORTEST_SECRET], ())
            found = max((len(form) for form in candidates if text.startswith(form, position)), default=0)
            if found:
                parts += [text[kept:position], REDACTED]
                kept = position = position + found
            else:
                position += 1
        return "".join([*parts, text[kept:]])

    def value(self, value: Any) -> Any:
        """The same for a value of any type; what is not plain data becomes its redacted text."""
        if isinstance(value, str):
            return self.text(value)
        if isinstance(value, _PLAIN_TYPES):
            return value
        if isinstance(value, Mapping):
            # Keys and certificates are in `data` of a Secret, whatever their names.
            hidden = {"data", "stringData"} if value.get("kind") == "Secret" else set()
            return {
                self.text(str(name)): REDACTED if _sensitive(str(name), item, hidden) else self.value(item)
                for name, item in value.items()
            }
        if isinstance(value, list | tuple | set | frozenset):
            return [self.value(item) for item in value]
        return self.text(repr(value))


def _sensitive(name: str, value: Any, hidden: Iterable[str]) -> bool:
    # Numbers and flags are counts and switches (max_tokens), not secrets.
    return name in hidden or (_SENSITIVE_NAME.search(name) is not None and not isinstance(value, _PLAIN_TYPES))


_redactor = Redactor()


def register_secret(value: str) -> None:
    """Never let this value, or an encoded form of it, into the log. See `Redactor.register`."""
    _redactor.register(value)


def redact(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Processor: the last one before the renderer, so that exceptions are texts by then."""
    redacted: EventDict = _redactor.value(event)
    return redacted


def configure(log_format: LogFormat, level: str = "INFO", stream: TextIO | None = None) -> None:
    """Send all logging of this process to `stream` (stderr when None).

    Args:
        log_format: ``json`` for machines, ``console`` for people.
        level: lowest level, for example ``DEBUG``. Chatty libraries stay one level above it.
        stream: where lines go.
    """
    stream = stream or sys.stderr
    shared: list[Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.add_log_level,
        structlog.stdlib.PositionalArgumentsFormatter(),
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.StackInfoRenderer(),
        structlog.processors.format_exc_info,
    ]
    renderer: Processor = (
        structlog.processors.JSONRenderer()
        if log_format == "json"
        else structlog.dev.ConsoleRenderer(
            colors=stream.isatty(), exception_formatter=structlog.dev.plain_traceback, sort_keys=False
        )
    )
    handler = logging.StreamHandler(stream)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(
            foreign_pre_chain=shared,
            processors=[structlog.stdlib.ProcessorFormatter.remove_processors_meta, redact, renderer],
        )
    )
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
    for name in ("kopf", "aiohttp", "asyncio", "kubernetes", "client"):
        library = logging.getLogger(name)
        library.handlers.clear()
        library.propagate = True
        library.setLevel(max(logging.getLevelName(level), logging.WARNING))
    structlog.configure(
        processors=[*shared, structlog.stdlib.ProcessorFormatter.wrap_for_formatter],
        logger_factory=structlog.stdlib.LoggerFactory(),
        wrapper_class=structlog.stdlib.BoundLogger,
        cache_logger_on_first_use=False,
    )
