"""AdamW (Loshchilov & Hutter, arXiv:1711.05101), its schedule, and its state by parameter name.

torch.optim.AdamW computes the same with the same kernel, but building one imports torch's compiler, which takes 1.4 CPU-seconds a rank
and stage (4.2 before its bytecode is compiled; 2026-11-23). Also its state goes by position in a list, but a checkpoint needs names,
because a stage may train other parameters than the one before.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from opensora.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step 0, 1, ...: it rises to `lr` over the warm-up, then stays or falls to 0 at the end of the stage."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = (step - config.warmup_steps) / max(1, steps - config.warmup_steps)
    match config.decay:
        case "constant":
            return config.lr
        case "linear":
            return config.lr * (1 - progress)
        case "cosine":
            return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


class AdamW:
    """Updates `weights` in place. These are plain tensors, whole ones or this rank's rows. Moments are fp32 and start at zero."""

    def __init__(self, weights: Mapping[str, Tensor], config: OptimizerConfig) -> None:
        self.config = config
        self._names = tuple(weights)
        self._weights = [weight.detach() for weight in weights.values()]  # share their memory
        self._exp_avg = [torch.zeros_like(weight) for weight in self._weights]
        self._exp_avg_sq = [torch.zeros_like(weight) for weight in self._weights]
        self._steps = [torch.zeros((), device=weight.device) for weight in self._weights]

    @torch.no_grad()
    def step(self, gradients: Sequence[Tensor], lr: float, found_inf: Tensor | None = None) -> None:
        """Make one update with this learning rate and a gradient for each weight. Changes nothing if `found_inf` (one fp32) is not 0."""
        torch._foreach_add_(self._steps, 1)
        torch._fused_adamw_(
            self._weights,
            list(gradients),
            self._exp_avg,
            self._exp_avg_sq,
            [],
            self._steps,
            lr=lr,
            beta1=self.config.betas[0],
            beta2=self.config.betas[1],
            weight_decay=self.config.weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
            found_inf=found_inf,
        )

    def state(self) -> dict[str, Tensor]:
        """Moments and step counts as `<moment>/<parameter>`, for example `exp_avg/final_layer.linear.bias`. Shares their memory."""
        named: dict[str, Tensor] = {}
        for index, name in enumerate(self._names):
            for key, values in self._state():
                named[f"{key}/{name}"] = values[index]
        return named

    @torch.no_grad()
    def load(self, state: Mapping[str, Tensor]) -> None:
        """Continue from the state of the same parameters, or of some of them; the others start at zero."""
        for key, value in self.state().items():
            if key in state:
                value.copy_(state[key])

    def _state(self) -> tuple[tuple[str, list[Tensor]], ...]:
        return ("exp_avg", self._exp_avg), ("exp_avg_sq", self._exp_avg_sq), ("step", self._steps)
