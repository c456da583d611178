"""What the words of a caption are: for the embedded word encoder, for checks before a launch, and for exported models. Pure.

Owns the split of a text into words, in its versions: a vocabulary was made with one of them and keeps it for life. Free of torch and of
this package, since `opensora.export` copies this file.

Version 2, of new vocabularies:
- The same text in another normal form (macOS decomposes what a keyboard writes, Linux does not) gives the same words; case goes
  (`Straße` is `strasse`, `İstanbul` is `istanbul`; the Turkish `ı` stays itself).
- A combining mark belongs to its letter, as in Hindi, Thai, Tamil and Arabic with vowels: `लड़का` and `लड़की` are two words.
- Marks that are not seen (joiners, direction marks, soft hyphens, variation selectors) are passed over: Persian `می‌خواهم` is one word
  with its joiner and without. A space of no width (U+200B) divides words.
- Decimal digits of any script are the same digits.
- A Chinese character is a word, since nothing divides words there; in Japanese a run of kana is one. Thai, Lao, Khmer and Burmese write
  their words together, and finding them takes a dictionary: there a word is what spaces divide. Put spaces, or U+200B, between words.
- Punctuation and emoji go.

Version 1, of the releases up to 0.1.0, cut words at their marks. Of text whose letters are single code points of a script without such
marks (ASCII; Latin, Greek or Cyrillic as a keyboard writes them) both make the same words, but for `İ`.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache

VERSION = 2
"""Of new vocabularies."""

_UNSEEN = re.compile("[\u00ad\u034f\u061c\u200c-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufe00-\ufe0f\ufeff\U000e0100-\U000e01ef]")
_HAN = "\u3007\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"


def split_words(text: str, version: int = VERSION) -> list[str]:
    """The words of a text, in their order."""
    if version == 1 or text.isascii():
        return re.findall(r"\w+", text.casefold())
    seen = _UNSEEN.sub("", unicodedata.normalize("NFD", text)).casefold().replace("i\u0307", "i")
    seen = "".join(_plain_digit(letter) for letter in unicodedata.normalize("NFC", seen))
    marks = "".join(sorted(letter for letter in set(seen) if unicodedata.category(letter) in ("Mn", "Mc")))
    return _words(marks).findall(seen)


def _plain_digit(letter: str) -> str:
    value = None if letter.isascii() else unicodedata.decimal(letter, None)
    return letter if value is None else str(value)


@lru_cache(maxsize=256)
def _words(marks: str) -> re.Pattern[str]:
    """A Chinese character with its marks, or other letters and digits with theirs."""
    own = f"[{re.escape(marks)}]*" if marks else ""
    letter = rf"(?:(?![{_HAN}])\w{own})"
    return re.compile(rf"[{_HAN}]{own}|{letter}+")
