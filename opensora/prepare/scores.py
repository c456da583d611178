"""How much a frame differs from the one before it: the score that PySceneDetect's ContentDetector cuts by.

Owns the score and two ways to it. Exact: as PySceneDetect 0.7.2 with its PyAV backend computes it, to the last bit (BGR by swscale, scaled
to 256 pixels on the longer side, HSV, mean absolute difference of each channel, their mean). Near: planes are scaled first and converted
then, which takes a third of the time. A near score comes with a bound of its error, and where that leaves a threshold in doubt the exact
one is computed. Refuses to decide what a cut is (`cuts`).

Measured over bikes.mp4, bigbuckbunny.mp4 and the trailer of Big Buck Bunny: the error of a near score is at most what `Near.doubt` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray

WIDTH = 256
"""Pixels of the longer side at which frames are compared: PySceneDetect's default."""
LIMITED, FULL = 1, 2
"""FFmpeg's numbers of colour ranges."""
Picture = NDArray[np.uint8]

GREY = 12
"""Of 255. Where the largest and the smallest of R, G, B differ by less, hue may turn by rounding alone."""
DARK = 32
"""Of 255. Where the largest of R, G, B is below, saturation may change by rounding alone."""
DOUBT = (3.0, 0.1, 20.0, 60.0)
"""Bound of a near score's error: a constant, and shares of the score, of grey pixels and of dark ones. See `Near.doubt`."""

_MATRICES = {1: (0.2126, 0.0722), 2: (0.299, 0.114), 5: (0.299, 0.114), 6: (0.299, 0.114)}
"""Kr and Kb of the colour spaces of ITU-T H.273; FFmpeg takes what is not tagged for BT.601."""


def scaled_size(width: int, height: int) -> tuple[int, int]:
    """Width and height at which frames are compared."""
    longer = max(width, height)
    if longer < WIDTH:
        return width, height
    factor = longer / WIDTH
    return max(1, round(width / factor)), max(1, round(height / factor))


@dataclass(frozen=True)
class Score:
    """Of one frame against the one before it; 0 for the first."""

    value: float
    doubt: float
    """The exact score lies within value - doubt and value + doubt; 0: it is exact."""


class Scorer:
    """Scores frame after frame. It holds two frames, and no more."""

    def __init__(self, *, near: bool) -> None:
        """
        Args:
            near: score by scaled planes where the format allows; `exact` then gives the exact score of the latest frame.
        """
        self._near = near
        self._reformatter = VideoReformatter()
        self._latest: Any = None
        self._before: Any = None
        self._hsv: Picture | None = None
        self._exact_before: tuple[Any, Picture] | None = None
        self._exact_latest: tuple[Any, Picture] | None = None
        self._matrix: tuple[tuple[int, int], NDArray[np.float32]] | None = None

    def score(self, frame: Any, planes: tuple[Picture, ...] | None) -> Score:
        """The next frame's.

        Args:
            planes: Y, Cb and Cr at `scaled_size`, where they are 8 bits (`near_planes`); None: the score is exact.
        """
        self._before, self._latest = self._latest, frame
        if not self._near or planes is None:
            return Score(self.exact(), 0.0)
        hsv = cv2.cvtColor(self._to_bgr(frame, planes), cv2.COLOR_BGR2HSV)
        before, self._hsv = self._hsv, np.asarray(hsv, np.uint8)
        if before is None:
            return Score(0.0, 0.0)
        value = cv2.norm(self._hsv, before, cv2.NORM_L1) / self._hsv.size
        return Score(value, self._doubt(value))

    def exact(self) -> float:
        """The exact score of the latest frame."""
        if self._before is None:
            self._exact_latest = (self._latest, self._exact_hsv(self._latest))
            return 0.0
        held = self._exact_latest
        before = held[1] if held is not None and held[0] is self._before else None
        if held is not None and held[0] is self._latest and self._exact_before is not None:
            before = self._exact_before[1]
        before = self._exact_hsv(self._before) if before is None else before
        latest = held[1] if held is not None and held[0] is self._latest else self._exact_hsv(self._latest)
        self._exact_before, self._exact_latest = (self._before, before), (self._latest, latest)
        sums = cv2.sumElems(cv2.absdiff(latest, before))
        pixels = float(latest.shape[0] * latest.shape[1])
        return float((sums[0] / pixels + sums[1] / pixels + sums[2] / pixels) / 3.0)

    def _exact_hsv(self, frame: Any) -> Picture:
        converted = self._reformatter.reformat(frame, format="bgr24", threads=1)
        bgr = plane_of(converted.planes[0], converted.width, 3)
        size = scaled_size(frame.width, frame.height)
        if max(frame.width, frame.height) > WIDTH:
            bgr = np.asarray(cv2.resize(bgr, size, interpolation=cv2.INTER_LINEAR), np.uint8)
        return np.asarray(cv2.cvtColor(bgr, cv2.COLOR_BGR2HSV), np.uint8)

    def _doubt(self, value: float) -> float:
        """By the pixels whose hue or saturation rounding may change."""
        hsv = self._hsv
        assert hsv is not None
        some = np.ascontiguousarray(hsv[::2, ::2])  # a quarter of the pixels tells the shares
        largest = cv2.extractChannel(some, 2)
        chroma = cv2.multiply(cv2.extractChannel(some, 1), largest, scale=1 / 255)
        grey, dark = (np.count_nonzero(each) / largest.size for each in (chroma < GREY, largest < DARK))
        constant, of_value, of_grey, of_dark = DOUBT
        return constant + of_value * value + of_grey * grey + of_dark * dark

    def _to_bgr(self, frame: Any, planes: tuple[Picture, ...]) -> Picture:
        tags = int(frame.colorspace), int(frame.color_range)
        if self._matrix is None or self._matrix[0] != tags:
            self._matrix = tags, _to_bgr(*_MATRICES[tags[0]], full=tags[1] == FULL)
        return np.asarray(cv2.transform(cv2.merge(planes), self._matrix[1]), np.uint8)


def near_planes(frame: Any) -> tuple[Picture, ...] | None:
    """Y, Cb and Cr, 8 bits, at `scaled_size`; None where the format has none that a near score can be made of."""
    if frame.format.name not in ("yuv420p", "yuvj420p", "yuv422p", "yuv444p") or int(frame.colorspace) not in _MATRICES:
        return None
    size = scaled_size(frame.width, frame.height)
    luma, *chroma = frame.planes
    ways = ((luma, cv2.INTER_LINEAR), *((each, cv2.INTER_NEAREST) for each in chroma))
    return tuple(np.asarray(cv2.resize(plane_of(each, each.width), size, interpolation=way), np.uint8) for each, way in ways)


def plane_of(plane: Any, width: int, channels: int = 1) -> Any:
    """A plane of bytes as it lies in memory, without its padding: (h, w) or (h, w, channels)."""
    rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)[:, : width * channels]
    return rows if channels == 1 else rows.reshape(plane.height, width, channels)


def _to_bgr(kr: float, kb: float, *, full: bool) -> NDArray[np.float32]:
    """(3, 4): B, G, R of Y, Cb, Cr in codes of 8 bits and 1."""
    luma, chroma, black = (1.0, 1.0, 0.0) if full else (255 / 219, 255 / 224, 16.0)
    to_r, to_b = 2 * (1 - kr) * chroma, 2 * (1 - kb) * chroma
    kg = 1 - kr - kb
    rows = np.array([[luma, to_b, 0], [luma, -to_b * kb / kg, -to_r * kr / kg], [luma, 0, to_r]])
    return np.hstack([rows, -rows @ [[black], [128.0], [128.0]]]).astype(np.float32)
