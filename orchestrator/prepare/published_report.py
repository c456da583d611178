"""The page of a preparation among the files of its data set, so that whoever has the store can read it: `report.html`.

Owns when it is written and how it is found again. Refuses to know what stands on it (`report`).
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from orchestrator.errors import CorruptCheckpoint, NotFound
from orchestrator.inputs import datasets
from orchestrator.ports import Store
from orchestrator.prepare.clip_rows import Clips
from orchestrator.prepare.publish import described
from orchestrator.prepare.records import DATASET
from orchestrator.prepare.report import page
from orchestrator.prepare.run_directory import RunDirectory, write_json, write_text

REPORT = "report.html"
MOST = 20_000
"""Clips that were cut; of more the page is made when somebody asks for it. It reads what is kept of each: some milliseconds a clip."""


def add(directory: RunDirectory, now: float) -> bool:
    """Write the page beside the data and into DATASET.json. False: there are too many clips. Repeatable. Raises OSError."""
    about = directory.description()
    if REPORT in about["files"]:
        return True
    if int(about["steps"].get("filter", {}).get("in", 0)) > MOST:
        return False
    path = directory.out / REPORT
    with Clips.of(directory) as clips:
        write_text(path, page(clips, directory.status(), None, now))
    data = path.read_bytes()
    entry = {REPORT: {"size": len(data), "sha256": hashlib.sha256(data).hexdigest()}}
    write_json(directory.out / DATASET, about | {"files": about["files"] | entry})
    return True


def find(store: Store, name: str) -> bytes | None:
    """The page of what a name means now. None: it has none. Raises CorruptCheckpoint where it is another one, Unreachable."""
    known = datasets.of_name(store, name)
    if not known or known[-1].prepared is None:
        return None
    version = known[-1].source.rpartition("/")[2]
    try:
        about = described(store, name, version)
    except NotFound:
        return None
    if REPORT not in about.files:
        return None
    place = f"{known[-1].source}/{REPORT}"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, REPORT)
        try:
            store.download(place.removeprefix(f"{store.url}/"), path)
        except NotFound:
            raise CorruptCheckpoint(f"{place}: is gone, and {DATASET} names it. Prepare it again: osctl prepare run --retry") from None
        data = path.read_bytes()
    if hashlib.sha256(data).hexdigest() != about.files[REPORT]["sha256"]:
        raise CorruptCheckpoint(f"{place}: is not the page that {DATASET} names. Prepare it again: osctl prepare run --retry")
    return data
