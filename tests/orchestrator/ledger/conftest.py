"""Ledgers on each kind of store."""

from __future__ import annotations

from pathlib import Path

import pytest
from real_ledger import Lies

from orchestrator.ledger.store import Ledger
from orchestrator.stores.folder import FolderStore
from orchestrator.stores.s3 import S3Store


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def lies(request: pytest.FixtureRequest, tmp_path: Path) -> Lies:
    if request.param == "folder":
        return Lies(FolderStore(tmp_path / "store"), tmp_path / "store", lambda: FolderStore(tmp_path / "store"))
    server = request.getfixturevalue("s3")
    prefix = f"ledger/{tmp_path.name}"

    def reach() -> S3Store:
        return S3Store(server.url(prefix), env=server.env)

    return Lies(reach(), server.root / server.bucket / prefix, reach)


@pytest.fixture
def ledger(lies: Lies) -> Ledger:
    return Ledger(lies.store, "demo")


@pytest.fixture
def folder_ledger(tmp_path: Path) -> Ledger:
    return Ledger(FolderStore(tmp_path / "store"), "demo")
