"""Asks gateways for what they must refuse, with a key of the prober's own. Edge.

Without a key everything is 401, and only authentication would be measured. A gateway's own answers carry a marker; an
answer without it came from an engine. Requests are such that an engine would refuse them as well.

TLS is verified against the very certificate that the gateways mount, because a user's own need not be valid for any
name of the Service: the key goes to nobody else.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import aiohttp

from securevllm.proof.verdict import Asked, Question
from securevllm.render import envoy

if TYPE_CHECKING:
    from securevllm.gateways import Pod
    from securevllm.proof.targets import Request

_TIMEOUT = aiohttp.ClientTimeout(total=5.0)
_REFUSALS = frozenset({401, 403, 404})
_AT_ONCE = 8
_SILENT = 2
"""Requests in a row without an answer after which a gateway is not asked any more in this round."""


@dataclass(frozen=True)
class Asking:
    """How the gateways of a resource are asked.

    Attributes:
        port: of the clients' listener.
        certificate: PEM of what they serve; empty: plain HTTP.
        key: the prober's; empty: nobody needs one.
        requests: what they must refuse.
    """

    port: int
    certificate: str
    key: str = field(repr=False)
    requests: tuple[Request, ...]


class Asks(Protocol):
    """Asks gateways."""

    async def __call__(self, pods: Sequence[Pod], asking: Asking) -> list[Question]:
        """What came of every request to every gateway."""


class HttpAsks:
    """`Asks` over HTTP."""

    def __init__(self, session: aiohttp.ClientSession) -> None:
        self._session = session
        self._slots = asyncio.Semaphore(_AT_ONCE)

    async def __call__(self, pods: Sequence[Pod], asking: Asking) -> list[Question]:
        """See `Asks`."""
        trust = trusting(asking.certificate) if asking.certificate else None
        answers = await asyncio.gather(*(self._gateway(pod, asking, trust) for pod in pods))
        return [question for questions in answers for question in questions]

    async def _gateway(self, pod: Pod, asking: Asking, trust: ssl.SSLContext | None) -> list[Question]:
        # One after the other: the prober is a client with a limit like any other.
        questions, silent = [], 0
        async with self._slots:
            for request in asking.requests:
                # A gateway on a node that is lost would hold up the round, and all that waits for it, for minutes.
                asked = await self._ask(pod, asking, request, trust) if silent < _SILENT else None
                silent = 0 if asked is not None else silent + 1
                questions.append(
                    Question(pod.name, request.method, request.path, request.keyed, asked or Asked.UNCLEAR)
                )
        return questions

    async def _ask(self, pod: Pod, asking: Asking, request: Request, trust: ssl.SSLContext | None) -> Asked | None:
        """What came of one request; None: no answer."""
        host = f"[{pod.address}]" if ":" in pod.address else pod.address
        url = f"{'https' if trust else 'http'}://{host}:{asking.port}{request.path}"
        headers = {"Authorization": f"Bearer {asking.key}"} if request.keyed and asking.key else {}
        try:
            async with self._session.request(
                request.method,
                url,
                headers=headers,
                data=request.body or None,
                ssl=trust or False,
                allow_redirects=False,
                timeout=_TIMEOUT,
            ) as answer:
                return judged(answer.status, request, asking, marked=envoy.MARKER_HEADER in answer.headers)
        except (aiohttp.ClientError, TimeoutError, OSError):
            return None


def judged(status: int, request: Request, asking: Asking, *, marked: bool) -> Asked:
    """What an answer says."""
    if not marked:
        return Asked.PASSED
    if status not in _REFUSALS:
        return Asked.UNCLEAR
    # 401 with a key: the gateway does not know it yet, and nothing but authentication was measured.
    if request.keyed and asking.key and status == 401:  # noqa: PLR2004 - HTTP
        return Asked.UNCLEAR
    return Asked.REFUSED


def trusting(certificate: str) -> ssl.SSLContext:
    """A context that trusts these certificates and no other, whatever name they are for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    context.load_verify_locations(cadata=certificate)
    return context


def unanswered(pods: Iterable[Pod]) -> list[Question]:
    """Gateways that cannot be asked at all."""
    return [Question(pod.name, "", "", keyed=False, asked=Asked.UNCLEAR) for pod in pods]
