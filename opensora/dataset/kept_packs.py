"""Packs: results of one step under one digest, a line of JSON each, many in one file; written by the engine, read by whoever asks.

    kept/STEP/DIGEST/NAME.jsonl     NAME: 20 digits of the sha256 of its bytes; it never changes
    kept/STEP/DIGEST/.open.jsonl    what the running engine adds to; it becomes a pack of its own

    {"key":"KEY","row":{…}}

Owns the form, and how a result is found in many packs with 20 bytes of memory for each. Refuses to know what a row means, and to fail over
a line that is not whole: it counts as not there.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from array import array
from bisect import bisect_left
from collections import OrderedDict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path

OPEN, SUFFIX = ".open.jsonl", ".jsonl"
RECENT = 4096
"""Places of new results that are searched in a dictionary before they go into the sorted arrays."""
FILES = 8
"""Packs that are held open for reading: results are read in nearly the order in which they were written."""
_BEFORE, _AFTER = b'{"key":"', b'",'
_PLACE = 40
"""Bits of a place that are the offset in its pack; those above are the pack's number."""


def line_of(key: str, content: bytes) -> bytes:
    """`content`: a JSON object."""
    return _BEFORE + key.encode() + _AFTER + content[1:] + b"\n"


def key_and_content(line: bytes) -> tuple[str, bytes] | None:
    """Of a line without its newline; None: it is not whole."""
    end = line.find(b'"', len(_BEFORE))
    if not line.startswith(_BEFORE) or end < 0 or line[end : end + 2] != _AFTER or not line.endswith(b"}"):
        return None
    return line[len(_BEFORE) : end].decode(errors="replace"), b"{" + line[end + 2 :]


def name_of(data: bytes) -> str:
    return f"{hashlib.sha256(data).hexdigest()[:20]}{SUFFIX}"


def packs_in(folder: str | Path) -> list[str]:
    """Names of what can be read, in order; the open one last."""
    try:
        names = os.listdir(folder)  # noqa: PTH208
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = sorted(name for name in names if name.endswith(SUFFIX) and not name.startswith("."))
    return [*found, OPEN] if OPEN in names else found


def lines(path: str | Path) -> Iterator[tuple[str, bytes]]:
    """(key, content) of each whole line of a pack. A pack that is gone has none."""
    for _, _, key, content in _whole(path):
        yield key, content


def _whole(path: str | Path, begin: int = 0) -> Iterator[tuple[int, int, str, bytes]]:
    """(offset, length) of each whole line, with its key and content."""
    with contextlib.suppress(FileNotFoundError), open(path, "rb") as file:  # noqa: PTH123
        file.seek(begin)
        offset = begin
        for line in file:
            if line.endswith(b"\n") and (found := key_and_content(line[:-1])) is not None:
                yield offset, len(line) - 1, *found
            offset += len(line)


@dataclass
class Packs:
    """All packs of a folder. Results are found by key; of equal keys, those that were added here come first, then packs by their name."""

    folder: str
    names: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._hashes, self._places, self._lengths = array("q"), array("Q"), array("I")
        self._recent: dict[int, list[tuple[int, int]]] = {}
        self._many = 0
        self._files: OrderedDict[int, FileIO] = OrderedDict()
        for name in packs_in(self.folder):
            self._take(name)
        self._sort()

    def __len__(self) -> int:
        return len(self._hashes) + self._many

    def contents(self, key: str) -> Iterator[bytes]:
        """All that is kept under a key, the one that counts first. Raises OSError."""
        name = hash(key)
        found = list(reversed(self._recent.get(name, ())))
        place = bisect_left(self._hashes, name)
        while place < len(self._hashes) and self._hashes[place] == name:
            found.append((self._places[place], self._lengths[place]))
            place += 1
        for where, length in found:
            one = key_and_content(self._read(where, length))
            if one is not None and one[0] == key:
                yield one[1]

    def add(self, key: str, name: str, offset: int, length: int) -> None:
        """Remember a line that was written into a pack; `length` without its newline."""
        if not self.names or self.names[-1] != name:
            self.names.append(name)
        self._recent.setdefault(hash(key), []).append((len(self.names) - 1 << _PLACE | offset, length))
        self._many += 1
        if self._many >= max(RECENT, len(self._hashes) // 8):
            self._sort()

    def rename(self, name: str) -> None:
        """The pack that was added to has its final name now."""
        self.names[-1] = name

    def close(self) -> None:
        """The files that were held open. What is asked later opens them anew."""
        for file in self._files.values():
            file.close()
        self._files.clear()

    def _take(self, name: str) -> None:
        self.names.append(name)
        number = len(self.names) - 1 << _PLACE
        for offset, length, key, _ in _whole(f"{self.folder}/{name}"):
            self._hashes.append(hash(key))
            self._places.append(number | offset)
            self._lengths.append(length)

    def _sort(self) -> None:
        """Recent places into the sorted arrays, before those of equal hashes; a stable sort keeps that order."""
        import numpy as np

        recent = [(name, where, length) for name, found in self._recent.items() for where, length in reversed(found)]
        for code, column in enumerate(("_hashes", "_places", "_lengths")):
            new = array(getattr(self, column).typecode, (one[code] for one in recent))
            new.extend(getattr(self, column))
            setattr(self, column, new)
        self._recent.clear()
        self._many = 0
        order = np.argsort(np.frombuffer(self._hashes, np.int64), kind="stable") if self._hashes else np.empty(0, np.int64)
        for column in ("_hashes", "_places", "_lengths"):
            old = getattr(self, column)
            new = array(old.typecode)
            new.frombytes(np.frombuffer(old, f"{'i' if old.typecode == 'q' else 'u'}{old.itemsize}")[order].tobytes() if old else b"")
            setattr(self, column, new)

    def _read(self, where: int, length: int) -> bytes:
        number, offset = where >> _PLACE, where & ((1 << _PLACE) - 1)
        file = self._files.get(number)
        if file is None:
            try:
                file = FileIO(f"{self.folder}/{self.names[number]}")
            except FileNotFoundError:
                return b""
            self._files[number] = file
            if len(self._files) > FILES:
                self._files.popitem(last=False)[1].close()
        else:
            self._files.move_to_end(number)
        return os.pread(file.fileno(), length, offset)


def without(data: bytes, keys: Collection[str]) -> bytes:
    """A pack without the results of these keys; lines that are not whole go, too."""
    found = (key_and_content(line) for line in data.split(b"\n"))
    return b"".join(line_of(*one) for one in found if one is not None and one[0] not in keys)
