"""The demo's captions: reads digit and direction of a clip of moving digits from its pixels, and says them as `opensora.data.digits` does.

Owns the reading of a clip's file at a size that the classifier knows. Refuses to judge (`opensora.evaluation.digit_classifier`) and to name
a file's or a source's own caption: it sees pixels alone.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from opensora.data import video
from opensora.data.digits import caption as words
from opensora.data.screen import Unusable
from opensora.dataset.rows import Captioned, Clip, Drop, Quarantine
from opensora.evaluation.digit_classifier import NOTHING, classify
from opensora.prepare.captions.shown import file_of

BY = "digits"
ROWS = 64
"""Of a frame as it is read; the classifier is trained for each height, and brings frames to 16 rows."""
MOST_FRAMES = 32
"""Read of a clip, evenly: a digit crosses the frame once in however many."""


def caption(clip: Clip, folder: Path) -> Captioned:
    """
    Raises:
        Drop: there is no digit in it, or the frames are higher than wide.
        Quarantine: the file cannot be decoded.
    """
    file = file_of(clip)
    if file.width < file.height:
        raise Drop("higher than wide", f"{file.width}x{file.height}: digits are read in frames at least as wide as high")
    answer = classify(_frames(folder / file.path, file.frames, file.width, file.height))
    digit, direction = int(answer.digits[0]), int(answer.directions[0])
    if digit == NOTHING:
        raise Drop("no digit seen", "in half of the frames or more")
    return Captioned(words(digit, None if direction == NOTHING else direction), BY, language="en")


def _frames(path: Path, frames: int, width: int, height: int) -> torch.Tensor:
    """(1, T, H, W, 3)."""
    interval = -(-frames // MOST_FRAMES)
    rows = min(height, ROWS)
    size = rows, round(width * rows / height)
    try:
        decoded = np.stack(list(video.decode(path, -(-frames // interval), interval, size=size)))
    except Unusable as error:
        raise Quarantine("clip cannot be decoded", str(error)) from None
    return torch.from_numpy(decoded)[None]
