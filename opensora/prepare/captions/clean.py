"""A caption without what models and files put around it. Pure; each function applied again changes nothing.

`tidy` is for every caption: one normal form (NFC), no control characters, single spaces. `clean` is for answers of models, in this order:

1. what a model thought aloud (`<think>…</think>`) goes,
2. markdown goes: fences, headings, list marks, emphasis, code marks; of a link its text stays,
3. a pair of quotes around the whole goes,
4. an opening goes: "Sure!", "Here is a description of the video:", "Caption:", and "The video shows", "This clip depicts", "In this
   video, we see" and the like; the next letter becomes a capital. An opening that is all there is stays.

Captions that people or published lists give are only tidied: their words are theirs.
"""

from __future__ import annotations

import re
import unicodedata

_STEERS = re.compile("[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\u200b\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
"""Control characters and marks that turn a line's direction. Joiners (U+200C, U+200D) belong to words of some scripts."""

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL | re.IGNORECASE)
_FENCE = re.compile(r"^[ \t]*(?:```|~~~)[\w-]*[ \t]*$", re.MULTILINE)
_MARK = r"[ \t]*(?:#{1,6}|[-*+•]|\d{1,2}[.)]|>)[ \t]+"
_LINE_MARK = re.compile(rf"^{_MARK}", re.MULTILINE)
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()\s]*\)")
_STRONG = re.compile(r"(\*\*|__)(?=\S)(.{1,400}?)(?<=\S)\1", re.DOTALL)
_EMPHASIS = re.compile(r"(?<![\w*])([*_])(?=[^\s*_])([^*_\n]+?)(?<=\S)\1(?![\w*])")
_CODE = re.compile(r"`+([^`\n]*)`+")

_QUOTES = (('"', '"'), ("'", "'"), ("“", "”"), ("‘", "’"), ("«", "»"), ("„", "“"), ("「", "」"))

_KIND = (
    r"(?:short |brief |given |provided |entire )?(?:video|clip|footage|film|scene|image|picture|frame|sequence|shot)s?"
    r"(?: (?:clip|sequence|footage|frames?))?"
)
_TOLD = (
    r"(?:shows?|depicts?|features?|captures?|displays?|showcases?|presents?|portrays?|illustrates?|contains?|is of|is about|"
    r"(?:begins?|starts?|opens?) with)"
)
_OPENINGS = (
    r"(?:sure|certainly|of course|absolutely|okay|ok)[!,.:]+\s*(?=\S)",
    r"here(?:'s| is| are) (?:an? |the |my )?(?:\w+ ){0,3}?(?:description|caption|summary)s?"
    rf"(?: (?:of|for) (?:the |this |your )?{_KIND})?\s*:\s*",
    r"(?:video )?(?:caption|description|summary|answer)\s*:\s*",
    rf"(?:the|this|these) {_KIND} {_TOLD}(?: us)?(?: that)?,?\s+",
    rf"in (?:the|this|these) {_KIND},? (?:we (?:can )?see|you (?:can )?see|there (?:is|are))\s+",
    rf"(?:in )?(?:the|this|these) {_KIND},\s+",
)
_OPENING = re.compile(rf"(?P<words>{'|'.join(_OPENINGS)})|{_MARK}", re.IGNORECASE)
_LETTER = re.compile(r"[^\W_]")


def tidy(text: str) -> str:
    """NFC, no control characters, every run of white space one space, none at the ends."""
    return " ".join(_STEERS.sub("", unicodedata.normalize("NFC", text)).split())


def without_thoughts(answer: str) -> str:
    """What is said after, or without, thinking aloud."""
    return _THOUGHT.sub(" ", answer)


def clean(text: str) -> str:
    """A model's answer as a caption. For texts of some pages: work may grow with the square of their length."""
    found = _once(text)
    while (again := _once(found)) != found:  # what is taken away may leave a quote or an opening in front
        found = again
    return found


def _once(text: str) -> str:
    bare = tidy(_plain(without_thoughts(text)))
    return _without_opening(_without_quotes(bare))


def _plain(text: str) -> str:
    """Without markdown."""
    text = _LINE_MARK.sub("", _FENCE.sub("", text))
    text = _CODE.sub(r"\1", _LINK.sub(r"\1", text))
    return _EMPHASIS.sub(r"\2", _STRONG.sub(r"\2", text))


def _without_quotes(text: str) -> str:
    for opens, closes in _QUOTES:
        inner = text[1:-1]
        if len(text) > 2 and text[0] == opens and text[-1] == closes and opens not in inner and closes not in inner:
            return inner.strip()
    return text


def _without_opening(text: str) -> str:
    """Without its openings, and marks of lists between them; the last one stays where nothing comes after it."""
    at, words = 0, False
    while (match := _OPENING.match(text, at)) and _LETTER.search(text, match.end()):
        at, words = match.end(), words or match["words"] is not None
    return text[at : at + 1].upper() + text[at + 1 :] if words else text[at:]
