"""Clips are hashed where they lie, once: a second look costs a look at sizes and dates, and is never wrong for it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
import unicodedata
from pathlib import Path

import pytest

from opensora.config import FolderSource, ManifestSource
from opensora.dataset.manifest import rows_that_differ
from orchestrator.errors import NotFound, UsageError
from orchestrator.inputs.data_files import SETTLED_S, DataFiles
from orchestrator.inputs.datasets import TooMuch

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


def test_a_pipe_is_no_clip_and_ends_no_look(clips: Path, tmp_path: Path) -> None:
    (clips / "a.mp4").unlink()
    os.mkfifo(clips / "a.mp4")
    assert looked(tmp_path / "home").manifest(source(clips)).unreadable == 1


def test_a_name_under_which_no_file_can_lie_costs_its_row_alone(clips: Path, tmp_path: Path) -> None:
    (clips / "a.mp4").unlink()
    (clips / "a.mp4").symlink_to("a.mp4")
    (clips / "captions.csv").write_text(f"{CSV}{'long ' * 80}.mp4,long\n")
    found = looked(tmp_path / "home").manifest(source(clips))
    assert [row.sha256 is None for row in found.rows] == [True, False, True]


@pytest.mark.parametrize("damage", [b"", b"no database at all, but long enough to be read as one" * 40])
def test_a_memory_that_is_lost_or_damaged_costs_a_read(clips: Path, tmp_path: Path, damage: bytes) -> None:
    first = looked(tmp_path / "home").manifest(source(clips))
    (tmp_path / "home/seen.sqlite").write_bytes(damage)
    assert looked(tmp_path / "home").manifest(source(clips)) == first


def test_objects_at_an_address_are_the_same_data_set_as_files(clips: Path, tmp_path: Path) -> None:
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.put(str(clips), "/data-files", recursive=True)
    far, near = looked(tmp_path / "home").manifest(source("memory://data-files")), looked(tmp_path / "home").manifest(source(clips))  # type: ignore[arg-type]
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


BROKEN = {
    "captions.csv": [
        b"path;words\na.mp4;one\n",
        b"path,text\na.mp4,caf\xe9\n",
        b'path,text\na.mp4,"one\n',
        b"path,text\na.mp4,one\na.mp4,one\n",
    ],
    "metadata.jsonl": [b'{"path": "a.mp4"}\n'],
    "a.txt": [b"\xff"],
}
WHOLE = {
    "captions.csv": [
        "path;text\na.mp4;one, two\n".encode("utf-16"),
        b"sep=;\r\npath;text\r\na.mp4;one\r\nmore\\b.mp4;two\r\n",
        b"a.mp4,one\xe2\x80\xa8two\n",
    ],
    "metadata.jsonl": [b'{"video": "more/b.mp4", "prompt": "two"}\n'],
    "a.txt": [b"one\ntwo\n"],
}


@pytest.mark.parametrize(
    ("name", "content"), [(name, content) for files in (WHOLE, BROKEN) for name, each in files.items() for content in each]
)
def test_a_launch_reads_what_its_trainer_will_read_row_by_row_and_error_by_error(
    clips: Path, tmp_path: Path, name: str, content: bytes
) -> None:
    from opensora.config import DataConfig
    from opensora.data.folder import FileClips
    from opensora.errors import ConfigError

    (clips / "captions.csv").unlink()
    (clips / name).write_bytes(content)

    def trained() -> object:
        data = FileClips(DataConfig(source=source(clips), frames=1, height=16, width=16))
        return list(zip(data._paths, data.captions, strict=True)), tuple(data.remarks)

    def launched() -> object:
        manifest, read = looked(tmp_path / "home").scan(source(clips))
        assert manifest.unreadable == 0
        return [(row.path, row.text) for row in manifest.rows], read.remarks

    if name in WHOLE and content in WHOLE[name]:
        assert trained() == launched()
    else:
        with pytest.raises(ConfigError) as then:
            trained()
        with pytest.raises(UsageError) as now:
            launched()
        assert str(then.value) == str(now.value)


NFC, NFD = (unicodedata.normalize(form, "caf\u00e9.mp4") for form in ("NFC", "NFD"))


@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_name_in_another_normal_form_is_the_same_data_set_and_keeps_its_name(clips: Path, tmp_path: Path, form: str) -> None:
    whole = looked(tmp_path / "home").manifest(source(clips))
    (clips / "a.mp4").rename(clips / (NFD if form == "NFC" else NFC))
    written = unicodedata.normalize(form, NFC)
    (clips / "captions.csv").write_text(f"path,text\n{written},one\nmore/b.mp4,two\n", encoding="utf-8")
    found = looked(tmp_path / "home").manifest(source(clips))
    assert found.digest == whole.digest and found.rows[0].path == written
    (tmp_path / "all.csv").write_text(f"path,text\nclips/{written},one\n{clips}/more/b.mp4,two\n", encoding="utf-8")
    table = ManifestSource(kind="manifest", path=str(tmp_path / "all.csv"), clips=2)
    assert looked(tmp_path / "home").manifest(table).digest == whole.digest


AS_NOBODY = """
import os, sys
from pathlib import Path
from opensora.config import FolderSource
from orchestrator.inputs.data_files import DataFiles
from orchestrator.errors import UsageError
files, source = DataFiles(Path("home")), FolderSource(kind="folder", path=sys.argv[1])
files.captioned(source)  # what Python reads of itself, it reads now
for path, mode in ((Path(sys.argv[1], "captions.csv"), 0), (Path(sys.argv[1]), 0o700)):
    path.chmod(mode)
