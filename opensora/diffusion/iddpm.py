"""IDDPM: noise prediction over discrete steps with a learned variance, as Open-Sora 1.0 trained and sampled.

Owns the noise schedule, the loss and the reverse steps. Refuses to know the network (a callable), captions and guidance.

References: DDPM (Ho et al., arXiv:2006.11239) · IDDPM (Nichol & Dhariwal, arXiv:2102.09672: learned range, hybrid loss,
respacing) · DDIM (Song et al., arXiv:2010.02502) · Min-SNR (Hang et al., arXiv:2303.09556: weights of the loss).

Legend: B batch · C latent channels. x_0 is a clean latent; x_t is the same latent after t + 1 of the steps 0 .. N-1. A network
returns 2C channels: the predicted noise ε, then the variance fraction v. Tables are fp64 and cast after gathering.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.config import SamplingConfig
from opensora.diffusion.given_frames import per_clip, with_given
from opensora.errors import ConfigError

Network = Callable[[Tensor, Tensor], Tensor]

BETA_FIRST, BETA_LAST = 1e-4, 2e-2  # Ho et al. §4, for 1000 steps; scaled so that N steps end at the same noise
BIN = 1 / 255  # half the width of a bin in the discretised likelihood, as if latents were 8-bit pixels in [-1, 1]


def linear_betas(steps: int) -> Tensor:
    """(N,) fp64 variances of the forward steps.

    Raises:
        ConfigError: there are so few steps that the last one would have a variance of 1 or more.
    """
    scale = 1000 / steps
    if scale * BETA_LAST >= 1:
        raise ConfigError(
            f"objective iddpm: steps {steps} leave no signal, the linear schedule needs more than {1000 * BETA_LAST:.0f}. Use 1000"
        )
    return torch.linspace(scale * BETA_FIRST, scale * BETA_LAST, steps, dtype=torch.float64)


def respaced(steps: int, kept: int) -> list[int]:
    """The `kept` of `steps` original steps that a shortened process visits, ascending, first and last included.

    Raises:
        ConfigError: more steps are asked for than there are, or a single one, which would leave the noise in.
    """
    if not 2 <= kept <= steps:
        raise ConfigError(f"sampling: steps {kept} do not fit a process of {steps}. Use 2 to {steps}")
    stride = (steps - 1) / (kept - 1)
    visited, position = [], 0.0
    for _ in range(kept):  # accumulated and rounded half to even, as upstream: k·stride may round differently
        visited.append(round(position))
        position += stride
    return visited


@dataclass(frozen=True)
class Reverse:
    """The distribution of one reverse step, p(x_{t-1} | x_t), and the clean latent it implies."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    clean: Tensor


