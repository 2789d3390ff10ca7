"""A stand-in of the hub's HTTP API, as far as huggingface_hub asks it to push: repositories in memory, large files by LFS."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_standin"


class Hub:
    """What the hub holds: repositories by name, each with its files, privacy and number of commits; `blobs` by SHA-256; `asked` every request."""

    def __init__(self, url: str = "") -> None:
        self.url = url
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.asked: list[tuple[str, str]] = []

    def make(self, name: str, *, private: bool = False, **files: bytes) -> None:
        """A repository that is there; `README_md` is README.md."""
        self.repos[name] = {"private": private, "commits": 1, "files": {file.replace("_", "."): data for file, data in files.items()}}

    def sha(self, name: str) -> str:
        """The last commit of a repository."""
        return hashlib.sha1(f"{name}{self.repos[name]['commits']}".encode()).hexdigest()


@contextmanager
def standing_in() -> Iterator[Hub]:
    """The hub on a free port of this computer."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def reply(self, status: int, found: Any = None, **headers: str) -> None:
            data = json.dumps(found).encode()
            self.send_response(status)
            for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
                self.send_header(name.replace("_", "-"), value)
            self.end_headers()
            self.wfile.write(data)

        def answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = self.path.partition("?")[0]
            hub.asked.append((self.command, path))
            if path.startswith("/blobs/"):
                hub.blobs[path.rpartition("/")[2]] = body
                return self.reply(200, {})
            if self.headers.get("Authorization") != f"Bearer {TOKEN}":
                return self.reply(401, {"error": "Invalid credentials"}, X_Error_Message="Invalid credentials")
            if path == "/api/repos/create":
                asked = json.loads(body)
                name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
                private = asked.get("private") or asked.get("visibility") == "private"
                if name.startswith("others/"):
                    return self.reply(403, {"error": "no"}, X_Error_Message="You don't have the rights to create a model under others")
                hub.make(name, private=bool(private), _gitattributes=b"*.safetensors filter=lfs\n")
                return self.reply(200, {"url": f"{hub.url}/{name}", "name": name})
            if path == "/api/validate-yaml":
                return self.reply(200, {"errors": [], "warnings": []})
            if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
                objects = [
                    {"oid": one["oid"], "size": one["size"], "actions": {"upload": {"href": f"{hub.url}/blobs/{one['oid']}"}}}
                    for one in json.loads(body)["objects"]
                ]
                return self.reply(200, {"transfer": "basic", "objects": objects})
            found = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(preupload|commit|revision)/main)?", path)
            repo = hub.repos.get(found[1]) if found else None
            if found is None or repo is None:
                return self.reply(
                    404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found"
                )
            if found[2] == "preupload":
                modes = [
                    {
                        "path": one["path"],
                        "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                        "shouldIgnore": False,
                        "oid": None,
                    }
                    for one in json.loads(body)["files"]
                ]
                return self.reply(200, {"files": modes})
            if found[2] == "commit":
                lines = [json.loads(line) for line in body.splitlines()]
                if lines[0]["value"].get("parentCommit", hub.sha(found[1])) != hub.sha(found[1]):
                    return self.reply(412, {"error": "A commit has happened since"}, X_Error_Message="A commit has happened since")
                for line in lines[1:]:
                    one = line["value"]
                    data = base64.b64decode(one["content"]) if line["key"] == "file" else hub.blobs[one["oid"]]
                    repo["files"][one["path"]] = data
                repo["commits"] += 1
                oid = hub.sha(found[1])
                return self.reply(200, {"success": True, "commitUrl": f"{hub.url}/{found[1]}/commit/{oid}", "commitOid": oid})
            siblings = [{"rfilename": name} for name in repo["files"]]
            return self.reply(200, {"id": found[1], "modelId": found[1], "sha": hub.sha(found[1]), "private": repo["private"], "siblings": siblings, "tags": []})  # fmt: skip

        do_GET = do_POST = do_PUT = do_HEAD = answer

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
