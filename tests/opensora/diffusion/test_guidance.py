from __future__ import annotations

from typing import Literal, cast

import pytest
import torch
from torch import Tensor

from opensora.config import ModelConfig
from opensora.diffusion.guidance import Guidance, conditional, guided
from opensora.model.stdit import STDiT


@pytest.fixture(scope="module")
def model() -> STDiT:
    generator = torch.Generator().manual_seed(0)
    model = STDiT(ModelConfig(depth=2, width=32, heads=4, caption_width=8, caption_tokens=6), (2, 4, 4), 8)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1, generator=generator)
    return model.eval()


@pytest.fixture(scope="module")
def inputs() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    mask = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])
    return torch.randn(2, 4, 2, 4, 4, generator=generator), torch.tensor([100, 700]), torch.randn(2, 6, 8, generator=generator), mask


def halves(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    x, time, captions, mask = inputs
    return model(x, time, captions, mask), model(x, time, model.null_caption.expand(2, -1, -1), mask)


@pytest.mark.parametrize(("channels", "count"), [("all", 4), ("first3", 3)])
def test_guidance_moves_the_named_channels_and_leaves_the_rest_to_the_caption(
    model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor], channels: Literal["all", "first3"], count: int
) -> None:
    x, time, captions, mask = inputs
    captioned, null = halves(model, inputs)
    out = guided(model, captions, mask, Guidance(7.0, channels), last_time=999)(x, time)
    assert torch.allclose(out[:, :count], null[:, :count] + 7 * (captioned - null)[:, :count], atol=1e-5)
    assert torch.allclose(out[:, count:], captioned[:, count:], atol=1e-6)


def test_null_captions_get_the_prompts_masks(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    """At scale 0 the null caption alone is left; upstream gives it the prompt's length, so a changed mask shows."""
    x, time, captions, mask = inputs
    _, null = halves(model, inputs)
    assert torch.allclose(guided(model, captions, mask, Guidance(0.0), last_time=999)(x, time)[:, :4], null[:, :4], atol=1e-6)
    shown = guided(model, captions, torch.ones_like(mask), Guidance(0.0), last_time=999)(x, time)[:, :4]
    assert torch.allclose(shown[0], null[0, :4], atol=1e-6)
    assert not torch.allclose(shown[1], null[1, :4], atol=1e-4)


def test_scale_1_is_the_caption_alone_in_one_batch(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, time, captions, mask = inputs
    batches: list[int] = []

    def counted(x: Tensor, time: Tensor, captions: Tensor, mask: Tensor | None = None, drop: Tensor | None = None) -> Tensor:
        batches.append(len(x))
        return model(x, time, captions, mask, drop)

    assert torch.equal(guided(counted, captions, mask, Guidance(1.0), last_time=999)(x, time), conditional(model, captions, mask)(x, time))
    guided(counted, captions, None, Guidance(2.0), last_time=999)(x, time)
    assert batches == [2, 4]


def test_training_drops_the_named_clips(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, time, captions, mask = inputs
    captioned, null = halves(model, inputs)
    out = conditional(model, captions, mask, torch.tensor([True, False]))(x, time)
    assert torch.allclose(out, torch.stack([null[0], captioned[1]]), atol=1e-6)


def test_outside_of_its_interval_nothing_is_led_and_half_is_computed(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, _, captions, mask = inputs
    batches: list[int] = []

    def counted(x: Tensor, *rest: Tensor | None) -> Tensor:
        batches.append(len(x))
        return cast(Tensor, model(x, *rest))

    network = guided(counted, captions, mask, Guidance(7.0, interval=(0.2, 0.6)), last_time=1000)
    everywhere = guided(model, captions, mask, Guidance(7.0), last_time=1000)
    for time, led in ((100, False), (200, True), (600, True), (700, False)):
        at = torch.full((2,), time)
        wanted = everywhere(x, at) if led else conditional(model, captions, mask)(x, at)
        assert torch.equal(network(x, at), wanted)
    assert batches == [2, 4, 4, 2]


def test_rescaled_in_full_a_prediction_varies_as_much_as_the_captions(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, time, captions, mask = inputs
    captioned, _ = halves(model, inputs)
    plain, half, whole = (
        guided(model, captions, mask, Guidance(30.0, rescale=share), last_time=1000)(x, time)[:, :4].flatten(1).std(1)
        for share in (0, 0.5, 1)
    )
    wanted = captioned[:, :4].flatten(1).std(1)
    assert torch.allclose(whole, wanted, rtol=1e-4) and not torch.allclose(plain, wanted, rtol=1e-2)
    assert torch.allclose(half, (plain + wanted) / 2, rtol=1e-4)


def test_led_away_from_itself_a_prompt_is_itself(model: STDiT, inputs: tuple[Tensor, Tensor, Tensor, Tensor]) -> None:
    x, time, captions, mask = inputs
    captioned, _ = halves(model, inputs)
    same = guided(model, captions, mask, Guidance(7.0), last_time=1000, negative=(captions, mask))(x, time)
    assert torch.allclose(same, captioned, atol=1e-5)
    other = guided(model, captions, mask, Guidance(7.0), last_time=1000, negative=(captions.flip(0), mask))(x, time)
    assert not torch.allclose(other, captioned, atol=1e-2)
