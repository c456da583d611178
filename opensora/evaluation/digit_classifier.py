"""The oracle: reads digit and direction back from a clip's pixels, knowing nothing of what was asked.

Owns the classifier, the gate and the counting of answers with their uncertainty. Refuses to draw or to sample clips.

- Gate: a frame shows an object where most of its ink lies in one window of the digit's size and the window is bright. Noise has its ink
  everywhere, so it shows nothing, and what shows nothing is right in nothing.
- Digit: a support vector machine on the window (8x8), trained on the train split, votes in each frame.
- Direction: forced choice by the slope of the ink's centroid over time, so a still clip scores chance, 25%.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.svm import SVC

from opensora.data.digits import Canvas, handwritten

DIGIT_CHANCE = 1 / 10
DIRECTION_CHANCE = 1 / 4
NOTHING = -1
"""Answer where no object is seen."""

SIZE = 8
"""Rows and columns of a digit as the classifier sees it: frames are brought to 16 rows."""
INK_FROM = 40 / 255
"""Fainter pixels are background: plain clips have up to 24/255."""
INK_IN_WINDOW = 0.65
"""Share of a frame's ink that must lie in one window. Measured at 16x16: real clips at least 0.9, decoded noise 0.4 (in 99% below 0.58)."""
WINDOW_BRIGHTNESS = 0.1
"""Mean ink of the window, of 1. The faintest real digit has 0.17."""
COPIES = 4
"""Training frames per handwritten image, each at its own place and with its own background."""


@dataclass(frozen=True)
class Answer:
    """What n clips show; NOTHING where no object is seen in at least half of the frames."""

    digits: NDArray[np.int64]  # (n,)
    directions: NDArray[np.int64]  # (n,), NOTHING for clips of one frame


def classify(clips: torch.Tensor) -> Answer:
    """Digit and direction of clips uint8 (n, T, H, W, 3)."""
    count, frames = clips.shape[:2]
    windows, centroids, seen = _find_objects(clips)
    scores = _machine(clips.shape[2]).decision_function(windows.reshape(count * frames, SIZE * SIZE)).reshape(count, frames, 10)
    votes = (np.eye(10)[scores.argmax(-1)] * seen[..., None]).sum(1)  # (n, 10)
    ties = (scores * seen[..., None]).sum(1) / (1e3 * frames)  # decision values stay below 10: they only break ties
    digits = (votes + ties).argmax(-1)
    present = seen.mean(1) >= 0.5
    digits = np.where(present, digits, NOTHING)
    if frames == 1:
        return Answer(digits, np.full(count, NOTHING))
    return Answer(digits, np.where(present, _directions(centroids, seen), NOTHING))


def frozen_directions(clips: torch.Tensor) -> NDArray[np.int64]:
    """Directions of clips uint8 (n, T, H, W, 3) that stand still at their first frame: what a video without motion is read as."""
    first = clips[:, :1]
    _, centroids, seen = _find_objects(first)
    frames = clips.shape[1]
    still = _directions(centroids.repeat(frames, axis=1), seen.repeat(frames, axis=1))
    return np.where(seen[:, 0], still, NOTHING)


def _find_objects(clips: torch.Tensor) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_]]:
    """Windows (n, T, 8, 8) in [0, 1], centroids (n, T, 2) in pixels of 16 rows, and whether an object is seen (n, T)."""
    count, frames, height, width = clips.shape[:4]
    grey = clips.float().mean(-1).flatten(0, 1)[:, None] / 255  # (n·T, 1, H, W)
    rows, columns = 2 * SIZE, round(width * 2 * SIZE / height)
    grey = torch.nn.functional.interpolate(grey, size=(rows, columns), mode="area")
    ink = torch.where(grey >= INK_FROM, grey, 0.0)
    sums = torch.nn.functional.avg_pool2d(ink, SIZE, stride=1) * SIZE * SIZE  # ink of each possible window
    best = sums.flatten(1).argmax(1)
    top, left = best // sums.shape[-1], best % sums.shape[-1]
    span = torch.arange(SIZE)
    windows = ink[torch.arange(len(ink))[:, None, None], 0, (top[:, None] + span)[:, :, None], (left[:, None] + span)[:, None, :]]
    inside, total = windows.sum((1, 2)), ink.sum((1, 2, 3))
    seen = (inside >= INK_IN_WINDOW * total) & (inside >= WINDOW_BRIGHTNESS * SIZE * SIZE)
    mass = windows.sum((1, 2)).clamp(min=1e-6)
    centroid_row = top + (windows.sum(2) * span).sum(1) / mass
    centroid_column = left + (windows.sum(1) * span).sum(1) / mass
    centroids = torch.stack((centroid_row, centroid_column), -1).reshape(count, frames, 2)
    return windows.reshape(count, frames, SIZE, SIZE).numpy(), centroids.numpy(), seen.reshape(count, frames).numpy()


def _directions(centroids: NDArray[np.float32], seen: NDArray[np.bool_]) -> NDArray[np.int64]:
    """Index into DIRECTIONS of the axis with the steeper least-squares slope, over the frames that show an object."""
    weight = seen[..., None].astype(np.float64)
    frames = np.arange(seen.shape[1])[None, :, None]
    shown = weight.sum(1, keepdims=True).clip(min=1)
    time = frames - (frames * weight).sum(1, keepdims=True) / shown
    place = centroids - (centroids * weight).sum(1, keepdims=True) / shown
    slope = (weight * time * place).sum(1)  # (n, 2): times a positive number, the slope in pixels per frame
    row, column = slope[:, 0], slope[:, 1]
    sideways = np.abs(column) >= np.abs(row)
    return np.where(sideways, np.where(column < 0, 0, 1), np.where(row < 0, 2, 3)).astype(np.int64)


@cache
def _machine(height: int) -> SVC:
    """Fitted on train-split images as the classifier sees them in single frames of this height, half of them on a plain background."""
    images, digits = handwritten("train")
    windows = []
    for copy in range(COPIES):
        canvas = Canvas(1, height, height, "plain" if copy % 2 else "high")
        clips = canvas.animate(np.random.default_rng(copy), np.arange(len(images)), np.zeros(len(images), np.int64), "train")
        windows.append(_find_objects(torch.from_numpy(clips)[..., None].expand(*clips.shape, 3))[0].reshape(len(images), SIZE * SIZE))
    return SVC(C=10).fit(np.concatenate(windows), np.tile(digits, COPIES))


def wilson(right: int, count: int) -> tuple[float, float]:
    """95% interval of a share (Wilson 1927): right where a normal interval would leave [0, 1]. (0, 1) for no observations."""
    if count == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, spread = right / count, z * z / count
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * math.sqrt(share * (1 - share) / count + spread / (4 * count))
    return (0.0 if right == 0 else centre - half), (1.0 if right == count else centre + half)  # exact where rounding would miss an end
