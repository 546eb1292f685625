"""Work off the event loop: one thread, a bounded queue in front of it, and an end to waiting."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from sae_italian.browser.server.guard import Refused

T = TypeVar("T")


class Worker:
    """One thread that does one thing at a time, so a model is never used twice at once and memory stays bounded.

    At most `waiting` calls are held; more are turned away at once (503). A call that is not done after `seconds` is
    given up (504): if it has not begun it never does; if it has, it ends in its own time and the next one follows.
    """

    def __init__(self, name: str, *, waiting: int = 128, seconds: float = 60.0):
        self.waiting, self.seconds = waiting, seconds
        self._executor = ThreadPoolExecutor(1, thread_name_prefix=name)
        self._held = 0

    async def __call__(self, function: Callable[..., T], *arguments: object) -> T:
        """Return the function's result. Raises: Refused, and what the function raises."""
        if self._held >= self.waiting:
            raise Refused(
                503, "Troppo lavoro in coda: riprova tra poco.", "Too much work is queued; try again shortly."
            )
        self._held += 1
        try:
            done = self._executor.submit(function, *arguments)
            return await asyncio.wait_for(asyncio.wrap_future(done), self.seconds)
        except TimeoutError:
            raise Refused(
                504,
                f"Nessuna risposta in {self.seconds:g} secondi: prova con un testo più corto.",
                f"No answer within {self.seconds:g} seconds; try a shorter text.",
            ) from None
        finally:
            self._held -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
