"""What is set aside is never less than what is used, as long as prompts grow with their pixels at most."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from opensora.dataset.prepare_config import CaptionServer
from opensora.prepare.captions.budget import FIRST_IMAGE, FIRST_VIDEO, MARGIN, Budget, Spent


def settings(**changes: Any) -> CaptionServer:
    return CaptionServer.model_validate({"kind": "server", "url": "http://h/v1", "model": "m", "max_tokens": 100} | changes)


@given(
    st.integers(10, 500),
    st.floats(1e-4, 1e-2),
    st.lists(st.tuples(st.integers(1_000, 1_000_000), st.integers(1, 100)), min_size=1, max_size=60),
    st.integers(20_000, 200_000),
    st.integers(1, 8),
)
def test_a_budget_is_never_passed(text: int, a_pixel: float, requests: list[tuple[int, int]], limit: int, at_a_time: int) -> None:
    """Prompts have `text` tokens and so many for each pixel; as many requests as fit are under way at a time."""
    budget, under_way, used = Budget(settings(budget_tokens=limit)), [], 0
    for pixels, out in requests:
        while (given := budget.set_aside(pixels)) is None and under_way:
            budget.answered(*under_way.pop(0))
        if given is None:
            break
        tokens_in = min(text + round(a_pixel * pixels), 3 * FIRST_IMAGE)
        used += tokens_in + out
        assert used <= limit
        under_way.append((given, tokens_in, out))
        if len(under_way) >= at_a_time:
            budget.answered(*under_way.pop(0))
    for each in under_way:
        budget.answered(*each)
    assert budget.spent.tokens == used <= limit


def test_answers_as_long_as_they_may_be_pass_no_budget() -> None:
    """Short prompts and long answers: what comes out is what the money goes for."""
    budget, used = Budget(settings(budget_tokens=14_000, max_tokens=1_000)), 0
    while (given := budget.set_aside(1)) is not None:
        budget.answered(given, 10, 1_000)
        used += 1_010
        assert used <= 14_000
    assert used > 14_000 - 2 * 1_013


@pytest.mark.parametrize(("profile", "first"), [("images", 3 * FIRST_IMAGE), ("video_url", FIRST_VIDEO), ("input_video", FIRST_VIDEO)])
def test_before_any_answer_more_is_set_aside_than_models_take(profile: str, first: int) -> None:
    assert Budget(settings(profile=profile)).estimate(1000).tokens_in > first


def test_the_estimate_follows_the_answers() -> None:
    budget = Budget(settings())
    for tokens, pixels in ((400, 1000), (500, 2000)):
        given = budget.set_aside(pixels)
        assert given is not None
        budget.answered(given, tokens, 10)
    assert budget.estimate(500).tokens_in == 500 * MARGIN, "a smaller clip takes no more than the largest so far"
    assert budget.estimate(4000).tokens_in == 4 * 400 * MARGIN, "a larger one as many times more"


def test_without_a_budget_nothing_is_held_back() -> None:
    budget = Budget(settings())
    assert all(budget.set_aside(10**9) is not None for _ in range(1000))


def test_what_was_not_used_is_free_again() -> None:
    budget = Budget(settings(budget_tokens=13_000))
    given = budget.set_aside(1)
    assert given is not None and budget.set_aside(1) is None
    budget.unused(given)
    assert budget.set_aside(1) is not None and budget.spent == Spent()


def test_a_price_counts_both_ways() -> None:
    budget = Budget(settings(budget_usd=1.0, usd_per_million_in=2.0, usd_per_million_out=8.0))
    given = budget.set_aside(1)
    assert given is not None
    budget.answered(given, 1000, 50)
    assert budget.spent.dollars == pytest.approx((1000 * 2 + 50 * 8) / 1e6)


def test_why_a_run_ends_names_both_numbers() -> None:
    budget = Budget(settings(budget_tokens=5000, budget_usd=0.5, usd_per_million_in=1.0), Spent(tokens_in=4000, dollars=0.4))
    assert "budget_tokens 5,000 (4,000 used) and budget_usd 0.5 (0.4000 used)" in budget.told(1)
