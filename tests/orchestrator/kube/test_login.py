"""Laws of logging in: plugins of every version, tokens that end, proxies, and secrets that stay where they are."""

from __future__ import annotations

import base64
import datetime
import json
import logging
import subprocess
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import certifi
import pytest
import yaml
from fake_api_server import FakeApiServer, Fault, serve

from orchestrator.errors import Refused, Unreachable, UsageError
from orchestrator.kube import login, watch
from orchestrator.kube.client import Api


def until(holds: Callable[[], Any], what: str, patience_s: float = 8.0) -> None:
    deadline = time.monotonic() + patience_s
    while not holds():
        assert time.monotonic() < deadline, f"{what}: not within {patience_s} s"
        time.sleep(0.01)


POD = "/api/v1/namespaces/osctl/pods/one"
VERSIONS = ("v1alpha1", "v1beta1", "v1")


@pytest.fixture
def server() -> Iterator[FakeApiServer]:
    with serve() as fake:
        fake.put(POD, {"metadata": {"name": "one"}})
        yield fake


@pytest.fixture
def connect(server: FakeApiServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Api]]:
    """Writes a kubeconfig of one user, and connects."""
    opened: list[Api] = []
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))

    def one(cluster: dict[str, Any] | None = None, **user: Any) -> Api:
        content = {
            "apiVersion": "v1", "kind": "Config", "current-context": "one",
            "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
            "clusters": [{"name": "c", "cluster": {"server": server.url, **(cluster or {})}}], "users": [{"name": "u", "user": user}],
        }  # fmt: skip
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(content))
        opened.append(Api.connect(None, "osctl"))
        return opened[-1]

    yield one
    for api in opened:
        api.close()


