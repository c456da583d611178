"""Where a prepared data set comes from, and whether it still is what was trained on. Only reads.

Owns the last step of a lineage: from the clips of a stage to the addresses of the videos that they were cut from.
"""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orchestrator.errors import CorruptCheckpoint, NotFound
from orchestrator.inputs import datasets
from orchestrator.ports import Store
from orchestrator.prepare import attempts, removed
from orchestrator.prepare.publish import CAPTIONS, Description, described, manifest_of
from orchestrator.prepare.records import DATASET, Keys


@dataclass(frozen=True)
class Origin:
    name: str
    place: str
    """Address of its folder in the store."""
    attempt: int | None
    """Of the preparation, that made it; None: the store does not say."""
    made_by: str
    """The Job or RayJob of that attempt; empty: it was made on one machine, or the store does not say."""
    sources: tuple[Mapping[str, Any], ...]
    """name, uri, sha256, licence, clips: of each video. Empty: the version is deleted, since something was taken out of it."""
    faults: tuple[tuple[str, str], ...]
    """(key, what is wrong), of what is not as it was trained on."""

    @property
    def is_there(self) -> bool:
        return bool(self.sources)


def origin(store: Store, place: str, digest: str, *, full: bool = False) -> Origin | None:
    """Of the data set at a place. None: it was not prepared into this store.

    Args:
        digest: of the manifest that a stage was trained on.
        full: read and hash every file of it.

    Raises Unreachable.
    """
    known = datasets.of_place(store, place)
    if known is None or known.prepared is None:
        return None
    made = [one for one in attempts.all_of(store, Keys(known.name)) if one.outcome and one.outcome.dataset == known.prepared]
    first = made[0] if made else None
    folder = place.removeprefix(f"{store.url}/")
    sources: tuple[Mapping[str, Any], ...] = ()
    faults: list[tuple[str, str]] = []
    try:
        about = described(store, known.name, folder.rpartition("/")[2])
        sources = tuple(about.sources)
        faults = list(_faults(store, folder, about, digest, full=full))
    except NotFound:  # nothing is left to compare: that is right for a version that was deleted on request, and a loss otherwise
        if not removed.is_deleted(store, Keys(known.name), digest):
            faults = [(f"{folder}/{DATASET}", "is missing")]
    except CorruptCheckpoint as error:
        faults = [(f"{folder}/{DATASET}", str(error))]
    where = first.intent.where if first is not None and first.intent is not None else ""
    return Origin(known.name, place, first.number if first is not None else None, where, sources, tuple(faults))


def _faults(store: Store, folder: str, about: Description, digest: str, *, full: bool) -> Iterator[tuple[str, str]]:
    with tempfile.TemporaryDirectory() as scratch:
        wanted = sorted(about.files) if full else [CAPTIONS]
        for name in wanted:
            key, path = f"{folder}/{name}", Path(scratch, "file")
            path.unlink(missing_ok=True)
            try:
                store.download(key, path)
            except NotFound:
                yield key, "is missing"
                continue
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
            if found != (said := about.files[name]["sha256"]):
                yield key, f"has sha256 {found[:12]}, {DATASET} says {said[:12]}"
            elif name == CAPTIONS and (now := manifest_of(about, path.read_bytes()).digest) != digest:
                yield f"{folder}/{DATASET}", f"its rows have digest {now[:12]}, and {digest[:12]} was trained on"
