from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora.config import SamplingConfig
from opensora.diffusion import flow
from opensora.diffusion.flow import RectifiedFlow
from opensora.errors import ConfigError


def pair(seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 4, 2, 2, 2)
    return torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


def test_line_starts_at_the_clean_latent_and_ends_in_noise() -> None:
    clean, noise = pair()
    assert torch.equal(flow.interpolate(clean, noise, torch.zeros(3)), clean)
    assert torch.equal(flow.interpolate(clean, noise, torch.ones(3)), noise)


def test_each_clip_is_at_its_own_time() -> None:
    clean, noise = pair()
    mixed = flow.interpolate(clean, noise, torch.tensor([0.0, 0.25, 1.0]))
    assert torch.equal(mixed[0], clean[0])
    assert torch.equal(mixed[1], 0.75 * clean[1] + 0.25 * noise[1])
    assert torch.equal(mixed[2], noise[2])


def test_velocity_is_minus_the_derivative_of_the_line() -> None:
    clean, noise = pair()
    later, earlier = (flow.interpolate(clean, noise, torch.full((3,), time)) for time in (0.75, 0.25))
    assert torch.allclose(flow.velocity(clean, noise), -(later - earlier) / 0.5, atol=1e-6)


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_straight_line_is_followed_exactly_in_any_number_of_steps(steps: int) -> None:
    clean, noise = pair()
    out = flow.euler(lambda x, time: flow.velocity(clean, noise), noise, steps)
    assert torch.allclose(out, clean, atol=1e-5)


def test_euler_follows_the_closed_form_of_a_linear_field() -> None:
    """dx/dtime = -x: n steps of 1/n from 1 to 0 multiply by (1 + 1/n)^n."""
    _, noise = pair()
    assert torch.allclose(flow.euler(lambda x, time: x, noise, 10), noise * 1.1**10, rtol=1e-5)


def test_network_is_told_times_of_0_to_1000_the_noisiest_first() -> None:
    told: list[float] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        told.append(time[0].item())
        return x

    clean, noise = pair()
    RectifiedFlow().sample(network, noise, SamplingConfig(steps=4, method="euler"), [])
    assert told == [1000, 750, 500, 250]
    RectifiedFlow().loss(network, clean, torch.full((3,), 0.5), noise)
    assert told[-1] == 500


def test_loss_is_zero_for_the_true_velocity_and_the_mean_square_else() -> None:
    clean, noise = pair()
    objective, time = RectifiedFlow(), torch.tensor([0.1, 0.5, 0.9])
    assert torch.equal(objective.loss(lambda x, t: clean - noise, clean, time, noise), torch.zeros(3))
    off = torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1, 1)
    assert torch.allclose(objective.loss(lambda x, t: clean - noise + off, clean, time, noise), torch.tensor([1.0, 4.0, 9.0]))


def test_network_sees_the_interpolated_latent() -> None:
    clean, noise = pair()
    seen: list[Tensor] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        seen.append(x)
        return x

    RectifiedFlow().loss(network, clean, torch.tensor([0.0, 0.5, 1.0]), noise)
    assert torch.equal(seen[0], torch.stack([clean[0], 0.5 * clean[1] + 0.5 * noise[1], noise[2]]))


def test_uniform_times_are_uniform_and_logit_normal_times_crowd_in_the_middle() -> None:
    draws = {kind: flow.draw_time(kind, 20_000, torch.Generator().manual_seed(0)) for kind in ("uniform", "logit-normal")}
    for time in draws.values():
        assert time.min() > 0
        assert time.max() < 1
        assert time.mean().item() == pytest.approx(0.5, abs=0.01)
    inner = {kind: ((time > 0.25) & (time < 0.75)).float().mean().item() for kind, time in draws.items()}
    assert inner["uniform"] == pytest.approx(0.5, abs=0.02)
    assert inner["logit-normal"] == pytest.approx(0.728, abs=0.02)  # P(|z| < ln 3)


def test_iddpms_samplers_are_refused() -> None:
    with pytest.raises(ConfigError, match="ancestral belongs to objective iddpm"):
        RectifiedFlow().sample(lambda x, time: x, torch.zeros(1, 4, 1, 2, 2), SamplingConfig(method="ancestral"), [])


def test_a_shift_moves_times_towards_noise_and_keeps_the_ends() -> None:
    time = torch.linspace(0, 1, 11)
    torch.testing.assert_close(flow.shifted(time, 1.0), time)
    moved = flow.shifted(time, 4.0)
    assert (moved[0], moved[-1]) == (0, 1)
    assert (moved[1:-1] > time[1:-1]).all() and (moved.diff() > 0).all()
    assert float(moved[5]) == pytest.approx(0.8)  # 4 · 0.5 / (1 + 3 · 0.5)
    torch.testing.assert_close(flow.shifted(moved, 1 / 4), time)


def test_shifted_steps_still_lead_from_noise_to_the_clip() -> None:
    clean, noise = torch.full((2, 1, 1, 2, 2), 3.0), torch.zeros(2, 1, 1, 2, 2)
    seen: list[float] = []

    def network(x: torch.Tensor, time: torch.Tensor) -> torch.Tensor:
        seen.append(float(time[0]))
        return clean - noise

    torch.testing.assert_close(flow.euler(network, noise, 4, shift=3.0), clean)
    assert seen == pytest.approx([1000, 900, 750, 500])


def test_shift_reaches_training_and_sampling() -> None:
    plain, shifted = flow.RectifiedFlow("uniform"), flow.RectifiedFlow("uniform", 3.0)
    times = [objective.draw_time(1000, torch.Generator().manual_seed(0)) for objective in (plain, shifted)]
    torch.testing.assert_close(times[1], flow.shifted(times[0], 3.0))
