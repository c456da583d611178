"""A folder as an object store, with the same guarantees as S3: put-if-absent, put-if-match, and no reader ever sees half an object.

Owns the layout below the root and the two races that `link(2)` decides:

- `create` writes a temporary file, syncs it and links it to its key; the file system lets one writer win.
- `replace` links the next generation, `key@N+1`, and never touches the one before. Readers take the highest generation.

Old generations are removed, but the last `KEPT` stay: otherwise a writer that was paused between reading generation N and linking
N+1 could find N+1 free again. A writer that was paused for more than `KEPT` generations notices it after its link, and fails.

Refuses keys that leave the root, through `..` or a symbolic link. Not for NFS without a working `link`, which `probe` detects.
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

from orchestrator.effects import perform
from orchestrator.environment import at_home
from orchestrator.errors import NotFound, Refused, StoreConflict, Unreachable, UsageError
from orchestrator.litter import is_litter, is_litter_folder
from orchestrator.ports import Object, check_key, check_size

GENERATION = re.compile(r"^(?P<name>.+)@(?P<number>\d+)$")
TEMPORARY = ".tmp"
"""Folder below the root in which files are written before they are linked to their keys."""
OURS = re.compile(r"(?:\d+|probe)-[0-9a-f]{32}")
"""Names of the files that osctl writes there. A folder may have a `.tmp` that is not osctl's."""
KEPT = 16
"""How many generations of an object are kept behind the newest one. A lease is renewed every 5 s, so a writer may be paused for 80 s."""
STALE_S = 24 * 3600.0
"""Temporary files of this age belong to writers that were killed."""


class FolderStore:
    def __init__(self, root: Path):
        try:
            self.root = at_home(root).resolve()
        except (RuntimeError, OSError):  # links that lead to each other
            raise UsageError(f"store {root}: is no folder: its links lead in a circle, or its name leads nowhere. Name another") from None
        with contextlib.suppress(OSError):  # if permission is missing, the first read says so
            if self.root.is_file():
                raise UsageError(f"store {self.root} is a file, and a store has to be a folder. Name another")
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
            path = self._path(key)
            if perform("store.create", key, lambda: self._link(temporary, path)):
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
            next_path = _generation_path(path, generation + 1)
            if not perform("store.replace", key, lambda: self._link(temporary, next_path)):
                raise StoreConflict(f"{key}: changed since it was read")
            newest = self._newest(path)
            if newest is None or generation + 1 <= newest - KEPT:
                # Generation N+1 had been written and removed before we linked it: no reader ever sees ours.
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
            folders = (entry.name for entry in _entries(folder) if entry.is_dir(follow_symlinks=False))
            names = sorted(name for name in folders if not is_litter_folder(name))
            return [name for name in names if self._holds_objects(folder / name)]

    def upload(self, key: str, path: Path) -> None:
        def write(file: BinaryIO) -> None:
            shutil.copyfileobj(source, file, 1 << 20)

        with path.open("rb") as source, self._errors("write", key):
            with self._temporary(write) as temporary:
                target = self._path(key)
                if perform("store.create", key, lambda: self._link(temporary, target)):
                    self.arrived += source.tell()
                    return
            with self._open_newest(key) as (there, _):
                if not _same_content(there, path):
                    raise StoreConflict(f"{key}: is there already, with other content")

    def download(self, key: str, path: Path, *, patience_s: float | None = None) -> None:
        """Copy an object to a file. `patience_s` is not used: a disk that fails is not tried again."""
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

    def age(self, key: str) -> float:
        with self._errors("read", key), self._open_newest(key) as (file, _):
            return max(0.0, self._now() - os.fstat(file.fileno()).st_mtime)

    def _now(self) -> float:
        """The time by the file system's clock, which on a shared one is not this host's; by this host's clock if nothing can be written."""
        with contextlib.suppress(OSError), self._temporary(lambda file: None) as path:
            return path.stat().st_mtime
        return time.time()

    def discard(self, key: str) -> None:
        path = self._path(key)
        with self._errors("remove", key):
            perform("store.discard", key, lambda: _remove(path))

    def probe(self) -> None:
        with self._errors("write", "."):
            with self._temporary(lambda file: None) as one, self._temporary(lambda file: None) as two:
                target = self.root / TEMPORARY / f"probe-{uuid.uuid4().hex}"
                try:
                    if not self._link(one, target) or self._link(two, target):
                        raise Refused(f"store {self.url}: its file system lets two writers `link` to one name; use another folder")
                finally:
                    target.unlink(missing_ok=True)
            now = self._now()
            for entry in _entries(self.root / TEMPORARY):
                ours = OURS.fullmatch(entry.name) and entry.is_file(follow_symlinks=False)
                if ours and now - entry.stat(follow_symlinks=False).st_mtime > STALE_S:
                    Path(entry.path).unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        """The path of a key. Raises Refused if the key would leave the root, or is one of the store's own names."""
        name = check_key(key).rpartition("/")[2]
        if GENERATION.match(name) or key.split("/")[0] == TEMPORARY:
            raise Refused(f"key {key!r}: names of the form name@number, and {TEMPORARY}, are the store's own")
        path = self.root / key
        # This runs for every piece of a long history, so the whole path is resolved only below a link.
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
                continue  # another writer removed it, so there is a newer one
            with os.fdopen(handle, "rb") as file:
                yield file, generation
            return

    def _newest(self, path: Path) -> int | None:
        """Number of the highest generation. Generation 1 is never removed, so that an object that was never replaced needs no listing."""
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
        """Link a file to its name. Returns whether this writer was first."""
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
        """Keys below a folder that begin with `prefix`. `above` is the folder's own part of a key. Other folders are skipped."""
        for entry in _entries(folder):
            key = above + entry.name
            if not key.startswith(prefix) and not prefix.startswith(f"{key}/"):
                continue
            if entry.is_file(follow_symlinks=False):
                if is_litter(entry.name):
                    continue
                if "@" not in entry.name or not GENERATION.match(entry.name):
                    yield key
            elif entry.is_dir(follow_symlinks=False) and not is_litter_folder(entry.name):
                yield from self._walk(Path(entry.path), f"{key}/", prefix)

    def _holds_objects(self, folder: Path) -> bool:
        """Whether a folder holds any object. Stops at the first one, since a folder may hold a journal of days.

        Also true for a folder that this user may not read: to list its keys then raises the reason.
        """
        folders = []
        try:
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.is_file(follow_symlinks=False) and not GENERATION.match(entry.name) and not is_litter(entry.name):
                        return True
                    if entry.is_dir(follow_symlinks=False) and not is_litter_folder(entry.name):
                        folders.append(Path(entry.path))
        except PermissionError:
            return True
        except FileNotFoundError:
            return False
        return any(self._holds_objects(each) for each in folders)

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


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # other objects lie in it
        path.parent.rmdir()


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
