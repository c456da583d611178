"""Where one scene ends and the next begins, frame after frame.

Owns the detectors. `content` and `adaptive` find the frames that PySceneDetect 0.7.2's ContentDetector and AdaptiveDetector find with its
PyAV backend, also where frames last differently: there a scene's length in frames is its time by the stream's rate, rounded, and not a
count. Refuses to know how long clips may be (`shots`) and what lies inside them (`looks`). `transnetv2` is in `transitions`.
"""

from __future__ import annotations

import collections
from dataclasses import dataclass
from fractions import Fraction

from opensora.dataset.prepare_config import Cut
from opensora.prepare.breaks import Break, Detector
from opensora.prepare.films import Timed
from opensora.prepare.scores import Picture, Scorer

THRESHOLDS = {"content": 27.0, "adaptive": 3.0, "transnetv2": 0.5}
"""Where `cut.threshold` is none: the defaults of PySceneDetect and of TransNetV2's authors."""
WINDOW = 2
"""Frames before and after a frame whose mean score `adaptive` compares its score with: PySceneDetect's default."""
LEAST_ADAPTIVE = 15.0
"""Score below which `adaptive` finds no cut: PySceneDetect's default."""
NEAR_FROM = 600_000
"""Pixels of a frame above which near scores are faster than exact ones (measured: equal at 640x272, a third less at 1280x720)."""


@dataclass(frozen=True)
class Clock:
    """Time between frames, as PySceneDetect counts it."""

    time_base: Fraction
    rate: float
    """Frames a second."""

    def frames(self, since: int, pts: int) -> int:
        """From PTS to PTS, in frames of the stream's rate."""
        return round(float(self.time_base * max(0, pts - since)) * self.rate)


class ContentCuts:
    """A frame whose score reaches the threshold begins a scene. Such frames that follow each other within the shortest scene, after a first
    cut, count as one: the last of them, once as much time without a further one has passed. So a flash makes one cut and not two.
    """

    def __init__(self, threshold: float, shortest: int, clock: Clock, *, near: bool) -> None:
        """
        Args:
            shortest: frames of the shortest scene.
            near: avoid exact scores where near ones decide.
        """
        self._threshold, self._shortest, self._clock = threshold, shortest, clock
        self.near = near
        self._scorer = Scorer(near=near)
        self._high: tuple[int, int] | None = None
        self._joined_from: int | None = None
        self._had_cut = False
        self.marks = False

    def see(self, number: int, timed: Timed, planes: tuple[Picture, ...] | None) -> list[Break]:
        score = self._scorer.score(timed.frame, planes)
        value = score.value
        if score.doubt and value - score.doubt < self._threshold <= value + score.doubt:
            value = self._scorer.exact()
        self.marks = value >= self._threshold
        cut = self._cut(number, timed.pts, high=self.marks)
        return [] if cut is None else [Break(cut, cut)]

    def _cut(self, number: int, pts: int, *, high: bool) -> int | None:
        high_before = self._high or (number, pts)
        apart = self._clock.frames(high_before[1], pts) >= self._shortest
        if high or self._high is None:
            self._high = number, pts
        if self._joined_from is not None:
            if high or not apart or self._clock.frames(self._joined_from, high_before[1]) < self._shortest:
                return None
            self._joined_from = None
            return high_before[0]
        if not high:
            return None
        if apart:
            self._had_cut = True
            return number
        if self._had_cut:
            self._joined_from = pts
        return None

    def end(self) -> list[Break]:
        return []


class AdaptiveCuts:
    """A frame whose score is so many times the mean of its neighbours' begins a scene: quick movement, which lifts all, does not."""

    def __init__(self, threshold: float, shortest: int, clock: Clock) -> None:
        """
        Args:
            threshold: of the score against its neighbours'.
            shortest: frames of the shortest scene.
        """
        self._threshold, self._shortest, self._clock = threshold, shortest, clock
        self._scorer = Scorer(near=False)
        self._scores: collections.deque[tuple[int, int, float]] = collections.deque(maxlen=2 * WINDOW + 1)
        self._last_cut: int | None = None
        self.marks = self.near = False

    def see(self, number: int, timed: Timed, planes: tuple[Picture, ...] | None) -> list[Break]:
        del planes  # ratios need exact scores
        score = self._scorer.score(timed.frame, None).value
        self.marks = score >= LEAST_ADAPTIVE
        self._last_cut = timed.pts if self._last_cut is None else self._last_cut
        self._scores.append((number, timed.pts, score))
        if len(self._scores) < 2 * WINDOW + 1:
            return []
        at, pts, own = self._scores[WINDOW]
        mean = sum(each for place, (_, _, each) in enumerate(self._scores) if place != WINDOW) / (2.0 * WINDOW)
        ratio = (255.0 if own >= LEAST_ADAPTIVE else 0.0) if abs(mean) < 1e-5 else min(own / mean, 255.0)
        if ratio < self._threshold or own < LEAST_ADAPTIVE or self._clock.frames(self._last_cut, pts) < self._shortest:
            return []
        self._last_cut = pts
        return [Break(at, at)]

    def end(self) -> list[Break]:
        return []


class NoCuts:
    """The video is one scene."""

    marks = near = False

    def see(self, number: int, timed: Timed, planes: tuple[Picture, ...] | None) -> list[Break]:
        del number, timed, planes
        return []

    def end(self) -> list[Break]:
        return []


def detector(cut: Cut, clock: Clock, pixels: int) -> Detector:
    """The one that the settings name.

    Args:
        pixels: of a frame.

    Raises:
        ConfigError: it needs a package that is not installed.
    """
    threshold = cut.threshold or THRESHOLDS.get(cut.detector, 0.0)
    if cut.detector == "content":
        return ContentCuts(threshold, cut.min_scene_frames, clock, near=pixels >= NEAR_FROM)
    if cut.detector == "adaptive":
        return AdaptiveCuts(threshold, cut.min_scene_frames, clock)
    if cut.detector == "transnetv2":
        from opensora.prepare.transitions import Transitions  # imports torch's network

        return Transitions(threshold)
    return NoCuts()
