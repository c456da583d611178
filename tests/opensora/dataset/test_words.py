"""Words of any script: different words stay different, equal ones equal, however a keyboard or a file system writes them."""

from __future__ import annotations

import re
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.dataset.words import split_words

SCRIPTS = st.sampled_from("aéßİıǆΣς한कि्ाลึงเது中々かガカーاَبِ٣３\u200d\u200c\u200b\ufe0f\u00ad😀-_. \u0301\u0323\u1100\u1161\u11a8")
texts = st.text(max_size=20) | st.text(SCRIPTS, max_size=20)


@pytest.mark.parametrize(
    ("one", "other"),
    [("लड़का", "लड़की"), ("कि", "का"), ("ที่", "ทา"), ("মা", "মি"), ("அம்மா", "அமம"), ("café", "cafe"), ("كَتَبَ", "كُتُب")],
    ids=["Hindi", "Hindi, short", "Thai", "Bengali", "Tamil", "French", "Arabic"],
)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_words_that_differ_in_a_mark_are_different(one: str, other: str, form: str) -> None:
    first, second = (split_words(unicodedata.normalize(form, text)) for text in (one, other))
    assert len(first) == len(second) == 1 and first != second


@given(texts)
def test_words_are_the_same_in_every_normal_form(text: str) -> None:
    composed, decomposed = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
    assert split_words(text) == split_words(composed) == split_words(decomposed)


@given(texts)
def test_words_of_words_are_themselves(text: str) -> None:
    words = split_words(text)
    assert split_words(" ".join(words)) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("लड़की हिन्दी पढ़ती", ["लड़की", "हिन्दी", "पढ़ती"]),
        ("Straße, STRASSE; İstanbul istanbul", ["strasse", "strasse", "istanbul", "istanbul"]),
        ("می\u200cخواهم میخواهم", ["میخواهم", "میخواهم"]),
        ("٣ ３ ३ 3", ["3", "3", "3", "3"]),
        ("一只猫, 两只猫", ["一", "只", "猫", "两", "只", "猫"]),
        ("猫がカメラを見る", ["猫", "がカメラを", "見", "る"]),
        ("แมว\u200bวิ่ง แมววิ่ง", ["แมว", "วิ่ง", "แมววิ่ง"]),
        ("a 👩\u200d🦰 runs\ufe0f — co\u00adoperate", ["a", "runs", "cooperate"]),
        ("", []),
        ("... ☃️ \u0301", []),
    ],
)
def test_what_counts_as_a_word(text: str, words: list[str]) -> None:
    assert split_words(text) == [unicodedata.normalize("NFC", word) for word in words]


@given(st.text(st.characters(max_codepoint=0x24F, exclude_characters="İ\u00ad")))
def test_latin_text_has_the_words_that_it_had_in_0_1_0(text: str) -> None:
    before = re.findall(r"\w+", text.casefold())
    assert split_words(text, 1) == before
    if all(unicodedata.category(letter) not in ("Mn", "Mc") for letter in text.casefold()):
        assert split_words(text) == before
