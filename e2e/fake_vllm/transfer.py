"""KV transfer between prefill and decode: who dials whom, and what is written into ``kv_transfer_params``.

NIXL: prefill answers with its side channel; decode asks there for the data sockets of all ranks, both sides connect.
Mooncake: every prefill rank registers at the bootstrap server; decode asks it for their side channels and tells them
its own data sockets, to which prefill connects. Decode waits for it, and fails the request when a flow is missing
(``kv_load_failure_policy: fail``).
"""

from __future__ import annotations

import asyncio
import functools
import json
import time
import uuid
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from e2e.fake_vllm import web
from e2e.fake_vllm.wire import Address, Link, StartError, log, place, reach
from e2e.fake_vllm.world import World, port_of
from securevllm import catalogue

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from e2e.fake_vllm.group import Group

SECONDS = 5.0
"""For one step of a request's transfer: the time-out of NIXL's handshake."""


class Transfer:
    """The connector of one process."""

    def __init__(self, world: World, args: argparse.Namespace, env: Mapping[str, str], group: Group) -> None:
        self.engine_id = str(uuid.uuid4())
        self._world = world
        self._args = args
        self._env = env
        self._group = group
        self._rows = {row.name: row for row in world.rows() if row.when == world.connector}
        self._registered: dict[str, dict[str, Any]] = {}
        self._peers: set[str] = set()
        self._servers: list[web.Server] = []

    # ------------------------------------------------------------------------------------------------------ sockets

    async def listen(self) -> None:
        """Open this process's sockets of the connector."""
        services = {service.socket for service in catalogue.server().services}
        for row in self._rows.values():
            if row.name in services:
                server = web.Server(functools.partial(self._service, row.name))
                await server.start(self._group.bind(row))
                self._servers.append(server)
                continue
            handler = self._side_channel if row.speaks == "ZMQ" else self._data
            numbers = self._world.data_ranks if row.per == "rank" else self._world.ranks
            for number in numbers:
                await self._group.listen(row, number, handler)

    async def register(self) -> None:
        """Tell the bootstrap server where each rank of this process is; without one there is nobody to tell."""
        service = self._of("register")
        if service is None or "prefill" not in self._world.roles:
            return
        row = catalogue.sockets()[service.socket]
        host = place(row, self._args, self._env) if self._world.head else self._world.head_host
        address = ("127.0.0.1" if host in {"", "0.0.0.0"} else host, port_of(row, self._args, self._env)[0])  # noqa: S104
        addresses = self._group.own(self._side_channel_row().name)
        for rank, found in addresses.items():
            what = f"the {row.name} server"
            (await reach(address, what, self._group.deadline)).close()
            entry = {"engine_id": self.engine_id, "addr": f"tcp://{found[0]}:{found[1]}", **self._place_of(rank)}
            await web.ask(service.method, *address, service.path, entry)

    def close(self) -> None:
        """Listen no more."""
        for server in self._servers:
            server.close()

    def _of(self, answer: str) -> catalogue.Service | None:
        for service in catalogue.server().services:
            if service.answer == answer and catalogue.sockets()[service.socket].when == self._world.connector:
                return service
        return None

    def _side_channel_row(self) -> catalogue.Socket:
        return next(row for row in self._rows.values() if row.speaks == "ZMQ")

    def _data_rows(self) -> list[catalogue.Socket]:
        services = {service.socket for service in catalogue.server().services}
        return [row for row in self._rows.values() if row.speaks != "ZMQ" and row.name not in services]

    def _place_of(self, rank: int) -> dict[str, int]:
        tensor, pipeline = self._args.tensor_parallel_size or 1, self._args.pipeline_parallel_size or 1
        return {
            "dp_rank": rank // (tensor * pipeline),
            "pp_rank": rank // tensor % pipeline,
            "tp_rank": rank % tensor,
        }

    # ---------------------------------------------------------------------------------------------------- answering

    async def _side_channel(self, link: Link) -> None:
        """Decode asks for our data sockets, or tells its own; then every rank of ours connects to those."""
        while True:
            message = await link.receive()
            await link.send({"engine_id": self.engine_id, "sockets": self._sockets()})
            sockets = (await link.receive())["sockets"] if message["op"] == "metadata" else message["sockets"]
            try:
                await self._connect(sockets)
            except StartError as error:
                log.error("KV transfer: %s", error)
                await link.send({"error": str(error)})
            else:
                await link.send({})

    async def _data(self, link: Link) -> None:
        await link.ended()

    def _sockets(self) -> dict[str, list[Address]]:
        return {row.name: self._group.addresses(row.name) for row in self._data_rows()}

    async def _connect(self, sockets: Mapping[str, Any]) -> None:
        for name, addresses in sockets.items():
            await self._group.everywhere(name, [(str(host), int(port)) for host, port in addresses], SECONDS)

    async def _service(self, socket: str, request: web.Request) -> web.Answer:
        for service in catalogue.server().services:
            if (service.socket, service.method, service.path) == (socket, request.method, request.path):
                return self._register(request) if service.answer == "register" else web.as_json(self._registered)
        return web.as_json({"detail": "Not Found"}, 404)

    def _register(self, request: web.Request) -> web.Answer:
        entry = json.loads(request.body)
        engine = self._registered.setdefault(
            str(entry["dp_rank"]), {"engine_id": entry["engine_id"], "worker_addr": {}}
        )
        engine["worker_addr"].setdefault(str(entry["tp_rank"]), {})[str(entry["pp_rank"])] = entry["addr"]
        return web.as_json({"status": "ok"})

    # ----------------------------------------------------------------------------------------------------- requests

    def offer(self, params: Mapping[str, Any]) -> dict[str, Any] | None:
        """What prefill answers, so that decode finds the KV cache."""
        if not params.get("do_remote_decode") or "prefill" not in self._world.roles:
            return None
        row = self._side_channel_row()
        host, port = self._group.addresses(row.name)[0]
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [[1]],
            "remote_engine_id": self.engine_id,
            "remote_request_id": str(uuid.uuid4()),
            "remote_host": host,
            "remote_port": port,
            "tp_size": self._args.tensor_parallel_size or 1,
            **({"transfer_id": params["transfer_id"]} if "transfer_id" in params else {}),
        }

    async def pull(self, params: Mapping[str, Any]) -> None:
        """Get the KV cache that the parameters name.

        Raises:
            StartError: a flow is missing, or the other side is somebody else.
        """
        if not params.get("do_remote_prefill") or "decode" not in self._world.roles:
            return
        try:
            async with asyncio.timeout(2 * SECONDS):
                await self._pull(params)
        except TimeoutError as error:
            raise StartError("the other side did not finish the transfer") from error
        except (KeyError, TypeError, OSError) as error:
            raise StartError(f"kv_transfer_params: {type(error).__name__} {error}") from error

    async def _pull(self, params: Mapping[str, Any]) -> None:
        engine = str(params["remote_engine_id"])
        if "remote_bootstrap_addr" in params:
            await self._pull_from_each(engine, str(params["remote_bootstrap_addr"]))
            return
        link = await self._side(str(params["remote_host"]), int(params["remote_port"]))
        try:
            found = await link.ask({"op": "metadata"})
            if found["engine_id"] != engine:
                raise StartError(f"engine {engine} is gone; {found['engine_id']} answers")
            await self._connect(found["sockets"])
            self._check(await link.ask({"sockets": self._sockets()}))
        finally:
            link.close()

    async def _pull_from_each(self, engine: str, bootstrap: str) -> None:
        """Mooncake: every worker of prefill sends to every worker of ours."""
        service = self._of("query")
        url = urlsplit(bootstrap)
        if service is None or url.hostname is None or url.port is None:
            raise StartError(f"remote_bootstrap_addr {bootstrap!r} is no address of a bootstrap server")
        (await reach((url.hostname, url.port), "prefill's bootstrap server", time.monotonic() + SECONDS)).close()
        engines = await web.ask(service.method, url.hostname, url.port, service.path)
        found = next((entry for entry in engines.values() if entry["engine_id"] == engine), None)
        if found is None:
            raise StartError(f"engine {engine} is not registered at {bootstrap}")
        for worker in (address for stages in found["worker_addr"].values() for address in stages.values()):
            there = urlsplit(worker)
            link = await self._side(str(there.hostname), int(there.port or 0))
            try:
                await link.ask({"op": "pull", "sockets": self._sockets()})
                self._check(await link.receive())
            finally:
                link.close()

    async def _side(self, host: str, port: int) -> Link:
        return await reach((host, port), "prefill's side channel", time.monotonic() + SECONDS)

    def _check(self, answer: Mapping[str, Any]) -> None:
        if "error" in answer:
            raise StartError(f"prefill: {answer['error']}")
