"""A stand-in of W&B's server: it answers what the API asks before a report, and keeps every call."""

from __future__ import annotations

import json
from typing import Any

from tests.standing_in import Quiet, StandIn

VIEWER = {"id": "u1", "entity": "io", "username": "io", "email": "io@example.com", "admin": False, "flags": "{}"}
VIEWER |= {"teams": {"edges": []}, "name": "Io"}
PAGE = {"endCursor": None, "hasNextPage": False}


class WandbServer(StandIn):
    """`calls` are the names and variables of the GraphQL operations asked for; `refuse` is what a report is refused with."""

    def __init__(self):
        self.calls: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str] = set()
        self.refuse = ""
        super().__init__(_Handler)

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


class _Handler(Quiet):
    stand_in: WandbServer

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
        self.stand_in.calls.append((name, variables))
        self.stand_in.keys.add(self.headers.get("authorization", ""))
        if self.stand_in.refuse and name == "upsertView":
            self._send({"errors": [{"message": self.stand_in.refuse}]}, 403)
            return
        self._send({"data": self.stand_in.answer(query, variables)})
