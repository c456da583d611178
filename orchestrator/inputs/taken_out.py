"""Whether the clips of a stage are of a version of a prepared data set from which a source was taken out (`osctl data remove`).

Such a version is deleted, or is about to be. Owns the words about it for whoever trains on one. Refuses to judge a version that is gone
for another reason: what its clips are read by says that.
"""

from __future__ import annotations

import json
import re
import shlex
import tempfile
from pathlib import Path

from opensora.config import FolderSource
from orchestrator.errors import NotFound
from orchestrator.inputs import datasets
from orchestrator.inputs.datasets import ROOT
from orchestrator.ledger.records import Intent
from orchestrator.ports import Store

VERSION = re.compile(rf"{ROOT}/(?P<name>[^/]+)/prepared/(?P<version>[^/]+)")


def said(store: Store, intent: Intent) -> str:
    """The fact and what to do. Empty: its clips are not of this store, or nothing was taken out of their version. Raises Unreachable."""
    source = intent.config.data.source
    place = source.path.removeprefix(f"{store.url}/").rstrip("/") if isinstance(source, FolderSource) else ""
    found = VERSION.fullmatch(place)
    if found is None:
        return ""
    name = found["name"]
    removed = {key.rpartition("/")[2].removesuffix(".json") for key in store.list(f"{ROOT}/{name}/removed/")}
    gone = removed & _sources(store, place, removed) if removed else removed
    if not gone:
        return ""
    these = ", ".join(one[:12] for one in sorted(gone)[:3])
    fact = f"data set {name}: {these} was taken out of it on request, and version {found['version']}, which held it, goes from {store.url}"
    known = datasets.of_name(store, name)
    if not known or known[-1].source.endswith(place):
        return f"{fact}. That was begun and is to be finished first: osctl data remove {sorted(gone)[0][:12]} --from {name}"
    return f"{fact}. Train on what the name means now: {anew(intent.pipeline, intent.stage, known[-1].source)}"


def anew(pipeline: str, stage: str, place: str) -> str:
    """The command that trains a stage that was launched anew on other clips."""
    return f"osctl resume {pipeline} --stage {stage} --anew {stage} --set {shlex.quote(f'{stage}.data.source.path={place}')}"


def _sources(store: Store, place: str, where_gone: set[str]) -> set[str]:
    """sha256 of the sources of a version; of one that is not there any more, nobody can say which it held."""
    with tempfile.TemporaryDirectory() as folder:  # of 400,000 clips it has 60 MB: no record that `read` takes into memory
        try:
            store.download(f"{place}/DATASET.json", Path(folder, "DATASET.json"))
        except NotFound:
            return where_gone
        return {str(one["sha256"]) for one in json.loads(Path(folder, "DATASET.json").read_bytes())["sources"]}
