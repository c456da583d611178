"""Publish checkpoints from a directory to a store, and fetch them back. They are used only after every byte was compared.

Owns what lies below `checkpoints/step-…-a<n>/`: the files, and MANIFEST.json, which is written last and lists them. On several nodes each
publishes its files and a part that names them; node 0 merges the parts into the manifest once all are there.
A manifest is trusted only if its digest is the one in a stage's COMMITTED.json or in an attempt's intent.

Refuses to repair and to choose: it says what is wrong (`inspect`), or raises the first fault (`fetch`, `verify`). It deletes only what was
uploaded of a checkpoint that will have no manifest (`discard`).
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, NonNegativeInt, ValidationError

from orchestrator.errors import CorruptCheckpoint, NotFound, Refused
from orchestrator.ledger.keys import Keys
from orchestrator.ledger.record import Damaged, sha256
from orchestrator.ledger.records import FileRef, Intent, Manifest, Part, weights_digest
from orchestrator.ports import Store, check_key

MANIFEST = "MANIFEST.json"
CHECKPOINT = "CHECKPOINT.json"
"""The trainer's own description of a checkpoint; a directory without it is not complete (docs/contracts.md §1)."""
TRANSFERS = 4
"""How many files of a checkpoint are transferred at once. Three of each rank are large: weights, EMA, optimizer."""

FaultKind = Literal[
    "committed_missing", "committed_damaged", "committed_edited",
    "intent_missing", "intent_damaged",
    "manifest_missing", "manifest_damaged", "manifest_edited",
    "other_stage", "older_checkpoint", "incomplete",
    "file_missing", "file_truncated", "file_changed", "file_extra",
    "inputs_mismatch", "parent_mismatch",
]  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One thing that is not as it was committed."""

    kind: FaultKind
    key: str
    text: str
    """The fact with both values, without the key."""

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


@dataclass(frozen=True)
class Place:
    """Where a checkpoint lies, read from the key of its manifest."""

    pipeline: str
    stage: str
    inputs_digest: str
    step: int
    attempt: int

    @classmethod
    def parse(cls, manifest_key: str) -> Place | None:
        match = re.fullmatch(r"([^/]+)/stages/([^/@]+)@([^/@]+)/checkpoints/step-(\d{8,})-a(\d+)/MANIFEST\.json", manifest_key)
        return match and cls(match[1], match[2], match[3], int(match[4]), int(match[5]))

    @classmethod
    def of(cls, manifest: Manifest) -> Place:
        return cls(manifest.pipeline, manifest.stage, manifest.inputs_digest, manifest.step, manifest.attempt)

    def __str__(self) -> str:
        return f"{self.stage}@{self.inputs_digest} step {self.step} of attempt {self.attempt}"


@dataclass(frozen=True)
class Published:
    """A checkpoint that has its manifest, whether or not it is a stage's result. Its fields are named as those of `records.Committed`."""

    run_key: str
    stage: str
    inputs_digest: str
    attempt: int
    step: int
    manifest: str
    """Key of MANIFEST.json."""
    manifest_digest: str
    weights_digest: str

    @classmethod
    def of(cls, key: str, manifest: Manifest) -> Published:
        one = manifest
        return cls(one.run_key, one.stage, one.inputs_digest, one.attempt, one.step, key, one.digest(), one.weights_digest)


class _Description(BaseModel):
    """The fields of CHECKPOINT.json that are read here; only the trainer uses the others."""

    step: NonNegativeInt
    complete: bool
    files: dict[str, NonNegativeInt]


Over = Callable[[], str]
"""Says why an attempt is over. Empty means that it still counts. An agent asks it right before it writes each manifest."""


def counts() -> str:
    """The `Over` of an attempt that nobody can close."""
    return ""


def check_counts(step: int, over: Over) -> None:
    """Raise Refused if the attempt is over: then none of its checkpoints is published any more."""
    if why := over():
        raise Refused(f"the checkpoint of step {step} is not published: {why}")


def publish(store: Store, intent: Intent, directory: Path, over: Over = counts) -> tuple[str, Manifest]:
    """Upload a complete checkpoint directory, then write its manifest. Returns the manifest's key and the manifest.

    Repeatable: what was uploaded before is not uploaded again. Raises CorruptCheckpoint if the directory is not what its CHECKPOINT.json
    says, StoreConflict if other content was published under the same step and attempt, Refused if the attempt is over before the manifest
    is written, Unreachable.
    """
    description = _describe(directory)
    files = _upload(store, _prefix(intent, description.step), directory, {*description.files, CHECKPOINT})
    check_counts(description.step, over)
    return _seal(store, intent, description.step, description.complete, files)


def discard(store: Store, intent: Intent, step: int) -> None:
    """Remove what was uploaded of a checkpoint that will never have a manifest. Raises Unreachable, Refused."""
    prefix = _prefix(intent, step) + "/"
    names = list(store.list(prefix))
    if prefix + MANIFEST not in names:
        for key in names:
            store.discard(key)


