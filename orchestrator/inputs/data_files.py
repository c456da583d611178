"""The files of a data set, read where they lie: a folder or a table of clips, on a disk or at an address that fsspec knows.

Owns the way from a place to a manifest (`opensora.dataset.manifest`): every file is hashed, once. On a second scan a file whose size, dates
and inode are those of then is not read again (`<home>/seen.sqlite`), nor an object with the same ETag. What was touched within SETTLED_S of
being read is read again next time, since a file system may not tell two changes within its resolution apart. The memory of such looks may
be deleted at any time; where it cannot be kept, everything is read.

Refuses to judge clips: whether a file is a video is found out by whoever decodes it.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import os
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.config import FolderSource, ManifestSource
from opensora.dataset.layouts import Captioned, NotThere, read_file, read_folder
from opensora.dataset.manifest import By, DataManifest, Row
from opensora.dataset.places import Finder, Folder
from opensora.dataset.webdataset import Member, Part
from opensora.errors import ConfigError
from opensora.printable import several
from orchestrator.errors import NotFound, OsctlError, Refused, Unreachable, UsageError
from orchestrator.inputs.datasets import TooMuch
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
    """Dates in nanoseconds and the inode, or the ETag; empty: nothing tells, and the file is read each time."""
    touched: float
    """Unix time of its last change; 0: of no account, since the mark is of the content."""


class DataFiles:
    def __init__(self, home: Path, env: Mapping[str, str] = os.environ, clock: Callable[[], float] = time.time) -> None:
        """`home`: holds what is remembered of earlier scans."""
        self._memory, self._env, self._clock = home / "seen.sqlite", env, clock
        self._finder = Finder()
        self.bytes_read = 0
        """Over all scans."""

    def manifest(
        self, source: FolderSource | ManifestSource, *, by: By = "content", progress: Progress | None = None, at_most: int | None = None
    ) -> DataManifest:
        """The manifest of what lies at a place. See `scan`."""
        return self.scan(source, by=by, progress=progress, at_most=at_most)[0]

    def scan(
        self, source: FolderSource | ManifestSource, *, by: By = "content", progress: Progress | None = None, at_most: int | None = None
    ) -> tuple[DataManifest, Captioned]:
        """The manifest of what lies at a place, and its captions with the layout that they were read as.

        Args:
            by: `name`: no clip is opened.
            at_most: bytes; where more would have to be read, none are.

        Raises:
            NotFound: this machine sees no such folder or table.
            UsageError: it holds no captioned clips that can be read.
            TooMuch: more than `at_most`.
            Refused, Unreachable: it is there, and cannot be read.
        """
        read = self.captioned(source)
        rows = read.rows
        if by == "name":
            return DataManifest(tuple(Row(row.path, row.text, None, None) for row in rows), by), read
        places, listed = self._places(source, read)
        digests = self.digests(places, listed=listed, progress=progress, at_most=at_most)
        return DataManifest(tuple(Row(row.path, row.text, *found) for row, found in zip(rows, digests, strict=True))), read

    def captioned(self, source: FolderSource | ManifestSource) -> Captioned:
        """The captions of a place, read as a trainer reads them (`opensora.dataset.layouts`); no clip is opened. Raises as `scan`."""
        folder = isinstance(source, FolderSource)
        shown = redacted(source.path)
        files, place = self._files(source.path)
        root, _, name = (place, "", "") if folder else place.rpartition("/")
        try:
            with _reached(source.path):
                read = read_folder(Folder(files, root), shown) if folder else read_file(Folder(files, root), name, shown)
        except NotThere as error:
            raise NotFound(shown) from error
        except PermissionError as error:
            raise Refused(f"{shown}: may not be read ({error.strerror or error}). Give this user the right to") from error
        except _NOT_THERE as error:
            if error.errno in _NO_NAME:
                raise UsageError(f"{shown[:80]}{'…' * (len(shown) > 80)}: {error.strerror}. Name another place") from error
            raise NotFound(shown) from error
        except ConfigError as error:
            raise UsageError(str(error)) from error
        if isinstance(source, ManifestSource) and source.clips and len(read.rows) != source.clips:
            raise UsageError(f"data.source.clips is {source.clips}, but {shown} has {several(len(read.rows), 'row')}. Make them equal")
        return read

    def places(self, source: FolderSource | ManifestSource, read: Captioned) -> list[str]:
        """Where the file of each row lies. Raises Unreachable."""
        return self._places(source, read)[0]

    def _places(self, source: FolderSource | ManifestSource, read: Captioned) -> tuple[list[str], dict[str, Seen | None]]:
        """Where the file of each row lies, and the states of those that a listing has. Raises Unreachable."""
        if isinstance(source, FolderSource):
            files, root = self._files(source.path)
            folder = Folder(files, root)
            names = [read.files.get(row.path, row.path) for row in read.rows]
            places = [folder.place(name) if folder.is_local else files.unstrip_protocol(folder.place(name)) for name in names]
            if read.members:
                return [_inside(place, read.members.get(row.path)) for place, row in zip(places, read.rows, strict=True)], {}
            if folder.is_local or read.listing is None:
                return places, {}
            entries = [read.listing.get(name) for name in names]
            return places, {place: None if entry is None else _state_of(entry.info) for place, entry in zip(places, entries, strict=True)}
        root = source.path.rpartition("/")[0]
        places = []
        for row in read.rows:
            name = read.files.get(row.path, row.path)
            written = name if "://" in name or name.startswith("/") else f"{root}/{name}"
            files, place = self._files(written)
            with _reached(written):
                found = self._finder.located(files, place)
            located = written if found == place else found if "://" not in written else files.unstrip_protocol(found)
            places.append(_inside(located, read.members.get(row.path)))
        return places, {}

    def digests(
        self,
        places: Sequence[str],
        *,
        listed: Mapping[str, Seen | None] | None = None,
        progress: Progress | None = None,
        at_most: int | None = None,
    ) -> list[tuple[int | None, str | None]]:
        """Size and sha256 of each file; None and None of one that is not there or may not be read. Raises Unreachable, TooMuch.

        Args:
            listed: what is known of files before anyone is asked.
        """
        states = listed or self._states(places)
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
        raise Refused(f"{_shown(place)}: changes while it is read, {REREADS} times. Wait until it is written, then run again")

    def _state(self, place: str) -> Seen:
        """Raises OSError."""
        place, part = _parted(place)
        if part is not None:
            whole = self._state(place)
            return Seen(part[1], whole.mark, whole.touched)
        if "://" not in place:
            found = Path(place).stat()
            if not stat.S_ISREG(found.st_mode):
                raise IsADirectoryError(place)  # or a pipe, which never ends
            return Seen(found.st_size, f"{found.st_mtime_ns}-{found.st_ctime_ns}-{found.st_ino}", max(found.st_mtime, found.st_ctime))
        files, path = self._files(place)
        return _state_of(files.info(path))

    @contextlib.contextmanager
    def _open(self, place: str) -> Iterator[Any]:
        place, part = _parted(place)
        with self._opened(place) as file:
            yield file if part is None else Part(file, *part)

    def _opened(self, place: str) -> Any:
        if "://" not in place:
            return Path(place).open("rb")
        files, path = self._files(place)
        return files.open(path, "rb")

    def _files(self, place: str) -> tuple[Any, str]:
        import fsspec

        options: dict[str, Any] = {}
        if place.startswith(("s3://", "s3a://")):
            options = _reaching(self._env)
        try:
            files, path = fsspec.core.url_to_fs(place, **options)
        except (ValueError, ImportError) as error:
            raise UsageError(f"{_shown(place)}: {error}. Give a path, or an address that fsspec knows") from error
        return files, str(path)

    # Many files

    def _states(self, places: Sequence[str]) -> dict[str, Seen | None]:
        """The state of each; None: no such file. Objects are listed by folder where that is less, and each tar is asked for once."""
        found: dict[str, Seen | None] = {}
        if parts := {place: _parted(place) for place in places if _PART in place}:
            tars = self._states(list(dict.fromkeys(tar for tar, _ in parts.values())))
            for place, (tar, part) in parts.items():
                state = tars[tar]
                found[place] = Seen(part[1], state.mark, state.touched) if state is not None and part is not None else None
            places = [place for place in places if place not in found]
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
        places = [place for place in places if _is_text(place)]
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
        lines = [(place, state.size, state.mark, digest) for place, state, digest in kept if state.mark and _is_text(place)]
        if not lines:
            return
        with self._database() as database:
            if database is None:
                return
            try:
                with database:
                    database.executemany("insert or replace into seen values (?, ?, ?, ?)", lines)
            except sqlite3.Error as error:
                log.warning("%s: cannot be written (%s); the next scan reads every file again", self._memory, error)


def _reaching(env: Mapping[str, str]) -> dict[str, Any]:
    """What s3fs is told of the object store that the variables name (`orchestrator.modules.reading_clips` tells the trainer the same)."""
    options: dict[str, Any] = {}
    if endpoint := env.get("OSCTL_S3_ENDPOINT"):
        options["endpoint_url"] = endpoint
    if authority := env.get("OSCTL_S3_CA"):
        options["client_kwargs"] = {"verify": authority}
    style = {"1": "path", "0": "virtual"}.get(env.get("OSCTL_S3_PATH_STYLE", ""))
    if style is not None:
        options["config_kwargs"] = {"s3": {"addressing_style": style}}
    return options


_PART = "\0"
"""Behind the place of a tar, where a member of it lies. No name of a file holds it."""


def _inside(place: str, member: Member | None) -> str:
    """The place of a clip that may be a member of a tar which lies there."""
    return place if member is None else f"{place}{_PART}{member.offset}{_PART}{member.size}"


def _parted(place: str) -> tuple[str, tuple[int, int] | None]:
    """The place of a file, and offset and size of the part of it that is meant."""
    file, _, part = place.partition(_PART)
    if not part:
        return file, None
    offset, _, size = part.partition(_PART)
    return file, (int(offset), int(size))


def _shown(place: str) -> str:
    """For messages."""
    return redacted(_parted(place)[0])


def _is_text(place: str) -> bool:
    """Of names, Linux keeps any bytes; a database keeps text alone, and so a file of another name is read at each scan."""
    return not any("\ud800" <= letter <= "\udfff" for letter in place)


_NO_NAME = (errno.ENAMETOOLONG, errno.ELOOP, errno.EINVAL, errno.EILSEQ)
"""What a file system says of a name under which no file can lie."""
_NOT_THERE = (FileNotFoundError, IsADirectoryError, NotADirectoryError, PermissionError)


@contextlib.contextmanager
def _reached(place: str) -> Iterator[None]:
    """Errors of a place that does not answer, as one line. What the place itself says (`_NOT_THERE`) goes through."""
    # the clients of file systems have kinds of their own (botocore's, aiohttp's)
    broken: tuple[type[Exception], ...] = (Exception,) if "://" in place else ()
    try:
        yield
    except (*_NOT_THERE, ConfigError, OsctlError):
        raise
    except OSError as error:
        if error.errno in _NO_NAME:
            raise FileNotFoundError(error.errno, error.strerror, place) from error
        raise Unreachable(_silent(place, error)) from error
    except broken as error:
        raise Unreachable(_silent(place, error)) from error


def _silent(place: str, error: Exception) -> str:
    said = redacted(" ".join(str(getattr(error, "strerror", None) or error or type(error).__name__).split())[:200])
    return f"{_shown(place)}: does not answer ({said}); nothing was done"


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
