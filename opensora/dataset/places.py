"""Files where they lie: a folder on a disk, or at an address of a file system of fsspec (which whoever calls opens).

Owns the listing of a folder, reading small files of it, and finding a file whose name is written otherwise than a table has it: in another
normal form (macOS writes é as two code points, Linux as one), with spaces around it, or with the `\\` of Windows. A file of exactly the
written name comes first, so that two files whose names differ in such things alone are told apart. Refuses to judge what files are for.
"""

from __future__ import annotations

import os
import posixpath
import unicodedata
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from opensora.dataset.left_out import LeftOut
from opensora.errors import ConfigError

WRONG_KEYS = {
    "SignatureDoesNotMatch": "the signature does not match: the secret key is not the one of this access key, or this host's clock is "
    "wrong, or a proxy changes the request's path. Correct that one",
    "InvalidAccessKeyId": "the store does not know this access key. Correct AWS_ACCESS_KEY_ID, or AWS_PROFILE",
    "ExpiredToken": "the credentials have ended. Renew them",
}
"""What an object store means that answers with such a code: credentials, not rights."""
READERS = 16
"""Small files read at once."""
REPEATED = 20_000
"""Folders that are listed again under another name, before somebody is taken to have named a place that is no folder of clips: /proc."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A regular file."""

    size: int | None
    """Bytes; None: its server does not say."""
    date: str
    """Of its last change, or an ETag."""
    info: Mapping[str, Any]
    """All that the file system says; empty on a disk."""


