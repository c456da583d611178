"""What a server is shown of a real clip's file."""

from __future__ import annotations

import base64
import io
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import clip_rows
import numpy as np
import pytest
from caption_server import MODEL, Stub, serving
from PIL import Image

from opensora.dataset.prepare_config import CaptionServer
from opensora.dataset.rows import Captioned, Clip, Leaves, Quarantine
from opensora.prepare.captions import caption_all
from opensora.prepare.captions.shown import MOST_VIDEO, shares, shown
from opensora.prepare.frames import frames_of


def grey_clip(folder: Path, frames: int = 101) -> Clip:
    """Frame n is grey of level n."""
    with av.open(str(folder / "a.mp4"), "w") as out:
        stream = out.add_stream("libx264", rate=25)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 48, "yuv420p", {"crf": "1"}
        for number in range(frames):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((48, 64, 3), number, np.uint8), format="rgb24")))
        out.mux(stream.encode())
    return clip_rows.clip("a", file=clip_rows.clip_file(folder, "a.mp4", frames=frames, width=64, height=48))


def settings(url: str = "http://h/v1", **changes: Any) -> CaptionServer:
    return CaptionServer.model_validate({"kind": "server", "url": url, "model": MODEL, "side": 32} | changes)


@pytest.mark.parametrize(("frames", "where"), [(1, (0.5,)), (2, (0.25, 0.75)), (3, (0.2, 0.5, 0.8)), (4, (0.125, 0.375, 0.625, 0.875))])
def test_frames_lie_evenly_over_the_clip(frames: int, where: tuple[float, ...]) -> None:
    assert shares(frames) == where


def test_a_server_sees_the_frames_at_their_places_in_the_size_that_was_set(tmp_path: Path) -> None:
    clip, said = grey_clip(tmp_path), dict[str, Captioned | Leaves]()
    with serving(Stub()) as stub:
        caption_all([clip], tmp_path, settings(stub.url), on_done=said.__setitem__, halt=lambda: False, frames_of=frames_of)
    assert isinstance(said["a"], Captioned)
    parts = stub.requests[0]["messages"][0]["content"][:-1]
    pictures = [Image.open(io.BytesIO(base64.b64decode(part["image_url"]["url"].partition(",")[2]))) for part in parts]
    assert [picture.size for picture in pictures] == [(32, 24)] * 3
    levels = [np.asarray(picture).mean() for picture in pictures]
    assert levels == pytest.approx([20, 50, 80], abs=2)


@pytest.mark.parametrize(("profile", "software"), [("video_url", "vllm"), ("video_url", "sglang"), ("input_video", "llamacpp")])
def test_a_video_is_the_clip_s_own_file(tmp_path: Path, profile: str, software: str) -> None:
    clip, said = grey_clip(tmp_path), dict[str, Captioned | Leaves]()
    with serving(Stub(software=software, profile=profile)) as stub:
        one = settings(stub.url, profile=profile)
        caption_all([clip], tmp_path, one, on_done=said.__setitem__, halt=lambda: False, frames_of=frames_of)
    assert isinstance(said["a"], Captioned)
    part = stub.requests[0]["messages"][0]["content"][0][profile]
    assert (
        base64.b64decode(part[{"video_url": "url", "input_video": "data"}[profile]].partition(",")[2] or part["data"])
        == (tmp_path / "a.mp4").read_bytes()
    )


def test_pixels_count_as_they_are_sent(tmp_path: Path) -> None:
    clip = grey_clip(tmp_path)
    assert shown(clip, tmp_path, settings(), frames_of).pixels == 3 * 32 * 24
    assert shown(clip, tmp_path, settings(side=4000), frames_of).pixels == 3 * 64 * 48, "nothing is enlarged"


def test_a_video_too_large_for_a_request_is_put_aside_with_what_to_do(tmp_path: Path) -> None:
    clip = grey_clip(tmp_path)
    assert clip.file is not None
    large = replace(clip, file=replace(clip.file, size=MOST_VIDEO + 1))
    with pytest.raises(Quarantine, match=r"32 MiB, at most 32; set clips\.short_side"):
        shown(large, tmp_path, settings(profile="video_url"), frames_of)
    assert shown(large, tmp_path, settings(), frames_of).jpegs
