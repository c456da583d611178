"""Servers that answer 500 to everything, or take a connection and never answer: what a tracking server looks like that is in trouble."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

Trouble = Literal["hangs", "fails", "refuses"]
TROUBLES: tuple[Trouble, ...] = ("hangs", "fails", "refuses")


@contextlib.contextmanager
def troubled(trouble: Trouble) -> Iterator[str]:
    """Its URL, while it runs."""
    with _failing() if trouble == "fails" else _silent(listens=trouble == "hangs") as port:
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def _silent(*, listens: bool) -> Iterator[int]:
    """The kernel takes connections, and nobody reads them. Without `listens` it refuses them."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        if listens:
            taken.listen(64)
        yield taken.getsockname()[1]


@contextlib.contextmanager
def _failing() -> Iterator[int]:
    class Handler(BaseHTTPRequestHandler):
        def any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            self.send_response(500)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"oops")

        do_GET = do_POST = do_PUT = do_PATCH = do_DELETE = any

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
