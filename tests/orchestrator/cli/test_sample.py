"""What needs no run: tests/e2e/test_readme.py draws from a committed stage, tests/opensora/test_sample.py from a folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny_recipe import Osctl, write


@pytest.fixture
def osctl(tmp_path: Path) -> Osctl:
    return Osctl(write(tmp_path / "recipe"))


def test_what_says_too_little_or_too_much_is_a_wrong_command(osctl: Osctl) -> None:
    assert "no prompt is given" in osctl("sample", expect=2).stderr
    assert "--stage stage1 and --model there both name weights" in osctl("sample", "a", "--stage=stage1", "--model=there", expect=2).stderr
    assert "--checkpoint 4 and --model there both name weights" in osctl("sample", "a", "--checkpoint=4", "--model=there", expect=2).stderr
    assert "--checkpoint best is no step" in osctl("sample", "a", "--checkpoint=best", expect=2).stderr


def test_a_checkpoint_that_is_not_there_is_said_with_what_makes_one(osctl: Osctl) -> None:
    assert "sample tiny: no checkpoint is there yet" in osctl("sample", "a", "--checkpoint=4", expect=4).stderr
    assert "sample stage9: tiny has no such stage" in osctl("sample", "a", "--stage=stage9", "--checkpoint=4", expect=2).stderr


def test_a_model_in_a_folder_needs_no_pipeline(tmp_path: Path) -> None:
    osctl = Osctl(tmp_path)
    refused = osctl("sample", "a digit", "--model", "nowhere", "--out", "x.mp4", expect=2).stderr
    assert refused == "error: model nowhere: no such folder; name a checkpoint directory, or a folder that `osctl export` wrote\n"
    assert not (tmp_path / "x.mp4").exists()