def publish_part(store: Store, intent: Intent, directory: Path, node: int) -> Part:
    """Upload one node's files of a checkpoint, then write its part. Repeatable. Raises as `publish` does."""
    description = _describe(directory)
    files = _upload(store, _prefix(intent, description.step), directory, description.files)
    part = Part(node=node, step=description.step, complete=description.complete, files=files)
    key = Keys(intent.pipeline).part(intent.stage, intent.inputs_digest, intent.attempt, description.step, node)
    store.create(key, part.encode())
    return part


def merge_parts(store: Store, intent: Intent, step: int, description: bytes, over: Over = counts) -> tuple[str, Manifest] | None:
    """Merge all nodes' parts into a checkpoint. Returns the manifest's key and the manifest. None means that a part is not there yet.

    `description` is node 0's CHECKPOINT.json; it is written with the files of all nodes. Repeatable.
    Raises CorruptCheckpoint if the parts are not of one checkpoint, Refused if the attempt is over before the manifest is written,
    StoreConflict, Unreachable.
    """
    keys = [Keys(intent.pipeline).part(intent.stage, intent.inputs_digest, intent.attempt, step, node) for node in range(intent.nodes)]
    if not {*keys} <= {*store.list(keys[0].removesuffix("000.json"))}:
        return None
    parts = [_read_part(store, key) for key in keys]
    files: dict[str, FileRef] = {}
    for key, part in zip(keys, parts, strict=True):
        twice = sorted(files.keys() & part.files.keys())
        if twice or part.complete != parts[0].complete:
            fact = f"{twice[0]} is a file of another node too" if twice else f"complete is {part.complete}, node 0 says {parts[0].complete}"
            raise CorruptCheckpoint(f"checkpoint part {key}: {fact}; every node must run the same trainer on the same stage")
        files |= part.files
    files = dict(sorted(files.items()))
    content = json.loads(description) | {"files": {name: file.size for name, file in files.items()}}
    data = json.dumps(content, indent=1).encode() + b"\n"
    store.create(f"{_prefix(intent, step)}/{CHECKPOINT}", data)
    check_counts(step, over)
    return _seal(store, intent, step, parts[0].complete, files | {CHECKPOINT: FileRef(size=len(data), sha256=sha256(data))})


def _read_part(store: Store, key: str) -> Part:
    try:
        return Part.decode(store.read(key).data)
    except Damaged as error:
        raise CorruptCheckpoint(f"checkpoint part {key}: cannot be read ({error}); start the attempt again") from error


def _prefix(intent: Intent, step: int) -> str:
    return Keys(intent.pipeline).checkpoint(intent.stage, intent.inputs_digest, step, intent.attempt)


def _upload(store: Store, prefix: str, directory: Path, files: Iterable[str]) -> dict[str, FileRef]:
    names = sorted(files)

    def send(name: str) -> FileRef:
        path = directory / name
        reference = FileRef(size=path.stat().st_size, sha256=_digest(path))
        store.upload(f"{prefix}/{name}", path)
        return reference

    with ThreadPoolExecutor(TRANSFERS) as pool:
        return dict(zip(names, pool.map(send, names), strict=True))


def _seal(store: Store, intent: Intent, step: int, complete: bool, files: dict[str, FileRef]) -> tuple[str, Manifest]:
    """Write the manifest. From then on the checkpoint exists for others."""
    manifest = Manifest(
        run_key=intent.run_key,
        pipeline=intent.pipeline,
        stage=intent.stage,
        inputs_digest=intent.inputs_digest,
        attempt=intent.attempt,
        step=step,
        complete=complete,
        config_digest=intent.config_digest,
        code=intent.code,
        parent_manifest=intent.parent.manifest_digest if intent.parent else None,
        files=files,
        weights_digest=weights_digest(files),
    )
    key = f"{_prefix(intent, step)}/{MANIFEST}"
    store.create(key, manifest.encode())
    return key, manifest


