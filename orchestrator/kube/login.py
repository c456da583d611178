"""Log in to an API server, with the official client.

Owns the choice between a context of the kubeconfig and a pod's own account, and when to log in and to log in again. The client
(`kubernetes.config`) reads a kubeconfig, runs its plugins and renews its tokens. Some of this would do harm and is done differently here:
- A plugin that fails is an error. The client would log the plugin's output and send requests without credentials.
- Private keys are removed from the disk before the first request. The client would leave them in the temporary folder until the process
  ends.
- NO_PROXY, a password in a proxy's URL and `proxy-url` of the kubeconfig are used. Client 35 reads NO_PROXY but does not use it.
- The client retries nothing and follows no redirect: `orchestrator.kube.client` decides what a fault means.

Refuses to quote what it read: a kubeconfig contains secrets, and so do the client's own error messages about it.
"""

from __future__ import annotations

import datetime
import os
import ssl
import tempfile
import threading
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import urllib3
import yaml
from kubernetes.client import ApiClient, Configuration
from kubernetes.config import ConfigException
from kubernetes.config.dateutil import parse_rfc3339
from kubernetes.config.exec_provider import ExecProvider
from kubernetes.config.incluster_config import SERVICE_CERT_FILENAME, SERVICE_TOKEN_FILENAME, InClusterConfigLoader
from kubernetes.config.kube_config import FileOrData, KubeConfigLoader, KubeConfigMerger
from urllib3.util import make_headers, parse_url
from urllib3.util.ssl_ import create_urllib3_context

from orchestrator.errors import OsctlError, Refused, Unreachable, UsageError
from orchestrator.redact import redacted

DEFAULT_KUBECONFIG = "~/.kube/config"
BROKEN = (yaml.YAMLError, ConfigException, AttributeError, KeyError, TypeError, ValueError, IndexError)
"""Errors of the client for a file that is not as kubectl writes it."""


class LoginFailed(Refused):
    """There are no credentials, and none have ever worked. A person has to check them."""


class Login:
    """One account at one API server. Safe for several threads."""

    def __init__(self, server: str, load: Callable[[Configuration, str], None]):
        """
        Args:
            server: URL of the API server, for messages.
            load: fills in a configuration. It may write keys into the folder that it is given.
        """
        self.server = server
        self._load = load
        self._lock = threading.RLock()
        self._client: ApiClient | None = None
        self._has_worked = False

    def authorized(self) -> tuple[ApiClient, Mapping[str, str]]:
        """A client, and the header that authorizes its requests. A token that is about to expire is renewed.

        Raises:
            UsageError: the kubeconfig cannot be used.
            LoginFailed: a plugin or a provider gives no credentials.
            Unreachable: either of these happened after credentials had worked once, so it may pass.
        """
        with self._lock:
            try:
                if self._client is None:
                    self._client = self._log_in()
                key = self._client.configuration.get_api_key_with_prefix("authorization")
            except Exception as error:  # noqa: BLE001 - plugins, providers' libraries and files raise any kind of error
                raise self._fault(error) from None  # the cause may quote what it could not read
            self._has_worked = True
            return self._client, {"authorization": key.strip()} if key else {}  # a file with a token ends with a line break

    def renew(self, refused: ApiClient) -> None:
        """Log in anew with the next request, because the server did not accept this client's credentials."""
        with self._lock:
            if self._client is refused:
                self.close()

    def close(self) -> None:
        """Close its connections. The next request logs in anew."""
        with self._lock:
            client, self._client = self._client, None
        if client is not None:
            client.rest_client.pool_manager.clear()
            client.close()

    def _log_in(self) -> ApiClient:
        configuration = Configuration()
        configuration.retries, configuration.proxy = False, None
        with tempfile.TemporaryDirectory(prefix="osctl-login-") as folder:
            self._load(configuration, folder)
            _choose_proxy(configuration)
            client = ApiClient(configuration)
            client.user_agent = "osctl"
            if configuration.host.startswith("https"):
                _hold_keys_in_memory(client)
        return client

    def _fault(self, error: Exception) -> OsctlError:
        if isinstance(error, urllib3.exceptions.HTTPError) and isinstance(error, ValueError):  # its text quotes a part of a URL
            fault: OsctlError = UsageError(
                "kubeconfig's server, or a proxy variable such as HTTPS_PROXY, is not a URL; escape what is in it"
            )
        elif isinstance(error, OsctlError):
            fault = error
        elif isinstance(error, (*BROKEN, ssl.SSLError)):
            fault = UsageError(f"{self.server}: what the kubeconfig says of this context cannot be used: {reason(error)}")
        else:
            fault = LoginFailed(f"{self.server}: cannot log in: {reason(error)}; look at the user of this context in the kubeconfig")
        return Unreachable(str(fault)) if self._has_worked else fault


