"""An S3 prefix as the store: put-if-absent by If-None-Match, put-if-match by If-Match, SHA-256 with every upload.

Owns what can go wrong between us and a bucket, and turns it into five answers:

- 404 NotFound; 412 StoreConflict, unless what lies there is what we wanted to write: a repeated call whose answer was lost succeeds.
- 409, 429, 5xx, broken connections and truncated bodies are tried again with jitter until `patience_s` is over, then Unreachable.
- 403 and other refusals are Refused at once, with bucket, endpoint and action. No message holds a key, a signature or a server's text.

Refuses to create buckets, to delete anything, and to judge content: a body that differs from the digest stored beside it is fetched
again (a proxy may have cut it), and if it stays different it is handed over as it is; `orchestrator.ledger` says what is wrong with it.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import hashlib
import itertools
import math
import os
import random
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.ports import Object, check_key, check_size
from orchestrator.redact import redacted

Answer = TypeVar("Answer")

PATIENCE_S = 30.0
"""How long an action is tried again. Twice a lease's life: a driver that cannot write for so long has lost it."""
PART_BYTES = 16 << 20
"""Size of a part of a multipart upload, and the largest object that goes up in one request. S3 allows 5 MiB to 5 GiB."""
PARTS = 10_000
"""S3 takes no more parts than this."""
UPLOADERS = 4
"""Parts of one file in flight. Arbitrary: four hide the latency of one another without many buffers."""
STALE = timedelta(days=1)
"""Unfinished multipart uploads of this age belong to processes that were killed. They are billed, and no listing shows them."""
PROBE = ".osctl-probe"
DIGEST = "osctl-sha256"
"""Metadata that carries the sha256 of an object: an ETag is none, and that of a multipart object is not even an MD5 of its bytes."""

FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
REREADS = 3
"""Times a body is fetched that differs from its digest, before it is taken for what the store really holds."""
BROKEN_ON_THE_WAY = {
    "RequestTimeout",
    "BadDigest",
    "IncompleteBody",
    "XAmzContentSHA256Mismatch",
    "XAmzContentChecksumMismatch",
    "NoSuchUpload",
}
"""Codes under a 4xx status that a repeated request can mend. A lost upload is begun again."""
EXPIRED = {"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"}
RIGHTS = {"read": "s3:GetObject", "write": "s3:PutObject", "list": "s3:ListBucket"}