class Plugin:
    """A program that answers as `status` says, and counts how often it was asked."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.path = folder / "login"
        self.status: dict[str, Any] = {}
        self.path.write_text(
            textwrap.dedent(
                f"""\
                #!/bin/sh
                echo x >> {folder}/asked
                [ ! -f {folder}/fails ] || {{ cat {folder}/fails >&2; exit 1; }}
                cat {folder}/answer
                """
            )
        )
        self.path.chmod(0o755)

    def answers(self, version: str = "v1", **status: Any) -> dict[str, Any]:
        api = f"client.authentication.k8s.io/{version}"
        (self.folder / "answer").write_text(json.dumps({"apiVersion": api, "kind": "ExecCredential", "status": status}))
        return {"apiVersion": api, "command": str(self.path)}

    def fails(self, said: str | None) -> None:
        (self.folder / "fails").write_text(said) if said else (self.folder / "fails").unlink()

    @property
    def asked(self) -> int:
        return len((self.folder / "asked").read_text().split()) if (self.folder / "asked").exists() else 0


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


def ends(seconds: float) -> str:
    return (datetime.datetime.now(datetime.UTC) + datetime.timedelta(seconds=seconds)).strftime("%Y-%m-%dT%H:%M:%SZ")


# --- Plugins and tokens ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("version", VERSIONS)
def test_a_plugin_of_every_version_logs_in_once_for_all_requests(
    server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin, version: str
) -> None:
    server.knows = "Bearer of-the-plugin"
    api = connect(exec=plugin.answers(version, token="of-the-plugin", expirationTimestamp=ends(3600)))
    for _ in range(3):
        assert api.get("pods", "one")["metadata"]["name"] == "one"
    assert plugin.asked == 1


def test_a_token_that_is_about_to_end_is_had_anew(server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin) -> None:
    api = connect(exec=plugin.answers(token="first", expirationTimestamp=ends(60)))
    api.get("pods", "one")
    plugin.answers(token="second", expirationTimestamp=ends(3600))
    api.get("pods", "one")
    api.get("pods", "one")
    assert server.logins == ["Bearer first", "Bearer second", "Bearer second"]


def test_a_token_that_the_server_no_longer_knows_is_had_anew_once(
    server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin
) -> None:
    api = connect(exec=plugin.answers(token="first"))
    api.get("pods", "one")
    server.knows = "Bearer second"
    plugin.answers(token="second")
    api.get("pods", "one")
    server.knows = "Bearer nobody"
    with pytest.raises(Refused, match="log in again"):
        api.get("pods", "one")
    assert server.logins == ["Bearer first", "Bearer first", "Bearer second", "Bearer second", "Bearer second"]


def test_a_token_file_that_is_replaced_is_read_anew(server: FakeApiServer, connect: Callable[..., Api], tmp_path: Path) -> None:
    (tmp_path / "token").write_text("first\n")
    api = connect(tokenFile=str(tmp_path / "token"))
    api.get("pods", "one")
    (tmp_path / "token").write_text("second\n")
    server.knows = "Bearer second"
    assert api.get("pods", "one")


@pytest.mark.parametrize("answer", [{}, {"token": None}, {"token": ""}, {"clientKeyData": "k"}])
def test_a_plugin_without_an_answer_is_refused_and_nobody_asks_without_credentials(
    server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin, answer: dict[str, Any]
) -> None:
    api = connect(exec=plugin.answers(**answer))
    with pytest.raises(Refused, match="cannot log in"):
        api.get("pods", "one")
    assert server.requests == []


def test_a_plugin_that_fails_at_first_is_the_persons_and_later_of_the_moment(
    server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin, capfd: pytest.CaptureFixture[str]
) -> None:
    api = connect(exec=plugin.answers(token="t", expirationTimestamp=ends(-10)))
    plugin.fails("session over; password hunter2-hunter2")
    with pytest.raises(Refused, match="session over"):
        api.get("pods", "one")
    plugin.fails(None)
    api.get("pods", "one")
    plugin.fails("no network")
    with pytest.raises(Unreachable, match="no network"):
        api.get("pods", "one")
    plugin.fails(None)
    assert api.get("pods", "one")
    assert capfd.readouterr() == ("", ""), "the client writes the plugin's words to the log of everybody"


def test_a_plugin_that_fails_while_its_token_is_good_stops_nothing(
    server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin
) -> None:
    api = connect(exec=plugin.answers(token="t", expirationTimestamp=ends(60)))
    api.get("pods", "one")
    plugin.fails("no network")
    assert api.get("pods", "one")
    assert plugin.asked == 3, "the client renews five minutes before the end, with each request"


def test_a_plugin_that_fails_under_a_watch_makes_it_stale_until_it_works_again(
    server: FakeApiServer, connect: Callable[..., Api], plugin: Plugin, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(watch, "STALE_S", 0.3)
    monkeypatch.setattr(watch, "PAUSE_S", 0.05)
    monkeypatch.setattr("orchestrator.kube.client.WATCH_S", 1)
    monkeypatch.setattr("orchestrator.kube.client.TRIES", 1)
    watcher = watch.Watcher(connect(exec=plugin.answers(token="t", expirationTimestamp=ends(-10))), "")
    watcher.start()
    try:
        assert watcher.wait_until_fresh(5)
        plugin.fails("no network")
        until(lambda: not watcher.fresh(), "that nobody watches")
        assert "no network" in watcher.why()
        plugin.fails(None)
        assert watcher.wait_until_fresh(5)
        server.put(POD, {"metadata": {"name": "one", "labels": {"osctl/run": "r"}}})
        until(lambda: watcher.cache.pods("r"), "the pod")
        assert len([one for one in caplog.records if "cannot be watched now" in one.getMessage()]) == 1
    finally:
        watcher.close()


def test_a_pods_account_is_read_anew_when_its_token_was_rotated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "token").write_text("first")
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setattr(login, "SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr(login, "SERVICE_CERT_FILENAME", certifi.where())
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", "443")
    found = login.find(None)
    assert found.server == "https://10.0.0.1:443"
    client, header = found.authorized()
    assert header == {"authorization": "bearer first"}
    (tmp_path / "token").write_text("second")
    found.renew(client)
    client, header = found.authorized()
    assert header == {"authorization": "bearer second"}
    (tmp_path / "token").unlink()
    found.renew(client)
    with pytest.raises(Unreachable):
        found.authorized()
    found.close()


# --- Which file, which proxy -------------------------------------------------------------------------------------------------------


def test_the_first_file_that_names_a_current_context_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        content = {
            "current-context": name, "contexts": [{"name": name, "context": {"cluster": name}}],
            "clusters": [{"name": name, "cluster": {"server": f"https://{name}.example"}}],
        }  # fmt: skip
        (tmp_path / name).write_text(yaml.safe_dump(content))
    monkeypatch.setenv("KUBECONFIG", f"{tmp_path / 'gone'}:{tmp_path / 'a'}:{tmp_path / 'b'}")
    assert login.find(None).server == "https://a.example"
    assert login.find("b").server == "https://b.example"


PROXIES = ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy")


@pytest.mark.parametrize("where", ["HTTP_PROXY", "ALL_PROXY", "proxy-url"])
def test_a_proxy_is_used_and_told_who_we_are(
    server: FakeApiServer, connect: Callable[..., Api], monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    proxy, away = server.url.replace("://", "://me:p%40ss@"), {"server": "http://cluster.invalid"}
    if where == "proxy-url":
        away |= {"proxy-url": proxy}
        monkeypatch.setenv("NO_PROXY", "cluster.invalid")
    else:
        monkeypatch.setenv(where, proxy)
        monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    assert connect(away, token="t").get("pods", "one")
    assert server.proxy_logins == ["Basic bWU6cEBzcw=="]


def test_what_no_proxy_names_is_asked_directly(server: FakeApiServer, connect: Callable[..., Api], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")
    monkeypatch.setenv("NO_PROXY", "example.com,127.0.0.0/8")
    assert connect(token="t").get("pods", "one")


def test_a_redirect_is_refused_and_the_token_stays_here(server: FakeApiServer, connect: Callable[..., Api]) -> None:
    with serve() as other:
        server.faults.append(Fault("GET", status=307, location=f"{other.url}{POD}", message="elsewhere"))
        with pytest.raises(Refused, match="points elsewhere"):
            connect(token="t").get("pods", "one")
        assert other.requests == []


@pytest.mark.parametrize("body", ["<html>Sign in</html>", "[1]", "null", '{"items": 5, "metadata": {"resourceVersion": "1"}}', "{}"])
def test_an_answer_of_somebody_else_is_no_traceback(
    server: FakeApiServer, connect: Callable[..., Api], monkeypatch: Any, body: str
) -> None:
    monkeypatch.setattr("fake_api_server.json.dumps", lambda *_, **__: body)
    monkeypatch.setattr("orchestrator.kube.client.TRIES", 1)
    with pytest.raises(Unreachable, match=r"not an? (object|list) of a Kubernetes API server"):
        connect(token="t").list("pods")


# --- Secrets -----------------------------------------------------------------------------------------------------------------------


def test_no_log_at_any_level_has_the_token(server: FakeApiServer, connect: Callable[..., Api], caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.DEBUG)
    api = connect(token="secret-of-the-kubeconfig")
    api.get("pods", "one")
    server.faults.append(Fault("GET", status=401, times=2))
    with pytest.raises(Refused):
        api.get("pods", "one")
    server.faults.append(Fault("GET", times=9))
    with pytest.raises(Unreachable) as caught:
        api.get("pods", "one")
    assert "secret-of" not in caplog.text + str(caught.value) + repr(caught.value.__cause__)


@pytest.mark.parametrize(
    "broken",
    [
        {"users": [{"name": "u", "use": {"token": "secret-token"}}]},
        {"users": [{"name": "u", "user": {"token": "secret-token", "client-certificate": "/nowhere"}}]},
        {"users": [{"name": "u", "user": {"exec": {"command": "x", "env": [{"name": "A", "value": "secret-token"}]}}}]},
        {"users": [{"name": "u", "user": {"auth-provider": {"name": "oidc", "config": {"client-secret": "secret-token"}}}}]},
        {"clusters": [{"name": "c", "cluster": {"server": "http://me:secret-token/x@host"}}]},
        {"contexts": [{"name": "one", "context": {"user": "secret-token"}}]},
    ],
)
def test_what_is_wrong_with_a_kubeconfig_is_said_without_what_is_in_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: dict[str, Any], capfd: pytest.CaptureFixture[str]
) -> None:
    content = {
        "current-context": "one", "contexts": [{"name": "one", "context": {"cluster": "c", "user": "u"}}],
        "clusters": [{"name": "c", "cluster": {"server": "https://127.0.0.1:9"}}], "users": [{"name": "u", "user": {}}],
    }  # fmt: skip
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump({**content, **broken}))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises((UsageError, Refused)) as caught:
        Api.connect(None, "osctl").get("pods", "one")
    assert "secret-token" not in str(caught.value) + str(capfd.readouterr())


def test_a_private_key_leaves_the_disk_before_the_first_request(
    connect: Callable[..., Api], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    subject = ["-subj", "/CN=u", "-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "crt"), "-days", "1", "-nodes"]
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", *subject], check=True, capture_output=True
    )
    crt, key = (base64.b64encode((tmp_path / name).read_bytes()).decode() for name in ("crt", "key"))
    user = {"client-certificate-data": crt, "client-key-data": key}
    api = connect({"server": "https://127.0.0.1:9", "certificate-authority-data": crt}, **user)
    client, _ = api._login.authorized()
    assert "ssl_context" in client.rest_client.pool_manager.connection_pool_kw
    assert list((tmp_path / "tmp").rglob("*")) == []
    api._login.renew(client)
    api._login.authorized()
    assert list((tmp_path / "tmp").rglob("*")) == []
