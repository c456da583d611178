from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from training_runs import assert_same_state, in_process

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.distributed.ranks import Ranks
from opensora.errors import DataError
from opensora.training.clips import refuse_other_clips
from opensora.training.run_directory import RunDirectory
from opensora.training.start import Start
from opensora.training.trainer import Trainer

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Trainers = Callable[..., Trainer]


def test_nodes_that_could_read_other_clips_do_not_train_together(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers) -> None:
    class Second(Ranks):
        first = b""

        def broadcast(self, data: bytes) -> bytes:
            return type(self).first or data

    trainer = make_trainer(make_run(tiny_stage()))
    refuse_other_clips(trainer.prepared, Second(1, 2, torch.device("cpu"), node=1, nodes=2), Start())
    Second.first = b"other clips"
    with pytest.raises(DataError, match=r"node 1 could read 16 clips and left out 0"):
        refuse_other_clips(trainer.prepared, Second(1, 2, torch.device("cpu"), node=1, nodes=2), Start())


def test_a_resume_among_other_clips_is_refused_until_they_are_back(tiny_stage: Stages, make_run: Runs, tmp_path: Path) -> None:
    """The position in the stream would mean other clips. A cache is made again where a folder has changed; nothing else would tell."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(4):
        Image.new("RGB", (16, 16), (60 * number, 0, 0)).save(folder / f"{number}.png")
    (folder / "captions.csv").write_text("path,text\n" + "".join(f"{number}.png,a red square\n" for number in range(4)))
    stage = tiny_stage(data={"source": {"kind": "folder", "path": str(folder)}}, batch_size=2)
    run = make_run(stage)
    assert in_process(run)["status"] == "completed"
    step_2, away = checkpoint.directory(run.checkpoints, 2), tmp_path / "3.png"
    (folder / "3.png").rename(away)

    refused = in_process(make_run(stage, resume=step_2))
    assert (refused["class"], refused["step"]) == ("parent", 2)
    assert "step 2 was trained on other clips than the 3 that can be used now (1 are left out)" in refused["reason"]
    away.rename(folder / "3.png")
    resumed = make_run(stage, resume=step_2)
    assert in_process(resumed)["status"] == "completed"
    assert_same_state(checkpoint.directory(run.checkpoints, 4), checkpoint.directory(resumed.checkpoints, 4))
