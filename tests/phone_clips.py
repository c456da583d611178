"""A folder as it comes from a phone: clips held upright, lying and upside down, HDR, a rate that varies, umlauts and spaces in names,
a photo, a broken file, an empty one, a `.DS_Store`, and captions as a spreadsheet writes them.

Each clip shows the same scene, which has an above and a left: a sun left of a house, and a ball that rolls to the right in one second.

    python tests/phone_clips.py FOLDER
"""

from __future__ import annotations

import sys
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import hand_made_videos as made
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CAPTIONS = {
    "IMG_0001.MOV": "a red ball rolls past a house",
    "IMG 0002 Straße.MOV": "a ball rolls along a street, held upright",
    "IMG_0003.MOV": "a ball rolls in bright sun; HDR",
    "VID_20261129_140503.mp4": "a ball rolls, sometimes it stutters",
    "Mädchen läuft.mp4": 'a fast camera saw the "red ball"',
    "Urlaub/über Kopf.mp4": "a phone was held upside down",
    "IMG_0007.JPG": "a house, a sun and a ball",
    "kaputt.mp4": "a download that broke off",
    "leer.mp4": "nothing at all",
}
BROKEN = ("kaputt.mp4", "leer.mp4")
STANDING = ("IMG 0002 Straße.MOV", "IMG_0003.MOV", "IMG_0007.JPG")
VARIES = [0, 0.033, 0.066, 0.1, 0.133, 0.3, 0.33, 0.366, 0.4, 0.6, 0.633, 0.666, 0.7, 0.733, 0.9, 0.933, 0.966, 1.0, 1.033]


def scene(time: float, width: int, height: int) -> made.Picture:
    """What the camera sees after so many seconds."""
    scale, picture = min(width, height) / 108, Image.new("RGB", (width, height), (130, 180, 230))
    draw, ground = ImageDraw.Draw(picture), int(height * 0.7)
    draw.rectangle((0, ground, width, height), (70, 130, 60))
    draw.ellipse((8 * scale, 8 * scale, 30 * scale, 30 * scale), (250, 220, 60))
    left, wall = width - 62 * scale, ground - 34 * scale
    draw.rectangle((left, wall, left + 46 * scale, ground), (190, 150, 110))
    draw.polygon([(left - 5 * scale, wall), (left + 23 * scale, wall - 22 * scale), (left + 51 * scale, wall)], (150, 60, 50))
    draw.rectangle((left + 6 * scale, wall + 12 * scale, left + 16 * scale, ground), (90, 60, 40))
    centre, radius = 10 * scale + time * (width - 20 * scale), 8 * scale
    draw.ellipse((centre - radius, ground - radius, centre + radius, ground + radius), (210, 30, 40))
    return np.asarray(picture)


def stored(upright: made.Picture, orientation: int) -> made.Picture:
    """As the sensor saw it: a phone does not turn its pictures, it notes how it was held."""
    return {1: upright, 3: np.rot90(upright, 2), 6: np.rot90(upright, 1), 8: np.rot90(upright, -1)}[orientation]


def film(path: Path, rate: int, orientation: int = 1, times: list[float] | None = None) -> None:
    width, height = (108, 192) if orientation in (6, 8) else (192, 108)
    moments = times or [number / rate for number in range(rate + 2)]
    frames = [stored(scene(time, width, height), orientation) for time in moments]
    made.write(path, frames, rate, times=times, options={"crf": "16", "bf": "0"} if times else {"crf": "16"})
    if orientation != 1:
        made.turn(path, orientation)


def hdr_film(path: Path, orientation: int) -> None:
    """HLG in BT.2020, 10 bits, HEVC: as phones film since 2020. White paper is at 203 nits, the sun far above."""
    with av.open(str(path), "w", format="mov") as out:
        stream: Any = out.add_stream(
            "libx265", rate=Fraction(30), options={"crf": "14", "preset": "ultrafast", "x265-params": "log-level=none"}
        )
        stream.width, stream.height, stream.pix_fmt = 192, 108, "yuv420p10le"
        _tag(stream.codec_context)
        for number in range(32):
            frame = av.VideoFrame(192, 108, "yuv420p10le")
            for plane, values in zip(frame.planes, _hlg(stored(scene(number / 30, 108, 192), orientation)), strict=True):
                lines = np.zeros((plane.height, plane.line_size // 2), "<u2")
                lines[:, : values.shape[1]] = values
                plane.update(lines.tobytes())
            _tag(frame)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    made.turn(path, orientation)


def _tag(thing: Any) -> None:
    thing.color_trc, thing.color_primaries, thing.colorspace, thing.color_range = 18, 9, 9, 1


def _hlg(picture: made.Picture) -> list[NDArray[np.uint16]]:
    """Y, Cb and Cr of 10 bits, by the formulas of ITU-R BT.2100."""
    light = (picture / 255.0) ** 2.4 * 203
    light[(picture[..., 0] > 240) & (picture[..., 2] < 100)] *= 3.5  # the sun
    to_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
    display = light @ to_2020.T / 1000
    luminance = (display @ [0.2627, 0.678, 0.0593])[..., None].clip(1e-6)
    scene_light = (display * luminance ** (1 / 1.2 - 1)).clip(0, 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    codes = np.where(scene_light <= 1 / 12, np.sqrt(3 * scene_light), a * np.log((12 * scene_light - b).clip(1e-6)) + c)
    luma = codes @ [0.2627, 0.678, 0.0593]
    chroma = [(codes[..., index] - luma) / divisor for index, divisor in ((2, 1.8814), (0, 1.4746))]
    halved = [part.reshape(54, 2, 96, 2).mean((1, 3)) for part in chroma]
    return [np.round(876 * luma + 64).astype("<u2"), *(np.round(896 * part + 512).astype("<u2") for part in halved)]


def make(folder: Path) -> Path:
    """All of it; the folder is made where it is not there."""
    folder.mkdir(parents=True, exist_ok=True)
    film(folder / "IMG_0001.MOV", 30)
    film(folder / "IMG 0002 Straße.MOV", 30, 6)
    hdr_film(folder / "IMG_0003.MOV", 6)
    film(folder / "VID_20261129_140503.mp4", 30, times=VARIES)
    film(folder / "Mädchen läuft.mp4", 60)
    film(folder / "Urlaub" / "über Kopf.mp4", 24, 3)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(stored(scene(0.5, 108, 192), 6)).save(folder / "IMG_0007.JPG", exif=exif, quality=92)
    whole = (folder / "IMG_0001.MOV").read_bytes()
    (folder / "kaputt.mp4").write_bytes(whole[: len(whole) // 3])
    (folder / "leer.mp4").touch()
    (folder / ".DS_Store").write_bytes(b"\x00\x00\x00\x01Bud1")
    quoted = (
        f'{name};"{text.replace(chr(34), chr(34) * 2)}"' if set(text) & set(';"') else f"{name};{text}" for name, text in CAPTIONS.items()
    )
    (folder / "captions.csv").write_bytes(("\ufeff" + "\r\n".join(["path;text", *quoted]) + "\r\n").encode())
    return folder


if __name__ == "__main__":
    make(Path(sys.argv[1]))
