"""What is measured of pictures while a video is decoded once, and what that makes for a clip.

Owns the measures and their units (docs/datasets.md, "Columns"). Of each frame little is kept: four numbers. Of some frames, twice a second
and where a scene may begin, more is measured and a small picture is kept. Refuses to know where cuts are and how long clips may be.
"""

from __future__ import annotations

import base64
import bisect
import dataclasses
import io
import re
from array import array
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import cv2
import imagehash
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora.data import screen as screens
from opensora.data.screen import Screen
from opensora.prepare.films import Timed
from opensora.prepare.motion import Motion
from opensora.prepare.scores import FULL, Picture, plane_of, scaled_size

SAMPLED_S = 0.5
"""Seconds between frames that more is measured of."""
BLACK_PIXEL, BLACK_PICTURE = 32, 0.98
"""A frame is black where this share of its pixels is darker than that code of 255: FFmpeg's blackdetect has 0.10 of white and 0.98."""
STATIC = 0.25
"""Mean difference of luma to the frame before, of 255, below which a frame stands still. A camera on a tripod has more, by noise."""
FLASH, FLASH_FRAMES, FLASH_BACK = 30.0, 3, 10.0
"""A flash: mean luma jumps by so much and is back, but for that much, after at most so many frames."""
FADE_BLACK, FADE_FRAMES = 16.0, 5
"""A fade: mean luma goes one way over at least so many frames, from or to less than that."""
SHARP_SIDE = 512
"""Pixels of the longer side that sharpness is measured at, at least, where the picture has so many."""
PICTURE, THUMBNAIL, HASHED = 256, 160, 32
"""Pixels of the longer side of a sampled picture, of the width of a thumbnail, and of a side of what imagehash makes a hash of."""
MOST_PICTURES = 256
"""Pictures of one scene that are held; of a longer one every second is given up, as long as each clip will have several."""
_LUMA_FIRST = re.compile(r"(yuva?4[0-9]{2}p((9|10|12|14|16)le)?|yuvj4[0-9]{2}p|gray((9|10|12|14|16)le)?|nv12|nv21|nv16)")
"""Formats whose first plane is luma, its codes in the low bits."""


@dataclass(frozen=True)
class Small:
    """A sampled frame's picture, as it is on an SDR screen."""

    thumbnail: bytes
    """JPEG."""
    hashed: bytes
    """Grey, 32 x 32."""


@dataclass
class Sample:
    """What was measured of a frame."""

    number: int
    pts: int
    brightness: float
    contrast: float
    sharpness: float
    motion: float | None = None
    """To the next frame; None: there is none in its scene."""
    small: Small | None = None


