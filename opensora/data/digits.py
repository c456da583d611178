"""Captioned moving digits, in the style of Sync-DRAW (Mittal et al. 2017, arXiv 1611.10314), made from scikit-learn's handwritten digits.

Owns the drawing, the captions, the split of handwritten images into train and test, and the held-out combinations of digit and direction.
Training clips use images of the train split alone and never show a held-out combination; the judge's own clips use the test split.
Refuses to judge: `opensora.judge` reads clips back.

A digit is half as high as the frame and moves once, from near the middle to one side, whatever the number of frames: it neither wraps nor
bounces, so its direction is one word, and a clip of 16 frames is a slower one of 8. It starts on the near side of the middle on purpose:
where digits cross the whole frame, brightness depends on word x frame x place and on no two of them alone, and a small model is stuck on
that for a thousand steps and more (docs/log.md).

Clip i is a pure function of (seed, split, i, size, frames, quality): clips are drawn in blocks of 256, each from a generator of its own.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

from opensora.config import DataConfig, DigitsSource
from opensora.errors import ConfigError

Split = Literal["train", "test"]
Quality = Literal["plain", "high"]

DIRECTIONS = ("left", "right", "up", "down")
STEP = np.array([(0, -1), (0, 1), (-1, 0), (1, 0)])
"""(row, column) of each direction."""
COMBINATIONS = tuple((digit, direction) for digit in range(10) for direction in range(4))
HELD_OUT = frozenset({(1, 2), (4, 1), (6, 0), (8, 3)})
"""Combinations never trained on: each direction once, each with a digit of its own."""
TRAINED = tuple(combination for combination in COMBINATIONS if combination not in HELD_OUT)

BLOCK = 256
VERSION = 2
"""Raised whenever the same arguments would draw other pixels."""
NOISE = 24
"""Brightest background pixel of plain clips, of 255."""
SPLIT_SEED = 0


def caption(digit: int, direction: int | None) -> str:
    """ "a digit 3 moving left"; without a direction "a digit 3", so that what an image model learns of the words holds for video."""
    return f"a digit {digit}" if direction is None else f"a digit {digit} moving {DIRECTIONS[direction]}"


@cache
def handwritten(split: Split) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """8x8 images in [0, 1] and their digits, 70% train and 30% test, stratified by digit (UCI optdigits, as shipped by scikit-learn)."""
    bunch = load_digits()
    images, digits = bunch.images.astype(np.float32) / 16, bunch.target.astype(np.int64)
    train, test = train_test_split(np.arange(len(digits)), test_size=0.3, stratify=digits, random_state=SPLIT_SEED)
    rows = np.sort(train if split == "train" else test)
    return images[rows], digits[rows]


@cache
def _stamps(split: Split, size: int) -> NDArray[np.uint8]:
    """The split's images at size x size pixels, 0..255."""
    images = torch.from_numpy(handwritten(split)[0])[:, None]
    if size != 8:
        images = torch.nn.functional.interpolate(images, size=(size, size), mode="bilinear", align_corners=False)
    return np.asarray((images[:, 0] * 255).round().to(torch.uint8).numpy())


@cache
def _images_of(split: Split) -> tuple[NDArray[np.int64], ...]:
    """Indices into the split, for each digit."""
    digits = handwritten(split)[1]
    return tuple(np.flatnonzero(digits == digit) for digit in range(10))


@dataclass(frozen=True)
class Drawing:
    """n clips and what they show."""

    clips: NDArray[np.uint8]  # (n, T, H, W), grey
    digits: NDArray[np.int64]  # (n,)
    directions: NDArray[np.int64]  # (n,), of no meaning where T is 1


