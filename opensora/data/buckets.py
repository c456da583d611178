"""The rule that says which of a stage's sizes (buckets) a source clip is cut to.

Owns the rule, a pure function of sizes: the same files give the same buckets on every machine. Refuses to open files (sources say how large
theirs are) and to order clips (`loader`).

The rule, for a source of so many frames, rows and columns:
1. Take the buckets whose frames the source can fill: T frames at interval k need (T − 1)·k + 1. If frames are taken by time (`fps`), the
   source's frames are counted at that rate, and the interval is 1. A bucket of images (T = 1) takes a film only if the film fills no longer
   bucket, because a film is worth more than one of its frames. If no bucket is left, the clip is left out, with a reason.
2. Of those take the nearest aspect ratio, by |log(width/height) − log(source's)|, so that as little as possible is cropped and a ratio of 2
   is as far from 1 as ½ is. Ratios within 5% of the nearest count as equal: 240x432 and 480x848 mean the same shape, and rounding to whole
   patches must not decide between them.
3. Of those take the most frames.
4. Of those take the largest area that the source fills without being enlarged. If all need enlarging, take the smallest area.
5. Of those (with equal areas) take the nearest ratio, then the first in order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from opensora.config import DataConfig

SAME_RATIO = math.log(1.05)
"""The largest distance between ratios that count as equal."""


class Size(NamedTuple):
    """The size of a clip, a source or a bucket."""

    frames: int
    height: int
    """Pixels."""
    width: int
    """Pixels."""

    @property
    def values(self) -> int:
        """Bytes of an RGB clip."""
        return self.frames * self.height * self.width * 3


def sizes(data: DataConfig) -> tuple[Size, ...]:
    """What a stage's clips are cut to, in the order of `StageConfig.buckets`."""
    return tuple(Size(each.frames, each.height, each.width) for each in data.buckets or (data,))


def frames_needed(frames: int, interval: int) -> int:
    """How many source frames a clip of `frames` frames needs, if every `interval`-th one is taken."""
    return (frames - 1) * interval + 1


def too_short(found: int, frames: int, interval: int, fps: Fraction | None = None) -> str:
    """Why a source gives no clip of `frames` frames. `found` is how many it has, counted at `fps` if frames are taken by time."""
    if fps is not None:
        return f"{_count(found)} at {float(fps):g} fps ({float(found / fps):.2f} s), {frames} are needed ({float(frames / fps):.2f} s)"
    return f"{_count(found)}, {frames_needed(frames, interval)} are needed for {_count(frames)} at interval {interval}"


def _count(frames: int) -> str:
    return f"{frames} frame" if frames == 1 else f"{frames} frames"


def choose(source: Size, buckets: Sequence[Size], interval: int) -> int | None:
    """Index of the bucket that a source clip goes to, by the rule above. None means it is too short for all."""
    filled = [index for index, bucket in enumerate(buckets) if frames_needed(bucket.frames, interval) <= source.frames]
    filled = [index for index in filled if buckets[index].frames > 1] or filled
    if not filled:
        return None
    distance = {index: _distance(source, buckets[index]) for index in filled}
    nearest = min(distance.values())
    alike = [index for index in filled if distance[index] <= nearest + SAME_RATIO]

    def preference(index: int) -> tuple[int, bool, int, float, int]:
        _, height, width = buckets[index]
        enlarged = height > source.height or width > source.width
        return -buckets[index].frames, enlarged, height * width if enlarged else -height * width, distance[index], index

    return min(alike, key=preference)


def _distance(source: Size, bucket: Size) -> float:
    return abs(math.log(bucket.width / bucket.height) - math.log(source.width / source.height))