class Folder:
    def __init__(self, files: Any, root: str, left_out: LeftOut | None = None) -> None:
        """
        Args:
            files: a file system of fsspec.
            root: as that one calls the folder.
            left_out: folders on a disk that are not listed.
        """
        self._left_out = left_out
        self._files, self.root = files, root.rstrip("/") or "/"
        self.is_local, self._is_http = is_local(files), _is_http(files)
        self._odd: list[str] = []

    @cached_property
    def listing(self) -> Mapping[str, Entry] | None:
        """Every file below, by its name relative to the folder; None: its server lists nothing.

        Raises FileNotFoundError, NotADirectoryError, PermissionError, and what else the file system says.
        """
        if self.is_local:
            return dict(on_disk(self.root, self._odd, self._left_out))
        try:
            found = self._files.find(self.root, detail=True)
        except (FileNotFoundError, NotImplementedError, ValueError):
            if not self._is_http:
                raise
            found = {}
        if not found and self._is_http:
            return None
        if not found and not self._files.isdir(self.root):
            raise FileNotFoundError(self.root)
        start = len(self.root.rstrip("/")) + 1
        names = {self._unquoted(name[start:]): info for name, info in found.items()}
        return {
            name: Entry(info.get("size"), str(info.get("ETag") or info.get("mtime")), info)
            for name, info in names.items()
            if name and not name.endswith("/")
        }

    @property
    def odd(self) -> tuple[str, ...]:
        """Names on a disk under which neither a file nor a folder lies: pipes, sockets, devices, links into nothing or into themselves."""
        if self.is_local:
            _ = self.listing
        return tuple(self._odd)

    @cached_property
    def tops(self) -> tuple[str, ...]:
        """Files of the listing that lie in no folder of this one."""
        return tuple(sorted(name for name in self.listing or () if "/" not in name))

    @cached_property
    def names(self) -> Names:
        """Of the listing; of none, where nothing is listed."""
        return Names(self.listing or ())

    def place(self, name: str) -> str:
        """A file, as the file system calls it."""
        return f"{self.root.rstrip('/')}/{quote(name) if self._is_http else name}"

    def address(self, place: str) -> str:
        """With its scheme, as anybody may call it."""
        return str(self._files.unstrip_protocol(place))

    def read(self, name: str) -> bytes:
        if self.is_local and Path(self.place(name)).exists() and not Path(self.place(name)).is_file():
            raise IsADirectoryError(self.place(name))  # or a pipe, which never ends
        with _answered(), self._files.open(self.place(name), "rb") as file:
            data: bytes = file.read()
        return data

    @contextmanager
    def open(self, name: str) -> Iterator[tuple[Any, int]]:
        """A file to read parts of, and its bytes."""
        if self.is_local and Path(self.place(name)).exists() and not Path(self.place(name)).is_file():
            raise IsADirectoryError(self.place(name))
        with _answered(), self._files.open(self.place(name), "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(0)
            yield file, int(size)

    def elsewhere(self, path: str) -> Folder:
        """Another folder of the same file system: below this one, or from its root on."""
        return Folder(self._files, path if path.startswith("/") else posixpath.normpath(f"{self.root}/{path}"))

    def read_all(self, names: Iterable[str]) -> list[bytes]:
        names = list(names)
        if len(names) < 2 or self.is_local:
            return [self.read(name) for name in names]
        with ThreadPoolExecutor(READERS) as pool:
            return list(pool.map(self.read, names))

    def has(self, name: str) -> bool:
        """Asked for by itself where nothing is listed."""
        if self.listing is not None:
            return name in self.listing
        try:
            with _answered():
                self._files.info(self.place(name))
        except FileNotFoundError:
            return False
        return True

    def _unquoted(self, name: str) -> str:
        return unquote(name.partition("?")[0]) if self._is_http else name


def read_named(folder: Folder, file: str, name: str) -> bytes:
    """A small file. `name`: how messages call it. Raises ConfigError, FileNotFoundError."""
    try:
        return folder.read(file)
    except IsADirectoryError:
        raise ConfigError(f"{name}: is no regular file. Give the file of a table") from None
    except PermissionError as error:
        raise denied(name, error) from None


def denied(subject: str, error: PermissionError) -> ConfigError:
    """An object store answers so to wrong keys, too, which no right mends."""
    answer = getattr(error.__cause__, "response", None) or {}
    code = answer.get("Error", {}).get("Code")
    if wrong := WRONG_KEYS.get(code):
        return ConfigError(f"{subject}: cannot be read: {wrong}")
    return ConfigError(f"{subject}: may not be read ({error.strerror or error}). Give this user the right to")


@contextmanager
def _answered() -> Iterator[None]:
    """A server that does not answer says nothing about a file; fsspec calls each file of it one that is not there."""
    try:
        yield
    except FileNotFoundError as error:
        if isinstance(error.__cause__, OSError):
            raise error.__cause__ from None
        raise


def on_disk(root: str, odd: list[str], left_out: LeftOut | None = None) -> Iterator[tuple[str, Entry]]:
    """Regular files, also behind links; a folder that may not be read has none, but for the first. `odd` gets what is neither.
    Folders below that `left_out` has are passed over.

    A folder is listed under each of its names, but links in it are followed the first time alone: folders that link to each other have
    more names than anyone can count. Raises ConfigError, where too many are listed again (REPEATED).
    """
    waiting = deque([("", frozenset[tuple[int, int]]())])
    listed: set[tuple[int, int]] = set()
    again = 0
    while waiting:
        below, above = waiting.popleft()  # the shortest names first
        try:
            found = Path(root, below).stat()
            if (here := (found.st_dev, found.st_ino)) in above:
                continue  # a link into a folder that it lies in
            entries = list(os.scandir(f"{root}/{below}" if below else root))
        except OSError:
            if not below:
                raise
            continue
        if below and left_out is not None and left_out.has(f"{root}/{below}", here, (entry.name for entry in entries)):
            continue
        if repeated := here in listed:
            again += 1
            if again > REPEATED:
                raise ConfigError(f"{root}: links lead to the same folders more than {REPEATED:,} times ({below}). Give a folder of clips")
        listed.add(here)
        for entry in entries:
            name = f"{below}/{entry.name}" if below else entry.name
            try:
                if entry.is_dir():
                    if not (repeated and entry.is_symlink()):
                        waiting.append((name, above | {here}))
                elif entry.is_file():
                    # the date of a link itself: caches of before were named by it
                    yield name, Entry(entry.stat().st_size, str(entry.stat(follow_symlinks=False).st_mtime), {})
                else:
                    odd.append(name)
            except OSError:
                odd.append(name)


class Names:
    """Names of files, found however they are written."""

    def __init__(self, names: Iterable[str]) -> None:
        self._exact = frozenset(names)

    def __contains__(self, name: object) -> bool:
        return name in self._exact

    def __len__(self) -> int:
        return len(self._exact)

    @cached_property
    def _alike(self) -> dict[str, str]:
        return {_key(name): name for name in sorted(self._exact, reverse=True)}

    def find(self, written: str) -> str | None:
        """The file that is meant; None: there is none. Exactly as written comes first, then a path of Windows, then what reads the same."""
        if written in self._exact:
            return written
        slashed = written.replace("\\", "/")
        for name in (written.strip(), slashed, slashed.strip()):
            if name in self._exact:
                return name
        return self._alike.get(_key(written)) or self._alike.get(_key(slashed))


def _key(name: str) -> str:
    """Equal for names that read the same."""
    parts = (unicodedata.normalize("NFC", part).strip() for part in name.split("/"))
    return "/".join(part for part in parts if part not in ("", "."))


class Finder:
    """Finds files that tables name one by one, by listing the folders that they should lie in, each once."""

    def __init__(self) -> None:
        self._listed: dict[tuple[Any, str], Names | None] = {}

    def located(self, files: Any, place: str) -> str:
        """The file that is meant, as its file system calls it; where there is none, the place as it is.

        A name that can be written in one way alone is not asked for: a million requests take minutes.
        """
        if (place.isascii() and "\\" not in place) or _is_http(files) or files.exists(place):
            return place
        return self._found(files, place) or self._found(files, place.replace("\\", "/")) or place

    def _found(self, files: Any, place: str) -> str | None:
        head, _, tail = place.rpartition("/")
        if not head or not tail or head.endswith(":/"):
            return None
        names = self._names(files, head)
        if names is None:
            other = self._found(files, head)
            if other is None or other == head:
                return None
            head, names = other, self._names(files, other)
        name = names.find(tail) if names is not None else None
        return None if name is None else f"{head}/{name}"

    def _names(self, files: Any, folder: str) -> Names | None:
        """None: no such folder."""
        if (files, folder) not in self._listed:
            try:
                entries = files.ls(folder, detail=False)
            except (FileNotFoundError, NotADirectoryError, PermissionError):
                entries = []
            found = Names(entry.rstrip("/").rpartition("/")[2] for entry in entries) if entries else None
            self._listed[files, folder] = found
        return self._listed[files, folder]


def is_local(files: Any) -> bool:
    return "file" in _protocols(files)


def _is_http(files: Any) -> bool:
    return bool({"http", "https"} & set(_protocols(files)))


def _protocols(files: Any) -> tuple[str, ...]:
    return (files.protocol,) if isinstance(files.protocol, str) else tuple(files.protocol)
