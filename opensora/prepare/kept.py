"""Results of steps on disk, so that nothing is worked on twice: many in a pack (`opensora.dataset.kept_packs`), found by their key.

Owns their form and how they are read. A result that cannot be read, as a power cut may leave it, counts as absent: it is made again, and
`unreadable` says how many. Refuses to know what the steps do and when a result is still good.

    {"row":{…}}                          the step's result
    {"row":{…},"stamp":"…"}              with the state of what it was made from
    {"drop":{"reason":…,"detail":…}}     it was not wanted
    {"quarantine":{…}}                   it could not be worked on

Releases before 0.3.0 kept each result in a file of its own, `STEP/DIGEST/KE/KEY.json`, KE being the first two characters of KEY; those are
read, and clips' own files and quarantined rows lie so today.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from operator import attrgetter
from pathlib import Path
from typing import Any, Generic, TypeVar

from opensora.dataset.kept_packs import OPEN, Packs
from opensora.dataset.rows import Drop, Leaves, Quarantine, from_json
from opensora.prepare.open_pack import OpenPack, sync_all
from opensora.printable import one_line

Row = TypeVar("Row")
_LEAVES: dict[str, type[Leaves]] = {"drop": Drop, "quarantine": Quarantine}
_FIELDS: dict[type, tuple[tuple[str, ...], Any]] = {}

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Columns:
    """What a step that adds columns keeps of a clip."""

    values: dict[str, float]


def _plain(row: Any) -> dict[str, Any]:
    """A row as the JSON encoder takes it."""
    if isinstance(row, Mapping):
        return dict(row)
    kind = type(row)
    if kind not in _FIELDS:
        names = tuple(one.name for one in fields(row))
        _FIELDS[kind] = names, (lambda row: (getattr(row, names[0]),)) if len(names) == 1 else attrgetter(*names)
    names, values = _FIELDS[kind]
    return dict(zip(names, values(row), strict=True))


_encoded = json.JSONEncoder(default=_plain, sort_keys=True, separators=(",", ":")).encode


@dataclass
class Kept(Generic[Row]):
    """Results of one step under one digest. One process writes; its threads may."""

    root: Path
    """`RUN_DIR/kept`."""
    temporary: Path
    """A folder of the same file system, for files that are not whole yet."""
    step: str
    digest: str
    kind: type[Row]
    """Class of the rows."""
    durable: bool = False
    """Whether a result is on the disk itself within a second: for what is dear to make again. What a power cut took is noticed in any
    case."""
    unreadable: int = 0
    """Results that could not be read."""

    def __post_init__(self) -> None:
        self._folder = f"{self.root}/{self.step}/{self.digest}/"
        self._lock = threading.RLock()
        self._pack = OpenPack(self._folder[:-1], durable=self.durable)
        self._known: Packs | None = None
        self._old = False

    def name(self, key: str, suffix: str = ".json") -> str:
        """As `path`: a string, since there are millions of them and a Path takes ten times as long to make."""
        return f"{self._folder}{key[:2]}/{key}{suffix}"

    def path(self, key: str, suffix: str = ".json") -> Path:
        """Of a file that belongs to one result alone."""
        return Path(self.name(key, suffix))

    def has(self, key: str) -> bool:
        """Whether there is something under this key; it may be unreadable."""
        with self._lock:
            return next(self._packs().contents(key), None) is not None or (self._old and os.path.exists(self.name(key)))  # noqa: PTH110

    def read(self, key: str, stamp: str = "") -> Row | Leaves | None:
        """What is kept of `key`; None: nothing that can be used.

        Args:
            stamp: state of what the result was made from, which its digest does not count (a file's size and date). A result with
                another stamp is not used.
        """
        with self._lock:
            for data in self._contents(key):
                if (found := self._decoded(data, key, stamp)) is not None:
                    return found
        return None

    def write(self, key: str, outcome: Row | Leaves, stamp: str = "") -> None:
        """Raises OSError."""
        data = _data(outcome, stamp)
        with self._lock:
            known = self._packs()
            known.add(key, OPEN, *self._pack.add(key, data))
            if self._pack.due:
                self.finish()

    def finish(self) -> None:
        """What was added becomes a pack. Raises OSError; then it stays open, and the next run closes it."""
        with self._lock:
            if self._known is not None and self._pack.pending:
                self.before_name()
                if name := self._pack.finish():
                    self._known.rename(name)

    def close(self) -> None:
        """At the end of a run, however it ends."""
        with contextlib.suppress(OSError):  # on a full disk; nothing is lost
            self.finish()
        self.leave()

    def leave(self) -> None:
        """Close what is open as it is, as the end of the process would; the next run closes the pack."""
        with self._lock:
            self._pack.close()
            if self._known is not None:
                self._known.close()

    def before_name(self) -> None:
        """What has to be on the disk before results that describe it."""

    def left_open(self, key: str, row: Row | Leaves | None) -> None:
        """Is told of each result that an earlier process had added to a pack that it did not finish."""

    def _packs(self) -> Packs:
        if self._known is None:
            for key, data in self._pack.left():
                self.left_open(key, self._decoded(data, key, None))
            self._pack.take_up()
            self._known = Packs(self._folder[:-1])
            self._old = _any_old(self._folder)
        return self._known

    def _contents(self, key: str) -> Iterator[bytes]:
        try:
            yield from self._packs().contents(key)
            if self._old:
                with open(self.name(key), "rb") as file:  # noqa: PTH123 - a third of Path.read_bytes; runs once a row and step
                    yield file.read()
        except FileNotFoundError:
            return
        except OSError as error:
            self._unreadable(key, error.strerror or str(error))

    def _decoded(self, data: bytes, key: str, stamp: str | None) -> Row | Leaves | None:
        """`stamp` None: whatever it is."""
        row = data.startswith(b'{"row":')
        if row and not data.endswith(b"}"):
            self._unreadable(key, "it ends in the middle")
            return None
        ending = f',"stamp":"{stamp}"}}'.encode() if stamp else b"}"
        if stamp is None and data.endswith(b'"}') and (at := data.rfind(b',"stamp":"')) > 0:
            ending = data[at:]
        if row and not data.endswith(ending):
            return None
        try:
            if row:
                return from_json(self.kind, data[7 : -len(ending)])
            [(name, content)] = json.loads(data).items()
            return _LEAVES[name](content["reason"], content["detail"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            self._unreadable(key, str(error))
            return None

    def _unreadable(self, key: str, fact: str) -> None:
        self.unreadable += 1
        log.info("%s", one_line(f"{self._folder}: {key} cannot be read ({fact}); it is made again", 400))


class KeptFiles(Kept[Row]):
    """Results that each describe a file beside them (`path`), by its size and sha256."""

    def before_name(self) -> None:
        """A file system may have a description on the disk before the file: its pack gets a name once both are there."""
        sync_all(self._folder)

    def left_open(self, key: str, row: Any) -> None:
        """After a power cut a file may have its size and other bytes; then it is removed, and made again."""
        path = self.path(key, ".mp4")
        if (sha256 := getattr(row, "sha256", None)) is None or not path.is_file():
            return
        with path.open("rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() == sha256:
                return
        path.unlink()
        self._unreadable(key, "its file has other bytes")


class SingleFiles(Kept[Row]):
    """Each result in a file of its own, which may be removed again: for few."""

    def read(self, key: str, stamp: str = "") -> Row | Leaves | None:
        try:
            return self._decoded(self.path(key).read_bytes(), key, stamp)
        except FileNotFoundError:
            return None
        except OSError as error:
            self._unreadable(key, error.strerror or str(error))
            return None

    def write(self, key: str, outcome: Row | Leaves, stamp: str = "") -> None:
        """Raises OSError."""
        place(_data(outcome, stamp), self.temporary, self.name(key), durable=self.durable)


def _data(outcome: Any, stamp: str) -> bytes:
    if isinstance(outcome, Leaves):
        name = "drop" if isinstance(outcome, Drop) else "quarantine"
        return json.dumps({name: {"reason": outcome.reason, "detail": outcome.detail}}).encode()
    ending = f',"stamp":"{stamp}"}}' if stamp else "}"
    return f'{{"row":{_encoded(outcome)}{ending}'.encode()


def _any_old(folder: str) -> bool:
    """Whether an earlier release has kept results here."""
    with contextlib.suppress(FileNotFoundError), os.scandir(folder) as inside:
        for one in inside:
            if len(one.name) == 2 and any(name.endswith(".json") for name in os.listdir(one.path)):  # noqa: PTH208
                return True
    return False


def place(data: bytes, temporary: Path, path: Path | str, *, durable: bool = False) -> None:
    """Write a file that is whole or absent. Raises OSError."""
    partial = f"{temporary}/{str(path).rpartition('/')[2]}.{threading.get_ident()}"
    with open(partial, "wb") as file:  # noqa: PTH123
        file.write(data)
        if durable:
            file.flush()
            os.fdatasync(file.fileno())
    move(partial, path)


def move(partial: Path | str, path: Path | str) -> None:
    """Give a whole file its name, and make its folder where it is the first there. Raises OSError."""
    try:
        os.replace(partial, path)  # noqa: PTH105
    except FileNotFoundError:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(partial, path)  # noqa: PTH105


def sync(path: Path) -> None:
    """Have a file's content on the disk itself."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
