"""Names of files that are made from what a person wrote: prompts and captions, in any script, of any length.

Owns the one way from a text to a name. A name is never empty, never leaves its folder, fits every file system and store (printable, no
`/` and no backslash, NAME_BYTES at most, no capitals), and no two names of one list are equal: each begins with its place in the list.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence

WORD_CHARACTERS = 60
NAME_BYTES = 160
"""Of a whole name. File systems take 255, the store 200 a part of a key, and a suffix may follow while a file is being written."""


def file_names(texts: Sequence[str], suffix: str) -> list[str]:
    """`00-a-digit-3-moving-left.mp4`: one for each text; of a text without letters and digits the number alone."""
    return [_name(number, text, suffix) for number, text in enumerate(texts)]


def _name(number: int, text: str, suffix: str) -> str:
    head = f"{number:02d}"
    words = _words(text)[:WORD_CHARACTERS].encode()[: NAME_BYTES - len(head) - 1 - len(suffix.encode())].decode(errors="ignore").strip("-")
    return f"{head}-{words}{suffix}" if words else f"{head}{suffix}"


def _words(text: str) -> str:
    """Letters, digits and the marks that belong to letters, of any script; one hyphen for whatever lies between."""
    plain = unicodedata.normalize("NFKC", text[: 100 * WORD_CHARACTERS]).lower()
    kept = "".join(letter if unicodedata.category(letter)[0] in "LNM" and letter.isprintable() else " " for letter in plain)
    return "-".join(kept.split())
