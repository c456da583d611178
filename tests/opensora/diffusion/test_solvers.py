"""Laws of the solvers, on data whose best prediction is known: independent normal numbers of one standard deviation.

There the exact way from noise to data is a line: x_0 = x_T · (standard deviation of data) / (standard deviation of noised data).
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora.config import SAMPLING_METHODS, SamplingConfig, SamplingMethod
from opensora.diffusion import flow
from opensora.diffusion.iddpm import Diffusion, Process
from opensora.diffusion.solvers import solve
from opensora.errors import ConfigError

DEVIATION = 0.5
PROCESS = Process(1000)
NOISE = torch.randn(2, 4, 2, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def best_noise(x: Tensor, time: Tensor) -> Tensor:
    """What a perfect network says: E[ε | x_t], and a variance that a solver must not look at."""
    alpha_bar = PROCESS.alpha_bars[time.long()].view(-1, 1, 1, 1, 1)
    predicted = (1 - alpha_bar).sqrt() / (alpha_bar * DEVIATION**2 + 1 - alpha_bar) * x
    return torch.cat([predicted, torch.full_like(predicted, float("nan"))], dim=1)


def exact() -> Tensor:
    last = PROCESS.alpha_bars[-1]
    return NOISE * DEVIATION / (last * DEVIATION**2 + 1 - last).sqrt()


def missed(method: SamplingMethod, steps: int) -> float:
    drawn = Diffusion(1000).sample(best_noise, NOISE, SamplingConfig(method=method, steps=steps), [])
    return float((drawn - exact()).abs().mean())


@pytest.mark.parametrize("method", ["dpm-solver++", "unipc"])
def test_ten_steps_come_closer_than_forty_of_ddim(method: SamplingMethod) -> None:
    assert missed(method, 10) < missed("ddim", 40)
    assert missed(method, 40) < missed(method, 10)


@pytest.mark.parametrize("method", ["dpm-solver++", "unipc"])
def test_a_solver_draws_the_same_from_the_same_noise_whatever_is_beside_it(method: SamplingMethod) -> None:
    sampling = SamplingConfig(method=method, steps=7)
    together = Diffusion(1000).sample(best_noise, NOISE, sampling, [])
    alone = torch.cat([Diffusion(1000).sample(best_noise, one[None], sampling, []) for one in NOISE])
    assert torch.equal(together, alone)


def test_more_steps_than_the_process_has_are_refused() -> None:
    with pytest.raises(ConfigError, match="steps 1001 do not fit a process of 1000"):
        solve("unipc", PROCESS.betas, best_noise, NOISE, 1001)


def test_heun_comes_closer_than_euler_with_as_many_evaluations() -> None:
    """Velocity of data of one standard deviation: x · (σ_d² (1-t) - t) / (σ_d² (1-t)² + t²), and x_0 = DEVIATION · x_1."""

    def best_velocity(x: Tensor, time: Tensor) -> Tensor:
        t = (time.double() / flow.NETWORK_TIME).view(-1, 1, 1, 1, 1)
        return x * (DEVIATION**2 * (1 - t) - t) / (DEVIATION**2 * (1 - t) ** 2 + t**2)

    wanted = NOISE * DEVIATION
    heun, euler = flow.heun(best_velocity, NOISE, 10), flow.euler(best_velocity, NOISE, 19)
    assert (heun - wanted).abs().mean() < 0.5 * (euler - wanted).abs().mean()


def test_each_method_belongs_to_one_objective() -> None:
    for kind, sample in (("iddpm", Diffusion(1000).sample), ("flow", flow.RectifiedFlow().sample)):
        for other in {"iddpm", "flow"} - {kind}:
            for method in SAMPLING_METHODS[other]:
                with pytest.raises(ConfigError, match=f"method {method.replace('+', '.')} belongs to objective {other}"):
                    sample(best_noise, NOISE, SamplingConfig(method=method), [])
