"""Laws of the files that people open: a player reads the clip back, the sheet has every prompt beside its frames."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest
import torch
from PIL import Image

from opensora.config import DataConfig, DigitsSource
from opensora.data.digits import DigitClips
from opensora.evaluation.video_files import LABEL_WIDTH, MARGIN, write_gif, write_mp4, write_sheet


def clips(count: int, frames: int = 8, size: int = 16) -> torch.Tensor:
    data = DataConfig(source=DigitsSource(kind="digits", clips=count), frames=frames, height=size, width=size)
    return DigitClips(data, seed=0).read(0, count)[0]


@pytest.mark.parametrize(("frames", "height", "width"), [(8, 16, 16), (16, 24, 24), (1, 16, 16), (3, 15, 21), (2, 256, 256)])
def test_an_mp4_plays_back_as_the_clip_scaled_up(tmp_path: Path, frames: int, height: int, width: int) -> None:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randint(0, 2, (frames, 3, 3), generator=generator) * 255
    clip = torch.nn.functional.interpolate(coarse[None].float(), size=(height, width))[0].to(torch.uint8)[..., None].expand(-1, -1, -1, 3)
    write_mp4(tmp_path / "clip.mp4", clip, fps=8)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream = container.streams.video[0]
        shown = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        assert (stream.codec_context.name, float(stream.average_rate or 0), stream.codec_context.pix_fmt) == ("h264", 8.0, "yuv420p")
    factor = -(-128 // min(height, width))
    assert len(shown) == frames
    assert min(shown.shape[1:3]) >= min(128, height * factor - 1)
    assert all(side % 2 == 0 for side in shown.shape[1:3])
    wanted = clip.numpy().repeat(factor, 1).repeat(factor, 2)[:, : shown.shape[1], : shown.shape[2]]
    assert np.abs(shown.astype(int) - wanted).mean() < 8


def test_the_sheet_shows_each_clip_in_its_row_with_a_label(tmp_path: Path) -> None:
    shown = clips(5)
    write_sheet(tmp_path / "sheet.png", shown, [f"a digit {index} moving left" for index in range(5)])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    assert sheet.shape == (5 * (64 + MARGIN) + MARGIN, LABEL_WIDTH + 8 * (64 + MARGIN) + MARGIN, 3)
    for row in range(5):
        top = MARGIN + row * (64 + MARGIN)
        for column in range(8):
            left = LABEL_WIDTH + column * (64 + MARGIN)
            cell = sheet[top : top + 64, left : left + 64]
            assert np.array_equal(cell, shown[row, column].numpy().repeat(4, 0).repeat(4, 1))
        label = sheet[top : top + 64, :LABEL_WIDTH]
        assert 100 < (label < 128).all(-1).sum() < 3000  # there is text, and not a black box


def test_a_long_clip_shows_its_first_and_last_frame_and_a_long_caption_stays_beside_it(tmp_path: Path) -> None:
    shown = clips(1, frames=16, size=24)
    write_sheet(tmp_path / "sheet.png", shown, ["a very long caption " * 20])
    sheet = np.asarray(Image.open(tmp_path / "sheet.png"))
    height = 24 * 3
    assert sheet.shape == (height + 2 * MARGIN, LABEL_WIDTH + 8 * (height + MARGIN) + MARGIN, 3)
    for column, frame in ((0, 0), (7, 15)):
        left = LABEL_WIDTH + column * (height + MARGIN)
        assert np.array_equal(sheet[MARGIN : MARGIN + height, left : left + height], shown[0, frame].numpy().repeat(3, 0).repeat(3, 1))


def test_every_caption_needs_its_clip(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="argument"):
        write_sheet(tmp_path / "sheet.png", clips(3), ["only one"])


def test_colours_of_an_mp4_are_those_of_the_clip_and_it_says_how_it_stores_them(tmp_path: Path) -> None:
    colours = torch.tensor([[255, 0, 0], [0, 255, 0], [0, 0, 255], [255, 255, 255], [0, 0, 0], [200, 120, 40]], dtype=torch.uint8)
    clip = colours[:, None, None].expand(-1, 720, 16, -1).contiguous()  # so high that players take an untagged file for BT.709
    write_mp4(tmp_path / "clip.mp4", clip)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        told = container.streams.video[0].codec_context
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
        assert (int(told.colorspace), int(told.color_primaries), int(told.color_trc), int(told.color_range)) == (1, 1, 1, 1)
    assert np.abs(np.stack([frame[300, 60].astype(int) for frame in frames]) - colours.numpy()).max() <= 4


def test_a_gif_lasts_as_long_as_the_clip_and_says_what_it_is(tmp_path: Path) -> None:
    write_gif(tmp_path / "clip.gif", clips(1)[0], fps=8, said={"title": "a digit", "comment": "{}"})
    with Image.open(tmp_path / "clip.gif") as shown:
        assert (shown.n_frames, shown.info["duration"], shown.info["loop"], shown.info["comment"]) == (8, 120, 0, b"a digit\n{}")
