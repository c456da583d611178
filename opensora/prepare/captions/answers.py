"""Whether an answer is a caption: not cut off, not the same words again and again, not empty, no refusal. Pure.

What each test finds is a few stable words that rows are counted by.
"""

from __future__ import annotations

import re

from opensora.dataset.words import split_words
from opensora.prepare.captions.clean import clean, without_thoughts
from opensora.printable import quoted

CUT_OFF = "answer cut off"
REPEATS = "answer repeats itself"
EMPTY = "empty answer"
TOO_LONG = "answer too long"
REFUSES = "model refuses"

_NOT = r"(?:can(?:'|no)t|can not|could not|couldn't|won't|will not|do not|don't)"
_REFUSALS = re.compile(
    rf"""\W*(?:
        i(?:'m|\ am)\ (?:very\ |so\ |really\ )?(?:sorry|unable|not\ able)\b
      | (?:sorry|unfortunately|my\ apologies|i\ apologi[sz]e)[,.\s].{{0,80}}\b(?:{_NOT}|unable|not\ able)\b
      | i\ {_NOT}\ (?:\w+\ )?(?:see|view|watch|access|process|help|assist|provide|describe|identify|comply|fulfil|discuss|have\ access)
      | as\ an?\ (?:ai\b|artificial|language\ model|text-based)
      | no\ (?:image|video|frame)s?\ (?:was|were|is|are|has\ been|have\ been)\ (?:provided|attached)
    )""",
    re.IGNORECASE | re.DOTALL | re.VERBOSE,
)
"""At the beginning of an answer."""

LONGEST_PERIOD = 40
"""Words of a run that may follow itself."""
ONE_WORD, SOME_WORDS, MANY_WORDS = 5, 4, 3
"""How often a run of one word, of two to four, of five and more may not stand in a row: "very, very, very big" is English."""
SENTENCE_WORDS, SENTENCE_TIMES = 4, 3
"""A sentence of so many words and more may not stand so often anywhere."""
TRIGRAM_WORDS, TRIGRAM_SHARE = 40, 0.6
"""In a text of so many words and more at least this share of all runs of three words stands once only. Ordinary prose has over 0.9."""


LONGEST = 20_000
"""Characters of an answer, thoughts left out; more is no caption, and is not looked at further."""


def judged(answer: str, finish: str) -> tuple[str, str]:
    """A model's answer as a caption, and why it is none; `finish` is the server's `finish_reason`."""
    said = without_thoughts(answer)
    if len(said) > LONGEST:
        return said[:LONGEST], TOO_LONG
    text = clean(said)
    return text, problem(text, finish)


def problem(text: str, finish: str) -> str:
    """Why a cleaned answer is no caption; empty: it is one."""
    if finish == "content_filter" or _REFUSALS.match(text.replace("’", "'")):
        return REFUSES
    if repeats(text):  # asked before "cut off": a model that repeats itself never ends, and the reason should say so
        return REPEATS
    if finish == "length":
        return CUT_OFF
    return "" if split_words(text) else EMPTY


def repeats(text: str) -> bool:
    """Whether the same words come again and again."""
    words = split_words(text)
    if any(_in_a_row(words, period) for period in range(1, min(LONGEST_PERIOD, len(words) // 2) + 1)):
        return True
    sentences = [" ".join(split_words(sentence)) for sentence in re.split(r"[.!?。！？\n]+", text)]
    long = [sentence for sentence in sentences if sentence.count(" ") + 1 >= SENTENCE_WORDS]
    if any(long.count(sentence) >= SENTENCE_TIMES for sentence in set(long)):
        return True
    if len(words) < TRIGRAM_WORDS:
        return False
    runs = list(zip(words, words[1:], words[2:], strict=False))
    return len(set(runs)) < TRIGRAM_SHARE * len(runs)


def _in_a_row(words: list[str], period: int) -> bool:
    """Whether a run of `period` words follows itself too often."""
    times = ONE_WORD if period == 1 else SOME_WORDS if period < 5 else MANY_WORDS
    same = 0
    for word, later in zip(words, words[period:], strict=False):
        same = same + 1 if word == later else 0
        if same >= period * (times - 1):
            return True
    return False


def start(text: str, most: int = 80) -> str:
    """Of a bad answer, for its reason."""
    return quoted(text, most) if text else "nothing"
