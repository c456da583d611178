"""The moving average of a model's weights that is sampled from, judged, and handed to the next stage.

Owns the shadow copy, always fp32, by parameter name. Buffers are not averaged: position tables are functions of a stage's size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """shadow <- decay * shadow + (1 - decay) * weights, after each optimizer step."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Starts at `weights`: plain tensors that are updated in place, whole ones or this rank's rows."""
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: weight.detach().float().clone() for name, weight in weights.items()}
        self._weights = [weight.detach() for weight in weights.values()]  # share their memory

    def decay_at(self, step: int) -> float:
        """Decay of step 0, 1, ...: young averages forget their random start faster (as in TensorFlow's ExponentialMovingAverage)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        torch._foreach_lerp_(list(self.shadow.values()), self._weights, 1 - self.decay_at(step))

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Continue from these averages. Names and shapes are those of the model: `checkpoint` has compared them."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])
