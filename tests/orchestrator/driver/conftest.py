"""A rig for each test."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from driver_rig import Clock, MemoryBackend, Rig

from orchestrator.stores.folder import FolderStore


@pytest.fixture(autouse=True)
def _no_power_cuts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drivers die here, machines do not: syncing every record to the disk would take most of the time."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)


@pytest.fixture
def rig(tmp_path: Path) -> Rig:
    store, clock = FolderStore(tmp_path / "store"), Clock()
    return Rig(store, clock, MemoryBackend(store, clock, tmp_path / "work"))
