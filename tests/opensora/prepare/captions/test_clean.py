"""What is taken off an answer, and what never is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.prepare.captions.clean import clean, tidy


@pytest.mark.parametrize(
    ("answer", "caption"),
    [
        ("  A dog\n\nruns.\t", "A dog runs."),
        ("The video shows a dog running.", "A dog running."),
        ("The video clip depicts a dog.", "A dog."),
        ("This short clip captures a dog.", "A dog."),
        ("the footage begins with a dog.", "A dog."),
        ("In this video, we see a dog.", "A dog."),
        ("In the video, a dog runs.", "A dog runs."),
        ("The image is of a dog.", "A dog."),
        ("Sure! Here is a detailed description of the video:\n\nThe video shows a dog.", "A dog."),
        ("Here's the caption: a dog.", "A dog."),
        ("Caption: a dog.", "A dog."),
        ('"A dog runs."', "A dog runs."),
        ("“A dog runs.”", "A dog runs."),
        ('"The scene shows a dog."', "A dog."),
        ('"Stop" and "Go" are on two signs, "Stop"', '"Stop" and "Go" are on two signs, "Stop"'),
        ("**A dog** runs *fast* and `barks`.", "A dog runs fast and barks."),
        ("# Description\n- A dog runs.\n- It barks.", "Description A dog runs. It barks."),
        ("1. A dog runs.\n2. It barks.", "A dog runs. It barks."),
        ("```text\nA dog runs.\n```", "A dog runs."),
        ("A [dog](http://example.com/dog) runs.", "A dog runs."),
        ("<think>There is a dog.</think>\nA dog runs.", "A dog runs."),
        ("<think>There is a dog and", ""),
        ("A\x00 dog\x1b[31m runs\u202e.", "A dog[31m runs."),
        ("Cafe\u0301 at night", "Café at night"),
        ("5 * 3 * 2 = 30 on a board", "5 * 3 * 2 = 30 on a board"),
        ("snake_case_name on a screen", "snake_case_name on a screen"),
        ("The video shows", "The video shows"),
        ("The video store shows its age.", "The video store shows its age."),
        ("A man shows the video.", "A man shows the video."),
        ("The scenery shows autumn colours.", "The scenery shows autumn colours."),
        ("می‌خواهم بروم", "می‌خواهم بروم"),
    ],
)
def test_an_answer_becomes_a_caption(answer: str, caption: str) -> None:
    assert clean(answer) == caption


PARTS = (*"ab \n*_`\"'#-[]()<>:,.", "The video shows ", "Sure! ", "<think>", "</think>", "\u202e", "1. ", "```\n")


@given(st.lists(st.sampled_from(PARTS), max_size=40).map("".join))
def test_cleaning_again_changes_nothing(text: str) -> None:
    once = clean(text)
    assert clean(once) == once
    assert tidy(once) == once


@given(st.text(max_size=60))
def test_no_control_character_and_no_double_space_stays(text: str) -> None:
    found = tidy(text)
    assert "  " not in found and found == found.strip()
    assert not any(ord(letter) < 32 or ord(letter) == 127 for letter in found)
    assert tidy(found) == found
