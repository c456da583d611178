"""Read records from a store once and keep them, with a remark on each object that cannot be read.

A record never changes once it is written, so a record that was read is kept. Owns the remarks: an object that cannot be read, or that is
not osctl's, is left out and gets a remark. Refuses to know which keys there are (`orchestrator.ledger.store` does).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, StoreConflict, TooLarge
from orchestrator.ledger.reading import read_many
from orchestrator.ledger.record import ADVICE, Damaged, DamageKind, Record
from orchestrator.ledger.records import Manifest
from orchestrator.ports import Store, check_key

AnyRecord = TypeVar("AnyRecord", bound=Record)


@dataclass(frozen=True)
class Remark:
    """An object or a folder that is left out: its key, what is wrong with it, and what to do."""

    key: str
    kind: DamageKind
    text: str

    def __str__(self) -> str:
        return f"{self.key} {self.text}"


class Objects:
    def __init__(self, store: Store, *, lenient: bool = False, known: dict[str, Record] | None = None) -> None:
        """
        Args:
            lenient: whether a record that cannot be read counts as absent; for readers that only display.
            known: records that another reader of this store has read.
        """
        self.store, self.lenient = store, lenient
        self.remarks: dict[str, Remark] = {}
        """By key, the objects that could not be read so far. If one was read later, its remark is removed."""
        self.known: dict[str, Record] = {} if known is None else known

    def find(self, kind: type[AnyRecord], key: str) -> AnyRecord | None:
        """The record. None means it is not there. One that cannot be read raises Refused, or with `lenient` gives None and a remark."""
        found = self.seen(kind, key)
        if found is None and not self.lenient and key in self.remarks:
            failure = CorruptCheckpoint if kind is Manifest else Refused
            raise failure(f"ledger {self.store.url}: {self.remarks[key]}")
        return found

    def seen(self, kind: type[AnyRecord], key: str) -> AnyRecord | None:
        """The record. None means it is not there, or cannot be read."""
        if key not in self.known:
            try:
                self._keep(key, self.read(kind, key))
            except NotFound:
                self.remarks.pop(key, None)
                return None
        found = self.known.get(key)
        return found if isinstance(found, kind) else None

    def _keep(self, key: str, answer: Record | Remark) -> None:
        if isinstance(answer, Remark):
            self.remarks[key] = answer
        else:
            self.remarks.pop(key, None)
            self.known[key] = answer

    def put(self, key: str, record: AnyRecord) -> AnyRecord:
        try:
            self.store.create(key, record.encode())
            return record
        except StoreConflict:
            return decode(self.store, type(record), key, self.store.read(key).data)

    def read_anew(self, kind: type[AnyRecord], keys: Iterable[str]) -> list[AnyRecord]:
        """The records that can be read; they are not kept. The others get a remark."""

        def read_one(key: str) -> AnyRecord | Remark | None:
            try:
                return self.read(kind, key)
            except NotFound:  # it was removed after it was listed
                return None

        found = []
        keys = list(keys)
        for key, answer in zip(keys, read_many(read_one, keys), strict=True):
            if isinstance(answer, Remark):
                self.remarks[key] = answer
            elif answer is not None:
                self.remarks.pop(key, None)
                found.append(answer)
        return found

    def read_all(self, kind: type[AnyRecord], keys: Iterable[str]) -> list[AnyRecord]:
        """The records that can be read, in order. The others get a remark."""
        return [record for _, record in self.read_pairs(kind, keys)]

    def read_pairs(self, kind: type[AnyRecord], keys: Iterable[str]) -> list[tuple[str, AnyRecord]]:
        keys = list(keys)
        unknown = [key for key in keys if key not in self.known]

        def read_one(key: str) -> AnyRecord | Remark:
            try:
                return self.read(kind, key)
            except NotFound:  # listed but not there: it was removed, or the store cannot read what it lists
                return Remark(key, "damaged", f"is listed by the store, and cannot be read; {ADVICE['damaged']}")

        for key, answer in zip(unknown, read_many(read_one, unknown), strict=True):
            self._keep(key, answer)
        found = ((key, self.known.get(key)) for key in keys)
        return [(key, record) for key, record in found if isinstance(record, kind)]

    def read(self, kind: type[AnyRecord], key: str) -> AnyRecord | Remark:
        """The record, or a remark that says why it cannot be read. Raises NotFound, Unreachable."""
        try:
            return kind.decode(self.store.read(key).data)
        except Damaged as error:
            return Remark(key, error.kind, f"{error}; {error.advice}")
        except TooLarge as error:
            return Remark(key, "too_large", f"is no record: {error}; {ADVICE['too_large']}")
        except Refused as error:
            return Remark(key, "forbidden", f"may not be read: {error}")

    def remark(self, key: str, kind: DamageKind, fact: str, *, advice: str | None = None) -> None:
        text = ADVICE[kind] if advice is None else advice
        self.remarks[key] = Remark(key, kind, f"{fact}; {text}" if text else fact)

    def list_named(self, prefix: str, names: re.Pattern[str], after: str = "") -> Iterator[str]:
        """The keys whose last part is one of osctl's names. The others get a remark."""
        for key in self.list_all(prefix, after):
            if names.fullmatch(key[prefix.rfind("/") + 1 :]):
                yield key
            else:
                self.remark(key, "foreign", "is not osctl's: its name is none that osctl gives")

    def newest(self, prefix: str, names: re.Pattern[str], after: str) -> str:
        """The last key with one of osctl's names, or `after` if none is newer. Other objects, which may sort last, are no sign of life."""
        keys = self.store.list(prefix, after)
        return max((key for key in keys if names.fullmatch(key.rpartition("/")[2])), default=after)

    def list_all(self, prefix: str, after: str = "") -> list[str]:
        try:
            return list(self.store.list(prefix, after))
        except Refused as error:
            return list(self._unlisted(prefix, error))

    def children(self, prefix: str) -> Iterable[str]:
        try:
            return self.store.children(prefix)
        except Refused as error:
            return self._unlisted(prefix, error)

    def _unlisted(self, prefix: str, error: Refused) -> Iterable[str]:
        """Raise the error, since a driver must know what is there. With `lenient`, leave a remark instead."""
        if not self.lenient:
            raise error
        self.remark(prefix, "forbidden", f"cannot be listed: {error}", advice="")
        return ()


def is_key(name: str) -> bool:
    """Whether a name can be a part of a key in every kind of store."""
    try:
        check_key(name)
    except Refused:
        return False
    return True


def decode(store: Store, kind: type[AnyRecord], key: str, data: bytes) -> AnyRecord:
    try:
        return kind.decode(data)
    except Damaged as error:
        failure = CorruptCheckpoint if kind is Manifest else Refused
        raise failure(f"ledger {store.url}: {key} {error}; {error.advice}") from error
