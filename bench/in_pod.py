"""What a pod sees, moment by moment: run in one by `bench.on_nodes`, with the standard library only.

    python -u -c <this file> '{"dials": [...], "asks": [...], "streams": ...}'

Prints a line of JSON for each thing that is seen for the first time or that has changed, with the moment at which the
attempt began (Unix seconds, of the clock that all processes of this machine share). Ends when its standard input does.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import struct
import sys
import threading
import time

DIAL_SECONDS = 0.1
DIAL_PAUSE = 0.005

_lock = threading.Lock()


def tell(**said: object) -> None:
    """Print one line."""
    with _lock:
        sys.stdout.write(json.dumps(said) + "\n")
        sys.stdout.flush()


def dial(target: str) -> None:
    """Connect again and again; tell when the answer changes."""
    host, _, port = target.rpartition(":")
    before = None
    while True:
        began = time.time()
        try:
            with socket.create_connection((host, int(port)), timeout=DIAL_SECONDS) as found:
                # Closed with a reset: no thousands of connections in TIME_WAIT.
                found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            answer = "open"
        except OSError:
            answer = "blocked"
        if answer != before:
            tell(kind="dial", what=target, answer=answer, at=began)
            before = answer
        time.sleep(DIAL_PAUSE)


class Gateway:
    """A connection to one gateway that is opened again when it is lost."""

    def __init__(self, address: str, port: int, host: str, authority: str) -> None:
        """See `ask`."""
        self._address, self._host = (address, port), host
        self._trust = ssl.create_default_context(cadata=authority)
        self._connection: http.client.HTTPSConnection | None = None

    def open(self, method: str, path: str, headers: dict[str, str], body: str | None) -> http.client.HTTPResponse:
        """Send one request; the answer's body is not read yet."""
        if self._connection is None:
            self._connection = http.client.HTTPSConnection(self._host, timeout=30)
            raw = socket.create_connection(self._address, timeout=10)
            self._connection.sock = self._trust.wrap_socket(raw, server_hostname=self._host)
        self._connection.request(method, path, body=body, headers=headers)
        return self._connection.getresponse()

    def close(self) -> None:
        """Begin anew with the next request."""
        if self._connection is not None:
            self._connection.close()
            self._connection = None


def ask(item: dict) -> None:  # type: ignore[type-arg]
    """Send a request again and again; tell each answer that differs from the one before, or each one there is."""
    gateway = Gateway(item["address"], item["port"], item["host"], item["authority"])
    before = None
    while True:
        began = time.time()
        by = None
        try:
            answer = gateway.open(item["method"], item["path"], item["headers"], item["body"])
            content, status = answer.read(), answer.status
            if answer.will_close:
                gateway.close()
            if item["every"]:
                by = json.loads(content).get("system_fingerprint") if status == 200 else content.decode()[:80]
        except (OSError, http.client.HTTPException, ValueError) as error:
            gateway.close()
            status, by = 0, repr(error)
        if item["every"] or status != before:
            tell(kind="ask", what=item["what"], answer=status, by=by, at=began)
            before = status
        time.sleep(item["pause"])


def stream(item: dict) -> None:  # type: ignore[type-arg]
    """Read one stream after the other to its end; tell of each whether it came to one."""
    gateway = Gateway(item["address"], item["port"], item["host"], item["authority"])
    while True:
        began, last = time.time(), b""
        try:
            answer = gateway.open("POST", item["path"], item["headers"], item["body"])
            for line in answer:
                last = line.strip() or last
            whole = last == b"data: [DONE]"
        except (OSError, http.client.HTTPException):
            whole = False
        gateway.close()
        tell(kind="stream", what=item["address"], answer=whole, by=last.decode()[:80], at=began)


def main() -> None:
    """Start everything, and end with the standard input."""
    wanted = json.loads(sys.argv[1])
    for run, items in ((dial, wanted["dials"]), (ask, wanted["asks"]), (stream, wanted["streams"])):
        for item in items:
            threading.Thread(target=run, args=(item,), daemon=True).start()
    sys.stdin.read()
    os._exit(0)


if __name__ == "__main__":
    main()
