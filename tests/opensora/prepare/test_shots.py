"""Laws of lengths: clips lie in their scene, follow each other, and are neither too long nor too short."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from opensora.dataset.prepare_config import Cut
from opensora.prepare.shots import pieces, within

BASE = Fraction(1, 1000)
lasting = st.lists(st.integers(1, 400), min_size=1, max_size=80)


def times(lasts: list[int]) -> tuple[list[int], int]:
    pts = [5000]
    for each in lasts:
        pts.append(pts[-1] + each)
    return pts[:-1], pts[-1]


@given(lasting, st.floats(0.05, 3))
def test_pieces_hold_each_frame_once_and_none_is_too_long(lasts: list[int], longest: float) -> None:
    pts, end = times(lasts)
    cut = Cut(min_s=0, max_s=longest)
    made, too_short = pieces(pts, end, cut, BASE, cut_before=False, cut_after=False)
    assert too_short == 0
    assert [number for piece in made for number in range(piece.first, piece.first + piece.frames)] == list(range(len(pts)))
    for piece in made:
        assert piece.start_pts == pts[piece.first]
        assert piece.end_pts == [*pts, end][piece.first + piece.frames]
        assert piece.end_pts - piece.start_pts <= longest * 1000 or piece.frames == 1


def test_a_long_shot_is_split_evenly() -> None:
    pts, end = times([40] * 625)  # 25 s at 25 frames a second
    made, _ = pieces(pts, end, Cut(max_s=10), BASE, cut_before=False, cut_after=False)
    assert [piece.frames for piece in made] == [208, 209, 208]


def test_a_shot_of_the_longest_length_stays_whole() -> None:
    pts, end = times([40] * 250)
    made, _ = pieces(pts, end, Cut(max_s=10), BASE, cut_before=False, cut_after=False)
    assert [piece.frames for piece in made] == [250]


@given(lasting, st.floats(0, 2))
def test_what_is_shorter_than_the_least_is_left_out_and_counted(lasts: list[int], least: float) -> None:
    pts, end = times(lasts)
    cut = Cut(min_s=least, max_s=2)
    made, too_short = pieces(pts, end, cut, BASE, cut_before=False, cut_after=False)
    every, _ = pieces(pts, end, Cut(min_s=0, max_s=2), BASE, cut_before=False, cut_after=False)
    assert made == [piece for piece in every if piece.end_pts - piece.start_pts >= least * 1000]
    assert too_short == len(every) - len(made)


def test_frames_are_trimmed_where_a_cut_is_and_nowhere_else() -> None:
    pts, end = times([40] * 50)
    for before, after, first, count in ((False, False, 0, 50), (True, False, 3, 47), (False, True, 0, 47), (True, True, 3, 44)):
        (piece,), _ = pieces(pts, end, Cut(trim_frames=3), BASE, cut_before=before, cut_after=after)
        assert (piece.first, piece.frames, piece.start_pts) == (first, count, pts[first])
        assert piece.end_pts == (pts[first + count] if after else end)


def test_a_scene_that_is_all_trimmed_is_too_short() -> None:
    pts, end = times([40] * 6)
    assert pieces(pts, end, Cut(trim_frames=3), BASE, cut_before=True, cut_after=True) == ([], 1)


def test_a_published_segment_has_the_frames_that_begin_in_it() -> None:
    pts, _ = times([40] * 50)
    assert within(pts, 0, 0.4, BASE) == (0, 10)
    assert within(pts, 0.4, 0.8, BASE) == (10, 20)
    assert within(pts, 0.41, 0.79, BASE) == (11, 20)
    assert within(pts, 5, 9, BASE) == (50, 50)


@given(lasting, st.lists(st.floats(0, 10), min_size=2, max_size=5))
def test_segments_that_follow_each_other_share_no_frame(lasts: list[int], bounds: list[float]) -> None:
    pts, _ = times(lasts)
    parts = [within(pts, start, end, BASE) for start, end in pairwise(sorted(bounds))]
    assert all(before[1] == after[0] for before, after in pairwise(parts))
