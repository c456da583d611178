"""Nothing of a data set is left out, or cut, without a word: counts, their grouping, and the limit."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from opensora.dataset.usage import LEFT_OUT, MOST_NAMES, MOST_REASONS, Usage, bounded, grouped

NAMES = st.text(st.characters(), min_size=1, max_size=10)
REASONS = st.sampled_from(["No such file", "3 frames, 4 are needed", "2 frames, 4 are needed", "the file is empty"]) | st.text(
    st.characters()
)


def test_reasons_that_differ_in_numbers_alone_are_one_and_are_told_with_counts_and_names() -> None:
    left_out = {f"short{i}.mp4": f"{i} frames, 9 are needed" for i in range(8)} | {
        f"gone{i}.mp4": "No such file or directory" for i in range(10)
    }
    usage = Usage(20, 2, grouped(left_out, 18), cut=1, tokens=8)
    assert usage.sentences() == [
        "18 of 20 clips are left out: 10 (gone0.mp4, gone1.mp4, gone2.mp4, …): No such file or directory; "
        "8 (short0.mp4, short1.mp4, short2.mp4, …): 0 frames, 9 are needed",
        "captions are cut at 8 words: 1 of 2; the model sees nothing of the rest",
    ]


def test_where_everything_is_used_nothing_is_said() -> None:
    assert Usage(20, 20).sentences() == [] == Usage(20, 20, cut=None).sentences()


@given(st.dictionaries(NAMES, REASONS, max_size=40), st.integers(0, 5), st.integers(1, 50))
def test_every_clip_that_is_left_out_is_counted_once_whatever_it_is_called(left_out: dict[str, str], twice: int, used: int) -> None:
    count = len(left_out) + twice
    reasons = grouped(left_out, count)
    assert sum(each.clips for each in reasons) == count
    assert len(reasons) <= MOST_REASONS + 2
    assert all(len(each.first) <= MOST_NAMES and each.clips >= len(each.first) for each in reasons)
    for sentence in Usage(used + count, used, reasons).sentences():
        assert len(sentence.splitlines()) == 1 and len(sentence) < 8_000
        sentence.encode()


def test_a_stage_refuses_beyond_its_limit_and_names_both_numbers() -> None:
    usage = Usage(20, 9, grouped({f"{i}.mp4": "No such file" for i in range(11)}, 11))
    why = usage.refusal(0.5)
    assert why is not None and "11 of 20" in why and "0.5" in why and LEFT_OUT in why and "No such file" in why
    assert usage.refusal(0.55) is None and usage.refusal(1.0) is None
    assert Usage(20, 10).refusal(0.5) is None


def test_remarks_are_bounded() -> None:
    told = bounded([f"remark {i}" + "x" * 1000 for i in range(30)])
    assert len(told) == 11 and told[-1] == "and 20 more remarks" and max(map(len, told)) <= 300


def test_a_million_reasons_are_grouped_in_a_moment() -> None:
    left_out = {f"clip{i}.mp4": f"cannot be decoded after {i % 50} frames: Invalid data" for i in range(1_000_000)}
    (only,) = grouped(left_out, 1_000_000)
    assert (only.clips, len(only.first)) == (1_000_000, MOST_NAMES)
