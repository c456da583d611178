from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from training_runs import in_process

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import Trainer

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Trainers = Callable[..., Trainer]
Complete = Callable[..., Path]
VIDEO = {"frames": 4}


def test_another_stage_is_not_resumed(tiny_stage: Stages, make_run: Runs, complete: Complete) -> None:
    run = make_run(tiny_stage(optimizer={"lr": 0.5}), resume=complete(tiny_stage()))
    failed = in_process(run)
    assert (failed["status"], failed["class"]) == ("failed", "parent")
    assert "step 4 is of another stage (optimizer.lr was 0.01, is 0.5)" in failed["reason"]


def test_three_stages_chain_with_new_position_tables(tiny_stage: Stages, complete: Complete) -> None:
    one = complete(tiny_stage(freeze="temporal"))
    two = complete(tiny_stage(data=VIDEO), parent=one)
    three = complete(
        tiny_stage(data={"frames": 6, "height": 24, "width": 24}, parent={"weights": "model", "optimizer": "carry"}), parent=two
    )

    assert checkpoint.read(one)[0].carried == ()
    second, third = checkpoint.read(two)[0], checkpoint.read(three)[0]
    assert second.carried == ("weights (ema)", "autoencoder", "text encoder")
    assert set(second.reset) >= {"optimizer", "position tables (1x4x4 -> 4x4x4)"}
    assert third.carried == ("weights (model)", "autoencoder", "text encoder", "optimizer")
    assert "position tables (4x4x4 -> 6x6x6)" in third.reset
    assert (third.step, third.clips_seen) == (4, 16)
    assert not any("position" in name for name in checkpoint.Reader(three).part("model"))
    assert (one / "autoencoder.safetensors").read_bytes() == (three / "autoencoder.safetensors").read_bytes()
    assert checkpoint.Reader(three).part("optimizer")["step/final_layer.linear.bias"] == 8  # Adam's own count: its moments are 8 steps old


def test_a_stage_starts_from_the_parents_average_and_a_fresh_optimizer(
    tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, complete: Complete
) -> None:
    parent = complete(tiny_stage())
    trainer = make_trainer(make_run(tiny_stage(data=VIDEO), parent=parent))
    average = checkpoint.Reader(parent).part("ema")
    assert all(torch.equal(value, average[name]) for name, value in trainer.model.state_dict().items())
    assert all(torch.equal(value, average[name]) for name, value in trainer.strategy.ema.shadow.items())
    assert any(not torch.equal(value, average[name]) for name, value in checkpoint.Reader(parent).part("model").items())
    assert not any(value.any() for value in trainer.strategy.optimizer.state().values())
    assert (trainer.step, trainer.seen) == (0, (0,))


@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"objective": {"kind": "iddpm"}, "sampling": {"method": "ancestral"}}, "objective.kind is flow, this stage's is iddpm"),
        ({"model": {"width": 48}}, "model.width is 32, this stage's is 48"),
        ({"model": {"depth": 3}}, "model.depth is 2, this stage's is 3"),
        ({"model": {"temporal_position": "residual"}}, "model.temporal_position is attention, this stage's is residual"),
        ({"autoencoder": {"factor": 2}}, "autoencoder.factor is 4, this stage's is 2"),
    ],
)
def test_a_parent_that_does_not_fit_is_refused(
    changes: dict[str, Any], fact: str, tiny_stage: Stages, make_run: Runs, complete: Complete
) -> None:
    failed = in_process(make_run(tiny_stage(**changes), parent=complete(tiny_stage(steps=1))))
    assert (failed["status"], failed["class"]) == ("failed", "parent")
    assert fact in failed["reason"]


def test_an_unfinished_parent_is_refused(tiny_stage: Stages, make_run: Runs) -> None:
    parent = make_run(tiny_stage())
    in_process(parent)
    failed = in_process(make_run(tiny_stage(), parent=checkpoint.directory(parent.checkpoints, 2)))
    assert failed["class"] == "parent"
    assert "step 2 of 4" in failed["reason"]


def test_an_import_takes_no_step(tiny_stage: Stages, make_run: Runs, complete: Complete) -> None:
    source = complete(tiny_stage())
    run = make_run(tiny_stage(steps=0, weights=str(source / "ema.safetensors")))
    assert in_process(run)["status"] == "completed"
    imported = checkpoint.directory(run.checkpoints, 0)
    assert checkpoint.read(imported)[0].complete
    assert (imported / "model.safetensors").read_bytes() == (source / "ema.safetensors").read_bytes()
    assert not any(value.any() for value in checkpoint.Reader(imported).part("optimizer").values())
