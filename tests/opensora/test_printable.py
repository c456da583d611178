"""What people wrote steers no terminal, and stays what it is."""

from __future__ import annotations

import io
import logging
import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from opensora.printable import Printable, one_line, printable, quoted

HARMLESS = [
    "a digit 3, moving left (fast)",
    "लड़का और लड़की",
    "پسری در خیابان می\u200cدود",
    "a family 👨\u200d👩\u200d👧 playing 🎉",
    "一只猫在花园里奔跑",
    "C:\\temp [bold] :smile:",
    "e\u0301 é",
]


def test_words_of_every_script_are_shown_as_they_are() -> None:
    for text in HARMLESS:
        assert printable(text) == one_line(text) == text


@given(st.text(st.characters(), max_size=40))
def test_nothing_that_is_shown_moves_a_cursor_or_turns_a_line(text: str) -> None:
    for shown in (printable(text), one_line(text)):
        shown.encode()  # no half of a surrogate pair
        for letter in shown:
            assert unicodedata.category(letter) != "Cc" or letter in "\t\n"
            assert unicodedata.bidirectional(letter) not in ("LRE", "RLE", "PDF", "LRO", "RLO", "LRI", "RLI", "FSI", "PDI")
    assert len(one_line(text).splitlines()) <= 1


def test_what_is_escaped_can_still_be_read() -> None:
    assert printable("a\x1b[2Jb\x07\x00\u202e\ud800\x9b") == "a\\x1b[2Jb\\x07\\x00\\u202e\\ud800\\x9b"
    assert (printable("a\n\tb\r"), one_line("a\n\tb\r")) == ("a\n\tb\\r", "a\\n\\tb\\r")
    assert one_line("a" * 100, 10) == "a" * 9 + "…"


def test_a_log_that_quotes_a_file_name_steers_nothing() -> None:
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    handler.setFormatter(Printable("%(message)s"))
    log = logging.Logger("test")
    log.addHandler(handler)
    try:
        raise OSError("no such file: \x1b]0;pwned\x07.mp4")
    except OSError:
        log.exception("left out %s", "\x1b[31mred.mp4")
    assert "\x1b" not in stream.getvalue() and "\\x1b[31mred.mp4" in stream.getvalue() and "Traceback" in stream.getvalue()


def test_what_people_wrote_is_no_command_within_a_sentence() -> None:
    assert quoted("osctl cancel.mp4") == "osctl\\x20cancel.mp4" and quoted("a\nosctl\tresume") == "a\\nosctl\\tresume"
    assert quoted("myosctl and osctl.yaml") == "myosctl and osctl.yaml" and quoted("x" * 9, 4) == "xxx…"
