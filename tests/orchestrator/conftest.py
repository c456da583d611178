"""A proxy in front of the S3 server that does to answers what networks do."""

from __future__ import annotations

import http.client
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

import pytest

Harm = Literal["pass", "lose", "cut", "shorten", "flip"] | int
"""What is done with a request: `pass` it on, `lose` the answer after the store has acted, `cut` the connection in the middle of the
answer's body, `shorten` the body and the length it claims, `flip` a byte of it, or answer with this status and ask the store nothing."""


class FaultyProxy:
    """`harm` is a queue of (method, harm): the next request of that method meets it. Of the others `decide` says what is done with them.

    `came` has a line for every request: method, path, headers in small letters.
    """

    def __init__(self, upstream: str):
        self.harm: deque[tuple[str, Harm]] = deque()
        self.seen: list[tuple[str, str]] = []
        self.came: list[tuple[str, str, Mapping[str, str]]] = []
        self.keys: tuple[str, str] | None = None
        """Access key and secret with which requests are signed anew and their session is taken out: versitygw knows no sessions."""
        self.decide: Callable[[str, str, Mapping[str, str]], Harm] = lambda method, path, headers: "pass"
        parts = urlsplit(upstream)
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_any(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                proxy.seen.append((self.command, self.path))
                heard = {name.lower(): value for name, value in self.headers.items()}
                proxy.came.append((self.command, self.path, heard))
                harm = proxy._next(self.command) or proxy.decide(self.command, self.path, heard)
                if isinstance(harm, int):
                    return self._refuse(harm)
                connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=30)
                # The Host header is part of the signature, so it stays what the client has sent.
                headers = {name: value for name, value in self.headers.items() if name.lower() != "expect"}
                if proxy.keys is not None:
                    headers = _signed(self.command, proxy.endpoint + self.path, headers, body, *proxy.keys)
                connection.request(self.command, self.path, body, headers)
                answer = connection.getresponse()
                content = answer.read()
                connection.close()
                self._answer(answer, content, harm)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

            def _answer(self, answer: http.client.HTTPResponse, content: bytes, harm: Harm | None) -> None:
                if harm == "lose":
                    self.close_connection = True
                    return
                if harm == "shorten":
                    content = content[: len(content) // 2]
                if harm == "flip":
                    content = bytes([content[0] ^ 1]) + content[1:]
                self.send_response_only(answer.status)
                for name, value in answer.getheaders():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection"):
                        self.send_header(name, value)
                length = answer.headers["Content-Length"] if self.command == "HEAD" else len(content)
                self.send_header("Content-Length", str(length or 0))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2] if harm == "cut" else content)
                self.close_connection = harm == "cut"

            def _refuse(self, status: int) -> None:
                codes = {400: "ExpiredToken", 403: "ExpiredToken", 409: "ConditionalRequestConflict", 500: "InternalError", 503: "SlowDown"}
                code = codes[status]
                content = f"<Error><Code>{code}</Code><Message>m</Message></Error>".encode()
                self.send_response_only(status)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        self.endpoint = f"http://127.0.0.1:{self._server.server_port}"

    def parts(self) -> int:
        """Parts of multipart uploads that were sent, again or not."""
        return sum(method == "PUT" and "partNumber=" in path for method, path in self.seen)

    def uploads(self) -> int:
        """Multipart uploads that were begun."""
        return sum(method == "POST" and path.endswith("?uploads") for method, path in self.seen)

    def _next(self, method: str) -> Harm | None:
        for index, (wanted, harm) in enumerate(self.harm):
            if wanted == method:
                del self.harm[index]
                return harm
        return None

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


def _signed(method: str, url: str, headers: Mapping[str, str], body: bytes, access: str, secret: str) -> dict[str, str]:
    from botocore.auth import S3SigV4Auth
    from botocore.awsrequest import AWSRequest
    from botocore.credentials import Credentials

    dropped = ("authorization", "x-amz-security-token", "x-amz-date", "content-length")
    kept = {name: value for name, value in headers.items() if name.lower() not in dropped}
    request = AWSRequest(method, url, kept, body)
    S3SigV4Auth(Credentials(access, secret), "s3", "us-east-1").add_auth(request)
    return dict(request.headers.items())


@pytest.fixture
def start_proxy() -> Iterator[Callable[[str], FaultyProxy]]:
    running: list[FaultyProxy] = []

    def start(upstream: str) -> FaultyProxy:
        running.append(FaultyProxy(upstream))
        return running[-1]

    yield start
    for proxy in running:
        proxy.close()