os.setgid(65534)
os.setuid(65534)
"""


@pytest.mark.parametrize(("taken", "named"), [("captions.csv", "{}/captions.csv"), ("", "data.source {}")])
def test_what_may_not_be_read_is_refused_by_name(clips: Path, tmp_path: Path, taken: str, named: str) -> None:
    if os.geteuid() != 0:
        pytest.skip("root alone may become somebody else")
    for path in (tmp_path, *tmp_path.parents[:-2]):
        path.chmod(0o755)
    read = "try: files.captioned(source)\nexcept UsageError as error: print(error)"
    prepared = AS_NOBODY.replace("(Path(sys.argv[1]), 0o700)", "(Path(sys.argv[1]), 0o755)") if taken else AS_NOBODY
    done = subprocess.run([sys.executable, "-c", prepared + read, str(clips)], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.stdout == f"{named.format(clips)}: may not be read (Permission denied). Give this user the right to\n", done.stderr


@pytest.mark.s3
def test_layouts_and_names_of_a_bucket_are_those_of_a_disk(clips: Path, tmp_path: Path, s3, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from opensora.config import DataConfig
    from opensora.data.folder import FileClips
    from orchestrator.stores.s3 import S3Store

    for name, value in s3.env.items():
        monkeypatch.setenv(name, value)
    (clips / "captions.csv").write_text(f"path,text\n{NFC},one\nmore\\b.mp4,two\n100%25 a.mp4,three\n", encoding="utf-8")
    (clips / "a.mp4").rename(clips / NFD)
    for name in ("100%25 a.mp4", "100% a.mp4"):
        (clips / name).write_bytes(name.encode())
    for layout in ("listed", "beside"):
        if layout == "beside":
            (clips / "captions.csv").unlink()
            for name in (NFD, "more/b.mp4", "100% a.mp4"):
                (clips / name).with_suffix(".txt").write_text(name)
        store = S3Store(s3.url(layout))
        for path in clips.rglob("*"):
            if path.is_file():
                store.create(str(path.relative_to(clips)), path.read_bytes())
        (far, there), (near, here) = looked(tmp_path / "home").scan(source(s3.url(layout))), looked(tmp_path / "home").scan(source(clips))  # type: ignore[arg-type]
        assert far.rows == near.rows and far.unreadable == 0 and len(far.rows) == 3
        assert (there.layout, there.remarks) == (here.layout, here.remarks)
        monkeypatch.setenv("AWS_ENDPOINT_URL", s3.endpoint)
        clip = FileClips(DataConfig(source=source(s3.url(layout)), frames=1, height=16, width=16), far)
        assert [row.path for row in far.rows] == clip._paths
    (tmp_path / "all.csv").write_text(f"path,text\n{s3.url('listed')}/{NFC},one\n{clips}/more/b.mp4,two\n", encoding="utf-8")
    table = looked(tmp_path / "home").manifest(ManifestSource(kind="manifest", path=str(tmp_path / "all.csv"), clips=2))
    assert table.unreadable == 0


@pytest.mark.s3
def test_objects_of_a_bucket_are_read_once(clips: Path, tmp_path: Path, s3, monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    from orchestrator.stores.s3 import S3Store

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


def test_a_name_that_is_no_text_is_hashed_at_each_look(clips: Path, tmp_path: Path) -> None:
    (clips / "captions.csv").unlink()
    (clips / "a.txt").write_text("one")
    for ending, content in ((b".mp4", b"film x"), (b".txt", b"three")):
        Path(os.fsdecode(bytes(clips) + b"/x\xff" + ending)).write_bytes(content)
    settle(clips)
    first = looked(tmp_path / "home").manifest(source(clips))
    assert [row.text for row in first.rows] == ["one", "three"] and first.unreadable == 0
    again = looked(tmp_path / "home")
    assert again.manifest(source(clips)) == first and again.bytes_read == 6, "the others are remembered"


def test_files_of_one_moment_that_change_places_are_read_again(clips: Path, tmp_path: Path) -> None:
    """Their folders do: no date of a file tells."""
    for name in ("x", "y"):
        (clips / name).mkdir()
        (clips / name / "1.mp4").write_bytes(f"film {name}".encode())
    (clips / "captions.csv").write_text("path,text\nx/1.mp4,one\ny/1.mp4,two\n")
    one, other = clips / "x/1.mp4", clips / "y/1.mp4"
    for _ in range(1000):
        for path in (one, other):
            os.utime(path, (1, 1))
        if one.stat().st_ctime_ns == other.stat().st_ctime_ns:
            break
    assert one.stat().st_ctime_ns == other.stat().st_ctime_ns
    first = looked(tmp_path / "home").manifest(source(clips))
    for here, there in (("x", "z"), ("y", "x"), ("z", "y")):
        (clips / here).rename(clips / there)
    assert looked(tmp_path / "home").manifest(source(clips)).digest != first.digest
