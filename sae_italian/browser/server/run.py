"""Run the server on loopback, and nowhere else."""

from __future__ import annotations

import asyncio
import errno
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from sae_italian.base.errors import UsageError

HOST = "127.0.0.1"
PORT = 8765
HEAD_SECONDS = 10.0


def bind(port: int) -> socket.socket:
    """Return a socket on the loopback interface; port 0 takes a free one.

    Raises: UsageError for a port that is taken, with a free one named, that needs privileges or is none.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}; 1 to 65535 were expected.")
    try:
        return socket.create_server((HOST, port), backlog=256)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            with bind(0) as free:
                number = free.getsockname()[1]
            raise UsageError(f"port {port} is in use. Port {number} is free: --port {number}") from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} needs privileges. Give one above 1023, such as --port {PORT}.") from None
        raise


def serve(app: Any, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `ready` is told the address, with the token, once the port is ours.

    Raises: UsageError without the packages of the extra `serve`, and as `bind`.
    """
    server = make_server(app)
    # uvicorn closes in good order and passes the signal on
    with bind(port) as found, suppress(KeyboardInterrupt):
        ready(f"http://{HOST}:{found.getsockname()[1]}/?token={app.token}")
        server.run(sockets=[found])


def need_uvicorn() -> Any:
    """Return the package uvicorn. Raises: UsageError when it, or starlette, is not installed."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise UsageError(
            f"the server needs the package {error.name}; it comes with pip install 'sae-italian[serve]'."
        ) from None
    return uvicorn


def make_server(app: Any) -> Any:
    """Return a uvicorn server with small limits: it serves one person's browser."""
    uvicorn = need_uvicorn()
    config = uvicorn.Config(
        app,
        http=_punctual(),
        log_level="warning",
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        ws="none",
        timeout_keep_alive=5,
        timeout_graceful_shutdown=3,
        limit_concurrency=512,
        h11_max_incomplete_event_size=16 * 1024,
    )
    return uvicorn.Server(config)


def _punctual() -> type:
    """Return uvicorn's protocol with an end to waiting for the head of a request.

    uvicorn counts every connection against its limit and waits for a request's first lines for ever; whoever opens many
    and sends nothing whole would lock everybody else out. A connection at work or idle between requests is uvicorn's.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Punctual(H11Protocol):
        waiting: asyncio.TimerHandle | None = None

        def wait(self) -> None:
            self.waiting = self.waiting or self.loop.call_later(HEAD_SECONDS, self.too_late)

        def stop(self) -> None:
            if self.waiting is not None:
                self.waiting.cancel()
                self.waiting = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.wait()

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            at_work = self.cycle is not None and not self.cycle.response_complete
            (self.stop if at_work or self.timeout_keep_alive_task is not None else self.wait)()

        def connection_lost(self, exc: Exception | None) -> None:
            self.stop()
            super().connection_lost(exc)

        def too_late(self) -> None:
            self.waiting = None
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()

    return Punctual
