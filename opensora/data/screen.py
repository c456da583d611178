"""From a decoded frame to the picture on the screen, fitted to a size: turned, mirrored, stretched, cropped, resized, in SDR colours.

Owns how a frame is laid on the screen, and its pixels there. Refuses to open files (`video`) and to know HDR's curves (`colour`). Functions
import torch where they need it: the guards of a preparation use this module for frames that are neither resized nor HDR, and torch takes
200 MB and seconds of each fork server.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from opensora.data import colour

if TYPE_CHECKING:
    from torch import Tensor

BACKGROUND = 255
"""Transparent pixels are laid on white, like the web pages that such pictures are made for. The colour stored under them is not meant to be
seen."""
MOST_PIXELS = 1 << 26
"""The most pixels of a frame: 67,108,864, twice those of 8K video. A larger frame would take gigabytes, and a file of one kilobyte can
declare one."""
HD = (576, 1279)
"""Rows and columns above which untagged video counts as BT.709."""

BT709, BT2020 = "ITU709", "BT2020"
"""Matrices from Y, Cb, Cr, as FFmpeg names them."""
_ORIENTATION = 0x0112


class Unusable(Exception):
    """Why one file gives no clip."""


class Turn(NamedTuple):
    """How stored frames are turned for the screen: transposed first, then rows or columns reversed."""

    transposed: bool = False
    rows_flipped: bool = False
    columns_flipped: bool = False


ORIENTATIONS = {
    1: Turn(), 2: Turn(columns_flipped=True), 3: Turn(False, True, True), 4: Turn(rows_flipped=True),
    5: Turn(transposed=True), 6: Turn(True, False, True), 7: Turn(True, True, True), 8: Turn(True, True, False),
}  # fmt: skip
"""The turn of each EXIF orientation."""


@dataclass(frozen=True)
class Screen:
    """How a file's frames are laid on the screen."""

    turn: Turn
    pixel_aspect: Fraction = Fraction(1)
    """Width of a stored pixel over its height."""

    def shown(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns on the screen of a frame that is stored with `height` rows and `width` columns."""
        width = max(1, round(width * self.pixel_aspect))
        return (width, height) if self.turn.transposed else (height, width)


def fit_frames(frames: NDArray[np.uint8], height: int, width: int) -> Tensor:
    """uint8 (T, h, w, 3) → (T, height, width, 3): the largest centred part with this aspect ratio, resized. It is never stretched."""
    import torch

    cropped = _cropped(frames, height, width, Fraction(1))
    planes = torch.from_numpy(np.ascontiguousarray(cropped)).permute(0, 3, 1, 2)
    if planes.shape[-2:] == (height, width):
        return planes.permute(0, 2, 3, 1).contiguous()
    resized = torch.stack([_resized(each, height, width) for each in planes])
    return resized.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def too_large(height: int, width: int) -> Unusable:
    return Unusable(f"{height}x{width} has {height * width:,} pixels a frame, at most {MOST_PIXELS:,} are read. Make it smaller")


def screen_of(file: Any, stream: Any, frame: Any, *, is_picture: bool) -> Screen:
    """How the frames of a file are laid on the screen, from its first frame."""
    if is_picture:
        return Screen(_exif_turn(file, frame))
    aspect = stream.sample_aspect_ratio
    return Screen(_matrix_turn(frame), Fraction(aspect) if aspect and aspect > 0 else Fraction(1))


def _matrix_turn(frame: Any) -> Turn:
    """The turn nearest to the display matrix, of the eight that keep a rectangle upright or on its side."""
    try:
        matrix = frame.side_data.get("DISPLAYMATRIX")
    except ValueError:  # PyAV does not know all kinds of side data, and then shows none; but it has the rotation in another place
        quarters = round(frame.rotation / 90) % 4
        return (Turn(), Turn(True, True, False), Turn(False, True, True), Turn(True, False, True))[quarters]
    if matrix is None:
        return Turn()
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(matrix), np.int32)[:5])  # x' = a·x + c·y, y' = b·x + d·y
    if abs(a) + abs(d) >= abs(b) + abs(c):
        return Turn(False, d < 0, a < 0)
    return Turn(True, b < 0, c < 0)


def _exif_turn(file: Any, frame: Any) -> Turn:
    """A picture's orientation, read by Pillow, because PyAV does not show EXIF."""
    place = file.tell() if hasattr(file, "tell") else None
    try:
        if place is not None:
            file.seek(0)
        with Image.open(file) as picture:
            return ORIENTATIONS.get(picture.getexif().get(_ORIENTATION, 1), Turn())
    except Exception:  # noqa: BLE001 - Pillow does not read every picture, and raises many kinds of errors
        return _matrix_turn(frame)
    finally:
        if place is not None:
            file.seek(place)  # FFmpeg continues from there


def fitted(frame: Any, screen: Screen, height: int, width: int) -> NDArray[np.uint8]:
    """The frame as uint8 (height, width, 3). It is cropped before it is resized: to cover a square, a strip of 1500x1 pixels would first
    become 1500 times larger."""
    if frame.height * frame.width > MOST_PIXELS:
        raise too_large(frame.height, frame.width)
    wide = colour.is_wide(frame.color_trc, frame.color_primaries)
    stored, aspect = _rgb(frame, wide), screen.pixel_aspect
    if frame.interlaced_frame:
        stored, aspect = stored[::2], aspect / 2
    rows, columns = (width, height) if screen.turn.transposed else (height, width)
    pixels = np.ascontiguousarray(_cropped(stored[None], rows, columns, aspect)[0])
    if wide or pixels.shape != (rows, columns, 3):
        import torch

        planes = torch.from_numpy(pixels.astype(np.int32) if pixels.dtype == np.uint16 else pixels).permute(2, 0, 1)
        sdr = (lambda codes: colour.to_sdr(codes, frame.color_trc, frame.color_primaries)) if wide else None
        largest = 65535 if wide else 255
        pixels = _laid_on_background(planes, largest, rows, columns, sdr).permute(1, 2, 0).numpy()
    if screen.turn.transposed:
        pixels = pixels.swapaxes(0, 1)
    pixels = pixels[:: -1 if screen.turn.rows_flipped else 1, :: -1 if screen.turn.columns_flipped else 1]
    return np.ascontiguousarray(pixels)


def _rgb(frame: Any, deep: bool) -> NDArray[Any]:
    """The frame as (h, w, 3 or 4), of 16 bits if `deep`, otherwise 8."""
    alpha = frame.format.name == "pal8" or any(each.is_alpha for each in frame.format.components)
    matrix = untagged_matrix(frame)
    name = ("rgba64le" if alpha else "rgb48le") if deep else ("rgba" if alpha else "rgb24")
    return np.asarray(frame.reformat(format=name, src_colorspace=matrix).to_ndarray())


def untagged_matrix(frame: Any) -> str | None:
    """FFmpeg's name of the colour matrix to assume for an untagged frame. None means the frame's own tag, or FFmpeg's default."""
    if frame.colorspace != colour.UNSPECIFIED or frame.format.is_rgb:
        return None
    if frame.color_trc in (colour.PQ, colour.HLG):
        return BT2020
    return BT709 if frame.height > HD[0] or frame.width > HD[1] else None


def _laid_on_background(planes: Tensor, largest: int, height: int, width: int, sdr: Callable[[Tensor], Tensor] | None) -> Tensor:
    """(3 or 4, h, w) in 0 … largest → uint8 (3, height, width): resized, in SDR colours, with transparent pixels on the background."""
    import torch

    alpha = planes[3:].float() / largest if len(planes) == 4 else None
    resized = _resized(planes[:3], height, width, alpha) / largest
    if alpha is None:
        seen = sdr(resized) if sdr else resized
    else:
        cover = torch.nn.functional.interpolate(alpha[None], size=(height, width), mode="bilinear", antialias=True)[0].clamp(0, 1)
        own = resized / cover.clamp(min=1e-6)
        seen = (sdr(own) if sdr else own) * cover + BACKGROUND / 255 * (1 - cover)
    return (seen * 255).round().clamp(0, 255).to(torch.uint8)


def _cropped(frames: NDArray[Any], height: int, width: int, pixel_aspect: Fraction) -> NDArray[Any]:
    """(T, h, w, C) → the largest centred part that has the aspect ratio of height x width on the screen."""
    rows, columns = frames.shape[1:3]
    scale = max(Fraction(height, rows), width / (columns * pixel_aspect))
    kept_rows = min(rows, max(1, round(height / scale)))
    kept_columns = min(columns, max(1, round(width / scale / pixel_aspect)))
    top, left = (rows - kept_rows) // 2, (columns - kept_columns) // 2
    return frames[:, top : top + kept_rows, left : left + kept_columns]


def _resized(planes: Tensor, height: int, width: int, weight: Tensor | None = None) -> Tensor:
    """(C, h, w) → float (C, height, width); pixels are multiplied by `weight` first. One plane at a time, since floats take four times the
    memory of bytes."""
    import torch

    out = []
    for plane in planes:
        values = plane.float() if weight is None else plane.float() * weight[0]
        out.append(torch.nn.functional.interpolate(values[None, None], size=(height, width), mode="bilinear", antialias=True)[0, 0])
    return torch.stack(out)
