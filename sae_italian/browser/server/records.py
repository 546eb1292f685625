"""The records of one cache as answers: its run, its list, its cards, and passages as wide as their window."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import partial
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sae_italian.browser.schema import check_card, check_groups, check_rows, check_run
from sae_italian.browser.server.guard import Refused, as_json
from sae_italian.browser.server.watch import Watch
from sae_italian.browser.server.work import Worker
from sae_italian.browser.source import LatentSource


class Records:
    """One cache's records; `more` are facts that come beside its run. All are made in the reader's one thread."""

    def __init__(self, source: LatentSource, reader: Worker, **more: Any):
        self.source, self.reader, self.more = source, reader, more
        self.watch = Watch(source.cache.folder)
        self._rows: tuple[Any, Response] | None = None

    def routes(self, prefix: str) -> list[Route]:
        return [
            Route(f"{prefix}/run", self.run),
            Route(f"{prefix}/rows", self.rows),
            Route(f"{prefix}/card/{{latent}}", self.card),
            Route(f"{prefix}/wide/{{latent}}", self.wide),
        ]

    async def run(self, _: Request) -> Response:
        return await self._read(lambda: as_json({"run": check_run(self.source.run()), **self.more}))

    async def rows(self, _: Request) -> Response:
        return await self._read(self._all_rows)

    def _all_rows(self) -> Response:
        """Return the list, made once and again when explanations or scores were stored since."""
        now = self.source.version()
        if self._rows is None or self._rows[0] != now:
            self.source.update()
            self._rows = now, as_json(check_rows(self.source.rows()))
        return self._rows[1]

    async def card(self, request: Request) -> Response:
        latent = self._latent(request)

        def card() -> Response:
            self.source.update()
            return as_json(check_card(self.source.card(latent)))

        return await self._read(card)

    async def wide(self, request: Request) -> Response:
        latent = self._latent(request)
        return await self._read(lambda: as_json(check_groups(self.source.wide(latent))))

    def _latent(self, request: Request) -> int:
        given = request.path_params["latent"]
        if not (given.isascii() and given.isdigit() and len(given) < 10):
            raise Refused(404, "Un latente è un numero.", "A latent is a number.")
        if int(given) >= self.source.d_sae:
            raise Refused(404, f"Non c'è il latente {given}.", f"There is no latent {given}.")
        return int(given)

    async def _read(self, make: Callable[[], Response]) -> Response:
        return await self.while_it_lasts(partial(self.reader, make))

    async def while_it_lasts(self, work: Callable[[], Awaitable[Any]]) -> Any:
        """Do some work on the cache; what fails because the cache was replaced meanwhile is said to be that."""
        self.watch.check()
        try:
            return await work()
        except Refused:
            raise
        except Exception:
            self.watch.check()
            raise
