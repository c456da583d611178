"""Which language a caption is in, by py3langid (its model is in its wheel; 0.65 CPU-seconds once, then 26 microseconds a caption)."""

from __future__ import annotations

from opensora.dataset.words import split_words

FEWEST_WORDS = 4
"""In fewer nothing can be told: py3langid takes "a video" for Afrikaans and "a grey square" for Nigerian Pidgin."""

MOST_LETTERS = 2_000
"""Of a caption that are looked at: some tables hold captions of megabytes."""


def language_of(text: str) -> str:
    """ISO 639-1 (three letters where the language has no two); empty where the text is too short to tell."""
    text = text[:MOST_LETTERS]
    if len(split_words(text)) < FEWEST_WORDS:
        return ""
    import py3langid  # type: ignore[import-untyped]  # 80 MB of memory, which `captions: {kind: digits}` need not pay

    language, _ = py3langid.classify(text)
    return str(language)
