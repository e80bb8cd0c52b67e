"""What can be reached from here: run in a pod, as an attacker (or as a control) would.

    python -m reach [--serve PORT ...] [--timeout SECONDS] [ADDRESS:PORT ...]

Prints one JSON object: target -> `open` (a handshake, then closed at once without a byte), `refused`, `silent` (no
answer in time), `unreachable` or `unknown-name`. With `--serve` it accepts connections on these ports for ever, after
printing; that makes a pod that can be reached. Standard library only.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import json
import socket
import struct

OPEN, REFUSED, SILENT, UNREACHABLE, UNKNOWN_NAME = "open", "refused", "silent", "unreachable", "unknown-name"


async def reach(target: str, seconds: float) -> str:
    """Connect once and say what came of it."""
    host, _, port = target.rpartition(":")
    try:
        async with asyncio.timeout(seconds):
            _, writer = await asyncio.open_connection(host.strip("[]"), int(port))
    except TimeoutError:
        return SILENT
    except socket.gaierror:
        return UNKNOWN_NAME
    except ConnectionRefusedError:
        return REFUSED
    except OSError as error:
        # Several addresses, several errors: asyncio then gives one without a number.
        return REFUSED if error.errno == errno.ECONNREFUSED else UNREACHABLE
    # Closed with a reset: nobody is left waiting for bytes that never come.
    writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
    return OPEN


async def _accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _main() -> None:
    parser = argparse.ArgumentParser(prog="reach", description=__doc__)
    parser.add_argument("target", nargs="*")
    parser.add_argument("--serve", type=int, action="append", default=[], metavar="PORT")
    parser.add_argument("--timeout", type=float, default=2.0)
    options = parser.parse_args()
    servers = [await asyncio.start_server(_accept, host=None, port=port) for port in options.serve]
    found = await asyncio.gather(*(reach(target, options.timeout) for target in options.target))
    print(json.dumps(dict(zip(options.target, found, strict=True))), flush=True)
    if servers:
        await asyncio.gather(*(server.serve_forever() for server in servers))


if __name__ == "__main__":
    asyncio.run(_main())
