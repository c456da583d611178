"""Frames that a person gives: pictures and videos, read from files and brought to the size of the clip that is drawn.

Owns which frames of the clip they are. Refuses to encode them (`opensora.evaluation.sampler`) and to keep them while a clip is drawn
(`opensora.diffusion.given_frames`).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
from torch import Tensor

from opensora.data import video
from opensora.data.screen import Unusable
from opensora.diffusion.given_frames import quarter
from opensora.errors import ConfigError

MOST_FRAMES = 1_000_000
"""Of a video that is extended, as far as they are counted."""


@dataclass(frozen=True)
class Given:
    """Frames of a clip of T frames that are given."""

    pixels: Tensor
    """uint8 (T, H, W, 3), zero where no frame is given."""
    which: Tensor
    """(T,) bool."""
    before: Tensor
    """uint8 (n, H, W, 3): the video that is extended, whole. Its last frames are the clip's first. n is 0 if none is."""
    taken: int
    """How many of the clip's first frames are the last ones of `before`."""
    facts: dict[str, Any]
    """Name and sha256 of each file, by what it is."""
    named: str
    """What of it was asked for, for messages."""


@dataclass(frozen=True)
class Asked:
    """Files of given frames; each is a picture or a video."""

    first_frame: Path | None = None
    last_frame: Path | None = None
    extend: Path | None = None

    @property
    def any(self) -> bool:
        return (self.first_frame, self.last_frame, self.extend) != (None, None, None)


def read(asked: Asked, frames: int, size: tuple[int, int], fps: float, patch: int) -> Given:
    """The given frames of a clip.

    Args:
        frames: of the clip that is drawn.
        size: rows and columns. A frame of another shape is cut to its largest centred part, as clips of a training are.
        fps: of the clip: a video is taken at this rate, whatever its own.
        patch: frames of a token of the model: as many multiples of it are taken from a video's end.

    Raises:
        ConfigError: a file is not there or cannot be read, or nothing is left to be drawn.
    """
    pixels, which = torch.zeros(frames, *size, 3, dtype=torch.uint8), torch.zeros(frames, dtype=torch.bool)
    before, share, named = pixels[:0], 0, []
    if asked.extend is not None:
        before = _video("extend", asked.extend, size, fps)
        share = max(1, min(patch * quarter(frames // patch), len(before) - len(before) % patch))
        pixels[:share], which[:share] = before[-share:], True
        named.append(f"extend {asked.extend}")
    if asked.first_frame is not None:
        pixels[0], which[0] = _picture("first_frame", asked.first_frame, size), True
        named.append(f"first_frame {asked.first_frame}")
    if asked.last_frame is not None:
        pixels[-1], which[-1] = _picture("last_frame", asked.last_frame, size), True
        named.append(f"last_frame {asked.last_frame}")
    if bool(which.all()):
        raise ConfigError(f"{named[0]}: the clip has {frames} frames and all are given; ask for more frames")
    files = {"first_frame": asked.first_frame, "last_frame": asked.last_frame, "extend": asked.extend}
    facts = {name: {"file": path.name, "sha256": _digest(path)} for name, path in files.items() if path is not None}
    return Given(pixels, which, before, share, facts, named[0])


def _picture(what: str, path: Path, size: tuple[int, int]) -> Tensor:
    try:
        with path.open("rb") as file:
            return torch.from_numpy(np.array(next(video.decode(file, 1, size=size))))
    except (OSError, Unusable) as error:
        raise _unreadable(what, path, error) from None


def _video(what: str, path: Path, size: tuple[int, int], fps: float) -> Tensor:
    rate = Fraction(fps).limit_denominator(1001)
    try:
        with path.open("rb") as file:
            count = video.probe(file, MOST_FRAMES, rate).frames
            needed, free = count * size[0] * size[1] * 3, psutil.virtual_memory().available
            if needed > free // 2:
                fact = f"{count:,} frames need {needed / 1e9:,.1f} GB of memory, {free / 1e9:,.1f} GB are free"
                raise ConfigError(f"{what} {path}: {fact}; give its end alone")
            file.seek(0)
            return torch.from_numpy(np.stack(list(video.decode(file, count, fps=rate, size=size))))
    except (OSError, Unusable) as error:
        raise _unreadable(what, path, error) from None


def _unreadable(what: str, path: Path, error: Exception) -> ConfigError:
    fact = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return ConfigError(f"{what} {path}: {fact}; give a {'video' if what == 'extend' else 'picture'} that can be read")


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