class Process:
    """A chain of noise steps with its tables; `times` are the original steps that a network is told.

    The full chain visits 0 .. N-1. A shortened one keeps the cumulative noise of the steps that it visits (IDDPM §4).
    """

    def __init__(self, steps: int, times: Sequence[int] | None = None) -> None:
        self.times = torch.tensor(range(steps) if times is None else times)
        self.alpha_bars = (1 - linear_betas(steps)).cumprod(0)[self.times]
        previous = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bars[:-1]])
        self.alpha_bars_previous = previous
        self.betas = 1 - self.alpha_bars / previous
        self.posterior_variance = self.betas * (1 - previous) / (1 - self.alpha_bars)
        # the posterior of step 0 has variance 0, which has no logarithm: step 1's is used
        clipped = self.posterior_variance.clone()
        clipped[0] = clipped[1]
        self.posterior_log_variance = clipped.log()
        self.posterior_clean = self.betas * previous.sqrt() / (1 - self.alpha_bars)
        self.posterior_noisy = (1 - previous) * (1 - self.betas).sqrt() / (1 - self.alpha_bars)

    def __len__(self) -> int:
        return len(self.times)

    def to(self, device: torch.device) -> Process:
        """Move the tables to `device` and return this process: gathering from another device would copy them at every step."""
        if self.times.device != device:
            for name, table in vars(self).items():
                setattr(self, name, table.to(device))
        return self

    def add_noise(self, clean: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """x_t ~ q(x_t | x_0): DDPM eq. 4."""
        return at(self.alpha_bars.sqrt(), index, clean) * clean + at((1 - self.alpha_bars).sqrt(), index, clean) * noise

    def posterior_mean(self, clean: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """Mean of q(x_{t-1} | x_t, x_0): DDPM eq. 7."""
        return at(self.posterior_clean, index, noisy) * clean + at(self.posterior_noisy, index, noisy) * noisy

    def predict_clean(self, noisy: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """x_0, from x_t and its noise."""
        return at((1 / self.alpha_bars).sqrt(), index, noisy) * noisy - at((1 / self.alpha_bars - 1).sqrt(), index, noisy) * noise

    def predict_noise(self, noisy: Tensor, index: Tensor, clean: Tensor) -> Tensor:
        """ε, from x_t and x_0: the inverse of `predict_clean`."""
        return (at((1 / self.alpha_bars).sqrt(), index, noisy) * noisy - clean) / at((1 / self.alpha_bars - 1).sqrt(), index, noisy)

    def min_snr_weight(self, gamma: float, index: Tensor) -> Tensor:
        """(B,) fp64 min(SNR, γ) / SNR with SNR = ᾱ / (1 - ᾱ): Min-SNR §3.4, for a network that predicts the noise."""
        ratio = self.alpha_bars / (1 - self.alpha_bars)
        return (gamma / ratio).clamp(max=1)[index]

    def log_variance(self, fraction: Tensor, index: Tensor) -> Tensor:
        """IDDPM eq. 15: interpolates log variances from the posterior's (v = -1) to log β (v = 1). v may lie outside of that range."""
        low, high = at(self.posterior_log_variance, index, fraction), at(self.betas.log(), index, fraction)
        share = (fraction + 1) / 2
        return share * high + (1 - share) * low

    def reverse(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Reverse:
        """The reverse step that a network's prediction (B, 2C, ...) defines. The clean latent is never clipped."""
        noise, fraction = prediction.chunk(2, dim=1)
        log_variance = self.log_variance(fraction, index)
        clean = self.predict_clean(noisy, index, noise)
        return Reverse(self.posterior_mean(clean, noisy, index), log_variance.exp(), log_variance, clean)

    def variational_bound(self, prediction: Tensor, clean: Tensor, noisy: Tensor, index: Tensor, given: Tensor | None = None) -> Tensor:
        """(B,) one term of the bound in bits per element: the divergence from the posterior, or at t = 0 the negative log-likelihood."""
        step = self.reverse(prediction, noisy, index)
        true_mean = self.posterior_mean(clean, noisy, index)
        true_log_variance = at(self.posterior_log_variance, index, noisy)
        divergence = normal_divergence(true_mean, true_log_variance, step.mean, step.log_variance)
        likelihood = discretised_log_likelihood(clean, step.mean, 0.5 * step.log_variance)
        return torch.where(index == 0, -per_clip(likelihood, given), per_clip(divergence, given)) / math.log(2)

    def ancestral(self, prediction: Tensor, noisy: Tensor, index: Tensor, noise: Tensor) -> Tensor:
        """x_{t-1} ~ p(x_{t-1} | x_t): DDPM algorithm 2. No noise is added on the last step, t = 0."""
        step = self.reverse(prediction, noisy, index)
        added = (index != 0).view(-1, *[1] * (noisy.ndim - 1))
        return step.mean + added * (0.5 * step.log_variance).exp() * noise

    def ddim(self, prediction: Tensor, noisy: Tensor, index: Tensor) -> Tensor:
        """x_{t-1} without noise: DDIM eq. 12 with σ = 0; ε is derived again from the predicted clean latent."""
        clean = self.predict_clean(noisy, index, prediction.chunk(2, dim=1)[0])
        noise = self.predict_noise(noisy, index, clean)
        previous = self.alpha_bars_previous
        return at(previous.sqrt(), index, noisy) * clean + at((1 - previous).sqrt(), index, noisy) * noise


class Diffusion:
    """The objective `iddpm` (see `opensora.diffusion.objective`): times are integer steps 0 .. N-1.

    Args:
        min_snr: γ of Min-SNR; none: every step has weight 1.
    """

    def __init__(self, steps: int = 1000, min_snr: float | None = None) -> None:
        self.process, self.min_snr = Process(steps), min_snr
        self.last_time = float(steps - 1)

    def draw_time(self, clips: int, generator: torch.Generator) -> Tensor:
        return torch.randint(len(self.process), (clips,), generator=generator, device=generator.device)

    def loss(self, network: Network, clean: Tensor, time: Tensor, noise: Tensor, given: Tensor | None = None) -> Tensor:
        """IDDPM §3.1, not rescaled: the squared error trains the noise, the bound trains only the variance.

        Min-SNR weighs the error alone."""
        noisy = with_given(self.process.to(clean.device).add_noise(clean, time, noise), clean, given)
        squared_error, bound = self.loss_terms(network(noisy, time), clean, noisy, time, noise, given)
        if self.min_snr is not None:
            squared_error = squared_error * self.process.min_snr_weight(self.min_snr, time).to(squared_error.dtype)
        return squared_error + bound

    def noised(self, clean: Tensor, noise: Tensor, time: Tensor) -> Tensor:
        return self.process.to(clean.device).add_noise(clean, time.round().long(), noise)

    def loss_terms(
        self, prediction: Tensor, clean: Tensor, noisy: Tensor, time: Tensor, noise: Tensor, given: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """(B,) squared error of the noise, and (B,) variational bound, which has no gradient for the predicted noise."""
        predicted, fraction = prediction.chunk(2, dim=1)
        held = torch.cat([predicted.detach(), fraction], dim=1)
        squared_error = per_clip((noise - predicted).square(), given)
        return squared_error, self.process.variational_bound(held, clean, noisy, time, given)

    def sample(self, network: Network, noise: Tensor, sampling: SamplingConfig, generators: Sequence[torch.Generator]) -> Tensor:
        """Clean latents from noise, by steps on a shortened chain or by a solver of higher order. Raises ConfigError."""
        steps = len(self.process)
        match sampling.method:
            case "dpm-solver++" | "unipc":
                from opensora.diffusion import solvers  # imports diffusers

                return solvers.solve(sampling.method, linear_betas(steps), network, noise, sampling.steps)
            case "euler" | "heun":
                fit = "Use ancestral, ddim, dpm-solver++ or unipc"
                raise ConfigError(f"sampling: method {sampling.method} belongs to objective flow, not to iddpm. {fit}")
            case "ancestral" | "ddim":
                pass
        chain = Process(steps, respaced(steps, sampling.steps)).to(noise.device)
        noisy = noise
        for number in reversed(range(len(chain))):
            index = torch.full((len(noisy),), number, device=noisy.device)
            prediction = network(noisy, chain.times[index])
            if sampling.method == "ancestral":
                noisy = chain.ancestral(prediction, noisy, index, draw_noise(generators, tuple(noisy.shape[1:])).to(noisy))
            else:
                noisy = chain.ddim(prediction, noisy, index)
        return noisy


def draw_noise(generators: Sequence[torch.Generator], shape: tuple[int, ...]) -> Tensor:
    """(B, *shape) standard normal, clip i from generator i: what a clip gets does not depend on its batch."""
    return torch.stack([torch.randn(shape, generator=generator, device=generator.device) for generator in generators])


def at(table: Tensor, index: Tensor, like: Tensor) -> Tensor:
    """table[index] as (B, 1, ...), in the type and on the device of `like`. Gathered in fp64, then cast."""
    return table[index].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def normal_divergence(mean_p: Tensor, log_variance_p: Tensor, mean_q: Tensor, log_variance_q: Tensor) -> Tensor:
    """KL(p ‖ q) of normal distributions, element by element, in nats."""
    ratio = log_variance_p - log_variance_q
    return 0.5 * (-1 - ratio + ratio.exp() + (mean_p - mean_q).square() * (-log_variance_q).exp())


def approximate_normal_cdf(x: Tensor) -> Tensor:
    """Page's tanh form of the standard normal distribution function, within 2e-4 of it."""
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def discretised_log_likelihood(x: Tensor, mean: Tensor, log_scale: Tensor) -> Tensor:
    """Log-probability of the 1/255-wide bin around x under a normal distribution, in nats (DDPM §3.3).

    Always in fp32, since upstream's distribution function saturates at that precision (in 4 of 1024 elements of the reference).
    """
    centred, inverse = x.float() - mean.float(), (-log_scale.float()).exp()
    upper = approximate_normal_cdf(inverse * (centred + BIN))
    lower = approximate_normal_cdf(inverse * (centred - BIN))
    probability = torch.where(x < -0.999, upper, torch.where(x > 0.999, 1 - lower, upper - lower))
    return probability.clamp(min=1e-12).log()
