"""Which of a stage's sizes a source clip is cut to.

Owns the rule, a pure function of sizes: the same files give the same buckets on every machine. Refuses to open files (sources say how large
theirs are) and to order clips (`loader`).

The rule, for a source of so many frames, rows and columns:
1. Buckets whose frames it can fill: T frames at interval k need (T − 1)·k + 1. A bucket of images (T = 1) takes a film only where no longer
   one can be filled: a film is worth more than one of its frames. None: the clip is left out, with a reason.
2. Of those the nearest aspect ratio, by |log(width/height) − log(source's)|, so that as little as possible is cut off and a ratio of 2 is
   as far from 1 as ½ is. Ratios within 5% of the nearest count as equal: 240x432 and 480x848 mean the same shape, and rounding to whole
   patches must not decide between them.
3. Of those the most frames.
4. Of those the largest area that the source fills without being enlarged; where all need enlarging, the smallest area.
5. Of those (equal areas) the nearest ratio, then the first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from opensora.config import DataConfig

SAME_RATIO = math.log(1.05)
"""Between ratios that count as one."""


class Size(NamedTuple):
    """Of a clip, a source's or a bucket's."""

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
    """Source frames of a clip of so many frames, each interval-th one taken."""
    return (frames - 1) * interval + 1


def too_short(found: int, frames: int, interval: int) -> str:
    """Why a source gives no clip of so many frames."""
    return f"{found} frames, {frames_needed(frames, interval)} are needed for {frames} frames at interval {interval}"


def choose(source: Size, buckets: Sequence[Size], interval: int) -> int | None:
    """Index of the bucket that a source clip goes to (the rule above); none where it is too short for all."""
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
