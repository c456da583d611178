"""Clips as files that people open: mp4, gif and a contact sheet.

Owns scaling up (nearest neighbour: people should see the model's own pixels), colours, what a file says of itself, and the layout of the
sheet. Refuses to sample clips.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from opensora.config import DataConfig
from opensora.evaluation import fonts

BT709, LIMITED = 1, 1
"""Matrix, primaries and curve of ITU-T H.273, and the range 16 to 235, as FFmpeg numbers them."""
UNKNOWN_FPS = 8.0
"""Frames a second of a clip whose rate nobody knows."""
SHORTEST_MP4_SIDE = 128
"""Pixels; players show smaller clips as a stamp."""
SHEET_CELL = 64
"""Pixels of a frame's height on the sheet, at least."""
SHEET_FRAMES = 8
"""Columns at most; longer clips show as many frames, evenly spread from the first to the last."""
MARGIN, FONT_SIZE, LABEL_WIDTH = 8, 16, 220
LONGEST_LABEL = 2_000
"""Characters of a caption that are looked at: a label shows fewer."""
PAPER, TEXT = (250, 250, 250), (20, 20, 20)


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """Where to write a file that has its name once it is whole; of a failure nothing stays."""
    partial = path.with_name(f"{path.name}.partial")
    try:
        yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def frames_per_second(data: DataConfig) -> float:
    """At which rate clips of a model are played: that of its training clips, UNKNOWN_FPS if they were taken by counting frames."""
    return data.fps or UNKNOWN_FPS


def write_mp4(path: Path, clip: torch.Tensor, fps: float = UNKNOWN_FPS, said: Mapping[str, str] | None = None) -> None:
    """Clip uint8 (T, H, W, 3) as h264 at `fps` frames a second, scaled up by a whole factor to at least 128 pixels.

    Colours are BT.709 in limited range, and the file says so: of a file that does not, players guess by its height.

    Args:
        said: what the file says of itself, by the names of its container (`title`, `comment`).
    """
    frames = _scaled(clip.numpy(), -(-SHORTEST_MP4_SIDE // min(clip.shape[1:3])))
    rows, columns = (side - side % 2 for side in frames.shape[1:3])  # yuv420 halves the colour planes
    with av.open(str(path), "w", format="mp4") as container:
        container.metadata.update(said or {})
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = columns, rows, "yuv420p"
        stream.options = {"crf": "12"}  # tiny clips: nearly lossless costs a few KB
        told = stream.codec_context
        told.colorspace, told.color_primaries, told.color_trc, told.color_range = BT709, BT709, BT709, LIMITED
        for pixels in frames[:, :rows, :columns]:
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            container.mux(stream.encode(frame.reformat(format="yuv420p", dst_colorspace=BT709, dst_color_range=LIMITED)))
        container.mux(stream.encode())


def write_gif(path: Path, clip: torch.Tensor, fps: float = UNKNOWN_FPS, said: Mapping[str, str] | None = None) -> None:
    """Clip uint8 (T, H, W, 3) as a GIF that plays for ever, scaled up as an mp4. A frame lasts a whole number of hundredths of a second."""
    frames = [Image.fromarray(pixels) for pixels in _scaled(clip.numpy(), -(-SHORTEST_MP4_SIDE // min(clip.shape[1:3])))]
    hundredths = max(2, round(100 / fps))  # browsers play what lasts 0 or 1 at 10 frames a second
    comment = "\n".join((said or {}).values()).encode()
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=10 * hundredths, loop=0, comment=comment)


def write_sheet(path: Path, clips: torch.Tensor, captions: Sequence[str], said: Mapping[str, str] | None = None) -> None:
    """Clips uint8 (n, T, H, W, 3) as a PNG: a row per clip with its caption before it, time runs to the right. `said`: the file's texts."""
    frames = clips.shape[1]
    columns = min(frames, SHEET_FRAMES)
    chosen = torch.linspace(0, frames - 1, columns).round().long()
    factor = max(1, -(-SHEET_CELL // clips.shape[2]))
    height, width = clips.shape[2] * factor, clips.shape[3] * factor
    sheet = Image.new("RGB", (LABEL_WIDTH + columns * (width + MARGIN) + MARGIN, len(captions) * (height + MARGIN) + MARGIN), PAPER)
    draw, font = ImageDraw.Draw(sheet), fonts.font(FONT_SIZE)
    printable = ["".join(letter if letter.isprintable() else " " for letter in caption[:LONGEST_LABEL]) for caption in captions]
    for row, (clip, caption) in enumerate(zip(clips, printable, strict=True)):
        top = MARGIN + row * (height + MARGIN)
        label = "\n".join(
            textwrap.wrap(caption, LABEL_WIDTH // (FONT_SIZE * 9 // 16), max_lines=max(1, height // (FONT_SIZE + 4)), placeholder="…")
        )
        draw.text((MARGIN, top + height // 2), label, TEXT, font, anchor="lm")
        for column, pixels in enumerate(_scaled(clip[chosen].numpy(), factor)):
            sheet.paste(Image.fromarray(pixels), (LABEL_WIDTH + column * (width + MARGIN), top))
    texts = PngInfo()
    for name, text in (said or {}).items():
        texts.add_itxt(name, text)
    sheet.save(path, "PNG", pnginfo=texts)


def _scaled(frames: NDArray[np.uint8], factor: int) -> NDArray[np.uint8]:
    return frames.repeat(factor, axis=1).repeat(factor, axis=2)