class Looks:
    """Of the scene that is open, frame by frame."""

    def __init__(self, time_base: Fraction, screen: Screen, longest_s: float) -> None:
        """
        Args:
            longest_s: seconds of the longest clip.
        """
        self._base, self._screen = time_base, screen
        self._motion = Motion()
        self._first = 0
        self.pts = array("q")
        self._luma, self._change = array("f"), array("f")
        self._black = array("b")
        self._samples: list[Sample] = []
        self._grey: Picture | None = None
        self._pending: tuple[Sample, Picture] | None = None
        self._due: int | None = None
        self._shown: int | None = None
        self._period = max(1, round(Fraction(min(SAMPLED_S, longest_s / 8)) / time_base))
        self._gap, self._widest = self._period, max(self._period, round(Fraction(longest_s / 8) / time_base))

    def see(self, number: int, timed: Timed, grey: Picture | None, *, sample: bool) -> None:
        """The next frame.

        Args:
            grey: its luma at `scaled_size` and 8 bits, where somebody has it already.
            sample: measure more of it, whether it is due or not.
        """
        luma = _luma(timed.frame)
        grey = _grey(luma) if grey is None else grey
        black, white = (0, 255) if luma.full else (16, 235)
        before, self._grey = self._grey, grey
        self.pts.append(timed.pts)
        self._luma.append((cv2.mean(grey)[0] - black) * 255 / (white - black))
        self._change.append(-1.0 if before is None else cv2.norm(grey, before, cv2.NORM_L1) / grey.size)
        dark = np.count_nonzero(grey < black + BLACK_PIXEL * (white - black) // 255)
        self._black.append(int(dark >= BLACK_PICTURE * grey.size))
        if self._pending is not None:
            taken, earlier = self._pending
            taken.motion = self._motion.between(earlier, grey, float((timed.pts - taken.pts) * self._base))
            self._pending = None
        if sample or self._due is None or timed.pts >= self._due:
            self._due = timed.pts + self._period
            taken = self._sampled(number, timed)
            self._samples.append(taken)
            self._pending = taken, grey
            self._thin_out()

    def _sampled(self, number: int, timed: Timed) -> Sample:
        picture = sdr_picture(timed.frame, self._screen, PICTURE)
        mean, deviation = cv2.meanStdDev(cv2.cvtColor(picture, cv2.COLOR_RGB2GRAY))
        shown = self._gap == self._period or self._shown is None or timed.pts - self._shown >= self._gap
        self._shown = timed.pts if shown else self._shown
        small = _small(picture) if shown else None
        return Sample(number, timed.pts, float(mean[0, 0]), float(deviation[0, 0]), sharpness(timed.frame), small=small)

    def _thin_out(self) -> None:
        pictures = [sample for sample in self._samples if sample.small is not None]
        if len(pictures) <= MOST_PICTURES or self._gap >= self._widest:
            return
        self._gap = min(2 * self._gap, self._widest)
        last: int | None = None
        for sample in pictures:
            if last is not None and sample.pts - last < self._gap:
                sample.small = None
            else:
                last = sample.pts

    def forget_before(self, number: int) -> None:
        """Frames before this one are not asked for again."""
        gone = number - self._first
        for kept in (self.pts, self._luma, self._change, self._black):
            del kept[:gone]
        self._first = number
        self._samples = [sample for sample in self._samples if sample.number >= number]
        self._gap, self._shown = self._period, None

    def measures(self, number: int, frames: int) -> dict[str, float] | None:
        """Columns of the clip of these frames; None: none of them was sampled."""
        start, stop = number - self._first, number - self._first + frames
        samples = self._within(number, frames)
        if not samples:
            return None
        change = np.frombuffer(self._change, np.float32)[start + 1 : stop]
        luma = np.frombuffer(self._luma, np.float32)[start:stop]
        black = np.frombuffer(self._black, np.int8)[start:stop]
        moved = [sample.motion for sample in samples if sample.motion is not None and sample.number + 1 < number + frames]
        return {
            "motion": float(np.mean(moved)) if moved else 0.0,
            "static": float((change < STATIC).mean()) if len(change) else 1.0,
            "black": float(black.mean()),
            "brightness": float(np.mean([sample.brightness for sample in samples])),
            "contrast": float(np.mean([sample.contrast for sample in samples])),
            "sharpness": float(np.mean([sample.sharpness for sample in samples])),
            "flashes": float(flashes(luma)),
            "fade": fade(luma),
        }

    def picture(self, number: int, frames: int) -> tuple[str, str]:
        """Perceptual hash (16 hex digits) and thumbnail (JPEG, base64) of the sampled frame nearest to the middle; two empty ones where
        no frame was sampled."""
        start = number - self._first
        middle = (self.pts[start] + self.pts[start + frames - 1]) / 2
        shown = [(abs(sample.pts - middle), sample.small) for sample in self._within(number, frames) if sample.small is not None]
        if not shown:
            return "", ""
        small = min(shown, key=lambda each: each[0])[1]
        grey = Image.frombytes("L", (HASHED, HASHED), small.hashed)
        return str(imagehash.phash(grey)), base64.b64encode(small.thumbnail).decode()

    def _within(self, number: int, frames: int) -> list[Sample]:
        first = bisect.bisect_left(self._samples, number, key=lambda sample: sample.number)
        stop = bisect.bisect_left(self._samples, number + frames, key=lambda sample: sample.number)
        return self._samples[first:stop]


# --- Of one frame -----------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Luma:
    """A frame's first plane as it is stored: (h, w), 8 bits or more in 16."""

    codes: Any
    bits: int
    full: bool
    """Whether 0 is black and the largest code white; else 16 and 235 of 255 are."""


def _luma(frame: Any) -> _Luma:
    stored = frame if _LUMA_FIRST.fullmatch(frame.format.name) else frame.reformat(format="yuv420p", threads=1)
    bits = stored.format.components[0].bits
    codes = plane_of(stored.planes[0], stored.width * (2 if bits > 8 else 1))
    full = stored.format.name.startswith(("yuvj", "gray")) or int(frame.color_range) == FULL
    return _Luma(codes.view("<u2") if bits > 8 else codes, bits, full and stored is frame)


def _grey(luma: _Luma) -> Picture:
    """8 bits, at `scaled_size`."""
    height, width = luma.codes.shape
    small = np.asarray(cv2.resize(luma.codes, scaled_size(width, height), interpolation=cv2.INTER_LINEAR))
    return (small >> (luma.bits - 8)).astype(np.uint8) if luma.bits > 8 else small


def sharpness(frame: Any) -> float:
    """Variance of the Laplacian of luma in codes of 8 bits, at half a size, a third … whose longer side has `SHARP_SIDE` pixels or more."""
    luma = _luma(frame)
    height, width = luma.codes.shape
    factor = max(1, max(height, width) // SHARP_SIDE)
    rows, columns = max(1, height // factor), max(1, width // factor)
    cut = np.ascontiguousarray(luma.codes[: rows * factor, : columns * factor])
    small = cv2.resize(cut, (columns, rows), interpolation=cv2.INTER_AREA) if factor > 1 else cut
    deviation = cv2.meanStdDev(cv2.Laplacian(small, cv2.CV_32F))[1]
    return float(deviation[0, 0] / (1 << (luma.bits - 8))) ** 2


def sdr_picture(frame: Any, screen: Screen, side: int) -> Picture:
    """RGB (h, w, 3) as it is on an SDR screen: upright, square pixels, its longer side at most `side` pixels."""
    height, width = screen.shown(frame.height, frame.width)
    factor = max(1.0, max(height, width) / side)
    rows, columns = max(1, round(height / factor)), max(1, round(width / factor))
    stored = (columns, rows) if screen.turn.transposed else (rows, columns)
    small = frame
    if factor > 1:
        matrix = screens.untagged_matrix(frame)
        small = frame.reformat(stored[1], stored[0], interpolation="AREA", threads=1)
        if matrix == screens.BT709:
            small.colorspace = 1
        screen = dataclasses.replace(screen, pixel_aspect=Fraction(1))
    return screens.fitted(small, screen, rows, columns)


def _small(picture: Picture) -> Small:
    height, width = picture.shape[:2]
    shown = Image.fromarray(picture)
    hashed = shown.convert("L").resize((HASHED, HASHED), Image.Resampling.LANCZOS).tobytes()
    if width > THUMBNAIL:
        shown = shown.resize((THUMBNAIL, max(1, round(height * THUMBNAIL / width))), Image.Resampling.BOX)
    content = io.BytesIO()
    shown.save(content, "JPEG", quality=80)
    return Small(content.getvalue(), hashed)


# --- Of a clip's frames -----------------------------------------------------------------------------------------------------------------


def flashes(luma: NDArray[np.float32]) -> int:
    """How often mean luma jumps and comes back."""
    found, place = 0, 1
    while place < len(luma):
        before = luma[place - 1]
        back = luma[place + 1 : place + 1 + FLASH_FRAMES]
        near = np.flatnonzero(np.abs(back - before) <= FLASH_BACK)
        if abs(luma[place] - before) >= FLASH and len(near):
            found, place = found + 1, place + 1 + int(near[0])
        place += 1
    return found


def fade(luma: NDArray[np.float32]) -> float:
    """Share of the frames that lie in fades: runs in which mean luma goes one way, from or to black."""
    ways = np.sign(np.diff(luma))
    within = np.zeros(len(luma), bool)
    start = 0
    for place in range(1, len(ways) + 1):
        if place < len(ways) and ways[place] == ways[start]:
            continue
        run = luma[start : place + 1]
        if ways[start] and len(run) > FADE_FRAMES and run.min() < FADE_BLACK and run.max() - run.min() >= FADE_BLACK:
            within[start : place + 1] = True
        start = place
    return float(within.mean()) if len(luma) > 1 else 0.0
