"""Data sets in a store: the manifest of each under its digest, and the names that people gave them.

    datasets/<digest>/manifest.jsonl.gz         which clips with which captions (`opensora.dataset.manifest`)
    datasets/<name>/registered/<number>.json    what a name means, from then on; the last one counts
    datasets/<name>/clips/, <digest>.csv        of one that was sent into the store (`orchestrator.inputs.sent_clips`)
    datasets/<name>/prepared/<version>/         of one that was made of raw videos (`orchestrator.prepare`)

Owns these keys and the records in them. Nothing is overwritten: a manifest is its digest's, whoever writes it first, and a name that
comes to mean other data gets a next number. Refuses to read clips: `data_files` does, where they lie.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable
from typing import ClassVar, Literal

from pydantic import NonNegativeFloat, NonNegativeInt

from opensora.dataset.manifest import DataManifest
from opensora.printable import several
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, StoreConflict, UsageError
from orchestrator.ledger.record import Damaged, Record
from orchestrator.ports import Store, numbered

ROOT = "datasets"
"""Folder of the store; no pipeline has this name."""
NAME = re.compile(r"[a-z]([a-z0-9.-]{0,38}[a-z0-9])?")
DIGEST = re.compile(r"[0-9a-f]{64}")


class DataSet(Record):
    """A name for a data set."""

    ADDED: ClassVar[tuple[str, ...]] = ("prepared", "seconds", "licences")
    name: str
    source: str
    """Where its clips lay when they were read: a folder, a CSV, or an address."""
    manifest: str
    """Digest of its manifest."""
    rows: NonNegativeInt
    size: NonNegativeInt
    """Bytes of all files."""
    unreadable: NonNegativeInt
    by: Literal["content", "name"]
    """content: every file was hashed; name: captions and paths alone count."""
    time: float
    holder: str
    """user@host, for people."""
    prepared: str | None = None
    """Digest of the preparation that made it; none: its clips were there already."""
    seconds: NonNegativeFloat = 0.0
    """Of video, where it was prepared."""
    licences: tuple[str, ...] = ()
    """Of its sources, where it was prepared."""


class TooMuch(Exception):
    """More than a scan may read."""

    def __init__(self, files: int, size: int) -> None:
        super().__init__(f"not read before: {several(files, 'file')} of {size:,} bytes")
        self.files, self.size = files, size


def check_name(name: str) -> str:
    """Raises UsageError."""
    if not NAME.fullmatch(name):
        raise UsageError(
            f"data set {name!r}: a name has lower-case letters, digits, '-' and '.', begins with a letter and has at most 40 characters. "
            "Choose another one"
        )
    return name


def manifest_key(digest: str) -> str:
    return f"{ROOT}/{digest}/manifest.jsonl.gz"


def put_manifest(store: Store, manifest: DataManifest) -> None:
    """Idempotent. The same clips may lie elsewhere under other names: whose manifest came first stays. Raises Unreachable, Refused."""
    key = manifest_key(manifest.digest)
    try:
        store.size(key)
    except NotFound:
        with contextlib.suppress(StoreConflict):  # another launch was faster, and called the files otherwise
            store.create(key, manifest.encode())


def get_manifest(store: Store, digest: str) -> DataManifest:
    """Raises NotFound, CorruptCheckpoint where it is not what its digest says, Unreachable."""
    return read_manifest(store, digest)[0]


def read_manifest(store: Store, digest: str) -> tuple[DataManifest, bytes]:
    """The manifest, and its bytes as they lie there. Raises as `get_manifest`."""
    key = manifest_key(digest)
    data = store.read(key).data
    try:
        manifest = DataManifest.decode(data)
    except ValueError as error:
        raise CorruptCheckpoint(f"data set {key}: {error}; register the data again: osctl data register") from error
    if manifest.digest != digest:
        raise CorruptCheckpoint(f"data set {key}: has digest {manifest.digest}; put back the manifest that was written")
    return manifest, data


def register(
    store: Store,
    name: str,
    source: str,
    manifest: DataManifest,
    *,
    now: float,
    holder: str,
    prepared: str | None = None,
    seconds: float = 0.0,
    licences: tuple[str, ...] = (),
) -> DataSet:
    """From now on `name` means these rows. Said again, nothing changes. Raises Unreachable, Refused.

    Args:
        prepared, seconds, licences: see `DataSet`.
    """
    put_manifest(store, manifest)
    while True:
        before = of_name(store, name)
        if before and (before[-1].manifest, before[-1].source) == (manifest.digest, source):
            return before[-1]
        one = DataSet(
            name=name, source=source, manifest=manifest.digest, rows=len(manifest.rows), size=manifest.size,
            unreadable=manifest.unreadable, by=manifest.by, time=now, holder=holder,
            prepared=prepared, seconds=seconds, licences=licences,
        )  # fmt: skip
        try:
            number = max(numbered(store, f"{ROOT}/{name}/registered"), default=0) + 1
            store.create(f"{ROOT}/{name}/registered/{number:06d}.json", one.encode())
            return one
        except StoreConflict:  # another one registered at the same moment
            continue


def of_name(store: Store, name: str) -> list[DataSet]:
    """What a name meant, oldest first."""
    return list(_read(store, numbered(store, f"{ROOT}/{name}/registered").values()))


def registered(store: Store) -> list[DataSet]:
    """What every name means now, by name."""
    names = [name for name in store.children(f"{ROOT}/") if not DIGEST.fullmatch(name)]
    return [found[-1] for name in names if (found := of_name(store, name))]


def of_source(known: Iterable[DataSet], source: str) -> DataSet | None:
    """The newest registration of what lies at this place; none: there is none. `known`: what names mean now (`registered`)."""
    return max((one for one in known if one.source == source), key=lambda one: one.time, default=None)


def of_place(store: Store, source: str) -> DataSet | None:
    """The newest registration of this very place, under whichever name and however long ago; none: there is none."""
    known = (one for name in store.children(f"{ROOT}/") if not DIGEST.fullmatch(name) for one in of_name(store, name))
    return max((one for one in known if one.source == source), key=lambda one: one.time, default=None)


def names_of(store: Store) -> dict[str, str]:
    """By digest, the name that means it now."""
    return {one.manifest: one.name for one in registered(store)}


def find(store: Store, name: str) -> tuple[str, DataSet | None]:
    """The digest that a name, a digest or the beginning of one means, and its registration where it has one. Raises Refused."""
    known = registered(store)
    for one in known:
        if one.name == name:
            return one.manifest, one
    if re.fullmatch(r"[0-9a-f]{6,64}", name):
        digests = {digest for digest in store.children(f"{ROOT}/") if DIGEST.fullmatch(digest) and digest.startswith(name)}
        if len(digests) == 1:
            digest = digests.pop()
            return digest, next((one for one in known if one.manifest == digest), None)
    names = ", ".join(one.name for one in known) or "none"
    raise Refused(f"data set {name}: is not in {store.url}; registered are: {names}. Register it with: osctl data register {name} PATH")


def _read(store: Store, keys: Iterable[str]) -> Iterable[DataSet]:
    for key in keys:
        try:
            yield DataSet.decode(store.read(key).data)
        except (Damaged, NotFound):  # one that cannot be read hides no other
            continue
