"""Checkpoints of a store on this machine: each is fetched and verified once, and kept under its manifest's digest."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from orchestrator.pipelines.workspace import Workspace

if TYPE_CHECKING:
    from orchestrator.ledger.checkpoints import Published
    from orchestrator.ledger.records import Committed
    from orchestrator.pipelines.host import Host


def fetched(workspace: Workspace, checkpoint: Committed | Published) -> tuple[Path, Host]:
    """The folder of a checkpoint, and this machine as its reader finds its encoders.

    The folder is named by the manifest's digest: each file in it was verified once, when it came. Raises Refused, Unreachable.
    """
    host = workspace.told_of_imports_of(checkpoint)
    return folder_of(workspace, host, checkpoint.manifest, checkpoint.manifest_digest), host


def folder_of(workspace: Workspace, host: Host, manifest: str, digest: str) -> Path:
    """The folder of any published checkpoint. `manifest`: key of its MANIFEST.json. Raises CorruptCheckpoint, Unreachable."""
    folder = host.home / "cache" / digest
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        workspace.ledger.fetch(manifest, digest, folder)
    return folder
