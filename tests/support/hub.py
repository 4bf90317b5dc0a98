"""A small Hub on this machine's loopback, enough for the real client to list, download, search and upload.

with LocalHub() as hub:
    commit = hub.commit("someone/emotion", {"adapter_config.json": b"..."}, tag="v1")
    hub.endpoint          # for HF_ENDPOINT
    hub.requests          # what was asked, "GET /someone/emotion/resolve/..."
    hub.twist = ...       # a function that may answer a request itself: a Hub that lies
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import select
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LFS = (".safetensors", ".bin")


@dataclass
class Repo:
    """One repository: its commits as whole trees, and what its branches and tags mean."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    tags: list[str] = field(default_factory=list)
    token: str | None = None
    gated: bool = False


class LocalHub:
    """The server and its repositories."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.blobs: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.twist: Callable[[Handler], bool] | None = None
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._server.hub = self  # type: ignore[attr-defined]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)

    def __enter__(self) -> LocalHub:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def endpoint(self) -> str:
        """What HF_ENDPOINT is set to."""
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def reset(self) -> None:
        """Forget everything."""
        self.repos.clear()
        self.blobs.clear()
        self.requests.clear()
        self.twist = None

    def commit(self, name: str, files: dict[str, bytes], *, tag: str | None = None, **facts: Any) -> str:
        """Make these files the repository's main; the full commit."""
        repo = self.repos.setdefault(name, Repo())
        commit = hashlib.sha1(repr((name, len(repo.commits), sorted(files.items()))).encode()).hexdigest()
        repo.commits[commit] = dict(files)
        repo.refs["main"] = commit
        if tag:
            repo.refs[tag] = commit
        for key, value in facts.items():
            setattr(repo, key, value)
        return commit

    def downloads(self, file: str = "adapter_model.safetensors") -> int:
        """How often a file's content was asked for."""
        return sum(line.startswith("GET ") and line.endswith("/" + file) for line in self.requests)


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True

    @property
    def hub(self) -> LocalHub:
        """The Hub that is asked."""
        return self.server.hub  # type: ignore[attr-defined, no-any-return]

    def log_message(self, *args: object) -> None:
        """Keep the test's output clean."""

    def do_GET(self) -> None:
        self._route()

    do_HEAD = do_POST = do_PUT = do_GET

    def _route(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.hub.twist is not None and self.hub.twist(self):
            return
        for pattern, answer in ROUTES:
            if found := re.fullmatch(pattern, path):
                answer(self, **found.groupdict())
                return
        self.send(404, {"error": f"no route {path}"})

    def send(self, status: int, body: Any = b"", headers: dict[str, str] | None = None) -> None:
        """Answer with bytes or JSON."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        facts = {"Content-Length": str(len(content)), "Content-Type": "application/json", **(headers or {})}
        for key, value in facts.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def find(self, name: str, revision: str | None = None) -> tuple[Repo, str] | None:
        """A repository and the commit of a revision, or an answer that says why not."""
        repo = self.hub.repos.get(name)
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if repo is None or (repo.token is not None and not repo.gated and token != repo.token):
            self.send(401, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and token != repo.token:
            self.send(403, {"error": "Access is restricted"}, {"X-Error-Code": "GatedRepo"})
        elif (commit := repo.refs.get(revision or "main", revision or "")) not in repo.commits:
            self.send(404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo, commit
        return None


PATIENCE = 5.0
"""Seconds after which the misbehaviours below end by themselves; they end at once when the other side hangs up."""


def never_answers(handler: Handler) -> bool:
    """Accept, and say nothing."""
    select.select([handler.connection], [], [], PATIENCE)
    handler.close_connection = True
    return True


def drips(content: bytes, every: float, *, headers: bool = False) -> Callable[[Handler], bool]:
    """Send an answer byte by byte, `every` so many seconds; with `headers` from its first line on, which are long.

    Long, since a client on a busy machine reads late: bytes that lie there by then are nothing that it waited for.
    """

    def twist(handler: Handler) -> bool:
        if handler.command == "HEAD" and not headers:
            return False
        padding = b"X-Padding: %s\r\n" % (b"x" * 4000) if headers else b""
        start = b"HTTP/1.1 200 OK\r\n%sContent-Length: %d\r\n\r\n" % (padding, len(content))
        if not headers:
            handler.connection.sendall(start)
        end = time.monotonic() + PATIENCE
        body = b"" if handler.command == "HEAD" else content
        for byte in start + body if headers else body:
            if select.select([handler.connection], [], [], every)[0] or time.monotonic() > end:
                break
            with contextlib.suppress(OSError):
                handler.connection.sendall(bytes([byte]))
        handler.close_connection = True
        return True

    return twist


def resets(handler: Handler) -> bool:
    """Break the connection off in place of an answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.close_connection = True
    handler.connection.close()
    handler.rfile.close()
    return True


def git_oid(content: bytes) -> str:
    """The id that git gives a file's content."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def sha256(content: bytes) -> str:
    """The id that LFS gives a file's content."""
    return hashlib.sha256(content).hexdigest()


def _info(handler: Handler, name: str, rev: str | None = None) -> None:
    if found := handler.find(name, rev):
        handler.send(200, _summary(name, *found))


def _summary(name: str, repo: Repo, commit: str) -> dict[str, Any]:
    siblings = [{"rfilename": path} for path in repo.commits[commit]]
    return {
        "id": name,
        "modelId": name,
        "sha": commit,
        "siblings": siblings,
        "tags": repo.tags,
        "downloads": 7,
        "private": repo.token is not None,
    }


def _tree(handler: Handler, name: str, rev: str) -> None:
    found = handler.find(name, rev)
    if not found:
        return
    entries = []
    for path, content in found[0].commits[found[1]].items():
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_oid(content)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 130}
        entries.append(entry)
    handler.send(200, entries)


