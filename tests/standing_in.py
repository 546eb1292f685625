"""What the servers that stand in for others' have in common: a free port of loopback, and their end."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class StandIn:
    """A server in a thread; each of its handlers knows it as `stand_in`."""

    def __init__(self, handler: type[Quiet]):
        its: Any = type(handler.__name__, (handler,), {"stand_in": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), its)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class Quiet(BaseHTTPRequestHandler):
    """A handler that keeps connections and prints nothing."""

    stand_in: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else each answer waits 40 ms for the receipt of its head

    def log_message(self, *_):
        pass
