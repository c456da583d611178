"""Two recordings of one scene: SDR and upright, and as a phone keeps it, turned and in HDR (PQ or HLG, BT.2020, 10 bits, HEVC)."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import hand_made_videos as made
import numpy as np
from numpy.typing import NDArray

WHITE = 203.0
"""Nits of SDR white in HDR (ITU-R BT.2408)."""
KNEE = 94.0
"""Nits up to which the trainer's tone curve changes nothing."""
_TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])
_LUMINANCE = np.array([0.2627, 0.678, 0.0593])


def laid(picture: made.Picture, orientation: int) -> made.Picture:
    """How a player shows a stored picture with this orientation of EXIF."""
    turned = {
        1: picture, 2: picture[:, ::-1], 3: picture[::-1, ::-1], 4: picture[::-1], 5: picture.swapaxes(0, 1),
        6: np.rot90(picture, -1), 7: picture[::-1, ::-1].swapaxes(0, 1), 8: np.rot90(picture, 1),
    }[orientation]  # fmt: skip
    return np.ascontiguousarray(turned)


def stored(picture: made.Picture, orientation: int) -> made.Picture:
    """As the sensor of a phone that is held so sees it."""
    return np.ascontiguousarray({1: picture, 3: np.rot90(picture, 2), 6: np.rot90(picture, 1), 8: np.rot90(picture, -1)}[orientation])


def hdr(path: Path, frames: Sequence[made.Picture], transfer: str, rate: int = 24) -> None:
    """What an SDR screen shows of this film is `frames`: their light is put where the tone curve of ITU-R BT.2390 takes it back from."""
    number = {"pq": 16, "hlg": 18}[transfer]
    height, width = frames[0].shape[:2]
    with av.open(str(path), "w", format="mov") as out:
        stream: Any = out.add_stream(
            "libx265", rate=Fraction(rate), options={"crf": "4", "preset": "ultrafast", "x265-params": "log-level=none"}
        )
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p10le"
        _tag(stream.codec_context, number)
        for picture in frames:
            frame = av.VideoFrame(width, height, "yuv420p10le")
            nits = _before_the_tone_curve((picture / 255.0) ** 2.4 * WHITE) @ _TO_2020.T
            for plane, values in zip(frame.planes, _planes(_pq(nits) if transfer == "pq" else _hlg(nits)), strict=True):
                lines = np.zeros((plane.height, plane.line_size // 2), "<u2")
                lines[:, : values.shape[1]] = values
                plane.update(lines.tobytes())
            _tag(frame, number)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())


def _tag(thing: Any, transfer: int) -> None:
    thing.color_trc, thing.color_primaries, thing.colorspace, thing.color_range = transfer, 9, 9, 1


def _before_the_tone_curve(nits: NDArray[Any]) -> NDArray[Any]:
    """The light that the curve maps to this: it bends 94 … 1,000 nits to 94 … 203, by the brightest of the three primaries of BT.2020."""
    levels = np.linspace(0, 1000, 20_001)
    mapped = _tone_curve(levels)
    brightest = (nits @ _TO_2020.T).max(-1, keepdims=True).clip(1e-6)
    return nits * np.interp(brightest, mapped, levels) / brightest


def _tone_curve(nits: NDArray[Any]) -> NDArray[Any]:
    """The EETF of BT.2390 for screens of 1,000 and 203 nits and no black level."""
    peak, most = _pq(np.array(1000.0)), _pq(np.array(WHITE)) / _pq(np.array(1000.0))
    knee, code = 1.5 * most - 0.5, _pq(nits) / peak
    t = (code - knee) / (1 - knee)
    spline = (2 * t**3 - 3 * t**2 + 1) * knee + (t**3 - 2 * t**2 + t) * (1 - knee) + (3 * t**2 - 2 * t**3) * most
    return _from_pq(np.where(code < knee, code, spline) * peak)


def _pq(nits: NDArray[Any]) -> NDArray[Any]:
    """SMPTE ST 2084."""
    power = (nits.clip(0) / 10_000) ** 0.1593017578125
    coded: NDArray[Any] = ((0.8359375 + 18.8515625 * power) / (1 + 18.6875 * power)) ** 78.84375
    return coded


def _from_pq(codes: NDArray[Any]) -> NDArray[Any]:
    power = codes ** (1 / 78.84375)
    light: NDArray[Any] = 10_000 * ((power - 0.8359375).clip(0) / (18.8515625 - 18.6875 * power)) ** (1 / 0.1593017578125)
    return light


def _hlg(nits: NDArray[Any]) -> NDArray[Any]:
    """ITU-R BT.2100, for a screen of 1,000 nits."""
    display = nits / 1000
    scene = (display * (display @ _LUMINANCE)[..., None].clip(1e-6) ** (1 / 1.2 - 1)).clip(0, 1)
    a, b, c = 0.17883277, 0.28466892, 0.55991073
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log((12 * scene - b).clip(1e-6)) + c)


def _planes(codes: NDArray[Any]) -> list[NDArray[np.uint16]]:
    """Y, Cb, Cr of 10 bits."""
    luma = codes @ _LUMINANCE
    height, width = luma.shape
    chroma = [(codes[..., index] - luma) / divisor for index, divisor in ((2, 1.8814), (0, 1.4746))]
    halved = [part.reshape(height // 2, 2, width // 2, 2).mean((1, 3)) for part in chroma]
    return [np.round(876 * luma + 64).astype("<u2"), *(np.round(896 * part + 512).astype("<u2") for part in halved)]
