"""nn.Linear, computed by oneDNN on a CPU.

torch sends fp32 matrix products to MKL, which runs at half speed on CPUs that are not Intel's, because it does not use their AVX512.
oneDNN, which is in every torch wheel, does use it: 220 GFLOP/s a core against 104, and a whole training step takes 0.54 of the time
(bench/step.py; AMD EPYC Zen 5, torch 2.15). oneDNN's results depend only on the numbers; MKL's depend also on a tensor's memory layout.

The operation is the one that torch's own compiler puts in place of a linear layer on a CPU; it has no public name. If torch does not
have it, and for every other type and device, this is nn.Linear.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

AVAILABLE: bool = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")  # type: ignore[no-untyped-call]


class Linear(nn.Linear):
    """Same names and shapes as nn.Linear. Its weights are uninitialised memory until the caller writes them: STDiT draws them, or a
    checkpoint replaces them. To draw them here as well took 9% of a resume at width 384."""

    def reset_parameters(self) -> None:
        """Does nothing, see above."""

    def forward(self, x: Tensor) -> Tensor:
        """(..., in) -> (..., out)."""
        plain = x.dtype != torch.float32 or x.device.type != "cpu" or torch.is_autocast_enabled("cpu")
        if plain or not AVAILABLE or not x.numel():
            return F.linear(x, self.weight, self.bias)
        out: Tensor = _OneDNN.apply(x, self.weight, self.bias)
        return out


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (..., k), weight (n, k) -> (..., n)."""
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


class _OneDNN(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (gradient,) = gradients
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad
        rows = gradient.flatten(0, -2)
        of_x = _product(gradient, weight.t(), None) if wants_x else None
        of_weight = _product(rows.t(), x.flatten(0, -2).t(), None) if wants_weight else None
        return of_x, of_weight, rows.sum(0) if wants_bias else None
