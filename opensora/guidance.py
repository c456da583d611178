"""Captions put into a network: conditional for training, with classifier-free guidance for sampling.

Reference: Ho & Salimans (arXiv:2207.12598).
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from torch import Tensor

from opensora.diffusion import Network


class CaptionedNetwork(Protocol):
    """STDiT, or what wraps it (DistributedDataParallel)."""

    def __call__(self, x: Tensor, time: Tensor, captions: Tensor, mask: Tensor | None = None, drop: Tensor | None = None) -> Tensor: ...


def conditional(model: CaptionedNetwork, captions: Tensor, mask: Tensor | None, drop: Tensor | None = None) -> Network:
    """The model under its captions; `drop` (B,) bool picks the clips that see the null caption."""
    return lambda x, time: model(x, time, captions, mask, drop)


def guided(
    model: CaptionedNetwork, captions: Tensor, mask: Tensor | None, scale: float, channels: Literal["all", "first3"] = "all"
) -> Network:
    """Null + scale · (caption - null), from one batch of twice the clips. Scale 1 is the caption alone, in one batch.

    The null half keeps the prompts' masks, as upstream. Channels beyond the latent's own (the variance of iddpm) are the
    caption's. `first3` leaves the fourth latent channel unguided too: what Open-Sora 1.0 did, an accident from the days
    of three colours.
    """
    if scale == 1:
        return conditional(model, captions, mask)
    clips = len(captions)
    both = torch.cat([captions, captions])
    masks = None if mask is None else torch.cat([mask, mask])
    drop = torch.arange(2 * clips, device=captions.device) >= clips

    def network(x: Tensor, time: Tensor) -> Tensor:
        captioned, null = model(torch.cat([x, x]), torch.cat([time, time]), both, masks, drop).chunk(2)
        count = 3 if channels == "first3" else x.shape[1]
        prediction = null[:, :count] + scale * (captioned[:, :count] - null[:, :count])
        return torch.cat([prediction, captioned[:, count:]], dim=1)

    return network
