from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from opensora.config import Activations, ModelConfig, RoutingConfig, StageConfig
from opensora.model import linear, routing
from opensora.model.stdit import STDiT
from opensora.planning import flops

XL = ModelConfig()
TINY = ModelConfig(depth=2, width=64, heads=4, caption_width=32, caption_tokens=12)


def stage(**changes: object) -> StageConfig:
    content = {
        "model": TINY.model_dump(),
        "objective": {"kind": "iddpm"},
        "data": {"source": {"kind": "digits", "clips": 10}, "frames": 4, "height": 64, "width": 64},
        "autoencoder": {"kind": "kl", "path": "vae"},
        "text": {"kind": "words"},
        "steps": 10,
        "batch_size": 3,
        "checkpoint": {"every_steps": 5},
    }
    return StageConfig.model_validate(content | changes)


@pytest.mark.parametrize(
    ("frames", "tokens", "gf_per_token", "train_tf"),
    [(16, 256, 1.393, 17.1), (16, 1024, 1.488, 73.2), (64, 1024, 1.494, 293.7), (360, 1024, 1.532, 1694)],
)
def test_xl_2_costs_what_the_published_shapes_cost(frames: int, tokens: int, gf_per_token: float, train_tf: float) -> None:
    forward = flops.forward_flops(XL, 8, frames, tokens)
    assert forward / (frames * tokens) / 1e9 == pytest.approx(gf_per_token, rel=1e-3)
    assert 3 * forward / 1e12 == pytest.approx(train_tf, rel=3e-3)


def test_published_stages_cost_what_was_computed_from_the_report() -> None:
    content = {"model": XL.model_dump(), "text": {"kind": "t5", "path": "t5"}, "steps": 80_000, "batch_size": 8}
    low = stage(
        **content, data={"source": {"kind": "manifest", "path": "a.csv", "clips": 366_000}, "frames": 16, "height": 256, "width": 256}
    )
    assert flops.train_flops_per_clip(low) == pytest.approx(17.1e12, rel=2e-3)
    assert flops.stage_flops(low, devices=64) == pytest.approx(701e18, rel=2e-3)


def test_full_attention_costs_more_the_longer_the_clip() -> None:
    ratios = [flops.full_attention_flops(XL, 8, frames, 1024) / flops.forward_flops(XL, 8, frames, 1024) for frames in (16, 64, 360)]
    assert ratios == pytest.approx([2.13, 6.37, 31.7], rel=2e-3)


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("frozen", [False, True])
def test_counts_are_torchs(backend: SDPBackend, frozen: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "AVAILABLE", False)  # torch's counter has no formula for oneDNN's product
    model = STDiT(TINY, (1 if frozen else 4, 8, 8), 8)
    frames, tokens = model.input_size[0], 16
    if frozen:
        model.freeze_temporal()
    x, captions = torch.randn(1, 4, *model.input_size), torch.randn(1, 12, 32)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(backend):
        out = model(x, torch.tensor([3]), captions, torch.ones(1, 12))
        forward = counter.get_total_flops()
        out.square().mean().backward()
    ours = flops.forward_flops(TINY, 8, frames, tokens, temporal=not frozen)
    assert ours == forward
    assert 3 * ours == pytest.approx(counter.get_total_flops(), rel=0.02)


@pytest.mark.parametrize("rate", [0.0, 0.5])
def test_tokens_that_skip_blocks_are_not_counted(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear, "AVAILABLE", False)
    config, how = TINY.model_copy(update={"depth": 4}), RoutingConfig(rate=rate, first_blocks=1, last_blocks=1)
    model = STDiT(config, (4, 8, 8), 8)
    route = routing.draw(how, 4, 1, 16, torch.Generator())
    with FlopCounterMode(display=False) as counter:
        model(torch.randn(1, 4, 4, 8, 8), torch.tensor([3]), torch.randn(1, 12, 32), torch.ones(1, 12), route=route)
    assert flops.forward_flops(config, 8, 4, 16, routing=how) == counter.get_total_flops()
    content = {"model": config.model_dump(), "routing": how.model_dump()}
    assert flops.train_flops_per_clip(stage(**content)) == 3 * flops.forward_flops(config, 8, 4, 16, routing=how)


