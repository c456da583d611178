"""What a stage trains for: the one interface between the trainer or sampler and the mathematics of `diffusion` and `flow`.

A network is any callable `(noisy latents (B, C, T, H, W), time (B,)) -> prediction (B, C_out, T, H, W)`; captions are inside
it (`opensora.guidance`). All randomness comes from generators that the caller owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from opensora.config import IDDPM, Flow, SamplingConfig
from opensora.diffusion import Diffusion, Network, draw_noise
from opensora.flow import RectifiedFlow

__all__ = ["Network", "Objective", "build", "draw_noise"]


class Objective(Protocol):
    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        """(B,) training times on the generator's device: integer steps for iddpm, fp32 in (0, 1) for flow."""

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        """(B,) fp32, each the mean over a clip's elements."""

    def sample(self, network: Network, noise: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
        """Clean latents from standard normal noise. Generator i serves clip i, so a clip does not depend on its batch.

        Raises:
            ConfigError: the sampling method belongs to the other objective, or its steps do not fit.
        """


def build(config: IDDPM | Flow) -> Objective:
    match config:
        case IDDPM():
            return Diffusion(config.steps)
        case Flow():
            return RectifiedFlow(config.time, config.shift)
