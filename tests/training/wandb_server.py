"""A stand-in of W&B's server: it answers what the API asks before a report, and keeps every call."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

VIEWER = {"id": "u1", "entity": "io", "username": "io", "email": "io@example.com", "admin": False, "flags": "{}"}
VIEWER |= {"teams": {"edges": []}, "name": "Io"}
PAGE = {"endCursor": None, "hasNextPage": False}


class WandbServer:
    """`calls` are the names and variables of the GraphQL operations asked for; `refuse` is what a report is refused with."""

    def __init__(self):
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str] = set()
        self.refuse = ""
        stand_in = self

        class Handler(_Handler):
            server_of = stand_in

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()

    def answer(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        """Return the data of one operation, told by its first field."""
        if "upsertView" in query:
            view = {"id": "VmlldzoxMjM=", "type": "runs", "name": "n", "displayName": variables.get("displayName")}
            view |= {"description": "", "spec": variables.get("spec"), "updatedAt": "2026-01-01T00:00:00Z"}
            view["project"] = {"id": "p1", "name": variables["projectName"], "entityName": variables["entityName"]}
            return {"upsertView": {"view": view, "inserted": True}}
        if "upsertModel" in query:
            return {"upsertModel": {"model": {"id": "p1", "name": "sae-italian"}, "inserted": True}}
        if "models(" in query:
            return {"models": {"edges": [], "pageInfo": PAGE}}
        if "project(" in query:
            return {"project": {"id": "p1", "internalId": "i1", "name": variables.get("projectName")}}
        return {"viewer": VIEWER, "serverInfo": {"features": [], "cliVersionInfo": {}, "latestLocalVersionInfo": None}}


class _Handler(BaseHTTPRequestHandler):
    server_of: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def _send(self, value: Any, status: int = 200) -> None:
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        self._send({})

    def _body(self) -> bytes:
        """Return what was sent, of a known length or in chunks."""
        if "chunked" not in self.headers.get("transfer-encoding", ""):
            return self.rfile.read(int(self.headers.get("content-length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self):
        body = self._body()
        if not self.path.endswith("/graphql"):  # what the package tells of itself
            self._send({})
            return
        asked = json.loads(body)
        query, variables = asked.get("query", ""), asked.get("variables") or {}
        name = query.split("(")[0].split("{")[0].split()[-1] if query.strip() else ""
        self.server_of.calls.append((name, variables))
        self.server_of.keys.add(self.headers.get("authorization", ""))
        if self.server_of.refuse and name == "upsertView":
            self._send({"errors": [{"message": self.server_of.refuse}]}, 403)
            return
        self._send({"data": self.server_of.answer(query, variables)})
