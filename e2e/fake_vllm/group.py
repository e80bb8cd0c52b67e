"""How the processes of one model replica find each other: the head's store, the mesh of all ranks, and who is missing.

As in vLLM: everybody dials the head's fixed port; the head tells where its random sockets are; every rank publishes
where its own sockets are; every pair that talks in vLLM connects; and nobody is ready before all are. A member that
comes back to a group that was whole is not answered: only a restart of the whole group mends it.
"""

from __future__ import annotations

import asyncio
import functools
import socket
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from e2e.fake_vllm.wire import Address, Link, LostError, StartError, bound, log, own_address, place, reach, serve, shown
from e2e.fake_vllm.world import World, port_of

if TYPE_CHECKING:
    import argparse

    from securevllm.catalogue import Socket

_TIMEOUT = 600
"""Seconds for all of start-up without --distributed-timeout-seconds: that of NCCL's process group in torch."""
_REPEAT = 5.0
_DONE = "done"


class _Store:
    """The head's memory: what ranks published."""

    def __init__(self) -> None:
        self._values: dict[str, dict[int, Any]] = defaultdict(dict)
        self._changed = asyncio.Condition()

    async def put(self, name: str, values: Mapping[int, Any]) -> None:
        async with self._changed:
            self._values[name] |= values
            self._changed.notify_all()

    async def all(self, name: str, ranks: int) -> dict[int, Any]:
        """Values of all ranks; waits for them."""
        async with self._changed:
            await self._changed.wait_for(lambda: len(self._values[name]) == ranks)
            return dict(self._values[name])

    def known(self, name: str) -> dict[int, Any]:
        return dict(self._values[name])

    def missing(self, name: str, ranks: int) -> list[int]:
        return [rank for rank in range(ranks) if rank not in self._values[name]]