def _resolve(handler: Handler, name: str, rev: str, path: str) -> None:
    found = handler.find(name, rev)
    if not found:
        return
    repo, commit = found
    content = repo.commits[commit].get(path)
    if content is None:
        handler.send(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return
    headers = {"X-Repo-Commit": commit, "ETag": f'"{git_oid(content)}"', "Content-Type": "application/octet-stream"}
    if path.endswith(LFS):
        headers |= {"X-Linked-Etag": f'"{sha256(content)}"', "X-Linked-Size": str(len(content))}
    start = re.fullmatch(r"bytes=(\d+)-", handler.headers.get("Range", ""))
    if start:
        headers["Content-Range"] = f"bytes {start[1]}-{len(content) - 1}/{len(content)}"
    handler.send(206 if start else 200, content[int(start[1]) :] if start else content, headers)


def _search(handler: Handler) -> None:
    query = parse_qs(urlsplit(handler.path).query)
    word, filters = query.get("search", [""])[0], query.get("filter", [])
    hits = [
        _summary(name, repo, repo.refs["main"])
        for name, repo in handler.hub.repos.items()
        if word in name and all(tag in repo.tags for tag in filters)
    ]
    handler.send(200, hits[: int(query.get("limit", ["100"])[0])])


def _whoami(handler: Handler) -> None:
    handler.send(200, {"type": "user", "name": "tester", "orgs": []})


def _create(handler: Handler) -> None:
    asked = json.loads(handler.body)
    if handler.headers.get("Authorization") is None:
        handler.send(401, {"error": "Invalid username or password."})
        return
    name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"tester/{asked['name']}"
    token = (
        handler.headers["Authorization"].removeprefix("Bearer ")
        if asked.get("private") or asked.get("visibility") == "private"
        else None
    )
    if name in handler.hub.repos:
        handler.send(409, {"error": "You already created this model repo", "url": f"{handler.hub.endpoint}/{name}"})
        return
    handler.hub.commit(name, {".gitattributes": b"*.safetensors filter=lfs\n"}, token=token)
    handler.send(200, {"url": f"{handler.hub.endpoint}/{name}", "id": name, "name": name})


def _validate(handler: Handler) -> None:
    handler.send(200, {"errors": [], "warnings": []})


def _preupload(handler: Handler, name: str, rev: str) -> None:
    files = json.loads(handler.body)["files"]
    modes = [
        {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular", "shouldIgnore": False}
        for file in files
    ]
    handler.send(200, {"files": modes})


def _batch(handler: Handler, name: str) -> None:
    objects = []
    for item in json.loads(handler.body)["objects"]:
        actions = {"upload": {"href": f"{handler.hub.endpoint}/lfs/{item['oid']}"}}
        objects.append({**item, "actions": actions} if item["oid"] not in handler.hub.blobs else item)
    handler.send(200, {"transfer": "basic", "objects": objects})


def _upload(handler: Handler, oid: str) -> None:
    handler.hub.blobs[oid] = handler.body
    handler.send(200)


def _commit(handler: Handler, name: str, rev: str) -> None:
    found = handler.find(name, rev)
    if not found:
        return
    files = dict(found[0].commits[found[1]])
    for line in handler.body.splitlines():
        item = json.loads(line)
        if item["key"] == "file":
            files[item["value"]["path"]] = base64.b64decode(item["value"]["content"])
        elif item["key"] == "lfsFile":
            files[item["value"]["path"]] = handler.hub.blobs[item["value"]["oid"]]
    commit = handler.hub.commit(name, files)
    url = f"{handler.hub.endpoint}/{name}/commit/{commit}"
    handler.send(200, {"commitUrl": url, "commitOid": commit, "success": True})


_NAME, _REV = r"(?P<name>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, Callable[..., None]]] = [
    (r"/api/whoami-v2", _whoami),
    (r"/api/repos/create", _create),
    (r"/api/validate-yaml", _validate),
    (r"/api/models", _search),
    (rf"/api/models/{_NAME}/revision/{_REV}", _info),
    (rf"/api/models/{_NAME}/tree/{_REV}", _tree),
    (rf"/api/models/{_NAME}/preupload/{_REV}", _preupload),
    (rf"/api/models/{_NAME}/commit/{_REV}", _commit),
    (rf"/api/models/{_NAME}", _info),
    (rf"/{_NAME}\.git/info/lfs/objects/batch", _batch),
    (r"/lfs/(?P<oid>[0-9a-f]{64})", _upload),
    (rf"/{_NAME}/resolve/{_REV}/(?P<path>.+)", _resolve),
]
