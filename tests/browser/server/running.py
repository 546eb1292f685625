"""A real server in a thread, on a free port of loopback."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sae_italian.browser.server import HOST, bind, make_server


@contextmanager
def browsing(app: Any) -> Iterator[str]:
    """Yield the address that a person is told: that of the page, with the token."""
    with running(app) as address:
        yield f"{address}/?token={app.token}"


@contextmanager
def running(app: Any) -> Iterator[str]:
    """Yield the address of a running server."""
    found = bind(0)
    uvicorn = make_server(app)
    thread = threading.Thread(target=uvicorn.run, kwargs={"sockets": [found]}, daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{found.getsockname()[1]}"
    finally:
        uvicorn.should_exit = True
        thread.join(20)
        found.close()
