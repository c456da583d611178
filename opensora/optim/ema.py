"""The moving average of a model's weights, which is sampled from, evaluated and passed to the next stage.

Owns the shadow copy, always fp32, by parameter name. Buffers are not averaged, because position tables depend only on a stage's size.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor


class EMA:
    """shadow <- decay * shadow + (1 - decay) * weights, after each optimizer step."""

    def __init__(self, weights: Mapping[str, Tensor], decay: float) -> None:
        """Start at `weights`: plain tensors that the optimizer updates in place, whole ones or this rank's rows."""
        self.decay = decay
        self.shadow: dict[str, Tensor] = {name: weight.detach().float().clone() for name, weight in weights.items()}
        self._weights = [weight.detach() for weight in weights.values()]  # share their memory

    def decay_at(self, step: int) -> float:
        """The decay of step 0, 1, ...: early on it is smaller, so that the average forgets its random start (as in TensorFlow's
        ExponentialMovingAverage)."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Add the weights as they are after optimizer step `step` (from 0)."""
        torch._foreach_lerp_(list(self.shadow.values()), self._weights, 1 - self.decay_at(step))

    @torch.no_grad()
    def load(self, shadow: Mapping[str, Tensor]) -> None:
        """Continue from these averages. Names and shapes must be those of the model; `opensora.checkpoint` compares them before."""
        for name, value in self.shadow.items():
            value.copy_(shadow[name])
