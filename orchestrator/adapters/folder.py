"""A folder as an object store, with the same promises as S3: put-if-absent, put-if-match, no half object is ever seen.

Owns the layout below the root and the two races that `link(2)` decides:

- `create` writes a temporary file, syncs it and links it to its key; the file system lets one writer win.
- `replace` links the next generation, `key@N+1`, and never touches the one before. Readers take the highest generation.

Old generations are cleared away, but the last `KEPT` stay: a writer that stood still between reading generation N and linking
N+1 could otherwise find N+1 free again. One that slept through more than `KEPT` generations sees it after its link and loses.

Refuses keys that leave the root, through `..` or a symbolic link. Not for NFS without a working `link`: `probe` finds out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO

from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable
from orchestrator.ports import Object, check_key, check_size

GENERATION = re.compile(r"^(?P<name>.+)@(?P<number>\d+)$")
TEMPORARY = ".tmp"
"""Folder below the root in which files are written before they are linked to their keys."""
OURS = re.compile(r"(?:\d+|probe)-[0-9a-f]{32}")
"""Names of what we write there. A folder may have a `.tmp` that is somebody else's."""
KEPT = 16
"""Generations of an object that stay behind the newest one. A lease is renewed every 5 s: a writer may stand still for 80 s."""
STALE_S = 24 * 3600.0
"""Temporary files of this age belong to writers that were killed."""


