"""The browser of a cache on this machine, for one person and on loopback alone (pip install 'sae-italian[serve]').

    GET  /[?token=...]            the page; with the server's token it may ask for live work
    GET  /assets/app.js, app.css  its script and its style; no path leads to any file
    GET  /api/<name>[/<latent>]   the records: run, rows, card/3, wide/3, matches, other/card/3 (opening.py)
    POST /api/live/<work>         tokens, steer, ablate, explain: JSON in, JSON out; the header X-Token has the token

Reading needs no token: it shows what the cache's folder holds and costs nothing, so a link to a card can be passed on.

Errors are {error_it, error_en}: 400 malformed (plain text: not from here), 403 another page or no token, 404, 409 the cache
was replaced, 413, 415, 422 an argument, 504 too slow.

The server listens on loopback, but any page that this machine's browser shows can send requests there. The Host header
tells such requests apart when a foreign name was made to point here (DNS rebinding; Starlette's TrustedHostMiddleware),
Origin, which has to be the page's own, tells the others; JSON as content type means that no plain form can post.
"""

import asyncio
import errno
import json
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from functools import lru_cache
from typing import Any, TypeVar

import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware.base import BaseHTTPMiddleware, RequestResponseEndpoint
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from sae_italian.base.errors import SaeItalianError, UsageError
from sae_italian.browser.live import Refused, in_both
from sae_italian.browser.opening import PageAnswers
from sae_italian.browser.page import page, script, style
from sae_italian.cache.layout import MANIFEST