def find(context: str | None, env: Mapping[str, str] = os.environ) -> Login:
    """The account that kubectl would choose: KUBECONFIG, else inside a pod the pod's account, else ~/.kube/config. Raises UsageError."""
    named = env.get("KUBECONFIG")
    if not named and context is None and Path(SERVICE_TOKEN_FILENAME).is_file():
        pod = InClusterConfigLoader(SERVICE_TOKEN_FILENAME, SERVICE_CERT_FILENAME)
        found = Configuration()
        try:
            pod.load_and_set(found)
        except (ConfigException, OSError) as error:
            raise UsageError(f"this pod's account cannot be used: {reason(error)}. Set KUBECONFIG") from None
        return Login(found.host, lambda configuration, _: pod.load_and_set(configuration))
    files = named or DEFAULT_KUBECONFIG
    server = _Kubeconfig(files, context).server
    return Login(redacted(server), lambda configuration, folder: _Kubeconfig(files, context).load(configuration, folder))


def reason(error: Exception) -> str:
    """An error's text, without what it quotes from a kubeconfig."""
    if isinstance(error, yaml.YAMLError):
        mark = getattr(error, "problem_mark", None)
        return f"not YAML{f', line {mark.line + 1}' if mark else ''}"
    if isinstance(error, (KeyError, TypeError, AttributeError, IndexError)):
        return f"not as kubectl writes it ({type(error).__name__})"
    return redacted(str(error).partition("{")[0].strip()) or type(error).__name__  # the client quotes whole entries, as Python writes them


class _Kubeconfig:
    """One context of a kubeconfig. Several files are merged as kubectl merges them: the first that names something wins."""

    def __init__(self, files: str, context: str | None):
        """Read the files. Raises UsageError."""
        self._merged = self._read(files)
        name = context or self._current()
        try:
            if name is None:
                raise ConfigException("names no current context")
            chosen = self._merged.config["contexts"].get_with_name(name)["context"]
            self._cluster = self._merged.config["clusters"].get_with_name(chosen["cluster"])["cluster"]
            user = chosen.safe_get("user")
            if user is not None:
                self._merged.config["users"].get_with_name(user)
            self.server: str = self._cluster["server"]
            if parse_url(self.server).host is None:
                raise ConfigException("the server of its cluster is not a URL")
        except urllib3.exceptions.LocationParseError:  # its text quotes a part of what it could not read, perhaps of a password
            raise UsageError("kubeconfig's server is not a URL; escape what is in it. Set KUBECONFIG to another") from None
        except BROKEN as error:
            raise _unusable(f"{files}: context {name}: {reason(error)}") from None
        self._name = name

    @staticmethod
    def _read(files: str) -> KubeConfigMerger:
        try:
            merged = KubeConfigMerger(files)
        except (*BROKEN, OSError) as error:
            raise _unusable(f"kubeconfig {files}: {reason(error)}") from None
        if merged.config is None:
            raise _unusable(f"kubeconfig {files}: not found")
        return merged

    def _current(self) -> str | None:
        """Name of the current context, from the first file that has one. The client would use the last file's."""
        named = (content.get("current-context") for content in self._merged.config_files.values())
        return next((str(name) for name in named if name), None)

    def load(self, configuration: Configuration, folder: str) -> None:
        if proxy := self._cluster.safe_get("proxy-url"):
            configuration.proxy, configuration.no_proxy = proxy, ""
        saver = self._merged.save_changes  # a provider's refresh token may be good for one use
        _Loader(
            self._merged.config, active_context=self._name, config_base_path=None, config_persister=saver, temp_file_path=folder
        ).load_and_set(configuration)


