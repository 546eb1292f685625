"""Run the server on loopback, and nowhere else."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any

from sae_italian.base.errors import UsageError

HOST = "127.0.0.1"
PORT = 8765
LOOKED_AT = 100  # ports after a taken one, for a free one to suggest


def bind(port: int) -> socket.socket:
    """Return a socket on the loopback interface; port 0 takes a free one.

    Raises: UsageError for a port that is taken, with the next free one named, that needs privileges or is none.
    """
    if not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}; 1 to 65535 were expected.")
    try:
        return _bound(port)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {port} is in use. {_suggestion(port)}") from None
        if error.errno == errno.EACCES:
            raise UsageError(f"port {port} needs privileges. Give one above 1023, such as --port {PORT}.") from None
        raise


def _bound(port: int) -> socket.socket:
    found = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((HOST, port))
        found.listen(256)
    except OSError:
        found.close()
        raise
    return found


def _suggestion(port: int) -> str:
    for free in range(port + 1, min(port + LOOKED_AT, 65536)):
        try:
            _bound(free).close()
        except OSError:
            continue
        return f"Port {free} is free: --port {free}"
    return "Give another one with --port."


def serve(app: Any, port: int = PORT, *, ready: Callable[[str], None] | None = None) -> None:
    """Serve until Ctrl-C; `ready` is told the address once the port is ours.

    Raises: UsageError without the packages of the extra `serve`, and as `bind`.
    """
    uvicorn = need_uvicorn()
    found = bind(port)
    try:
        if ready:
            ready(f"http://{HOST}:{found.getsockname()[1]}/")
        server(uvicorn, app).run(sockets=[found])
    except KeyboardInterrupt:  # uvicorn has closed in good order and passes the signal on
        return
    finally:
        found.close()


def server(uvicorn: Any, app: Any) -> Any:
    """Return a uvicorn server with small limits: it serves one person's browser."""
    from sae_italian.browser.server.punctual import Punctual

    config = uvicorn.Config(
        app,
        http=Punctual,
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
