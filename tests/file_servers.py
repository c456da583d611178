"""Loopback servers of files: one that breaks off and goes on by ranges, one that speaks the part of the hub's API that downloads use."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Files:
    """What is served, and what was asked. `break_after`: bytes of each answer, after which the connection is closed."""

    def __init__(self, files: Mapping[str, bytes]) -> None:
        self.files = dict(files)
        self.break_after: int | None = None
        self.sent = 0
        self.asked: list[tuple[str, str | None]] = []
        """(path, Range)"""
        self.url = ""

    def etag(self, path: str) -> str:
        return f'"{hashlib.sha256(self.files[path]).hexdigest()}"'


class _Handler(BaseHTTPRequestHandler):
    files: Files

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        files, path = self.files, self.path.partition("?")[0]
        files.asked.append((path, self.headers.get("Range")))
        if path not in files.files:
            self.send_response(404)
            if path.startswith("/api/models/"):
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, etag, start = files.files[path], files.etag(path), 0
        if self.headers.get("If-None-Match") == etag:
            self.send_response(304)
            self.end_headers()
            return
        asked = self.headers.get("Range")
        if asked and self.headers.get("If-Range", etag) == etag:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("ETag", etag)
        for name, value in self.headers_of(path).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body:
            part = data[start:] if files.break_after is None else data[start : start + files.break_after]
            files.sent += len(part)
            self.wfile.write(part)
            self.wfile.flush()
            if len(part) < len(data) - start:
                self.connection.close()

    def headers_of(self, path: str) -> dict[str, str]:
        return {}


@contextmanager
def served(files: Files, handler: type[_Handler] = _Handler) -> Iterator[Files]:
    bound = type("Bound", (handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), bound)
    files.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield files
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)


class _Hub(_Handler):
    def headers_of(self, path: str) -> dict[str, str]:
        return {"X-Repo-Commit": path.split("/")[4]} if "/resolve/" in path else {"Content-Type": "application/json"}


def hub(repository: str, commits: Mapping[str, Mapping[str, bytes]], branches: Mapping[str, str]) -> Files:
    """`commits`: files by commit; `branches`: a name → commit."""
    files: dict[str, bytes] = {}
    for revision, commit in {**branches, **{each: each for each in commits}}.items():
        siblings = [{"rfilename": name, "size": len(data)} for name, data in commits[commit].items()]
        told = {"id": repository, "modelId": repository, "sha": commit, "siblings": siblings, "private": False, "tags": [], "downloads": 0}
        files[f"/api/models/{repository}/revision/{revision}"] = json.dumps(told).encode()
        tree = [{"type": "file", "path": name, "size": len(data), "oid": "0" * 40} for name, data in commits[commit].items()]
        files[f"/api/models/{repository}/tree/{revision}"] = json.dumps(tree).encode()
        if revision == "main":
            files[f"/api/models/{repository}"] = files[f"/api/models/{repository}/revision/{revision}"]
        for name, data in commits[commit].items():
            files[f"/{repository}/resolve/{revision}/{name}"] = data
    return Files(files)


HUB = _Hub
