"""An S3 prefix as the store: put-if-absent by If-None-Match, put-if-match by If-Match, SHA-256 with every upload.

Owns how objects are transferred:

- If a condition does not hold, StoreConflict is raised, unless the content that lies there is the one to be written: a repeated call whose
  answer was lost succeeds.
- A large file is uploaded in parts. Parts that have arrived are kept: the next try, of this call or of the next one for the same file,
  continues the same upload, unless the server has lost it or says that it cannot be completed any more (409).
- A download that was cut continues after the last byte that arrived, as long as the object is the same.

`s3_requests` owns requests, credentials and patience. Refuses to create buckets, to delete objects (except by `discard`), and to judge
content: a body that differs from the digest stored beside it is fetched again, since a proxy may have cut it. If it stays different it is
returned as it is; `orchestrator.ledger.store` says what is wrong with it.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import math
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from orchestrator.effects import Kind, perform
from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.litter import is_litter, is_litter_folder
from orchestrator.ports import Object, check_key, check_size
from orchestrator.redact import redacted
from orchestrator.stores.s3_requests import ConditionFailed, Requests, UploadLost, code_of

PATIENCE_S = 30.0
"""How long a request may fail before it is given up. Twice a lease's life: a driver that cannot write for so long has lost its lease."""
PART_BYTES = 16 << 20
"""Size of a part of a multipart upload, and the largest object that is uploaded in one request. S3 allows 5 MiB to 5 GiB."""
PARTS = 10_000
"""The most parts that S3 accepts."""
UPLOADERS = 4
"""How many parts of one file are uploaded at once. Arbitrary: four hide each other's latency without many buffers."""
BEGINNINGS = 3
"""How many multipart uploads of one file a call begins, if the server loses one after the other."""
CHUNK_BYTES = 1 << 18
"""Bytes that a download reads at once: at most these are lost if the connection is cut."""
STALE = timedelta(days=1)
"""Unfinished multipart uploads of this age belong to processes that were killed. They are billed, although no listing shows them."""
OURS = re.compile(
    r"[^/]+/stages/[^/@]+@[^/@]+/(?:checkpoints/step-\d{8,}-a\d+|attempts/\d+)/.+"
    r"|(?:datasets|weights)/[0-9a-f]{64}/.+"
    r"|datasets/[^/]+/clips/[0-9a-f]{64}[^/]*"
)
"""Keys, below our prefix, of files that osctl uploads. A prefix may have other people's uploads too."""
PAGE = 1000
"""Uploads in one answer. S3 does not give more."""
PROBE = ".osctl-probe"
DIGEST = "osctl-sha256"
"""Name of the metadata with an object's sha256. An ETag is not a sha256, and a multipart object's is not even an MD5 of its bytes."""
REREADS = 3
"""How often a body that differs from its digest is fetched before it counts as what the store really holds."""


@dataclass
class _Upload:
    """A multipart upload that was begun. Its parts that have arrived are kept for later calls."""

    target: dict[str, str]
    digest: str
    part_bytes: int
    parts: dict[int, dict[str, Any]] = field(default_factory=dict)
    """The parts that have arrived, by number, as the completion lists them."""


class _Coming:
    """A download of an object, in as many requests as it takes."""

    def __init__(self, bucket: str, name: str, target: BinaryIO | None, check: Callable[[int], None]):
        """`check` raises if the object is too large."""
        self._object = {"Bucket": bucket, "Key": name}
        self._target, self._check = target, check
        self._from_the_start()

    def _from_the_start(self) -> None:
        self.size, self._whole, self.etag, self._stored = 0, -1, "", ""
        self._hash = hashlib.sha256()
        if self._target is not None:
            self._target.seek(0)
            self._target.truncate()

    def ask(self, client: Any, _: int) -> None:
        """Request the bytes that have not arrived yet. Raises ConditionFailed if the object was replaced since the first request."""
        if self.size == self._whole:
            return
        rest = {"Range": f"bytes={self.size}-", "IfMatch": self.etag} if self.size and self.etag else {}
        answer = client.get_object(**self._object, **rest)
        with contextlib.closing(answer["Body"]) as body:
            if answer["ResponseMetadata"]["HTTPStatusCode"] != 206:  # the first request, or a server that does not support ranges
                self._from_the_start()
            self._whole, self.etag = self.size + answer["ContentLength"], answer.get("ETag", "")
            self._check(self._whole)
            self._stored = answer["Metadata"].get(DIGEST, "")
            for chunk in body.iter_chunks(CHUNK_BYTES):
                self._hash.update(chunk)
                if self._target is not None:
                    self._target.write(chunk)
                self.size += len(chunk)

    def __len__(self) -> int:
        return self.size

    @property
    def digest(self) -> str:
        return self._hash.hexdigest()

    @property
    def as_stored(self) -> bool:
        return self.size == self._whole and self._stored in ("", self.digest)


