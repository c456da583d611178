"""Tars and Parquet in a bucket give the manifest that they give on a disk."""

from __future__ import annotations

import io
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest

from orchestrator.inputs.data_files import DataFiles
from orchestrator.inputs.own_clips import source_of

pytestmark = pytest.mark.s3


def fill(folder: Path) -> None:
    (folder / "tars").mkdir(parents=True)
    (folder / "table").mkdir()
    with tarfile.open(folder / "tars/s.tar", "w") as shard:
        for name, content in (("a.mp4", b"film a"), ("a.txt", b"a box"), ("b.mp4", b"film b"), ("b.json", b'{"caption": "a cone"}')):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            shard.addfile(info, io.BytesIO(content))
    (folder / "table/a.mp4").write_bytes(b"film a")
    parquet.write_table(arrow.table({"path": ["a.mp4"], "text": ["a box"]}), folder / "table/set.parquet")


@pytest.mark.parametrize("place", ["tars", "tars/s.tar", "table", "table/set.parquet"])
def test_a_bucket_is_read_as_a_disk_is(tmp_path: Path, s3: Any, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    fill(tmp_path / "disk")
    bucket = s3.root / s3.bucket / f"packed-{place.replace('/', '-')}"
    fill(bucket)
    near = DataFiles(tmp_path / "home").manifest(source_of(str(tmp_path / "disk" / place)))
    far = DataFiles(tmp_path / "home", s3.env).manifest(source_of(s3.url(f"packed-{place.replace('/', '-')}/{place}")))
    assert far.digest == near.digest and far.unreadable == 0
