"""The operator's only HTTP server: health, readiness, leadership, metrics.

    /healthz   the process can do its work; failing means: restart it
    /readyz    the leader has seen all objects, a standby can read the Lease; failing means: not Ready
    /leadz     200 on the leader that has seen all objects, 503 elsewhere
    /metrics   Prometheus

That `/healthz` answers at all shows that the event loop runs; its checks show the rest. Reasons are plain text, one
line per check. No request body is read, and nothing here needs or shows a secret.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

from aiohttp import web
from prometheus_client.exposition import choose_encoder

from securevllm.proof.dial import accepting

if TYPE_CHECKING:
    from prometheus_client import CollectorRegistry

Check = Callable[[], str | None]
"""Why something is not well, in one line; None when it is."""


def report(checks: Mapping[str, Check]) -> tuple[bool, str]:
    """Ask every check; whether all are well, and a line for each.

    A check that raises counts as not well: a health endpoint must answer in any case.
    """
    lines = []
    well = True
    for name, check in checks.items():
        try:
            problem = check()
        except Exception as error:  # noqa: BLE001 - the endpoint must answer whatever breaks
            problem = f"{type(error).__name__}: {error}"
        well = well and problem is None
        lines.append(f"[+]{name} ok" if problem is None else f"[-]{name} failed: {problem}")
    return well, "\n".join(lines) + "\n"


class HttpServer:
    """Serves while it is entered: ``async with HttpServer(...) as server``.

    Args:
        healthz: checks of ``/healthz``.
        readyz: checks of ``/readyz``.
        leadz: checks of ``/leadz``.
        registry: what ``/metrics`` shows.
        host: address to listen on; ``::`` is both families.
        port: 0 takes a free one, see `port`.

    Raises:
        OSError: the address is in use.
    """

    def __init__(
        self,
        *,
        healthz: Mapping[str, Check],
        readyz: Mapping[str, Check],
        leadz: Mapping[str, Check],
        registry: CollectorRegistry,
        host: str,
        port: int,
    ) -> None:
        self._address = host, port
        self._registry = registry
        app = web.Application()
        app.router.add_get("/healthz", _answering(healthz))
        app.router.add_get("/readyz", _answering(readyz))
        app.router.add_get("/leadz", _answering(leadz))
        app.router.add_get("/metrics", self._metrics)
        app.on_response_prepare.append(_anonymous)
        # No access log: probes and scrapes every few seconds would drown everything else.
        self._runner = web.AppRunner(app, access_log=None, shutdown_timeout=1.0)

    async def __aenter__(self) -> Self:
        await self._runner.setup()
        host, port = self._address
        try:
            await web.SockSite(self._runner, accepting(host, port)).start()
        except OSError:
            await self._runner.cleanup()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def port(self) -> int:
        """The port that is listened on."""
        port: int = self._runner.addresses[0][1]
        return port

    async def _metrics(self, request: web.Request) -> web.Response:
        encode, content_type = choose_encoder(request.headers.get("Accept", ""))
        return web.Response(body=encode(self._registry), headers={"Content-Type": content_type})


def _answering(checks: Mapping[str, Check]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_request: web.Request) -> web.Response:
        well, text = report(checks)
        return web.Response(text=text, status=HTTPStatus.OK if well else HTTPStatus.SERVICE_UNAVAILABLE)

    return answer


async def _anonymous(_request: web.Request, response: web.StreamResponse) -> None:
    # The default names Python's and aiohttp's exact versions.
    response.headers["Server"] = "securevllm"
