"""Prompts that cannot be drawn are refused before anything is: empty ones, endless ones, those that are no text, and those of which the
text encoder knows no token. Of a prompt that is longer than what the model saw, `sampler.too_long` says so.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

from opensora.encoders.protocol import T5Encoder, TextEncoder
from opensora.errors import ConfigError
from opensora.printable import quoted

MOST_CHARACTERS = 20_000
"""A hundred times what T5 reads of it in Open-Sora 1.0; a longer one is a file that was given by mistake."""
SHOWN = 60
"""Characters of a prompt in a message."""


def check(prompts: Sequence[str], text: TextEncoder, negative: str | None = None) -> None:
    """Raises ConfigError."""
    for prompt in prompts:
        _check(prompt, text, "prompt")
    if negative is not None:
        _check(negative, text, "negative")


def _check(prompt: str, text: TextEncoder, what: str) -> None:
    if not prompt.strip():
        raise ConfigError(f"{what} {quoted(prompt)!r}: it is empty; say what {'to draw' if what == 'prompt' else 'not to draw'}")
    if len(prompt) > MOST_CHARACTERS:
        fact = f"{len(prompt):,} characters, more than {MOST_CHARACTERS:,}"
        raise ConfigError(f'{what} "{quoted(prompt, SHOWN)}": {fact}; say it in a few sentences')
    strange = next((letter for letter in prompt if unicodedata.category(letter) in ("Cc", "Cs") and letter not in "\t\n\r"), None)
    if strange is not None:
        raise ConfigError(f'{what} "{quoted(prompt, SHOWN)}": {quoted(strange)} is no text; write it without')
    if isinstance(text, T5Encoder) and not text.knows(prompt):
        said = "the text encoder knows nothing of it; write it in a language that it was made for"
        raise ConfigError(f'{what} "{quoted(prompt, SHOWN)}": {said}')
