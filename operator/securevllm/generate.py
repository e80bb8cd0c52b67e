"""Secrets with random content: made once, renewed when it is time, never applied from a cache."""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from securevllm import certs
from securevllm.children import Outcome, failed
from securevllm.errors import ApiError, ForeignObject
from securevllm.render import Generated, Made, engine, generated

if TYPE_CHECKING:
    from securevllm.api.kinds import KubeObject
    from securevllm.api.parse import Accepted
    from securevllm.children import Children
    from securevllm.context import Context
    from securevllm.render.meta import Owner

_CHAIN = (Made.CA, Made.TLS)
"""One after the other: the certificate needs the CA."""


@dataclass(frozen=True)
class Secrets:
    """What is there, and what could not be made."""

    data: Mapping[Made, Mapping[str, bytes]]
    outcome: Outcome


class Generator:
    """Makes the generated Secrets of a resource."""

    def __init__(self, children: Children, context: Context, now: Callable[[], datetime]) -> None:
        self._children, self._context, self._now = children, context, now

    async def make(self, owner: Owner, wanted: Accepted) -> Secrets:
        """All of them, side by side where one does not need another."""
        items = list(generated(owner, wanted, self._context))
        chained = [item for item in items if item.made in _CHAIN]
        chains = [chained, *([item] for item in items if item.made not in _CHAIN)]
        results = await asyncio.gather(*(self._make(owner, chain) for chain in chains), return_exceptions=True)
        data: dict[Made, Mapping[str, bytes]] = {}
        outcome = Outcome()
        for result in results:
            if isinstance(result, BaseException):
                raise result  # when nothing is under way any more
            data |= result.data
            outcome += result.outcome
        return Secrets(data, outcome)

    async def _make(self, owner: Owner, chain: Sequence[Generated]) -> Secrets:
        made: dict[Made, Mapping[str, bytes]] = {}
        outcome = Outcome()
        for item in chain:
            try:
                secret = await self._children.make(item.object, owner.uid, self._content(item, made))
                made[item.made] = decode(secret)
            except (ApiError, ForeignObject) as error:
                outcome += failed(item.object, error)
            except (ValueError, KeyError) as error:
                # A person has put something else there, or the CA above failed.
                outcome += failed(item.object, ApiError(f"its content cannot be used: {error}"))
        return Secrets(made, outcome)

    def renewal(self, secrets: Secrets) -> float | None:
        """Seconds until the certificate is due; None without one."""
        leaf = secrets.data.get(Made.TLS)
        return max(1.0, (certs.renewal(leaf) - self._now()).total_seconds()) if leaf else None

    def _content(self, item: Generated, made: Mapping[Made, Mapping[str, bytes]]) -> Callable[[Any], dict[str, str]]:
        def content(current: KubeObject | None) -> dict[str, str]:
            data = decode(current) if current is not None else None
            match item.made:
                case Made.ENGINE_KEY:
                    wanted = {name: value for name, value in (data or {}).items() if value}
                    if engine.KEY not in wanted:
                        # The Secret may be older: a key that was taken out is made anew, and the seal stays.
                        wanted[engine.MADE] = self._now().strftime("%Y-%m-%dT%H:%M:%SZ").encode()
                    for name in (engine.KEY, engine.SEAL, engine.PROBER):
                        wanted.setdefault(name, certs.token().encode())
                case Made.CLIENT_KEYS:
                    # A user may add clients; an emptied Secret gets a key again.
                    wanted = data or {"default": certs.token().encode()}
                case Made.CA:
                    wanted = dict(certs.ca(data, item.object["metadata"]["name"], self._now()))
                case Made.TLS:
                    wanted = dict(certs.leaf(data, made[Made.CA], item.names, self._now()))
            return {name: base64.b64encode(value).decode() for name, value in wanted.items()}

        return content


def key_made(secret: KubeObject) -> float | None:
    """When the engines' key was made, unix seconds: it says so, or it is as old as its Secret; None: there is none."""
    data = decode(secret)
    if not data.get(engine.KEY):
        return None
    for told in (data.get(engine.MADE, b"").decode("ascii", "replace"), secret["metadata"]["creationTimestamp"]):
        with contextlib.suppress(ValueError):
            return datetime.fromisoformat(told).timestamp()
    return None


def decode(secret: KubeObject) -> dict[str, bytes]:
    """Data of a Secret; what is not base64 is empty."""
    decoded = {}
    for name, value in secret.get("data", {}).items():
        try:
            decoded[name] = base64.b64decode(value, validate=True)
        except binascii.Error:
            decoded[name] = b""
    return decoded
