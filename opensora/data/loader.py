"""Which clips a step trains on.

Owns the order: epochs, each a permutation of all clips drawn from (seed, epoch), laid end to end into one endless stream. A step takes the
next batch_size·world clips of the stream, rank r the r-th part. So within an epoch nothing is lost or doubled, all ranks have equally many
steps, and the position in the stream, `clips_seen`, is all that a resume needs, also onto another number of ranks.
A step at the seam of two epochs takes clips of both.

Letters: B batch · C latent channels · T frames · h, w latent rows and columns · L text tokens · Dc channels of a token vector.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from opensora.data.latents import Prepared


@dataclass(frozen=True)
class Batch:
    latents: torch.Tensor  # (B, C, T, h, w) float32
    vectors: torch.Tensor  # (B, L, Dc) float32
    mask: torch.Tensor  # (B, L) bool, true on tokens
    index: torch.Tensor  # (B,) int64, rows of the cache


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, clips: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, epoch]).permutation(clips)


def stream(seed: int, clips: int, start: int, count: int) -> NDArray[np.int64]:
    """Clips at positions start..start+count−1 of the endless stream over `clips` clips."""
    parts = []
    while count > 0:
        epoch, first = divmod(start, clips)
        part = _epoch(seed, epoch, clips)[first : first + count]
        parts.append(part)
        start, count = start + len(part), count - len(part)
    return np.concatenate(parts)


class Loader:
    """Batches of one rank. Holds no position: `batch` is a pure function of `clips_seen`."""

    def __init__(self, prepared: Prepared, *, seed: int, batch_size: int, rank: int = 0, world: int = 1) -> None:
        """`batch_size`: clips per rank and step."""
        self._prepared, self._seed = prepared, seed
        self._batch_size, self._rank, self._world = batch_size, rank, world

    @property
    def clips_per_step(self) -> int:
        """Of all ranks together."""
        return self._batch_size * self._world

    def batch(self, clips_seen: int) -> Batch:
        """This rank's part of the step that starts when all ranks together have seen so many clips."""
        start = clips_seen + self._rank * self._batch_size
        index = torch.from_numpy(stream(self._seed, len(self._prepared), start, self._batch_size))
        rows = self._prepared.caption_of[index]
        return Batch(self._prepared.latents[index], self._prepared.vectors[rows], self._prepared.mask[rows], index)
