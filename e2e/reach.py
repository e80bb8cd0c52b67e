"""What can be reached from here: run in a pod, as an attacker (or as a control) would.

    python -m reach [--serve PORT ...] [--timeout SECONDS] [--watch] [ADDRESS:PORT ...]
    python -m reach --listening

Prints one JSON object: target -> `open` (a handshake, then closed at once without a byte), `refused`, `silent` (no
answer in time), `unreachable` or `unknown-name`. With `--watch` it connects again and again until its standard input
ends, and prints how often, and which targets were open how many seconds after its start. With `--serve` it accepts
connections on these ports for ever, after printing; that makes a pod that can be reached. `--listening` prints the
TCP sockets of this network namespace that others could reach, as `[ADDRESS, PORT]`. Standard library only.
"""

from __future__ import annotations

import argparse
import asyncio
import errno
import ipaddress
import json
import resource
import select
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path

OPEN, REFUSED, SILENT, UNREACHABLE, UNKNOWN_NAME = "open", "refused", "silent", "unreachable", "unknown-name"

_AT_ONCE = 1000
_PAUSE = 0.1
_LISTEN_STATE = "0A"


def reach_each(targets: Sequence[str], seconds: float) -> dict[str, str]:
    """Connect to each once, many at the same time, and say what came of it.

    The kernel's word counts: a handshake that is complete when this process has its turn again is one, however late
    that is. On a busy machine a limit on this process's own time would take open for silent.
    """
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    size = min(_AT_ONCE, most // 2) if most > 0 else _AT_ONCE
    found: dict[str, str] = {}
    for start in range(0, len(targets), size):
        found |= _reach_some(targets[start : start + size], seconds)
    return found


def _reach_some(targets: Sequence[str], seconds: float) -> dict[str, str]:
    found: dict[str, str] = {}
    waiting: dict[int, tuple[str, socket.socket]] = {}
    poll = select.poll()
    for target in targets:
        host, _, port = target.rpartition(":")
        try:
            family, kind, _, _, address = socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM)[0]
        except socket.gaierror:
            found[target] = UNKNOWN_NAME
            continue
        one = socket.socket(family, kind)
        one.setblocking(False)
        error = one.connect_ex(address)
        if error == errno.EINPROGRESS:
            waiting[one.fileno()] = (target, one)
            poll.register(one, select.POLLOUT)
        else:
            found[target] = _end(one, error)
    deadline = time.monotonic() + seconds
    late = False
    while waiting:
        ready = poll.poll(max(0.0, deadline - time.monotonic()) * 1000)
        for number, _ in ready:
            target, one = waiting.pop(number)
            poll.unregister(number)
            found[target] = _end(one, one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR))
        if not ready and late:
            break
        # Once more after the deadline, without waiting: what was complete by then counts.
        late = time.monotonic() >= deadline
    for target, one in waiting.values():
        one.close()
        found[target] = SILENT
    return found


def _end(one: socket.socket, error: int) -> str:
    """Close without a byte, and name what came of it (`error`: an errno, or 0)."""
    if error == 0:
        # With a reset: nobody is left waiting for bytes that never come.
        one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    one.close()
    answers = {0: OPEN, errno.ECONNREFUSED: REFUSED, errno.ETIMEDOUT: SILENT}
    return answers.get(error, UNREACHABLE)


def watch(targets: Sequence[str], seconds: float) -> dict[str, object]:
    """Connect to each again and again until standard input ends."""
    began = time.monotonic()
    rounds, opened = 0, dict[str, float]()
    while True:
        # Looked at before the round: the last one begins after the input has ended.
        last = bool(select.select([sys.stdin], [], [], 0)[0]) and not sys.stdin.read(1)
        for target, answer in reach_each(targets, seconds).items():
            if answer == OPEN:
                opened.setdefault(target, round(time.monotonic() - began, 2))
        rounds += 1
        if last:
            return {"rounds": rounds, "seconds": round(time.monotonic() - began, 2), "open": opened}
        time.sleep(_PAUSE)


def listening() -> list[tuple[str, int]]:
    """The TCP sockets of this network namespace that listen on more than loopback."""
    found = set[tuple[str, int]]()
    for table in ("tcp", "tcp6"):
        path = Path("/proc/net") / table
        for line in path.read_text(encoding="ascii").splitlines()[1:] if path.exists() else ():
            local, state = line.split()[1], line.split()[3]
            host, _, port = local.partition(":")
            # Words of four bytes, each in this machine's order.
            words = (int(host[at : at + 8], 16).to_bytes(4, sys.byteorder) for at in range(0, len(host), 8))
            address = ipaddress.ip_address(b"".join(words))
            if state == _LISTEN_STATE and not address.is_loopback:
                found.add((str(address), int(port, 16)))
    return sorted(found)


async def _accept(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    writer.close()


async def _serve(ports: Sequence[int]) -> None:
    servers = [await asyncio.start_server(_accept, host=None, port=port) for port in ports]
    await asyncio.gather(*(server.serve_forever() for server in servers))


def _main() -> None:
    parser = argparse.ArgumentParser(prog="reach", description=__doc__)
    parser.add_argument("target", nargs="*")
    parser.add_argument("--serve", type=int, action="append", default=[], metavar="PORT")
    parser.add_argument("--timeout", type=float, default=2.0)
    parser.add_argument("--watch", action="store_true")
    parser.add_argument("--listening", action="store_true")
    options = parser.parse_args()
    if options.listening:
        print(json.dumps(listening()))
        return
    look = watch if options.watch else reach_each
    print(json.dumps(look(options.target, options.timeout)), flush=True)
    if options.serve:
        asyncio.run(_serve(options.serve))


if __name__ == "__main__":
    _main()
