from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from opensora.config import SamplingConfig
from opensora.diffusion.iddpm import Diffusion, Process, approximate_normal_cdf, linear_betas, normal_divergence, respaced
from opensora.errors import ConfigError

ORACLE = Path(__file__).parents[1] / "oracle" / "iddpm.npz"
BOUND = 1e-6  # of the maximum: see oracle/README.md

Arrays = dict[str, Tensor]


@pytest.fixture(scope="module")
def oracle() -> Arrays:
    with np.load(ORACLE) as arrays:
        return {name: torch.from_numpy(arrays[name]) for name in arrays.files}


def error(ours: Tensor, theirs: Tensor) -> float:
    return ((ours - theirs).abs().max() / theirs.abs().max()).item()


# --- equal to Open-Sora 1.0 ---


def test_training_terms_and_gradients_are_upstreams(oracle: Arrays) -> None:
    diffusion = Diffusion()
    clean, time, noise = oracle["x_start"], oracle["t"], oracle["noise"]
    prediction = oracle["model_output"].clone().requires_grad_()
    noisy = diffusion.process.add_noise(clean, time, noise)
    assert error(noisy, oracle["q_sample"]) < BOUND
    squared_error, bound = diffusion.loss_terms(prediction, clean, noisy, time, noise)
    for ours, theirs in ((squared_error, "train_mse"), (bound, "train_vb"), (squared_error + bound, "train_loss")):
        for clip in range(4):  # each by itself: the first is 500 times the others
            assert error(ours[clip], oracle[theirs][clip]) < BOUND, (theirs, clip)
    (squared_error + bound).sum().backward()
    assert prediction.grad is not None
    assert error(prediction.grad, oracle["train_grad_model_output"]) < BOUND


def test_loss_of_a_network_is_upstreams(oracle: Arrays) -> None:
    asked: list[tuple[Tensor, Tensor]] = []

    def network(x: Tensor, time: Tensor) -> Tensor:
        asked.append((x, time))
        return oracle["model_output"]

    loss = Diffusion().loss(network, oracle["x_start"], oracle["t"], oracle["noise"])
    assert error(loss, oracle["train_loss"]) < BOUND
    ((x, time),) = asked
    assert error(x, oracle["q_sample"]) < BOUND
    assert torch.equal(time, oracle["t"])


# --- Min-SNR ---


def losses(oracle: Arrays, diffusion: Diffusion) -> tuple[Tensor, Tensor]:
    """The loss of upstream's clips, and its gradient for the prediction."""
    prediction = oracle["model_output"].clone().requires_grad_()
    loss = diffusion.loss(lambda _, __: prediction, oracle["x_start"], oracle["t"], oracle["noise"])
    (gradient,) = torch.autograd.grad(loss.sum(), prediction)
    return loss.detach(), gradient


@pytest.mark.parametrize("gamma", [0.5, 5.0])
def test_min_snr_weights_are_min_of_snr_and_gamma_over_snr(gamma: float) -> None:
    process, every = Process(1000), torch.arange(1000)
    bar = (1 - linear_betas(1000)).cumprod(0)
    snr = bar / (1 - bar)
    weight = process.min_snr_weight(gamma, every)
    assert torch.allclose(weight, torch.minimum(snr, torch.tensor(gamma)) / snr, rtol=1e-12)
    assert torch.equal(weight[snr <= gamma], torch.ones(int((snr <= gamma).sum())).double())
    assert weight[0] < 1e-3


def test_min_snr_weighs_the_error_and_leaves_the_bound(oracle: Arrays) -> None:
    (_, gradient), (weighed, weighed_gradient) = losses(oracle, Diffusion()), losses(oracle, Diffusion(min_snr=5.0))
    weight = Process(1000).min_snr_weight(5.0, oracle["t"]).float()
    assert weight.min() < 0.1 and weight.max() == 1
    assert torch.allclose(weighed, weight * oracle["train_mse"] + oracle["train_vb"], rtol=1e-5)
    noise, fraction = gradient.chunk(2, dim=1)
    weighed_noise, weighed_fraction = weighed_gradient.chunk(2, dim=1)
    assert torch.allclose(weighed_noise, weight.view(-1, 1, 1, 1, 1) * noise, rtol=1e-5)
    assert torch.equal(weighed_fraction, fraction)


