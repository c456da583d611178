"""One clip on several ranks: each rank holds a part of its frames, or of its spatial tokens, and the ranks exchange these parts.

Owns the two ways to cut a clip and the exchange between them. Everything in a block except temporal attention works on single frames or
single tokens, so a rank that holds whole frames computes it alone. For temporal attention the ranks exchange once, so that each holds
all frames of some tokens, and once more to go back: two all-to-alls of one residual stream a block. (Ulysses' exchange of q, k, v and
the output around both attentions moves four times as many bytes: bench/exchange.py.)

If the frames do not divide evenly, zeros are added at the end; likewise for tokens. What was computed for the zeros is cut off before it
is used, so no mask is needed and the result is that of one rank.

Reference: DSP, Zhao et al. (arXiv:2403.10266).
Legend: n ranks · B batch · T frames · S spatial tokens · D width.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Sequence:
    """The ranks that share each clip. All of them are given the same clips, times, noise and captions."""

    group: dist.ProcessGroup
    rank: int
    """The rank of this process in the group."""
    ranks: int

    def own_frames(self, x: Tensor, dim: int, frames: int) -> Tensor:
        """This rank's part of `frames` whole frames along `dim`, filled up with zeros if too few are left."""
        share = -(-frames // self.ranks)
        start = min(self.rank * share, frames)
        part = x.narrow(dim, start, min(share, frames - start))
        missing = share - part.shape[dim]
        if not missing:
            return part
        return torch.cat([part, part.new_zeros(*part.shape[:dim], missing, *part.shape[dim + 1 :])], dim)

    def cut(self, frames: int, spatial: int) -> Cut:
        """How a clip of `frames` token frames and `spatial` tokens a frame is divided over the ranks."""
        return Cut(self, frames, spatial)


@dataclass(frozen=True)
class Cut:
    """Which rank holds which tokens of a clip of T frames and S spatial tokens.

    Every method but `own_frames` is a collective, forward and backward.
    """

    sequence: Sequence
    frames: int
    spatial: int

    def own_frames(self, x: Tensor) -> Tensor:
        """(B, T, …) of all frames -> (B, T/n, …) of this rank's."""
        return self.sequence.own_frames(x, 1, self.frames)

    def to_tokens(self, x: Tensor) -> Tensor:
        """(B, T/n, S, D) own frames -> (B, T, S/n, D) own tokens, all frames; both shares rounded up."""
        n = self.sequence.ranks
        share = -(-self.spatial // n)
        parts = rearrange(F.pad(x, (0, 0, 0, n * share - self.spatial)), "B T (n S) D -> n B T S D", n=n)
        return rearrange(exchange(parts, self.sequence.group), "n B T S D -> B (n T) S D")[:, : self.frames]

    def to_frames(self, x: Tensor) -> Tensor:
        """(B, T, S/n, D) own tokens -> (B, T/n, S, D) own frames: back from `to_tokens`."""
        n = self.sequence.ranks
        share = -(-self.frames // n)
        parts = rearrange(F.pad(x, (0, 0, 0, 0, 0, n * share - self.frames)), "B (n T) S D -> n B T S D", n=n)
        return rearrange(exchange(parts, self.sequence.group), "n B T S D -> B T (n S) D")[:, :, : self.spatial]

    def collect(self, x: Tensor) -> Tensor:
        """(B, T/n, S, D) own frames -> (B, T, S, D), on every rank.

        The backward pass gives each rank the gradient of its own frames times n: a weight's gradient is the sum over the ranks of a clip,
        but strategies average over all ranks.
        """
        whole: Tensor = _Collect.apply(x.contiguous(), self.sequence)
        return rearrange(whole, "n B T S D -> B (n T) S D")[:, : self.frames]


def all_of(own: Tensor, sequence: Sequence) -> Tensor:
    """(…) of each rank, of one shape -> (n, …) on every rank. Without a backward pass."""
    whole = own.new_empty(sequence.ranks, *own.shape)
    dist.all_gather_into_tensor(whole.flatten(0, 1), own.contiguous(), group=sequence.group)
    return whole


def exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """(n, ...): part i of rank r becomes part r of rank i, and so do their gradients."""
    exchanged: Tensor = _Exchange.apply(parts.contiguous(), group)
    return exchanged


class _Exchange(torch.autograd.Function):
    """Part i of rank r becomes part r of rank i: its own inverse, and so its own backward."""

    @staticmethod
    def forward(ctx: Any, parts: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        received = torch.empty_like(gradient, memory_format=torch.contiguous_format)
        dist.all_to_all_single(received, gradient.contiguous(), group=ctx.group)
        return received, None


class _Collect(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, sequence: Sequence) -> Tensor:
        ctx.sequence = sequence
        return all_of(own, sequence)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (gradient,) = gradients
        return gradient[ctx.sequence.rank] * ctx.sequence.ranks, None
