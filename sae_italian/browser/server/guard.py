"""Who may ask, and with what: this machine only, small bodies in good time, and answers that no other page can use.

The server listens on loopback, but any page that this machine's browser shows can send requests there. The Host header
tells such requests apart when a foreign name was made to point here (DNS rebinding; Starlette's TrustedHostMiddleware),
Origin, which has to be the page's own, tells the others; JSON as content type means that no plain form can post.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sae_italian.browser.answers import Refused, in_both

T = TypeVar("T")
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
MAX_BODY = 64 * 1024  # bytes
BODY_SECONDS = 10.0
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


def as_json(value: Any, status: int = 200) -> Response:
    """Return a JSON answer; half a surrogate pair becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    headers = {"retry-after": "2"} if status == 503 else {}
    return Response(text.encode("utf-8", "replace"), status, headers, "application/json")


class Guard:
    """ASGI middleware outside of everything: refuses other pages, and adds our headers to every answer."""

    def __init__(self, app: ASGIApp, token: str):
        self.app, self.token = app, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message).update(HEADERS)
            await send(message)

        headers = Headers(scope=scope)
        foreign = any(urlsplit(origin).netloc != headers.get("host") for origin in headers.getlist("origin"))
        refused = in_both(Refused("The request comes from another page.", "Richiesta da un'altra pagina."))
        await (as_json(refused, 403) if foreign else self.app)(scope, receive, guarded)


async def read_json_body(request: Request) -> Any:
    """Return the JSON of a request. Raises: Refused for another content type, too much, too slow, and no JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused("application/json is expected.", "Serve application/json.", 415)
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise Refused(f"The request is larger than {MAX_BODY:,} bytes.", "Richiesta troppo grande.", 413)
        return json.loads(bytes(body))
    except TimeoutError:
        raise Refused("The request took too long to arrive.", "Richiesta troppo lenta.", 408) from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, Refused):
            raise
        raise Refused("The request's body is not JSON.", "Il corpo della richiesta non è JSON.", 400) from None


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
                "Too much work is queued; try again shortly.", "Troppo lavoro in coda: riprova tra poco.", 503
            )
        self._held += 1
        try:
            done = self._executor.submit(function, *arguments)
            return await asyncio.wait_for(asyncio.wrap_future(done), self.seconds)
        except TimeoutError:
            raise Refused(
                f"No answer within {self.seconds:g} seconds; try a shorter text.",
                f"Nessuna risposta in {self.seconds:g} secondi: prova con un testo più corto.",
                504,
            ) from None
        finally:
            self._held -= 1

    def close(self) -> None:
        self._executor.shutdown(wait=False, cancel_futures=True)
