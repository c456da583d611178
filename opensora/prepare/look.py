"""A video → its clips and all that is measured of them, in one decode.

Owns the order of things: decode, score, measure; close a scene where a cut is certain, and forget its frames. Refuses to hold more than two
decoded frames: what a video takes in memory is that of its longest scene, some 30 bytes a frame and a small picture every half second.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from pathlib import Path

import cv2

from opensora.dataset.prepare_config import Cut
from opensora.dataset.rows import Looked, Media, Quarantine, Shot
from opensora.prepare import shots
from opensora.prepare.breaks import Break, Detector
from opensora.prepare.cuts import Clock, NoCuts, detector
from opensora.prepare.films import Film, Timed, opened
from opensora.prepare.looks import Looks
from opensora.prepare.probe import varies
from opensora.prepare.scores import near_planes

VERSION = 1
"""Of what this step finds: it is in the step's digest."""
LEAST_DECODED = 0.9
"""Of the frames that a container's index lists: a file with fewer was cut off."""

Segment = tuple[float, float, str]
"""Start and end in seconds after the first frame, and a caption."""


def look(path: Path, media: Media, cut: Cut, *, segments: Sequence[Segment] = ()) -> Looked:
    """Decode a video once; find its clips and measure them.

    Args:
        media: what `probe` found of it.
        segments: clips that a published list names. They take the place of the detector's scenes, may overlap, and are trimmed nowhere;
            bounds of length hold for them too.

    Raises:
        Quarantine: it breaks off, is damaged, or has no frame.
        ConfigError: the detector needs a package that is not installed.
    """
    cv2.setNumThreads(1)
    with opened(path) as film:
        found = _Found(film, cut, segments)
        for number, timed in enumerate(film.frames()):
            found.see(number, timed)
        return found.all(media)


class _Found:
    """What one decode has told so far."""

    def __init__(self, film: Film, cut: Cut, segments: Sequence[Segment]) -> None:
        self._film, self._cut, self._segments = film, cut, segments
        self._detector: Detector | None = None
        self._looks: Looks | None = None
        self._frames, self._scene = 0, 0
        self._start: int | None = None
        self._latest, self._lasts = 0, 0
        self._gaps: collections.Counter[int] = collections.Counter()
        self._cuts: list[int] = []
        self._shots: list[Shot] = []
        self._too_short = 0

    def see(self, number: int, timed: Timed) -> None:
        if self._looks is None or self._detector is None or self._start is None:
            self._begin(timed)
            assert self._looks is not None
            assert self._detector is not None
        if number:
            self._gaps[timed.pts - self._latest] += 1
        self._frames, self._latest, self._lasts = number + 1, timed.pts, timed.lasts
        planes = near_planes(timed.frame) if self._wants_planes else None
        breaks = self._detector.see(number, timed, planes)
        self._looks.see(number, timed, planes[0] if planes else None, sample=self._detector.marks)
        for one in breaks:
            self._close(one)

    def _begin(self, timed: Timed) -> None:
        assert self._film.screen is not None
        base, frame = self._film.time_base, timed.frame
        self._start = timed.pts
        self._looks = Looks(base, self._film.screen, self._cut.max_s)
        rate = self._film.stream.guessed_rate or 1 / (base * self._film.period)
        pixels = frame.width * frame.height
        self._detector = NoCuts() if self._segments else detector(self._cut, Clock(base, float(rate)), pixels)
        self._wants_planes = self._detector.near

    def _close(self, one: Break) -> None:
        """A scene ended."""
        assert self._looks is not None
        if one.begins < self._frames:
            self._cuts.append(one.begins)
        if one.ends > self._scene:
            pts = self._looks.pts
            scene = pts[: one.ends - self._scene]
            after = pts[one.ends - self._scene] if one.ends - self._scene < len(pts) else self._end()
            self._take(self._scene, scene, after, cut_before=self._scene > 0, cut_after=True)
        self._looks.forget_before(one.begins)
        self._scene = one.begins

    def _take(self, first: int, pts: Sequence[int], end_pts: int, *, cut_before: bool, cut_after: bool, cut: Cut | None = None) -> None:
        """Clips of these frames."""
        assert self._looks is not None
        base = self._film.time_base
        made, too_short = shots.pieces(pts, end_pts, cut or self._cut, base, cut_before=cut_before, cut_after=cut_after)
        self._too_short += too_short
        for piece in made:
            number = first + piece.first
            measures = self._looks.measures(number, piece.frames)
            phash, thumbnail = self._looks.picture(number, piece.frames)
            if measures is None or not phash:
                self._too_short += 1
                continue
            measures["seconds"] = float((piece.end_pts - piece.start_pts) * base)
            ratio = base.numerator, base.denominator
            self._shots.append(Shot(piece.start_pts, piece.end_pts, ratio, number, piece.frames, measures, phash, thumbnail))

    def _end(self) -> int:
        """Where the latest frame ends."""
        usual = max(self._gaps, key=lambda gap: self._gaps[gap], default=self._film.period)
        return self._latest + (self._lasts or usual)

    def all(self, media: Media) -> Looked:
        if self._start is None or self._looks is None or self._detector is None:
            raise Quarantine("no frame can be decoded", f"{self._film.packets} packets")
        if self._frames < LEAST_DECODED * media.frames:
            raise Quarantine("breaks off", f"{self._frames} of {media.frames} frames can be decoded")
        self._film.check_damage()
        for one in self._detector.end():
            self._close(one)
        if self._segments:
            self._take_segments()
        elif self._looks.pts:
            self._take(self._scene, self._looks.pts, self._end(), cut_before=self._scene > 0, cut_after=False)
        lasts = self._end() - self._start
        gaps = self._gaps.copy()
        seen = dataclasses.replace(
            media, start_pts=self._start, end_pts=self._end(), frames=self._frames, variable=varies(gaps),
            fps=float(self._frames / (lasts * self._film.time_base)) if lasts else media.fps,
        )  # fmt: skip
        return Looked(seen, tuple(self._cuts), tuple(self._shots), self._too_short)

    def _take_segments(self) -> None:
        assert self._looks is not None
        pts = self._looks.pts
        untrimmed = self._cut.model_copy(update={"trim_frames": 0})
        for start_s, end_s, _ in self._segments:
            first, stop = shots.within(pts, start_s, end_s, self._film.time_base)
            if stop <= first:
                self._too_short += 1
                continue
            after = pts[stop] if stop < len(pts) else self._end()
            self._take(first, pts[first:stop], after, cut_before=False, cut_after=False, cut=untrimmed)
