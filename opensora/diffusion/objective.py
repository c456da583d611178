"""The training objective of a stage: the one interface between trainer or sampler and the mathematics of `iddpm` and `flow`.

A network is any callable `(noisy latents (B, C, T, H, W), time (B,)) -> prediction (B, C_out, T, H, W)`; captions are inside
it (`opensora.diffusion.guidance`). All randomness comes from generators that the caller owns.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from opensora.config import IDDPM, Flow, SamplingConfig
from opensora.diffusion.flow import RectifiedFlow
from opensora.diffusion.iddpm import Diffusion, Network, draw_noise

__all__ = ["Network", "Objective", "build", "draw_noise"]


class Objective(Protocol):
    last_time: float
    """What the network is told of pure noise; a clean latent is 0."""

    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        """(B,) training times on the generator's device: integer steps for iddpm, fp32 in (0, 1) for flow."""

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
        """(B,) fp32: the loss of each clip, a mean over its elements.

        Args:
            given: (B, T) bool, frames that the network sees clean and that have no part in the loss. `network` is told of them already.
        """

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        """Latents at the noise of the times (B,) that the network is told."""

    def sample(self, network: Network, noise: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
        """Clean latents from standard normal noise. Generator i serves clip i, so a clip does not depend on its batch.

        Raises:
            ConfigError: the sampling method belongs to the other objective, or its steps do not fit.
        """


def build(config: IDDPM | Flow) -> Objective:
    match config:
        case IDDPM():
            return Diffusion(config.steps, config.min_snr)
        case Flow():
            return RectifiedFlow(config.time, config.shift)
