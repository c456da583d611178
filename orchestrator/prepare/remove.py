"""A source is taken out of a data set on request: a version without its clips, and nothing left of them in the store.

The order, so that whoever is interrupted may run it again: the request is written down (no later preparation uses the source), the shorter
version is published, the name means it, then every older version that holds the source goes, and what was kept of it. Latents of the data
set hold its clips too and go with the older version. Owns that order, and which models were trained on what held the source. Refuses to
touch the raw video, which is a person's, and checkpoints, which cannot forget.
"""

from __future__ import annotations

import contextlib
import csv
import hashlib
import io
import json
import shutil
from collections import defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from opensora.dataset.prepared_rows import ROWS_A_GROUP, digest_of_rows
from opensora.printable import several
from orchestrator.driver.clock import SystemClock
from orchestrator.errors import CorruptCheckpoint, NotFound, Refused, StoreConflict
from orchestrator.inputs import datasets
from orchestrator.ledger.lease import LeaseHandle
from orchestrator.ledger.store import Ledger
from orchestrator.ports import Store, check_key
from orchestrator.prepare import removed, status_object
from orchestrator.prepare.kept import KeptResults, key_of
from orchestrator.prepare.mirror import Mirror
from orchestrator.prepare.publish import CAPTIONS, Description, Published, described, publish, register
from orchestrator.prepare.records import DATASET, REASON, Keys, Removed
from orchestrator.prepare.run_directory import RunDirectory, write_json
from orchestrator.prepare.trainings import Training, trainings_on

MANIFEST = "manifest.parquet"


@dataclass(frozen=True)
class Meant:
    """A source of a data set."""

    name: str
    """Of the data set."""
    source: Mapping[str, Any]
    """{name, uri, sha256, licence, clips}."""


@dataclass(frozen=True)
class Taken:
    """What came of it."""

    meant: Meant
    published: Published
    """The version that the name means now."""
    objects: int
    """Removed from the store."""
    trainings: tuple[Training, ...]
    """That used a version which held it, whether finished or not."""


def find(store: Store, wanted: str, name: str | None) -> Meant:
    """The source of that name, address or sha256 (6 digits or more), in the data set of that name or in the only one that has it.

    Raises Refused where none has it, or several; Unreachable.
    """
    found = []
    for one in datasets.registered(store):
        if one.prepared is not None and name in (None, one.name):
            found += [Meant(one.name, source) for source in _sources(store, one.name) if _is(source, wanted)]
    unique = {(meant.name, meant.source["sha256"]): meant for meant in found}
    if len(unique) == 1:
        return next(iter(unique.values()))
    where = f"data set {name}" if name is not None else f"the prepared data sets of {store.url}"
    if not unique:
        raise Refused(f"data remove {wanted}: {where} has no such source. `osctl data show NAME --about` lists sources")
    those = ", ".join(f"{meant.source['name']} of {meant.name}" for meant in list(unique.values())[:5])
    raise Refused(f"data remove {wanted}: means {several(len(unique), 'source')}: {those}. Give its sha256, and --from NAME")


def take_out(store: Store, meant: Meant, folder: Path, lease: LeaseHandle, *, now: float, holder: str) -> Taken:
    """Take a source out. Repeatable. `folder`: the run directory of this machine. Raises Refused, CorruptCheckpoint, Unreachable."""
    keys, sha256 = Keys(meant.name), str(meant.source["sha256"])
    current = datasets.of_name(store, meant.name)[-1]
    about = described(store, meant.name, current.source.rpartition("/")[2])
    if not any(source["sha256"] != sha256 for source in about.sources):
        raise Refused(f"data set {meant.name}: {meant.source['name']} is its only source, and a data set without clips is none")
    record = Removed(sha256=sha256, uri=str(meant.source["uri"]), source=str(meant.source["name"]), time=now, holder=holder)
    with contextlib.suppress(StoreConflict):  # asked before
        store.create(keys.removed(sha256), record.encode())
    published = Published(current.source, about, new=False)
    if any(source["sha256"] == sha256 for source in about.sources):
        with TemporaryDirectory(prefix="osctl-") as place:
            out = Path(place)
            _shortened(store, keys.version(current.source.rpartition("/")[2]), about, sha256, out)
            published = publish(store, meant.name, out)
            register(store, meant.name, published, (out / CAPTIONS).read_bytes(), now=now, holder=holder)
    held = [version for version in store.children(f"{keys.folder}/prepared/") if _holds(store, meant.name, version, sha256)]
    _remember(store, meant.name, held)
    objects = _forget_kept(store, keys, folder, sha256)
    for version in held:
        objects += _discard_version(store, keys.version(version))
    _forget_here(folder, sha256)
    _tell_status(store, keys, folder, published.description, now)
    Ledger(store, keys.folder).append_event(lease, "observed", now=now, detail=f"took out {sha256} ({meant.source['uri']}), by {holder}")
    return Taken(meant, published, objects, tuple(trainings_on(store, manifests_with(store, meant))))


