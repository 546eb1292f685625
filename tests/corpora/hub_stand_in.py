"""A local stand-in of the Hugging Face hub: real paths, ranges and headers, and faults on demand."""

from __future__ import annotations

import gzip
import io
import json
from collections import Counter
from urllib.parse import parse_qs, unquote, urlsplit

from tests.standing_in import Quiet, StandIn

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(StandIn):
    """Repositories as {hub id: {path: bytes}}; `fault(path, name, times)` makes the next requests for a file fail."""

    def __init__(self):
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.gated: set[str] = set()
        self.faults: dict[str, list[str]] = {}
        self.requests: Counter[str] = Counter()
        self.ranges: list[tuple[str, int, int]] = []
        self.revisions: set[str] = {"main", "refs/convert/parquet", COMMIT}
        super().__init__(_Handler)

    def fault(self, path: str, name: str, times: int = 1) -> None:
        self.faults.setdefault(path, []).extend([name] * times)


class _Handler(Quiet):
    stand_in: Hub

    def _json(self, value, status=200, **headers):
        body = json.dumps(value).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", "Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(content))
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        if path.startswith("/api/datasets/"):
            owner, name, verb, rest = (path.removeprefix("/api/datasets/").split("/", 3) + ["", "", ""])[:4]
            return self._api(f"{owner}/{name}", verb, rest)
        if path.count("/") < 5:
            return self._json({"error": "Not found"}, 404)
        owner, name, _, rest = path.removeprefix("/datasets/").split("/", 3)
        file = rest.removeprefix(COMMIT + "/")
        return self._file(f"{owner}/{name}", file)

    do_HEAD = do_GET

    def do_POST(self):
        """The paths-info call: sizes of the files that are there."""
        owner, name = unquote(urlsplit(self.path).path).removeprefix("/api/datasets/").split("/")[:2]
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        files = self.stand_in.repositories.get(f"{owner}/{name}", {})
        asked = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body)["paths"]
        self._json([_entry(path, files[path]) for path in asked if path in files])

    def _api(self, repo, verb, rest):
        hub = self.stand_in
        hub.requests["api"] += 1
        fault = _next(hub, "api")
        if fault:
            return self._fault(fault, b"", 0, 0)
        if repo not in hub.repositories:
            return self._json({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
        revision = rest.split("/")[0] if rest.startswith(COMMIT) else rest
        if revision and revision not in hub.revisions:
            return self._json({"error": "Revision not found"}, 404, X_Error_Code="RevisionNotFound")
        if verb == "revision":
            return self._json({"id": repo, "sha": COMMIT, "private": False, "tags": [], "downloads": 0, "siblings": []})
        return self._json([_entry(path, content) for path, content in hub.repositories[repo].items()])

    def _file(self, repo, file):
        hub = self.stand_in
        hub.requests[file] += 1
        if repo in hub.gated:
            message = "Access to dataset is restricted. You must be authenticated to access it."
            return self._json({"error": message}, 401, X_Error_Code="GatedRepo", X_Error_Message=message)
        content = hub.repositories.get(repo, {}).get(file)
        if content is None:
            return self._json({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound")
        first, last = 0, len(content) - 1
        if "Range" in self.headers:
            first, last = (int(x) for x in self.headers["Range"].removeprefix("bytes=").split("-"))
            hub.ranges.append((file, first, last))
        body = content[first : last + 1]
        fault = _next(hub, file)
        if fault:
            return self._fault(fault, body, first, len(content))
        return self._body(body, first, len(content))

    def _body(self, body, first, total, length=None):
        self.send_response(206)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.send_header("Content-Range", f"bytes {first}-{first + len(body) - 1}/{total}")
        self.send_header("X-Repo-Commit", COMMIT)
        self.end_headers()
        self.wfile.write(body)

    def _fault(self, fault, body, first, total):
        """drop: half the body, then the connection closes; reset: nothing, and it closes; else a status."""
        if fault == "drop":
            self._body(body[: len(body) // 2], first, total, length=len(body))
            self.close_connection = True
            self.connection.close()
        elif fault == "reset":
            self.close_connection = True
            self.connection.close()
        else:
            status, _, after = fault.partition(":")
            self._json({"error": status}, int(status), **({"Retry_After": after} if after else {}))


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}


def _next(hub: Hub, key: str) -> str | None:
    waiting = hub.faults.get(key)
    return waiting.pop(0) if waiting else None


def jsonl(rows) -> bytes:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()


def gz(data: bytes) -> bytes:
    return gzip.compress(data, mtime=0)


def parquet(rows, row_group_size: int = 10) -> bytes:
    import pyarrow as pa
    import pyarrow.parquet as pq

    sink = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), sink, row_group_size=row_group_size)
    return sink.getvalue()
