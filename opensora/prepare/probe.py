"""A video file → what it is, before anything of it is decoded but its first frame. What is out of bounds is refused here.

Owns the bounds of `limits` and what counts as HDR, alpha, interlaced and a varying rate. Refuses to decode a whole video: what the
container's index says may be wrong, and `look` sets it right.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from opensora.data import colour, video
from opensora.data.screen import Screen
from opensora.dataset.prepare_config import Limits
from opensora.dataset.rows import Drop, Media, Quarantine
from opensora.prepare.films import Film, check_regular, opened

VERSION = 1
"""Of what this step finds: it is in the step's digest."""
PACKETS_TIMED = 300
"""Packets whose times tell whether the rate varies, where a container has no index: some ten seconds."""
_HDR = {colour.PQ: "pq", colour.HLG: "hlg"}


@dataclass(frozen=True)
class _Times:
    """What a container says of its frames, in PTS units; None and empty: it does not say."""

    frames: int | None
    lasts: int | None
    """All together."""
    each: Sequence[int]
    """How long single frames last."""


def probe(path: Path, limits: Limits) -> Media:
    """What a file is. Its index is read and one frame decoded.

    Raises:
        Drop: a rule of `limits` says that it is not wanted: HDR, a picture that is too small.
        Quarantine: it is no video that can be decoded, or above a limit: such a file is not opened any further.
    """
    size = check_regular(path).st_size
    _at_most("bytes", size, limits.max_bytes, "max_bytes")
    with opened(path) as film:
        stream = film.stream
        for side in (stream.width, stream.height):
            _at_most("pixels a side", side, limits.max_side, "max_side")
        _at_most("frames", max(0, stream.frames), limits.max_frames, "max_frames")
        times = _times(film)
        _check_times(film, times, limits)
        first = next(film.frames(), None)
        if first is None or film.screen is None:
            raise Quarantine("no frame can be decoded", f"container {film.container.format.name}, codec {stream.codec_context.name}")
        if not times.each:
            times = dataclasses.replace(times, each=_next_times(film))
        media = _media(film, film.screen, times, first.pts, first.frame)
    _check_picture(media, limits)
    return media


def _at_most(what: str, found: float, most: float, limit: str) -> None:
    if found > most:
        raise Quarantine(f"above limits.{limit}", f"{found:,.10g} {what}, {most:,.10g} are the most")


def _times(film: Film) -> _Times:
    """By the container's index, without reading a packet."""
    stream, container = film.stream, film.container
    if "mov" in container.format.name.split(","):
        entries = [entry.timestamp for entry in stream.index_entries if not entry.is_discard]
        each = [after - before for before, after in itertools.pairwise(entries)]
        if entries:
            return _Times(len(entries), sum(each) + (each[-1] if each else film.period), each)
    lasts = stream.duration
    if not lasts and container.duration:
        lasts = round(Fraction(container.duration, 1_000_000) / film.time_base)
    return _Times(stream.frames if stream.frames > 0 else None, lasts or None, ())


def _next_times(film: Film) -> list[int]:
    """How long the next frames last, by their packets."""
    packets = itertools.islice(film.container.demux(film.stream), PACKETS_TIMED)
    times = sorted(packet.pts for packet in packets if packet.pts is not None)
    return [after - before for before, after in itertools.pairwise(times)]


def _check_times(film: Film, times: _Times, limits: Limits) -> None:
    if times.lasts is None:
        return
    seconds = float(times.lasts * film.time_base)
    _at_most("hours", seconds / 3600, limits.max_hours, "max_hours")
    if times.frames is not None and times.frames > 1 and seconds > 0:
        _at_most("frames a second", times.frames / seconds, limits.max_fps, "max_fps")


def _check_picture(media: Media, limits: Limits) -> None:
    _at_most("bits a sample", media.bits, limits.max_bits, "max_bits")
    for side in (media.width, media.height):
        _at_most("pixels a side", side, limits.max_side, "max_side")
        if side < limits.min_side:
            raise Drop("below limits.min_side", f"{media.width}x{media.height}, {limits.min_side} is the least")
    if media.hdr and limits.hdr == "drop":
        raise Drop("HDR", f"{media.hdr}, and limits.hdr is drop")


def _media(film: Film, screen: Screen, times: _Times, start: int, frame: Any) -> Media:
    stream, container = film.stream, film.container
    height, width = screen.shown(frame.height, frame.width)
    audio = next((each.codec_context.name for each in container.streams.audio if each.codec_context), "")
    seconds = None if times.lasts is None else times.lasts * film.time_base
    rate = Fraction(times.frames) / seconds if times.frames and seconds else Fraction(stream.guessed_rate or 0)
    aspect = Fraction(screen.pixel_aspect)
    components = frame.format.components
    alpha = frame.format.name == "pal8" or any(each.is_alpha for each in components) or video.alpha_decoder(stream) is not None
    return Media(
        container=container.format.name, codec=stream.codec_context.name, width=width, height=height, rotation=rotation(screen),
        aspect=(aspect.numerator, aspect.denominator), pixel_format=frame.format.name, bits=max(each.bits for each in components),
        hdr=_HDR.get(int(frame.color_trc), ""), alpha=alpha, interlaced=bool(frame.interlaced_frame),
        time_base=(film.time_base.numerator, film.time_base.denominator), start_pts=start, end_pts=start + (times.lasts or 0),
        frames=-1 if times.frames is None else times.frames, fps=float(rate), variable=varies(collections.Counter(times.each)), audio=audio,
    )  # fmt: skip


def rotation(screen: Screen) -> int:
    """Degrees clockwise that frames are turned for showing. A mirrored picture counts as the turn that is left without the mirror."""
    turn = screen.turn
    if turn.transposed:
        return 90 if turn.columns_flipped else 270
    return 180 if turn.rows_flipped and turn.columns_flipped else 0


def varies(lasting: Mapping[int, int]) -> bool:
    """Whether frames last differently, by more than rounding to PTS units and 2% of a frame's usual time.

    Args:
        lasting: how many frames last so many PTS units.
    """
    usual = max(lasting, key=lambda each: lasting[each], default=0)
    return any(abs(each - usual) > max(1, usual // 50) for each in lasting)
