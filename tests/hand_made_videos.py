"""Small videos with what cameras and editors put into files: display matrices, edit lists, aspect ratios, cover pictures, times."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from numpy.typing import NDArray

Picture = NDArray[np.uint8]

RED, GREEN, BLUE, WHITE = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 200)
LETTERS = {"R": RED, "G": GREEN, "B": BLUE, "W": WHITE}

MATRICES = {
    1: (1, 0, 0, 1),
    2: (-1, 0, 0, 1),
    3: (-1, 0, 0, -1),
    4: (1, 0, 0, -1),
    5: (0, 1, 1, 0),
    6: (0, 1, -1, 0),
    7: (0, -1, -1, 0),
    8: (0, -1, 1, 0),
}
"""(a, b, c, d) of x' = a·x + c·y, y' = b·x + d·y for each orientation of EXIF."""


def quadrants(height: int = 64, width: int = 96) -> Picture:
    """Red and green above blue and white."""
    picture = np.zeros((height, width, 3), np.uint8)
    picture[: height // 2, : width // 2], picture[: height // 2, width // 2 :] = RED, GREEN
    picture[height // 2 :, : width // 2], picture[height // 2 :, width // 2 :] = BLUE, WHITE
    return picture


def corners(picture: Any) -> str:
    """The colours of the four quarters' middles, by rows."""
    picture = np.asarray(picture)
    rows, columns = picture.shape[:2]
    found = ""
    for row, column in ((1, 1), (1, 3), (3, 1), (3, 3)):
        pixel = picture[row * rows // 4, column * columns // 4].astype(int)
        found += min(LETTERS, key=lambda letter: np.abs(pixel - LETTERS[letter]).sum())
    return found


def clock(seconds: float, columns: int = 64) -> Picture:
    """All left of column 64·t is white: a picture that says when it was."""
    picture = np.zeros((32, columns, 3), np.uint8)
    picture[:, : round(seconds * 64)] = 255
    return picture


def time_on(picture: Any) -> float:
    """What `clock` says."""
    return float((np.asarray(picture)[16, :, 0] > 127).sum() / 64)


def write(
    path: Path,
    frames: Sequence[Picture],
    rate: int | Fraction = 24,
    *,
    codec: str = "libx264",
    pix_fmt: str = "yuv420p",
    source: str = "rgb24",
    times: Sequence[float] | None = None,
    options: dict[str, str] | None = None,
    setup: Callable[[Any], None] = lambda stream: None,
    of_frame: Callable[[Any], None] = lambda frame: None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """A film of these frames; `times`: seconds of each, for a rate that varies."""
    path.parent.mkdir(parents=True, exist_ok=True)
    default = {"crf": "5", "preset": "ultrafast", "x265-params": "log-level=none"} if codec in ("libx264", "libx265") else {}
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=Fraction(rate), options=default if options is None else options)
        stream.height, stream.width, stream.pix_fmt = frames[0].shape[0], frames[0].shape[1], pix_fmt
        if times is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        setup(stream)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format=source)
            if times is not None:
                frame.pts, frame.time_base = round(times[number] * 1000), Fraction(1, 1000)
            of_frame(frame)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def turn(path: Path, orientation: int) -> None:
    """Give an mp4's picture another place on the screen, as phones do: its display matrix is changed, no pixel is."""
    content = bytearray(path.read_bytes())
    box = content.index(b"tkhd")
    a, b, c, d = (value << 16 for value in MATRICES[orientation])
    content[box + 44 : box + 80] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(bytes(content))


def trimmed(source: Path, path: Path, start: float) -> Path:
    """Cut without encoding, as editors do: packets begin at a keyframe before, and an edit list says where the film begins."""
    with av.open(str(source)) as read, av.open(str(path), "w", options={"avoid_negative_ts": "disabled"}) as out:
        stream = read.streams.video[0]
        copy = out.add_stream_from_template(stream)
        for packet in read.demux(stream):
            if packet.dts is None or packet.pts is None:
                continue
            packet.pts -= round(start / packet.time_base)
            packet.dts -= round(start / packet.time_base)
            packet.stream = copy
            out.mux(packet)
    return path


def with_cover(path: Path, cover: Picture, frames: Sequence[Picture]) -> Path:
    """An mp4 with a cover picture, or without frames an mp3: a sound with one."""
    with av.open(str(path), "w") as out:
        other: Any = out.add_stream("libx264", rate=24) if len(frames) else out.add_stream("libmp3lame", rate=44100, layout="mono")
        still = out.add_stream("mjpeg", rate=24)
        still.height, still.width, still.pix_fmt = *cover.shape[:2], "yuvj420p"
        still.disposition = av.stream.Disposition.attached_pic
        if len(frames):
            other.height, other.width, other.pix_fmt = *frames[0].shape[:2], "yuv420p"
            parts = [av.VideoFrame.from_ndarray(pixels, format="rgb24") for pixels in frames]
        else:
            parts = [av.AudioFrame.from_ndarray(np.zeros((1, 11_520), np.float32), format="fltp", layout="mono")]
            parts[0].sample_rate = 44100
        for packet in [*still.encode(av.VideoFrame.from_ndarray(cover, format="rgb24")), *still.encode()]:
            out.mux(packet)
        for part in [*parts, None]:
            out.mux(other.encode(part))
    return path
