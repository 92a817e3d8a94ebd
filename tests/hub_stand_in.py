"""The part of the hub's HTTP interface that writes repositories, on the loopback, and keeps what it was sent."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha1, sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

TOKEN = "hf_" + "PlantedTokenOfATest" * 2
LFS_SUFFIXES = (".safetensors", "tokenizer.json")


@dataclass
class Repository:
    """Files by name of main, and of every pull request; commits are counted."""

    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    pull_requests: list[dict[str, bytes]] = field(default_factory=list)
    num_commits: int = 0

    @property
    def sha(self) -> str:
        return f"{self.num_commits:040d}"


@dataclass
class StandIn:
    """What the hub holds and was asked. `refusals` maps a method and a part of a path to a status and a message."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    stored: dict[str, bytes] = field(default_factory=dict)  # large files by SHA-256
    asked: list[str] = field(default_factory=list)
    refusals: dict[tuple[str, str], tuple[int, str]] = field(default_factory=dict)
    role: str = "write"
    silent: bool = False
    corrupts: str = ""
    endpoint: str = ""

    def count(self, method: str, part: str) -> int:
        return sum(line.startswith(method) and part in line for line in self.asked)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandIn

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def log_message(self, *arguments: object) -> None:
        pass

    def _answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = self._chunks()
        url = urlsplit(self.path)
        self.hub.asked.append(f"{self.command} {self.path}")
        if self.hub.silent:
            threading.Event().wait(30)
            return None
        for (method, part), (status, message) in self.hub.refusals.items():
            if method == self.command and part in url.path:
                content = {"error": message, "errors": [{"message": message}]}
                return self._send(status, content, {"X-Error-Message": message})
        if url.path.startswith("/store/"):  # a place with a signature of its own, without the token
            self.hub.stored[url.path.rpartition("/")[2]] = body
            return self._send(200, {})
        if url.path == "/api/validate-yaml":  # which anybody may ask
            return self._send(200, {"errors": [], "warnings": [{"message": "a warning of the hub"}]})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            message = "Invalid credentials in Authorization header"
            return self._send(401, {"error": message}, {"X-Error-Message": message})
        return self._route(url.path, parse_qs(url.query), body)

    def _chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _route(self, path: str, query: dict[str, list[str]], body: bytes) -> None:
        if path == "/api/whoami-v2":
            return self._send(200, {"name": "me", "auth": {"accessToken": {"role": self.hub.role}}})
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            private = asked.get("private", asked.get("visibility") == "private")
            self.hub.repositories[name] = Repository(private=private, files={".gitattributes": b"*.safetensors lfs"})
            return self._send(200, {"url": f"{self.hub.endpoint}/{name}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            return self._send(200, self._places(json.loads(body)["objects"]))
        name, _, rest = path.removeprefix("/api/models/").partition("/")
        short, _, rest = rest.partition("/")
        repository = self.hub.repositories.get(f"{name}/{short}")
        if repository is None:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        if rest.startswith("preupload/"):
            return self._send(200, {"files": self._modes(json.loads(body), repository)})
        if rest.startswith("commit/"):
            return self._commit(f"{name}/{short}", repository, body, is_pr="create_pr" in query)
        if rest.startswith("revision/refs%2Fpr%2F"):
            return self._info(repository, repository.pull_requests[int(rest.rpartition("%2F")[2]) - 1])
        return self._info(repository, repository.files)

    def _info(self, repository: Repository, files: dict[str, bytes]) -> None:
        siblings = []
        for name, content in files.items():
            sibling: dict[str, Any] = {"rfilename": name, "size": len(content), "blobId": _git_digest(content)}
            if name.endswith(LFS_SUFFIXES):
                digest = sha256(content).hexdigest()
                sibling["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
            siblings.append(sibling)
        about = {"id": "x", "private": repository.private, "gated": "manual" if repository.gated else False}
        self._send(200, {**about, "sha": repository.sha, "siblings": siblings})

    def _modes(self, asked: dict[str, Any], repository: Repository) -> list[dict[str, Any]]:
        """As the hub does: a .gitignore in the repository leaves files out, unless the client sends another."""
        ignored = ".gitignore" in repository.files and "gitIgnore" not in asked
        modes = []
        for name in (file["path"] for file in asked["files"]):
            content, is_large = repository.files.get(name), name.endswith(LFS_SUFFIXES)
            digest = None if content is None else sha256(content).hexdigest() if is_large else _git_digest(content)
            mode = "lfs" if is_large else "regular"
            modes.append({"path": name, "uploadMode": mode, "shouldIgnore": ignored, "oid": digest})
        return modes

    def _places(self, objects: list[dict[str, Any]]) -> dict[str, Any]:
        found = []
        for each in objects:
            place = f"{self.hub.endpoint}/store/{each['oid']}?X-Amz-Signature=secret"
            actions = {} if each["oid"] in self.hub.stored else {"actions": {"upload": {"href": place}}}
            found.append({**each, **actions})
        return {"objects": found}

    def _commit(self, name: str, repository: Repository, body: bytes, *, is_pr: bool) -> None:
        files = dict(repository.files)
        for line in body.splitlines():
            entry = json.loads(line)
            key, value = entry["key"], entry["value"]
            if key == "header" and value.get("parentCommit") not in (None, repository.sha):
                return self._send(412, {"error": "A commit has happened since"}, {"X-Error-Message": "has happened"})
            if key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.stored[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            if key != "header" and value["path"] == self.hub.corrupts:
                files[value["path"]] = b"something else"
        repository.num_commits += 1
        answer = {"commitUrl": f"{self.hub.endpoint}/{name}/commit/{repository.sha}", "commitOid": repository.sha}
        if is_pr:
            repository.pull_requests.append(files)
            answer["pullRequestUrl"] = f"{self.hub.endpoint}/{name}/discussions/{len(repository.pull_requests)}"
        else:
            repository.files = files
        return self._send(200, answer)

    def _send(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        self.wfile.write(body)


def _git_digest(content: bytes) -> str:
    return sha1(b"blob %d\0" % len(content) + content).hexdigest()


@contextmanager
def stand_in() -> Iterator[StandIn]:
    """Serve a hub without repositories."""
    hub = StandIn()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
