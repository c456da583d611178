"""Laws of the oracle: real clips near their ceilings, and nothing for what is still, empty or noise."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from opensora.data.digits import COMBINATIONS, Canvas, Drawing, Quality
from opensora.encoders.protocol import PatchAutoencoder, decode_clips, encode_clips
from opensora.evaluation.digit_classifier import NOTHING, classify, wilson

ASKED = np.array(COMBINATIONS * 5)


def drawn(frames: int = 8, size: int = 16, quality: Quality = "plain") -> tuple[Drawing, torch.Tensor]:
    """200 clips of handwriting that the judge was not trained on, five of each combination."""
    drawing = Canvas(frames, size, size, quality).draw(np.random.default_rng(1), ASKED[:, 0], ASKED[:, 1], "test")
    return drawing, torch.from_numpy(drawing.clips)[..., None].expand(*drawing.clips.shape, 3)


@pytest.fixture(scope="module")
def autoencoder() -> PatchAutoencoder:
    clips = Canvas(1, 16, 16, "plain").draw(np.random.default_rng(2), ASKED[:, 0], ASKED[:, 1], "train").clips[:, 0]
    return PatchAutoencoder.fit([torch.from_numpy(clips)[:, None].expand(-1, 3, -1, -1)], 4, 8)


@pytest.mark.parametrize("quality", ["plain", "high"])
@pytest.mark.parametrize(("frames", "size"), [(8, 16), (16, 16), (8, 24), (12, 32)])
def test_real_clips_are_read_rightly(frames: int, size: int, quality: Quality) -> None:
    drawing, clips = drawn(frames, size, quality)
    answer = classify(clips)
    assert (answer.digits == drawing.digits).mean() >= 0.95  # 0.98 to 1.0 measured
    assert (answer.directions == drawing.directions).all()


def test_the_round_trip_through_eight_channels_keeps_both(autoencoder: PatchAutoencoder) -> None:
    drawing, clips = drawn()
    answer = classify(decode_clips(autoencoder, encode_clips(autoencoder, clips)))
    assert (answer.digits == drawing.digits).mean() >= 0.92
    assert (answer.directions == drawing.directions).all()


def test_a_still_clip_shows_its_digit_and_scores_chance_on_direction() -> None:
    drawing, clips = drawn()
    answer = classify(clips[:, :1].expand_as(clips))
    assert (answer.digits == drawing.digits).mean() >= 0.95
    assert (answer.directions == drawing.directions).mean() == 0.25  # a forced choice, and prompts are balanced


def test_frames_in_another_order_show_another_direction() -> None:
    drawing, clips = drawn(quality="high")
    assert (classify(clips.flip(1)).directions == drawing.directions ^ 1).all()  # left and right, up and down are neighbours
    mirrored = classify(clips.flip(3)).directions
    assert (mirrored == np.where(drawing.directions < 2, drawing.directions ^ 1, drawing.directions)).all()


def test_noise_shows_nothing(autoencoder: PatchAutoencoder) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (200, 8, 16, 16, 3), generator=generator, dtype=torch.uint8)
    decoded = decode_clips(autoencoder, torch.randn(200, 8, 8, 4, 4, generator=generator))
    for clips in (pixels, decoded, decoded // 2, torch.zeros_like(pixels), torch.full_like(pixels, 255), torch.full_like(pixels, 20)):
        answer = classify(clips)
        assert (answer.digits == NOTHING).mean() >= 0.99
        assert (answer.directions == NOTHING).mean() >= 0.99


def test_a_digit_seen_in_fewer_than_half_of_the_frames_is_not_seen() -> None:
    _, clips = drawn(8, quality="high")
    gone = clips.clone()
    gone[:, 3:] = 0
    assert (classify(gone).digits == NOTHING).all()
    gone[:, 3:4] = clips[:, 3:4]
    assert (classify(gone).digits != NOTHING).all()


def test_the_votes_of_the_frames_decide() -> None:
    _, clips = drawn(8, quality="high")
    three, eight = clips[ASKED[:, 0] == 3][0], clips[ASKED[:, 0] == 8][0]
    assert classify(torch.cat((three[:5], eight[:3]))[None]).digits == 3
    assert classify(torch.cat((three[:3], eight[:5]))[None]).digits == 8


def test_an_image_has_a_digit_and_no_direction() -> None:
    drawing, clips = drawn(1)
    answer = classify(clips)
    assert (answer.digits == drawing.digits).mean() >= 0.95
    assert (answer.directions == NOTHING).all()


@given(st.integers(1, 2000), st.data())
def test_the_interval_holds_the_share_and_narrows_with_more_clips(count: int, data: st.DataObject) -> None:
    right = data.draw(st.integers(0, count))
    low, high = wilson(right, count)
    assert 0 <= low <= right / count + 1e-12
    assert right / count - 1e-12 <= high <= 1
    assert math.isclose(1 - high, wilson(count - right, count)[0], abs_tol=1e-12)
    tight = wilson(right * 4, count * 4)
    assert tight[1] - tight[0] < high - low


def test_the_interval_is_the_published_one() -> None:
    # 15 of 148: Newcombe 1998, Statistics in Medicine 17, table I, method 3 (without continuity correction)
    low, high = wilson(15, 148)
    assert (round(low, 4), round(high, 4)) == (0.0624, 0.1605)
    assert wilson(0, 0) == (0.0, 1.0)