def manifests_with(store: Store, meant: Meant) -> set[str]:
    """Digests of the manifests that the name meant and that hold, or held, the source: also of versions that are deleted. Raises
    Unreachable."""
    keys, sha256 = Keys(meant.name), str(meant.source["sha256"])
    versions = [version for version in store.children(f"{keys.folder}/prepared/") if _holds(store, meant.name, version, sha256)]
    return removed.manifests_that_held(store, keys, sha256) | {manifest for _, manifest in _registered(store, meant.name, versions)}


def _registered(store: Store, name: str, versions: Collection[str]) -> list[tuple[str, str]]:
    """(version, digest of its manifest) of each of these versions that the name meant."""
    prefix = f"{store.url}/{Keys(name).version('')}"
    known = ((one.source.removeprefix(prefix), one.manifest) for one in datasets.of_name(store, name) if one.source.startswith(prefix))
    return [(version, manifest) for version, manifest in known if version in versions]


def _remember(store: Store, name: str, held: Collection[str]) -> None:
    """Which sources versions held that are deleted next."""
    for version, manifest in _registered(store, name, held):
        with contextlib.suppress(NotFound, CorruptCheckpoint):
            sources = [str(source["sha256"]) for source in described(store, name, version).sources]
            removed.remember(store, Keys(name), manifest, sources)


# --- The shorter version ----------------------------------------------------------------------------------------------------------------


