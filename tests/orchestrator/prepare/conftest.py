"""A folder of "videos", a store, and preparations of them by the stand-in process."""

from __future__ import annotations

from pathlib import Path

import pytest
from prepare_bench import Bench

from orchestrator.stores import open_store
from orchestrator.stores.folder import FolderStore


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    folder = tmp_path / "videos"
    folder.mkdir()
    for name in ("a", "b", "c"):
        (folder / f"{name}.mp4").write_bytes(f"film {name}".encode() * 100)
    return folder


@pytest.fixture
def bench(tmp_path: Path, videos: Path) -> Bench:
    return Bench(tmp_path, FolderStore(tmp_path / "store"), videos)


@pytest.fixture
def any_bench(tmp_path: Path, videos: Path, request: pytest.FixtureRequest) -> Bench:
    """On a folder or on S3, as the test is parametrized (`BOTH`)."""
    if request.param == "folder":
        return Bench(tmp_path, FolderStore(tmp_path / "store"), videos)
    server = request.getfixturevalue("s3")
    return Bench(tmp_path, open_store(server.url(tmp_path.name), server.env), videos)
