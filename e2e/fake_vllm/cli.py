"""``vllm serve`` and ``vllm --version``: from the command line to a process that runs until TERM."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
from typing import TYPE_CHECKING

from e2e.fake_vllm.api import Api
from e2e.fake_vllm.arguments import ArgumentError, parse
from e2e.fake_vllm.group import Group
from e2e.fake_vllm.transfer import Transfer
from e2e.fake_vllm.web import Server
from e2e.fake_vllm.wire import Link, StartError, bound, log, place, shown
from e2e.fake_vllm.world import World, port_of, world
from securevllm import catalogue
from securevllm.catalogue import Version

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

_USAGE = "usage: vllm serve [model_tag] [options]"


def main() -> None:
    """Run; exit codes as vLLM's: 2 wrong arguments, 1 it could not start, 0 ended by TERM."""
    logging.basicConfig(
        level=os.environ.get("VLLM_LOGGING_LEVEL", "INFO"),
        format="%(levelname)s %(asctime)s [%(name)s] %(message)s",
        datefmt="%m-%d %H:%M:%S",
    )
    argv = sys.argv[1:]
    version = Version.parse(os.environ.get("FAKE_VLLM_VERSION") or str(catalogue.newest()))
    if argv in (["--version"], ["-v"]):
        print(version)
        return
    if argv[:1] != ["serve"]:
        sys.exit(_wrong(f"invalid choice: {(argv or [''])[0]!r} (choose from 'serve')"))
    try:
        args = parse(argv[1:], version)
        placed = world(args, version)
    except ArgumentError as error:
        sys.exit(_wrong(str(error)))
    try:
        asyncio.run(_run(placed, args, os.environ))
    except StartError as error:
        log.error("Engine core initialization failed: %s", error)
        sys.exit(1)


def _wrong(message: str) -> int:
    print(f"{_USAGE}\nvllm serve: error: {message}", file=sys.stderr)
    return 2


async def _run(placed: World, args: argparse.Namespace, env: Mapping[str, str]) -> None:
    ending = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ending.set)
    working = asyncio.create_task(_serve(placed, args, env))
    stopping = asyncio.create_task(ending.wait())
    await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if working.done():
        await working
    log.info("Shutting down.")
    working.cancel()


async def _serve(placed: World, args: argparse.Namespace, env: Mapping[str, str]) -> None:
    """Start in vLLM's order: the API's port is bound first, and listens last."""
    group = Group(placed, args, env)
    transfer = Transfer(placed, args, env, group)
    rows = {row.when: row for row in placed.rows() if row.when in {"api", "kv-events"}}
    api = rows.get("api")
    door = bound(place(api, args, env), *port_of(api, args, env)) if api else None
    await transfer.listen()
    if "kv-events" in rows:
        for rank in placed.data_ranks:
            await group.listen(rows["kv-events"], rank, _publish)
    await group.gather()
    await transfer.register()
    server = Server(Api(placed, args, env, group, transfer))
    if door is not None:
        await server.start(door)
        log.info("Starting vLLM server on http://%s", shown(door.getsockname()[:2]))
    else:
        log.info("ranks %d to %d are up, headless", placed.ranks.start, placed.ranks.stop - 1)
    try:
        await asyncio.Event().wait()
    finally:
        server.close()
        transfer.close()


async def _publish(link: Link) -> None:
    """A reader of KV events: there are none, so it waits."""
    await link.ended()
