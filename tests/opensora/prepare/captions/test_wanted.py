"""Length and language of captions that are kept, and how a language is told."""

from __future__ import annotations

from typing import Any

import pytest

from opensora.dataset.prepare_config import PrepareConfig
from opensora.dataset.rows import Captioned, Drop
from opensora.prepare.captions import wanted, word_count
from opensora.prepare.captions.language import language_of


def settings(**changes: Any) -> PrepareConfig:
    return PrepareConfig.model_validate({"name": "n", "sources": [{"path": "p"}]} | changes)


def left_by(captioned: Captioned, **changes: Any) -> str | None:
    """Why a clip with this caption leaves."""
    try:
        wanted(captioned, settings(**changes))
    except Drop as drop:
        return drop.reason
    return None


@pytest.mark.parametrize("text", ["one two three", "one two three four five", "一只狗"])
def test_within_the_bounds_a_caption_stays(text: str) -> None:
    assert left_by(Captioned(text, "m"), caption_words=(3, 5)) is None


@pytest.mark.parametrize(
    ("text", "reason"), [("one two", "fewer than 3 words"), ("1 2 3 4 5 6", "more than 5 words"), ("", "fewer than 3")]
)
def test_outside_it_is_dropped_and_rows_are_counted_by_the_bound(text: str, reason: str) -> None:
    with pytest.raises(Drop, match=reason) as drop:
        wanted(Captioned(text, "m"), settings(caption_words=(3, 5)))
    assert drop.value.detail == str(word_count(Captioned(text, "m")))


def test_another_language_is_dropped() -> None:
    with pytest.raises(Drop) as drop:
        wanted(Captioned("ein Hund läuft", "m", language="de"), settings(languages=["en", "fr"]))
    assert (drop.value.reason, drop.value.detail) == ("caption not in en, fr", "de")


@pytest.mark.parametrize("language", ["en", "fr", ""])
def test_a_language_that_is_named_or_cannot_be_told_stays(language: str) -> None:
    assert left_by(Captioned("a dog", "m", language=language), languages=["en", "fr"]) is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("A dog runs over a beach at sunset.", "en"),
        ("Ein Hund läuft über den Strand", "de"),
        ("Un chien court sur la plage au coucher du soleil", "fr"),
        ("一只狗在海滩上奔跑", "zh"),
        ("Девочка в красном платье быстро бежит по берегу моря, а за ней летят чайки", "ru"),
        ("夕暮れの浜辺を犬が走っている", "ja"),
        ("a digit 3 moving left", "en"),
        ("a video", ""),
        ("a grey square", ""),
        ("", ""),
    ],
)
def test_a_language_is_told_from_four_words_on(text: str, language: str) -> None:
    assert language_of(text) == language
