"""What osctl wrote itself is not listed, under whatever name it lies among other files."""

from __future__ import annotations

import json
from pathlib import Path

import fsspec

from opensora.dataset.left_out import FILE, LeftOut, of_run
from opensora.dataset.places import Folder


def make(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def listing(root: Path, left_out: LeftOut) -> list[str]:
    return sorted(Folder(fsspec.filesystem("file"), str(root), left_out).listing or ())


def test_own_folders_are_passed_over_by_what_they_are_and_told_once(tmp_path: Path) -> None:
    make(tmp_path, "films/a.mp4", "films/store/x/b.mp4", "films/store/c.mp4")
    (tmp_path / "films/again").symlink_to(tmp_path / "films/store")
    left_out = LeftOut([tmp_path / "films/store", tmp_path / "not there"])
    assert listing(tmp_path / "films", left_out) == ["a.mp4"]
    assert left_out.told().startswith("passed over 1 folder among the sources that osctl itself wrote")
    assert listing(tmp_path / "films/store", LeftOut([tmp_path / "films/store"])) == ["c.mp4", "x/b.mp4"], "what a person names is read"
    assert not LeftOut().told()


def test_run_directories_and_data_sets_of_other_stores_are_told_by_what_lies_in_them(tmp_path: Path) -> None:
    run = "os/prepare/a"
    make(tmp_path, "a.mp4", "kept/b.mp4", "prepare.yaml", f"{run}/prepare.yaml", f"{run}/kept/clips/c.mp4", f"{run}/out/clips/d.mp4")
    make(tmp_path, f"{run}/quarantined/x", f"{run}/temporary/x")
    make(tmp_path, "s/datasets/a/attempts/1", "s/datasets/a/events/1", "s/datasets/a/prepared/1/clips/e.mp4", "datasets/events/f.mp4")
    left_out = LeftOut()
    assert listing(tmp_path, left_out) == ["a.mp4", "datasets/events/f.mp4", "kept/b.mp4", "prepare.yaml"]
    assert "2 folders" in left_out.told()


def test_a_launcher_tells_its_process_by_a_file_and_a_damaged_one_counts_as_none(tmp_path: Path) -> None:
    make(tmp_path, "run/x.mp4", "store/y.mp4", "z.mp4")
    (tmp_path / "run" / FILE).write_text(json.dumps({"schema": 1, "folders": [str(tmp_path / "store"), 3]}))
    assert listing(tmp_path, of_run(tmp_path / "run")) == ["z.mp4"]
    (tmp_path / "run" / FILE).write_text("[")
    assert listing(tmp_path, of_run(tmp_path / "run")) == ["store/y.mp4", "z.mp4"]
