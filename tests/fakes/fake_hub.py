"""A stand-in for the hub: the part of its HTTP interface that ``huggingface_hub`` uses, without Xet."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS_BYTES = 4096
"""Files from this size are LFS files."""
TOKEN = "hf_writer"
READER = "hf_reader"


@dataclass
class Repository:
    """A repository: the files of every commit, and the commits of branches."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], branch: str = "main") -> str:
        """Add a commit with these files and return its id."""
        listing = "".join(f"{name}\0{hashlib.sha1(files[name]).hexdigest()}\0" for name in sorted(files))
        commit = hashlib.sha1(f"{len(self.commits)}{listing}".encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


@dataclass
class FakeHub:
    """The hub's state, and what it was asked."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)
    """Method and path of every request."""
    broken: dict[str, int] = field(default_factory=dict)
    """Status to answer, by a regular expression of method and path."""
    before: dict[str, Callable[[], None]] = field(default_factory=dict)
    """What to do before an answer, by a regular expression of method and path."""
    altered: dict[str, bytes] = field(default_factory=dict)
    """Content to send in place of a file's, by name."""
    cut: set[str] = field(default_factory=set)
    """Files of which each response ends in the middle."""
    stored: dict[str, bytes] = field(default_factory=dict)
    """LFS objects by SHA-256."""
    url: str = ""

    def add(self, hub_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Commit files to a repository, and return the id of the commit."""
        return self.repositories.setdefault(hub_id, Repository()).commit(files, branch)

    def asked(self, pattern: str) -> list[str]:
        """Return the requests that match a regular expression."""
        return [request for request in self.requests if re.search(pattern, request)]


@contextmanager
def fake_hub() -> Iterator[FakeHub]:
    """Run a hub on a free local port."""
    hub = FakeHub()

    class Handler(_Handler):
        state = hub

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield hub
        finally:
            server.shutdown()
            thread.join()


class _Refused(Exception):
    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    state: FakeHub

    def log_message(self, *_: object) -> None:
        """Print nothing."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    # Dispatch

    def _answer(self) -> None:
        address = urlsplit(self.path)
        request = f"{self.command} {address.path}"
        self.state.requests.append(request)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        try:
            for pattern, action in self.state.before.items():
                if re.search(pattern, request):
                    action()
            for pattern, status in self.state.broken.items():
                if re.search(pattern, request):
                    raise _Refused(status, message="broken on purpose")
            self._route(request, parse_qs(address.query), body)
        except _Refused as refused:
            headers = {"X-Error-Code": refused.code, "X-Error-Message": refused.message or refused.code}
            self._send(refused.status, json.dumps({"error": refused.message}).encode(), headers)

    def _route(self, request: str, query: dict[str, list[str]], body: bytes) -> None:
        routes: tuple[tuple[str, Any], ...] = (
            (r"(?:GET|HEAD) /([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._file),
            (r"GET /api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", self._info),
            (r"GET /api/models/([^/]+/[^/]+)/tree/([^/]+)", self._tree),
            (r"GET /api/whoami-v2", self._whoami),
            (r"GET /api/models/([^/]+/[^/]+)/auth-check/write", self._write_check),
            (r"POST /api/repos/create", lambda: self._create(json.loads(body))),
            (r"POST /api/validate-yaml", lambda: self._json({"errors": [], "warnings": []})),
            (r"POST /api/models/([^/]+/[^/]+)/branch/([^/]+)", self._branch),
            (r"POST /api/models/([^/]+/[^/]+)/preupload/([^/]+)", lambda *_: self._preupload(json.loads(body))),
            (r"POST /([^/]+/[^/]+).git/info/lfs/objects/batch", lambda *_: self._batch(json.loads(body))),
            (r"PUT /lfs/([0-9a-f]+)", lambda oid: self._store(oid, body)),
            (
                r"POST /api/models/([^/]+/[^/]+)/commit/([^/]+)",
                lambda hub_id, branch: self._commit(hub_id, branch, body),
            ),
        )
        for pattern, answer in routes:
            if match := re.fullmatch(pattern, request):
                answer(*(None if part is None else unquote(part) for part in match.groups()))
                return
        raise _Refused(404, message=f"the fake hub has no {request}")

    def _send(self, status: int, body: bytes, headers: dict[str, str], length: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if length is None else length))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
        if length is not None:
            self.close_connection = True

    def _json(self, data: object, status: int = 200) -> None:
        self._send(status, json.dumps(data).encode(), {"Content-Type": "application/json"})

    # Read

    def _token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def _repository(self, hub_id: str) -> Repository:
        repository = self.state.repositories.get(hub_id)
        if repository is None or (repository.private and not self._token()):
            raise _Refused(404 if self._token() else 401, "RepoNotFound")
        return repository

    def _files(self, hub_id: str, revision: str) -> tuple[str, dict[str, bytes]]:
        repository = self._repository(hub_id)
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound")
        return commit, repository.commits[commit]

    def _file(self, hub_id: str, revision: str, name: str) -> None:
        commit, files = self._files(hub_id, revision)
        if self._repository(hub_id).gated and not self._token():
            raise _Refused(401, "GatedRepo")
        if name not in files:
            raise _Refused(404, "EntryNotFound")
        content = files[name]
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_blob_id(content)}"'}
        if len(content) >= LFS_BYTES:
            headers |= {"X-Linked-ETag": f'"{_sha256(content)}"', "X-Linked-Size": str(len(content))}
        if self.command == "HEAD":
            return self._send(200, content, headers)
        content = self.state.altered.get(name, content)
        if name in self.state.cut:
            return self._send(200, content[: len(content) // 2], headers, len(content))
        return self._send(200, content, headers)

    def _info(self, hub_id: str, revision: str | None) -> None:
        commit, files = self._files(hub_id, revision or "main")
        siblings = [
            {"rfilename": name, "size": len(content), "blobId": _blob_id(content)}
            | (
                {"lfs": {"sha256": _sha256(content), "size": len(content), "pointerSize": 130}}
                if len(content) >= LFS_BYTES
                else {}
            )
            for name, content in files.items()
        ]
        repository = self._repository(hub_id)
        card = re.search(r"^license: (.+)$", files.get("README.md", b"").decode(), re.MULTILINE)
        self._json(
            {
                "_id": "0",
                "id": hub_id,
                "sha": commit,
                "private": repository.private,
                "siblings": siblings,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "cardData": {"license": card[1]} if card else {},
            }
        )

    def _tree(self, hub_id: str, revision: str) -> None:
        _, files = self._files(hub_id, revision)
        self._json(
            [
                {"type": "file", "path": name, "size": len(content), "oid": _blob_id(content)}
                for name, content in files.items()
            ]
        )

    # Write

    def _whoami(self) -> None:
        if self._token() not in (TOKEN, READER):
            raise _Refused(401, message="Invalid credentials in Authorization header")
        self._json({"type": "user", "name": "org", "auth": {"type": "access_token"}})

    def _writer(self) -> None:
        if self._token() != TOKEN:
            raise _Refused(403, message="You don't have the rights")

    def _write_check(self, hub_id: str) -> None:
        self._writer()
        self._repository(hub_id)
        self._json({})

    def _create(self, wish: dict[str, Any]) -> None:
        self._writer()
        hub_id = f"{wish['organization']}/{wish['name']}"
        if hub_id in self.state.repositories:
            self._json({"error": "You already created this model repo", "url": f"{self.state.url}/{hub_id}"}, 409)
            return
        self.state.add(hub_id, {".gitattributes": b""})
        self.state.repositories[hub_id].private = wish.get("visibility") == "private" or bool(wish.get("private"))
        self._json({"url": f"{self.state.url}/{hub_id}"})

    def _branch(self, hub_id: str, branch: str) -> None:
        self._writer()
        repository = self._repository(hub_id)
        if branch in repository.branches:
            raise _Refused(409, message="Reference already exists")
        repository.branches[branch] = repository.branches["main"]
        self._json({})

    def _preupload(self, wish: dict[str, Any]) -> None:
        modes = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= LFS_BYTES else "regular",
                "shouldIgnore": False,
            }
            for file in wish["files"]
        ]
        self._json({"files": modes})

    def _batch(self, wish: dict[str, Any]) -> None:
        objects = []
        for wanted in wish["objects"]:
            upload = {"upload": {"href": f"{self.state.url}/lfs/{wanted['oid']}", "header": {}}}
            objects.append(wanted | ({} if wanted["oid"] in self.state.stored else {"actions": upload}))
        self._json({"transfer": "basic", "objects": objects})

    def _store(self, oid: str, body: bytes) -> None:
        assert _sha256(body) == oid
        self.state.stored[oid] = body
        self._json({})

    def _commit(self, hub_id: str, branch: str, body: bytes) -> None:
        self._writer()
        repository = self._repository(hub_id)
        files = dict(repository.commits[repository.branches[branch]])
        for line in body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.state.stored[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                assert operation["key"] == "header"
        commit = repository.commit(files, branch)
        self._json({"commitUrl": f"{self.state.url}/{hub_id}/commit/{commit}", "commitOid": commit})


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