def test_frozen_temporal_attention_costs_nothing() -> None:
    images = {"data": {"source": {"kind": "digits", "clips": 10}, "frames": 1, "height": 64, "width": 64}}
    free, frozen = flops.train_flops_per_clip(stage(**images)), flops.train_flops_per_clip(stage(**images, freeze="temporal"))
    tokens, width = 16, TINY.width
    assert free - frozen == 3 * TINY.depth * tokens * (8 * width**2 + 4 * width)


def test_a_stage_costs_its_steps_its_batch_and_its_devices() -> None:
    clip = flops.train_flops_per_clip(stage())
    assert flops.stage_flops(stage(), devices=2) == clip * 10 * 3 * 2
    assert flops.stage_flops(stage(steps=0), devices=64) == 0  # an import


def test_ranks_that_share_a_clip_have_one_batch() -> None:
    alone, shared = stage(), stage(parallel={"sequence": 2})
    assert flops.data_ranks(shared, 8) == 4
    assert flops.stage_flops(shared, devices=8) == flops.stage_flops(alone, devices=4)


def test_buckets_have_the_steps_that_their_clips_fill() -> None:
    buckets = [{"frames": 1, "height": 64, "width": 64, "batch_size": 8}, {"frames": 4, "height": 64, "width": 128, "batch_size": 2}]
    data = {"source": {"kind": "digits", "clips": 10}, "frames": 4, "height": 64, "width": 64, "buckets": buckets}
    several = stage(data=data)
    image, clip = (flops.train_flops_per_clip(several, bucket) for bucket in several.buckets)
    assert clip > 7 * image
    assert flops.step_shares(several) == pytest.approx((1 / 5, 4 / 5))  # 100 clips each: 12.5 batches of 8, 50 of 2
    assert flops.step_flops(several, 2) == pytest.approx(2 * (8 * image / 5 + 2 * clip * 4 / 5))


def test_recomputation_costs_a_third_and_the_mlp_in_chunks_a_little_more() -> None:
    config = stage(model=XL.model_dump(), data={"source": {"kind": "digits", "clips": 10}, "frames": 16, "height": 256, "width": 256})
    cost = [
        flops.executed(config, config.data, Activations(**policy))
        for policy in ({}, {"recompute": "selective"}, {"recompute": "full", "every": 2}, {"recompute": "full", "mlp_chunks": 4})
    ]
    assert cost[:2] == [1, 1]
    assert cost[2] == pytest.approx(4 / 3)
    assert cost[3] == pytest.approx(4 / 3 + 0.427 / 3, abs=0.001), "an MLP is 16 of the 36 D² of a token, and attention comes on top"


@pytest.mark.parametrize(
    ("config", "channels"), [(TINY, 8), (XL, 8), (ModelConfig(depth=3, width=96, heads=3, mlp_ratio=2.5, patch=(2, 2, 4)), 4)]
)
def test_parameters_are_the_models(config: ModelConfig, channels: int) -> None:
    with torch.device("meta"):
        model = STDiT(config, (4, 8, 8), channels)
    assert flops.parameters(config, channels) == sum(parameter.numel() for parameter in model.parameters())


def test_planning_needs_no_torch() -> None:
    code = "import sys, opensora.planning.flops; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_step_in_parts_counts_as_on_as_many_times_the_devices() -> None:
    assert flops.step_flops(stage(accumulate=3), 2) == flops.step_flops(stage(), 6)
    assert flops.stage_flops(stage(accumulate=3), 2) == flops.stage_flops(stage(), 6)
