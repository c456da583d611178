"""What a captioner is shown of a clip: some frames as JPEGs, or the clip's own file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from opensora.dataset.prepare_config import CaptionServer
from opensora.dataset.rows import Clip, ClipFile, Quarantine
from opensora.prepare.captions.profiles import Shown, encoded

FramesOf = Callable[[Path, Sequence[float], int], list[bytes]]
"""`opensora.prepare.frames.frames_of`: JPEGs of a clip's file at these shares of it, with this longer side."""

MOST_VIDEO = 32 << 20
"""Bytes of a clip's file that are sent as a video. Servers hold a request in memory several times, and so does this process."""


def shares(frames: int) -> tuple[float, ...]:
    """Where in a clip the frames lie, 0..1: the middles of equal parts; of three at 20%, 50% and 80%, as Open-Sora 1.0 took them."""
    return (0.2, 0.5, 0.8) if frames == 3 else tuple((index + 0.5) / frames for index in range(frames))


def file_of(clip: Clip) -> ClipFile:
    """
    Raises:
        Quarantine: the clip has none.
    """
    if clip.file is None:
        raise Quarantine("clip has no file")
    return clip.file


def shown(clip: Clip, folder: Path, settings: CaptionServer, frames_of: FramesOf) -> Shown:
    """
    Raises:
        Quarantine: the file cannot be read, or is too large for a request.
    """
    file = file_of(clip)
    path, pixels = folder / file.path, settings.frames * file.width * file.height
    try:
        if settings.profile == "images":
            smaller = min(1.0, settings.side / max(file.width, file.height))
            jpegs = frames_of(path, shares(settings.frames), settings.side)
            return Shown(jpegs=tuple(map(encoded, jpegs)), pixels=round(pixels * smaller * smaller))
        if file.size > MOST_VIDEO:
            raise Quarantine(
                "clip too large to send as a video",
                f"{file.size / 2**20:.0f} MiB, at most {MOST_VIDEO >> 20}; set clips.short_side or a higher clips.crf, or take "
                "caption.profile images",
            )
        return Shown(mp4=encoded(path.read_bytes()), pixels=pixels)
    except OSError as error:
        raise Quarantine("clip file cannot be read", f"{file.path}: {error.strerror or error}") from None
