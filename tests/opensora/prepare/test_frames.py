"""Laws of single frames: those at the shares asked for, in their order, no larger than asked."""

from __future__ import annotations

import io
from pathlib import Path

import hand_made_videos as made
import numpy as np
import pytest
from PIL import Image

from opensora.dataset.rows import Quarantine
from opensora.prepare.frames import frames_of


def film(folder: Path, frames: int = 21, height: int = 64, width: int = 96) -> Path:
    """Frame n is of grey 10·n."""
    return made.write(folder / "clip.mp4", [np.full((height, width, 3), 10 * number, np.uint8) for number in range(frames)])


def levels(jpegs: list[bytes]) -> list[int]:
    return [round(float(np.asarray(Image.open(io.BytesIO(each))).mean()) / 10) for each in jpegs]


def test_frames_are_those_at_their_shares_in_the_order_asked(tmp_path: Path) -> None:
    clip = film(tmp_path)
    assert levels(frames_of(clip, (0.2, 0.5, 0.8), 448)) == [4, 10, 16]
    assert levels(frames_of(clip, (1, 0, 0.5, 0.5), 448)) == [20, 0, 10, 10]
    assert frames_of(clip, (), 448) == []


@pytest.mark.parametrize(("side", "size"), [(48, (48, 32)), (448, (96, 64))])
def test_the_longer_side_is_at_most_what_was_asked(tmp_path: Path, side: int, size: tuple[int, int]) -> None:
    (jpeg,) = frames_of(film(tmp_path, 3), (0.5,), side)
    picture = Image.open(io.BytesIO(jpeg))
    assert (picture.format, picture.size) == ("JPEG", size)


def test_a_share_outside_the_clip_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"1\.5"):
        frames_of(film(tmp_path, 3), (0.5, 1.5), 64)


def test_a_file_that_breaks_off_says_which_frame_is_missing(tmp_path: Path) -> None:
    clip = made.write(
        tmp_path / "clip.mp4", [made.quadrants()] * 40, container_options={"movflags": "+faststart"}, options={"crf": "1", "g": "1"}
    )
    clip.write_bytes(clip.read_bytes()[: clip.stat().st_size // 2])
    with pytest.raises(Quarantine, match="breaks off"):
        frames_of(clip, (0.1, 1), 64)
