"""A caption as a pretrained text encoder should see it: words, and none of the page that they were taken from.

Captions of the web carry entities, tags and addresses, and every form of the same letter. All scripts stay: the cleaning that PixArt-α and
Open-Sora 1.0 shared kept Latin letters alone and made empty captions of Chinese, Cyrillic, Arabic, Japanese and Hindi ones. Lower case, as
the captions that PixArt-α's weights learned from.

`clean` is idempotent, and never makes an empty caption of one that has something to say.
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
# Of HTML alone, and attributes need a value: "5 < 6", "<person>" and "<a left turn>" are text.
_ATTRIBUTE = r"""\s+[\w:.-]+\s*=\s*(?:"[^"]*"|'[^']*'|[^\s"'<>]+)"""
_TAG = re.compile(rf"</?(?:{_ELEMENTS})(?:{_ATTRIBUTE})*\s*/?>|<!--.*?-->", re.IGNORECASE | re.DOTALL)
# ASCII alone: a script that needs no spaces may follow an address at once. It ends with a letter, digit or slash, the rest is punctuation.
_ADDRESS = re.compile(r"(?<![a-z0-9])(?:(?:https?|ftp)://|www\.)(?:[!-~]*[a-z0-9/])?", re.IGNORECASE)


def clean(caption: str) -> str:
    """Entities unescaped (however often they were escaped), tags and addresses gone, NFKC, lower case, single spaces.

    A caption that is nothing but tags and addresses keeps them.
    """
    spelled = _spelled(caption)
    found = spelled
    while (less := _spelled(_ADDRESS.sub(" ", _TAG.sub(" ", found)))) != found:  # what is taken out may leave a new tag behind
        found = less
    return found or spelled


def _spelled(text: str) -> str:
    """One spelling of the same text; applied again it changes nothing."""
    while (again := " ".join(_printable(unicodedata.normalize("NFKC", html.unescape(text)).lower()).split())) != text:
        text = again
    return text


def _printable(text: str) -> str:
    return "".join(" " if unicodedata.category(letter) == "Cc" else letter for letter in text)
