"""Laws of caption cleaning: every script stays, cleaning twice is cleaning once, and what says something goes on saying something."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from opensora.encoders.captions import clean

MARKUP = st.sampled_from(
    ["<b>", "</b>", "<br/>", "&amp;", "&lt;", "b&gt;", "&#x1F600;", "https://a.b/c?d=e", "www.", "<", ">", "&", "; ", "amp;"]
)
ANYTHING = st.lists(st.one_of(MARKUP, st.text(max_size=8)), max_size=12).map("".join)
LETTERS = st.text(st.characters(categories=["L"]), min_size=1)


@pytest.mark.parametrize(
    "caption",
    [
        "一只猫在雪地里跑",
        "кот бежит по снегу",
        "قطة تجري في الثلج",
        "猫が雪の中を走る",
        "बिल्ली बर्फ में दौड़ती है",
        "고양이가 눈 속을 달린다",
        "γάτα",
        "ein süßes kätzchen",
    ],
)
def test_captions_of_every_script_stay_as_they_are(caption: str) -> None:
    assert clean(caption) == unicodedata.normalize("NFKC", caption)


@pytest.mark.parametrize(
    ("caption", "cleaned"),
    [
        ("A  cat\n&amp; a dog", "a cat & a dog"),
        ("a cat &amp;amp;amp; a dog", "a cat & a dog"),
        ("<p class='x'>A <b>cat</b><br/>runs</p>", "a cat runs"),
        ("&lt;b&gt;cat&lt;/b&gt;", "cat"),
        ("cat, see https://example.org/cat.html?x=1.", "cat, see ."),
        ("猫https://example.org/猫", "猫 猫"),
        ("ｃａｔ\u00a0①", "cat 1"),
        ("cat\x00\x1fdog", "cat dog"),
        ("5 < 6 and 7 > 3", "5 < 6 and 7 > 3"),
        ("a <person> waves", "a <person> waves"),
        ("<a left turn>", "<a left turn>"),
        ("https://example.org/", "https://example.org/"),
        ("  \n", ""),
        ("", ""),
    ],
)
def test_what_belongs_to_the_page_goes_and_what_belongs_to_the_caption_stays(caption: str, cleaned: str) -> None:
    assert clean(caption) == cleaned


@given(ANYTHING)
@example("<<b>b>cat")
@example("&＆lt;b＞")
@example("İ")
def test_cleaning_twice_is_cleaning_once(caption: str) -> None:
    assert clean(clean(caption)) == clean(caption)


@given(LETTERS)
@example("ﷺ")
def test_letters_of_any_script_are_never_cleaned_away(caption: str) -> None:
    assert any(unicodedata.category(letter)[0] == "L" for letter in clean(caption))


@given(ANYTHING)
def test_only_a_caption_of_blanks_becomes_empty(caption: str) -> None:
    if any(unicodedata.category(letter)[0] == "L" for letter in caption):
        assert clean(caption)
