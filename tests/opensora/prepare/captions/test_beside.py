"""Captions that came along: of the video, or of the segment that a clip was cut from."""

from __future__ import annotations

import clip_rows
import pytest

from opensora.dataset.rows import Drop, Provenance
from opensora.prepare.captions import beside

SEGMENTS = ((0.0, 3.0, "a cat sleeps"), (3.0, 6.5, "a dog runs"), (6.5, 9.0, "a bird sings"))


@pytest.mark.parametrize("start_s", [0.0, 10.0, 59_857.0])
@pytest.mark.parametrize(
    ("start", "end", "text"),
    [
        (0.0, 3.0, "a cat sleeps"),
        (3.0, 6.5, "a dog runs"),
        (6.6, 8.9, "a bird sings"),
        (2.5, 4.0, "a dog runs"),
        (2.0, 3.5, "a cat sleeps"),
    ],
)
def test_a_clip_takes_the_caption_of_its_own_segment(start: float, end: float, text: str, start_s: float) -> None:
    """Wherever the container's clock begins: lists count from the first frame."""
    provenance = Provenance(caption="three animals", segments=SEGMENTS)
    clip = clip_rows.clip("a", provenance=provenance, start_s=start_s + start, end_s=start_s + end, of=clip_rows.media(start_s=start_s))
    captioned = beside.caption(clip)
    assert (captioned.text, captioned.by, captioned.tokens_in, captioned.seed) == (text, "beside", 0, None)


@pytest.mark.parametrize("segments", [(), ((20.0, 30.0, "elsewhere"),), ((0.0, 3.0, "  "),)])
def test_without_one_it_takes_the_video_s(segments: tuple[tuple[float, float, str], ...]) -> None:
    assert beside.caption(clip_rows.clip("a", provenance=Provenance(caption="three animals", segments=segments))).text == "three animals"


def test_words_of_people_stay_but_for_spaces_and_control_characters() -> None:
    clip = clip_rows.clip("a", provenance=Provenance(caption=' "The video shows\n a **dog**"\x00 '))
    assert beside.caption(clip).text == '"The video shows a **dog**"'


def test_its_language_is_told() -> None:
    assert beside.caption(clip_rows.clip("a", provenance=Provenance(caption="Ein Hund läuft über den Strand"))).language == "de"


@pytest.mark.parametrize("text", ["", " \n", "\x00"])
def test_no_caption_is_a_drop_that_says_what_to_do(text: str) -> None:
    with pytest.raises(Drop, match=r"no caption: a has none beside it; .*caption\.kind"):
        beside.caption(clip_rows.clip("a", provenance=Provenance(caption=text)))
