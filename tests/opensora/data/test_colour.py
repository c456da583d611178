"""Laws of HDR and wide gamuts on a screen for SDR: mid grey stays, lights bend below white, hues stay. FFmpeg's swscale is the witness."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import av
import hand_made_videos as made
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.data import colour
from opensora.data.video import decode_frames

NITS = [0, 1, 5, 21.6, 26, 50, 90, 150, 203, 400, 700, 1000, 4000]
SIGNALS = [0, 0.1, 0.2, 0.3, 0.38, 0.5, 0.6, 0.7, 0.75, 0.9, 1]
OF_PQ = [0, 28, 54, 100, 108, 142, 181, 224, 254, 255, 255, 255, 255]
OF_HLG = [0, 29, 57, 86, 109, 143, 177, 224, 254, 255, 255]
"""What swscale of FFmpeg 8.1 makes of the greys of `NITS` and `SIGNALS` (in ten seconds each): it cuts off above 203 nits."""


def pq(nits: Any) -> np.ndarray:
    """SMPTE ST 2084, by its own constants."""
    power = (np.asarray(nits, float) / 10_000) ** (2610 / 16384)
    return np.asarray(((3424 / 4096 + 2413 / 128 * power) / (1 + 2392 / 128 * power)) ** (2523 / 32))


def hdr(path: Path, codes: np.ndarray, transfer: int) -> Path:
    """A film in BT.2020 and 10 bits, 16 columns of each R'G'B' code (n, 3)."""
    red, green, blue = codes.T
    luma = 0.2627 * red + 0.678 * green + 0.0593 * blue
    parts = 876 * luma + 64, 896 * (blue - luma) / 1.8814 + 512, 896 * (red - luma) / 1.4746 + 512
    bands = [np.repeat(np.round(part), 16)[None].repeat(64, 0).astype("<u2") for part in parts]

    def tagged(thing: Any) -> None:
        thing.color_trc, thing.color_primaries, thing.colorspace, thing.color_range = transfer, 9, 9, 1

    with av.open(str(path), "w") as out:
        stream: Any = out.add_stream("libx264", rate=24, options={"crf": "0", "preset": "ultrafast"})
        stream.height, stream.width, stream.pix_fmt = 64, 16 * len(codes), "yuv444p10le"
        tagged(stream.codec_context)
        frame = av.VideoFrame(16 * len(codes), 64, "yuv444p10le")
        for plane, band in zip(frame.planes, bands, strict=True):
            lines = np.zeros((64, plane.line_size // 2), "<u2")
            lines[:, : band.shape[1]] = band
            plane.update(lines.tobytes())
        tagged(frame)
        for packet in [*stream.encode(frame), *stream.encode()]:
            out.mux(packet)
    return path


def shown(path: Path) -> np.ndarray:
    """(n, 3): the middle of each band."""
    return decode_frames(str(path), 1, 1)[0, 32, 8::16].astype(int)


def greys(codes: Any) -> np.ndarray:
    return np.stack([np.asarray(codes, float)] * 3, 1)


@pytest.mark.parametrize(
    ("transfer", "codes", "by_swscale"), [(colour.PQ, pq(NITS), OF_PQ), (colour.HLG, np.array(SIGNALS), OF_HLG)], ids=["pq", "hlg"]
)
def test_mid_greys_are_those_of_ffmpeg_and_lights_bend_below_white(
    tmp_path: Path, transfer: int, codes: np.ndarray, by_swscale: list[int]
) -> None:
    own, theirs = shown(hdr(tmp_path / "hdr.mp4", greys(codes), transfer))[:, 1], np.array(by_swscale)
    dark = theirs < 185  # 94 nits
    assert dark.sum() >= 6
    assert np.abs(own - theirs)[dark].max() <= 3
    assert (np.diff(own) >= 0).all()
    assert (np.diff(own[theirs < 255]) > 0).all()
    assert (own[~dark] <= theirs[~dark]).all()
    white = own[np.argmin(np.abs(codes - pq(203)))] if transfer == colour.PQ else own[SIGNALS.index(0.75)]
    assert 210 <= white <= 230  # paper is bright, and lamps are brighter
    assert own.max() == 255


def test_pq_by_its_definition(tmp_path: Path) -> None:
    path = hdr(tmp_path / "hdr.mp4", greys(pq(NITS)), colour.PQ)
    expected = [255 * (nits / 203) ** (1 / 2.4) for nits in NITS if nits < 94]
    assert np.abs(shown(path)[: len(expected), 1] - expected).max() <= 2


def test_hues_stay_and_the_gamut_becomes_bt709s(tmp_path: Path) -> None:
    """Pure colours of BT.709 at 40 nits, and at ten times that, coded in BT.2020."""
    to_2020 = np.linalg.inv(np.array(colour._TO_BT709[colour.BT2020]))
    for level in (40.0, 400.0):
        lights = level * np.eye(3) @ to_2020.T
        own = shown(hdr(tmp_path / f"{level}.mp4", pq(np.clip(lights, 0, None)), colour.PQ))
        assert (own.argmax(1) == [0, 1, 2]).all()
        others = own[~np.eye(3, dtype=bool)]
        assert others.max() <= 25
        assert own.max(1).min() >= 120


def test_darkness_and_full_light_are_black_and_white() -> None:
    for transfer in (colour.PQ, colour.HLG):
        ends = torch.tensor([0.0, 1.0]).expand(3, 1, 2)
        assert torch.allclose(colour.to_sdr(ends, transfer, colour.BT2020), ends, atol=2e-3)


def test_what_is_already_for_sdr_is_left_alone(tmp_path: Path) -> None:
    """BT.709 and untagged video never comes here; wide gamuts without HDR keep grey as it is."""
    assert not any(colour.is_wide(transfer, primaries) for transfer in (1, 2, 6, 13) for primaries in (1, 2, 5, 6))
    grey = torch.linspace(0, 1, 11).expand(3, 1, 11)
    for primaries in (colour.BT2020, colour.DISPLAY_P3):
        assert torch.allclose(colour.to_sdr(grey, 1, primaries), grey, atol=2e-3)
    Image.fromarray(made.quadrants()).save(tmp_path / "still.png")
    assert np.array_equal(decode_frames(str(tmp_path / "still.png"), 1, 1)[0], made.quadrants())
