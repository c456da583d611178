"""Bind captions to a network: `conditional` for training, `guided` (classifier-free guidance) for sampling.

References: Ho & Salimans (arXiv:2207.12598) · Kynkäänniemi et al. (arXiv:2404.07724: in an interval) · Lin et al. (arXiv:2305.08891:
rescaled).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

import torch
from torch import Tensor

from opensora.config import SamplingConfig
from opensora.diffusion.iddpm import Network


class CaptionedNetwork(Protocol):
    """STDiT, or a wrapper around it (DistributedDataParallel)."""

    def __call__(
        self,
        x: Tensor,
        time: Tensor,
        captions: Tensor,
        mask: Tensor | None = None,
        drop: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor: ...


def conditional(
    model: CaptionedNetwork, captions: Tensor, mask: Tensor | None, drop: Tensor | None = None, given: Tensor | None = None
) -> Network:
    """The model with these captions; `drop` (B,) bool selects the clips that get the null caption instead, `given` (B, T) bool the frames
    that it is told are clean."""
    told = () if given is None else (given,)
    return lambda x, time: model(x, time, captions, mask, drop, *told)


@dataclass(frozen=True)
class Guidance:
    """How far a prediction is led away from the null caption's, and where."""

    scale: float
    """1 turns it off."""
    channels: Literal["all", "first3"] = "all"
    """`first3` leaves the fourth latent channel unguided, as Open-Sora 1.0 did, whose code came from models of three colour channels."""
    interval: tuple[float, float] = (0.0, 1.0)
    """Times, from 0 clean to 1 noise, between which it is led (arXiv:2404.07724)."""
    rescale: float = 0.0
    """Share of the captioned prediction's standard deviation that the guided one gets back (arXiv:2305.08891 §3.4)."""

    @classmethod
    def of(cls, sampling: SamplingConfig) -> Guidance:
        return cls(sampling.guidance, sampling.guidance_channels, sampling.guidance_interval, sampling.guidance_rescale)


def guided(
    model: CaptionedNetwork,
    captions: Tensor,
    mask: Tensor | None,
    how: Guidance,
    *,
    last_time: float,
    negative: tuple[Tensor, Tensor | None] | None = None,
    given: Tensor | None = None,
) -> Network:
    """The prediction null + scale · (caption - null), from one batch of twice the clips. At scale 1 only the caption is computed.

    The null half keeps the prompts' masks, as upstream. Channels beyond the latent's own (the variance of iddpm) are not guided:
    they come from the caption's half. All clips of a call are at the same time, as samplers have them.

    Args:
        captions: (B, L, width), and mask (B, L).
        last_time: what the network is told of pure noise (`Objective.last_time`).
        negative: captions and mask of what the clips should not show, as long as the prompts'; they take the null caption's place.
        given: (B, T) bool, frames that the model is told are clean.
    """
    alone = conditional(model, captions, mask, given=given)
    if how.scale == 1:
        return alone
    both, masks, drop = _two_halves(captions, mask, negative)
    told = () if given is None else (torch.cat([given, given]),)
    low, high = (time * last_time for time in how.interval)
    everywhere = how.interval == (0.0, 1.0)

    def network(x: Tensor, time: Tensor) -> Tensor:
        if not everywhere and not low <= float(time[0]) <= high:  # a look at the device, which costs nothing where nobody asks for it
            return alone(x, time)
        captioned, null = model(torch.cat([x, x]), torch.cat([time, time]), both, masks, drop, *told).chunk(2)
        count = 3 if how.channels == "first3" else x.shape[1]
        wanted = captioned[:, :count]
        prediction = null[:, :count] + how.scale * (wanted - null[:, :count])
        if how.rescale:
            prediction = _rescaled(prediction, wanted, how.rescale)
        return torch.cat([prediction, captioned[:, count:]], dim=1)

    return network


def _two_halves(
    captions: Tensor, mask: Tensor | None, negative: tuple[Tensor, Tensor | None] | None
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Captions (2B, L, width), mask (2B, L) and drop (2B,) of a batch whose second half is led away from."""
    clips = len(captions)
    if negative is None:
        masks = None if mask is None else torch.cat([mask, mask])
        return torch.cat([captions, captions]), masks, torch.arange(2 * clips, device=captions.device) >= clips
    others, other_mask = negative
    return torch.cat([captions, others]), None if mask is None or other_mask is None else torch.cat([mask, other_mask]), None


def _rescaled(guided: Tensor, captioned: Tensor, share: float) -> Tensor:
    """(B, C, …), with each clip's standard deviation moved towards that of the captioned prediction."""
    dims = tuple(range(1, guided.ndim))
    factor = captioned.std(dims, keepdim=True) / guided.std(dims, keepdim=True).clamp(min=1e-12)
    return guided * (share * factor + 1 - share)
