"""The routes: the page, its script and style, the records of the cache, and live work.

    GET  /[?token=...]            the page; with the server's token it may ask for live work
    GET  /assets/app.js, app.css  its script and its style; no path leads to any file
    GET  /api/<name>[/<latent>]   the records: run, rows, card/3, wide/3, matches, other/card/3 (answers.py)
    POST /api/live/<work>         tokens, steer, ablate, explain: JSON in, JSON out; the header X-Token has the token

Errors are {error_it, error_en}: 400 malformed or not from here, 403 another page or no token, 404, 408, 409 the cache was
replaced, 413, 415, 422 an argument, 503 too much at once, 504 too slow.
"""

from __future__ import annotations

import secrets
from collections.abc import Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sae_italian.base.errors import SaeItalianError
from sae_italian.browser.answers import PageAnswers, Refused, in_both
from sae_italian.browser.page import page, script, style
from sae_italian.browser.server.guard import LOOPBACK, Guard, Worker, as_json, read_json_body
from sae_italian.cache.layout import MANIFEST


def create_app(answers: PageAnswers, *, seconds: float = 60.0) -> Guard:
    """Return the server of one cache, to be run on loopback. `seconds` is the longest that live work may take.

    Its `token` is what live work asks for, which may cost money: it is known to whoever was told the address, and to no
    other process or page of this machine.
    """
    server = Server(answers, seconds)
    routes = [
        Route("/", server.page),
        Route("/assets/app.js", _fixed(script("served"), "text/javascript")),
        Route("/assets/app.css", _fixed(style(), "text/css")),
        Route("/api/live/{work}", server.work, methods=["POST"]),
        Route("/api/{name:path}", server.record),
    ]
    handlers: Any = {
        SaeItalianError: lambda _, error: as_json(in_both(error), getattr(error, "status", 422)),
        HTTPException: lambda _, error: as_json(in_both(error.detail), error.status_code),
        Exception: lambda _, error: as_json(in_both(f"a defect of ours: {type(error).__name__}"), 500),
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=server.lifespan)
    app.router.redirect_slashes = False
    return Guard(TrustedHostMiddleware(app, LOOPBACK), server.token)


def _fixed(text: str, kind: str) -> Any:
    async def answer(_: Request) -> Response:
        return Response(text, media_type=kind)

    return answer


class Server:
    """What the routes share. Records are made in one thread and live work is done in another, so neither waits."""

    def __init__(self, answers: PageAnswers, seconds: float):
        self.answers, self.token = answers, secrets.token_urlsafe(16)
        self.reader = Worker("reader", waiting=1024, seconds=60.0)
        self.worker = Worker("live", waiting=128, seconds=seconds)
        sources = [answers.source, *([answers.other.source] if answers.other else [])]
        self.watches = [Watch(source.cache.folder) for source in sources]
        self._rows: tuple[Any, Response] | None = None

    @asynccontextmanager
    async def lifespan(self, _: Starlette):
        yield
        self.worker.close()
        self.reader.close()

    async def page(self, request: Request) -> Response:
        known = secrets.compare_digest(request.query_params.get("token", "").encode(), self.token.encode())
        token = f'<meta name="token" content="{self.token}">' if known else ""
        text = page(self.answers.source.run(), policy=token)
        return Response(text.encode("utf-8", "replace"), media_type="text/html")

    async def record(self, request: Request) -> Response:
        name, _, last = request.path_params["name"].rpartition("/")
        if not (name and last.isascii() and last.isdigit()):
            return await self._answered(self.reader(self._record, request.path_params["name"], None))
        return await self._answered(self.reader(self._record, name, int(last[:10])))

    def _record(self, name: str, argument: Any) -> Response:
        """Return an answer; the list is made once, and again when explanations or scores were stored since."""
        if name != "rows":
            return as_json(self.answers(name, argument))
        now = self.answers.source.version()
        if self._rows is None or self._rows[0] != now:
            self._rows = now, as_json(self.answers(name))
        return self._rows[1]

    async def work(self, request: Request) -> Response:
        if not secrets.compare_digest(request.headers.get("x-token", "").encode(), self.token.encode()):
            raise Refused(
                "Live work needs the token: open the whole address that `sae-italian browse --serve` printed.",
                "Serve il token: apri l’indirizzo intero stampato da `sae-italian browse --serve`.",
                403,
            )
        arguments = await read_json_body(request)
        return as_json(await self._answered(self.worker(self.answers, request.path_params["work"], arguments)))

    async def _answered(self, work: Awaitable[Any]) -> Any:
        """Wait for work on the cache; what fails because the cache was replaced meanwhile is said to be that."""
        try:
            found = await work
        except Refused:
            raise
        except Exception:
            self._check()
            raise
        self._check()
        return found

    def _check(self) -> None:
        if any(watch.replaced() for watch in self.watches):
            raise Refused(
                "The cache was replaced or removed while it was open: stop `sae-italian browse --serve` and start it again.",
                "La cache è stata sostituita o tolta mentre era aperta: ferma `sae-italian browse --serve` e riavvialo.",
                409,
            )


class Watch:
    """Compares a cache's manifest with the one that was opened. A file that was only touched counts as the same."""

    def __init__(self, folder: Path):
        self.file = folder / MANIFEST
        self.stamp, self.content = self._stamped(), self.file.read_bytes()

    def _stamped(self) -> tuple[int, int, int]:
        found = self.file.stat()
        return found.st_mtime_ns, found.st_size, found.st_ino

    def replaced(self) -> bool:
        try:
            now = self._stamped()
            if now != self.stamp and self.file.read_bytes() != self.content:
                return True
        except OSError:
            return True
        self.stamp = now
        return False
