"""Clean a caption for a pretrained text encoder: its words stay, and what belongs to the web page around them is removed.

Captions from the web contain HTML entities, tags and addresses, and several Unicode forms of the same letter. Text in all scripts is kept:
the cleaning of PixArt-α and Open-Sora 1.0 kept only Latin letters and made captions in Chinese, Cyrillic, Arabic, Japanese and Hindi
empty. The result is in lower case, as were the captions that PixArt-α's weights were trained on.

`clean` is idempotent, and never makes a caption empty that has any text.
"""

from __future__ import annotations

import html
import re
import unicodedata

_ELEMENTS = (
    "a|abbr|article|b|big|blockquote|body|br|center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|footer|h[1-6]|head|header|hr|html|i|"
    "iframe|img|ins|li|link|mark|meta|ol|p|pre|q|s|script|section|small|span|strike|strong|style|sub|sup|table|tbody|td|tfoot|th|thead|title|"
    "tr|tt|u|ul|video"
)
# Only HTML's own elements, and attributes need a value: "5 < 6", "<person>" and "<a left turn>" are text.
_ATTRIBUTE = r"""\s+[\w:.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_TAG = re.compile(rf"</?(?:{_ELEMENTS})(?:{_ATTRIBUTE})*\s*/?>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
# Only ASCII: text in a script without spaces may directly follow an address. An address ends with a letter, digit or slash, so that the
# punctuation after it is not part of it.
_ADDRESS = re.compile(r"(?<![a-z0-9])(?:(?:https?|ftp)://|www\.)(?:[!-~]*[a-z0-9/])?", re.IGNORECASE)


def clean(caption: str) -> str:
    """The caption with entities unescaped (however often escaped), without tags and addresses, in NFKC, lower case, single spaces.

    A caption that has nothing but tags and addresses keeps them.
    """
    spelled = _spelled(caption)
    found = spelled
    while (less := _spelled(_ADDRESS.sub(" ", _TAG.sub(" ", found)))) != found:  # removing one may leave a new tag behind
        found = less
    return found or spelled


def _spelled(text: str) -> str:
    """Normalise the spelling of a text. Applied again it changes nothing."""
    while (again := " ".join(_printable(unicodedata.normalize("NFKC", html.unescape(text)).lower()).split())) != text:
        text = again
    return text


def _printable(text: str) -> str:
    return "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