def _unusable(fact: str) -> UsageError:
    return UsageError(f"no cluster to talk to: {fact}. Set KUBECONFIG, or name a context in the cluster profile")


class _Loader(KubeConfigLoader):  # type: ignore[misc]
    """The client's own loader, except that a plugin that fails is an error."""

    def _load_from_exec_plugin(self) -> bool | None:
        if "exec" not in self._user:
            return None
        folder = self._get_base_path(self._cluster.path)
        try:
            status = ExecProvider(self._user["exec"], folder, self._cluster).run()
            if not isinstance(status, dict) or not (status.get("token") or status.get("clientCertificateData")):
                raise ConfigException("exec: the plugin's answer holds neither a token nor a certificate")
        except (ConfigException, OSError, AttributeError, KeyError, TypeError, ValueError) as error:
            if self._is_still_good():
                return True
            raise LoginFailed(
                f"{self._cluster.safe_get('server')}: cannot log in: {reason(error)}; look at the user of this context in the kubeconfig"
            ) from None
        self.__dict__.pop("expiry", None)
        if status.get("expirationTimestamp"):
            self.expiry = parse_rfc3339(status["expirationTimestamp"])
        if status.get("token"):
            self.token = f"Bearer {status['token']}"
        if status.get("clientCertificateData"):
            self.cert_file, self.key_file = (self._written(status, key, folder) for key in ("clientCertificateData", "clientKeyData"))
        return True

    def _is_still_good(self) -> bool:
        """Whether the old token still works. It is renewed minutes before it expires, so a plugin that fails now can be run again later."""
        return "token" in self.__dict__ and "expiry" in self.__dict__ and bool(self.expiry > datetime.datetime.now(datetime.UTC))

    def _written(self, status: Mapping[str, Any], key: str, folder: str) -> str | None:
        data = FileOrData(
            status, None, data_key_name=key, file_base_path=folder, base64_file_content=False, temp_file_path=self._temp_file_path
        )
        path: str | None = data.as_file()
        return path


def _choose_proxy(configuration: Configuration) -> None:
    """Set the proxy: the kubeconfig's, otherwise the environment's for the scheme of the server."""
    if configuration.proxy is None:
        proxies = urllib.request.getproxies_environment()
        configuration.proxy = proxies.get(urlsplit(configuration.host).scheme) or proxies.get("all")
        configuration.no_proxy = proxies.get("no", "")
    if configuration.proxy and (login := parse_url(configuration.proxy).auth):
        configuration.proxy_headers = make_headers(proxy_basic_auth=unquote(login))


def _hold_keys_in_memory(client: ApiClient) -> None:
    """Read certificates and keys once, into a TLS context that all connections share."""
    configuration, options = client.configuration, client.rest_client.pool_manager.connection_pool_kw
    context = create_urllib3_context()
    if configuration.verify_ssl:
        context.load_verify_locations(options["ca_certs"])
        context.verify_mode = ssl.CERT_REQUIRED
    else:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    if configuration.cert_file:
        context.load_cert_chain(configuration.cert_file, configuration.key_file)
    for name in ("ca_certs", "cert_file", "key_file"):
        options.pop(name, None)
    options["ssl_context"] = context