def test_min_snr_above_every_ratio_changes_no_bit(oracle: Arrays) -> None:
    for plain, weighed in zip(losses(oracle, Diffusion()), losses(oracle, Diffusion(min_snr=1e9)), strict=True):
        assert torch.equal(plain, weighed)


def test_reverse_step_is_upstreams(oracle: Arrays) -> None:
    step = Diffusion().process.reverse(oracle["model_output"], oracle["q_sample"], oracle["t"])
    for ours, theirs in (
        (step.mean, "p_mean"),
        (step.variance, "p_variance"),
        (step.log_variance, "p_log_variance"),
        (step.clean, "p_pred_xstart"),
    ):
        assert error(ours, oracle[theirs]) < BOUND, theirs


@pytest.mark.parametrize(("name", "kept", "index"), [("full", 1000, "t"), ("spaced100", 100, "t_spaced100")])
def test_sampling_steps_are_upstreams(oracle: Arrays, name: str, kept: int, index: str) -> None:
    process = Process(1000, respaced(1000, kept))
    state = oracle["model_output"], oracle["q_sample"], oracle[index]
    assert error(process.ancestral(*state, oracle["step_noise"]), oracle[f"ancestral_{name}"]) < BOUND
    assert error(process.ddim(*state), oracle[f"ddim_{name}"]) < BOUND


def test_shortened_processes_visit_upstreams_steps(oracle: Arrays) -> None:
    assert respaced(1000, 20) == oracle["timesteps_20"].tolist()
    assert respaced(1000, 100) == oracle["timesteps_100"].tolist()
    assert torch.equal(Process(1000, respaced(1000, 100)).times[oracle["t_spaced100"]], oracle["model_timestep_spaced100"])


# --- closed forms ---


@given(st.integers(21, 1500).flatmap(lambda steps: st.tuples(st.just(steps), st.integers(2, steps))))
def test_shortened_process_keeps_ends_order_and_noise_levels(sizes: tuple[int, int]) -> None:
    steps, kept = sizes
    visited = respaced(steps, kept)
    assert len(visited) == kept
    assert (visited[0], visited[-1]) == (0, steps - 1)
    assert visited == sorted(set(visited))
    gaps = {after - before for before, after in pairwise(visited)}
    assert max(gaps) - min(gaps) <= 1
    full, short = Process(steps), Process(steps, visited)
    assert torch.allclose((1 - short.betas).cumprod(0), full.alpha_bars[visited], rtol=1e-9)


@pytest.mark.parametrize("kept", [0, 1, 1001])
def test_steps_that_do_not_fit_are_refused(kept: int) -> None:
    with pytest.raises(ConfigError, match=f"steps {kept} do not fit a process of 1000"):
        respaced(1000, kept)


def test_schedule_that_leaves_no_signal_is_refused() -> None:
    with pytest.raises(ConfigError, match="steps 20 leave no signal"):
        linear_betas(20)
    assert Process(21).alpha_bars[-1] > 0


def test_schedules_of_any_length_end_in_almost_pure_noise() -> None:
    assert Process(1000).alpha_bars[-1] == pytest.approx(4.04e-5, rel=1e-2)
    assert Process(250).alpha_bars[-1] < 1e-4


def test_clean_and_noise_determine_each_other() -> None:
    process, index = Process(1000), torch.tensor([0, 999])
    clean, noise = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    noisy = process.add_noise(clean, index, noise)
    assert torch.allclose(process.predict_clean(noisy, index, noise), clean, rtol=1e-9)
    assert torch.allclose(process.predict_noise(noisy, index, clean), noise, rtol=1e-9)