class S3Store:
    def __init__(
        self,
        url: str,
        *,
        env: Mapping[str, str] = os.environ,
        patience_s: float | None = None,
        pause: Callable[[float], None] = time.sleep,
    ):
        """Reads from `env`: OSCTL_S3_ENDPOINT (or AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL), OSCTL_S3_PATH_STYLE (0 or 1; default 1 with an
        endpoint), OSCTL_S3_CA (or AWS_CA_BUNDLE), OSCTL_S3_PATIENCE_S, and what every AWS client reads.

        Raises UsageError.
        """
        match = re.fullmatch(r"s3://(?P<bucket>[a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/(?P<prefix>.*))?", url)
        if match is None:
            raise UsageError(
                f"store {redacted(url)}: not of the form s3://bucket/prefix; buckets have 3 to 63 lower-case letters, digits, `-` and `.`"
            )
        prefix = (match["prefix"] or "").strip("/")
        self.bucket = match["bucket"]
        self.prefix = check_key(prefix) + "/" if prefix else ""
        self.url = f"s3://{self.bucket}/{prefix}".rstrip("/")
        self._env = env
        self._pause = pause
        self._patience_s = float(env.get("OSCTL_S3_PATIENCE_S", PATIENCE_S)) if patience_s is None else patience_s
        try:
            self._client = self._connect()
        except ValueError as error:  # botocore quotes the endpoint, with whatever is in it
            raise UsageError(
                f"store {self.url}: no client can be made; is OSCTL_S3_ENDPOINT http(s)://host:port, and AWS_REGION one?"
            ) from error
        self.endpoint = _without_user(str(self._client.meta.endpoint_url))

    def read(self, key: str) -> Object:
        def get(_: int) -> tuple[dict[str, Any], bytes]:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key))
            with contextlib.closing(answer["Body"]) as body:
                check_size(key, answer["ContentLength"])
                return answer, body.read()

        def wrong(result: tuple[dict[str, Any], bytes]) -> bool:
            return _differs(result[0], len(result[1]), hashlib.sha256(result[1]).hexdigest())

        answer, data = self._whole(key, get, wrong)
        return Object(data, answer.get("ETag", ""))  # a gateway shows files that were not put through it without one

    def create(self, key: str, data: bytes) -> str:
        try:
            return self._call("write", key, lambda _: self._put(key, data, IfNoneMatch="*"))
        except _ConditionFailed:
            there = self.read(key)
            if there.data != data:
                raise StoreConflict(f"{key}: is there already, with other content") from None
            return there.etag

    def replace(self, key: str, data: bytes, etag: str) -> str:
        tries = 0

        def put(number: int) -> str:
            nonlocal tries
            tries = number
            return self._put(key, data, IfMatch=etag)

        try:
            return self._call("write", key, put)
        except _ConditionFailed:
            if tries:  # an earlier try may have been written although its answer was lost
                there = self.read(key)
                if there.data == data:
                    return there.etag
            raise StoreConflict(f"{key}: changed since it was read") from None

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        start = {"StartAfter": self.prefix + after} if after else {}
        for page in self._pages(prefix, **start):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self.prefix)
                if key != PROBE:
                    yield key

    def children(self, prefix: str) -> Sequence[str]:
        pages = self._pages(prefix, Delimiter="/")
        return sorted(item["Prefix"].removeprefix(self.prefix + prefix)[:-1] for page in pages for item in page.get("CommonPrefixes", ()))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if self._is_there(key, size, digest):
                return
            if size <= PART_BYTES:
                file.seek(0)
                self.create(key, file.read())
            else:
                self._upload_parts(key, file, size, digest)

    def download(self, key: str, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")

        def get(_: int) -> tuple[dict[str, Any], int, str]:
            answer = self._client.get_object(Bucket=self.bucket, Key=self._name(key))
            digest = hashlib.sha256()
            with contextlib.closing(answer["Body"]) as body, partial.open("wb") as file:
                for chunk in body.iter_chunks(1 << 20):
                    digest.update(chunk)
                    file.write(chunk)
                return answer, file.tell(), digest.hexdigest()

        try:
            self._whole(key, get, lambda result: _differs(*result))
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def size(self, key: str) -> int:
        return int(self._head(key)["ContentLength"])

    def discard(self, key: str) -> None:
        self._call("remove", key, lambda _: self._client.delete_object(Bucket=self.bucket, Key=self._name(key)))

    def probe(self) -> None:
        """Two writes that a store must refuse, on an object that stays. Also aborts multipart uploads that were left behind."""
        with contextlib.suppress(StoreConflict):  # it lies there since an earlier launch
            self.create(PROBE, b"osctl tries here whether the store honours conditional writes\n")
        for name, condition in (("If-None-Match", {"IfNoneMatch": "*"}), ("If-Match", {"IfMatch": '"00000000000000000000000000000000"'})):

            def put(_: int, condition: dict[str, str] = condition) -> str:
                return self._put(PROBE, uuid.uuid4().hex.encode(), **condition)

            with contextlib.suppress(_ConditionFailed):
                self._call("write", PROBE, put)
                raise Refused(
                    f"store {self.url} at {self.endpoint}: writes over an object in spite of {name}; "
                    "two drivers could both believe that they hold the lease. Use a store that honours conditional writes"
                )
        with contextlib.suppress(Refused):  # the right to list uploads is not needed for anything else
            self._abort_stale_uploads()

    def _connect(self) -> Any:
        from botocore import exceptions, session
        from botocore.config import Config

        self._answered = exceptions.ClientError
        self._credentials = (exceptions.NoCredentialsError, exceptions.PartialCredentialsError, exceptions.CredentialRetrievalError)
        self._broken = exceptions.BotoCoreError
        endpoint = self._env.get("OSCTL_S3_ENDPOINT") or self._env.get("AWS_ENDPOINT_URL_S3") or self._env.get("AWS_ENDPOINT_URL")
        style = self._env.get("OSCTL_S3_PATH_STYLE", "1" if endpoint else "")
        if style not in ("", "0", "1"):
            raise UsageError(f"OSCTL_S3_PATH_STYLE: {style!r} is neither 0 nor 1")
        config = Config(
            # One request a try: our own loop decides what is tried again, since a conditional write whose answer was lost is no failure.
            retries={"total_max_attempts": 1},
            connect_timeout=5,
            read_timeout=20,
            max_pool_connections=4 * UPLOADERS,
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
            s3={"addressing_style": "path" if style == "1" else "virtual" if style == "0" else "auto"},
        )
        # A session of its own, so that a renewed connection looks for credentials again; the service's description is parsed once.
        fresh = session.Session()
        fresh.register_component("data_loader", _descriptions())
        return fresh.create_client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id=self._env.get("AWS_ACCESS_KEY_ID"),
            aws_secret_access_key=self._env.get("AWS_SECRET_ACCESS_KEY"),
            aws_session_token=self._env.get("AWS_SESSION_TOKEN"),
            region_name=self._env.get("AWS_REGION") or self._env.get("AWS_DEFAULT_REGION") or "us-east-1",
            verify=self._env.get("OSCTL_S3_CA") or self._env.get("AWS_CA_BUNDLE"),
            config=config,
        )

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _put(self, key: str, data: bytes, **condition: str) -> str:
        digest = hashlib.sha256(data)
        answer = self._client.put_object(
            Bucket=self.bucket,
            Key=self._name(key),
            Body=data,
            ChecksumSHA256=_base64(digest.digest()),
            Metadata={DIGEST: digest.hexdigest()},
            **condition,
        )
        return str(answer["ETag"])

    def _head(self, key: str) -> dict[str, Any]:
        answer: dict[str, Any] = self._call("read", key, lambda _: self._client.head_object(Bucket=self.bucket, Key=self._name(key)))
        return answer

    def _is_there(self, key: str, size: int, digest: str) -> bool:
        """Whether just this content lies under the key. Raises StoreConflict where other content does."""
        try:
            head = self._head(key)
        except NotFound:
            return False
        there = head["Metadata"].get(DIGEST) or self._digest_of_content(key)
        if head["ContentLength"] != size or there != digest:
            raise StoreConflict(f"{key}: is there already, with other content ({head['ContentLength']} bytes, ours {size})")
        return True

    def _digest_of_content(self, key: str) -> str:
        """For objects that something else has put there."""

        def get(_: int) -> str:
            digest = hashlib.sha256()
            with contextlib.closing(self._client.get_object(Bucket=self.bucket, Key=self._name(key))["Body"]) as body:
                for chunk in body.iter_chunks(1 << 20):
                    digest.update(chunk)
            return digest.hexdigest()

        return self._call("read", key, get)

    def _upload_parts(self, key: str, file: BinaryIO, size: int, digest: str) -> None:
        """Nothing is seen under the key before the conditional completion."""

        def attempt(number: int) -> None:
            if number and self._is_there(key, size, digest):
                return  # an earlier completion was done, and its answer lost
            target = self._begin_upload(key, digest)
            try:
                parts = self._send_parts(key, file, size, target)
                # Not inside a `_call` of its own: after a 409 the upload has to begin again (S3 user guide, conditional writes).
                self._client.complete_multipart_upload(**target, MultipartUpload={"Parts": parts}, IfNoneMatch="*")
            except BaseException:
                with contextlib.suppress(self._answered, self._broken):
                    self._client.abort_multipart_upload(**target)
                raise

        try:
            self._call("write", key, attempt)
        except _ConditionFailed:
            if not self._is_there(key, size, digest):
                raise Unreachable(self._text("write", key, "it has the object by one answer and not by the next")) from None

    def _begin_upload(self, key: str, digest: str) -> dict[str, str]:
        def begin(_: int) -> str:
            answer = self._client.create_multipart_upload(
                Bucket=self.bucket, Key=self._name(key), ChecksumAlgorithm="SHA256", Metadata={DIGEST: digest}
            )
            return str(answer["UploadId"])

        return {"Bucket": self.bucket, "Key": self._name(key), "UploadId": self._call("write", key, begin)}

    def _send_parts(self, key: str, file: BinaryIO, size: int, target: dict[str, str]) -> Sequence[dict[str, Any]]:
        part_bytes = max(PART_BYTES, math.ceil(size / PARTS))

        def send(number: int) -> dict[str, Any]:
            data = os.pread(file.fileno(), part_bytes, (number - 1) * part_bytes)
            checksum = _base64(hashlib.sha256(data).digest())

            def put(_: int) -> str:
                answer = self._client.upload_part(**target, PartNumber=number, Body=data, ChecksumSHA256=checksum)
                return str(answer["ETag"])

            return {"PartNumber": number, "ETag": self._call("write", key, put), "ChecksumSHA256": checksum}

        with ThreadPoolExecutor(UPLOADERS) as pool:
            return tuple(pool.map(send, range(1, math.ceil(size / part_bytes) + 1)))

    def _abort_stale_uploads(self) -> None:
        answer = self._call("list", "uploads", lambda _: self._client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix))
        for upload in answer.get("Uploads", ()):
            if datetime.now(UTC) - upload["Initiated"] > STALE:
                with contextlib.suppress(self._answered, self._broken):
                    self._client.abort_multipart_upload(Bucket=self.bucket, Key=upload["Key"], UploadId=upload["UploadId"])

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        while True:

            def get(_: int, options: dict[str, str] = options) -> dict[str, Any]:
                page: dict[str, Any] = self._client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **options)
                return page

            page = self._call("list", prefix, get)
            yield page
            if not page.get("IsTruncated"):
                return
            options = {**options, "ContinuationToken": page["NextContinuationToken"]}

    def _whole(self, key: str, get: Callable[[int], Answer], differs: Callable[[Answer], bool]) -> Answer:
        for _ in range(REREADS):
            answer = self._call("read", key, get)
            if not differs(answer):
                break
        return answer

    def _call(self, action: str, key: str, request: Callable[[int], Answer]) -> Answer:
        """The request's answer; `request` is given the number of tries before it.

        Raises _ConditionFailed, NotFound, Refused, Unreachable.
        """
        deadline = time.monotonic() + self._patience_s
        renewed = False
        for number in itertools.count():
            try:
                return request(number)
            except self._answered as error:
                code, status = str(error.response["Error"]["Code"]), int(error.response["ResponseMetadata"]["HTTPStatusCode"])
                if code in EXPIRED and not renewed:
                    renewed, self._client = True, self._connect()
                    continue
                self._judge(action, key, code, status)
                reason = f"answers {status} {code}"
            except self._credentials as error:
                raise Refused(self._text(action, key, "no credentials were found; set AWS_ACCESS_KEY_ID, AWS_PROFILE or a role")) from error
            except self._broken as error:
                if "CERTIFICATE_VERIFY_FAILED" in str(error):
                    reason = "its certificate is not trusted; name the authority's file in OSCTL_S3_CA"
                    raise Unreachable(self._text(action, key, reason)) from error
                reason = f"does not answer ({type(error).__name__})"
            wait = random.uniform(0.5, 1) * min(FIRST_PAUSE_S * 2**number, LONGEST_PAUSE_S)
            if time.monotonic() + wait > deadline:
                tries = f"{number + 1} tries in {self._patience_s:g} s"
                raise Unreachable(self._text(action, key, f"{reason}, {tries}; check the endpoint and the network, then run again"))
            self._pause(wait)
        raise AssertionError("unreachable: the loop above has no end")

    def _judge(self, action: str, key: str, code: str, status: int) -> None:
        """Returns where another try may help. The server's own text is left out: it can quote keys and signed requests."""
        if status == 412:
            raise _ConditionFailed
        if code == "NoSuchBucket":
            raise Refused(self._text(action, key, f"there is no bucket {self.bucket}; make it first, or correct the store's URL"))
        if code in BROKEN_ON_THE_WAY or status in (408, 409, 425, 429) or status >= 500:
            return
        if status == 404:
            raise NotFound(key)
        if code == "RequestTimeTooSkewed":
            raise Refused(self._text(action, key, "this host's clock and the store's differ too much; set the clock"))
        if status in (401, 403):
            raise Refused(self._text(action, key, f"access denied ({status} {code}); {RIGHTS[action]} on bucket {self.bucket} is needed"))
        raise Refused(self._text(action, key, f"refused ({status} {code}); check region, endpoint and path style"))

    def _text(self, action: str, key: str, reason: str) -> str:
        return f"store {self.url} at {self.endpoint}: cannot {action} {key or 'its keys'}: {reason}"


class _ConditionFailed(Exception):
    """412: If-None-Match or If-Match did not hold."""


@functools.cache
def _descriptions() -> Any:
    from botocore.loaders import Loader

    class Descriptions(Loader):
        def list_available_services(self, type_name: str) -> list[str]:
            """Botocore asks whether s3 is among them, and opens 400 folders for the answer: 0.015 CPU-s of each process (measured)."""
            return [path.name for folder in map(Path, self.search_paths) if folder.is_dir() for path in folder.iterdir()]

    return Descriptions()


def _differs(answer: dict[str, Any], size: int, digest: str) -> bool:
    return bool(size != answer["ContentLength"] or answer["Metadata"].get(DIGEST, digest) != digest)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()


def _without_user(endpoint: str) -> str:
    parts = urlsplit(redacted(endpoint))
    return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}{parts.path}"