def _patience_s(env: Mapping[str, str]) -> float:
    """Patience from the environment, in seconds. Raises UsageError."""
    text = env.get("OSCTL_S3_PATIENCE_S") or str(PATIENCE_S)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds < math.inf:
        raise UsageError(f"OSCTL_S3_PATIENCE_S: expected a number of seconds, found {text[:40]!r}. Correct it, or unset it")
    return seconds


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

        Raises UsageError, Unreachable.
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
        self.arrived = 0
        patience_s = _patience_s(env) if patience_s is None else patience_s
        self._requests = Requests(self.url, self.bucket, env, patience_s, pause)
        self.endpoint = self._requests.endpoint
        self._unfinished: dict[str, _Upload] = {}
        self._counted: set[tuple[str, str, int]] = set()
        """Parts that `arrived` counts, by key, digest and number: a part that has to be sent again is not progress."""

    def read(self, key: str) -> Object:
        data = io.BytesIO()
        coming = self._receive(key, data, check=partial(check_size, key))
        return Object(data.getvalue(), coming.etag)

    def create(self, key: str, data: bytes) -> str:
        try:
            return self._requests.call("write", key, lambda client, _: self._put(client, "store.create", key, data, IfNoneMatch="*"))
        except ConditionFailed:
            there = self.read(key)
            if there.data != data:
                raise StoreConflict(f"{key}: is there already, with other content") from None
            return there.etag

    def replace(self, key: str, data: bytes, etag: str) -> str:
        tries = 0

        def put(client: Any, number: int) -> str:
            nonlocal tries
            tries = number
            return self._put(client, "store.replace", key, data, IfMatch=etag)

        try:
            return self._requests.call("write", key, put)
        except ConditionFailed:
            if tries:  # an earlier try may have succeeded although its answer was lost
                there = self.read(key)
                if there.data == data:
                    return there.etag
            raise StoreConflict(f"{key}: changed since it was read") from None

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        start = {"StartAfter": self.prefix + after} if after else {}
        for page in self._pages(prefix, **start):
            for item in page.get("Contents", ()):
                key = item["Key"].removeprefix(self.prefix)
                if not is_litter(key):  # our own PROBE is skipped, too
                    yield key

    def children(self, prefix: str) -> Sequence[str]:
        pages = self._pages(prefix, Delimiter="/")
        names = (item["Prefix"].removeprefix(self.prefix + prefix)[:-1] for page in pages for item in page.get("CommonPrefixes", ()))
        return sorted(name for name in names if not is_litter_folder(name))

    def upload(self, key: str, path: Path) -> None:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            if self._is_there(key, size, digest):
                return
            if size <= PART_BYTES:
                file.seek(0)
                self.create(key, file.read())
                self._count(key, digest, 1, size)
            else:
                self._upload_parts(key, file, size, digest)

    def download(self, key: str, path: Path, *, patience_s: float | None = None) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with partial.open("wb") as file:
                self._receive(key, file, patience_s)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def digest(self, key: str) -> tuple[int, str]:
        coming = self._receive(key, None)
        return coming.size, coming.digest

    def size(self, key: str) -> int:
        return int(self._head(key)["ContentLength"])

    def age(self, key: str) -> float:
        head = self._head(key)
        written: datetime = head["LastModified"]
        return max(0.0, (_answered_at(head) - written).total_seconds())

    def discard(self, key: str) -> None:
        def remove(client: Any, _: int) -> None:
            perform("store.discard", key, lambda: client.delete_object(Bucket=self.bucket, Key=self._name(key)))

        self._requests.call("remove", key, remove)

    def probe(self) -> None:
        """Try two writes that a store must refuse, on an object that stays there. Also abort multipart uploads that were left behind."""
        with contextlib.suppress(StoreConflict):  # an earlier launch wrote it
            self.create(PROBE, b"osctl tries here whether the store honours conditional writes\n")
        for name, condition in (("If-None-Match", {"IfNoneMatch": "*"}), ("If-Match", {"IfMatch": '"00000000000000000000000000000000"'})):

            def put(client: Any, _: int, condition: dict[str, str] = condition) -> str:
                return self._put(client, "store.replace", PROBE, uuid.uuid4().hex.encode(), **condition)

            with contextlib.suppress(ConditionFailed):
                self._requests.call("write", PROBE, put)
                raise Refused(
                    f"store {self.url} at {self.endpoint}: writes over an object in spite of {name}; "
                    "two drivers could both believe that they hold the lease. Use a store that honours conditional writes"
                )
        with contextlib.suppress(Refused):  # permission to list uploads is not needed for anything else
            self._abort_stale_uploads()

    def _name(self, key: str) -> str:
        return self.prefix + check_key(key)

    def _put(self, client: Any, kind: Kind, key: str, data: bytes, **condition: str) -> str:
        digest = hashlib.sha256(data)
        answer = perform(
            kind,
            key,
            lambda: client.put_object(
                Bucket=self.bucket,
                Key=self._name(key),
                Body=data,
                ChecksumSHA256=_base64(digest.digest()),
                Metadata={DIGEST: digest.hexdigest()},
                **condition,
            ),
        )
        return str(answer["ETag"])

    def _head(self, key: str) -> dict[str, Any]:
        place = {"Bucket": self.bucket, "Key": self._name(key)}

        def head(client: Any, _: int) -> dict[str, Any]:
            try:
                answer: dict[str, Any] = client.head_object(**place)
            except self._requests.answered as error:
                if code_of(error)[0] in ("400", "403"):  # an answer to HEAD has no body; the answer to GET says what is wrong
                    client.get_object(**place, Range="bytes=0-0")["Body"].close()
                raise
            return answer

        found: dict[str, Any] = self._requests.call("read", key, head)
        return found

    def _is_there(self, key: str, size: int, digest: str) -> bool:
        """Whether exactly this content lies under the key. Raises StoreConflict if other content does."""
        try:
            head = self._head(key)
        except NotFound:
            return False
        there = head["Metadata"].get(DIGEST) or self.digest(key)[1]  # another program may have put it there
        if head["ContentLength"] != size or there != digest:
            raise StoreConflict(f"{key}: is there already, with other content ({head['ContentLength']} bytes, ours {size})")
        return True

    def _receive(
        self,
        key: str,
        target: BinaryIO | None,
        patience_s: float | None = None,
        *,
        check: Callable[[int], None] = lambda size: None,
    ) -> _Coming:
        """Download an object to `target`. None means its bytes are only counted and hashed."""
        for last in (False,) * (REREADS - 1) + (True,):
            coming = _Coming(self.bucket, self._name(key), target, check)
            try:
                self._requests.call("read", key, coming.ask, progress=coming.__len__, patience_s=patience_s)
            except ConditionFailed:
                if last:
                    raise Unreachable(self._requests.text("read", key, "it is replaced faster than it can be read; run again")) from None
                continue
            if coming.as_stored:
                break
        return coming

    def _upload_parts(self, key: str, file: BinaryIO, size: int, digest: str) -> None:
        """Upload a file in parts. Readers see nothing under the key before the conditional completion."""
        for _ in range(BEGINNINGS):
            upload = self._begin_upload(key, size, digest)
            try:
                self._send_parts(key, file, size, upload)
                self._complete(key, upload)
            except Unreachable:
                raise  # parts that have arrived are kept for the next call
            except UploadLost:
                self._abort(key, upload)
                if self._is_there(key, size, digest):
                    return  # an earlier completion succeeded, but its answer was lost
                continue
            except ConditionFailed:
                self._abort(key, upload)
                if not self._is_there(key, size, digest):
                    text = "it has the object by one answer and not by the next"
                    raise Unreachable(self._requests.text("write", key, text)) from None
                return
            except BaseException:
                self._abort(key, upload)
                raise
            del self._unfinished[key]
            return
        raise Unreachable(self._requests.text("write", key, f"it lost {BEGINNINGS} multipart uploads of it before they were complete"))

    def _begin_upload(self, key: str, size: int, digest: str) -> _Upload:
        """A new upload, or the one that an earlier call did not finish."""
        if (begun := self._unfinished.get(key)) is not None:
            if begun.digest == digest:
                return begun
            self._abort(key, begun)
        place = {"Bucket": self.bucket, "Key": self._name(key)}

        def begin(client: Any, _: int) -> str:
            answer = perform(
                "store.begin_upload",
                key,
                lambda: client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256", Metadata={DIGEST: digest}),
            )
            return str(answer["UploadId"])

        target = place | {"UploadId": self._requests.call("write", key, begin)}
        self._unfinished[key] = _Upload(target, digest, max(PART_BYTES, math.ceil(size / PARTS)))
        return self._unfinished[key]

    def _send_parts(self, key: str, file: BinaryIO, size: int, upload: _Upload) -> None:
        def send(number: int) -> None:
            data = os.pread(file.fileno(), upload.part_bytes, (number - 1) * upload.part_bytes)
            checksum = _base64(hashlib.sha256(data).digest())

            def put(client: Any, _: int) -> str:
                answer = perform(
                    "store.upload_part",
                    f"{key} part {number}",
                    lambda: client.upload_part(**upload.target, PartNumber=number, Body=data, ChecksumSHA256=checksum),
                )
                return str(answer["ETag"])

            upload.parts[number] = {"PartNumber": number, "ETag": self._requests.call("write", key, put), "ChecksumSHA256": checksum}
            self._count(key, upload.digest, number, len(data))

        numbers = range(1, math.ceil(size / upload.part_bytes) + 1)
        with ThreadPoolExecutor(UPLOADERS) as pool:
            for _ in pool.map(send, [number for number in numbers if number not in upload.parts]):
                pass

    def _complete(self, key: str, upload: _Upload) -> None:
        parts = [upload.parts[number] for number in sorted(upload.parts)]

        def complete(client: Any, _: int) -> None:
            try:
                perform(
                    "store.complete_upload",
                    key,
                    lambda: client.complete_multipart_upload(**upload.target, MultipartUpload={"Parts": parts}, IfNoneMatch="*"),
                )
            except self._requests.answered as error:
                if code_of(error)[1] == 409:  # the upload has to begin again (S3 user guide, conditional writes)
                    raise UploadLost from error
                raise

        self._requests.call("write", key, complete)

    def _abort(self, key: str, upload: _Upload) -> None:
        self._unfinished.pop(key, None)
        self._drop(upload.target)

    def _drop(self, target: dict[str, str]) -> None:
        self._requests.try_once(
            lambda client: perform("store.abort_upload", target["Key"], lambda: client.abort_multipart_upload(**target))
        )

    def _count(self, key: str, digest: str, part: int, size: int) -> None:
        if (key, digest, part) not in self._counted:
            self._counted.add((key, digest, part))
            self.arrived += size

    def _abort_stale_uploads(self) -> None:
        for upload in list(self._uploads()):  # list all first: an aborted upload cannot mark where the next page begins
            name = upload["Key"]
            ours = name.startswith(self.prefix) and OURS.fullmatch(name.removeprefix(self.prefix))
            if ours and upload["Answered"] - upload["Initiated"] > STALE:
                self._drop({"Bucket": self.bucket, "Key": name, "UploadId": upload["UploadId"]})

    def _uploads(self) -> Iterator[dict[str, Any]]:
        """Unfinished multipart uploads below our prefix, whoever began them, each with the time of the answer by the store's clock."""
        markers: dict[str, str] = {}
        while True:

            def get(client: Any, _: int, markers: dict[str, str] = markers) -> dict[str, Any]:
                page: dict[str, Any] = client.list_multipart_uploads(Bucket=self.bucket, Prefix=self.prefix, MaxUploads=PAGE, **markers)
                return page

            try:
                page = self._requests.call("list", "uploads", get)
            except Refused:
                if markers.pop("UploadIdMarker", None) is None:
                    raise
                continue  # versitygw 1.8 refuses its own marker; without it the next page begins at the next key
            yield from ({**upload, "Answered": _answered_at(page)} for upload in page.get("Uploads", ()))
            if not page.get("IsTruncated") or not page.get("NextKeyMarker"):
                return
            markers = {"KeyMarker": page["NextKeyMarker"], "UploadIdMarker": page.get("NextUploadIdMarker", "")}

    def _pages(self, prefix: str, **options: str) -> Iterator[dict[str, Any]]:
        while True:

            def get(client: Any, _: int, options: dict[str, str] = options) -> dict[str, Any]:
                page: dict[str, Any] = client.list_objects_v2(Bucket=self.bucket, Prefix=self.prefix + prefix, **options)
                return page

            page = self._requests.call("list", prefix, get)
            yield page
            if not page.get("IsTruncated"):
                return
            options = {**options, "ContinuationToken": page["NextContinuationToken"]}


def _answered_at(answer: Mapping[str, Any]) -> datetime:
    """When the store answered, by its own clock. The times of its objects are compared only with this."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date", "")
    try:
        return parsedate_to_datetime(date).astimezone(UTC)
    except ValueError:
        return datetime.now(UTC)


def _base64(digest: bytes) -> str:
    return base64.b64encode(digest).decode()
