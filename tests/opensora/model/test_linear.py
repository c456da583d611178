from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from opensora.model import linear
from opensora.model.linear import Linear


def drawn(width_in: int, width_out: int) -> Linear:
    """A layer with numbers in it."""
    layer = Linear(width_in, width_out)
    with torch.no_grad():
        for weight in layer.parameters():
            weight.normal_()
    return layer


def passes(layer: Linear, x: Tensor, product: object = None) -> list[Tensor]:
    """Output, then the gradients of input, weight and bias."""
    x = x.clone().requires_grad_()
    layer.zero_grad()
    out = layer(x) if product is None else F.linear(x, layer.weight, layer.bias)
    (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
    assert x.grad is not None and layer.weight.grad is not None and layer.bias.grad is not None
    return [out.detach(), x.grad, layer.weight.grad.clone(), layer.bias.grad.clone()]


@pytest.mark.skipif(not linear.AVAILABLE, reason="a torch without oneDNN's linear layer")
@pytest.mark.parametrize("shape", [(5, 12), (2, 3, 12), (2, 3, 4, 12), (1, 12)])
def test_it_computes_what_torchs_layer_computes(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    layer, x = drawn(12, 7), torch.randn(shape)
    for ours, theirs in zip(passes(layer, x), passes(layer, x, F.linear), strict=True):
        assert ours.shape == theirs.shape
        assert float((ours - theirs).abs().max()) <= 2e-6 * float(theirs.abs().max())


def test_results_do_not_depend_on_where_a_tensor_lies() -> None:
    torch.manual_seed(0)
    layer, memory = drawn(64, 48), torch.randn(40 * 64 + 8)
    first = passes(layer, memory[:-8].view(40, 64))
    shifted = torch.empty(40 * 64 + 8)
    for offset in range(1, 8):
        view = shifted[offset : offset + 40 * 64].view(40, 64)
        view.copy_(memory[:-8].view(40, 64))
        assert all(torch.equal(ours, same) for ours, same in zip(passes(layer, view), first, strict=True))


def test_only_the_gradients_that_are_asked_for_are_computed() -> None:
    layer = drawn(4, 3)
    layer.requires_grad_(False)
    x = torch.randn(2, 4, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad is not None and layer.weight.grad is None and layer.bias.grad is None
    assert not layer(x.detach()).requires_grad


def test_other_types_are_torchs_own() -> None:
    layer, x = drawn(4, 3).to(torch.bfloat16), torch.randn(2, 4, dtype=torch.bfloat16)
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    with torch.autocast("cpu", torch.bfloat16):
        assert drawn(4, 3)(torch.randn(2, 4)).dtype == torch.bfloat16
    assert drawn(4, 3)(torch.empty(0, 4)).shape == (0, 3)
