"""Laws of the moving digits: captions say what is drawn, splits never mix, clips depend on nothing but their index."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from opensora.config import Bucket, DataConfig, DigitsSource
from opensora.data.digits import COMBINATIONS, DIRECTIONS, HELD_OUT, TRAINED, Canvas, DigitClips, Quality, canvas, caption, handwritten
from opensora.errors import ConfigError


def data(clips: int = 300, frames: int = 8, size: int = 16, quality: Quality = "plain", interval: int = 1) -> DataConfig:
    source = DigitsSource(kind="digits", clips=clips, quality=quality)
    return DataConfig(source=source, frames=frames, frame_interval=interval, height=size, width=size)


def timed() -> DataConfig:
    return data().model_copy(update={"fps": 8.0})


def ink_centroids(clips: torch.Tensor) -> NDArray[np.float64]:
    """(n, T, 2): row and column of the centre of everything brighter than the background."""
    grey = clips[..., 0].double().numpy()
    ink = np.where(grey > 40, grey, 0)
    place = np.stack(np.meshgrid(np.arange(grey.shape[2]), np.arange(grey.shape[3]), indexing="ij"), -1)
    return np.asarray(np.einsum("nthw,hwc->ntc", ink, place) / ink.sum((2, 3))[..., None])


@pytest.mark.parametrize("quality", ["plain", "high"])
@pytest.mark.parametrize(("frames", "size"), [(2, 16), (8, 16), (16, 16), (8, 24), (12, 32)])
def test_the_caption_names_the_motion_that_the_pixels_show(frames: int, size: int, quality: Quality) -> None:
    clips = DigitClips(data(256, frames, size, quality), seed=3)
    centroids = ink_centroids(clips.read(0, 256)[0])
    moved = centroids[:, -1] - centroids[:, 0]  # (n, 2)
    along = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}
    for text, shift in zip(clips.captions, moved, strict=True):
        axis, sign = along[text.split()[-1]]
        assert shift[axis] * sign > 0.18 * size  # half of the way that is free (a quarter of the frame), to a pixel
        assert abs(shift[1 - axis]) < 0.2 * size


def test_digits_never_leave_the_frame_nor_wrap() -> None:
    rng = np.random.default_rng(0)
    images = np.arange(40)
    drawing = Canvas(8, 16, 16, "high").animate(rng, images, np.arange(40) % 4, "train")
    total = drawing.astype(int).sum((2, 3))
    assert (total == total[:, :1]).all()


@given(st.integers(0, 999), st.integers(1, 300), st.integers(0, 5))
@settings(max_examples=20, deadline=None)
def test_a_clip_depends_on_seed_and_index_alone(start: int, count: int, seed: int) -> None:
    few, many = DigitClips(data(1000), seed=seed), DigitClips(data(5000), seed=seed)
    frames, indices = few.read(start, start + count)
    assert indices == list(range(start, min(start + count, 1000)))
    assert torch.equal(frames[-1:], many.read(indices[-1], indices[-1] + 1)[0])
    assert few.captions[indices[-1]] == many.captions[indices[-1]]


def test_seeds_and_indices_give_different_clips() -> None:
    first, second = (DigitClips(data(512), seed=seed).read(0, 512)[0] for seed in (0, 1))
    assert len({clip.numpy().tobytes() for clip in torch.cat((first, second))}) == 1024


def test_training_uses_no_handwriting_of_the_test_split() -> None:
    train, test = ({image.tobytes() for image in handwritten(split)[0]} for split in ("train", "test"))
    assert not train & test
    assert len(handwritten("train")[1]) == 1257
    for split in ("train", "test"):
        share = np.bincount(handwritten(split)[1]) / len(handwritten(split)[1])
        assert abs(share - 0.1).max() < 0.005
    clips = DigitClips(data(512, frames=2, quality="high"), seed=0).read(0, 512)[0][:, 0, :, :, 0].numpy()
    known = {(image * 255).round().astype(np.uint8).tobytes() for image in handwritten("train")[0]}
    for frame in clips:
        windows = np.lib.stride_tricks.sliding_window_view(frame, (8, 8)).reshape(-1, 8, 8)
        assert any(window.tobytes() in known for window in windows)


def test_training_never_shows_a_held_out_combination_and_shows_all_others() -> None:
    captions = set(DigitClips(data(5000), seed=0).captions)
    assert captions == {caption(*pair) for pair in TRAINED}
    assert len(TRAINED) == 36
    assert {direction for _, direction in HELD_OUT} == set(range(4))
    assert len({digit for digit, _ in HELD_OUT}) == 4


def test_captions_of_images_are_the_beginning_of_captions_of_clips() -> None:
    assert {caption(digit, None) for digit in range(10)} == set(DigitClips(data(2000, frames=1), seed=0).captions)
    assert caption(3, 0) == "a digit 3 moving left"
    assert all(caption(digit, way).startswith(caption(digit, None)) for digit, way in COMBINATIONS)


def test_an_image_is_a_clip_of_one_frame_and_is_captioned_with_its_digit() -> None:
    clips = DigitClips(data(64, frames=1, quality="high"), seed=0)
    digit_of = {(image * 255).round().astype(np.uint8).tobytes(): digit for image, digit in zip(*handwritten("train"), strict=True)}
    for frame, text in zip(clips.read(0, 64)[0][:, 0, :, :, 0].numpy(), clips.captions, strict=True):
        windows = np.lib.stride_tricks.sliding_window_view(frame, (8, 8)).reshape(-1, 8, 8)
        assert text in {caption(int(digit_of[w.tobytes()]), None) for w in windows if w.tobytes() in digit_of}


def test_plain_clips_have_a_background_and_high_ones_do_not() -> None:
    plain, high = (DigitClips(data(64, quality=quality), seed=0).read(0, 64)[0] for quality in ("plain", "high"))
    assert (plain > 0).float().mean() > 0.9
    assert (high > 0).float().mean() < 0.25


def test_clip_i_of_several_buckets_is_in_bucket_i_modulo_their_number() -> None:
    sizes = [(8, 16, 16), (1, 16, 24), (4, 32, 16)]
    buckets = tuple(Bucket(frames=frames, height=height, width=width, batch_size=1) for frames, height, width in sizes)
    clips = DigitClips(data(1000).model_copy(update={"buckets": buckets}), seed=1)
    assert clips.counts == (334, 333, 333)
    for bucket, size in enumerate(sizes):
        read, indices = clips.read(250, 400, bucket)
        assert indices == list(range(750 + bucket, 1000, 3))
        assert read.shape == (len(indices), *size, 3)
        moving = [clips.captions[index].count("moving") for index in indices]
        assert set(moving) == {int(size[0] > 1)}
    first = DigitClips(data(334), seed=1)
    assert torch.equal(clips.read(0, 334, 0)[0], first.read(0, 334)[0])  # the first bucket is what it would be alone
    assert list(clips.captions[::3]) == list(first.captions)
    assert list(clips.captions[2::3]) != list(first.captions[:333])  # and the others have handwriting and words of their own


@pytest.mark.parametrize("size", [(8, 32, 16), (8, 16, 32)])
def test_captions_name_the_motion_in_frames_that_are_not_square(size: tuple[int, int, int]) -> None:
    frames, height, width = size
    buckets = (Bucket(frames=frames, height=height, width=width, batch_size=1),)
    clips = DigitClips(data(256, quality="high").model_copy(update={"buckets": buckets}), seed=3)
    centroids = ink_centroids(clips.read(0, 256)[0])
    moved = centroids[:, -1] - centroids[:, 0]
    along = {"left": (1, -1), "right": (1, 1), "up": (0, -1), "down": (0, 1)}
    for text, shift in zip(clips.captions, moved, strict=True):
        axis, sign = along[text.split()[-1]]
        assert shift[axis] * sign > 0.18 * 16
        assert abs(shift[1 - axis]) < 0.2 * 16


def test_what_cannot_be_judged_is_refused_with_the_number() -> None:
    tall = data().model_copy(update={"height": 32})
    with pytest.raises(ConfigError, match="32x16: digits are judged in frames at least as wide"):
        canvas(tall)


@pytest.mark.parametrize(
    ("broken", "says"),
    [(data(size=15), "15x15"), (data(size=14), "14x14"), (data(interval=2), "frame_interval 2"), (timed(), "fps 8: digits")],
)
def test_what_cannot_be_drawn_is_refused_with_the_number(broken: DataConfig, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        canvas(broken)


def test_all_words_that_prompts_need_are_known_from_the_start() -> None:
    words = {word for text in DigitClips(data(8, frames=1), seed=0).words for word in text.split()}
    assert words == {"a", "digit", "moving", *DIRECTIONS, *map(str, range(10))}
