"""A stand-in of the hub's upload side: repositories, large files apart, commits; what was sent is kept."""

from __future__ import annotations

import base64
import json
from typing import Any

from tests.standing_in import Quiet, StandIn

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class UploadHub(StandIn):
    """`files[repo][path]` are the bytes committed, `private[repo]` and `made[repo]` how it was made (kind, SDK).

    `refuse` is a status for commits.
    """

    def __init__(self):
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.made: dict[str, tuple[str | None, str | None]] = {}
        self.commits: list[tuple[str, str]] = []
        self.blobs: dict[str, bytes] = {}
        self.tokens: set[str] = set()
        self.refuse = 0
        super().__init__(_Handler)

    def commit(self, repo: str, lines: list[dict[str, Any]]) -> None:
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.commits.append((repo, value["summary"]))
            elif line["key"] == "file":
                self.files[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                self.files[repo][value["path"]] = self.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del self.files[repo][value["path"]]


class _Handler(Quiet):
    stand_in: UploadHub

    def _body(self) -> bytes:
        self.stand_in.tokens.add(self.headers.get("authorization", ""))
        return self.rfile.read(int(self.headers.get("content-length", 0)))

    def _answer(self, value: Any = None, status: int = 200, **headers: str) -> None:
        body = b"" if self.command == "HEAD" else json.dumps(value if value is not None else {}).encode()
        self.send_response(status)
        for name, content in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), content)
        self.end_headers()
        self.wfile.write(body)

    def _repo(self, path: str) -> str:
        return "/".join(path.split("/")[3:5])

    def do_GET(self):
        self._body()
        repo = self._repo(self.path.split("?")[0])
        if repo not in self.stand_in.files:
            self._answer({"error": "Repository not found"}, 404, X_Error_Code="RepoNotFound")
            return
        if "/tree/" in self.path:
            found = self.stand_in.files[repo].items()
            self._answer([{"type": "file", "path": path, "oid": "0", "size": len(data)} for path, data in found])
            return
        siblings = [{"rfilename": path} for path in self.stand_in.files[repo]]
        self._answer({"id": repo, "modelId": repo, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []})

    def do_HEAD(self):
        self._body()
        repo, _, path = self.path.strip("/").partition("/resolve/main/")
        content = self.stand_in.files.get(repo, {}).get(path)
        if content is None:
            self._answer(status=404, X_Error_Code="EntryNotFound")
            return
        self._answer(ETag='"x"', X_Repo_Commit=COMMIT, X_Linked_Size=str(len(content)))

    def do_PUT(self):
        body = self._body()
        self.stand_in.blobs[self.path.rsplit("/", 1)[1]] = body
        self._answer()

    def do_POST(self):
        body, hub = self._body(), self.stand_in
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
            if repo in hub.files:
                self._answer({"error": "exists", "url": f"{hub.url}/{repo}"}, 409)
                return
            hub.files[repo] = {}
            hub.made[repo] = asked.get("type"), asked.get("sdk")
            hub.private[repo] = asked.get("visibility") == "private" or asked.get("private") is True
            self._answer({"url": f"{hub.url}/{repo}", "name": repo, "id": "1"})
        elif self.path == "/api/validate-yaml":
            self._answer({"errors": [], "warnings": []})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            modes = [(f["path"], "lfs" if f["path"].endswith(".safetensors") else "regular") for f in files]
            self._answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            objects = [
                {**o, "actions": {"upload": {"href": f"{hub.url}/lfs/{o['oid']}"}}} for o in json.loads(body)["objects"]
            ]
            self._answer({"transfer": "basic", "objects": objects})
        elif "/commit/" in self.path:
            if hub.refuse:
                self._answer({"error": "refused"}, hub.refuse)
                return
            repo = self._repo(self.path)
            hub.commit(repo, [json.loads(line) for line in body.splitlines()])
            self._answer(
                {
                    "success": True,
                    "commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}",
                    "commitOid": COMMIT,
                    "hookOutput": "",
                }
            )
        else:
            self._answer(status=404)
