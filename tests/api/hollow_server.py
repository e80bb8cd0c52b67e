"""What the hollow node's tests run: `hollow_server.py <ip> <port> ...` tells its arguments and environment."""

from __future__ import annotations

import json
import os
import signal
import socketserver
import sys
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Handler(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/exit":
            os._exit(7)
        body = json.dumps({"argv": sys.argv[2:], "env": dict(os.environ)}).encode()
        self.send_response(200 if self.path == "/" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Server(ThreadingHTTPServer):
    def server_bind(self) -> None:
        # The inherited one asks DNS for the name of the address, which can take many seconds.
        socketserver.TCPServer.server_bind(self)


def leave(_number: int, _frame: object) -> None:
    print("terminated gracefully", flush=True)  # noqa: T201
    os._exit(0)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, leave)
    Server((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
