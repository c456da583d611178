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
from opensora.diffusion.given_frames import per_clip, with_given
from opensora.errors import ConfigError

Network = Callable[[Tensor, Tensor], Tensor]

NETWORK_TIME = 1000.0


def interpolate(clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
    """x_time = (1 - time) · clean + time · noise, time (B,)."""
    time = time.view(-1, *[1] * (clean.ndim - 1))
    return (1 - time) * clean + time * noise


def velocity(clean: Tensor, noise: Tensor) -> Tensor:
    """What the network predicts: the direction from noise to data, -dx/dtime."""
    return clean - noise


def shifted(time: Tensor, shift: float) -> Tensor:
    """Times in (0, 1). A shift above 1 moves them towards noise, where a caption has its effect (Esser et al. §5.3.2)."""
    return shift * time / (1 + (shift - 1) * time)


def draw_time(kind: Literal["uniform", "logit-normal"], clips: int, generator: torch.Generator) -> Tensor:
    """Random times (B,), fp32 in (0, 1)."""
    if kind == "uniform":
        return torch.rand(clips, generator=generator, device=generator.device)
    return torch.randn(clips, generator=generator, device=generator.device).sigmoid()


def loss(prediction: Tensor, clean: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
    """(B,) squared error of the velocity, mean over a clip's elements, of its frames that are not given."""
    return per_clip((prediction - velocity(clean, noise)).square(), given)


def euler(network: Network, noise: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Clean latents, by Euler steps from time 1 to time 0. The steps are equal where `shift` is 1."""
    times = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    x = noise
    for now, then in itertools.pairwise(times):
        x = x + network(x, torch.full((len(x),), now * NETWORK_TIME, device=x.device)) * (now - then)
    return x


def heun(network: Network, noise: Tensor, steps: int, shift: float = 1.0) -> Tensor:
    """Clean latents, by Heun's steps (the mean of the velocities at both ends of each), 2 · steps - 1 evaluations of the network.

    The last step is Euler's: the network was never trained at time 0 (Karras et al., arXiv:2206.00364, algorithm 1).
    """
    times = shifted(torch.linspace(1, 0, steps + 1, dtype=torch.float64), shift).tolist()
    x = noise

    def velocity_at(x: Tensor, time: float) -> Tensor:
        return network(x, torch.full((len(x),), time * NETWORK_TIME, device=x.device))

    for now, then in itertools.pairwise(times):
        slope = velocity_at(x, now)
        if then > 0:
            slope = (slope + velocity_at(x + slope * (now - then), then)) / 2
        x = x + slope * (now - then)
    return x


class RectifiedFlow:
    """The objective `flow` (see `opensora.diffusion.objective`): times are fp32 in (0, 1)."""

    last_time = NETWORK_TIME

    def __init__(self, time: Literal["uniform", "logit-normal"] = "logit-normal", shift: float = 1.0) -> None:
        self.time, self.shift = time, shift

    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        return shifted(draw_time(self.time, clips, generator), self.shift)

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
        noisy = with_given(interpolate(clean, noise, time), clean, given)
        return loss(network(noisy, time * NETWORK_TIME), clean, noise, given)

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return interpolate(clean, noise, time / NETWORK_TIME)

    def sample(self, network: Network, noise: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
        """Clean latents from noise. Deterministic: nothing is drawn from `generators`. Raises ConfigError."""
        match sampling.method:
            case "euler":
                return euler(network, noise, sampling.steps, self.shift)
            case "heun":
                return heun(network, noise, sampling.steps, self.shift)
        raise ConfigError(f"sampling: method {sampling.method} belongs to objective iddpm, not to flow. Use euler or heun")
