"""A video file → its frames with integer times.

Owns how a file is opened (regular files alone, closed again whatever happens), which PTS each frame has, and what counts as damage. Refuses
to look at pixels, and to choose a stream and formats: `opensora.data.video` does, for the trainer and for this package.

One thread decodes: there is a process for each core.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av

from opensora.data import screen as screens
from opensora.data import video
from opensora.data.folder import SPECIAL
from opensora.data.screen import Screen, Unusable
from opensora.dataset.rows import Quarantine

MOST_FAILURES = 16
"""Reads in a row that may fail before a file counts as broken off: as many as tell a damaged place from a lost end."""
MOST_DAMAGE = 0.01
"""Of a video's packets that may not decode. FFmpeg hides single lost frames; more would show in the clips."""
_REASONS = {
    "the file is empty": "empty file", "no video stream": "no video stream", "names other": "names other files",
    "a list of": "names other files", "pixels a frame": "too many pixels",
}  # fmt: skip
"""What the trainer's reader of videos says, and the reason that rows are counted by."""


@dataclass(frozen=True)
class Timed:
    """A decoded frame and when it is shown, in the stream's units."""

    pts: int
    lasts: int
    """How long, as far as the file says; 0: it does not say."""
    frame: Any
    """PyAV's."""


@dataclass
class Film:
    """An open video."""

    path: Path
    container: Any
    stream: Any
    time_base: Fraction
    """Seconds of one PTS unit."""
    period: int
    """PTS units of a frame where the file does not say when the next begins."""
    screen: Screen | None = None
    """How frames lie on the screen; known with the first of them."""
    counted_times: bool = False
    """Whether a frame came without a PTS, so that times hold only where all frames before were decoded."""
    packets: int = 0
    damaged: int = 0
    """Packets that did not decode."""

    def frames(self) -> Iterator[Timed]:
        """Those that are shown, in order. PTS increase strictly: a frame whose PTS is missing or not after the one before it follows that
        one by a period, as a player shows it.

        Raises:
            Quarantine: the picture changes its size on the way.
        """
        last, size = None, None
        for frame in _decoded(self):
            if video.is_left_out(self.container, self.stream, frame):
                continue
            if self.screen is None:
                still = video.is_picture(self.container)
                self.screen = screens.screen_of(self.path, self.stream, frame, is_picture=still)
            size = size or (frame.width, frame.height)
            if size != (frame.width, frame.height):
                raise Quarantine("size changes within the video", f"{size[0]}x{size[1]}, then {frame.width}x{frame.height}")
            pts = frame.pts
            if pts is None or (last is not None and pts <= last):
                self.counted_times = self.counted_times or pts is None
                pts = (last + self.period) if last is not None else 0
            last = pts
            yield Timed(pts, int(frame.duration or 0), frame)
            if video.is_picture(self.container):
                return

    def seek(self, pts: int) -> None:
        """To the last key frame at or before `pts`. Raises av.FFmpegError where the file cannot seek."""
        self.container.seek(pts, stream=self.stream, backward=True)

    def check_damage(self) -> None:
        """Raises Quarantine where more is damaged than may be hidden."""
        if self.damaged > MOST_DAMAGE * self.packets:
            raise Quarantine("damaged", f"{self.damaged} of {self.packets} packets do not decode")


@contextmanager
def opened(path: Path) -> Iterator[Film]:
    """A video file, open while the block lasts.

    Raises:
        Quarantine: no regular file, not readable, no video; or whatever of FFmpeg's errors is raised inside the block.
    """
    check_regular(path)
    try:
        with video.opened(path) as (container, stream):
            stream.thread_type = "NONE"
            stream.codec_context.thread_count = 1
            base = Fraction(stream.time_base or Fraction(1, 1000))
            yield Film(path, container, stream, base, max(1, round(video.period_of(stream) / base)))
    except Unusable as error:
        text = str(error)
        raise Quarantine(next((reason for begins, reason in _REASONS.items() if begins in text), "cannot be decoded"), text) from error
    except (av.FFmpegError, OSError, ValueError, MemoryError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {error}"
        raise Quarantine("cannot be decoded", str(why)) from error


def check_regular(path: Path) -> os.stat_result:
    """Raises Quarantine where it is no regular file: opening a pipe would wait for ever."""
    try:
        found = path.stat()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        raise Quarantine("cannot be read", getattr(error, "strerror", None) or str(error)) from error
    if not stat.S_ISREG(found.st_mode):
        raise Quarantine("no regular file", SPECIAL.get(stat.S_IFMT(found.st_mode), "something else"))
    if found.st_size == 0:
        raise Quarantine("empty file", "0 bytes")
    return found


def _decoded(film: Film) -> Iterator[Any]:
    """PyAV's frames. A packet that does not decode is counted and passed over, as players do."""
    decoder = video.alpha_decoder(film.stream)
    for packet in _packets(film):
        film.packets += 1
        try:
            frames = packet.decode() if decoder is None else decoder.decode(packet if packet.size else None)
        except av.EOFError:
            return
        except av.FFmpegError:
            film.damaged += 1
            continue
        yield from frames


def _packets(film: Film) -> Iterator[Any]:
    """Of the film's stream, with the empty one at the end that makes the decoder give what it holds."""
    failures, packets = 0, film.container.demux(film.stream)
    while True:
        try:
            packet = next(packets)
        except StopIteration:
            return
        except av.EOFError:
            return
        except av.FFmpegError:
            failures, film.damaged = failures + 1, film.damaged + 1
            if failures >= MOST_FAILURES:
                return
            packets = film.container.demux(film.stream)
            continue
        failures = 0
        yield packet
