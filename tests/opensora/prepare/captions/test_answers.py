"""Which answers are captions."""

from __future__ import annotations

import pytest

from opensora.prepare.captions import answers

GOOD = (
    "A dog runs.",
    "A very, very, very big wave breaks over a small boat.",
    "No, no, no: the coach waves both arms while the players walk off.",
    "A woman in a red coat walks along a pier. She stops, looks at the sea, and walks on. The light is low and warm, and the camera "
    "follows her at the height of her shoulders. Behind her two gulls fight over a piece of bread.",
    "A train passes, then a second train passes, then a third train passes in the other direction.",
    "The man on the left looks at the man on the right. The man on the right looks at the woman in the middle. The woman in the middle "
    "looks at the camera, and the camera moves slowly to the left until the man on the left is out of the picture.",
    "一只狗在海滩上奔跑，背景是大海和日落。",
    "I can see a lake in front of a house.",
    "Unfortunately for the goalkeeper the ball rolls over the line.",
    "a digit 3 moving left",
    "Sorry is the word on the sign that a boy holds up.",
)


@pytest.mark.parametrize("text", GOOD)
def test_prose_is_a_caption(text: str) -> None:
    assert answers.problem(text, "stop") == ""


@pytest.mark.parametrize(
    "text",
    [
        "the the the the the the",
        "a man walks and a man walks and a man walks and a man walks and",
        "The camera pans to the left. " * 3,
        "A man. " + "The light is soft and warm here. He looks up. " * 4,
        "一只狗在跑一只狗在跑一只狗在跑一只狗在跑一只狗在跑",
        " ".join(f"there is a person number {n % 7} near the tree," for n in range(20)),
        "and so on, " * 200,
    ],
)
def test_the_same_again_and_again_is_none(text: str) -> None:
    assert answers.problem(text, "stop") == answers.REPEATS
    assert answers.problem(text, "length") == answers.REPEATS, "it never ends because it repeats"


@pytest.mark.parametrize(
    "text",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, I cannot assist with this request.",
        "I am unable to view videos.",
        "I cannot see the video you mention.",
        "Sorry, I can't describe this.",
        "Unfortunately, I am not able to process images.",
        "As an AI language model, I have no eyes.",
        "No images were provided.",
        '"I don\'t have access to the video."',
    ],
)
def test_a_refusal_is_none(text: str) -> None:
    assert answers.problem(text, "stop") == answers.REFUSES


@pytest.mark.parametrize(
    ("text", "finish", "problem"),
    [
        ("A man walks", "length", answers.CUT_OFF),
        ("", "stop", answers.EMPTY),
        ("…!", "stop", answers.EMPTY),
        ("", "length", answers.CUT_OFF),
        ("A man walks.", "content_filter", answers.REFUSES),
        ("A man walks.", "", ""),
        ("A man walks.", "eos", ""),
    ],
)
def test_what_the_server_says_of_the_end_counts(text: str, finish: str, problem: str) -> None:
    assert answers.problem(text, finish) == problem


@pytest.mark.parametrize(
    "unit",
    ["word ", "**a ", "__a**b", "\n", "Sure! ", "- Sure! ", '"', "[", "![a](", "<think>", "```\n", "I'm sorry, ", "a. ", "\u0301", "字"],
)
def test_a_megabyte_of_anything_is_no_caption_and_takes_no_time(unit: str) -> None:
    """Tests have no clock; without the bound some of these take hours, and the run's own time limit ends them."""
    text, problem = answers.judged(unit * (1_000_000 // len(unit)), "stop")
    assert problem and len(text) <= answers.LONGEST


@pytest.mark.parametrize("unit", ["**a ", "__a**b", "\n", "- Sure! ", "![a](", "```\n", "I'm sorry, "])
def test_the_longest_answer_that_is_looked_at_takes_no_time_either(unit: str) -> None:
    text, problem = answers.judged(unit * (answers.LONGEST // len(unit)), "stop")
    assert problem or text == "Sure!", "what is nothing but openings keeps one"


def test_thoughts_do_not_count() -> None:
    assert answers.judged(f"<think>{'hm, ' * 50_000}</think>**A dog** runs.", "stop") == ("A dog runs.", "")
