"""Rows of clips for tests of steps that come after the cut: a source, its media, one shot, and a file where there is one."""

from __future__ import annotations

from pathlib import Path

from opensora.dataset.rows import Clip, ClipFile, Media, Provenance, Shot, Source

TIME_BASE = (1, 1000)
NOWHERE = Provenance()


def media(width: int = 64, height: int = 48, seconds: float = 10.0, start_s: float = 0.0, fps: float = 8.0) -> Media:
    return Media(
        container="mp4",
        codec="h264",
        width=width,
        height=height,
        rotation=0,
        aspect=(1, 1),
        pixel_format="yuv420p",
        bits=8,
        hdr="",
        alpha=False,
        interlaced=False,
        time_base=TIME_BASE,
        start_pts=round(start_s * 1000),
        end_pts=round((start_s + seconds) * 1000),
        frames=round(seconds * fps),
        fps=fps,
        variable=False,
        audio="",
    )


def clip(
    name: str,
    *,
    provenance: Provenance = NOWHERE,
    start_s: float = 0.0,
    end_s: float = 1.0,
    of: Media | None = None,
    file: ClipFile | None = None,
) -> Clip:
    """Seconds from PTS 0."""
    start, end = round(start_s * 1000), round(end_s * 1000)
    shot = Shot(start, end, TIME_BASE, start_frame=0, frames=8, measures={}, phash="0" * 16)
    return Clip(name, "0" * 64, Source(f"{name}.mp4", name, provenance), of or media(), shot, file)


def clip_file(folder: Path, name: str, *, frames: int, width: int, height: int, fps: float = 8.0) -> ClipFile:
    """Of a file that is there."""
    return ClipFile(name, "0" * 64, (folder / name).stat().st_size, frames, width, height, fps)