def fetch(store: Store, manifest_key: str, manifest_digest: str, target: Path, *, patience_s: float | None = None) -> Manifest:
    """Download a checkpoint and compare every byte. `target` appears whole or not at all. `patience_s` is that of `Store.download`.

    Raises CorruptCheckpoint, which names the file and both values, FileExistsError, Unreachable.
    """
    if target.exists():
        raise FileExistsError(f"{target}: a checkpoint is never fetched over what is there")
    manifest = verify(store, manifest_key, manifest_digest, full=False)
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    prefix = manifest_key.removesuffix(MANIFEST)

    def receive(name: str) -> Fault | None:
        return _bring(store, prefix + name, manifest.files[name], partial / name, patience_s)

    try:
        with ThreadPoolExecutor(TRANSFERS) as pool:
            faults = [fault for fault in pool.map(receive, manifest.files) if fault]
        if faults:
            raise _corrupt(faults)
        partial.rename(target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return manifest


def verify(store: Store, manifest_key: str, manifest_digest: str, *, full: bool) -> Manifest:
    """The manifest, if it and its files are what was committed. With `full` every byte is read; otherwise names and sizes are compared.

    Raises CorruptCheckpoint, which names the file and both values, Unreachable.
    """
    manifest, faults = inspect(store, manifest_key, manifest_digest, full=full)
    if faults or manifest is None:
        raise _corrupt(faults)
    return manifest


def inspect(store: Store, manifest_key: str, manifest_digest: str, *, full: bool) -> tuple[Manifest | None, list[Fault]]:
    """The manifest that lies there, and all faults. If the manifest cannot be trusted, no file is checked. Raises Unreachable."""
    try:
        data = store.read(manifest_key).data
    except NotFound:
        return None, [Fault("manifest_missing", manifest_key, f"is not there; committed was {manifest_digest}")]
    try:
        manifest = Manifest.decode(data)
    except Damaged as error:
        return None, [Fault("manifest_damaged", manifest_key, f"cannot be read ({error}); committed was {manifest_digest}")]
    if sha256(data) != manifest_digest:
        return manifest, [_other_manifest(manifest_key, manifest, sha256(data), manifest_digest)]
    prefix = manifest_key.removesuffix(MANIFEST)
    there = {key.removeprefix(prefix) for key in store.list(prefix)} - {MANIFEST}
    faults = [
        Fault("file_extra", prefix + name, "is no file of this checkpoint; it was put there later")
        for name in sorted(there - set(manifest.files))
    ]
    for name, reference in sorted(manifest.files.items()):
        if name not in there:
            faults.append(Fault("file_missing", prefix + name, f"is not there; committed were {reference.size} bytes"))
        elif fault := _compare(store, prefix + check_key(name), reference, full=full):
            faults.append(fault)
    return manifest, faults


def _describe(directory: Path) -> _Description:
    """The description of a complete checkpoint directory. Raises CorruptCheckpoint."""
    try:
        description = _Description.model_validate_json((directory / CHECKPOINT).read_bytes())
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CorruptCheckpoint(f"checkpoint {directory}: has no {CHECKPOINT}, so it was never finished") from error
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptCheckpoint(f"checkpoint {directory / CHECKPOINT}: {'.'.join(map(str, first['loc']))}: {first['msg']}") from error
    for name, size in description.files.items():
        path = directory / check_key(name)
        if path.is_symlink() or not path.is_file():
            raise CorruptCheckpoint(f"checkpoint {path}: is not a file; {CHECKPOINT} says that it has {size} bytes")
        if path.stat().st_size != size:
            raise CorruptCheckpoint(f"checkpoint {path}: has {path.stat().st_size} bytes; {CHECKPOINT} says {size}")
    return description


def _other_manifest(key: str, manifest: Manifest, found: str, committed: str) -> Fault:
    place, lies = Place.of(manifest), Place.parse(key)
    values = f"digest {found}, committed was {committed}"
    if lies is None or place == lies:
        return Fault("manifest_edited", key, f"was edited: {values}")
    if (place.pipeline, place.stage, place.inputs_digest) != (lies.pipeline, lies.stage, lies.inputs_digest):
        return Fault("other_stage", key, f"is the manifest of {place}, not of {lies}: {values}")
    kind: FaultKind = "older_checkpoint" if place.step < lies.step or place.attempt < lies.attempt else "manifest_edited"
    return Fault(kind, key, f"is the manifest of {place}, not of {lies}: {values}")


def _compare(store: Store, key: str, reference: FileRef, *, full: bool) -> Fault | None:
    if not full:
        return _size_fault(key, store.size(key), reference)
    try:
        return _content_fault(key, *store.digest(key), reference)
    except NotFound:
        return _missing(key, reference)


def _bring(store: Store, key: str, reference: FileRef, path: Path, patience_s: float | None) -> Fault | None:
    try:
        store.download(key, path, patience_s=patience_s)
    except NotFound:
        return _missing(key, reference)
    return _content_fault(key, path.stat().st_size, _digest(path), reference)


def _missing(key: str, reference: FileRef) -> Fault:
    return Fault("file_missing", key, f"is not there; committed were {reference.size} bytes")


def _content_fault(key: str, size: int, digest: str, reference: FileRef) -> Fault | None:
    if fault := _size_fault(key, size, reference):
        return fault
    return None if digest == reference.sha256 else Fault("file_changed", key, f"sha256 {digest}, committed was {reference.sha256}")


def _size_fault(key: str, size: int, reference: FileRef) -> Fault | None:
    if size == reference.size:
        return None
    return Fault("file_truncated" if size < reference.size else "file_changed", key, f"{size} bytes, committed were {reference.size}")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _corrupt(faults: list[Fault]) -> CorruptCheckpoint:
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return CorruptCheckpoint(f"checkpoint {faults[0]}{more}; put the committed file back; `osctl lineage --verify` lists all that is wrong")
