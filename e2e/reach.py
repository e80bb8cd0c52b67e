"""What can be reached from here: run in a pod, as an attacker (or as a control) would.

    python -m reach [--serve PORT ...] [--timeout SECONDS] [--watch] [ADDRESS:PORT ...]
    python -m reach --listening

Prints one JSON object: target -> `open` (a handshake, then closed at once without a byte), `refused`, `silent` (no
answer in time), `unreachable` or `unknown-name`. With `--watch` it connects again and again until its standard input
ends, and prints how often, and which targets were open how many seconds after its start. Targets that come as lines of
its standard input are then tried as often as it goes, the others when there is time. With `--serve` it accepts
connections on these ports for ever, after printing; that makes a pod that can be reached. `--listening` prints the
TCP sockets of this network namespace that others could reach, as `[ADDRESS, PORT]`. Standard library only.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import errno
import ipaddress
import json
import os
import resource
import select
import socket
import struct
import sys
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from pathlib import Path

OPEN, REFUSED, SILENT, UNREACHABLE, UNKNOWN_NAME = "open", "refused", "silent", "unreachable", "unknown-name"

_AT_ONCE = 1000
_LISTEN_STATE = "0A"

_OFTEN, _SELDOM = 0.05, 1.0
"""Seconds between two tries of a target, of those that are named and of the others; more on a busy machine. Scanners
that never rest leave a machine of two processors no time for the API server."""
_PATIENCE = 0.3
"""Seconds that an attempt of a watch has: many are under way to the same target."""
_CHUNK = 128
"""So many of the others in a row, so that those that are named need not wait."""
_SOURCE_PORTS = range(20000, 20000 + 32)
"""Attempts take these in turn: network plugins remember each pair of ports for a minute, and have a limit."""


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
    # Linux names only a connection that was there ECONNRESET: it was taken, and ended at once.
    ended = dict.fromkeys((0, errno.ECONNRESET, errno.EPIPE), OPEN)
    answers = {**ended, errno.ECONNREFUSED: REFUSED, errno.ETIMEDOUT: SILENT}
    return answers.get(error, UNREACHABLE)


class Watch:
    """Connects to targets again and again, many at the same time.

    Args:
        targets: tried when there is time.
        clock: monotonic seconds.
    """

    def __init__(self, targets: Sequence[str], clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._began = clock, clock()
        self._others, self._named = list(dict.fromkeys(targets)), list[str]()
        self._address = {target: _parsed(target) for target in targets}
        self._at, self._next_others, self._next_named = 0, 0.0, 0.0
        self._waiting: dict[int, tuple[str, socket.socket]] = {}
        self._ends: deque[tuple[float, int, socket.socket]] = deque()
        self._poll = select.epoll()
        self._last: dict[str, float] = {}
        self._tries: Counter[str] = Counter()
        self._gap: dict[str, float] = {}
        self.rounds, self.attempts, self.opened = 0, 0, dict[str, float]()

    def name(self, target: str) -> None:
        """Try this one as often as it goes from now on."""
        if target in self._gap:
            return
        self._address[target] = _parsed(target)
        self._gap[target] = 0.0
        self._last[target] = self._clock()
        self._named.append(target)

    def turn(self) -> None:
        """Begin what is due, and take in what has come of the rest."""
        now = self._clock()
        if now >= self._next_named:
            self._next_named = now + _OFTEN
            for target in self._named:
                self._try(target)
        if now >= self._next_others:
            for target in self._others[self._at : self._at + _CHUNK]:
                self._try(target)
            self._at += _CHUNK
            if self._at >= len(self._others):
                self._at, self._next_others = 0, now + _SELDOM
                self.rounds += 1
        self._take_in()

    def finish(self) -> None:
        """Once more each, and wait for the answers."""
        for target in (*self._named, *self._others):
            self._try(target)
            if self.attempts % _CHUNK == 0:
                self._take_in()
        self.rounds += 1
        end = self._clock() + 1.0
        while self._waiting and self._clock() < end:
            self._take_in()
            time.sleep(0.005)

    def told(self) -> dict[str, object]:
        """What came of it."""
        tries = sorted(self._tries[target] for target in self._named)
        gaps = sorted(self._gap.values())
        return {
            "rounds": self.rounds,
            "attempts": self.attempts,
            "seconds": round(self._clock() - self._began, 2),
            "open": self.opened,
            "named": len(self._named),
            "fewest": tries[0] if tries else 0,
            "gaps": [round(gaps[len(gaps) // 2], 3), round(gaps[-1], 3)] if gaps else [],
        }

    def _try(self, target: str) -> None:
        family, address = self._address[target]
        now = self._clock()
        if target in self._gap:
            self._gap[target] = max(self._gap[target], now - self._last[target])
            self._last[target] = now
        one = socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        with contextlib.suppress(OSError):  # taken: then the kernel chooses
            one.bind(("", _SOURCE_PORTS[self._tries[target] % len(_SOURCE_PORTS)]))
        error = one.connect_ex(address)
        self.attempts += 1
        self._tries[target] += 1
        if error == errno.EINPROGRESS:
            number = one.fileno()
            self._waiting[number] = (target, one)
            self._ends.append((now + _PATIENCE, number, one))
            self._poll.register(number, select.EPOLLOUT)
        else:
            self._note(target, _end(one, error))

    def _take_in(self) -> None:
        # Before anything is given up: the kernel's word counts, however late this process has its turn.
        while ready := self._poll.poll(0, _AT_ONCE):
            for number, _ in ready:
                target, one = self._waiting.pop(number)
                self._poll.unregister(number)
                self._note(target, _end(one, one.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)))
        now = self._clock()
        while self._ends and self._ends[0][0] <= now:
            _, number, one = self._ends.popleft()
            if number in self._waiting and self._waiting[number][1] is one:
                del self._waiting[number]
                one.close()

    def _note(self, target: str, answer: str) -> None:
        if answer == OPEN:
            self.opened.setdefault(target, round(self._clock() - self._began, 2))


def _parsed(target: str) -> tuple[socket.AddressFamily, tuple[str, int]]:
    host, _, port = target.rpartition(":")
    address = ipaddress.ip_address(host.strip("[]"))
    return socket.AF_INET6 if address.version == 6 else socket.AF_INET, (str(address), int(port))


def watch(targets: Sequence[str], _seconds: float) -> dict[str, object]:
    """Connect to each again and again until standard input ends; what is named there, most often."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    watching, rest = Watch(targets), b""
    while True:
        while select.select([0], [], [], 0)[0]:
            said = os.read(0, 1 << 16)
            if not said:
                watching.finish()
                return watching.told()
            *lines, rest = (rest + said).split(b"\n")
            for line in filter(None, lines):  # an empty one keeps the connection
                watching.name(line.decode())
        watching.turn()
        time.sleep(0.005)


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
