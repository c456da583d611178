"""Credentials that end while something is stored: they are renewed where they came from, and nobody is refused for it.

The store is a real versitygw behind a proxy that refuses sessions which are over. Whoever gives out sessions is played: no cloud is here.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from orchestrator.errors import Refused, Unreachable, UsageError
from orchestrator.stores.s3 import PART_BYTES, S3Store

pytestmark = pytest.mark.s3

LIFE_S = 16 * 60.0
"""Of a session. Botocore renews from 15 minutes before the end, so within a minute none of these is old to it."""
STS = """<AssumeRoleWithWebIdentityResponse xmlns="https://sts.amazonaws.com/doc/2011-06-15/"><AssumeRoleWithWebIdentityResult><Credentials>
<AccessKeyId>{AccessKeyId}</AccessKeyId><SecretAccessKey>{SecretAccessKey}</SecretAccessKey><SessionToken>{Token}</SessionToken>
<Expiration>{Expiration}</Expiration></Credentials></AssumeRoleWithWebIdentityResult></AssumeRoleWithWebIdentityResponse>"""


class Sessions:
    """Gives out sessions as STS, a container's agent and an instance do, each with another token."""

    def __init__(self, server: Any):
        self.given: list[str] = []
        self.life_s = LIFE_S
        self.status = 200
        self.denial = "<html>away</html>"
        """What is said where the status is no success."""
        keys = {"AccessKeyId": server.env["AWS_ACCESS_KEY_ID"], "SecretAccessKey": server.env["AWS_SECRET_ACCESS_KEY"]}
        sessions = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                form = self.rfile.read(int(self.headers["Content-Length"])).decode()
                assert "AssumeRoleWithWebIdentity" in form and "the-pods-own-token" in form
                self._answer(STS.format(**sessions.next(keys)))

            def do_PUT(self) -> None:
                self._answer("instance-metadata")

            def do_GET(self) -> None:
                role = self.path.endswith("/security-credentials/")
                self._answer("role" if role else json.dumps(sessions.next(keys) | {"Code": "Success"}))

            def _answer(self, text: str) -> None:
                text = text if sessions.status == 200 else sessions.denial
                self.send_response(sessions.status)
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text.encode())

            def log_message(self, format: str, *args: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()

    def next(self, keys: Mapping[str, str]) -> dict[str, str]:
        self.given.append(f"secret-session-token-{len(self.given)}")
        end = datetime.now(UTC) + timedelta(seconds=self.life_s)
        return {**keys, "Token": self.given[-1], "Expiration": end.strftime("%Y-%m-%dT%H:%M:%SZ")}

    def close(self) -> None:
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()


@pytest.fixture
def sessions(s3: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Sessions]:
    """With an environment that names no source of credentials yet."""
    for name in [name for name in os.environ if name.startswith(("AWS_", "OSCTL_S3"))]:
        monkeypatch.delenv(name)
    for name in ("AWS_CONFIG_FILE", "AWS_SHARED_CREDENTIALS_FILE"):
        monkeypatch.setenv(name, str(tmp_path / name))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")  # of botocore with those who give out sessions: it pauses for seconds
    started = Sessions(s3)
    yield started
    started.close()


class Gate:
    """A proxy that takes a session for so many requests, and then says that it has ended."""

    def __init__(self, proxy: Any, monkeypatch: pytest.MonkeyPatch, requests: int = 1 << 30):
        self.proxy, self.requests = proxy, requests
        self.used: Counter[str] = Counter()
        self.ended: set[str] = set()
        proxy.decide = self.decide
        monkeypatch.setenv("OSCTL_S3_ENDPOINT", proxy.endpoint)

    def decide(self, _method: str, _path: str, headers: Mapping[str, str]) -> Any:
        token = headers["x-amz-security-token"]
        if token in self.ended or self.used[token] >= self.requests:
            return 400
        self.used[token] += 1
        return "pass"


@pytest.fixture
def gate(s3: Any, start_proxy: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch) -> Gate:
    proxy = start_proxy(s3.endpoint)
    proxy.keys = (s3.env["AWS_ACCESS_KEY_ID"], s3.env["AWS_SECRET_ACCESS_KEY"])
    return Gate(proxy, monkeypatch)


def web_identity(sessions: Sessions, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    (folder / "token").write_text("the-pods-own-token")
    monkeypatch.setenv("AWS_WEB_IDENTITY_TOKEN_FILE", str(folder / "token"))
    monkeypatch.setenv("AWS_ROLE_ARN", "arn:aws:iam::123456789012:role/osctl")
    monkeypatch.setenv("AWS_ENDPOINT_URL_STS", sessions.url)
    monkeypatch.setenv("AWS_REGION", "us-east-1")


def container(sessions: Sessions, monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setenv("AWS_CONTAINER_CREDENTIALS_FULL_URI", f"{sessions.url}/container")


def instance(sessions: Sessions, monkeypatch: pytest.MonkeyPatch, _: Path) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "false")
    monkeypatch.setenv("AWS_EC2_METADATA_SERVICE_ENDPOINT", sessions.url)


def process(sessions: Sessions, _: pytest.MonkeyPatch, folder: Path) -> None:
    """`credential_process` of a profile."""
    (folder / "get.py").write_text(
        f"import json, urllib.request\nsaid = json.load(urllib.request.urlopen('{sessions.url}/process'))\n"
        "print(json.dumps({'Version': 1, 'SessionToken': said.pop('Token'), **said}))\n"
    )
    Path(os.environ["AWS_CONFIG_FILE"]).write_text(f"[default]\ncredential_process = {sys.executable} {folder / 'get.py'}\n")


SOURCES = [web_identity, container, instance, process]


@pytest.mark.parametrize("source", SOURCES)
def test_credentials_that_end_during_an_upload_are_renewed(
    s3: Any, sessions: Sessions, gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, source: Any
) -> None:
    """Every session is good for three requests. What has arrived before one ended is not sent again."""
    source(sessions, monkeypatch, tmp_path)
    gate.requests = 3
    file = tmp_path / "large"
    file.write_bytes(os.urandom(2 * PART_BYTES + 10))
    store = S3Store(s3.url(f"ended/{tmp_path.name}"), patience_s=20)
    store.upload("a", file)
    assert store.size("a") == file.stat().st_size and store.digest("a")[0] == file.stat().st_size
    assert len(sessions.given) > 2 and gate.proxy.uploads() == 1
    taken = [path for _, path, headers in gate.proxy.came if "partNumber=" in path]
    assert len({path.partition("partNumber=")[2].partition("&")[0] for path in taken}) == 3


def test_sessions_that_are_about_to_end_are_renewed_before_they_do(
    s3: Any, sessions: Sessions, gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web_identity(sessions, monkeypatch, tmp_path)
    sessions.life_s = 14 * 60
    store = S3Store(s3.url(f"ended/{tmp_path.name}"), patience_s=20)
    for number in range(3):
        store.create(f"{number}", b"x")
    assert len(sessions.given) >= 3


def test_a_credentials_file_that_is_written_anew_is_read_anew(s3: Any, sessions: Sessions, gate: Gate, tmp_path: Path) -> None:
    keys = {"AccessKeyId": s3.env["AWS_ACCESS_KEY_ID"], "SecretAccessKey": s3.env["AWS_SECRET_ACCESS_KEY"]}

    def write() -> None:
        given = sessions.next(keys)
        lines = ("[default]", f"aws_access_key_id={given['AccessKeyId']}", f"aws_secret_access_key={given['SecretAccessKey']}")
        Path(os.environ["AWS_SHARED_CREDENTIALS_FILE"]).write_text("\n".join((*lines, f"aws_session_token={given['Token']}", "")))

    write()
    store = S3Store(s3.url(f"ended/{tmp_path.name}"), patience_s=20)
    store.create("a", b"x")
    gate.ended.add(sessions.given[-1])
    later = threading.Timer(0.7, write)
    later.start()
    store.create("b", b"x")
    later.join()
    assert gate.used == {"secret-session-token-0": 1, "secret-session-token-1": 1}


@pytest.mark.parametrize("status", [400, 500])
@pytest.mark.parametrize("call", ["create", "size"])
def test_while_no_session_is_given_the_store_is_away_and_comes_back(
    s3: Any, sessions: Sessions, gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int, call: str
) -> None:
    """An agent's upload queue tries again whatever is Unreachable; what is Refused it gives up for good."""
    web_identity(sessions, monkeypatch, tmp_path)
    store = S3Store(s3.url(f"ended/{tmp_path.name}"), patience_s=0.5)
    store.create("a", b"x")
    gate.ended.update(sessions.given)
    sessions.status = status
    with pytest.raises(Unreachable, match="credentials") as away:
        store.create("b", b"y") if call == "create" else store.size("a")
    assert not any(
        secret in str(away.value)
        for secret in (*sessions.given, "the-pods-own-token", *s3.env.values() - s3.env.keys())
        if "secret" in secret
    )
    sessions.status = 200
    store.create("b", b"y")
    assert store.read("b").data == b"y"


def test_a_token_file_that_is_gone_for_a_while_is_waited_for(
    s3: Any, sessions: Sessions, gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web_identity(sessions, monkeypatch, tmp_path)
    store = S3Store(s3.url(f"ended/{tmp_path.name}"), patience_s=0.4)
    (tmp_path / "token").rename(tmp_path / "away")
    with pytest.raises(Unreachable, match="credentials cannot be renewed"):
        store.create("a", b"x")
    (tmp_path / "away").rename(tmp_path / "token")
    store.create("a", b"x")


@pytest.mark.long
def test_a_session_of_the_environment_that_has_ended_is_said_at_once_with_what_renews_itself(
    s3: Any, sessions: Sessions, gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, s3.env[name])
    monkeypatch.setenv("AWS_SESSION_TOKEN", "secret-session-token")
    waits: list[float] = []
    store = S3Store(s3.url(f"ended/{tmp_path.name}"), patience_s=30, pause=waits.append)
    store.create("a", b"x")
    gate.ended.add("secret-session-token")
    for call in (lambda: store.create("b", b"x"), lambda: store.size("a")):
        with pytest.raises(Unreachable, match=r"AWS_SESSION_TOKEN has ended.*AWS_WEB_IDENTITY_TOKEN_FILE") as ended:
            call()
        assert "secret-session-token" not in str(ended.value) and s3.env["AWS_SECRET_ACCESS_KEY"] not in str(ended.value)
    assert waits == [], "no second try"


def test_a_role_that_may_not_be_taken_is_refused(
    s3: Any, sessions: Sessions, gate: Gate, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    web_identity(sessions, monkeypatch, tmp_path)
    sessions.status, sessions.denial = 403, "<ErrorResponse><Error><Code>AccessDenied</Code><Message>m</Message></Error></ErrorResponse>"
    with pytest.raises(Refused, match=r"AssumeRoleWithWebIdentity gives no credentials \(403 AccessDenied\)"):
        S3Store(s3.url("x"), patience_s=30).create("a", b"x")


@pytest.mark.parametrize(
    ("environment", "said"),
    [({"AWS_ACCESS_KEY_ID": "key"}, "AWS_SECRET_ACCESS_KEY is not"), ({"AWS_PROFILE": "nobody"}, "ProfileNotFound")],
)
def test_half_of_a_key_and_a_missing_profile_are_errors_of_use(
    sessions: Sessions, monkeypatch: pytest.MonkeyPatch, environment: Mapping[str, str], said: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UsageError, match=said):
        S3Store("s3://bucket/x")


def test_a_secret_that_is_not_the_keys_is_no_missing_right(s3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "not-the-secret-0123456789")
    with pytest.raises(Refused, match=r"signature does not match: the secret key is not the one of this access key") as refused:
        S3Store(s3.url("x"), patience_s=30).create("a", b"x")
    assert "s3:PutObject" not in str(refused.value) and "not-the-secret" not in str(refused.value)


@pytest.mark.parametrize("value", ["soon", "nan", "-1", "inf"])
def test_patience_is_a_number(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OSCTL_S3_PATIENCE_S", value)
    with pytest.raises(UsageError, match="OSCTL_S3_PATIENCE_S"):
        S3Store("s3://bucket/x")
