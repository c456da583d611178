"""Packed rows: whoever takes one out gets what was put in."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.dataset.rows import Clip, ClipFile, Media, Provenance, Shot, Source
from opensora.prepare.compact import ClipRows, rows_of

words = st.text(max_size=8)
whole = st.integers(-(2**62), 2**62)
numbers = st.floats(allow_nan=False)
digits = st.text("0123456789abcdef", min_size=64, max_size=64)
provenances = st.builds(Provenance, words, words, words, words, words, st.lists(st.tuples(numbers, numbers, words), max_size=2).map(tuple))
sources = st.builds(Source, words, words, provenances)
pair = st.tuples(st.integers(1, 9), st.integers(1, 90000))
media = st.builds(
    Media, words, words, whole, whole, st.sampled_from([0, 90]), pair, words, whole, words, st.booleans(), st.booleans(), pair,
    whole, whole, whole, numbers, st.booleans(), words,
)  # fmt: skip
measures = st.dictionaries(words, numbers | st.integers(-9, 9), max_size=4)
shots = st.builds(Shot, whole, whole, pair, whole, whole, measures, words)
files = st.none() | st.builds(ClipFile, words, digits, whole, whole, whole, whole, numbers)
columns = st.dictionaries(words, numbers | words, max_size=3)
clips = st.builds(Clip, digits.map(lambda all_: all_[:20]), digits, sources, media, shots, files, st.none(), columns)


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(clips, max_size=5), draw=st.randoms())
def test_what_is_packed_is_unpacked_in_whatever_order_and_choice(rows: list[Clip], draw: object) -> None:
    packed = rows_of(rows)
    assert list(packed) == rows and packed[1:] == rows[1:] and len(packed) == len(rows)
    places = list(range(len(rows)))
    draw.shuffle(places)  # type: ignore[attr-defined]
    assert list(packed.chosen(places)) == [rows[place] for place in places]
    assert [packed.id(place) for place in places] == [rows[place].id for place in places]


def test_values_keep_their_kind() -> None:
    """A measure that is a whole number stays one: it is written differently."""
    shot = Shot(0, 1, (1, 2), 0, 1, {"a": 1, "b": 2.0}, "", "thumbnail")
    media_ = Media("mov", "h264", 1, 2, 0, (1, 1), "yuv420p", 8, "", False, False, (1, 2), 0, 1, 1, 25.0, True, "")
    clip = Clip("ab" * 10, "cd" * 32, Source("a", "b"), media_, shot)
    (found,) = rows_of([clip])
    assert found == replace(clip, shot=replace(shot, thumbnail="")), "only the thumbnail is left out"
    assert [type(value) for value in found.shot.measures.values()] == [int, float] and found.media.variable is True


def test_a_choice_takes_no_later_change_of_its_origin() -> None:
    shot = Shot(0, 1, (1, 2), 0, 1, {}, "")
    media_ = Media("mov", "h264", 1, 2, 0, (1, 1), "yuv420p", 8, "", False, False, (1, 2), 0, 1, 1, 25.0, True, "")
    rows = rows_of([Clip(f"{number:020x}", "cd" * 32, Source("a", "b"), media_, shot) for number in range(3)])
    some = rows.chosen([2, 0])
    rows.set_file(2, ClipFile("x", "ef" * 32, 1, 1, 1, 1, 1.0))
    rows.clear()
    assert len(rows) == 0 and [clip.id for clip in some] == [f"{2:020x}", f"{0:020x}"] and some[0].file is None
    assert isinstance(some, ClipRows)
