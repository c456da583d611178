"""Text of people (captions, prompts, names of files, errors that quote them) as a terminal, a log or a table may show it.

Owns what is escaped: control characters, which move a cursor or colour a screen; marks that turn the direction of what follows; line and
paragraph separators; halves of surrogate pairs, which no UTF-8 has. Letters of every script stay, with their marks and joiners: they
steer nothing. Within a sentence of ours a name or a caption may read like a command of osctl, and `osctl` completes the commands of a
sentence (`orchestrator.cli.typed`): so the space behind the word is escaped (`quoted`), by whoever puts such a text into the sentence,
since nobody can tell later whose words are whose. What is kept for machines (JSON, captions in a cache) is never touched.
"""

from __future__ import annotations

import logging
import re
from typing import TextIO

_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_LINES = re.compile("[\t\n]")
_COMMANDS = re.compile(r"\bosctl (?=[a-z])")


def printable(text: str) -> str:
    """Tabs and line ends stay."""
    return _STEERS.sub(_escaped, text)


def one_line(text: str, most: int | None = None) -> str:
    """Tabs and line ends are escaped too; of a longer text than `most` characters the beginning, and an ellipsis."""
    cut = text if most is None or len(text) <= most else f"{text[: most - 1]}…"
    return _LINES.sub(_escaped, printable(cut))


def quoted(text: str, most: int | None = None) -> str:
    """Within a sentence: as `one_line`, and no command of osctl."""
    return _COMMANDS.sub(r"osctl\\x20", one_line(text, most))


def several(number: int, one: str, many: str | None = None) -> str:
    """`1 clip`, `1,234 clips`; `many` where an s behind `one` does not do: several(n, "clip is", "clips are")."""
    return f"{number:,} {one if number == 1 else many or f'{one}s'}"


def _escaped(match: re.Match[str]) -> str:
    letter = match[0]
    named = {"\t": "\\t", "\n": "\\n", "\r": "\\r"}.get(letter)
    return named or (f"\\x{ord(letter):02x}" if ord(letter) < 0x100 else f"\\u{ord(letter):04x}")


class Printable(logging.Formatter):
    """Of a log: what is quoted in a line, or in a traceback, steers no terminal on which it is read."""

    def format(self, record: logging.LogRecord) -> str:
        return printable(super().format(record))


def log_to(stream: TextIO, level: int, form: str) -> None:
    """The log of this process, a line each, in `form` as `logging` has it."""
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Printable(form))
    logging.basicConfig(handlers=[handler], level=level)
