"""What an attempt is made of besides its checkpoints, brought into the run directory: the manifest of its data set, imported weights and
encoders.

Owns the way from an attempt's terms to `RUN_DIR/data.jsonl.gz` and `RUN_DIR/imports/` (docs/contracts.md §1). Refuses to bring in clips:
the trainer reads them where they lie, and compares them with the manifest.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from opensora import imports as places
from opensora.errors import ConfigError
from opensora.identity import Contents
from orchestrator import modules
from orchestrator.errors import NotFound, Refused
from orchestrator.inputs import datasets, imports, taken_out
from orchestrator.inputs.contents import imports_of
from orchestrator.ledger.records import Intent
from orchestrator.ports import Store

DATA = "data.jsonl.gz"
PLACES = "imports.json"


class DataTakenOut(Refused):
    """A source was taken out of the data set since the launch: this version of it goes."""


def bring_in(store: Store, intent: Intent, contents: Contents, run_dir: Path) -> None:
    """Idempotent. Raises DataTakenOut, Refused, Unreachable, OSError."""
    if why := taken_out.said(store, intent):
        raise DataTakenOut(why)
    if contents.data is not None:
        _write(run_dir / DATA, _manifest(store, contents.data))
    try:
        known = {name: place for name, place in places.places().items() if Path(place).exists()}
    except ConfigError as error:
        raise Refused(str(error)) from error
    here = {}
    for role, name in imports_of(intent.config):
        digest = getattr(contents, role)
        if digest is not None and name not in known and imports.is_stored(store, digest):
            here[name] = str(imports.fetch(store, digest, run_dir / "imports" / digest))
        # else it lies here: the launcher said where, or a release that recorded nothing took it as it was named
    if here:
        _write(run_dir / PLACES, json.dumps({"schema": 1, "places": known | here}, indent=1).encode() + b"\n")


def with_places(variables: Mapping[str, str], run_dir: Path) -> dict[str, str]:
    """A trainer's environment: with the places of what was brought in, and with what reaches clips."""
    found = dict(variables)
    if (run_dir / PLACES).is_file():
        found[places.VARIABLE] = str(run_dir / PLACES)
    return modules.reading_clips(found)


def _manifest(store: Store, digest: str) -> bytes:
    try:
        return datasets.read_manifest(store, digest)[1]
    except NotFound as error:
        raise Refused(f"{datasets.manifest_key(digest)}: is not in {store.url}, though a launch recorded it; launch again") from error


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
