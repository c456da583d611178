from __future__ import annotations

import pytest
import torch
from torch import Tensor

from opensora.config import Activations, ModelConfig, RoutingConfig
from opensora.model.routing import Route, draw
from opensora.model.stdit import STDiT

HALF = RoutingConfig(rate=0.5, first_blocks=1, last_blocks=1)
CLIPS, TUBES = 3, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def model() -> STDiT:
    settings = ModelConfig(depth=4, width=32, heads=4, caption_width=8, caption_tokens=6)
    made = STDiT(settings, (4, 4, 6), 8)
    with torch.no_grad():
        for weight in made.parameters():
            weight.normal_(std=0.1, generator=generator(7))
    return made


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    source = generator(1)
    return torch.randn(CLIPS, 4, 4, 4, 6, generator=source), torch.tensor([1.0, 500.0, 900.0]), torch.randn(CLIPS, 6, 8, generator=source)


def streams(network: STDiT, route: Route | None) -> list[Tensor]:
    """What each block was given, and what the last one made."""
    seen: list[Tensor] = []
    hooks = [block.register_forward_pre_hook(lambda _, given: seen.append(given[0])) for block in network.blocks]
    hooks.append(network.blocks[-1].register_forward_hook(lambda _, __, made: seen.append(made)))
    network(*inputs(), route=route)
    for hook in hooks:
        hook.remove()
    return seen


def test_a_set_of_tubes_is_drawn_for_each_clip() -> None:
    route = draw(HALF, 4, 200, TUBES, generator())
    assert route is not None and (route.first, route.stop) == (1, 3)
    assert route.through.shape == (200, 3)
    assert (route.through.diff(dim=1) > 0).all()
    counts = torch.bincount(route.through.flatten(), minlength=TUBES)
    assert counts.sum() == 600 and counts.min() > 70  # of 100 each
    assert len({tuple(row) for row in route.through.tolist()}) == 20  # all sets of 3 of 6


@pytest.mark.parametrize("rate", [0.0, 0.01])
def test_where_no_tube_skips_nothing_is_drawn(rate: float) -> None:
    source = generator()
    before = source.get_state()
    assert draw(HALF.model_copy(update={"rate": rate}), 4, CLIPS, TUBES, source) is None
    assert torch.equal(source.get_state(), before)


def test_at_least_one_tube_goes_through() -> None:
    assert [RoutingConfig(rate=rate).tubes_through(4) for rate in (0.0, 0.5, 0.75, 0.99)] == [4, 2, 1, 1]


def test_all_tokens_come_back_and_those_that_skipped_are_as_they_were() -> None:
    network, route = model(), draw(HALF, 4, CLIPS, TUBES, generator())
    assert route is not None
    seen = streams(network, route)
    assert [x.shape[2] for x in seen] == [TUBES, 3, 3, TUBES, TUBES]
    assert torch.equal(seen[1], route.take(streams(network, None)[1]))
    skipped = torch.ones(CLIPS, TUBES, dtype=torch.bool).scatter(1, route.through, False)
    before, after = streams(network, None)[1], seen[3]
    for clip in range(CLIPS):
        assert torch.equal(after[clip, :, skipped[clip]], before[clip, :, skipped[clip]])
        assert not torch.equal(after[clip, :, ~skipped[clip]], before[clip, :, ~skipped[clip]])


def test_a_route_that_all_tubes_go_through_changes_no_bit() -> None:
    network, all_of_them = model(), Route(torch.arange(TUBES).expand(CLIPS, -1), 1, 3)
    assert torch.equal(network(*inputs(), route=all_of_them), network(*inputs()))


def test_every_token_and_every_weight_has_a_gradient() -> None:
    network, route = model(), draw(HALF, 4, CLIPS, TUBES, generator())
    x, time, captions = inputs()
    x.requires_grad_()
    network(x, time, captions, route=route).square().mean().backward()
    assert x.grad is not None and x.grad.ne(0).all()
    assert all(weight.grad is not None and weight.grad.any() for weight in network.parameters())


def test_recomputed_blocks_give_the_same_gradients() -> None:
    gradients = []
    for policy in (Activations(), Activations(recompute="full", every=2), Activations(recompute="selective")):
        network, route = model(), draw(HALF, 4, CLIPS, TUBES, generator())
        network.keep(policy)
        network(*inputs(), route=route).square().mean().backward()
        gradients.append([weight.grad for weight in network.parameters() if weight.grad is not None])
    for other in gradients[1:]:
        assert all(torch.equal(one, two) for one, two in zip(gradients[0], other, strict=True))
