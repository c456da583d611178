"""Raw videos of moving digits, for `scripts/demo-videos` and tests: what a person's folder of videos holds, and what of it is to be found.

    python -m opensora.prepare.digit_films FOLDER [--films N] [--ready FOLDER]

Owns the films: shots of one moving digit each with hard cuts between them, and among them a title card, black frames and a shot that is
shown again; one film is turned as a phone turns it, and one file is broken. `ready` gets the same shots as clips of their own with a true
caption each, as somebody would have them who needs no preparation. Refuses to draw digits (`opensora.data.digits`) and to prepare.

Film n is a function of (seed, n) alone. A cut changes the whole picture, as it does in a film of a camera: backgrounds are
blue and brown by turns, and dark enough that the classifier of digits sees none of them. Two digits on equal backgrounds would differ in so
few pixels that no detector could tell a cut from a motion; on grey ones the hue of dark noise changes more than at a cut.
"""

from __future__ import annotations

import argparse
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

from opensora.data.digits import TRAINED, Canvas, caption
from opensora.evaluation import fonts

SIDE = 64
"""Pixels of a film's rows and columns: four for each of the 16 that a digit is drawn in."""
FPS = 24
FRAMES = 24
"""Of a shot. The demo's 8 frames are each third one of them."""
SHOTS = 24
"""Moving digits in a film, besides the title card, the black frames and the shot that is shown again."""
AGAIN = 5
"""Shot that is shown again at the end of its film, a little brighter."""
BRIGHTER = 3
"""Of 255."""
BEFORE_BLACK = 13
"""Shots before the black frames; the backgrounds on both of their sides are blue."""
BLUE, BROWN = (0, 0, 48), (48, 24, 0)
"""Darkest pixels of a background, of 255. Mean of red, green and blue stays below 40, from where on the classifier sees ink."""

_CANVAS = Canvas(FRAMES, SIDE // 4, SIDE // 4, "plain")


@dataclass(frozen=True)
class Film:
    shots: NDArray[np.uint8]  # (SHOTS, FRAMES, SIDE, SIDE, 3)
    captions: tuple[str, ...]


def film(seed: int, number: int) -> Film:
    """The shots of one film, without what is no digit."""
    rng = np.random.default_rng([seed, number])
    chosen = np.array(TRAINED)[rng.integers(0, len(TRAINED), SHOTS)]
    drawn = _CANVAS.draw(rng, chosen[:, 0], chosen[:, 1], "train").clips
    large = drawn.repeat(SIDE // drawn.shape[2], axis=2).repeat(SIDE // drawn.shape[3], axis=3)[..., None].repeat(3, axis=4)
    for shot, frames in enumerate(large):
        np.maximum(frames, np.array(BLUE if shot % 2 == (shot >= BEFORE_BLACK) else BROWN, np.uint8), out=frames)
    return Film(large, tuple(caption(int(digit), int(way)) for digit, way in chosen))


def write_films(folder: Path, count: int, seed: int = 0) -> None:
    """`count` films, the last but one of them turned by 90 degrees, and a broken file. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        made, path = film(seed, number), folder / f"film-{number:03d}.mp4"
        again = np.minimum(made.shots[AGAIN].astype(np.int64) + BRIGHTER, 255).astype(np.uint8)
        black = np.zeros((FRAMES, SIDE, SIDE, 3), np.uint8)
        parts = [_title(number)[None].repeat(FRAMES, axis=0), *made.shots[:BEFORE_BLACK], black, *made.shots[BEFORE_BLACK:], again]
        frames = np.concatenate(parts)
        turned = count > 1 and number == count - 2
        write(path, np.rot90(frames, 1, (1, 2)) if turned else frames)  # stored counter-clockwise, shown upright
        if turned:
            turn(path)
    whole = (folder / "film-000.mp4").read_bytes()
    (folder / "broken.mp4").write_bytes(whole[: len(whole) // 3])


def write_ready(folder: Path, count: int, seed: int = 0) -> None:
    """The same shots as clips, with captions.csv. Raises OSError."""
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    lines = ["path,text"]
    for number in range(count):
        made = film(seed, number)
        for shot, (frames, text) in enumerate(zip(made.shots, made.captions, strict=True)):
            name = f"clips/{number:03d}-{shot:02d}.mp4"
            write(folder / name, frames)
            lines.append(f"{name},{text}")
    (folder / "captions.csv").write_text("\n".join(lines) + "\n")


def write(path: Path, frames: NDArray[np.uint8]) -> None:
    """Frames (T, H, W, 3) as an mp4, nearly lossless."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.options = {"crf": "12", "preset": "veryfast"}
        stream.codec_context.thread_count = 1
        stream.time_base = Fraction(1, FPS)
        for pixels in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")))
        container.mux(stream.encode())


def turn(path: Path) -> None:
    """Have an mp4's picture shown turned by 90 degrees clockwise, as a phone that was held upright says it: no pixel is changed."""
    content = bytearray(path.read_bytes())
    place = content.index(b"tkhd") + 4
    matrix = place + (52 if content[place] else 40)
    one = 1 << 16
    struct.pack_into(">9i", content, matrix, 0, one, 0, -one, 0, 0, SIDE * one, 0, 1 << 30)
    path.write_bytes(content)


def _title(number: int) -> NDArray[np.uint8]:
    card = Image.new("RGB", (SIDE, SIDE), (40, 40, 40))
    ImageDraw.Draw(card).text((6, 22), f"Film {number}", fill=(230, 230, 230), font=fonts.font(14))
    return np.asarray(card)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m opensora.prepare.digit_films", description="Write raw videos of moving digits.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--films", type=int, default=40, help="how many [40]")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--ready", type=Path, metavar="FOLDER", help="write the same shots there, as clips with captions")
    args = parser.parse_args(argv)
    write_films(args.folder, args.films, args.seed)
    if args.ready is not None:
        write_ready(args.ready, args.films, args.seed)
    return 0


if __name__ == "__main__":
    sys.exit(main())
