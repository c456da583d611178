"""A checkpoint to export."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig, write_stage
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import DrainRequest


def train_in(folder: Path, stage: StageConfig) -> Path:
    (folder / "checkpoints").mkdir(parents=True)
    write_stage(stage, folder / "stage.yaml")
    run = RunDirectory(folder, rank=0)
    assert train.run_reported(run, DrainRequest()) == 0
    return checkpoint.directory(run.checkpoints, stage.steps)


@pytest.fixture
def trained() -> Callable[[Path, StageConfig], Path]:
    """Trains a stage in a new folder. Returns its last checkpoint."""
    return train_in


@pytest.fixture
def video(tmp_path: Path, tiny_stage: Callable[..., StageConfig]) -> Path:
    """A checkpoint after two steps, with a learning rate at which these change something."""
    return train_in(tmp_path / "video", tiny_stage(data={"frames": 4}, steps=2, optimizer={"warmup_steps": 0, "lr": 0.1}))
