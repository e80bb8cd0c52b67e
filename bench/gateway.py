"""The gateway: how long after its files were swapped a real Envoy does what they say, under load."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from bench.report import Measured
from securevllm.render.envoy import AllowedRoute, envoy_files
from tests.gateway import wire
from tests.gateway.gateway import KEYS, MODEL, make_certificate, started

SWAPS = 50
ROUTE = AllowedRoute("POST", "/v1/completions")
ALLOWED = wire.request("GET", "/v1/models")
ASKED = wire.request("POST", "/v1/completions", "content-length: 0")
MINE = wire.request("GET", "/v1/models", key=KEYS[1].key)

NOTES = (
    (
        "swap → enforced: from before the new files of a volume are written to the first answer of Envoy, on an open"
        " connection, that follows them; routes appear and go, a key is revoked and given back"
    ),
    "failed requests: of a client that keeps asking for an allowed route, over TLS, all that time",
)


def measure(folder: Path) -> Iterator[Measured]:
    """Run it; a few seconds.

    Args:
        folder: an empty one for the gateway's files.
    """
    with (
        started(MODEL, folder, make_certificate()) as gateway,
        _load(gateway.port) as statuses,
        wire.Client(gateway.port) as client,
    ):
        envoy = gateway.envoy
        without = envoy_files(envoy.model)
        more = envoy_files(dataclasses.replace(envoy.model, routes=(*envoy.model.routes, ROUTE)))

        def answer(request: bytes) -> int:
            return wire.status_of(client.ask(request))

        routes, keys = [], []
        for _ in range(SWAPS):
            routes.append(_seconds(lambda: envoy.configure(more), lambda: answer(ASKED) == 200))
            routes.append(_seconds(lambda: envoy.configure(without), lambda: answer(ASKED) in {403, 404}))
            keys.append(_seconds(lambda: envoy.keys(KEYS[:1]), lambda: answer(MINE) == 401))
            keys.append(_seconds(lambda: envoy.keys(KEYS), lambda: answer(MINE) == 200))
    yield Measured("routes: swap → enforced", tuple(routes), "s", 0.3)
    yield Measured("client keys: swap → enforced", tuple(keys), "s", 0.3)
    failed = sum(status != 200 for status in statuses)
    yield Measured(f"failed requests of {len(statuses)} meanwhile", (float(failed),), "", 0)


def _seconds(change: Callable[[], object], done: Callable[[], bool]) -> float:
    """Seconds from before a change until it is done.

    Raises:
        TimeoutError: not within 10 s.
    """
    began = time.monotonic()
    change()
    while not done():
        if time.monotonic() - began > 10:
            raise TimeoutError("Envoy does not follow its files")
        time.sleep(0.001)
    return time.monotonic() - began


@contextmanager
def _load(port: int) -> Iterator[list[int]]:
    statuses: list[int] = []
    stop = threading.Event()

    def ask() -> None:
        with wire.Client(port) as client:
            while not stop.wait(0.005):
                try:
                    statuses.append(wire.status_of(client.ask(ALLOWED)))
                except OSError:
                    statuses.append(0)

    thread = threading.Thread(target=ask)
    thread.start()
    try:
        yield statuses
    finally:
        stop.set()
        thread.join()
