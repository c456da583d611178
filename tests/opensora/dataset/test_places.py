"""Every file of a folder is found, whatever links there are, and a listing ends."""

from __future__ import annotations

from pathlib import Path

import fsspec
import pytest

from opensora.dataset import places
from opensora.dataset.places import Folder
from opensora.errors import ConfigError


def listed(folder: Path) -> set[str]:
    return set(Folder(fsspec.filesystem("file"), str(folder)).listing or ())


def test_folders_that_link_to_each_other_are_listed_in_a_moment(tmp_path: Path) -> None:
    names = [str(number) for number in range(12)]
    for name in names:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.mp4").touch()
        for other in names:
            (tmp_path / name / f"to{other}").symlink_to(tmp_path / other)
    found = listed(tmp_path)
    assert {f"{name}/a.mp4" for name in names} < found
    assert len(found) <= 12 + 12 * 12, "links of a folder that was listed before are not followed again"


def test_a_folder_is_listed_under_each_of_its_names(tmp_path: Path) -> None:
    (tmp_path / "far/deep").mkdir(parents=True)
    (tmp_path / "far/deep/a.mp4").touch()
    (tmp_path / "clips").mkdir()
    for name in ("one", "two"):
        (tmp_path / "clips" / name).symlink_to(tmp_path / "far")
    (tmp_path / "clips/up").symlink_to(tmp_path / "clips")
    assert listed(tmp_path / "clips") == {"one/deep/a.mp4", "two/deep/a.mp4"}


def test_a_tree_without_an_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "REPEATED", 100)
    (tmp_path / "far").mkdir()
    for number in range(20):
        (tmp_path / f"far/{number}").mkdir()
    (tmp_path / "clips").mkdir()
    for number in range(20):
        (tmp_path / f"clips/{number}").symlink_to(tmp_path / "far")
    with pytest.raises(ConfigError, match=r"clips: links lead to the same folders more than 100 times \("):
        listed(tmp_path / "clips")
