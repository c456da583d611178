"""A shot of a video → a file of its own with exactly its frames: H.264, yuv420p, upright, square pixels, SDR, even sides, its own times.

Owns the encoder's settings and which frames are written: those that the shot's PTS bound, counted again. Refuses to copy packets: a copy
begins at a key frame, which is not where a shot begins. Sound is left out.

The same shot gives the same bytes, with the same release of FFmpeg: one thread encodes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.video.reformatter import Colorspace, VideoReformatter

from opensora.data import colour
from opensora.data import screen as screens
from opensora.data.screen import Screen, Turn
from opensora.dataset.prepare_config import Clips
from opensora.dataset.rows import ClipFile, Media, Quarantine, Shot
from opensora.prepare.films import Film, Timed, opened
from opensora.prepare.scores import plane_of

VERSION = 1
"""Of the bytes that this step writes: it is in the step's digest."""
PRESET = "veryfast"
"""Of x264. These files are read once or twice, by captioners and by the encoders of the cache: time counts for more than bytes."""
KEY_FRAMES = 48
"""Frames from one key frame to the next at most, for those that look into the middle of a clip."""
FINEST = 90_000
"""Units a second of a clip's times at most, where the source counts in odd ones."""
_BT601, _BT709 = 6, 1
_LIMITED = 1


def write(path: Path, media: Media, shot: Shot, to: Path, settings: Clips) -> ClipFile:
    """Write `to`, whole or not at all. `ClipFile.path` is its name; the caller knows the folder.

    Raises:
        Quarantine: the source does not give the shot's frames any more.
    """
    partial = to.with_name(f"{to.name}.partial")
    try:
        with opened(path) as film:
            try:
                size = _encode(film, media, shot, partial, settings, seek=True)
            except (_OtherFrames, av.FFmpegError):
                size = None
        if size is None:  # from the beginning: the file cannot seek, or led elsewhere
            with opened(path) as film:
                try:
                    size = _encode(film, media, shot, partial, settings, seek=False)
                except _OtherFrames as error:
                    raise Quarantine("a shot's frames are not there", str(error)) from error
        partial.replace(to)
    finally:
        partial.unlink(missing_ok=True)
    with to.open("rb") as content:
        digest = hashlib.file_digest(content, "sha256").hexdigest()
    return ClipFile(
        path=to.name, sha256=digest, size=to.stat().st_size, frames=shot.frames, width=size[0], height=size[1],
        fps=float(shot.frames / ((shot.end_pts - shot.start_pts) * Fraction(*shot.time_base))),
    )  # fmt: skip


class _OtherFrames(Exception):
    """What was decoded is not what the shot says."""


def _encode(film: Film, media: Media, shot: Shot, to: Path, settings: Clips, *, seek: bool) -> tuple[int, int]:
    """Width and height of what was written."""
    frames = _frames_of(film, media, shot, seek=seek)
    first = next(frames)
    assert film.screen is not None
    look = _Picture(film.screen, first.frame, settings.short_side)
    base = film.time_base if film.time_base.numerator == 1 else Fraction(1, min(FINEST, film.time_base.denominator))
    with av.open(str(to), "w", format="mp4", options={"movflags": "+faststart"}) as out:
        stream = out.add_stream("libx264", rate=Fraction(media.fps or 25).limit_denominator(1001), options=_options(settings))
        stream.width, stream.height, stream.pix_fmt = look.width, look.height, "yuv420p"
        stream.time_base = stream.codec_context.time_base = base
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace, stream.codec_context.color_range = look.matrix, _LIMITED
        count, held, lasting = 0, first, {}
        for after in _then(frames):
            until = shot.end_pts if after is None else after.pts
            picture = look.of(held.frame)
            picture.time_base = base
            picture.pts = round((held.pts - shot.start_pts) * film.time_base / base)
            picture.duration = lasting[picture.pts] = max(1, round((until - held.pts) * film.time_base / base))
            picture.pict_type = av.video.frame.PictureType.NONE
            out.mux(_lasting(stream.encode(picture), lasting))
            count += 1
            if after is not None:
                held = after
        if count != shot.frames:
            raise _OtherFrames(f"{count} frames from PTS {shot.start_pts} to {shot.end_pts}, {shot.frames} when it was looked at")
        out.mux(_lasting(stream.encode(), lasting))
    return look.width, look.height


