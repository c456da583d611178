from __future__ import annotations

import sys
import unicodedata
from pathlib import Path

import pytest
from hard_prompts import HARD
from hypothesis import given, settings
from hypothesis import strategies as st

from opensora.evaluation.file_names import file_names
from orchestrator.ports import check_key


def test_every_prompt_has_a_file_name_of_its_own(tmp_path: Path) -> None:
    names = file_names(HARD, ".mp4")
    assert len({name.lower() for name in names}) == len(HARD)
    for name in names:
        assert check_key(f"samples/{name}") and name.endswith(".mp4")
        (tmp_path / name).write_bytes(b"x")
        assert (tmp_path / name).resolve().parent == tmp_path.resolve()
    assert len(list(tmp_path.iterdir())) == len(HARD)


@given(st.lists(st.text(alphabet=st.characters(), max_size=300), max_size=5))
@settings(max_examples=200, deadline=None)
def test_any_text_is_a_name(texts: list[str]) -> None:
    names = file_names(texts, ".mp4")
    assert len(set(names)) == len(texts)
    assert all(check_key(name) == name and len(name.encode()) <= 160 for name in names)


def test_every_character_is_a_name() -> None:
    for start in range(0, sys.maxunicode, 997):
        (name,) = file_names(["".join(map(chr, range(start, min(start + 50, sys.maxunicode))))], ".mp4")
        assert check_key(name) == name


@pytest.mark.parametrize(
    ("prompt", "name"),
    [
        ("A digit 3 moving left", "00-a-digit-3-moving-left.mp4"),
        ("50/50", "00-50-50.mp4"),
        ("Красный квадрат", "00-красный-квадрат.mp4"),
        ("🎉", "00.mp4"),
        (unicodedata.normalize("NFD", "é"), "00-é.mp4"),
    ],
)
def test_a_name_keeps_the_words(prompt: str, name: str) -> None:
    assert file_names([prompt], ".mp4") == [name]
