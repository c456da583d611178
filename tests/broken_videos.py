"""Videos that are broken, each in its own way: what a probe, or the decode after it, has to put aside with a reason."""

from __future__ import annotations

import os
import socket
import struct
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import hand_made_videos as made
import numpy as np
import raw_videos as raw


def film(path: Path, **options: str) -> Path:
    return made.write(path, raw.moving(raw.texture(1, 64, 48), 40), container_options=options, options={"crf": "20", "g": "10"})


def _part(path: Path, share: float, **options: str) -> None:
    content = film(path, **options).read_bytes()
    path.write_bytes(content[: int(len(content) * share)])


def truncated(path: Path) -> None:
    _part(path, 0.5)


def truncated_with_index(path: Path) -> None:
    """Its index lies at the beginning and is whole; half of its frames are not there."""
    _part(path, 0.5, movflags="+faststart")


def empty(path: Path) -> None:
    path.touch()


def text(path: Path) -> None:
    path.write_text("a video of a cat\n" * 100)


def zeros(path: Path) -> None:
    path.write_bytes(bytes(100_000))


def noise(path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(100_000))


def web_page(path: Path) -> None:
    path.write_text("<!doctype html><html><body>404 not found</body></html>")


def archive(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + np.random.default_rng(1).bytes(5000))


def playlist(path: Path) -> None:
    path.write_text("#EXTM3U\n#EXT-X-TARGETDURATION:5\n#EXTINF:5,\nfile:///etc/hostname\n#EXT-X-ENDLIST\n")


def list_of_files(path: Path) -> None:
    path.write_text("ffconcat version 1.0\nfile /etc/hostname\n")


def sound_alone(path: Path) -> None:
    with av.open(str(path), "w") as out:
        stream = out.add_stream("aac", rate=44100, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 44100), np.float32), format="fltp", layout="mono")
        frame.sample_rate = 44100
        for part in (frame, None):
            out.mux(stream.encode(part))


def cover_alone(path: Path) -> None:
    """A sound with a cover picture."""
    made.with_cover(path, raw.texture(1, 64, 48), [])


def no_frames(path: Path) -> None:
    """A header, and nothing behind it."""
    with av.open(str(path), "w", format="matroska") as out:
        stream = out.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        out.start_encoding()


def no_media(path: Path) -> None:
    """Of an mp4 the index alone."""
    content = film(path, movflags="+faststart").read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])


def _index(path: Path, box: bytes, offset: int, value: int) -> None:
    content = bytearray(film(path).read_bytes())
    at = content.index(box) + offset
    content[at : at + 4] = struct.pack(">I", value)
    path.write_bytes(bytes(content))


def huge_header(path: Path) -> None:
    """Its index says that it has a thousand million frames."""
    _index(path, b"stsz", 12, 1_000_000_000)


def index_elsewhere(path: Path) -> None:
    """Its frames are said to lie behind the end of the file."""
    _index(path, b"stco", 12, 1 << 30)


def index_of_noise(path: Path) -> None:
    content = bytearray(film(path).read_bytes())
    at = content.index(b"stsz") + 12
    content[at : at + 160] = np.random.default_rng(2).bytes(160)
    path.write_bytes(bytes(content))


def overwritten(path: Path) -> None:
    """A disk's fault: half of the frames' bytes are others."""
    content = bytearray(film(path, movflags="+faststart").read_bytes())
    at = (content.index(b"mdat") + len(content)) // 2
    content[at:] = np.random.default_rng(3).bytes(len(content) - at)
    path.write_bytes(bytes(content))


def pipe(path: Path) -> None:
    os.mkfifo(path)


def folder(path: Path) -> None:
    path.mkdir()


def loop(path: Path) -> None:
    path.symlink_to(path.name)


def dangling(path: Path) -> None:
    path.symlink_to("nowhere")


def device(path: Path) -> None:
    path.symlink_to("/dev/zero")


def end_of_a_wire(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(str(path))


def missing(path: Path) -> None:
    """No file at all."""


def wide(path: Path) -> None:
    """16,384 x 16 pixels: too many on one side, of few bytes."""
    made.write(path, [np.zeros((16, 16_384, 3), np.uint8)] * 2, codec="qtrle", pix_fmt="rgb24", options={})


def huge(path: Path) -> None:
    """16,384 x 16,384 pixels: 400 MB a frame, of which a few bytes are there."""
    path.write_bytes(b"YUV4MPEG2 W16384 H16384 F24:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(1000))


def large(path: Path) -> None:
    """9,216 x 9,216 pixels, as `huge`."""
    path.write_bytes(b"YUV4MPEG2 W9216 H9216 F24:1 Ip A1:1 C420jpeg\nFRAME\n" + bytes(1000))


def tiny(path: Path) -> None:
    made.write(path, [np.zeros((8, 8, 3), np.uint8)] * 4, codec="mpeg4", options={})


def hasty(path: Path, frames: int = 3000) -> None:
    """So many frames of a millisecond each. One picture, written again and again."""
    source = path.with_name("one-picture.mp4")
    made.write(source, [raw.texture(1, 64, 48)], options={"crf": "40"})
    with av.open(str(source)) as read, av.open(str(path), "w", format="mp4") as out:
        stream = out.add_stream_from_template(read.streams.video[0])
        stream.time_base = Fraction(1, 1000)
        packet = next(each for each in read.demux(video=0) if each.size)
        content = bytes(packet)
        for number in range(frames):
            copy = av.Packet(content)
            copy.stream, copy.time_base, copy.is_keyframe = stream, Fraction(1, 1000), True
            copy.pts = copy.dts = number
            copy.duration = 1
            out.mux(copy)
    source.unlink()


def changes_its_size(path: Path) -> None:
    """Two films behind each other in one stream."""
    parts = b""
    for size in ((64, 48), (96, 64)):
        part = made.write(path.with_name("part.ts"), raw.moving(raw.texture(1, *size), 20))
        parts += part.read_bytes()
        part.unlink()
    path.write_bytes(parts)


KINDS: dict[str, Callable[[Path], None]] = {
    f"{make.__name__}.{ending}": make
    for make, ending in (
        (truncated, "mp4"), (truncated_with_index, "mp4"), (empty, "mp4"), (text, "mp4"), (zeros, "mp4"), (noise, "mkv"),
        (web_page, "mp4"), (archive, "avi"), (playlist, "mp4"), (list_of_files, "mkv"), (sound_alone, "mp4"), (cover_alone, "mp3"),
        (no_frames, "mkv"), (no_media, "mp4"), (huge_header, "mp4"), (index_elsewhere, "mp4"), (index_of_noise, "mp4"),
        (overwritten, "mp4"), (pipe, "mp4"), (folder, "mp4"), (loop, "mp4"), (dangling, "mp4"), (device, "mp4"), (end_of_a_wire, "mp4"),
        (missing, "mp4"), (wide, "mov"), (huge, "mp4"), (large, "mp4"), (tiny, "mp4"), (hasty, "mp4"), (changes_its_size, "ts"),
    )
}  # fmt: skip
"""By the name of the file that each makes."""
