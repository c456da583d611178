"""Laws of the held-out loss: the same questions whatever else is different, and intervals that hold the mean."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from opensora.config import IDDPM, Flow, StageConfig
from opensora.evaluation import held_out
from opensora.evaluation.sampler import Sampler
from opensora.evaluation.saved_model import open_model

Stages = Callable[..., StageConfig]
FILM = {"data": {"frames": 4}, "optimizer": {"warmup_steps": 0}}


@pytest.fixture
def model(tiny_stage: Stages, complete: Callable[..., Path]) -> Sampler:
    return open_model(complete(tiny_stage(**FILM, steps=2)), torch.device("cpu"))


def test_each_clip_has_one_level_in_each_range_and_keeps_it_among_more_clips() -> None:
    few, many = held_out.levels(3, 5), held_out.levels(9, 5)
    assert torch.equal(few, many[:3])
    assert torch.equal((few * held_out.BUCKETS).long(), torch.arange(held_out.BUCKETS).expand(3, -1))
    assert not torch.equal(few, held_out.levels(3, 6))


def test_the_loss_of_a_clip_depends_on_nothing_but_weights_clip_and_seed(model: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = held_out.held_out(model.stage, model.autoencoder, model.text, clips=40, frames=4, seed=3)
    whole = held_out.losses(model, asked, 3)
    assert torch.equal(held_out.losses(model, asked, 3), whole)
    monkeypatch.setattr(held_out, "AT_ONCE", 7)
    torch.testing.assert_close(held_out.losses(model, asked, 3), whole, rtol=1e-5, atol=1e-6)
    assert whole.shape == (40, held_out.BUCKETS) and whole.min() > 0


def test_a_stage_that_draws_other_times_is_asked_the_same_questions(model: Sampler) -> None:
    asked = held_out.held_out(model.stage, model.autoencoder, model.text, clips=5, frames=4, seed=3)
    shifted = model.stage.model_copy(update={"objective": Flow(kind="flow", time="uniform", shift=4.0)})
    other = Sampler(shifted, model.weights, model.autoencoder, model.text, device=model.device)
    assert torch.equal(held_out.losses(other, asked, 3), held_out.losses(model, asked, 3))


def test_weights_of_the_training_loss_are_no_part_of_the_questions(tiny_stage: Stages, complete: Callable[..., Path]) -> None:
    plain: dict[str, Any] = {"objective": {"kind": "iddpm", "steps": 100}, "sampling": {"method": "ddim"}}
    model = open_model(complete(tiny_stage(**FILM, **plain, steps=1)), torch.device("cpu"))
    asked = held_out.held_out(model.stage, model.autoencoder, model.text, clips=5, frames=4, seed=3)
    weighted = model.stage.model_copy(update={"objective": IDDPM(kind="iddpm", steps=100, min_snr=5.0)})
    other = Sampler(weighted, model.weights, model.autoencoder, model.text, device=model.device)
    assert torch.equal(held_out.losses(other, asked, 3), held_out.losses(model, asked, 3))


def test_the_held_out_clips_are_told_apart_by_their_digest(model: Sampler) -> None:
    def digest(frames: int, seed: int) -> str:
        return held_out.held_out(model.stage, model.autoencoder, model.text, clips=3, frames=frames, seed=seed).digest

    assert digest(4, 1) == digest(4, 1)
    assert len({digest(4, 1), digest(4, 2), digest(8, 1), digest(1, 1)}) == 4


def test_the_interval_holds_the_mean_and_narrows_with_more_clips() -> None:
    values = np.random.default_rng(1).normal(0.5, 0.1, 400)
    low, high = held_out.interval(values)
    few_low, few_high = held_out.interval(values[:25])
    assert low < values.mean() < high
    assert high - low == pytest.approx(2 * 1.96 * 0.1 / 20, rel=0.2)
    assert few_high - few_low > 2 * (high - low)


def test_the_gain_over_the_parent_is_paired() -> None:
    own = torch.rand(50, held_out.BUCKETS, dtype=torch.float64)
    found = held_out.readings(own, own + 0.25)
    assert found["held_out_gain"] == pytest.approx(0.25)
    assert found["held_out_gain_high"] - found["held_out_gain_low"] < 1e-9 < found["held_out_loss_high"] - found["held_out_loss_low"]
    assert "held_out_gain" not in held_out.readings(own, None)
    ranges = [found[f"held_out_loss_t{bucket}"] for bucket in range(held_out.BUCKETS)]
    assert found["held_out_loss"] == pytest.approx(np.mean(ranges))
