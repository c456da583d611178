"""Send a request to a bucket until it is answered: the connection, its credentials, patience, and what an answer means.

Owns what can go wrong between this process and a bucket, and turns it into these errors:

- 404 is NotFound, 412 is ConditionFailed; UploadLost means that a multipart upload is no longer there.
- 409, 429, 5xx, broken connections and truncated bodies are tried again with jitter. Patience counts from the first failure, and starts
  anew whenever bytes have arrived: a transfer of hours has as much patience at its end as at its start. After that it is Unreachable.
- Credentials that have expired are fetched again from their source, and the request is sent again. While they cannot be renewed the store
  is Unreachable, not Refused: a caller that waits for the store waits for credentials too.
- 403 and other refusals are Refused at once, with bucket, endpoint and action. No message has a key, a signature or a server's text.

Refuses to know what is stored, and to renew credentials from the environment: a running process cannot be given another environment.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import logging
import random
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

from opensora.dataset.places import WRONG_KEYS
from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.redact import redacted

Answer = TypeVar("Answer")
Request = Callable[[Any, int], Answer]
"""Called with the client to use, and the number of tries before this one."""

CONNECTIONS = 16
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
BROKEN_ON_THE_WAY = {"RequestTimeout", "BadDigest", "IncompleteBody", "XAmzContentSHA256Mismatch", "XAmzContentChecksumMismatch"}
"""Error codes with a 4xx status after which a repeated request may succeed."""
ENDED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
UNKNOWN = {"InvalidToken", "InvalidTokenId", "InvalidAccessKeyId"}
"""Error codes that some servers give for an expired session. Credentials are fetched again once; after that they count as wrong."""
DENIED_ROLE = {"AccessDenied", "AccessDeniedException", "InvalidClientTokenId"}
"""Error codes of a service that issues credentials for which waiting does not help."""
RIGHTS = {"read": "s3:GetObject", "write": "s3:PutObject", "list": "s3:ListBucket", "remove": "s3:DeleteObject"}


class ConditionFailed(Exception):
    """412: If-None-Match or If-Match did not hold."""


class UploadLost(Exception):
    """A multipart upload is no longer there, or can no longer be completed. It has to begin again."""


@dataclass(frozen=True)
class _Connection:
    client: Any
    credentials: Any
    """None means that there are none."""
    of_environment: bool
    """Whether the credentials are the fixed ones in AWS_ACCESS_KEY_ID."""


class Requests:
    """Sends requests about one bucket. Safe for threads."""

    def __init__(self, url: str, bucket: str, env: Mapping[str, str], patience_s: float, pause: Callable[[float], None]):
        """`url` is the store's, for messages. Raises UsageError, Unreachable."""
        from botocore import exceptions

        self.answered: type[Exception] = exceptions.ClientError
        """The exception of a request that was answered with an error."""
        self._broken: type[Exception] = exceptions.BotoCoreError
        self._missing = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError)
        self._url, self._bucket, self._env, self._patience_s, self._pause = url, bucket, env, patience_s, pause
        # botocore logs a failed renewal with a traceback that has the server's text. `call` reports a failure that lasts.
        logging.getLogger("botocore.credentials").setLevel(logging.ERROR)
        self._renewing = threading.Lock()
        try:
            self._connection = self._connect()
        except ValueError as error:  # botocore quotes the endpoint, with whatever is in it
            raise UsageError(
                f"store {url}: no client can be made; is OSCTL_S3_ENDPOINT http(s)://host:port, and AWS_REGION one?"
            ) from error
        except (exceptions.CredentialRetrievalError, exceptions.MetadataRetrievalError) as error:
            raise Unreachable(
                f"store {url}: its credentials cannot be fetched ({type(error).__name__}); check their source, then run again"
            ) from error
        except self._broken as error:
            name = type(error).__name__
            raise UsageError(
                f"store {url}: no credentials can be read ({name}); check AWS_PROFILE and AWS_ACCESS_KEY_ID with its secret"
            ) from error
        self.endpoint = _without_user(str(self.client.meta.endpoint_url))

    @property
    def client(self) -> Any:
        return self._connection.client

    def call(
        self, action: str, key: str, request: Request[Answer], *, progress: Callable[[], int] = lambda: 0, patience_s: float | None = None
    ) -> Answer:
        """Send a request until it succeeds, and return its answer.

        Args:
            progress: how much has arrived so far. If it has grown between two failures, patience starts anew.
            patience_s: replaces the store's own patience. None means the store's own.

        Raises:
            ConditionFailed, UploadLost, NotFound, Refused, Unreachable.
        """
        patience_s = self._patience_s if patience_s is None else patience_s
        seen, first_failure, failures, renewed = progress(), None, 0, False
        for number in itertools.count():
            connection = self._connection
            reason = self._trouble_with(connection, action, key)
            if not reason:
                try:
                    return request(connection.client, number)
                except self.answered as error:
                    code, status = code_of(error)
                    if (code in ENDED or (code in UNKNOWN and not connection.of_environment)) and not renewed:
                        renewed = True
                        self._renew(connection)
                        continue
                    if code in ENDED and connection.of_environment:
                        raise Unreachable(self.text(action, key, _ENDED_ENVIRONMENT)) from error
                    if code in ENDED:
                        self._renew(connection)
                    else:
                        self._classify(action, key, code, status)
                    reason = f"answers {status} {code}"
                except self._missing as error:
                    raise Refused(self.text(action, key, _NO_CREDENTIALS)) from error
                except self._broken as error:
                    if "CERTIFICATE_VERIFY_FAILED" in str(error):
                        reason = "its certificate is not trusted; name the authority's file in OSCTL_S3_CA"
                        raise Unreachable(self.text(action, key, reason)) from error
                    reason = f"does not answer ({type(error).__name__})"
            if progress() > seen:
                seen, first_failure, failures = progress(), None, 0
            failures += 1
            first_failure = time.monotonic() if first_failure is None else first_failure
            wait = random.uniform(0.5, 1) * min(FIRST_PAUSE_S * 2 ** (failures - 1), LONGEST_PAUSE_S)
            if time.monotonic() + wait > first_failure + patience_s:
                tries = f"{failures} {'try' if failures == 1 else 'tries'} in {patience_s:g} s"
                raise Unreachable(self.text(action, key, f"{reason}, {tries}; check the endpoint and the network, then run again"))
            self._pause(wait)
        raise AssertionError("unreachable: the loop above has no end")

    def try_once(self, request: Callable[[Any], object]) -> None:
        """Send a request once and ignore errors, for requests that nothing depends on."""
        with contextlib.suppress(self.answered, self._broken):
            request(self.client)

    def text(self, action: str, key: str, reason: str) -> str:
        return f"store {self._url} at {self.endpoint}: cannot {action} {key or 'its keys'}: {reason}"

    def _classify(self, action: str, key: str, code: str, status: int) -> None:
        """Raise the error that an answer means; return if another try may help. The server's text is left out, since it can quote keys."""
        if status == 412:
            raise ConditionFailed
        if code == "NoSuchUpload":
            raise UploadLost
        if code == "NoSuchBucket":
            raise Refused(self.text(action, key, f"there is no bucket {self._bucket}; make it first, or correct the store's URL"))
        if code in BROKEN_ON_THE_WAY or status in (408, 409, 425, 429) or status >= 500:
            return
        if status == 404:
            raise NotFound(key)
        if code == "RequestTimeTooSkewed":
            raise Refused(self.text(action, key, "this host's clock and the store's differ too much; set the clock"))
        if code == "SignatureDoesNotMatch":
            raise Refused(self.text(action, key, WRONG_KEYS[code]))
        if status in (401, 403):
            raise Refused(self.text(action, key, f"access denied ({status} {code}); {RIGHTS[action]} on bucket {self._bucket} is needed"))
        raise Refused(self.text(action, key, f"refused ({status} {code}); check region, endpoint and path style"))

    def _trouble_with(self, connection: _Connection, action: str, key: str) -> str:
        """Why a connection's credentials cannot be renewed now. Empty means that they are valid. Botocore renews those that expire soon.

        Called before each request, so that an answer of the credentials' source is never taken for the store's answer.
        """
        if connection.credentials is None:
            raise Refused(self.text(action, key, _NO_CREDENTIALS))
        try:
            connection.credentials.get_frozen_credentials()
        except self.answered as error:
            code, status = code_of(error)
            service = getattr(error, "operation_name", "their source")
            if code in DENIED_ROLE:
                raise Refused(self.text(action, key, f"{service} gives no credentials ({status} {code}); check the role")) from error
            return f"its credentials cannot be renewed ({service} answers {status} {code})"
        except (self._broken, RuntimeError, OSError) as error:  # a RuntimeError means that the new credentials have expired too
            return f"its credentials cannot be renewed ({type(error).__name__})"
        return ""

    def _renew(self, used: _Connection) -> None:
        """Fetch credentials again, unless another thread has done so since `used` was made. If this fails, the next try reports it."""
        with self._renewing:
            if self._connection is used:
                try:
                    self._connection = self._connect()
                except (self._broken, self.answered, ValueError, OSError) as error:
                    logging.getLogger(__name__).warning("%s: credentials cannot be read (%s)", self._url, type(error).__name__)

    def _connect(self) -> _Connection:
        from botocore import session
        from botocore.config import Config

        env = self._env
        endpoint = env.get("OSCTL_S3_ENDPOINT") or env.get("AWS_ENDPOINT_URL_S3") or env.get("AWS_ENDPOINT_URL")
        style = env.get("OSCTL_S3_PATH_STYLE", "1" if endpoint else "")
        if style not in ("", "0", "1"):
            raise UsageError(f"OSCTL_S3_PATH_STYLE: {style!r} is neither 0 nor 1")
        config = Config(
            # One request for each try: `call` decides what is sent again, since a conditional write may succeed and its answer be lost.
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=20,
            max_pool_connections=CONNECTIONS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if style == "1" else "virtual" if style == "0" else "auto"},
        )
        region = env.get("AWS_REGION") or env.get("AWS_DEFAULT_REGION") or "us-east-1"
        # A new session, so that a renewed connection fetches credentials again. The service's description is parsed only once.
        fresh = session.Session()
        fresh.register_component("data_loader", _descriptions())
        # Settings for the service that issues credentials; its default timeouts are minutes.
        fresh.set_config_variable("region", region)
        fresh.set_default_client_config(Config(connect_timeout=5, read_timeout=10, retries={"total_max_attempts": 2}))
        if env.get("AWS_ACCESS_KEY_ID"):
            if not env.get("AWS_SECRET_ACCESS_KEY"):
                raise UsageError(f"store {self._url}: AWS_ACCESS_KEY_ID is set and AWS_SECRET_ACCESS_KEY is not; set both, or neither")
            fresh.set_credentials(env["AWS_ACCESS_KEY_ID"], env["AWS_SECRET_ACCESS_KEY"], env.get("AWS_SESSION_TOKEN"))
        client = fresh.create_client(
            "s3",
            endpoint_url=endpoint,
            region_name=region,
            verify=env.get("OSCTL_S3_CA") or env.get("AWS_CA_BUNDLE"),
            config=config,
        )
        return _Connection(client, fresh.get_credentials(), bool(env.get("AWS_ACCESS_KEY_ID")))


_NO_CREDENTIALS = "no credentials were found; set AWS_ACCESS_KEY_ID, AWS_PROFILE or a role"
_ENDED_ENVIRONMENT = (
    "AWS_SESSION_TOKEN has ended, and a running process cannot be given another one; "
    "name a source that renews itself (AWS_PROFILE, AWS_WEB_IDENTITY_TOKEN_FILE or a role) in its place, then launch again"
)


def code_of(error: Exception) -> tuple[str, int]:
    """Code and HTTP status of an error answer. A proxy may answer without a code; then the status is used."""
    response = error.response  # type: ignore[attr-defined] # of botocore's ClientError
    status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
    return str(response.get("Error", {}).get("Code", status)), int(status)


@functools.cache
def _descriptions() -> Any:
    from botocore.loaders import Loader

    class Descriptions(Loader):
        def list_available_services(self, type_name: str) -> list[str]:
            """The services without opening their folders. Botocore opens 400 folders for this answer: 0.015 CPU-s a process (measured)."""
            return [path.name for folder in map(Path, self.search_paths) if folder.is_dir() for path in folder.iterdir()]

    return Descriptions()


def _without_user(endpoint: str) -> str:
    parts = urlsplit(redacted(endpoint))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
