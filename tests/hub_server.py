"""The part of the Hugging Face Hub that the real client needs for a push and a fetch. The server is ours, not theirs.

It keeps repositories in memory, speaks the legacy LFS protocol (`HF_HUB_DISABLE_XET=1` in the client) and refuses what
the Hub refuses: no token, a commit of an LFS file that was never uploaded, a card whose metadata is no YAML.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

TOKEN = "hf_" + "t" * 34
LFS = (".safetensors", ".bin")


class Hub:
    """Repositories by `models/owner/name`: path -> content; LFS objects by hash; what was asked for."""

    def __init__(self) -> None:
        self.url = ""
        self.repositories: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.objects: dict[str, bytes] = {}
        self.commits: list[list[str]] = []
        self.uploaded: list[int] = []  # bytes of each LFS upload


def _tree(files: dict[str, bytes]) -> list[dict[str, Any]]:
    entries = []
    for path, content in files.items():
        blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        entry: dict[str, Any] = {"type": "file", "path": path, "size": len(content), "oid": blob}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
        entries.append(entry)
    return entries


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if found := re.fullmatch(r"/api/((?:models|datasets)/[^/]+/[^/]+)/tree/main(?:/(.*))?", path):
            files = self.hub.repositories.get(found[1])
            if files is None:
                self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
            else:
                inside = f"{found[2]}/" if found[2] else ""
                self.reply(200, _tree({name: data for name, data in files.items() if name.startswith(inside)}))
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/main/(.+)", path):
            content = self.hub.repositories[f"{'datasets' if found[1] else 'models'}/{found[2]}"][found[3]]
            etag = hashlib.sha256(content).hexdigest()
            self.reply(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40})
        else:
            self.reply(404, {"error": f"not in this server: {self.path}"})

    do_HEAD = do_GET

    def do_PUT(self) -> None:
        content = self.body()
        oid = self.path.rpartition("/")[2]
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.objects[oid] = content
        self.hub.uploaded.append(len(content))
        self.reply(200, {})

    def do_POST(self) -> None:
        body = self.body()
        path = self.path.partition("?")[0]
        if path == "/api/validate-yaml":
            self.reply(200, {"errors": [], "warnings": []} if _has_metadata(json.loads(body)["content"]) else {
                "errors": [{"message": "no metadata"}], "warnings": []})  # fmt: skip
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.reply(401, {"error": "Invalid credentials in Authorization header"})
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('type', 'model')}s/{asked.get('organization', 'me')}/{asked['name']}"
            if name in self.hub.repositories:
                self.reply(409, {"error": "You already created this repo", "url": f"{self.hub.url}/{name}"})
                return
            self.hub.repositories[name], self.hub.private[name] = (
                {},
                asked.get("visibility") == "private" or asked.get("private", False),
            )
            self.reply(200, {"url": f"{self.hub.url}/{name.removeprefix('models/')}"})
        elif found := re.fullmatch(r"/api/(.+)/preupload/main", path):
            there = {entry["path"]: entry["oid"] for entry in _tree(self.hub.repositories[found[1]])}
            self.reply(200, {"files": [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                 "shouldIgnore": False, "oid": there.get(file["path"])}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.reply(200, {"transfer": "basic", "objects": [
                asked if asked["oid"] in self.hub.objects else
                asked | {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}"}}}
                for asked in json.loads(body)["objects"]
            ]})  # fmt: skip
        elif found := re.fullmatch(r"/api/(.+)/commit/main", path):
            self.commit(self.hub.repositories[found[1]], [json.loads(line) for line in body.splitlines()])
        else:
            self.reply(404, {"error": f"not in this server: {self.path}"})

    def commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        added = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                added[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    self.reply(400, {"error": f"LFS pointer {value['path']} points to no object"})
                    return
                added[value["path"]] = self.hub.objects[value["oid"]]
        files |= added
        self.hub.commits.append(sorted(added))
        self.reply(200, {"commitUrl": f"{self.hub.url}/me/x/commit/{'c' * 40}", "commitOid": "c" * 40, "success": True})

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        known = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (known | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        pass


def _has_metadata(card: str) -> bool:
    import yaml

    found = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return bool(found) and isinstance(yaml.safe_load(found[1]), dict)


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
