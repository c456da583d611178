from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from opensora.config import IDDPM, SAMPLING_METHODS, Flow, MaskConfig, ModelConfig, SamplingConfig
from opensora.diffusion import guidance, objective
from opensora.diffusion.given_frames import Held, draw, holding, with_given
from opensora.model.stdit import STDiT

MODEL = ModelConfig(depth=2, width=32, heads=2, latent_channels=4, caption_width=16, caption_tokens=5)
OBJECTIVES: dict[str, IDDPM | Flow] = {"iddpm": IDDPM(kind="iddpm"), "flow": Flow(kind="flow")}
EVERY = [(kind, method) for kind, methods in SAMPLING_METHODS.items() for method in methods]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def network(kind: str) -> STDiT:
    model = STDiT(MODEL, (4, 4, 4), 8 if kind == "iddpm" else 4, generator=generator())
    for weight in model.parameters():
        weight.data.normal_(0, 0.2, generator=generator())
    return model


@pytest.mark.parametrize(
    ("share", "frames", "wanted"),
    [
        ("first_frame", 8, [0]),
        ("last_frame", 8, [7]),
        ("both_frames", 8, [0, 7]),
        ("first_quarter", 8, [0, 1]),
        ("last_quarter", 8, [6, 7]),
        ("both_quarters", 8, [0, 1, 6, 7]),
        ("both_quarters", 2, [0]),
        ("both_frames", 2, [0]),
    ],
)
def test_each_kind_gives_its_frames(share: str, frames: int, wanted: list[int]) -> None:
    given = draw(MaskConfig.model_validate({share: 1.0}), 3, frames, generator())
    assert given is not None and [row.nonzero().flatten().tolist() for row in given] == [wanted] * 3


def test_kinds_come_by_their_shares_and_a_frame_is_always_left() -> None:
    given = draw(MaskConfig(first_frame=0.25, random=0.5), 4000, 8, generator())
    assert given is not None
    counts = given.sum(1)
    assert counts.max() == 4 and abs(float((counts == 0).float().mean()) - 0.25) < 0.03
    only_first = (counts == 1) & given[:, 0]
    assert abs(float(only_first.float().mean()) - (0.25 + 0.5 / 4 / 8)) < 0.03
    assert draw(MaskConfig(random=1), 2, 1, generator()) is None
    by_token = draw(MaskConfig(first_frame=1), 1, 8, generator(), patch=2)
    assert by_token is not None and by_token[0].tolist() == [True, True, *[False] * 6]


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_given_frames_have_no_part_in_the_loss_and_are_seen_clean(kind: str) -> None:
    chosen, clean = objective.build(OBJECTIVES[kind]), torch.randn(2, 4, 4, 4, 4, generator=generator(1))
    noise, time = torch.randn(clean.shape, generator=generator(2)), chosen.draw_time(2, generator(3))
    given = torch.tensor([[True, False, False, False], [False, False, True, True]])
    seen: list[Tensor] = []

    def predict(x: Tensor, _: Tensor) -> Tensor:
        seen.append(x)
        made = torch.randn(2, 8 if kind == "iddpm" else 4, 4, 4, 4, generator=generator(4))
        return made + 100 * given[:, None, :, None, None]

    inside = (given[:, None, :, None, None]).expand_as(clean)
    loss = chosen.loss(predict, clean, time, noise, given)
    assert torch.equal(seen[0][inside], clean[inside]) and not torch.isclose(seen[0][~inside], clean[~inside]).any()
    assert float(loss.max()) < 50, "what was predicted for given frames is far off, and does not count"
    none = torch.zeros_like(given)
    assert torch.allclose(chosen.loss(predict, clean, time, noise, none), chosen.loss(predict, clean, time, noise), rtol=1e-6)


@torch.no_grad()
def test_a_frame_that_is_given_is_modulated_as_at_time_0() -> None:
    model, x = network("flow"), torch.randn(2, 4, 4, 4, 4, generator=generator(1))
    captions, time = torch.randn(2, 5, 16, generator=generator(2)), torch.tensor([300.0, 800.0])
    every = torch.ones(2, 4, dtype=torch.bool)
    assert torch.allclose(model(x, time, captions, given=every), model(x, torch.zeros(2), captions), atol=1e-5)
    assert torch.allclose(model(x, time, captions, given=~every), model(x, time, captions), atol=1e-5)
    one = every.clone()
    one[:, 1:] = False
    assert not torch.allclose(model(x, time, captions, given=one), model(x, time, captions), atol=1e-2)


@torch.no_grad()
@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("kind", "method"), EVERY)
def test_given_frames_come_back_from_every_sampler_and_change_the_others(kind: str, method: Any, learned: bool) -> None:
    chosen, model = objective.build(OBJECTIVES[kind]), network(kind)
    noise = torch.randn(2, 4, 4, 4, 4, generator=generator(1))
    clean = torch.randn(noise.shape, generator=generator(2))
    captions = torch.randn(2, 5, 16, generator=generator(3))
    given = torch.tensor([[True, False, False, False]] * 2)
    how = SamplingConfig(steps=3, method=method, guidance=2.0)

    def drawn(held: Held | None) -> Tensor:
        told = given if held is not None and held.learned else None
        net = guidance.guided(model, captions, None, guidance.Guidance.of(how), last_time=chosen.last_time, given=told)
        if held is None:
            return chosen.sample(net, noise, how, [generator(5), generator(6)])
        out = chosen.sample(holding(net, held, noise, chosen.noised), noise, how, [generator(5), generator(6)])
        return with_given(out, held.clean, held.given)

    kept, free = drawn(Held(clean, given, learned)), drawn(None)
    assert torch.equal(kept[:, :, 0], clean[:, :, 0]) and kept.isfinite().all()
    assert not torch.allclose(kept[:, :, 1:], free[:, :, 1:], atol=1e-4), "the other frames were drawn beside the given one"
    other = clean.clone()
    other[:, :, 1:] = torch.nan
    assert torch.equal(drawn(Held(other, given, learned)), kept), "what lies at frames that are not given is not looked at"


def test_a_model_that_never_saw_given_frames_is_shown_them_at_the_noise_of_the_time() -> None:
    clean, noise = torch.randn(1, 4, 2, 4, 4, generator=generator(1)), torch.randn(1, 4, 2, 4, 4, generator=generator(2))
    given = torch.tensor([[True, False]])
    flow = objective.build(OBJECTIVES["flow"])
    seen = holding(lambda x, time: x, Held(clean, given, learned=False), noise, flow.noised)(torch.zeros_like(clean), torch.tensor([250.0]))
    assert torch.allclose(seen[:, :, 0], 0.75 * clean[:, :, 0] + 0.25 * noise[:, :, 0]) and not seen[:, :, 1].any()
    trained = holding(lambda x, time: x, Held(clean, given, learned=True), noise, flow.noised)(
        torch.zeros_like(clean), torch.tensor([250.0])
    )
    assert torch.equal(trained[:, :, 0], clean[:, :, 0]), "a trained one sees them clean"
