"""A training step of STDiT beside the same network with full attention: what dividing attention into space and time saves.

The peer is made of the model's own modules: each block has one self-attention over all T·S tokens in the place of the two, and the temporal
position is added to the tokens before the first block. Same kernels, width, tokens, captions and loss; forward and backward.
The ratio that arithmetic promises is `opensora.planning.flops`'. Floor: 5x where that is at least 5.5; goal: 95% of it.

    OMP_NUM_THREADS=1 .venv/bin/python bench/attention.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import harness
import torch
from harness import Measured, Row
from torch import Tensor, nn

from opensora.config import ModelConfig
from opensora.model.stdit import STDiT, STDiTBlock, modulate
from opensora.planning.flops import forward_flops, full_attention_flops

FLOOR, FROM, GOAL = 5.0, 5.5, 0.95


class FullBlock(STDiTBlock):
    """An STDiT block whose one self-attention joins all tokens of a clip."""

    def forward(self, x: Tensor, captions: Tensor, keep: Tensor | None, time6: Tensor, position: Tensor | None, *_: object) -> Tensor:
        frames = x.shape[1]
        modulation = (self.modulation + time6).to(x.dtype)[:, :, None, None].unbind(1)  # 6 x (B, 1, 1, D)
        shift_msa, scale_msa, gate_msa, shift_mlp, scale_mlp, gate_mlp = modulation
        if position is not None:
            x = x + position
        attended = self.spatial_attention(modulate(self.norm1(x), shift_msa, scale_msa).flatten(1, 2))  # (B, T·S, D)
        x = x + gate_msa * attended.unflatten(1, (frames, -1))
        x = x + self.cross_attention(x.flatten(1, 2), captions, keep).unflatten(1, (frames, -1))
        out: Tensor = x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))
        return out


def with_full_attention(model: STDiT) -> STDiT:
    """The same model, its blocks made full; the temporal attention's weights are gone."""
    for block in model.blocks:
        del block.temporal_attention
        block.__class__ = FullBlock
    return model


def passes(model: nn.Module, config: ModelConfig, shape: tuple[int, int, int]) -> Callable[[], None]:
    """Forward and backward of one clip of latents (T, H, W)."""
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(1, config.latent_channels, *shape, generator=generator)
    captions = torch.randn(1, config.caption_tokens, config.caption_width, generator=generator)
    moment, target = torch.tensor([500.0]), torch.randn(1, 8, *shape, generator=generator)

    def step() -> None:
        for weight in model.parameters():
            weight.grad = None
        loss = (model(noisy, moment, captions) - target).square().mean()
        loss.backward()

    return step


def compare(config: ModelConfig, frames: int, side: int, rounds: int) -> dict[str, float]:
    """CPU-seconds of both, and the ratio of their FLOPs."""
    shape, tokens = (frames, 2 * side, 2 * side), side * side
    ways = {
        "stdit": passes(STDiT(config, shape, 8), config, shape),
        "full": passes(with_full_attention(STDiT(config, shape, 8)), config, shape),
    }
    seconds = harness.interleaved(ways, rounds)
    flops = full_attention_flops(config, 8, frames, tokens) / forward_flops(config, 8, frames, tokens)
    return {f"{name}_s": took for name, took in seconds.items()} | {"flops_ratio": flops, "ratio": seconds["full"] / seconds["stdit"]}


def measure(quick: bool) -> Measured:
    torch.set_num_threads(1)
    config = ModelConfig(depth=1 if quick else 2, width=128, heads=2, caption_width=128, caption_tokens=16, caption_dropout=0)
    cases = [(4, 4)] if quick else [(16, 8), (32, 8), (64, 8), (128, 8)]
    rows: list[Row] = []
    raw: dict[str, Any] = {"model": config.model_dump(mode="json"), "libraries": harness.libraries("torch")}
    for frames, side in cases:
        rounds = 1 if quick else max(2, 256 // frames)
        raw[f"T{frames} S{side**2}"] = found = compare(config, frames, side, min(rounds, 8))
        floor = FLOOR if found["flops_ratio"] >= FROM else None
        name = f"STDiT against full attention, T {frames}, S {side**2} (FLOPs: {found['flops_ratio']:.2f}x)"
        rows.append(Row(name, found["ratio"], "x", floor, GOAL * found["flops_ratio"]))
    return rows, raw


def main() -> None:
    harness.run("attention", measure)


if __name__ == "__main__":
    main()
