"""A small Kubernetes API server for the faults that a real one cannot be made to show: lost answers, 429, 5xx, 410, silence.

Holds namespaced objects with uid and resourceVersion, merge patches, uid preconditions, paged lists and watches. Knows no schema, no
admission and no controllers: what those do is tested on the real one.
"""

from __future__ import annotations

import itertools
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

Object = dict[str, Any]


@dataclass
class Fault:
    """What happens to a request, `times` times, in place of its answer. `effect`: whether the server acts on it all the same."""

    method: str = "GET"
    ends_with: str = ""
    watch: bool = False
    times: int = 1
    status: int | None = None
    """None: the connection is cut without an answer."""
    message: str = "fault"
    retry_after: int | None = None
    location: str | None = None
    """Where a redirect points."""
    effect: bool = False
    silent: bool = False
    """Of a watch: opened, and then nothing, not even its end."""


KINDS = {"pytorchjobs": "/apis/kubeflow.org/v1", "trainjobs": "/apis/trainer.kubeflow.org/v1alpha1"}
"""Kinds of jobs that a cluster may serve or not."""


@dataclass
class FakeApiServer:
    url: str = ""
    objects: dict[str, Object] = field(default_factory=dict)
    """By path."""
    changes: list[tuple[int, str, str, Object]] = field(default_factory=list)
    """(version, type, path of the kind, object)."""
    oldest: int = 0
    """Watches from before this version are answered with 410."""
    faults: list[Fault] = field(default_factory=list)
    requests: list[tuple[str, str, float]] = field(default_factory=list)
    """(method, path, monotonic time); watches have method WATCH."""
    odd: list[Any] = field(default_factory=list)
    """Items that are no objects: at the beginning of each list."""
    knows: str | None = None
    """The only Authorization that is let in; None: all are."""
    logins: list[str | None] = field(default_factory=list)
    """Authorization of each request."""
    proxy_logins: list[str | None] = field(default_factory=list)
    """Of each request that came as to a proxy."""
    serves: set[str] = field(default_factory=lambda: {"pytorchjobs"})
    """Kinds of jobs, of those in `KINDS`, that discovery names; the others are answered with 404."""
    page: int = 1000
    lock: threading.Condition = field(default_factory=threading.Condition)
    down: bool = False
    _version: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    version: int = 0

    def put(self, path: str, thing: Object, type_: str | None = None) -> Object:
        """Write an object as a controller would."""
        with self.lock:
            type_ = type_ or ("MODIFIED" if path in self.objects else "ADDED")
            self.version = next(self._version)
            before = self.objects.get(path, {}).get("metadata", {})
            metadata = {"uid": before.get("uid", f"uid-{self.version}"), "creationTimestamp": "2026-11-23T10:00:00Z", **thing["metadata"]}
            metadata["resourceVersion"] = str(self.version)
            stored = {**thing, "metadata": metadata}
            if type_ == "DELETED":
                del self.objects[path]
            else:
                self.objects[path] = stored
            self.changes.append((self.version, type_, path.rpartition("/")[0], stored))
            self.lock.notify_all()
            return stored

    def tell(self, kind: str, thing: Any, type_: str = "ADDED") -> None:
        """Say anything to those who watch a kind."""
        with self.lock:
            self.version = next(self._version)
            self.changes.append((self.version, type_, kind, thing))
            self.lock.notify_all()

    def remove(self, path: str) -> None:
        self.put(path, self.objects[path], "DELETED")

    def forget_history(self) -> None:
        """etcd was compacted: old versions cannot be watched from, and open watches are told so."""
        with self.lock:
            self.oldest = self.version + 1
            self.version = next(self._version)
            self.changes.clear()
            self.lock.notify_all()

    def fault_of(self, method: str, path: str, watch: bool) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if (fault.method, fault.watch) == (method, watch) and path.endswith(fault.ends_with) and fault.times > 0:
                    fault.times -= 1
                    return fault
        return None


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Any

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve("GET")

    def do_POST(self) -> None:
        self._serve("POST")

    def do_PATCH(self) -> None:
        self._serve("PATCH")

    def do_DELETE(self) -> None:
        self._serve("DELETE")

    def _serve(self, method: str) -> None:
        fake: FakeApiServer = self.server.fake
        parts = urlsplit(self.path)
        query = {key: values[0] for key, values in parse_qs(parts.query).items()}
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or b"{}")
        watch = query.get("watch") == "1"
        fake.requests.append(("WATCH" if watch else method, parts.path, time.monotonic()))
        login = self.headers.get("Authorization")
        fake.logins.append(login)
        if parts.netloc:
            fake.proxy_logins.append(self.headers.get("Proxy-Authorization"))
        if fake.knows is not None and login != fake.knows:
            self._answer(401, self._status(401, "Unauthorized"))
            return
        fault = fake.fault_of(method, parts.path, watch)
        if fake.down:
            fault = Fault()
        if fault is not None and not fault.silent:
            if fault.effect:
                self._act(fake, method, parts.path, query, body)
            if fault.status is None:
                self.close_connection = True
                return
            self._answer(fault.status, self._status(fault.status, fault.message), fault.retry_after, fault.location)
            return
        if watch:
            self._watch(fake, parts.path, int(query["resourceVersion"]), float(query.get("timeoutSeconds", 30)), fault is not None)
            return
        self._answer(*self._act(fake, method, parts.path, query, body))

    @staticmethod
    def _status(code: int, message: str, reason: str = "") -> Object:
        return {"kind": "Status", "status": "Failure", "message": message, "reason": reason, "code": code}

    def _act(self, fake: FakeApiServer, method: str, path: str, query: dict[str, str], body: Object) -> tuple[int, Object]:
        with fake.lock:
            there = fake.objects.get(path)
            uid = body.get("preconditions", {}).get("uid") or (body.get("metadata", {}).get("uid") if method == "PATCH" else None)
            if method == "POST":
                target = f"{path}/{body['metadata']['name']}"
                if target in fake.objects:
                    return 409, self._status(409, f"{target} already exists", "AlreadyExists")
                return 201, body if "dryRun" in query else fake.put(target, body)
            if method == "GET" and path in KINDS.values() and path not in fake.objects:
                found = [{"name": kind} for kind in fake.serves if KINDS[kind] == path]
                return (
                    (200, {"resources": found}) if found else (404, self._status(404, "the server could not find the requested resource"))
                )
            if any(path.startswith(f"{KINDS[kind]}/") for kind in KINDS.keys() - fake.serves):
                return 404, self._status(404, "the server could not find the requested resource")
            if method == "GET" and path.rpartition("/")[2] in (*KINDS, "jobs", "pods", "events", "workloads"):
                return 200, self._list(fake, path, query)
            if there is None:
                return 404, self._status(404, f"{path} not found", "NotFound")
            if uid is not None and uid != there["metadata"]["uid"]:
                return 409, self._status(409, "the UID in the precondition differs", "Conflict")
            if method == "PATCH":
                return 200, fake.put(path, _merge(there, body))
            if method == "DELETE":
                fake.remove(path)
            return 200, there

    def _list(self, fake: FakeApiServer, path: str, query: dict[str, str]) -> Object:
        wanted = query.get("labelSelector", "").partition(" in ")[0].split(",")[0].partition("=")
        found = [
            thing
            for key, thing in sorted(fake.objects.items())
            if key.startswith(f"{path}/") and (not wanted[0] or thing["metadata"].get("labels", {}).get(wanted[0]) == wanted[2])
        ]
        start = int(query.get("continue", 0))
        size = min(fake.page, int(query.get("limit", 500)))
        more = {"continue": str(start + size)} if start + size < len(found) else {}
        odd = fake.odd if start == 0 else []
        return {"items": [*odd, *found[start : start + size]], "metadata": {"resourceVersion": str(fake.version), **more}}

    def _watch(self, fake: FakeApiServer, path: str, version: int, patience_s: float, silent: bool) -> None:
        deadline = time.monotonic() + patience_s
        self.send_response(200)
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        while time.monotonic() < deadline and not self.server.over.is_set():
            with fake.lock:
                if fake.down:
                    self.close_connection = True
                    return
                if version < fake.oldest:
                    self._chunk({"type": "ERROR", "object": self._status(410, "too old resource version", "Expired")})
                    break
                new = [(number, type_, thing) for number, type_, kind, thing in fake.changes if number > version and kind == path]
                if not new or silent:
                    fake.lock.wait(0.05)
            for number, type_, thing in () if silent else new:
                if not self._chunk({"type": type_, "object": thing}):
                    return
                version = number
        self._raw(b"0\r\n\r\n")

    def _chunk(self, thing: Object) -> bool:
        line = json.dumps(thing).encode() + b"\n"
        return self._raw(f"{len(line):x}\r\n".encode() + line + b"\r\n")

    def _raw(self, data: bytes) -> bool:
        try:
            self.wfile.write(data)
            self.wfile.flush()
        except OSError:
            self.close_connection = True
            return False
        return True

    def _answer(self, code: int, thing: Object, retry_after: int | None = None, location: str | None = None) -> None:
        data = json.dumps(thing).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        if retry_after is not None:
            self.send_header("Retry-After", str(retry_after))
        if location is not None:
            self.send_header("Location", location)
        self.end_headers()
        self._raw(data)


def _merge(there: Object, patch: Object) -> Object:
    merged = dict(there)
    for key, value in patch.items():
        merged[key] = _merge(merged.get(key) or {}, value) if isinstance(value, dict) else value
    return merged


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    fake: FakeApiServer
    over: threading.Event

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that leaves in the middle is no error here."""


@contextmanager
def serve() -> Iterator[FakeApiServer]:
    server = _Server(("127.0.0.1", 0), _Handler)
    server.fake, server.over = FakeApiServer(f"http://127.0.0.1:{server.server_port}"), threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield server.fake
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
