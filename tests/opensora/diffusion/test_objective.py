from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora.config import IDDPM, Flow, ModelConfig, SamplingConfig
from opensora.diffusion.guidance import Guidance, conditional, guided
from opensora.diffusion.objective import build, draw_noise
from opensora.model.stdit import STDiT

OBJECTIVES = pytest.mark.parametrize("config", [IDDPM(kind="iddpm"), Flow(kind="flow")], ids=lambda config: config.kind)


def network_for(config: IDDPM | Flow) -> STDiT:
    settings = ModelConfig(depth=2, width=32, heads=4, caption_width=8, caption_tokens=6)
    return STDiT(settings, (2, 4, 4), 8 if config.kind == "iddpm" else 4, generator=torch.Generator().manual_seed(0))


@OBJECTIVES
def test_a_batch_can_be_learnt_by_heart(config: IDDPM | Flow) -> None:
    model, objective = network_for(config), build(config)
    generator = torch.Generator().manual_seed(1)
    clean, noise = (torch.randn(4, 4, 2, 4, 4, generator=generator) for _ in range(2))
    captions = torch.randn(4, 6, 8, generator=generator)
    time = objective.draw_time(4, generator)
    losses = []
    for _ in range(60):
        loss = objective.loss(conditional(model, captions, None), clean, time, noise).mean()
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():  # by hand: the first optimizer of torch.optim imports the whole compiler
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.002 * gradient.sign()
        losses.append(loss.item())
    assert losses[-1] < 0.6 * losses[0]


@OBJECTIVES
def test_times_and_losses_are_functions_of_the_generator(config: IDDPM | Flow) -> None:
    objective = build(config)
    first, again, other = (objective.draw_time(64, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.dtype == (torch.int64 if config.kind == "iddpm" else torch.float32)


def test_iddpm_draws_every_step_and_no_other() -> None:
    drawn = build(IDDPM(kind="iddpm", steps=50)).draw_time(2000, torch.Generator().manual_seed(0))
    assert drawn.unique().tolist() == list(range(50))


def test_flow_draws_the_times_that_it_is_configured_for() -> None:
    uniform, crowded = (build(Flow.model_validate({"kind": "flow", "time": time})) for time in ("uniform", "logit-normal"))
    drawn = [objective.draw_time(64, torch.Generator().manual_seed(0)) for objective in (uniform, crowded)]
    assert torch.equal(drawn[0], torch.rand(64, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(drawn[1], torch.randn(64, generator=torch.Generator().manual_seed(0)).sigmoid())


@OBJECTIVES
def test_sampling_gives_latents_of_the_noises_shape_and_repeats_itself(config: IDDPM | Flow) -> None:
    model, objective = network_for(config), build(config)
    torch.nn.init.normal_(model.final_layer.linear.weight, std=0.02, generator=torch.Generator().manual_seed(2))
    captions = torch.ones(3, 6, 8)
    sampling = SamplingConfig(steps=4, method="euler" if config.kind == "flow" else "ancestral", guidance=3.0)

    def draw(seeds: list[int]) -> Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        noise = draw_noise(generators, (4, 2, 4, 4))
        with torch.no_grad():
            return objective.sample(
                guided(model, captions[: len(seeds)], None, Guidance.of(sampling), last_time=objective.last_time),
                noise,
                sampling,
                generators,
            )

    clips = draw([1, 2, 3])
    assert clips.shape == (3, 4, 2, 4, 4)
    assert torch.equal(clips, draw([1, 2, 3]))
    assert torch.allclose(clips[[1]], draw([2]), atol=1e-5)  # whoever shares its batch
    assert not torch.allclose(clips[0], clips[1], atol=1e-2)


def test_noise_of_a_clip_is_its_generators() -> None:
    both = draw_noise([torch.Generator().manual_seed(seed) for seed in (1, 2)], (4, 3))
    assert torch.equal(both[1], torch.randn(4, 3, generator=torch.Generator().manual_seed(2)))
    assert not torch.equal(both[0], both[1])
