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
from tests.gateway import attacks, wire
from tests.gateway.conftest import KEYS, MODEL, make_certificate
from tests.gateway.engine import serving
from tests.gateway.envoy_process import Envoy, local_model, running

SWAPS = 50
ROUTE = AllowedRoute("POST", "/v1/completions")
ALLOWED = wire.request("GET", "/v1/models")
ASKED = wire.request("POST", "/v1/completions", "content-length: 0")
MINE = wire.request("GET", "/v1/models", key=KEYS[1].key)

NOTES = (
    (
        "swap → enforced: from the rename by which kubelet swaps a volume to the first answer of Envoy, on an open"
        " connection, that follows the new files; routes appear and go, a key is revoked and given back"
    ),
    "failed requests: of a client that keeps asking for an allowed route, over TLS, all that time",
)


def measure(folder: Path) -> Iterator[Measured]:
    """Run it; about ten seconds."""
    with (
        serving() as engine,
        running(
            local_model(MODEL, engine.port),
            root=folder,
            keys=KEYS,
            engine_key=attacks.ENGINE_KEY,
            certificate=make_certificate(),
        ) as envoy,
        _load(envoy.model.listen_port) as statuses,
        wire.Client(envoy.model.listen_port) as client,
    ):
        routes, keys = [], []
        for _ in range(SWAPS):
            routes += [_add_route(envoy, client), _remove_route(envoy, client)]
            keys += [_revoke(envoy, client), _give_back(envoy, client)]
    yield Measured("routes: swap → enforced", tuple(routes), "ms", 300)
    yield Measured("client keys: swap → enforced", tuple(keys), "ms", 300)
    failed = sum(status != 200 for status in statuses)
    yield Measured(f"failed requests of {len(statuses)} meanwhile", (float(failed),), "", 0)


def _add_route(envoy: Envoy, client: wire.Client) -> float:
    envoy.configure(envoy_files(dataclasses.replace(envoy.model, routes=(*envoy.model.routes, ROUTE))))
    return _until(lambda: wire.status_of(client.ask(ASKED)) == 200)


def _remove_route(envoy: Envoy, client: wire.Client) -> float:
    envoy.configure(envoy_files(envoy.model))
    return _until(lambda: wire.status_of(client.ask(ASKED)) in {403, 404})


def _revoke(envoy: Envoy, client: wire.Client) -> float:
    envoy.keys(KEYS[:1])
    return _until(lambda: wire.status_of(client.ask(MINE)) == 401)


def _give_back(envoy: Envoy, client: wire.Client) -> float:
    envoy.keys(KEYS)
    return _until(lambda: wire.status_of(client.ask(MINE)) == 200)


def _until(condition: Callable[[], bool]) -> float:
    """Milliseconds until it holds.

    Raises:
        TimeoutError: not within 10 s.
    """
    began = time.monotonic()
    while not condition():
        if time.monotonic() - began > 10:
            raise TimeoutError("Envoy does not follow its files")
        time.sleep(0.001)
    return (time.monotonic() - began) * 1000


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
