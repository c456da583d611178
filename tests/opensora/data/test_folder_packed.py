"""Clips in tars, and those of Parquet and other trainers' TOML, give the trainer the pixels and the data set that a plain folder gives."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path
from typing import Any

import pyarrow as arrow
import pyarrow.parquet as parquet
import pytest
import torch
from film_clips import CAPTIONS, make

from opensora.config import DataConfig, FolderSource, ManifestSource
from opensora.data.folder import FileClips
from opensora.errors import DataError
from orchestrator.inputs.data_files import DataFiles
from orchestrator.inputs.own_clips import source_of


def data(source: FolderSource | ManifestSource) -> DataConfig:
    return DataConfig(source=source, frames=4, frame_interval=2, height=32, width=32)


def pixels(clips: FileClips) -> dict[str, torch.Tensor]:
    """By caption, so that names do not matter."""
    read, indices = clips.read(0, len(clips))
    return {clips.captions[index]: clip for index, clip in zip(indices, read, strict=True)}


def as_tars(folder: Path, to: Path) -> Path:
    to.mkdir()
    for number, (name, text) in enumerate(CAPTIONS.items()):
        (to / "caption").write_text(text)
        with tarfile.open(to / f"set-{number:04d}.tar", "w") as shard:
            shard.add(folder / name, Path(name).name)
            shard.add(to / "caption", Path(name).with_suffix(".txt").name)
        (to / "caption").unlink()
    return to


def as_parquet(folder: Path, to: Path) -> Path:
    shutil.copytree(folder, to)
    (to / "captions.csv").unlink()
    parquet.write_table(arrow.table({"path": list(CAPTIONS), "text": list(CAPTIONS.values())}), to / "set.parquet")
    return to / "set.parquet"


def as_toml(folder: Path, to: Path) -> Path:
    to.mkdir()
    for name, text in CAPTIONS.items():
        shutil.copy(folder / name, to / Path(name).name)
        (to / Path(name).with_suffix(".txt").name).write_text(text)
    (to.parent / "set.toml").write_text(f'[[directory]]\npath = "{to.name}"\n')
    return to.parent / "set.toml"


@pytest.mark.parametrize("pack", [as_tars, as_parquet, as_toml])
def test_packed_clips_train_as_a_folder_of_them_does_and_are_the_same_data_set(tmp_path: Path, pack: Any) -> None:
    folder = make(tmp_path / "clips")
    files = DataFiles(tmp_path / "home")
    source = source_of(str(pack(folder, tmp_path / "packed")))
    if isinstance(source, ManifestSource):
        source = source.model_copy(update={"clips": len(CAPTIONS)})
    plain, packed = files.manifest(source_of(str(folder))), files.manifest(source)
    assert sorted(row[1:] for row in map(tuple_of, packed.rows)) == sorted(row[1:] for row in map(tuple_of, plain.rows))
    wanted = pixels(FileClips(data(FolderSource(kind="folder", path=str(folder))), plain))
    found = pixels(FileClips(data(source), packed))
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[text], found[text]) for text in wanted)


def tuple_of(row: Any) -> tuple[str, str, int, str]:
    return row.path, row.text, row.size, row.sha256


def test_a_member_that_changed_since_the_launch_is_refused_and_its_neighbour_is_not(tmp_path: Path) -> None:
    tars = as_tars(make(tmp_path / "clips"), tmp_path / "tars")
    files = DataFiles(tmp_path / "home")
    source = source_of(str(tars))
    recorded = files.manifest(source)
    shard = tars / "set-0001.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as opened:
        content[opened.getmember("two.mp4").offset_data + 100] ^= 1  # as long as before
    shard.write_bytes(content)
    clips = FileClips(data(source), recorded)
    clips.read(0, 1)
    with pytest.raises(DataError, match=r"set-0001\.tar/two\.mp4: was changed after the launch recorded it"):
        clips.read(1, 2)


def test_a_second_look_at_tars_reads_nothing_and_one_shard_may_be_named(tmp_path: Path) -> None:
    tars = as_tars(make(tmp_path / "clips"), tmp_path / "tars")
    first, again = DataFiles(tmp_path / "home", clock=lambda: 4e9), DataFiles(tmp_path / "home", clock=lambda: 4e9)
    whole = first.manifest(source_of(str(tars)))
    assert first.bytes_read == whole.size
    assert again.manifest(source_of(str(tars))) == whole and again.bytes_read == 0
    one = again.manifest(source_of(str(tars / "set-0001.tar")))
    assert [row.path for row in one.rows] == ["set-0001.tar/two.mp4"] and one.rows[0].sha256 == whole.rows[1].sha256
