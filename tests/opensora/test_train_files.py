"""Laws of a stage on a person's files, across releases: decoding may change, and what was begun goes on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import film_clips
import pytest

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.data import folder
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest


@pytest.fixture
def stage(tiny_stage: Callable[..., StageConfig], tmp_path: Path) -> StageConfig:
    source = {"kind": "folder", "path": str(film_clips.make(tmp_path / "clips"))}
    return tiny_stage(data={"source": source, "frames": 1, "height": 16, "width": 16}, batch_size=2)


def test_a_stage_goes_on_where_its_files_are_decoded_otherwise_now(
    stage: StageConfig, make_run: Callable[..., RunDirectory], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its clips are encoded anew, with the encoders that it began with; its position among them is as before."""
    monkeypatch.setattr(folder, "VERSION", folder.VERSION - 1)
    before = make_run(stage)
    assert train.run_reported(before, DrainRequest()) == 0
    monkeypatch.undo()
    after = make_run(stage, resume=checkpoint.directory(before.checkpoints, 2))
    assert train.run_reported(after, DrainRequest()) == 0
    assert json.loads((after.path / "result.json").read_text())["status"] == "completed"
    caches = [{path.name for path in run.latents.iterdir()} for run in (before, after)]
    assert not caches[0] & caches[1]
    begun, ended = (checkpoint.directory(after.checkpoints, step) / "CHECKPOINT.json" for step in (2, 4))
    assert json.loads(begun.read_text())["clips"] == json.loads(ended.read_text())["clips"]


def test_a_rate_makes_another_stage_and_none_leaves_it_as_it_was(stage: StageConfig) -> None:
    """`data.fps` came later: a stage without it has the digest, and the words, that it had before."""
    by_time = stage.model_copy(update={"data": stage.data.model_copy(update={"fps": 8.0})})
    assert "fps" not in stage.model_dump_json() and by_time.digest() != stage.digest()
    assert StageConfig.model_validate_json(by_time.model_dump_json()) == by_time
