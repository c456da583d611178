"""The prediction is what drawing really takes, on a CPU."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL
from torch.profiler import ProfilerActivity, profile

from opensora import config
from opensora.config import SamplingConfig, StageConfig
from opensora.encoders.pretrained import KLAutoencoder
from opensora.encoders.protocol import needs_of
from opensora.errors import ConfigError
from opensora.evaluation import memory_plan
from opensora.evaluation.sampler import Sampler
from opensora.evaluation.saved_model import open_model
from opensora.planning.sampling import Encoders, predict


def peak(run: Callable[[], Any]) -> int:
    """Most bytes of tensors alive at once, beyond those that are there."""
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler, torch.no_grad():
        run()
    level = most = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            level += event.nbytes()
            most = max(most, level)
    return most


@pytest.fixture
def sampler(tiny_stage: Callable[..., StageConfig], complete: Callable[..., Path]) -> Callable[..., Sampler]:
    """A sampler of a model that is large beside the rest of the process's tensors."""

    def make(**changes: Any) -> Sampler:
        model = {"width": 64, "heads": 4, "caption_tokens": 6} | changes.pop("model", {})
        return open_model(complete(tiny_stage(data={"frames": 4}, steps=1, model=model, **changes)), torch.device("cpu"))

    return make


@pytest.mark.parametrize(
    ("changes", "clips", "frames", "size", "how"),
    [
        ({}, 2, 4, (128, 128), {}),
        ({}, 3, 4, (128, 64), {"guidance": 1.0}),
        ({"model": {"mlp_ratio": 2.0}}, 1, 8, (128, 128), {"method": "heun"}),
        ({"model": {"mlp_ratio": 1.0}}, 1, 8, (128, 128), {}),
        ({"objective": {"kind": "iddpm"}, "sampling": {"method": "ancestral"}}, 2, 4, (128, 128), {"method": "dpm-solver++"}),
        ({}, 2, 1, (256, 128), {}),
    ],
)
def test_drawing_takes_what_is_predicted(
    changes: dict[str, Any], clips: int, frames: int, size: tuple[int, int], how: dict[str, Any], sampler: Callable[..., Sampler]
) -> None:
    drawer = sampler(**changes)
    sampling = SamplingConfig.model_validate(drawer.stage.sampling.model_dump() | {"steps": 2} | how)
    wanted = predict(
        drawer.stage, clips=clips, frames=frames, size=size, guided=sampling.guidance != 1, encoders=Encoders(), loaded=True
    ).drawing
    network = drawer.network(frames)
    if frames > 1:  # so that its temporal attention has an effect
        network.temporal_frozen = False
        for block in network.blocks:
            block.skip_temporal = False
    prompts = ["a digit 3 moving left"] * clips
    measured = peak(lambda: drawer.latents(prompts, frames, range(clips), sampling, size=size))
    assert wanted == pytest.approx(measured, rel=0.1), wanted / measured


def test_decoding_takes_at_most_what_is_predicted(tmp_path: Path) -> None:
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    made = AutoencoderKL(block_out_channels=(32, 64, 128, 128), latent_channels=4, layers_per_block=2, **blocks)
    made.eval().save_pretrained(tmp_path)
    autoencoder = KLAutoencoder(config.KLAutoencoder(kind="kl", path=str(tmp_path), factor=8, micro_batch=2), 4)
    needs = needs_of(autoencoder, object())  # type: ignore[arg-type]
    assert needs.weights == 4 * sum(weight.numel() for weight in made.parameters())
    latents = torch.randn(5, 4, 16, 16)
    autoencoder.decode(latents[:1])
    assert needs_of(autoencoder, object()).weights == 0, "it is loaded"  # type: ignore[arg-type]
    measured = peak(lambda: autoencoder.decode(latents))
    assert needs.decoded_at_once == 2 and 1 <= 2 * 128 * 128 * needs.decoding / measured < 1.4


def test_fewer_clips_at_once_where_the_device_has_less_and_none_where_one_does_not_fit(
    sampler: Callable[..., Sampler], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawer = sampler()
    one, four = (predict(drawer.stage, clips=n, frames=4, size=(16, 16), guided=True, encoders=Encoders()).total for n in (1, 4))
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: int(four / (1 - memory_plan.RESERVE)) + 2)
    found = memory_plan.plan(drawer, 16, 4, None, drawer.stage.sampling)
    assert found.at_once == 4 and "4 clips at once: about 0.0 GB of 0.0 GB free on this machine" in found.sentence()
    monkeypatch.setattr(memory_plan, "free_bytes", lambda _: one)
    with pytest.raises(ConfigError, match="a clip of 4 frames of 16x16 pixels needs about"):
        memory_plan.plan(drawer, 16, 4, None, drawer.stage.sampling)


def test_ranks_that_share_a_clip_need_a_part_of_its_memory_each(tiny_stage: Callable[..., StageConfig]) -> None:
    whole, quarter = (predict(tiny_stage(), clips=1, frames=16, size=(64, 64), guided=True, encoders=Encoders(), ranks=n) for n in (1, 4))
    assert whole.network == quarter.network and whole.drawing > 2 * quarter.drawing and whole.decoding == 4 * quarter.decoding
