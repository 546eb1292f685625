"""The routes: the page, its modules, the records of the cache, and live work.

    GET  /                     the page
    GET  /assets/<name>        its modules and its style: the files of static/, read once; no path leads to any other
    GET  /api/run, /api/rows   the run, and the list by column
    GET  /api/card/<latent>    one latent
    GET  /api/wide/<latent>    its passages, each as wide as its window
    GET  /api/other/...        the same of an SAE to compare with, and /api/matches
    POST /api/live/<work>      tokens, steer, ablate, explain: JSON in, JSON out

Errors are {error_it, error_en}: 400 malformed, 403 and 421 not from here, 404, 408, 409 the cache was replaced, 413, 415,
422 an argument, 503 too much at once, 504 too slow.
"""

from __future__ import annotations

from contextlib import asynccontextmanager
from functools import partial
from importlib import resources
from typing import Any

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from sae_italian.base.errors import SaeItalianError
from sae_italian.browser.bundle import page, static_text, style
from sae_italian.browser.compare import Other
from sae_italian.browser.live import CALLS, Live, in_both
from sae_italian.browser.server.guard import LOOPBACK, Guard, Refused, as_json, read_json_body
from sae_italian.browser.server.records import Records
from sae_italian.browser.server.work import Worker
from sae_italian.browser.source import LatentSource

KINDS = {".js": "text/javascript", ".css": "text/css"}


def create_app(
    source: LatentSource,
    live: Live | None = None,
    *,
    other: Other | None = None,
    hosts: frozenset[str] = LOOPBACK,
    seconds: float = 60.0,
) -> Guard:
    """Return the server of one cache, to be run on loopback. `seconds` is the longest that live work may take."""
    server = Server(source, live, other, seconds)
    routes = [
        Route("/", server.page),
        Route("/assets/{name}", server.asset),
        Route("/api/matches", server.matches),
        Route("/api/live/{work}", server.work, methods=["POST"]),
        *server.records.routes("/api"),
    ]
    if other is not None:
        routes += Records(other.source, server.reader).routes("/api/other")
    handlers: Any = {
        Refused: lambda _, error: error.response(),
        SaeItalianError: lambda _, error: as_json(in_both(error), 422),
        HTTPException: lambda _, error: as_json(in_both(error.detail), error.status_code),
        Exception: lambda _, error: as_json(in_both(f"a defect of ours: {type(error).__name__}"), 500),
    }
    app = Starlette(routes=routes, exception_handlers=handlers, lifespan=server.lifespan)
    app.router.redirect_slashes = False
    return Guard(app, hosts)  # outside of everything, so that a defect's answer has its headers too


class Server:
    """What the routes share. Records are made in one thread and live work is done in another, so neither waits."""

    def __init__(self, source: LatentSource, live: Live | None, other: Other | None, seconds: float):
        self.source, self.live, self.other = source, live, other
        self.reader = Worker("reader", waiting=1024, seconds=60.0)
        self.worker = Worker("live", waiting=128, seconds=seconds)
        self.assets = {
            item.name: (static_text(item.name).encode(), KINDS[ending])
            for item in (resources.files("sae_italian.browser") / "static").iterdir()
            if (ending := "." + item.name.rpartition(".")[2]) in KINDS
        }
        self.assets["app.css"] = (style().encode(), KINDS[".css"])
        works = {"works": list(CALLS), "llm": live.endpoint is not None} if live else None
        self.records = Records(source, self.reader, live=works, compare=other.name if other else None)

    @asynccontextmanager
    async def lifespan(self, _: Starlette):
        yield
        self.worker.close()
        self.reader.close()

    # --- files -------------------------------------------------------------------------------------------------------

    async def page(self, _: Request) -> Response:
        text = page(self.source.run(), script='<script type="module" src="assets/served.js"></script>')
        return Response(text.encode("utf-8", "replace"), media_type="text/html; charset=utf-8")

    async def asset(self, request: Request) -> Response:
        found = self.assets.get(request.path_params["name"])
        if found is None:
            raise Refused(404, "Non c'è nessun file con questo nome.", "There is no file of that name.")
        return Response(found[0], media_type=found[1])

    async def matches(self, _: Request) -> Response:
        if self.other is None:
            raise Refused(404, "Non c'è un'altra SAE.", "There is no other SAE.")
        return as_json(self.other.matches)

    # --- live work ---------------------------------------------------------------------------------------------------

    async def work(self, request: Request) -> Response:
        name = request.path_params["work"]
        if name not in CALLS:
            raise Refused(404, f"Lavoro sconosciuto. Ci sono: {', '.join(CALLS)}.", f"There are: {', '.join(CALLS)}.")
        if self.live is None:
            raise Refused(
                404,
                "Nessun lavoro dal vivo: la SAE o il modello di questa cache non sono su questa macchina.",
                "No live work: this cache's SAE or its model is not on this machine.",
            )
        arguments = await read_json_body(request)
        found = await self.records.while_it_lasts(partial(self.worker, self.live.call, name, arguments))
        return as_json(found)
