from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from opensora.checkpoint import reader as checkpoint
from opensora.config import StageConfig
from opensora.errors import WeightsRefused
from opensora.model.stdit import STDiT
from opensora.training import network
from opensora.training.run_directory import RunDirectory
from opensora.training.trainer import Trainer

Stages = Callable[..., StageConfig]
Runs = Callable[..., RunDirectory]
Trainers = Callable[..., Trainer]
Complete = Callable[..., Path]
VIDEO = {"frames": 4}


def test_why_blocks_are_not_compiled_is_said(tiny_stage: Stages, monkeypatch: pytest.MonkeyPatch) -> None:
    found: list[str] = ["gcc"]
    monkeypatch.setattr(network.shutil, "which", lambda name: name if name in found else None)
    assert network.why_not_compiled(tiny_stage()) is None
    reasons = [
        network.why_not_compiled(tiny_stage(parallel={"sequence": 2})),
        network.why_not_compiled(tiny_stage(activations={"recompute": "selective"})),
    ]
    found.clear()
    reasons.append(network.why_not_compiled(tiny_stage()))
    assert [reason is not None and word in reason for reason, word in zip(reasons, ("graph", "selective", "compiler"), strict=True)] == [
        True
    ] * 3


def test_the_video_model_starts_as_the_image_model_on_each_frame(
    tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, complete: Complete
) -> None:
    """The law of zero effect: stage 1 leaves the temporal attention frozen at zero (default temporal_position)."""
    image_stage = tiny_stage(freeze="temporal")
    parent = complete(image_stage)
    assert not any(value.any() for name, value in checkpoint.Reader(parent).part("model").items() if "temporal_attention.proj" in name)
    video = make_trainer(make_run(tiny_stage(data=VIDEO), parent=parent)).model
    image = STDiT(image_stage.model, image_stage.latent_shape[1:], image_stage.out_channels)
    image.load_state_dict(checkpoint.Reader(parent).part("ema"))

    generator = torch.Generator().manual_seed(0)
    x, captions = torch.randn(2, 4, 4, 4, 4, generator=generator), torch.randn(2, 5, 16, generator=generator)
    moment = torch.tensor([100.0, 900.0])
    with torch.no_grad():
        whole = video(x, moment, captions)
        frames = torch.cat([image(x[:, :, frame : frame + 1], moment, captions) for frame in range(4)], dim=2)
    assert whole.abs().max() > 0.1
    torch.testing.assert_close(whole, frames, rtol=1e-5, atol=1e-5)


def test_weights_of_another_model_are_not_imported(tiny_stage: Stages, make_run: Runs, make_trainer: Trainers, complete: Complete) -> None:
    source = complete(tiny_stage(model={"depth": 1}))
    with pytest.raises(WeightsRefused):
        make_trainer(make_run(tiny_stage(weights=str(source / "ema.safetensors"))))
