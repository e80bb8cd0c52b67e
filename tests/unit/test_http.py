from __future__ import annotations

import socket

import aiohttp
import pytest

from securevllm.http import Check, HttpServer, report
from securevllm.metrics import Metrics


def server(checks: dict[str, Check] | None = None, port: int = 0, host: str = "127.0.0.1") -> HttpServer:
    checks = {"leader": lambda: None} if checks is None else checks
    metrics = Metrics("1.2.3")
    return HttpServer(healthz=checks, readyz=checks, leadz=checks, registry=metrics.registry, host=host, port=port)


async def get(port: int, path: str, method: str = "GET", host: str = "127.0.0.1") -> tuple[int, str, dict[str, str]]:
    async with (
        aiohttp.ClientSession() as session,
        session.request(method, f"http://{host}:{port}{path}", headers={"Accept": "text/plain"}) as response,
    ):
        return response.status, await response.text(), dict(response.headers)


def broken() -> str | None:
    raise RuntimeError("no")


def test_a_report_has_a_line_per_check_and_survives_a_broken_one() -> None:
    checks: dict[str, Check] = {"leader": lambda: None, "watch": lambda: "too old", "queue": broken}

    assert report(checks) == (False, "[+]leader ok\n[-]watch failed: too old\n[-]queue failed: RuntimeError: no\n")
    assert report({}) == (True, "\n")


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/leadz"])
async def test_endpoints_say_why(path: str) -> None:
    problem: list[str | None] = [None]
    async with server({"leader": lambda: problem[0]}) as running:
        assert (await get(running.port, path))[:2] == (200, "[+]leader ok\n")
        problem[0] = "held by b"
        assert (await get(running.port, path))[:2] == (503, "[-]leader failed: held by b\n")


async def test_the_ipv6_wildcard_is_both_families() -> None:
    async with server(host="::") as running:
        assert [(await get(running.port, "/healthz", host=host))[0] for host in ("127.0.0.1", "[::1]")] == [200, 200]


async def test_metrics_are_served_and_no_version_is_told() -> None:
    async with server() as running:
        status, text, headers = await get(running.port, "/metrics")

    assert status == 200
    assert 'securevllm_build_info{version="1.2.3"} 1.0' in text
    assert headers["Content-Type"].startswith("text/plain")
    assert headers["Server"] == "securevllm"


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/", 404), ("POST", "/healthz", 405)])
async def test_nothing_else_is_served(method: str, path: str, status: int) -> None:
    async with server() as running:
        assert (await get(running.port, path, method))[0] == status


async def test_a_port_in_use_is_an_error() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(OSError, match="Address already in use"):
            async with server(port=taken.getsockname()[1]):
                pass