def _shortened(store: Store, folder: str, about: Description, sha256: str, out: Path) -> None:
    """Write the data set without a source into `out`. Raises CorruptCheckpoint, Unreachable."""
    import pyarrow.compute
    from pyarrow import parquet

    for name in (MANIFEST, CAPTIONS):
        if name in about.files:
            store.download(f"{folder}/{name}", out / name)
    table = parquet.read_table(out / MANIFEST)
    gone = table.filter(pyarrow.compute.equal(table["source_sha256"], sha256))
    left = table.filter(pyarrow.compute.not_equal(table["source_sha256"], sha256))
    if not len(left):
        raise Refused(
            f"data set {about.name}: this is its only source, and a data set without clips is none. Keep another one under its name"
        )
    rows = (row for batch in left.to_batches(ROWS_A_GROUP) for row in batch.to_pylist())
    digest = digest_of_rows(rows, left.schema.names)
    said = {**(left.schema.metadata or {}), b"osctl.digest": digest.encode()}
    parquet.write_table(left.replace_schema_metadata(said), out / MANIFEST, row_group_size=ROWS_A_GROUP)
    dropped = set(gone["path"].to_pylist())
    (out / CAPTIONS).write_bytes(_without_rows((out / CAPTIONS).read_bytes(), dropped))
    files: dict[str, Mapping[str, Any]] = {}
    for path, one in about.files.items():
        if path.startswith("clips/") and path not in dropped:
            store.download(check_key(f"{folder}/{path}"), out / path)
            files[path] = one
    for name in (MANIFEST, CAPTIONS):
        data = (out / name).read_bytes()
        files[name] = {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    config = dict(about.config)
    config["exclude"] = sorted({*config.get("exclude", ()), sha256})
    spans = zip(left["start_s"].to_pylist(), left["end_s"].to_pylist(), strict=True)
    size = sum(int(one["size"]) for path, one in files.items() if path.startswith("clips/"))
    counts = {"in": len(table), "kept": len(left), "dropped": {REASON: len(gone)}, "quarantined": {}}
    write_json(
        out / DATASET,
        {
            **about.content, "digest": digest, "clips": len(left), "files": files, "config": config,
            "seconds": round(sum(end - start for start, end in spans), 3),
            "frames": sum(left["frames"].to_pylist()), "bytes": size,
            "sources": [source for source in about.sources if source["sha256"] != sha256], "steps": {**about.steps, "removed": counts},
        },
    )  # fmt: skip


def _without_rows(captions: bytes, paths: set[str]) -> bytes:
    lines = list(csv.reader(io.StringIO(captions.decode("utf-8-sig"), newline="")))
    text = io.StringIO()
    place = lines[0].index("path")
    csv.writer(text).writerows([lines[0], *(line for line in lines[1:] if line[place] not in paths)])
    return text.getvalue().encode()


# --- What is taken away -----------------------------------------------------------------------------------------------------------------


def _holds(store: Store, name: str, version: str, sha256: str) -> bool:
    """Whether a version holds the source, or may: one without DATASET.json is what a killed launcher left, and nothing names it."""
    try:
        return any(source["sha256"] == sha256 for source in described(store, name, version).sources)
    except (NotFound, CorruptCheckpoint):
        return True


def _discard_version(store: Store, folder: str) -> int:
    """DATASET.json last, so that a second try finds what is left."""
    found = sorted(store.list(f"{folder}/"), key=lambda key: key.endswith(f"/{DATASET}"))
    for key in found:
        store.discard(key)
    return len(found)


ORDER = ("matches", "caption", "clips", "scores", "text_area", "frames", "probe", "download")
"""A step by whose results those of another are found comes after it, so that whoever is interrupted finds what is left."""


def _forget_kept(store: Store, keys: Keys, folder: Path, sha256: str) -> int:
    """Remove results of steps that are of this source, here and in the store, under every digest; how many objects."""
    directory = RunDirectory(folder)
    mirror = Mirror(directory.kept, store, keys.kept)
    mirror.bring_back()
    with KeptResults(folder) as kept:
        gone = _results_of(sha256, kept)
        objects = 0
        for step in ORDER:
            for digest in kept.all_digests(step):
                for name in kept.packs_with(gone[step], step, digest):
                    mirror.shorten(name, gone[step])
                    objects += 1
                files = [kept.path(step, key, digest, suffix) for key in sorted(gone[step]) for suffix in (".json", ".mp4")]
                there = [name for name in files if (directory.kept / name).is_file()]
                mirror.forget(there)
                objects += len(there)
    return objects


def _results_of(sha256: str, kept: KeptResults) -> Mapping[str, set[str]]:
    """Keys of all results that are of a source, by step."""
    gone = defaultdict[str, set[str]](set)
    for key, fetched in kept.all_fetched():
        if fetched.sha256 == sha256:
            gone["download"].add(key)
            for digest in kept.all_digests("frames"):
                found = kept.found(fetched, digest)
                gone["frames"].add(found.key)
                for clip, _ in found.clips():
                    for step in ("clips", "text_area", "scores"):
                        gone[step].add(clip)
                    keys = kept.caption_keys(fetched, clip)
                    gone["caption"].update(keys)
                    gone["matches"].update(key_of(clip, text) for text in kept.captions(keys))
    gone["probe"] = gone["frames"]
    return gone


def _forget_here(folder: Path, sha256: str) -> None:
    """The data set in the run directory holds its clips, too; the next preparation makes it anew of what is kept."""
    directory = RunDirectory(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = json.loads((directory.out / DATASET).read_bytes())
        if any(source["sha256"] == sha256 for source in content["sources"]):
            shutil.rmtree(directory.out)


def _tell_status(store: Store, keys: Keys, folder: Path, about: Description, now: float) -> None:
    """What `osctl prepare status` counts: the steps of the last run, and the clips that went since. Raises Unreachable."""
    here = RunDirectory(folder).status()
    status = max(here, status_object.read(store, keys.status), key=lambda one: float(one.get("time") or 0))
    steps = status.get("steps")
    if not isinstance(steps, dict) or "removed" not in about.steps:
        return
    told = {**status, "time": now, "steps": {**steps, "removed": about.steps["removed"]}}
    if here:
        write_json(folder / "status.json", told)
    status_object.StatusObject(store, keys.status, SystemClock()).write(told)


def _sources(store: Store, name: str) -> list[Mapping[str, Any]]:
    """Of what the name means now, and those that were asked to go before: a second try finishes the first."""
    current = datasets.of_name(store, name)[-1]
    again = [
        {"name": one.source, "uri": one.uri, "sha256": one.sha256, "licence": "", "clips": 0} for one in removed.all_of(store, Keys(name))
    ]
    try:
        return [*described(store, name, current.source.rpartition("/")[2]).sources, *again]
    except NotFound:
        return list(again)


def _is(source: Mapping[str, Any], wanted: str) -> bool:
    return wanted in (source["name"], source["uri"]) or (len(wanted) >= 6 and str(source["sha256"]).startswith(wanted.lower()))
