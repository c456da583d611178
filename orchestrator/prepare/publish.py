"""What was prepared, in its store: every file as DATASET.json describes it, DATASET.json last, and the name that means it.

    datasets/<name>/prepared/<version>/…       version: 16 digits of the digest; where the same clips have other files, with 8 more of these

Owns what counts as published: DATASET.json is there. A version never changes. What a killed launcher left of one is completed, and is
replaced where another machine made other bytes. Refuses files that are not as DATASET.json says, and names that leave the folder.
"""

from __future__ import annotations

import csv
import hashlib
import json
import tempfile
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from opensora.dataset.manifest import DataManifest, Row
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, RunFailed, StoreConflict
from orchestrator.inputs import datasets
from orchestrator.ports import Store, check_key
from orchestrator.prepare.records import DATASET, Keys

TRANSFERS = 8
CAPTIONS = "captions.csv"
NOT_COUNTED = ("report.html",)
"""Files beside the data: the same data set may have others."""


@dataclass(frozen=True)
class Description:
    """DATASET.json."""

    content: Mapping[str, Any]

    @classmethod
    def decode(cls, data: bytes, place: str) -> Description:
        """Raises CorruptCheckpoint where it is none."""
        try:
            content = json.loads(data)
            one = cls(content)
            checked = [one.digest, one.name, one.clips, one.seconds, one.bytes, one.files, one.steps, one.sources]
            if content["schema"] != 1 or not all(isinstance(each["sha256"], str) for each in one.files.values()) or not checked:
                raise ValueError(f"schema {content['schema']}, this version reads 1")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CorruptCheckpoint(
                f"{place}: is no description of a data set ({type(error).__name__}: {error}). Prepare it again"
            ) from None
        return one

    @property
    def name(self) -> str:
        return str(self.content["name"])

    @property
    def digest(self) -> str:
        return str(self.content["digest"])

    @property
    def clips(self) -> int:
        return int(self.content["clips"])

    @property
    def seconds(self) -> float:
        return float(self.content["seconds"])

    @property
    def bytes(self) -> int:
        return int(self.content["bytes"])

    @property
    def config(self) -> Mapping[str, Any]:
        return dict(self.content["config"])

    @property
    def files(self) -> Mapping[str, Mapping[str, Any]]:
        """By path: {size, sha256}."""
        return dict(self.content["files"])

    @property
    def steps(self) -> Mapping[str, Mapping[str, Any]]:
        """By step: {in, kept, dropped: {reason: n}, quarantined: {reason: n}}."""
        return dict(self.content["steps"])

    @property
    def alone(self) -> Mapping[str, int]:
        """By rule, how many clips it would drop if there were no other; empty: not recorded."""
        return dict(self.content.get("alone", {}))

    @property
    def sources(self) -> list[Mapping[str, Any]]:
        """[{name, uri, sha256, licence, clips}]."""
        return list(self.content["sources"])

    @property
    def licences(self) -> tuple[str, ...]:
        return tuple(sorted({str(one.get("licence") or "") for one in self.sources} - {""}))

    @property
    def data_digest(self) -> str:
        """Over the files that make the data, by their names and contents: clips that were scaled otherwise are another version."""
        counted = sorted((path, one["sha256"]) for path, one in self.files.items() if path not in NOT_COUNTED)
        return hashlib.sha256(json.dumps(counted).encode()).hexdigest()


@dataclass(frozen=True)
class Published:
    """A data set in its store."""

    place: str
    """Address of its folder, as `--data` takes it."""
    description: Description
    new: bool
    """False: it was there already."""


Say = Callable[[int, int], None]


def publish(store: Store, name: str, out: Path, say: Say = lambda done, total: None) -> Published:
    """Bring what lies in `out` into the store. Repeatable. Raises Unreachable, Refused, RunFailed where `out` is not whole.

    Args:
        say: told after each file (bytes sent, bytes to send).
    """
    raw = _read(out / DATASET)
    ours = Description.decode(raw, str(out / DATASET))
    version, there = _version(store, name, ours)
    folder = Keys(name).version(version)
    place = f"{store.url}/{folder}"
    if there is not None:
        return Published(place, there, new=False)
    total, done = sum(int(one["size"]) for one in ours.files.values()), 0
    with ThreadPoolExecutor(TRANSFERS) as pool:
        for size in pool.map(lambda item: _send(store, folder, out, *item), sorted(ours.files.items())):
            done += size
            say(done, total)
    try:
        store.create(f"{folder}/{DATASET}", raw)
    except StoreConflict:  # a launcher whose lease was lost meanwhile; what it wrote stands
        return Published(place, described(store, name, version), new=False)
    return Published(place, ours, new=True)


def register(store: Store, name: str, published: Published, captions: bytes, *, now: float, holder: str) -> datasets.DataSet:
    """From now on `name` means this version. Repeatable. `captions`: its captions.csv. Raises Unreachable, Refused."""
    about = published.description
    return datasets.register(
        store, name, published.place, manifest_of(about, captions), now=now, holder=holder,
        prepared=about.digest, seconds=about.seconds, licences=about.licences,
    )  # fmt: skip


def manifest_of(about: Description, captions: bytes) -> DataManifest:
    """The rows as a trainer reads them, in the order of captions.csv; no clip is opened, DATASET.json has their digests.

    Raises CorruptCheckpoint where a row names a clip that is not in DATASET.json.
    """
    rows, files = [], about.files
    for line in csv.DictReader(captions.decode("utf-8-sig").splitlines(keepends=True)):
        path = line["path"]
        if path not in files:
            raise CorruptCheckpoint(f"data set {about.name}: {CAPTIONS} names {path}, and {DATASET} does not. Prepare it again")
        rows.append(Row(path, line["text"], int(files[path]["size"]), str(files[path]["sha256"])))
    return DataManifest(tuple(rows))


def described(store: Store, name: str, version: str) -> Description:
    """Raises NotFound, CorruptCheckpoint, Unreachable."""
    key = f"{Keys(name).version(version)}/{DATASET}"
    with tempfile.TemporaryDirectory() as folder:  # of 400,000 clips it has 60 MB: no record that `read` takes into memory
        store.download(key, Path(folder, DATASET))
        return Description.decode(Path(folder, DATASET).read_bytes(), key)


def _version(store: Store, name: str, ours: Description) -> tuple[str, Description | None]:
    """Under which version it is published, and what is published there already."""
    for version in (ours.digest[:16], f"{ours.digest[:16]}-{ours.data_digest[:8]}"):
        try:
            there = described(store, name, version)
        except NotFound:
            return version, None
        if there.data_digest == ours.data_digest:
            return version, there
    return version, there  # 8 digits more, and still other files: nobody has made such ones by chance


def _send(store: Store, folder: str, out: Path, name: str, said: Mapping[str, Any]) -> int:
    key = check_key(f"{folder}/{name}")
    path = out / name
    if not path.is_file() or (path.is_symlink() or not path.resolve().is_relative_to(out.resolve())):
        raise RunFailed(f"{path}: {DATASET} names it, and it is no file of the folder. Prepare it again")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != said["sha256"]:
        raise RunFailed(
            f"{path}: has sha256 {found[:12]}…, {DATASET} says {str(said['sha256'])[:12]}…. Prepare it again: osctl prepare run"
        )
    try:
        store.upload(key, path)
    except StoreConflict:  # left by a launcher on another machine that did not come to its DATASET.json: nothing names it
        store.discard(key)
        store.upload(key, path)
    return int(said["size"])


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise Refused(
            f"{path}: cannot be read ({error.strerror}), so there is no data set to publish. Run again: osctl prepare run"
        ) from error
