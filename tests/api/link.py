"""The network between an operator and the API server, as a TCP proxy on loopback that a test can cut.

What is in flight when the network falls silent arrives when it is back, also of a client that has given up meanwhile:
so does TCP. It is what fences and preconditions are for.
"""

from __future__ import annotations

import asyncio
import threading
from contextlib import suppress
from enum import Enum, auto
from typing import Self

_CHUNK = 1 << 16


class Cut(Enum):
    """What is wrong with the network."""

    REFUSED = auto()
    """Connections break, and new ones too: a firewall that rejects, a load balancer without a server."""

    SILENT = auto()
    """Nothing gets through, and nobody is told."""

    DEAF = auto()
    """Requests arrive and are carried out; the answers do not come back."""


class Link:
    """Listens on a port of its own and forwards to the API server; a context manager.

    Args:
        port: of the API server on 127.0.0.1.
    """

    def __init__(self, port: int) -> None:
        self._to = port
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="link")
        self._server: asyncio.Server
        self._refuses = False
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._up, self._down = asyncio.Event(), asyncio.Event()
        self.port = 0

    def cut(self, how: Cut | None) -> None:
        """Cut it from now on; None: mend it."""
        asyncio.run_coroutine_threadsafe(self._cut(how), self._loop).result(10)

    def __enter__(self) -> Self:
        self._thread.start()
        asyncio.run_coroutine_threadsafe(self._start(), self._loop).result(10)
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._stop(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _start(self) -> None:
        self._up.set()
        self._down.set()
        self._server = await asyncio.start_server(self._forward, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _stop(self) -> None:
        self._server.close()
        self._abort()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _cut(self, how: Cut | None) -> None:
        self._refuses = how is Cut.REFUSED
        if self._refuses:
            self._abort()
        for event, cuts in ((self._up, {Cut.SILENT}), (self._down, {Cut.SILENT, Cut.DEAF})):
            if how in cuts:
                event.clear()
            else:
                event.set()

    def _abort(self) -> None:
        for writer in self._writers:
            writer.transport.abort()

    async def _forward(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self._writers.add(writer)
        there: asyncio.StreamWriter | None = None
        try:
            if self._refuses:
                return
            back, there = await asyncio.open_connection("127.0.0.1", self._to)
            self._writers.add(there)
            await asyncio.gather(_pump(reader, there, self._up), _pump(back, writer, self._down))
        except (OSError, asyncio.CancelledError):
            pass  # the API server is away, or the test ends
        finally:
            for end in (writer, there):
                if end is not None:
                    self._writers.discard(end)
                    end.transport.abort()
            self._tasks.discard(task)


async def _pump(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, passes: asyncio.Event) -> None:
    with suppress(ConnectionError):
        while data := await reader.read(_CHUNK):
            await passes.wait()
            writer.write(data)
            await writer.drain()
    # The end of one direction is the end of both: nobody here half-closes.
    await passes.wait()
    writer.close()
