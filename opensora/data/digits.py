"""Captioned moving digits, in the style of Sync-DRAW (Mittal et al. 2017, arXiv 1611.10314), made from scikit-learn's handwritten digits.

Owns the drawing, the captions, the split of handwritten images into train and test, and the held-out combinations of digit and direction.
Training clips use images of the train split alone and never show a held-out combination; the classifier's own clips use the test split.
Refuses to read clips back: `opensora.evaluation.digit_classifier` does.

A digit is half as high as the frame's shorter side and moves once, from near the middle to one side, whatever the number of frames: it
neither wraps nor bounces, so its direction is one word, and a clip of 16 frames is a slower one of 8. It starts on the near side of the
middle on purpose: where digits cross the whole frame, brightness depends on word x frame x place and on no two of them alone, and a small
model is stuck on that for a thousand steps and more (docs/log.md).

Clip i is a pure function of (seed, split, i, sizes, quality): where a stage has n buckets, clip i is number ⌊i/n⌋ of bucket i mod n, and
each bucket's clips are drawn in blocks of 256, each from a generator of its own.
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

from opensora.config import DataConfig, DigitsSource
from opensora.data.buckets import Size, sizes
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
    from sklearn.datasets import load_digits  # a second, which a run whose clips are cached does not pay
    from sklearn.model_selection import train_test_split

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
        return min(self.height, self.width) // 2

    def shown(self, rng: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Digits and directions of a block of training clips: the first that its generator draws."""
        if self.frames == 1:  # of an image every digit is known; combinations are about motion
            return rng.integers(0, 10, BLOCK), rng.integers(0, 4, BLOCK)
        chosen = np.array(TRAINED)[rng.integers(0, len(TRAINED), BLOCK)]
        return chosen[:, 0], chosen[:, 1]

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
            path = path + rng.uniform(-0.5, 0.5, path.shape) * self.digit_size / 8
        path[np.arange(count), :, axis] = progress * free[axis][:, None]
        return self._whole(path)

    def _whole(self, corners: NDArray[np.float64]) -> NDArray[np.int64]:
        """Rounded to pixels, and back inside the frame."""
        free = (self.height - self.digit_size, self.width - self.digit_size)
        return np.asarray(np.clip(np.rint(corners), 0, free), np.int64)


class DigitClips:
    """The training clips of a `DigitsSource`. Implements `opensora.data.source.Clips`."""

    def __init__(self, data: DataConfig, *, seed: int) -> None:
        """Raises ConfigError, for sizes at which no digit can be drawn."""
        if not isinstance(data.source, DigitsSource):
            raise TypeError(f"not a source of digits: {data.source.kind}")
        self.sizes = sizes(data)
        self._canvases = [_canvas(data, size, data.source.quality) for size in self.sizes]
        self._seed, self._count = seed, data.source.clips
        self._last: tuple[tuple[int, int], Drawing] | None = None
        self.skipped: Mapping[str, str] = {}
        self.remarks: Sequence[str] = ()
        self.words: Sequence[str] = [caption(digit, direction) for digit, direction in COMBINATIONS]
        made_of = [VERSION, seed, self._count, data.source.quality, self.sizes]
        self.digest = self.dated = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()

    def __len__(self) -> int:
        return self._count

    @property
    def counts(self) -> tuple[int, ...]:
        buckets = len(self.sizes)
        return tuple((self._count - bucket + buckets - 1) // buckets for bucket in range(buckets))

    def read(self, start: int, stop: int, bucket: int = 0) -> tuple[torch.Tensor, list[int]]:
        stop = min(stop, self.counts[bucket])
        parts = [
            self._block(bucket, block).clips[max(start - block * BLOCK, 0) : stop - block * BLOCK]
            for block in range(start // BLOCK, -(-stop // BLOCK))
        ]
        grey = torch.from_numpy(np.concatenate(parts))
        buckets = len(self.sizes)
        return grey[..., None].expand(*grey.shape, 3), list(range(bucket + start * buckets, bucket + stop * buckets, buckets))

    def _block(self, bucket: int, block: int) -> Drawing:
        """Clips number block·256 .. block·256 + 255 of a bucket."""
        if self._last is None or self._last[0] != (bucket, block):
            canvas, rng = self._canvases[bucket], self._generator(bucket, block)
            self._last = (bucket, block), canvas.draw(rng, *canvas.shown(rng), "train")
        return self._last[1]

    def _generator(self, bucket: int, block: int) -> np.random.Generator:
        return np.random.default_rng([self._seed, 0, block, bucket])

    @cached_property
    def captions(self) -> Sequence[str]:
        captions, buckets = [""] * self._count, len(self.sizes)
        for bucket, count in enumerate(self.counts):
            canvas = self._canvases[bucket]
            texts: list[str] = []
            for block in range(-(-count // BLOCK)):
                shown = zip(*canvas.shown(self._generator(bucket, block)), strict=True)
                texts += [caption(int(digit), int(direction) if canvas.frames > 1 else None) for digit, direction in shown]
            captions[bucket::buckets] = texts[:count]
        return captions


def canvas(data: DataConfig, frames: int | None = None) -> Canvas:
    """The canvas of the digits that a stage is judged by, with another number of frames where given.

    Raises:
        ConfigError: where no digit can be drawn, or judged, at this size.
    """
    if not isinstance(data.source, DigitsSource):
        raise ConfigError(f"data.source.kind is {data.source.kind}: only digits can be drawn and judged. Drop `evaluate`")
    if data.width < data.height:
        raise ConfigError(f"data {data.height}x{data.width}: digits are judged in frames at least as wide as high. Drop `evaluate`")
    return _canvas(data, Size(frames or data.frames, data.height, data.width), data.source.quality)


def _canvas(data: DataConfig, size: Size, quality: Quality) -> Canvas:
    if min(size.height, size.width) < 16 or min(size.height, size.width) % 2:
        raise ConfigError(
            f"data {size.height}x{size.width}: digits are half as high as the frame's shorter side, which must be even and at least 16"
        )
    if data.frame_interval != 1:
        raise ConfigError(
            f"data.frame_interval {data.frame_interval}: a digit crosses the frame once in however many frames; set frame_interval 1"
        )
    if data.fps is not None:
        raise ConfigError(f"data.fps {data.fps:g}: digits are drawn frame by frame, they have no rate. Leave it out")
    return Canvas(size.frames, size.height, size.width, quality)
