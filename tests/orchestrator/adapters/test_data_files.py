"""Clips are hashed where they lie, once: a second look costs a look at sizes and dates, and is never wrong for it."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from opensora.config import FolderSource, ManifestSource
from opensora.data.manifest import rows_that_differ
from orchestrator.adapters.data_files import SETTLED_S, DataFiles
from orchestrator.datasets import TooMuch
from orchestrator.errors import NotFound, UsageError

CSV = "path,text\na.mp4,one\nmore/b.mp4,two\n"


@pytest.fixture
def clips(tmp_path: Path) -> Path:
    folder = tmp_path / "clips"
    (folder / "more").mkdir(parents=True)
    (folder / "captions.csv").write_text(CSV)
    (folder / "a.mp4").write_bytes(b"film a")
    (folder / "more/b.mp4").write_bytes(b"film b")
    settle(folder)
    return folder


def settle(folder: Path, ago_s: float = 100.0) -> None:
    """Old dates of content; those of the inode are the kernel's, so `looked` takes a clock that is ahead."""
    for path in folder.rglob("*"):
        os.utime(path, (time.time() - ago_s, time.time() - ago_s))


def looked(home: Path, ahead_s: float = 100.0) -> DataFiles:
    return DataFiles(home, clock=lambda: time.time() + ahead_s)


def source(folder: Path) -> FolderSource:
    return FolderSource(kind="folder", path=str(folder))


def test_the_same_data_in_another_folder_with_other_dates_is_the_same(clips: Path, tmp_path: Path) -> None:
    shutil.copytree(clips, tmp_path / "copy", copy_function=shutil.copyfile)
    files = looked(tmp_path / "home")
    assert files.manifest(source(clips)).digest == files.manifest(source(tmp_path / "copy")).digest


def test_a_second_look_reads_nothing_and_finds_what_changed(clips: Path, tmp_path: Path) -> None:
    first = looked(tmp_path / "home").manifest(source(clips))
    again = looked(tmp_path / "home")
    assert again.manifest(source(clips)) == first and again.bytes_read == 0
    (clips / "a.mp4").write_bytes(b"film x")  # as long as before
    third = looked(tmp_path / "home")
    assert [(one.path, one.kind) for one in rows_that_differ(first, third.manifest(source(clips)))] == [("a.mp4", "content")]
    assert third.bytes_read == 6, "the file that changed, and no other"


def test_a_file_replaced_with_its_old_date_is_read_again(clips: Path, tmp_path: Path) -> None:
    first = looked(tmp_path / "home").manifest(source(clips))
    date = (clips / "a.mp4").stat().st_mtime_ns
    (clips / "a.mp4").write_bytes(b"film x")
    os.utime(clips / "a.mp4", ns=(date, date))
    assert looked(tmp_path / "home").manifest(source(clips)).digest != first.digest


def test_what_was_touched_a_moment_ago_is_read_again(clips: Path, tmp_path: Path) -> None:
    """Two changes within the resolution of a file system have one date."""
    now = DataFiles(tmp_path / "home")
    now.manifest(source(clips))
    assert now.bytes_read == 12
    again = DataFiles(tmp_path / "home")
    again.manifest(source(clips))
    assert again.bytes_read == 12, f"their inodes changed less than {SETTLED_S} s before they were read"


def test_files_that_cannot_be_read_are_rows_without_content(clips: Path, tmp_path: Path) -> None:
    whole = looked(tmp_path / "home").manifest(source(clips))
    (clips / "a.mp4").unlink()
    lost = looked(tmp_path / "home").manifest(source(clips))
    assert lost.unreadable == 1 and lost.rows[0].sha256 is None and lost.digest != whole.digest


@pytest.mark.parametrize("damage", [b"", b"no database at all, but long enough to be read as one" * 40])
def test_a_memory_that_is_lost_or_damaged_costs_a_read(clips: Path, tmp_path: Path, damage: bytes) -> None:
    first = looked(tmp_path / "home").manifest(source(clips))
    (tmp_path / "home/seen.sqlite").write_bytes(damage)
    assert looked(tmp_path / "home").manifest(source(clips)) == first


def test_objects_at_an_address_are_the_same_data_set_as_files(clips: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(clips), "/far", recursive=True)
    far, near = looked(tmp_path / "home").manifest(source("memory://far")), looked(tmp_path / "home").manifest(source(clips))  # type: ignore[arg-type]
    assert far.digest == near.digest


def test_a_csv_names_files_anywhere(clips: Path, tmp_path: Path) -> None:
    (tmp_path / "all.csv").write_text(f"path,text\n{clips}/a.mp4,one\nclips/more/b.mp4,two\n")
    files = looked(tmp_path / "home")
    listed = files.manifest(ManifestSource(kind="manifest", path=str(tmp_path / "all.csv"), clips=2))
    assert listed.digest == files.manifest(source(clips)).digest
    with pytest.raises(UsageError, match=r"clips is 3, but .*all.csv has 2 rows"):
        files.manifest(ManifestSource(kind="manifest", path=str(tmp_path / "all.csv"), clips=3))


def test_by_name_nothing_is_opened(clips: Path, tmp_path: Path) -> None:
    shutil.rmtree(clips / "more")
    files = looked(tmp_path / "home")
    assert files.manifest(source(clips), by="name").by == "name" and files.bytes_read == 0


def test_more_than_a_look_may_read_is_not_begun(clips: Path, tmp_path: Path) -> None:
    files = looked(tmp_path / "home")
    with pytest.raises(TooMuch, match="2 files of 12 bytes"):
        files.manifest(source(clips), at_most=11)
    assert files.bytes_read == 0


def test_what_is_not_there_is_said_as_such(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        looked(tmp_path / "home").manifest(source(tmp_path / "none"))


@pytest.mark.s3
def test_objects_of_a_bucket_are_read_once(clips: Path, tmp_path: Path, s3, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from orchestrator.adapters.s3 import S3Store

    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    store = S3Store(s3.url("clips"))
    for path in clips.rglob("*"):
        if path.is_file():
            store.create(str(path.relative_to(clips)), path.read_bytes())
    files = DataFiles(tmp_path / "home")
    far = files.manifest(source(s3.url("clips")))
    assert far.digest == looked(tmp_path / "home").manifest(source(clips)).digest and files.bytes_read == 12
    again = DataFiles(tmp_path / "home")
    assert again.manifest(source(s3.url("clips"))) == far and again.bytes_read == 0
