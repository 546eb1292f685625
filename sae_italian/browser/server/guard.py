"""Who may ask, and with what: this machine only, small bodies in good time, and answers that no other page can use.

The server listens on loopback, but any page that this machine's browser shows can send requests there. The Host header
tells such requests apart when a foreign name was made to point here (DNS rebinding), Origin tells the others; JSON as
content type means that no plain form can post.
"""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LOOPBACK = frozenset({"127.0.0.1", "localhost", "[::1]"})
MAX_BODY = 64 * 1024  # bytes
BODY_SECONDS = 10.0
METHODS = {"GET", "HEAD", "POST"}
_HOST = re.compile(r"(\[[0-9a-f:]+\]|[a-z0-9._-]+)(?::\d{1,5})?", re.IGNORECASE)
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "content-security-policy": _POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


class Refused(Exception):
    """A request that is not answered: HTTP status, and why in Italian and English."""

    def __init__(self, status: int, it: str, en: str):
        super().__init__(en)
        self.status, self.it, self.en = status, it, en

    def response(self) -> Response:
        headers = {"retry-after": "2"} if self.status == 503 else {}
        return as_json({"error_it": self.it, "error_en": self.en}, self.status, headers)


def as_json(value: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return a JSON answer; half a surrogate pair becomes a question mark."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return Response(text.encode("utf-8", "replace"), status, headers, "application/json")


def host_name(header: str) -> str:
    """Return the name in a Host header, without the port; empty for anything malformed."""
    match = _HOST.fullmatch(header.strip())
    return match[1].lower() if match else ""


class Guard:
    """ASGI middleware in front of everything."""

    def __init__(self, app: ASGIApp, hosts: frozenset[str] = LOOPBACK):
        self.app, self.hosts = app, hosts

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return

        async def guarded(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message = {**message, "headers": [*message.get("headers", []), *own]}
            await send(message)

        refused = self._refuse(scope)
        await (refused.response() if refused else self.app)(scope, receive, guarded)

    def _refuse(self, scope: Scope) -> Refused | None:
        headers = [(name.decode("latin-1"), value.decode("latin-1")) for name, value in scope["headers"]]
        hosts = [value for name, value in headers if name == "host"]
        if len(hosts) != 1 or not host_name(hosts[0]):
            return Refused(400, "Intestazione Host mancante o malformata.", "The Host header is missing or malformed.")
        if host_name(hosts[0]) not in self.hosts:
            return Refused(
                421,
                "Questo server risponde solo a localhost e 127.0.0.1.",
                "This server answers to localhost and 127.0.0.1 only.",
            )
        if scope["method"] not in METHODS:
            return Refused(405, "Metodo non ammesso.", "This method is not allowed.")
        for origin in (value for name, value in headers if name == "origin"):
            if host_name(origin.partition("://")[2]) not in self.hosts:
                return Refused(403, "Richiesta da un'altra pagina.", "The request comes from another page.")
        return None


async def read_json_body(request: Request) -> Any:
    """Return the JSON of a request. Raises: Refused for another content type, too much, too slow, and no JSON."""
    if request.headers.get("content-type", "").split(";")[0].strip().lower() != "application/json":
        raise Refused(415, "Serve application/json.", "application/json is expected.")
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY:
                    raise Refused(413, "Richiesta troppo grande.", f"The request is larger than {MAX_BODY:,} bytes.")
    except TimeoutError:
        raise Refused(408, "Richiesta troppo lenta.", "The request took too long to arrive.") from None
    try:
        return json.loads(bytes(body))
    except (ValueError, RecursionError):
        raise Refused(400, "Il corpo della richiesta non è JSON.", "The request's body is not JSON.") from None
