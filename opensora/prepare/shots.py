"""A scene's frames → the clips that are cut out of it. Pure.

Owns trimming, splitting and the bounds of length. Refuses to look at pictures.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from opensora.dataset.prepare_config import Cut


@dataclass(frozen=True)
class Piece:
    """Frames of a scene that make a clip."""

    first: int
    """Place of its first frame in the scene."""
    frames: int
    start_pts: int
    end_pts: int
    """The PTS of the frame after its last one, or where that one ends."""


def pieces(
    pts: Sequence[int], end_pts: int, cut: Cut, time_base: Fraction, *, cut_before: bool, cut_after: bool
) -> tuple[list[Piece], int]:
    """Clips of one scene, in order, and how many were too short.

    A scene longer than `cut.max_s` is split into as few pieces as possible, as evenly as its frames allow; none is longer, but one that is
    a single frame.

    Args:
        pts: of the scene's frames, increasing.
        end_pts: where its last frame ends.
        cut_before, cut_after: whether a cut is there, at which `cut.trim_frames` are taken off.
    """
    first = cut.trim_frames if cut_before else 0
    last = len(pts) - (cut.trim_frames if cut_after else 0)
    if last <= first:
        return [], 1
    bounds = [*pts[first:last], pts[last] if last < len(pts) else end_pts]
    most = cut.max_s / time_base
    count = min(last - first, max(1, -int(-(bounds[-1] - bounds[0]) // most)))
    marks = _marks(bounds, count)
    while count < last - first and any(bounds[end] - bounds[start] > most and end - start > 1 for start, end in _pairs(marks)):
        count += 1
        marks = _marks(bounds, count)
    made = [Piece(first + start, end - start, bounds[start], bounds[end]) for start, end in _pairs(marks)]
    least = cut.min_s / time_base
    kept = [piece for piece in made if piece.end_pts - piece.start_pts >= least]
    return kept, len(made) - len(kept)


def _marks(bounds: Sequence[int], count: int) -> list[int]:
    """Places in `bounds` at which pieces begin and end: those nearest to even shares of the time, increasing strictly."""
    frames, begins, lasts = len(bounds) - 1, bounds[0], bounds[-1] - bounds[0]
    marks = [0]
    for number in range(1, count):
        wanted = begins + Fraction(lasts * number, count)
        after = bisect.bisect_left(bounds, wanted)
        nearest = after if after == 0 or bounds[after] - wanted < wanted - bounds[after - 1] else after - 1
        marks.append(min(max(nearest, marks[-1] + 1), frames - (count - number)))
    return [*marks, frames]


def _pairs(marks: Sequence[int]) -> list[tuple[int, int]]:
    return list(itertools.pairwise(marks))


def within(pts: Sequence[int], start_s: float, end_s: float, time_base: Fraction) -> tuple[int, int]:
    """Places of the first frame that a published segment has and of the first that it has no more: those that begin within it, by seconds
    after the first frame. Half a PTS unit counts as equal: lists round times."""
    slack = Fraction(1, 2)
    start, end = (pts[0] + Fraction(seconds) / time_base - slack for seconds in (start_s, end_s))
    return bisect.bisect_left(pts, start), bisect.bisect_left(pts, end)
