"""Laws of the choice of a bucket: long enough, shaped alike, and never larger than need be."""

from __future__ import annotations

import itertools
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from opensora.config import Bucket, DataConfig, DigitsSource
from opensora.data.buckets import SAME_RATIO, Size, choose, frames_needed, sizes

LAW = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
side = st.integers(16, 2048)
bucket = st.builds(Size, st.sampled_from((1, 2, 16, 64)), side, side)
buckets = st.lists(bucket, min_size=1, max_size=6, unique=True)
sources = st.builds(Size, st.integers(1, 400), side, side)
intervals = st.integers(1, 4)

SQUARE, WIDE, TALL = (16, 256, 256), (16, 192, 344), (16, 344, 192)
PUBLISHED = [Size(*size) for size in (SQUARE, WIDE, TALL, (16, 512, 512), (64, 256, 256), (1, 512, 512), (1, 384, 688))]


@pytest.mark.parametrize(
    ("source", "interval", "chosen"),
    [
        ((1, 600, 600), 1, (1, 512, 512)),  # a picture
        ((1, 720, 1280), 1, (1, 384, 688)),
        ((20, 720, 1280), 1, WIDE),
        ((20, 1280, 720), 1, TALL),
        ((20, 300, 300), 1, SQUARE),  # 512 would have to be enlarged
        ((20, 600, 600), 1, (16, 512, 512)),
        ((20, 100, 100), 1, SQUARE),  # all would have to be: the smallest
        ((63, 600, 600), 1, (16, 512, 512)),
        ((64, 600, 600), 1, (64, 256, 256)),  # as many frames as can be, before pixels
        ((64, 600, 600), 3, (16, 512, 512)),  # 64 frames at interval 3 need 190
        ((190, 600, 600), 3, (64, 256, 256)),
        ((190, 720, 1280), 3, WIDE),  # shaped alike, before frames
        ((15, 600, 600), 1, (1, 512, 512)),  # a film that is too short for all films
    ],
)
def test_a_clip_goes_where_it_fits_best(source: tuple[int, int, int], interval: int, chosen: tuple[int, int, int]) -> None:
    index = choose(Size(*source), PUBLISHED, interval)
    assert index is not None
    assert PUBLISHED[index] == chosen


def test_a_clip_too_short_for_all_goes_nowhere() -> None:
    films = [Size(*SQUARE), Size(8, 256, 256)]
    assert choose(Size(7, 256, 256), films, 1) is None
    assert choose(Size(8, 256, 256), films, 2) is None
    assert choose(Size(15, 256, 256), films, 2) == 1


def test_a_film_becomes_a_picture_only_where_no_film_can_be_made_of_it() -> None:
    both = [Size(1, 384, 688), Size(*SQUARE)]
    assert choose(Size(20, 720, 1280), both, 1) == 1
    assert choose(Size(10, 720, 1280), both, 1) == 0


def test_roundings_of_one_shape_count_as_one_shape() -> None:
    """16:9 in multiples of 16: 240x432 is nearer to 16:9 than 480x848, and must not take the large films for that."""
    wide = [Size(16, 240, 432), Size(16, 480, 848), Size(16, 256, 256)]
    assert choose(Size(16, 1080, 1920), wide, 1) == 1
    assert choose(Size(16, 360, 640), wide, 1) == 0


@LAW
@given(sources, buckets, intervals)
def test_the_rule_holds_for_any_sizes(source: Size, all_: list[Size], interval: int) -> None:
    index = choose(source, all_, interval)
    films = [each for each in all_ if frames_needed(each.frames, interval) <= source.frames]
    if index is None:
        assert not films
        return
    chosen = all_[index]
    assert chosen in films
    films = [each for each in films if each.frames > 1] or films

    def away(size: Size) -> float:
        return abs(math.log(size.width / size.height) - math.log(source.width / source.height))

    alike = [each for each in films if away(each) <= min(map(away, films)) + SAME_RATIO]
    assert chosen in alike
    longest = [each for each in alike if each.frames == chosen.frames]
    assert chosen.frames == max(each.frames for each in alike)
    fitting = [each for each in longest if each.height <= source.height and each.width <= source.width]
    areas = [each.height * each.width for each in fitting or longest]
    assert chosen.height * chosen.width == (max(areas) if fitting else min(areas))
    assert chosen in (fitting or longest)


@LAW
@given(sources, st.lists(bucket, min_size=2, max_size=4, unique=True), intervals)
def test_the_order_of_the_buckets_decides_between_equals_alone(source: Size, all_: list[Size], interval: int) -> None:
    found = set()
    for order in itertools.permutations(all_):
        index = choose(source, order, interval)
        found.add(None if index is None else (order[index].frames, order[index].height * order[index].width))
    assert len(found) == 1


def test_without_buckets_there_is_the_stages_own_size() -> None:
    data = DataConfig(source=DigitsSource(kind="digits", clips=1), frames=4, height=16, width=24)
    assert sizes(data) == ((4, 16, 24),)
    two = tuple(Bucket(frames=frames, height=32, width=16, batch_size=3) for frames in (1, 2))
    assert sizes(data.model_copy(update={"buckets": two})) == ((1, 32, 16), (2, 32, 16))
