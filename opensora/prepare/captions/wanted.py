"""Which captions are kept: by their length in words, and by language. Pure."""

from __future__ import annotations

from opensora.dataset.prepare_config import PrepareConfig
from opensora.dataset.rows import Captioned, Drop
from opensora.dataset.words import split_words


def word_count(captioned: Captioned) -> int:
    """Words as the trainer counts them: a Chinese character is one."""
    return len(split_words(captioned.text))


def wanted(captioned: Captioned, settings: PrepareConfig) -> None:
    """A caption whose language could not be told (empty: fewer than four words) passes `languages`.

    Raises:
        Drop: the caption is too short or too long, or in another language.
    """
    fewest, most = settings.caption_words
    words, language = word_count(captioned), captioned.language
    if words < fewest:
        raise Drop(f"caption of fewer than {fewest} words", f"{words}")
    if words > most:
        raise Drop(f"caption of more than {most} words", f"{words}")
    if settings.languages and language and language not in settings.languages:
        raise Drop(f"caption not in {', '.join(settings.languages)}", language)
