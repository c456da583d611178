"""What an attempt is made of besides its checkpoints, brought into the run directory: the manifest of its data set.

Owns the way from an attempt's terms to `RUN_DIR/data.jsonl.gz` (docs/contracts.md §1). Refuses to bring in clips: the trainer
reads them where they lie, and compares them with the manifest.
"""

from __future__ import annotations

from pathlib import Path

from opensora.identity import Contents
from orchestrator import datasets
from orchestrator.errors import NotFound, Refused
from orchestrator.ports import Store

DATA = "data.jsonl.gz"


def bring_in(store: Store, contents: Contents, run_dir: Path) -> None:
    """Idempotent. Raises Refused, Unreachable, OSError."""
    if contents.data is not None:
        _write(run_dir / DATA, _manifest(store, contents.data))


def _manifest(store: Store, digest: str) -> bytes:
    try:
        return datasets.get_manifest(store, digest).encode()
    except NotFound as error:
        raise Refused(f"{datasets.manifest_key(digest)}: is not in {store.url}, though a launch recorded it; launch again") from error


def _write(path: Path, data: bytes) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_bytes(data)
    partial.replace(path)
