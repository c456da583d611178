"""The pack that a step's results are added to (`opensora.dataset.kept_packs`), until it has its final name.

Owns when that is, and what is on the disk itself (fsync): each second of what is dear to make, and every pack before its name. A result
that was added outlives this process, however it ends; a power cut may take the last second. Refuses two writers: the run directory's lock
is held. What an earlier process left open is closed first.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from io import FileIO
from pathlib import Path

from opensora.dataset.kept_packs import OPEN, SUFFIX, key_and_content, line_of

MOST = 1000
"""Results of a pack."""
MOST_S = 30.0
"""Seconds that a pack stays open; what is open is on no other machine."""
SYNC_S = 1.0


class OpenPack:
    def __init__(self, folder: str, *, durable: bool, clock: Callable[[], float] = time.monotonic) -> None:
        """`folder`: kept/STEP/DIGEST. `durable`: what is added is on the disk within a second."""
        self._folder, self._durable, self._clock = folder, durable, clock
        self._path = f"{folder}/{OPEN}"
        self._file: FileIO | None = None
        self._sum = hashlib.sha256()
        self._size = self._results = 0
        self._began = self._synced = 0.0

    @property
    def pending(self) -> bool:
        """Whether there is anything without a final name."""
        return self._file is not None

    @property
    def due(self) -> bool:
        return self._results >= MOST or (self._results > 0 and self._clock() - self._began >= MOST_S)

    def left(self) -> Iterator[tuple[str, bytes]]:
        """What an earlier process left open: (key, content) of each whole line."""
        with contextlib.suppress(FileNotFoundError):
            for line in Path(self._path).read_bytes().split(b"\n")[:-1]:
                if (found := key_and_content(line)) is not None:
                    yield found

    def take_up(self) -> None:
        """Close what an earlier process left open. Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            data = Path(self._path).read_bytes()
            whole = data[: data.rfind(b"\n") + 1]
            if not whole:
                os.unlink(self._path)  # noqa: PTH108
                return
            if len(whole) < len(data):
                os.truncate(self._path, len(whole))
            self._file = FileIO(self._path, "a")
            self._sum, self._size, self._results = hashlib.sha256(whole), len(whole), 1
            self.finish()

    def add(self, key: str, content: bytes) -> tuple[int, int]:
        """(offset, length without newline) of the new line. Raises OSError, and then nothing was added."""
        line = line_of(key, content)
        file = self._file or self._begin()
        offset = self._size
        try:
            written = file.write(line)
            while written < len(line):  # a full disk takes a part of it, and raises over the rest
                written += file.write(line[written:])
        except OSError:
            with contextlib.suppress(OSError):  # else it is a line that is not whole, and the next run cuts it off
                os.ftruncate(file.fileno(), offset)
            raise
        self._sum.update(line)
        self._size += len(line)
        self._results += 1
        if self._durable and (now := self._clock()) - self._synced >= SYNC_S:
            os.fdatasync(file.fileno())
            self._synced = now
        return offset, len(line) - 1

    def finish(self) -> str:
        """Give it its final name, which is returned; empty: there is none. Raises OSError; it stays open then."""
        if self._file is None:
            return ""
        if not self._results:  # the disk was full at the first
            os.unlink(self._path)  # noqa: PTH108
            self.close()
            return ""
        os.fsync(self._file.fileno())
        name = f"{self._sum.hexdigest()[:20]}{SUFFIX}"
        os.replace(self._path, f"{self._folder}/{name}")  # noqa: PTH105
        self.close()
        return name

    def close(self) -> None:
        """What has no final name yet gets it from the next process."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _begin(self) -> FileIO:
        try:
            self._file = FileIO(self._path, "a")
        except FileNotFoundError:
            Path(self._folder).mkdir(parents=True, exist_ok=True)
            self._file = FileIO(self._path, "a")
        self._sum, self._size, self._results = hashlib.sha256(), 0, 0
        self._began = self._synced = self._clock()
        return self._file


def sync_all(folder: str) -> None:
    """Have on the disk itself what was written to the file system of this folder. Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        library = ctypes.CDLL(None, use_errno=True)
        if library.syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), folder)
    finally:
        os.close(descriptor)
