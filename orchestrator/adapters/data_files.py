"""The files of a data set, read where they lie: a folder or a CSV of clips, on a disk or at an address that fsspec knows.

Owns the way from a place to a manifest (`opensora.data.manifest`): every file is hashed, once. On a second look a file whose size and
dates are those of then is not read again (`<home>/seen.sqlite`), nor an object with the same ETag. What was touched within SETTLED_S of
being read is read again next time, since a file system may not tell two changes within its resolution apart. The memory of such looks may
be deleted at any time; where it cannot be kept, everything is read.

Refuses to judge clips: whether a file is a video is found out by whoever decodes it.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import sqlite3
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config import FolderSource, ManifestSource
from opensora.data.manifest import CAPTIONS, By, DataManifest, Row, parse_csv
from opensora.errors import ConfigError
from orchestrator.datasets import TooMuch
from orchestrator.errors import NotFound, Refused, Unreachable, UsageError
from orchestrator.redact import redacted

log = logging.getLogger(__name__)

READERS = 8
"""Files read at once."""
CHUNK = 1 << 20
SETTLED_S = 2.0
"""Coarsest date of a file system that is in use (FAT); others count nanoseconds, seconds on NFS of old."""
LISTED = 1000
"""Folders of an address that are listed at most; of more, each file is asked for by itself."""
REREADS = 3
"""Times a file is read that changes while it is."""

Progress = Callable[[int, int], None]
"""(bytes read, bytes to read)"""


@dataclass(frozen=True)
class Seen:
    """What tells one state of a file from another, without reading it."""

    size: int
    mark: str
    """Dates in nanoseconds, or the ETag; empty: nothing tells, and the file is read each time."""
    touched: float
    """Unix time of its last change; 0: of no account, since the mark is of the content."""


class DataFiles:
    def __init__(self, home: Path, env: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.time) -> None:
        """`home`: holds what is remembered of earlier looks."""
        self._memory, self._env, self._clock = home / "seen.sqlite", env, clock
        self.bytes_read = 0
        """Over all looks."""

    def manifest(
        self, source: FolderSource | ManifestSource, *, by: By = "content", progress: Progress | None = None, at_most: int | None = None
    ) -> DataManifest:
        """What lies at a place.

        Args:
            by: `name`: no file is opened or looked for.
            at_most: bytes; where more would have to be read, none are.

        Raises:
            NotFound: this machine sees no such folder or CSV.
            UsageError: its CSV is no list of clips.
            TooMuch: more than `at_most`.
            Refused, Unreachable: it is there, and cannot be read.
        """
        folder = isinstance(source, FolderSource)
        root = source.path if folder else source.path.rpartition("/")[0]
        rows = self.rows(source)
        if by == "name":
            return DataManifest(tuple(Row(path, text, None, None) for path, text in rows), by)
        places = [path if "://" in path or path.startswith("/") else f"{root}/{path}" for path, _ in rows]
        digests = self.digests(places, progress=progress, at_most=at_most)
        return DataManifest(tuple(Row(path, text, *found) for (path, text), found in zip(rows, digests, strict=True)))

    def rows(self, source: FolderSource | ManifestSource) -> list[tuple[str, str]]:
        """Path and caption of each, from the CSV alone. Raises as `manifest`."""
        folder = isinstance(source, FolderSource)
        place = f"{source.path}/{CAPTIONS}" if folder else source.path
        try:
            rows = parse_csv(self._text(place).splitlines(keepends=True), redacted(place), inside=folder)
        except ConfigError as error:
            raise UsageError(str(error)) from error
        if isinstance(source, ManifestSource) and source.clips and len(rows) != source.clips:
            raise UsageError(f"data.source.clips is {source.clips}, but {redacted(place)} has {len(rows)} rows. Make them equal")
        return rows

    def digests(
        self, places: Sequence[str], *, progress: Progress | None = None, at_most: int | None = None
    ) -> list[tuple[int | None, str | None]]:
        """Size and sha256 of each file; None and None of one that is not there or may not be read. Raises Unreachable, TooMuch."""
        states = self._look(places)
        known = self._remembered(places)
        found: dict[str, tuple[int | None, str | None]] = {}
        for place, state in states.items():
            if state is None:
                found[place] = (None, None)
            elif state.mark and (then := known.get(place)) and then[:2] == (state.size, state.mark):
                found[place] = (state.size, then[2])
        left = [place for place in states if place not in found]
        total = sum(state.size for place in left if (state := states[place]) is not None)
        if at_most is not None and total > at_most:
            raise TooMuch(len(left), total)
        done = 0
        kept: list[tuple[str, Seen, str]] = []
        with ThreadPoolExecutor(READERS) as pool:
            for place, (state, digest) in zip(left, pool.map(self._hash, left), strict=True):
                found[place] = (None, None) if state is None else (state.size, digest)
                if state is not None and digest is not None:
                    done += state.size
                    kept.append((place, state, digest))
                if progress is not None:
                    progress(done, total)
        self.bytes_read += done
        self._remember(kept)
        return [found[place] for place in places]

    # One file

    def _hash(self, place: str) -> tuple[Seen | None, str | None]:
        """Its state and its digest, of one moment. None: it cannot be read."""
        for _ in range(REREADS):
            began = self._clock()
            try:
                with _reached(place):
                    before = self._state(place)
                    digest = hashlib.sha256()
                    size = 0
                    with self._open(place) as file:
                        while chunk := file.read(CHUNK):
                            digest.update(chunk)
                            size += len(chunk)
                    after = self._state(place)
            except _NOT_THERE:
                return None, None
            if before == after and size == after.size:
                settled = after.touched == 0 or after.touched < began - SETTLED_S
                return (after if settled else Seen(after.size, "", 0)), digest.hexdigest()
        raise Refused(f"{redacted(place)}: changes while it is read, {REREADS} times. Wait until it is written, then run again")

    def _state(self, place: str) -> Seen:
        """Raises OSError."""
        if "://" not in place:
            found = Path(place).stat()
            return Seen(found.st_size, f"{found.st_mtime_ns}-{found.st_ctime_ns}", max(found.st_mtime, found.st_ctime))
        files, path = self._files(place)
        return _state_of(files.info(path))

    def _open(self, place: str) -> Any:
        if "://" not in place:
            return Path(place).open("rb")
        files, path = self._files(place)
        return files.open(path, "rb")

    def _text(self, place: str) -> str:
        shown = redacted(place)
        try:
            with _reached(place), self._open(place) as file:
                data: bytes = file.read()
        except PermissionError as error:
            raise Refused(f"{shown}: may not be read. Give this user the right to") from error
        except _NOT_THERE as error:
            raise NotFound(shown) from error
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise UsageError(f"{shown}: not UTF-8 at byte {error.start}. Save it as UTF-8") from None

    def _files(self, place: str) -> tuple[Any, str]:
        import fsspec

        options: dict[str, Any] = {}
        if place.startswith(("s3://", "s3a://")) and (endpoint := self._env.get("OSCTL_S3_ENDPOINT")):
            options = {"endpoint_url": endpoint}
        try:
            files, path = fsspec.core.url_to_fs(place, **options)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{redacted(place)}: {error}. Give a path, or an address that fsspec knows") from error
        return files, str(path)

    # Many files

    def _look(self, places: Sequence[str]) -> dict[str, Seen | None]:
        """The state of each; None: no such file. Objects are listed by folder where that is less."""
        found: dict[str, Seen | None] = {}
        remote = [place for place in places if "://" in place]
        parents = dict.fromkeys(place.rpartition("/")[0] for place in remote)
        if len(parents) <= min(LISTED, len(remote) // 2):
            listed: dict[str, Seen] = {}
            for parent in parents:
                with contextlib.suppress(FileNotFoundError), _reached(parent):
                    files, path = self._files(parent)
                    listed |= {f"{parent}/{info['name'].rpartition('/')[2]}": _state_of(info) for info in files.ls(path, detail=True)}
            found |= {place: listed.get(place) for place in remote}
            places = [place for place in places if place not in found]

        def ask(place: str) -> Seen | None:
            try:
                with _reached(place):
                    return self._state(place)
            except _NOT_THERE:
                return None

        with ThreadPoolExecutor(READERS) as pool:
            return found | dict(zip(places, pool.map(ask, places), strict=True))

    # What is remembered

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection | None]:
        try:
            self._memory.parent.mkdir(parents=True, exist_ok=True)
            connection = sqlite3.connect(self._memory, timeout=30)
            connection.execute("create table if not exists seen (place text primary key, size integer, mark text, sha256 text)")
        except (sqlite3.Error, OSError) as error:
            log.warning("%s: cannot be used (%s); every file is read", self._memory, error)
            yield None
            return
        with contextlib.closing(connection):
            yield connection

    def _remembered(self, places: Sequence[str]) -> dict[str, tuple[int, str, str]]:
        found: dict[str, tuple[int, str, str]] = {}
        if not self._memory.exists():
            return found
        with self._database() as database:
            if database is None:
                return found
            try:
                for start in range(0, len(places), 500):
                    some = list(places[start : start + 500])
                    marks = ",".join("?" * len(some))
                    for place, size, mark, digest in database.execute(
                        f"select place, size, mark, sha256 from seen where place in ({marks})", some
                    ):
                        found[place] = (size, mark, digest)
            except sqlite3.Error as error:
                log.warning("%s: cannot be read (%s); every file is read", self._memory, error)
        return found

    def _remember(self, kept: Sequence[tuple[str, Seen, str]]) -> None:
        lines = [(place, state.size, state.mark, digest) for place, state, digest in kept if state.mark]
        if not lines:
            return
        with self._database() as database:
            if database is None:
                return
            try:
                with database:
                    database.executemany("insert or replace into seen values (?, ?, ?, ?)", lines)
            except sqlite3.Error as error:
                log.warning("%s: cannot be written (%s); the next look reads every file again", self._memory, error)


_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


@contextlib.contextmanager
def _reached(place: str) -> Iterator[None]:
    """Errors of a place that does not answer, as one line. What the place itself says (`_NOT_THERE`) goes through."""
    broken: tuple[type[Exception], ...] = (OSError,)
    if place.startswith(("s3://", "s3a://")):
        from botocore.exceptions import BotoCoreError

        broken = (OSError, BotoCoreError)
    try:
        yield
    except _NOT_THERE:
        raise
    except broken as error:
        said = redacted(" ".join(str(getattr(error, "strerror", None) or error).split())[:200])
        raise Unreachable(f"{redacted(place)}: does not answer ({said}); nothing was done") from error


def _state_of(info: Mapping[str, Any]) -> Seen:
    """Of what fsspec tells: an ETag tells one content from another, a date only as well as it counts."""
    etag = info.get("ETag") or info.get("etag")
    if etag:
        return Seen(int(info["size"]), str(etag), 0)
    date = info.get("mtime") or info.get("LastModified") or info.get("last_modified")
    if date is None:
        return Seen(int(info["size"] or 0), "", 0)
    touched = date.timestamp() if hasattr(date, "timestamp") else float(date)
    return Seen(int(info["size"] or 0), f"{touched:.9f}", touched)
