"""Rectified flow: predict the constant velocity of the straight line from noise to data, and follow it.

Owns one function per symbol. Refuses to know the network, captions and guidance.

References: Liu et al. (arXiv:2209.03003) · Esser et al. (arXiv:2403.03206 §3.1: logit-normal times).

Time runs from 0 (clean) to 1 (noise), as in noise diffusion; the network is told time x 1000, the range that its
time embedding was made for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor

from opensora.config import SamplingConfig
from opensora.errors import ConfigError

Network = Callable[[Tensor, Tensor], Tensor]

NETWORK_TIME = 1000.0


def interpolate(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_time = (1 - time) · clean + time · noise, time (B,)."""
    time = time.view(-1, *[1] * (clean.ndim - 1))
    return (1 - time) * clean + time * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: the way from noise to data, -dx/dtime."""
    return clean - noise


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times in (0, 1) moved towards noise for a shift above 1: what a caption decides is decided there (Esser et al. §5.3.2)."""
    return shift * time / (1 + (shift - 1) * time)


def draw_time(kind: Literal["uniform", "logit-normal"], clips: int, generator: torch.Generator) -> Tensor:
    """(B,) fp32 in (0, 1)."""
    if kind == "uniform":
        return torch.rand(clips, generator=generator, device=generator.device)
    return torch.randn(clips, generator=generator, device=generator.device).sigmoid()


def loss(prediction: Tensor, clean: Tensor, noise: Tensor) -> Tensor:
    """(B,) squared error of the velocity, mean over a clip's elements."""
    return (prediction - velocity(clean, noise)).square().flatten(1).mean(1)


def euler(network: Network, noise: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Clean latents: Euler steps from time 1 to time 0, equal ones but for `shift`."""
    times = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    x = noise
    for now, then in itertools.pairwise(times):
        x = x + network(x, torch.full((len(x),), now * NETWORK_TIME, device=x.device)) * (now - then)
    return x


class RectifiedFlow:
    """The objective `flow` (see `opensora.objective`): times are fp32 in (0, 1)."""

    def __init__(self, time: Literal["uniform", "logit-normal"] = "logit-normal", shift: float = 1.0) -> None:
        self.time, self.shift = time, shift

    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        return shifted(draw_time(self.time, clips, generator), self.shift)

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor) -> Tensor:
        return loss(network(interpolate(clean, noise, time), time * NETWORK_TIME), clean, noise)

    def sample(self, network: Network, noise: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
        """Clean latents from noise. The way is deterministic: `generators` stay untouched. Raises ConfigError."""
        if sampling.method != "euler":
            raise ConfigError(f"sampling: method {sampling.method} belongs to objective iddpm, not to flow. Use euler")
        return euler(network, noise, sampling.steps, self.shift)
