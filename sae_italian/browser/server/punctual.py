"""uvicorn's protocol with an end to waiting for the head of a request: silent or dripping connections are closed.

uvicorn counts every connection against its limit and waits for a request's first lines for ever; whoever opens many and
sends nothing whole would lock everybody else out.
"""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10.0


class Punctual(H11Protocol):
    """Closes a connection whose next request is not begun in time; one at work or idle between requests is uvicorn's."""

    waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        at_work = self.cycle is not None and not self.cycle.response_complete
        if at_work or self.timeout_keep_alive_task is not None:
            self._stop()
        elif self.waiting is None:
            self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self.waiting = self.loop.call_later(HEAD_SECONDS, self._too_late)

    def _stop(self) -> None:
        if self.waiting is not None:
            self.waiting.cancel()
            self.waiting = None

    def _too_late(self) -> None:
        self.waiting = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.close()