def test_perfect_prediction_has_the_posterior_as_its_reverse_step() -> None:
    process, index = Process(1000), torch.tensor([1, 500])
    clean, noise = torch.randn(2, 4, 3, dtype=torch.float64), torch.randn(2, 4, 3, dtype=torch.float64)
    noisy = process.add_noise(clean, index, noise)
    perfect = torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)  # fraction -1: the posterior's variance
    assert torch.allclose(process.variational_bound(perfect, clean, noisy, index), torch.zeros(2, dtype=torch.float64), atol=1e-9)


def test_divergence_of_a_distribution_from_itself_is_zero_and_else_positive() -> None:
    mean, log_variance = torch.randn(50), torch.randn(50)
    assert torch.equal(normal_divergence(mean, log_variance, mean, log_variance), torch.zeros(50))
    assert (normal_divergence(mean, log_variance, mean + 0.3, log_variance - 0.2) > 0).all()


def test_approximate_distribution_function_is_close_to_the_true_one() -> None:
    x = torch.linspace(-4, 4, 801, dtype=torch.float64)
    assert (approximate_normal_cdf(x) - torch.special.ndtr(x)).abs().max() < 2e-4


def test_squared_error_trains_the_noise_and_the_bound_trains_the_variance_alone() -> None:
    diffusion = Diffusion()
    clean, noise, time = torch.randn(2, 4, 3), torch.randn(2, 4, 3), torch.tensor([0, 700])
    prediction = torch.randn(2, 8, 3, requires_grad=True)
    noisy = diffusion.process.add_noise(clean, time, noise)
    squared_error, bound = diffusion.loss_terms(prediction, clean, noisy, time, noise)
    (of_error,) = torch.autograd.grad(squared_error.sum(), prediction)
    (of_bound,) = torch.autograd.grad(bound.sum(), prediction)
    assert not of_error[:, 4:].any()
    assert not of_bound[:, :4].any()
    assert of_error[:, :4].any()
    assert of_bound[:, 4:].any()


# --- sampling ---


class Oracle:
    """The network that knows the answer: it predicts the noise between what it sees and the clean latent."""

    def __init__(self, clean: Tensor) -> None:
        self.process, self.clean, self.times = Process(1000), clean, list[int]()

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        assert len(set(time.tolist())) == 1
        self.times.append(int(time[0]))
        noise = self.process.predict_noise(x, time, self.clean)
        return torch.cat([noise, torch.full_like(noise, -1.0)], dim=1)


@pytest.mark.parametrize("method", ["ancestral", "ddim"])
def test_sampling_with_a_perfect_network_ends_at_the_clean_latent(method: str) -> None:
    clean, noise = torch.randn(2, 4, 1, 2, 2), torch.randn(2, 4, 1, 2, 2)
    network, sampling = Oracle(clean), SamplingConfig.model_validate({"steps": 20, "method": method})
    out = Diffusion().sample(network, noise, sampling, [torch.Generator().manual_seed(seed) for seed in range(2)])
    assert torch.allclose(out, clean, atol=1e-4)
    assert network.times == respaced(1000, 20)[::-1]  # original steps, the noisiest first


def test_ancestral_clip_depends_on_its_own_generator_alone() -> None:
    def network(x: Tensor, time: Tensor) -> Tensor:
        return torch.cat([x / 3, torch.zeros_like(x)], dim=1)

    noise, sampling = torch.randn(3, 4, 1, 2, 2), SamplingConfig(steps=5)
    together = Diffusion().sample(network, noise, sampling, [torch.Generator().manual_seed(seed) for seed in (5, 6, 7)])
    alone = Diffusion().sample(network, noise[[2]], sampling, [torch.Generator().manual_seed(7)])
    assert torch.allclose(together[[2]], alone, rtol=1e-5)
    other = Diffusion().sample(network, noise[[2]], sampling, [torch.Generator().manual_seed(8)])
    assert not torch.allclose(alone, other, rtol=1e-2)


def test_flows_sampler_is_refused() -> None:
    with pytest.raises(ConfigError, match="euler belongs to objective flow"):
        Diffusion().sample(lambda x, time: x, torch.zeros(1, 4, 1, 2, 2), SamplingConfig(steps=2, method="euler"), [])
