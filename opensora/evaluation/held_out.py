"""The loss on clips that no stage has trained on, for each range of noise levels, with fixed clips, noise and levels.

Owns the held-out clips, the levels and the interval of a mean. The training loss of two stages cannot be compared: each draws other times,
other clips and dropped captions. Here all of it is a function of (clips, size, seed), so two sets of weights are asked the same questions.
Refuses to compare objectives: the loss of `flow` and that of `iddpm` are of different quantities.

Clips are of handwriting of the test split. They hold all combinations of digit and direction, those that are never trained on too.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from opensora.config import IDDPM, Flow, StageConfig
from opensora.data.digits import COMBINATIONS, canvas, caption
from opensora.diffusion import guidance, objective
from opensora.encoders.protocol import Autoencoder, TextEncoder, encode_clips, padded
from opensora.evaluation.digits import clip_seed
from opensora.evaluation.sampler import Sampler

BUCKETS = 10
"""Ranges of the noise level, equally wide, from clean to noise. Each clip has one level in each of them."""
AT_ONCE = 32
RESAMPLES = 2000


@dataclass(frozen=True)
class HeldOut:
    """n held-out clips, encoded."""

    latents: Tensor  # (n, C, T, h, w)
    vectors: Tensor  # (n, L, width)
    mask: Tensor  # (n, L) bool
    digest: str
    """Over frames, captions and seed: equal for equal questions."""


def held_out(stage: StageConfig, autoencoder: Autoencoder, text: TextEncoder, *, clips: int, frames: int, seed: int) -> HeldOut:
    """Clips of the stage's size and quality, of so many frames.

    Raises:
        ConfigError: the stage's data are not digits, or its text encoder does not know their words.
    """
    asked = [COMBINATIONS[index % len(COMBINATIONS)] for index in range(clips)]
    digits, directions = np.array(asked).T
    grey = canvas(stage.data, frames).draw(np.random.default_rng([seed, frames, clips]), digits, directions, "test").clips
    captions = [caption(digit, direction if frames > 1 else None) for digit, direction in asked]
    pixels = torch.from_numpy(grey)[..., None].expand(*grey.shape, 3)
    latents = torch.cat([encode_clips(autoencoder, pixels[first : first + AT_ONCE]) for first in range(0, clips, AT_ONCE)])
    vectors, mask = padded(text.encode(captions))
    return HeldOut(latents, vectors, mask, hashlib.sha256(grey.tobytes() + "\n".join([*captions, str(seed)]).encode()).hexdigest())


def levels(clips: int, seed: int) -> Tensor:
    """(clips, BUCKETS) noise levels in (0, 1), fp32: one in each range, the same for clip i whatever the number of clips."""
    rows = [torch.rand(BUCKETS, generator=torch.Generator().manual_seed(clip_seed(seed, index))) for index in range(clips)]
    return (torch.arange(BUCKETS) + torch.stack(rows)) / BUCKETS


@torch.no_grad()
def losses(sampler: Sampler, clips: HeldOut, seed: int, beat: Callable[[], None] = lambda: None) -> Tensor:
    """(n, BUCKETS) fp64 loss of each clip in each range, without classifier-free guidance. `beat` is called before each batch.

    Raises:
        ParentError: the weights are not those of the stage's model.
    """
    stage, device, count = sampler.stage, sampler.device, len(clips.latents)
    model, chosen = sampler.network(clips.latents.shape[2]), objective.build(_unweighted(stage.objective))
    generators = [torch.Generator().manual_seed(clip_seed(seed, index)) for index in range(count)]
    noise = objective.draw_noise(generators, tuple(clips.latents.shape[1:]))  # on the CPU: the same on every device
    times = _times(stage.objective, levels(count, seed))
    found = torch.zeros(count, BUCKETS, dtype=torch.float64)
    for first in range(0, count, AT_ONCE):
        some = slice(first, first + AT_ONCE)
        clean, noisy, vectors, mask = (part[some].to(device) for part in (clips.latents, noise, clips.vectors, clips.mask))
        network = guidance.conditional(model, vectors, mask)
        for bucket in range(BUCKETS):
            beat()
            found[some, bucket] = chosen.loss(network, clean, times[some, bucket].to(device), noisy).double().cpu()
    return found


def _unweighted(config: IDDPM | Flow) -> IDDPM | Flow:
    """How a stage weighs its training loss is part of its recipe, and not of what the loss of another recipe is compared with."""
    return config.model_copy(update={"min_snr": None}) if isinstance(config, IDDPM) else config


def _times(config: IDDPM | Flow, level: Tensor) -> Tensor:
    """Training times of these noise levels: `Objective.draw_time` without its distribution, so that stages of other shifts are alike."""
    return (level * config.steps).long() if isinstance(config, IDDPM) else level


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95% interval of the mean of n values, by the percentiles of the means of RESAMPLES draws with replacement (Efron 1979)."""
    drawn = np.random.default_rng(0).integers(0, len(values), (RESAMPLES, len(values)))
    low, high = np.percentile(values[drawn].mean(1), (2.5, 97.5))
    return float(low), float(high)


def readings(own: Tensor, parent: Tensor | None, prefix: str = "") -> dict[str, float]:
    """The mean loss with its interval, that of each range, and beside the parent's weights what was gained, clip by clip.

    Args:
        own: (n, BUCKETS) losses of the weights that are judged.
        parent: the same of the weights that the stage started from. None: there are none.
    """
    mean = own.mean(1).numpy()
    result = {f"{prefix}held_out_clips": float(len(own))} | _mean(f"{prefix}held_out_loss", mean)
    result |= {f"{prefix}held_out_loss_t{bucket}": float(own[:, bucket].mean()) for bucket in range(BUCKETS)}
    if parent is not None:
        before = parent.mean(1).numpy()
        result |= {f"{prefix}held_out_loss_parent": float(before.mean())} | _mean(f"{prefix}held_out_gain", before - mean)
    return result


def _mean(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    low, high = interval(values)
    return {name: float(values.mean()), f"{name}_low": low, f"{name}_high": high}


def judged(
    samplers: Sequence[Sampler], *, clips: int, frames: int, seed: int, prefix: str = "", beat: Callable[[], None] = lambda: None
) -> tuple[dict[str, float], str]:
    """Readings of the first sampler's weights, beside the second's where there is one; and the digest of the clips. Raises as above."""
    own = samplers[0]
    asked = held_out(own.stage, own.autoencoder, own.text, clips=clips, frames=frames, seed=seed)
    found = [losses(sampler, asked, seed, beat) for sampler in samplers]
    return readings(found[0], found[1] if len(found) > 1 else None, prefix), asked.digest
