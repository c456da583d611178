"""A person's own clips in a store, for attempts that see nothing of the disk they lie on.

    datasets/<name>/clips/<sha256><suffix>    each clip once, however many rows and versions name it
    datasets/<name>/<digest>.csv              the rows (path,text) of one version; what `data.source` names, and `--data`

Owns these keys. A clip lies there whole or not at all, under the digest of what it holds: whoever was interrupted sends what is missing.
Nothing is overwritten. Refuses to read captions (`data_files` does) and to register a name (`datasets` does).
"""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from opensora.dataset.manifest import DataManifest, Row
from orchestrator.errors import CorruptCheckpoint, Refused, StoreConflict
from orchestrator.inputs.datasets import ROOT
from orchestrator.ports import Store, check_key

TRANSFERS = 4
"""Clips on their way at a time."""
GB_MONTH_USD = 0.023
"""What a large cloud asks for keeping 10^9 bytes for a month (S3 Standard, its list price of 2026): for a rough word, never for a bill."""
ASSUMED_MBIT_S = 100


@dataclass(frozen=True)
class Clip:
    """A file to be sent."""

    key: str
    place: Path
    size: int
    sha256: str


@dataclass(frozen=True)
class Sending:
    """What is to be sent of a data set, and what its rows are in the store."""

    manifest: DataManifest
    table: str
    """Key of the table."""
    clips: tuple[Clip, ...]
    """All of them, each once."""
    missing: tuple[Clip, ...]
    """Those that the store does not have."""
    unreadable: int
    """Rows that are left out, since their files are not there or may not be read."""

    @property
    def size(self) -> int:
        return sum(clip.size for clip in self.clips)

    @property
    def missing_size(self) -> int:
        return sum(clip.size for clip in self.missing)

    @property
    def seconds(self) -> float:
        """To send what is missing, at `ASSUMED_MBIT_S`."""
        return 8 * self.missing_size / (ASSUMED_MBIT_S * 1e6)

    @property
    def usd_a_month(self) -> float:
        return self.size / 1e9 * GB_MONTH_USD


def prepare(store: Store, name: str, manifest: DataManifest, places: Sequence[str]) -> Sending:
    """Compare a data set with what the store has of it. `places`: where the file of each row lies. Raises Unreachable, Refused."""
    rows, clips = [], {}
    for row, place in zip(manifest.rows, places, strict=True):
        if row.sha256 is None or row.size is None:
            continue
        inside = f"clips/{row.sha256}{Path(place).suffix.lower()}"
        clips[inside] = Clip(check_key(f"{ROOT}/{name}/{inside}"), Path(place), row.size, row.sha256)
        rows.append(Row(inside, row.text, row.size, row.sha256))
    there = set(store.list(f"{ROOT}/{name}/clips/"))
    sent = DataManifest(tuple(rows))
    missing = tuple(clip for clip in clips.values() if clip.key not in there)
    return Sending(sent, f"{ROOT}/{name}/{sent.digest}.csv", tuple(clips.values()), missing, len(manifest.rows) - len(rows))


def send(store: Store, sending: Sending, progress: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Send what is missing, then the table; the address of the table. Repeatable. Raises Unreachable, Refused, CorruptCheckpoint."""
    done = 0
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for size in pool.map(lambda clip: _send(store, clip), sending.missing):
            done += size
            progress(done, sending.missing_size)
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow(("path", "text"))
    writer.writerows((row.path, row.text) for row in sending.manifest.rows)
    store.create(sending.table, text.getvalue().encode())
    return f"{store.url}/{sending.table}"


def _send(store: Store, clip: Clip) -> int:
    with clip.place.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != clip.sha256:
        raise Refused(f"{clip.place}: has changed since it was read. Run again once nobody writes it")
    try:
        store.upload(clip.key, clip.place)
    except StoreConflict as error:
        raise CorruptCheckpoint(f"clip {error}; remove that object, and run again") from error
    return clip.size
