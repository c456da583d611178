"""Given frames: frames of a clip that are known, in training and in sampling; the model makes the others to go with them.

Owns which frames of a training clip are given (`draw`), the loss without them (`per_clip`), and how a sampler keeps them (`holding`).
Refuses to know how frames become latents (`opensora.evaluation.given`).

A model that was trained with given frames sees them clean and is told so: their modulation is that of time 0 (`STDiT.forward`, `given`).
Any other model is shown them at the noise of the clip's own time at each step: the replacement method.

References: Open-Sora 1.1 and 1.2 (reports, "mask strategy") · Song et al. (arXiv:2011.13456 §5) and Ho et al. (arXiv:2204.03458 §3.1:
replacement, which does not lead the other frames as well as a trained model's own conditioning).
Legend: B batch · C latent channels · T latent frames · H, W latent rows and columns.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from opensora.config import MaskConfig

Network = Callable[[Tensor, Tensor], Tensor]


def quarter(frames: int) -> int:
    """Frames of a quarter of a clip: rounded down, at least one."""
    return max(1, frames // 4)


def draw(masks: MaskConfig, clips: int, frames: int, generator: torch.Generator, patch: int = 1) -> Tensor | None:
    """(B, T) bool on the generator's device: which frames of each clip are given. At least one token's frames of each clip are not.

    Args:
        patch: frames of a token, which are given together. Of a clip of one token's frames nothing is given: None.
    """
    if frames < 2 * patch:
        return None
    return _draw(masks, clips, frames // patch, generator).repeat_interleave(patch, dim=1)


def _draw(masks: MaskConfig, clips: int, frames: int, generator: torch.Generator) -> Tensor:
    device = generator.device
    place = torch.arange(frames, device=device)
    first, last = place < 1, place >= frames - 1
    first_quarter, last_quarter = place < quarter(frames), place >= frames - quarter(frames)
    both = first | last if frames > 2 else first  # a frame has to be left
    both_quarters = first_quarter | last_quarter if frames > 2 else first
    none = torch.zeros_like(first)
    patterns = torch.stack([first, last, both, first_quarter, last_quarter, both_quarters, none, none])  # (8, T)
    shares = [masks.first_frame, masks.last_frame, masks.both_frames, masks.first_quarter, masks.last_quarter, masks.both_quarters]
    chance, kind = torch.rand(clips, generator=generator, device=device), torch.zeros(clips, dtype=torch.long, device=device)  # 2 x (B,)
    for bound in itertools.accumulate(
        [*shares, masks.random]
    ):  # numbers, and no tensor of them: its copy to the device would be waited for
        kind += chance >= bound

    counts = 1 + (torch.rand(clips, generator=generator, device=device) * (frames // 2)).long()
    ranks = torch.rand(clips, frames, generator=generator, device=device).argsort(1).argsort(1)
    anywhere = ranks < counts.clamp(max=max(1, frames // 2))[:, None]
    return torch.where((kind == len(shares))[:, None], anywhere, patterns[kind])


def per_clip(x: Tensor, given: Tensor | None = None) -> Tensor:
    """(B, ...) -> (B,) means. With `given` (B, T) bool, of x (B, C, T, H, W), over the frames that are not given."""
    if given is None:
        return x.flatten(1).mean(1)
    of_frame = x.mean((1, 3, 4))  # (B, T)
    return of_frame.masked_fill(given, 0).sum(1) / (~given).sum(1)


def with_given(x: Tensor, clean: Tensor, given: Tensor | None) -> Tensor:
    """(B, C, T, H, W): `clean` at the frames that are given, else `x`."""
    return x if given is None else torch.where(given[:, None, :, None, None], clean, x)


@dataclass(frozen=True)
class Held:
    """Frames that a sampler keeps."""

    clean: Tensor
    """(B, C, T, H, W) latents; what lies at frames that are not given is not looked at."""
    given: Tensor
    """(B, T) bool."""
    learned: bool
    """Whether the model was trained with given frames."""


def holding(network: Network, held: Held, noise: Tensor, noised: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Network:
    """The network, which sees the held frames in place of the sampler's own.

    Samplers work on each element by itself, so that whatever they make of the held frames stays there: replacing them before each
    evaluation, and once at the end (`with_given`), is replacing them at each step.

    Args:
        noise: (B, C, T, H, W) that the clip is drawn from: a model without training in it sees the held frames under their part of it.
        noised: `Objective.noised`.
    """

    def seen(x: Tensor, time: Tensor) -> Tensor:
        shown = held.clean if held.learned else noised(held.clean, noise, time)
        return network(with_given(x, shown.to(x.dtype), held.given), time)

    return seen