@dataclass(frozen=True)
class Canvas:
    """Size and looks of the clips; together with a seed and an index it determines a clip."""

    frames: int
    height: int
    width: int
    quality: Quality

    @property
    def digit_size(self) -> int:
        return self.height // 2

    def block(self, seed: int, index: int, split: Split, combinations: Sequence[tuple[int, int]]) -> Drawing:
        """Clips index·256 .. index·256 + 255."""
        rng = np.random.default_rng([seed, 0 if split == "train" else 1, index])
        if self.frames == 1:  # of an image every digit is known; combinations are about motion
            digits, directions = rng.integers(0, 10, BLOCK), rng.integers(0, 4, BLOCK)
        else:
            chosen = np.array(combinations)[rng.integers(0, len(combinations), BLOCK)]
            digits, directions = chosen[:, 0], chosen[:, 1]
        return self.draw(rng, digits, directions, split)

    def draw(self, rng: np.random.Generator, digits: NDArray[np.int64], directions: NDArray[np.int64], split: Split) -> Drawing:
        """One clip for each (digit, direction), with handwriting, place, jitter and background from `rng`."""
        choices = _images_of(split)
        images = np.array([choices[digit][int(u * len(choices[digit]))] for digit, u in zip(digits, rng.random(len(digits)), strict=True)])
        return Drawing(self.animate(rng, images, directions, split), digits, directions)

    def animate(
        self, rng: np.random.Generator, images: NDArray[np.int64], directions: NDArray[np.int64], split: Split
    ) -> NDArray[np.uint8]:
        """One clip (n, T, H, W) for each handwritten image (n,) and direction (n,)."""
        count, size = len(images), self.digit_size
        corners = self._corners(rng, directions)  # (n, T, 2)
        shape = (count, self.frames, self.height, self.width)
        clips = rng.integers(0, NOISE + 1, shape, dtype=np.uint8) if self.quality == "plain" else np.zeros(shape, np.uint8)
        span = np.arange(size)
        place = (
            np.arange(count)[:, None, None, None],
            np.arange(self.frames)[None, :, None, None],
            (corners[:, :, 0, None] + span)[:, :, :, None],  # rows (n, T, size, 1)
            (corners[:, :, 1, None] + span)[:, :, None, :],  # columns (n, T, 1, size)
        )
        clips[place] = np.maximum(clips[place], _stamps(split, size)[images][:, None])  # ink covers the background
        return clips

    def _corners(self, rng: np.random.Generator, directions: NDArray[np.int64]) -> NDArray[np.int64]:
        """Upper left corner of the digit in each frame, (n, T, 2) in pixels; always wholly inside the frame."""
        count = len(directions)
        free = np.array([self.height - self.digit_size, self.width - self.digit_size])
        start = rng.random((count, 1, 2)) * free  # anywhere; overwritten along the axis of motion
        if self.frames == 1:
            return self._whole(start)
        axis, sign = 1 - directions // 2, STEP[directions].sum(1)  # left and right: columns (1); up and down: rows (0)
        if self.quality == "plain":
            begin, end = rng.uniform(0.2, 0.4, count), rng.uniform(0.9, 1, count)
        else:
            begin, end = np.full(count, 0.3), np.ones(count)
        way = np.linspace(0, 1, self.frames)[None]  # (1, T)
        progress = begin[:, None] * (1 - way) + end[:, None] * way  # (n, T) from near the middle to the far side
        progress = np.where(sign[:, None] > 0, progress, 1 - progress)
        path = np.repeat(start, self.frames, axis=1)
        if self.quality == "plain":  # an unsteady hand: up to half a pixel (of 16) around the line of motion
            path = path + rng.uniform(-0.5, 0.5, path.shape) * self.height / 16
        path[np.arange(count), :, axis] = progress * free[axis][:, None]
        return self._whole(path)

    def _whole(self, corners: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rounded to pixels, and back inside the frame."""
        free = (self.height - self.digit_size, self.width - self.digit_size)
        return np.asarray(np.clip(np.rint(corners), 0, free), np.int64)


class DigitClips:
    """The training clips of a `DigitsSource`. Implements `opensora.data.source.Clips`."""

    def __init__(self, data: DataConfig, *, seed: int) -> None:
        if not isinstance(data.source, DigitsSource):
            raise TypeError(f"not a source of digits: {data.source.kind}")
        self._canvas, self._seed = canvas(data), seed
        self._count = data.source.clips
        self._last: tuple[int, Drawing] | None = None
        self.skipped: Mapping[str, str] = {}
        self.words: Sequence[str] = [caption(digit, direction) for digit, direction in COMBINATIONS]
        made_of = [VERSION, seed, self._count, data.model_dump(mode="json")]
        self.digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> tuple[torch.Tensor, list[int]]:
        stop = min(stop, self._count)
        parts = [
            self._block(index).clips[max(start - index * BLOCK, 0) : stop - index * BLOCK]
            for index in range(start // BLOCK, -(-stop // BLOCK))
        ]
        grey = torch.from_numpy(np.concatenate(parts))
        return grey[..., None].expand(*grey.shape, 3), list(range(start, stop))

    def _block(self, index: int) -> Drawing:
        if self._last is None or self._last[0] != index:
            self._last = index, self._canvas.block(self._seed, index, "train", TRAINED)
        return self._last[1]

    @cached_property
    def captions(self) -> Sequence[str]:
        captions: list[str] = []
        for index in range(-(-self._count // BLOCK)):
            block = self._block(index)
            moving = self._canvas.frames > 1
            captions += [caption(int(a), int(b) if moving else None) for a, b in zip(block.digits, block.directions, strict=True)]
        return captions[: self._count]


def canvas(data: DataConfig, frames: int | None = None) -> Canvas:
    """The canvas of a stage's digits, with another number of frames where given.

    Raises:
        ConfigError: where no digit can be drawn at this size.
    """
    if not isinstance(data.source, DigitsSource):
        raise ConfigError(f"data.source.kind is {data.source.kind}: only digits can be drawn and judged. Drop `evaluate`")
    if data.height < 16 or data.width < data.height or data.height % 2:
        raise ConfigError(
            f"data {data.height}x{data.width}: digits are half as high as the frame and need an even height of at least 16 "
            "and a width of at least the height"
        )
    if data.frame_interval != 1:
        raise ConfigError(
            f"data.frame_interval {data.frame_interval}: a digit crosses the frame once in however many frames; set frame_interval 1"
        )
    return Canvas(frames or data.frames, data.height, data.width, data.source.quality)