T = TypeVar("T")
HOST, PORT = "127.0.0.1", 8765
LOOPBACK = (HOST, "localhost", "[::1]")
MAX_BODY = 64 * 1024  # bytes
SECONDS = 60.0  # the longest that an answer may take
HEADERS = {
    "content-security-policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Server(BaseHTTPMiddleware):
    """The server of one cache, to be run on loopback: outside of everything it refuses other pages and adds our headers.

    Records are made in one thread and live work is done in another, so neither waits, and a model is never used twice at
    once. `token` is what live work asks for, which may cost money: it is known to whoever was told the address, and to
    no other process or page of this machine.
    """

    def __init__(self, answers: PageAnswers):
        self.answers, self.token = answers, secrets.token_urlsafe(16)
        self.reader = ThreadPoolExecutor(1, thread_name_prefix="reader")
        self.worker = ThreadPoolExecutor(1, thread_name_prefix="live")
        sources = [answers.source, *([answers.other.source] if answers.other else [])]
        self.manifests = [(file, file.read_bytes()) for file in (one.cache.folder / MANIFEST for one in sources)]
        self._rows = lru_cache(1)(lambda version: as_json(answers("rows")))
        js, css = script("served"), style()
        routes = [
            Route("/", self.page),
            Route("/assets/app.js", lambda _: Response(js, media_type="text/javascript")),
            Route("/assets/app.css", lambda _: Response(css, media_type="text/css")),
            Route("/api/live/{work}", self.work, methods=["POST"]),
            Route("/api/{name:path}", self.record),
        ]
        handlers: Any = {
            SaeItalianError: lambda _, error: as_json(in_both(error), getattr(error, "status", 422)),
            ClientDisconnect: lambda *_: Response(status_code=400),  # which nobody reads
            HTTPException: lambda _, error: as_json(in_both(error.detail), error.status_code),
            Exception: lambda _, error: as_json(in_both(f"a defect of ours: {type(error).__name__}"), 500),
        }
        app = Starlette(routes=routes, exception_handlers=handlers, lifespan=self.lifespan)
        app.router.redirect_slashes = False
        super().__init__(TrustedHostMiddleware(app, LOOPBACK))

    async def dispatch(self, request: Request, call_next: RequestResponseEndpoint) -> Response:
        host, origins = request.headers.get("host"), request.headers.getlist("origin")
        refused = in_both(Refused("The request comes from another page.", "Richiesta da un'altra pagina."))
        foreign = any(origin.partition("://")[2] != host for origin in origins)
        answer = as_json(refused, 403) if foreign else await call_next(request)
        answer.headers.update(HEADERS)
        return answer

    @asynccontextmanager
    async def lifespan(self, _: Starlette):
        yield
        for thread in (self.worker, self.reader):
            thread.shutdown(wait=False, cancel_futures=True)

    def _knows(self, token: str) -> bool:
        return secrets.compare_digest(token.encode(), self.token.encode())

    async def page(self, request: Request) -> Response:
        known = self._knows(request.query_params.get("token", ""))
        token = f'<meta name="token" content="{self.token}">' if known else ""
        text = page(self.answers.source.run(), policy=token)
        return Response(text.encode("utf-8", "replace"), media_type="text/html")

    async def record(self, request: Request) -> Response:
        whole = request.path_params["name"]
        name, _, last = whole.rpartition("/")
        if name and last.isascii() and last.isdigit():
            return await self.done(self.reader, self._record, name, int(last[:10]))
        return await self.done(self.reader, self._record, whole, None)

    def _record(self, name: str, argument: Any) -> Response:
        """Return an answer; the list is made once, and again when explanations or scores were stored since."""
        if name == "rows":
            return self._rows(self.answers.source.version())
        return as_json(self.answers(name, argument))

    async def work(self, request: Request) -> Response:
        if not self._knows(request.headers.get("x-token", "")):
            raise Refused(
                "Live work needs the token: open the whole address that `sae-italian browse --serve` printed.",
                "Serve il token: apri l’indirizzo intero stampato da `sae-italian browse --serve`.",
                403,
            )
        arguments = await read_json_body(request)
        return as_json(await self.done(self.worker, self.answers, request.path_params["work"], arguments))

    async def done(self, thread: ThreadPoolExecutor, function: Callable[..., T], *arguments: object) -> T:
        """Return the function's result, done in a thread that does one thing at a time.

        A call that is not done after SECONDS is given up (504): if it has not begun it never does; if it has, it ends in
        its own time and the next one follows. What fails because the cache was replaced meanwhile is said to be that.
        Raises: Refused, and what the function raises.
        """
        try:
            return await asyncio.wait_for(asyncio.wrap_future(thread.submit(function, *arguments)), SECONDS)
        except TimeoutError:
            raise Refused(
                f"No answer within {SECONDS:g} seconds; try a shorter text.",
                f"Nessuna risposta in {SECONDS:g} secondi: prova con un testo più corto.",
                504,
            ) from None
        finally:
            if self._replaced():
                raise Refused(
                    "The cache was replaced or removed while it was open: stop `sae-italian browse --serve` and start it again.",
                    "La cache è stata sostituita o tolta mentre era aperta: ferma `sae-italian browse --serve` e riavvialo.",
                    409,
                )

    def _replaced(self) -> bool:
        """Return whether a cache's manifest is another one than what was opened."""
        try:
            return any(file.read_bytes() != content for file, content in self.manifests)
        except OSError:
            return True


def as_json(value: Any, status: int = 200) -> Response:
    """Return a JSON answer; half a surrogate pair becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, media_type="application/json")


async def read_json_body(request: Request) -> Any:
    """Return the JSON of a request. Raises: Refused for another content type, too much, and no JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused("application/json is expected.", "Serve application/json.", 415)
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY:
            raise Refused(f"The request is larger than {MAX_BODY:,} bytes.", "Richiesta troppo grande.", 413)
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise Refused("The request's body is not JSON.", "Il corpo della richiesta non è JSON.", 400) from None


# --- the port ---------------------------------------------------------------------------------------------------------


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


def serve(app: Server, port: int, ready: Callable[[str], None]) -> None:
    """Serve until Ctrl-C; `ready` is told the address, with the token, once the port is ours.

    Raises: UsageError, as `bind`.
    """
    server = make_server(app)
    # uvicorn closes in good order and passes the signal on
    with bind(port) as found, suppress(KeyboardInterrupt):
        ready(f"http://{HOST}:{found.getsockname()[1]}/?token={app.token}")
        server.run(sockets=[found])


def make_server(app: Any) -> uvicorn.Server:
    """Return a uvicorn server with small limits: it serves one person's browser."""
    config = uvicorn.Config(
        app,
        http="h11",
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