class Group:
    """This process's part in its group.

    Attributes:
        whole: set once every rank has reached every other.
        deadline: end of start-up, on ``time.monotonic()``.
        lost: set when a connection of a whole group ended: it serves no more, and does not mend by itself.
    """

    def __init__(self, world: World, args: argparse.Namespace, env: Mapping[str, str]) -> None:
        self.world = world
        self.whole = asyncio.Event()
        self.lost = asyncio.Event()
        self._args = args
        self._env = env
        self._store = _Store()
        self._joined: set[int] = set()
        self._servers: list[asyncio.Server] = []
        self._own: dict[str, dict[int, Address]] = defaultdict(dict)
        self._all: dict[str, dict[int, Address]] = {}
        self._kept: list[Link] = []
        self._broken = asyncio.Event()
        self._members: list[Link] = []
        self._tasks: set[asyncio.Task[None]] = set()
        timeout = getattr(args, "distributed_timeout_seconds", None) or _TIMEOUT  # older releases have no such flag
        self.deadline = time.monotonic() + timeout

    # ------------------------------------------------------------------------------------------------- listening

    async def listen(self, row: Socket, number: int, handler: Any) -> Address:
        """Open one socket of a row.

        Args:
            row: of the catalogue.
            number: rank or data rank that it belongs to; it moves the port of a row with one port for each rank.
            handler: for each connection.
        """
        server = self.bind(row, number)
        self._servers.append(await serve(server, handler))
        address = reachable(server, self._env)
        self._own[row.name][number] = address
        return address

    def bind(self, row: Socket, number: int = 0) -> socket.socket:
        """A row's socket, bound and not yet listening."""
        first, last = port_of(row, self._args, self._env)
        if row.per == "rank":
            first, last = first + number, first + number
        server = bound(place(row, self._args, self._env), first, last)
        log.info("%s (%s) of rank %d listens on %s", row.name, row.speaks, number, shown(server.getsockname()[:2]))
        return server

    def own(self, name: str) -> Mapping[int, Address]:
        """Where a row's sockets of this process are, by rank."""
        return self._own[name]

    def addresses(self, name: str) -> list[Address]:
        """Where a row's sockets are: those of the whole group at the head, the own ones elsewhere."""
        known = self._all if self.world.head and name in self._all else self._own
        return [known[name][rank] for rank in sorted(known[name])]

    # ------------------------------------------------------------------------------------------------- gathering

    async def gather(self) -> None:
        """Wait until the group is whole.

        Raises:
            StartError: the head refuses, somebody went, or the time is over.
        """
        if self.world.alone:
            for row in self._mesh():
                await self._listen_everywhere(row)
        else:
            gathering = asyncio.create_task(self._gather())
            failing = asyncio.create_task(self._broken.wait())
            left = self.deadline - time.monotonic() + _REPEAT  # who dials says more about what is missing
            done, _ = await asyncio.wait({gathering, failing}, timeout=left, return_when=asyncio.FIRST_COMPLETED)
            failing.cancel()
            if gathering not in done:
                gathering.cancel()
                raise StartError("connection closed by a peer" if done else "timed out waiting for the group")
            try:
                await gathering
            except LostError as error:
                raise StartError(f"connection closed by a peer: {error}") from error
        self.whole.set()

    async def _gather(self) -> None:
        rows = self.world.meeting_rows()
        if not rows or rows[0].random:
            raise StartError(f"vLLM {self.world.version}: the catalogue names no port at which such a group meets")
        if self.world.head:
            await self._open_head(rows)
        found = await self._meet(rows)
        store = next(link for row, link in found if row.speaks == "TCPStore")
        mesh = self._mesh()
        for row in mesh:
            await self._listen_everywhere(row)
        for name, own in list(self._own.items()):
            await store.ask({"op": "put", "name": name, "values": own})
        for row in mesh:
            await self._wait(store, row.name, f"{row.name} addresses of all ranks")
            await self._connect(row)
        await store.ask({"op": "put", "name": _DONE, "values": dict.fromkeys(self.world.ranks, True)})
        await self._wait(store, _DONE, "all ranks to have reached each other")
        if self.world.head:
            names = [row.name for row in self.world.rows() if row.when == self.world.connector]
            self._all |= {
                name: {rank: _address(value) for rank, value in self._store.known(name).items()} for name in names
            }
        for _, link in found:
            self._spawn(self._held(link))

    def _mesh(self) -> list[Socket]:
        """Sockets of each rank for the other ranks; some are there without any other."""
        whens = {"always", "ranks", "group", "nodes"}
        return [row for row in self.world.rows() if row.on == "every" and row.when in whens]

    async def _listen_everywhere(self, row: Socket) -> None:
        for rank in self.world.ranks:
            await self.listen(row, rank, functools.partial(self._peer, row, rank))

    async def _open_head(self, rows: Sequence[Socket]) -> None:
        for row in rows:
            await self.listen(row, 0, functools.partial(self._head, row))

    async def _meet(self, rows: Sequence[Socket]) -> list[tuple[Socket, Link]]:
        """Reach each of the head's sockets; the random ones are where the first fixed one says."""
        found: list[tuple[Socket, Link]] = []
        told: dict[str, list[Any]] = {}
        for row in rows:
            fixed = (self.world.head_host, port_of(row, self._args, self._env)[0])
            address = (str(told[row.name][0]), int(told[row.name][1])) if row.random else fixed
            link = await reach(address, f"the head's {row.name}", self.deadline)
            hello = {"op": "hello", "ranks": list(self.world.ranks), "total": self.world.total}
            hello |= {"headless": not self.world.http, "head": self.world.head, "separate": self.world.local_engines}
            answer = await self._patiently(link.ask(hello), f"the head's {row.name} to answer")
            if "error" in answer:
                raise StartError(answer["error"])
            told |= answer["sockets"]
            found.append((row, link))
        control = await reach(
            (self.world.head_host, port_of(rows[0], self._args, self._env)[0]), "the head", self.deadline
        )
        await control.send({"op": "control", "head": self.world.head})
        self._spawn(self._obey(control))
        return found

    async def _wait(self, store: Link, name: str, what: str) -> None:
        self._all[name] = await self._patiently(self._ask_all(store, name), what)

    async def _ask_all(self, store: Link, name: str) -> dict[int, Address]:
        """Ask until all ranks have published: a question that takes long would hide who is missing."""
        told = time.monotonic()
        while True:
            answer = await store.ask({"op": "all", "name": name, "ranks": self.world.total})
            if "values" in answer:
                return {int(rank): _address(value) for rank, value in answer["values"].items()}
            if time.monotonic() - told > _REPEAT:
                told = time.monotonic()
                log.warning("waiting for rank %s: %s", ", ".join(map(str, answer["missing"])), name)

    async def _patiently(self, coming: Any, what: str) -> Any:
        """Wait, and say so."""
        task = asyncio.ensure_future(coming)
        while not task.done():
            await asyncio.wait({task}, timeout=_REPEAT)
            if not task.done():
                log.warning("waiting for %s", what)
        return await task

    async def _connect(self, row: Socket) -> None:
        pairs = ((rank, peer) for rank in self.world.ranks for peer in _peers(row, rank, self.world.total))
        await asyncio.gather(*(self._dial(row, rank, peer) for rank, peer in pairs))

    async def _dial(self, row: Socket, rank: int, peer: int) -> None:
        address = self._all[row.name][peer]
        link = await reach(address, f"rank {peer}'s {row.name}", self.deadline)
        answer = await link.ask({"row": row.name, "rank": rank})
        if answer.get("rank") != peer:
            raise StartError(f"{shown(address)} is not rank {peer}'s {row.name}")
        self._spawn(self._held(link))

    # -------------------------------------------------------------------------------------------------- answering

    async def _peer(self, row: Socket, rank: int, link: Link) -> None:
        """A rank of the group connects to one of ours."""
        hello = await link.receive()
        if hello["row"] != row.name:
            raise LostError("not meant for this socket")
        await link.send({"rank": rank})
        await self._held(link)

    async def _head(self, row: Socket, link: Link) -> None:
        """A member connects to one of the head's sockets."""
        message = await link.receive()
        if message["op"] == "control":
            if message["head"]:
                await link.ended()
                return
            self._members.append(link)
            await self.lost.wait()
            return
        if not message["head"]:
            refused = self._refusal(message)
            if refused:
                await link.send({"error": refused})
                return
        if row is self.world.meeting_rows()[0]:
            again = self._joined & set(message["ranks"])
            if self.whole.is_set() or again:
                log.error("rank %s comes again: as in vLLM it is not answered", sorted(again))
                await link.ended()
                return
            self._joined |= set(message["ranks"])
        await link.send({"sockets": {name: own[0] for name, own in self._own.items() if 0 in own}})
        while True:
            try:
                message = await link.receive()
            except LostError:
                self._gone()
                raise
            await link.send(await self._stored(message))

    async def _stored(self, message: Mapping[str, Any]) -> dict[str, Any]:
        name = message["name"]
        if message["op"] == "put":
            await self._store.put(name, {int(rank): value for rank, value in message["values"].items()})
            return {}
        try:
            async with asyncio.timeout(_REPEAT):
                return {"values": await self._store.all(name, message["ranks"])}
        except TimeoutError:
            return {"missing": self._store.missing(name, message["ranks"])}

    def _refusal(self, hello: Mapping[str, Any]) -> str:
        """What the real head raises for engines that were started in another mode (v1/engine/utils.py)."""
        if hello["total"] != self.world.total:
            return f"the head has a world of {self.world.total} ranks, not {hello['total']}"
        if "data" in self.world.whens and hello["headless"] is self.world.local_engines:
            must = (
                "must not use --headless in external or hybrid"
                if hello["headless"]
                else "must use --headless in internal"
            )
            return f"Remote engine {hello['ranks'][0]} {must} dp lb mode"
        return ""

    # ---------------------------------------------------------------------------------------- together, afterwards

    async def everywhere(self, name: str, addresses: Sequence[Address], seconds: float) -> None:
        """Connect from every rank of the engine to each address, and hold the connections.

        Raises:
            StartError: one of them was not reached in time.
        """
        here = self._reach_all(name, addresses, seconds)
        if not self.world.head:
            await here
            return
        order = {"op": "dial", "name": name, "addresses": addresses, "seconds": seconds}
        answers = await asyncio.gather(here, *(link.ask(order) for link in self._members))
        for answer in answers[1:]:
            if answer and "error" in answer:
                raise StartError(answer["error"])

    async def _reach_all(self, name: str, addresses: Sequence[Address], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        self._kept += await asyncio.gather(
            *(reach(address, f"the other side's {name}", deadline) for address in addresses)
        )

    async def _obey(self, control: Link) -> None:
        """Do what the head says."""
        while True:
            try:
                order = await control.receive()
            except LostError:
                self._gone()
                return
            try:
                await self._reach_all(order["name"], [_address(one) for one in order["addresses"]], order["seconds"])
            except StartError as error:
                await control.send({"error": str(error)})
            else:
                await control.send({})

    # ------------------------------------------------------------------------------------------------------- loss

    async def _held(self, link: Link) -> None:
        await link.ended()
        self._gone()

    def _gone(self) -> None:
        self._broken.set()
        if self.whole.is_set() and not self.lost.is_set():
            log.error("a member of the group went: requests hang from now on, until the whole group is restarted")
            self.lost.set()

    def _spawn(self, coming: Any) -> None:
        task = asyncio.create_task(coming)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def reachable(server: socket.socket, env: Mapping[str, str]) -> Address:
    """The address under which others find a socket."""
    host, port = server.getsockname()[:2]
    return (own_address(env) if host in {"::", "0.0.0.0"} else host, port)  # noqa: S104 - compared, not bound


def _address(value: Any) -> Any:
    return (str(value[0]), int(value[1])) if isinstance(value, list) else value


def _peers(row: Socket, rank: int, total: int) -> Iterator[int]:
    """Whom a rank dials: a ring for NCCL, every pair once for Gloo, and the queue's head and the others both ways."""
    if row.speaks == "NCCL":
        yield (rank + 1) % total
    elif row.speaks == "Gloo":
        yield from range(rank)
    else:
        yield from range(1, total) if rank == 0 else (0,)
