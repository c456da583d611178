"""What tests of the trainer share: a stage small enough to train in a test, and run directories to train it in.

One thread for all of them: tiny tensors gain nothing from two, and sums come out alike on every machine.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from opensora import train
from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig, write_stage
from opensora.distributed.ranks import Ranks
from opensora.latents.cache import prepare
from opensora.latents.prepared import Prepared
from opensora.training.run_directory import RunDirectory
from opensora.training.start import find_start
from opensora.training.trainer import DrainRequest, Trainer

torch.set_num_threads(1)

TINY: dict[str, Any] = {
    "model": {"depth": 2, "width": 32, "heads": 2, "latent_channels": 4, "caption_width": 16, "caption_tokens": 5},
    "objective": {"kind": "flow"},
    "data": {"source": {"kind": "digits", "clips": 16}, "frames": 1, "height": 16, "width": 16},
    "autoencoder": {"kind": "patch", "factor": 4},
    "text": {"kind": "words"},
    "optimizer": {"lr": 1e-2, "warmup_steps": 2, "decay": "linear"},
    "ema_decay": 0.9,
    "steps": 4,
    "batch_size": 4,
    "seed": 7,
    "checkpoint": {"every_steps": 1, "keep_last": 100},
    "sampling": {"steps": 2, "method": "euler", "guidance": 2.0},
}


def merged(base: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """`base` with `changes`, section by section; a section with another `kind` is replaced as a whole."""
    result = dict(base)
    for key, value in changes.items():
        old = base.get(key)
        both = isinstance(value, dict) and isinstance(old, dict) and value.get("kind", old.get("kind")) == old.get("kind")
        result[key] = merged(base[key], value) if both else value
    return result


@pytest.fixture
def tiny_stage() -> Callable[..., StageConfig]:
    """tiny_stage(data={"frames": 4}, steps=2): the tiny stage with some fields changed. Images, rectified flow, one second."""
    return lambda **changes: StageConfig.model_validate(merged(TINY, changes))


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., RunDirectory]:
    """make_run(stage, parent=..., resume=...): a run directory as an agent makes it, with links to checkpoints that exist."""
    made = 0

    def make(stage: StageConfig, *, parent: Path | None = None, resume: Path | None = None) -> RunDirectory:
        nonlocal made
        made += 1
        path = tmp_path / f"run{made}"
        (path / "checkpoints").mkdir(parents=True)
        write_stage(stage, path / "stage.yaml")
        if parent is not None:
            (path / "parent").symlink_to(parent)
        if resume is not None:
            (path / "checkpoints" / resume.name).symlink_to(resume)
        return RunDirectory(path, rank=0)

    return make


@pytest.fixture
def make_trainer() -> Callable[..., Trainer]:
    """make_trainer(run, rank=0, world=1): all pieces of a stage in this process, nothing trained yet.

    More ranks than one do not hear each other: each steps with its own gradients.
    """

    class Deaf(Ranks):
        def sum_(self, tensor: torch.Tensor) -> torch.Tensor:
            return tensor

    def make(run: RunDirectory, rank: int = 0, world: int = 1) -> Trainer:
        stage, ranks = run.stage(), Deaf(rank, world, torch.device("cpu"))
        start = find_start(run, stage, world)
        prepared = Prepared.open(prepare(stage, run.latents, start.encoders), stage)
        return Trainer(run, stage, ranks, DrainRequest(), prepared, start)

    return make


@pytest.fixture
def complete(make_run: Callable[..., RunDirectory]) -> Callable[..., Path]:
    """complete(stage, parent=...): train it in this process to the end; its last checkpoint."""

    def finish(stage: StageConfig, *, parent: Path | None = None) -> Path:
        run = make_run(stage, parent=parent)
        assert train.run_reported(run, DrainRequest()) == 0
        return checkpoint.directory(run.checkpoints, stage.steps)

    return finish