class FolderStore:
    def __init__(self, root: Path):
        self.root = Path(root).expanduser().resolve()
        self.url = str(self.root)
        self.arrived = 0

    def read(self, key: str) -> Object:
        with self._errors("read", key), self._open_newest(key) as (file, generation):
            check_size(key, os.fstat(file.fileno()).st_size)
            data = file.read()
        return Object(data, _etag(generation, data))

    def create(self, key: str, data: bytes) -> str:
        def write(file: BinaryIO) -> None:
            file.write(data)

        with self._errors("write", key), self._temporary(write) as temporary:
            if self._link(temporary, self._path(key)):
                return _etag(0, data)
        there = self.read(key)
        if there.data != data:
            raise StoreConflict(f"{key}: is there already, with other content")
        return there.etag

    def replace(self, key: str, data: bytes, etag: str) -> str:
        def write(file: BinaryIO) -> None:
            file.write(data)

        there = self.read(key)
        if there.etag != etag:
            raise StoreConflict(f"{key}: changed since it was read")
        generation = int(etag.partition("-")[0])
        path = self._path(key)
        with self._errors("write", key), self._temporary(write) as temporary:
            if not self._link(temporary, _generation_path(path, generation + 1)):
                raise StoreConflict(f"{key}: changed since it was read")
            newest = self._newest(path)
            if newest is None or generation + 1 <= newest - KEPT:
                # Generation N+1 had come and gone before we linked it: no reader ever looks at ours.
                raise StoreConflict(f"{key}: changed {(newest or 0) - generation} times since it was read")
            self._clear(path, newest)
        return _etag(generation + 1, data)

    def list(self, prefix: str, after: str = "") -> Iterator[str]:
        folder = self._folder(prefix)
        with self._errors("list", prefix):
            keys = sorted(key for key in self._walk(folder, prefix[: prefix.rfind("/") + 1], prefix) if key > after)
        return iter(keys)

    def children(self, prefix: str) -> Sequence[str]:
        folder = self._folder(prefix)
        with self._errors("list", prefix):
            names = sorted(entry.name for entry in _entries(folder) if entry.is_dir(follow_symlinks=False) and not self._hidden(entry))
            return [name for name in names if self._holds_objects(folder / name)]

    def upload(self, key: str, path: Path) -> None:
        def write(file: BinaryIO) -> None:
            shutil.copyfileobj(source, file, 1 << 20)

        with path.open("rb") as source, self._errors("write", key):
            with self._temporary(write) as temporary:
                if self._link(temporary, self._path(key)):
                    self.arrived += source.tell()
                    return
            with self._open_newest(key) as (there, _):
                if not _same_content(there, path):
                    raise StoreConflict(f"{key}: is there already, with other content")

    def download(self, key: str, path: Path, *, patience_s: float | None = None) -> None:
        """A disk that does not answer is not asked again: `patience_s` is for other stores."""
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.{uuid.uuid4().hex}.partial")
        try:
            with self._errors("read", key), self._open_newest(key) as (source, _), partial.open("xb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def digest(self, key: str) -> tuple[int, str]:
        with self._errors("read", key), self._open_newest(key) as (file, _):
            return os.fstat(file.fileno()).st_size, hashlib.file_digest(file, "sha256").hexdigest()

    def size(self, key: str) -> int:
        with self._errors("read", key), self._open_newest(key) as (file, _):
            return os.fstat(file.fileno()).st_size

    def discard(self, key: str) -> None:
        path = self._path(key)
        with self._errors("remove", key):
            path.unlink(missing_ok=True)
            with contextlib.suppress(OSError):  # others lie there still
                path.parent.rmdir()

    def probe(self) -> None:
        with self._errors("write", "."):
            with self._temporary(lambda file: None) as one, self._temporary(lambda file: None) as two:
                target = self.root / TEMPORARY / f"probe-{uuid.uuid4().hex}"
                try:
                    if not self._link(one, target) or self._link(two, target):
                        raise Refused(f"store {self.url}: its file system does not hold `link` to one winner; use another folder")
                finally:
                    target.unlink(missing_ok=True)
            for entry in _entries(self.root / TEMPORARY):
                ours = OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                if ours and time.time() - entry.stat(follow_symlinks=False).st_mtime > STALE_S:
                    Path(entry.path).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        """Raises Refused where the key would leave the root or meet our own names."""
        name = check_key(key).rpartition("/")[2]
        if GENERATION.match(name) or key.split("/")[0] == TEMPORARY:
            raise Refused(f"key {key!r}: names of the form name@number, and {TEMPORARY}, are the store's own")
        path = self.root / key
        # Asked of every piece of a long history: only below a link is it worth to resolve all of a path.
        folders = path.parents[: key.count("/")]
        leads_out = any(folder.is_symlink() for folder in folders) and not path.parent.resolve().is_relative_to(self.root)
        if path.is_symlink() or leads_out:
            raise Refused(f"key {key!r}: a symbolic link leads out of the store {self.url}")
        return path

    def _folder(self, prefix: str) -> Path:
        folder = prefix.rpartition("/")[0]
        return self._path(f"{folder}/-").parent if folder else self.root

    @contextlib.contextmanager
    def _open_newest(self, key: str) -> Iterator[tuple[BufferedReader, int]]:
        path = self._path(key)
        while True:
            generation = self._newest(path)
            if generation is None:
                raise NotFound(key)
            try:
                handle = os.open(_generation_path(path, generation), os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # cleared away by a writer that is ahead of us: there is a newer one
            with os.fdopen(handle, "rb") as file:
                yield file, generation
            return

    def _newest(self, path: Path) -> int | None:
        """Number of the highest generation. Generation 1 is never cleared away, so that an object never replaced needs no listing."""
        if not _generation_path(path, 1).exists():
            return 0 if path.is_file() else None
        return max(self._generations(path))

    def _generations(self, path: Path) -> Iterator[int]:
        yield 0
        for entry in _entries(path.parent):
            match = GENERATION.match(entry.name)
            if match and match["name"] == path.name:
                yield int(match["number"])

    def _clear(self, path: Path, newest: int) -> None:
        for generation in self._generations(path):
            if 1 < generation <= newest - KEPT:
                _generation_path(path, generation).unlink(missing_ok=True)

    @contextlib.contextmanager
    def _temporary(self, write: Callable[[BinaryIO], None]) -> Iterator[Path]:
        folder = self.root / TEMPORARY
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{os.getpid()}-{uuid.uuid4().hex}"
        try:
            with path.open("xb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            yield path
        finally:
            path.unlink(missing_ok=True)

    def _link(self, temporary: Path, path: Path) -> bool:
        """Whether we were first."""
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(temporary, path)
        except FileExistsError:
            return False
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        return True

    def _walk(self, folder: Path, above: str, prefix: str) -> Iterator[str]:
        """Keys below a folder that begin with `prefix`; `above`: the folder's own part of a key. Goes into no folder that has none."""
        for entry in _entries(folder):
            key = above + entry.name
            if not key.startswith(prefix) and not prefix.startswith(f"{key}/"):
                continue
            if entry.is_file(follow_symlinks=False):
                if "@" not in entry.name or not GENERATION.match(entry.name):
                    yield key
            elif entry.is_dir(follow_symlinks=False) and not self._hidden(entry):
                yield from self._walk(Path(entry.path), f"{key}/", prefix)

    def _holds_objects(self, folder: Path) -> bool:
        """Looks no further than the first one: a folder may hold a journal of days.

        A folder that may not be looked into is named too: whoever asks for its keys is told why there are none.
        """
        folders = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) and not GENERATION.match(entry.name):
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(Path(entry.path))
        except PermissionError:
            return True
        except FileNotFoundError:
            return False
        return any(self._holds_objects(each) for each in folders)

    def _hidden(self, entry: os.DirEntry[str]) -> bool:
        return entry.name == TEMPORARY and Path(entry.path).parent == self.root

    @contextlib.contextmanager
    def _errors(self, action: str, key: str) -> Iterator[None]:
        try:
            yield
        except (IsADirectoryError, NotADirectoryError) as error:
            if action == "read":
                raise NotFound(key) from error
            raise Refused(f"store {self.url}: {key} lies below an object; a folder cannot hold both") from error
        except OSError as error:
            reason = f"store {self.url}: cannot {action} {key}: {error.strerror or error}"
            if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise Refused(f"{reason}; give this user the right to, or choose another store") from error
            raise Unreachable(f"{reason}; nothing was written") from error


def _etag(generation: int, data: bytes) -> str:
    return f"{generation}-{hashlib.sha256(data).hexdigest()}"


def _generation_path(path: Path, generation: int) -> Path:
    return path.with_name(f"{path.name}@{generation}") if generation else path


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except (FileNotFoundError, NotADirectoryError):
        return []


def _same_content(there: BufferedReader, path: Path) -> bool:
    if os.fstat(there.fileno()).st_size != path.stat().st_size:
        return False
    with path.open("rb") as ours:
        return hashlib.file_digest(there, "sha256").digest() == hashlib.file_digest(ours, "sha256").digest()