def _lasting(packets: list[Any], lasting: Mapping[int, int]) -> list[Any]:
    """x264 gives all packets the same duration, and that of the last one is how long a file says that its last frame lasts."""
    for packet in packets:
        packet.duration = lasting[packet.pts]
    return packets


def _options(settings: Clips) -> dict[str, str]:
    """Without B frames: with them an mp4 counts durations in the order of coding, and the last frame of a varying rate lasts wrongly."""
    return {"crf": str(settings.crf), "preset": PRESET, "threads": "1", "g": str(KEY_FRAMES), "bf": "0"}


def _then(frames: Iterator[Timed]) -> Iterator[Timed | None]:
    """The frames that follow, and None for the end."""
    yield from frames
    yield None


def _frames_of(film: Film, media: Media, shot: Shot, *, seek: bool) -> Iterator[Timed]:
    """Those of the shot.

    Raises:
        _OtherFrames: the first one does not begin where the shot does.
    """
    if seek and shot.start_pts > media.start_pts:
        film.seek(shot.start_pts)
    began = False
    for timed in film.frames():
        if seek and film.counted_times:
            raise _OtherFrames("frames without times, which cannot be told apart after a seek")
        if timed.pts >= shot.end_pts:
            break
        if timed.pts < shot.start_pts:
            continue
        if not began and timed.pts != shot.start_pts:
            raise _OtherFrames(f"its first frame is at PTS {timed.pts}, not {shot.start_pts}")
        began = True
        if seek and timed.frame.is_corrupt:
            raise _OtherFrames("a frame that lacks what it is made of")
        yield timed
    if not began:
        raise _OtherFrames(f"no frame from PTS {shot.start_pts} to {shot.end_pts}")


class _Picture:
    """From decoded frames to those of the clip."""

    def __init__(self, screen: Screen, first: Any, short_side: int | None) -> None:
        self._screen = screen
        rows, columns = screen.shown(first.height, first.width)
        if short_side is not None and min(rows, columns) > short_side:
            factor = Fraction(short_side, min(rows, columns))
            rows, columns = round(rows * factor), round(columns * factor)
        self.height, self.width = max(2, rows - rows % 2), max(2, columns - columns % 2)
        matrix = screens.untagged_matrix(first)
        self._as_stored = (
            first.format.name == "yuv420p"
            and screen.turn == Turn()
            and screen.pixel_aspect == 1
            and not first.interlaced_frame
            and not colour.is_wide(first.color_trc, first.color_primaries)
            and int(first.color_range) != 2  # full range
            and int(first.colorspace) in (_BT709, colour.UNSPECIFIED, 5, _BT601)
        )
        if self._as_stored:
            self.matrix = _BT709 if matrix == screens.BT709 or int(first.colorspace) == _BT709 else _BT601
        else:
            self.matrix = _BT709 if self.height > screens.HD[0] or self.width > screens.HD[1] else _BT601
        self._reformatter = VideoReformatter()

    def of(self, frame: Any) -> Any:
        """PyAV's frame, yuv420p of this size. What is stored as it is shown goes through as it is, or scaled plane by plane."""
        if self._as_stored:
            if (frame.height, frame.width) == (self.height, self.width):
                return frame
            if frame.height - self.height < 2 and frame.width - self.width < 2:
                return _cut(frame, self.height, self.width)
            return self._reformatter.reformat(frame, self.width, self.height, interpolation="AREA", threads=1)
        pixels = screens.fitted(frame, self._screen, self.height, self.width)
        shown = av.VideoFrame.from_ndarray(pixels, format="rgb24")
        name = Colorspace.ITU709 if self.matrix == _BT709 else Colorspace.ITU601
        return self._reformatter.reformat(shown, format="yuv420p", dst_colorspace=name, threads=1)


def _cut(frame: Any, height: int, width: int) -> Any:
    """Without its last row or column: sides are even."""
    cut = av.VideoFrame(width, height, "yuv420p")
    for number, (before, after) in enumerate(zip(frame.planes, cut.planes, strict=True)):
        rows, columns = (height, width) if number == 0 else (height // 2, width // 2)
        lines = np.zeros((after.height, after.line_size), np.uint8)
        lines[:rows, :columns] = plane_of(before, before.width)[:rows, :columns]
        after.update(lines.tobytes())
    return cut
